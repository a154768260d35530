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


@triton.constexpr_function
def _look_up_assembly() -> str:
    """PTX for `look_up`, "" for other targets.

    `prmt` takes four bytes of the eight in two words, each by three bits of a selector's nibble, whose fourth bit must
    be zero. So two of them look up the lower and the upper half of the table, and a third takes from the one or the
    other by the codes' fourth bits. That serves four nibbles; the last two instructions put the bytes in order.
    """
    target = None if _interpreted() else current_target()
    if target is None or target.backend != "cuda":
        return ""
    return """{
        .reg .b32 i, s, a, b, c, d;
        and.b32 i, $2, 0x77777777; and.b32 s, $2, 0x88888888; shr.u32 s, s, 1; or.b32 s, s, 0x32103210;
        prmt.b32 a, $3, $4, i; prmt.b32 b, $5, $6, i; prmt.b32 c, a, b, s;
        shr.u32 i, i, 16; shr.u32 s, s, 16;
        prmt.b32 a, $3, $4, i; prmt.b32 b, $5, $6, i; prmt.b32 d, a, b, s;
        prmt.b32 $0, c, d, 0x6420; prmt.b32 $1, c, d, 0x7531;
    }"""


@triton.jit
def look_up(codes, TABLE: tl.constexpr):
    """The bytes of TABLE (16 in four words) that the low and the high nibbles of each byte of int32 codes index."""
    ASSEMBLY: tl.constexpr = _look_up_assembly()
    if ASSEMBLY == "":
        return _look_up_nibbles(codes, TABLE), _look_up_nibbles(codes >> 4, TABLE)
    else:
        return tl.inline_asm_elementwise(
            ASSEMBLY,
            "=r,=r,r,r,r,r,r",
            [codes, TABLE[0], TABLE[1], TABLE[2], TABLE[3]],
            dtype=(tl.int32, tl.int32),
            is_pure=True,
            pack=1,
        )


@triton.jit
def _look_up_nibbles(codes, TABLE: tl.constexpr):
    bytes = codes & 0
    for index in tl.static_range(4):
        code = (codes >> (8 * index)) & 15
        word = tl.where(code < 8, tl.where(code < 4, TABLE[0], TABLE[1]), tl.where(code < 12, TABLE[2], TABLE[3]))
        bytes |= ((word >> (8 * (code & 3))) & 255) << (8 * index)
    return bytes


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
