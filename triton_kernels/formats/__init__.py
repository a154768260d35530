"""Every weight format that the kernels multiply by. To add one: a file beside this one, and its line in the table."""

from __future__ import annotations

from trichord.triton_kernels.formats.floats import BF16, F16, F32, F64
from trichord.triton_kernels.formats.format import Format, Plane
from trichord.triton_kernels.formats.q4_0 import Q4_0
from trichord.triton_kernels.formats.q4_k import Q4_K
from trichord.triton_kernels.formats.q5_k import Q5_K
from trichord.triton_kernels.formats.q6_k import Q6_K
from trichord.triton_kernels.formats.q8_0 import Q8_0
from trichord.triton_kernels.formats.q8_k import Q8_K
from trichord.weight_format import WeightFormat

FORMATS: dict[WeightFormat, Format] = {
    format.weight_format: format for format in (F32, F16, BF16, F64, Q4_0, Q8_0, Q4_K, Q5_K, Q6_K, Q8_K)
}

__all__ = ["FORMATS", "Format", "Plane"]
