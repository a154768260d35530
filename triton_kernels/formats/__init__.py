"""Every weight format that the kernels multiply by. To add one: a file beside this one, and its line in the table."""

from __future__ import annotations

from trichord.triton_kernels.formats.floats import BF16, F16, F32, F64
from trichord.triton_kernels.formats.format import Format, Plane
from trichord.triton_kernels.formats.iq1_m import IQ1_M
from trichord.triton_kernels.formats.iq1_s import IQ1_S
from trichord.triton_kernels.formats.iq2_s import IQ2_S
from trichord.triton_kernels.formats.iq2_xs import IQ2_XS
from trichord.triton_kernels.formats.iq2_xxs import IQ2_XXS
from trichord.triton_kernels.formats.iq3_s import IQ3_S
from trichord.triton_kernels.formats.iq3_xxs import IQ3_XXS
from trichord.triton_kernels.formats.iq4_nl import IQ4_NL
from trichord.triton_kernels.formats.iq4_xs import IQ4_XS
from trichord.triton_kernels.formats.mxfp4 import MXFP4
from trichord.triton_kernels.formats.nvfp4 import NVFP4
from trichord.triton_kernels.formats.q1_0 import Q1_0
from trichord.triton_kernels.formats.q2_0 import Q2_0
from trichord.triton_kernels.formats.q2_k import Q2_K
from trichord.triton_kernels.formats.q3_k import Q3_K
from trichord.triton_kernels.formats.q4_0 import Q4_0
from trichord.triton_kernels.formats.q4_1 import Q4_1
from trichord.triton_kernels.formats.q4_k import Q4_K
from trichord.triton_kernels.formats.q5_0 import Q5_0
from trichord.triton_kernels.formats.q5_1 import Q5_1
from trichord.triton_kernels.formats.q5_k import Q5_K
from trichord.triton_kernels.formats.q6_k import Q6_K
from trichord.triton_kernels.formats.q8_0 import Q8_0
from trichord.triton_kernels.formats.q8_1 import Q8_1
from trichord.triton_kernels.formats.q8_k import Q8_K
from trichord.triton_kernels.formats.tq1_0 import TQ1_0
from trichord.triton_kernels.formats.tq2_0 import TQ2_0
from trichord.weight_format import WeightFormat

FORMATS: dict[WeightFormat, Format] = {
    format.weight_format: format
    for format in (
        *(F32, F16, BF16, F64),
        *(Q1_0, Q2_0, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q8_1),
        *(Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, Q8_K),
        *(IQ1_S, IQ1_M, IQ2_XXS, IQ2_XS, IQ2_S, IQ3_XXS, IQ3_S, IQ4_NL, IQ4_XS),
        *(MXFP4, NVFP4),
        *(TQ1_0, TQ2_0),
    )
}

__all__ = ["FORMATS", "Format", "Plane"]
