"""Instructions that Triton has no operation for, each in the target's assembly and in plain arithmetic."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.target_info import current_target


@triton.constexpr_function
def _dot4_assembly() -> tuple[str, str]:
    """The instruction of the target that multiplies four signed bytes by four, and its kind of register.

    Empty where there is none: in the interpreter, which has no assembler, and on early RDNA.
    """
    target = None if _interpreted() else current_target()
    if target is None:
        return "", ""
    if target.backend == "cuda":
        return "dp4a.s32.s32 $0, $1, $2, $3;", "r"
    if target.arch.startswith(("gfx906", "gfx908", "gfx90a", "gfx94", "gfx95", "gfx103")):
        return "v_dot4_i32_i8 $0, $1, $2, $3", "v"
    if target.arch.startswith(("gfx11", "gfx12")):
        return "v_dot4_i32_iu8 $0, $1, $2, $3 neg_lo:[1,1,0]", "v"
    return "", ""


@triton.constexpr_function
def _interpreted() -> bool:
    return triton.knobs.runtime.interpret


@triton.jit
def half_dot(a, b, accumulator):
    """accumulator (M, N) float32 + the matrix product of a (M, K) and b (K, N) float16."""
    if _interpreted():  # NumPy multiplies float16 a hundred times slower; the products are exact in float32
        return tl.dot(a.to(tl.float32), b.to(tl.float32), accumulator, input_precision="ieee")
    else:
        return tl.dot(a, b, accumulator)


@triton.jit
def byte(word, INDEX: tl.constexpr):
    """Signed byte INDEX of each int32 word."""
    return (word << (24 - 8 * INDEX)) >> 24


@triton.jit
def dot4(a, b, accumulator):
    """accumulator + the dot product of the four signed bytes in each word of a and b; all int32, broadcast."""
    ASSEMBLY: tl.constexpr = _dot4_assembly()[0]
    REGISTER: tl.constexpr = _dot4_assembly()[1]
    if ASSEMBLY == "":
        for index in tl.static_range(4):
            accumulator += byte(a, index) * byte(b, index)
        return accumulator
    else:
        return tl.inline_asm_elementwise(
            ASSEMBLY,
            f"={REGISTER},{REGISTER},{REGISTER},{REGISTER}",
            [a, b, accumulator],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
