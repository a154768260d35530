"""Programmatic dependent launch: the next kernel of a stream starts up while the programs of this one still finish.

Every kernel that is launched so waits for the one before it, whole, before it reads or writes anything: so what any
earlier kernel has left behind is there as well. NVIDIA's GPUs have it from sm_90 on.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from trichord.triton_kernels.launch import launches


@triton.jit
def await_predecessor(PDL: tl.constexpr):
    """Waits for what the kernel before this one stores, and allows the next one to start up: with PDL alone.

    To be called before the first return, by a kernel that is launched with the options of `dependent_launch`.
    """
    if PDL:
        gdc_wait()
        gdc_launch_dependents()


def dependent_launch() -> dict[str, bool]:
    """The options of a launch: PDL for the kernel, and, where it is on, Triton's own, which not every target knows."""
    return {"PDL": True, "launch_pdl": True} if launches().pdl else {"PDL": False}
