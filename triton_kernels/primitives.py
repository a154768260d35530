"""Instructions that Triton has no operation for, each in the target's assembly and in plain arithmetic."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.target_info import current_target


@triton.constexpr_function
def _architecture() -> str:
    """What to assemble for: "cuda", an AMD name such as "gfx942", or nothing in the interpreter."""
    target = None if triton.knobs.runtime.interpret else current_target()
    if target is None:
        return ""
    return "cuda" if target.backend == "cuda" else target.arch


@triton.jit
def half_dot(a, b, accumulator):
    """accumulator (M, N) float32 + the matrix product of a (M, K) and b (K, N) float16."""
    if _architecture() == "":  # NumPy multiplies float16 a hundred times slower; the products are exact in float32
        return tl.dot(a.to(tl.float32), b.to(tl.float32), accumulator, input_precision="ieee")
    else:
        return tl.dot(a, b, accumulator)


@triton.constexpr_function
def _dot4_assembly() -> tuple[str, str]:
    """The instruction that multiplies four signed bytes by four, if there is one, and its constraints."""
    architecture = _architecture()
    if architecture == "cuda":
        return "dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r"
    if architecture.startswith(("gfx906", "gfx908", "gfx90a", "gfx94", "gfx95", "gfx103")):
        return "v_dot4_i32_i8 $0, $1, $2, $3", "=v,v,v,v"
    if architecture.startswith(("gfx11", "gfx12")):
        return "v_dot4_i32_iu8 $0, $1, $2, $3 neg_lo:[1,1,0]", "=v,v,v,v"
    return "", ""


@triton.jit
def dot4(a, b, accumulator):
    """accumulator + the dot product of the four signed bytes in each word of a and b; all int32, broadcast."""
    ASSEMBLY: tl.constexpr = _dot4_assembly()[0]
    CONSTRAINTS: tl.constexpr = _dot4_assembly()[1]
    if ASSEMBLY == "":
        for index in tl.static_range(4):
            accumulator += ((a << (24 - 8 * index)) >> 24) * ((b << (24 - 8 * index)) >> 24)
        return accumulator
    else:
        return tl.inline_asm_elementwise(
            ASSEMBLY, CONSTRAINTS, [a, b, accumulator], dtype=tl.int32, is_pure=True, pack=1
        )


@triton.jit
def unpack_halves(words):
    """int32 (...) -> float16 (..., 2): the two in each word, the lower first."""
    return tl.join(words.to(tl.int16), (words >> 16).to(tl.int16)).to(tl.float16, bitcast=True)


_PACK_PTX = tl.constexpr(
    "{ .reg .b16 low, high; cvt.rn.f16.f32 low, $1; cvt.rn.f16.f32 high, $2; mov.b32 $0, {low, high}; }"
)


@triton.jit
def pack_halves(low, high):
    """Two float32 tensors -> words of two float16, rounded to nearest."""
    if _architecture() == "cuda":
        # Said to be impure, or Triton has every thread that needs a word make it anew instead of exchanging words.
        return tl.inline_asm_elementwise(_PACK_PTX, "=r,f,f", [low, high], dtype=tl.int32, is_pure=False, pack=1)
    else:
        low_bits = low.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32)
        high_bits = high.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32)
        return (low_bits & 0xFFFF) | (high_bits << 16)


@triton.jit
def _half_fma(a, b, c):
    """a * b + c of float16, rounded once; b and c broadcast to a."""
    if _architecture() == "":  # NumPy would round the product, but float32 holds it
        return (a.to(tl.float32) * b.to(tl.float32) + c.to(tl.float32)).to(tl.float16)
    else:
        return tl.fma(a, tl.broadcast_to(b, a.shape), tl.broadcast_to(c, a.shape))


# Neither taking a half twice nor a negation costs an instruction.
_SCALED_PTX = tl.constexpr("{ .reg .b32 code; sub.rn.f16x2 code, $1, $2; mul.rn.f16x2 $0, code, $3; }")
_SCALED_LESS_MINIMUM_PTX = tl.constexpr(
    """{
        .reg .b32 code, scale, minus; .reg .b16 low, high;
        sub.rn.f16x2 code, $1, $2;
        mov.b32 {low, high}, $3; mov.b32 scale, {low, low}; mov.b32 minus, {high, high}; neg.f16x2 minus, minus;
        fma.rn.f16x2 $0, code, scale, minus;
    }"""
)


@triton.jit
def scaled_halves(words, zero, factors, HAS_MINIMUM: tl.constexpr):
    """(half - zero) * scale - minimum of both float16 in each word, rounded once -> float16 (..., 2).

    All are words of two float16 and broadcast to each other: `factors` are scale and minimum or, without a minimum,
    twice the scale. half - zero must be a float16.
    """
    if _architecture() == "cuda":
        words = tl.inline_asm_elementwise(
            _SCALED_LESS_MINIMUM_PTX if HAS_MINIMUM else _SCALED_PTX,
            "=r,r,r,r",
            [words, zero, factors],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
        return unpack_halves(words)
    else:
        codes = unpack_halves(words) - unpack_halves(zero)
        scale, minimum = tl.split(unpack_halves(factors))
        if HAS_MINIMUM:
            return _half_fma(codes, tl.expand_dims(scale, -1), tl.expand_dims(-minimum, -1))
        else:
            return codes * tl.expand_dims(scale, -1)


@triton.jit
def in_register(CONSTANT: tl.constexpr, index):
    """The constant in the shape of `index`, int32 and never negative, which the compiler does not know.

    Otherwise it copies a constant to a register before every instruction that cannot take two of them.
    """
    return (index >> 31) | CONSTANT


# `prmt` takes four bytes of the eight in two words, each by a nibble of the selector: three bits of index, and a fourth
# that takes the byte's sign, eight times over, instead of the byte.
_OCTETS_PTX = tl.constexpr(
    """{
        .reg .b32 upper;
        prmt.b32 $0, $3, $4, $2;
        shr.u32 upper, $2, 16; prmt.b32 $1, $3, $4, upper;
    }"""
)


@triton.constexpr_function
def _permutation(selector: int) -> tuple[str, int]:
    """The instruction that picks four bytes of two words by the nibbles of `selector`; `selector`, a byte each."""
    return f"prmt.b32 $0, $1, $2, {selector};", sum((selector >> 4 * n & 15) << 8 * n for n in range(4))


@triton.jit
def byte_permute(low, high, SELECTOR: tl.constexpr):
    """The bytes of the int32 words `low` and `high` that the nibbles of SELECTOR, 0 to 7, choose, lowest first."""
    ASSEMBLY: tl.constexpr = _permutation(SELECTOR)[0]
    BYTES: tl.constexpr = _permutation(SELECTOR)[1]
    if _architecture() == "cuda":
        return tl.inline_asm_elementwise(ASSEMBLY, "=r,r,r", [low, high], dtype=tl.int32, is_pure=True, pack=1)
    else:
        return _byte_permute(low, high, (low & 0) | BYTES)


@triton.jit
def look_up_8(codes, table):
    """The bytes of a table, 8 in two words, that the nibbles of int32 codes index: the lower four's, the upper four's.

    The fourth bit of each nibble must be zero.
    """
    if _architecture() == "cuda":
        return tl.inline_asm_elementwise(
            _OCTETS_PTX, "=&r,=r,r,r,r", [codes, table[0], table[1]], dtype=(tl.int32, tl.int32), is_pure=True, pack=1
        )
    else:
        low = _byte_permute(table[0], table[1], _spread_nibbles(codes))
        return low, _byte_permute(table[0], table[1], _spread_nibbles(codes >> 16))


_TABLE_PTX = tl.constexpr(
    """{
        .reg .b32 other, upper, first, second;
        xor.b32 other, $2, 0x88888888;
        prmt.b32 first, $3, $4, $2; prmt.b32 second, $5, $6, other; xor.b32 $0, first, second;
        shr.u32 upper, $2, 16; shr.u32 other, other, 16;
        prmt.b32 first, $3, $4, upper; prmt.b32 second, $5, $6, other; xor.b32 $1, first, second;
    }"""
)


@triton.jit
def look_up_16(codes, table):
    """`look_up_8` with a table of 16 in four words: codes up to 7 take a byte of the first two, the others of the last.

    Each half gives a byte to its own codes and to the other's a sign, eight times over: the result is the exclusive or
    of the two. So two bytes 8 apart must have one sign, and the second of two negative ones is stored inverted.
    """
    if _architecture() == "cuda":
        return tl.inline_asm_elementwise(
            _TABLE_PTX,
            "=&r,=r,r,r,r,r,r",
            [codes, table[0], table[1], table[2], table[3]],
            dtype=(tl.int32, tl.int32),
            is_pure=True,
            pack=1,
        )
    else:
        return _look_up_spread(_spread_nibbles(codes), table), _look_up_spread(_spread_nibbles(codes >> 16), table)


@triton.jit
def _look_up_spread(codes, table):
    """Each half of the table by three bits, then one of the two by the fourth."""
    upper = ((codes >> 3) & 0x01010101) * 255
    first = _byte_permute(table[0], table[1], codes & 0x07070707)
    second = _byte_permute(table[2], table[3], codes & 0x07070707)
    inverted = ((first >> 7) & 0x01010101) * 255
    return first ^ ((first ^ second ^ inverted) & upper)


@triton.jit
def _spread_nibbles(codes):
    """The lower four nibbles, a byte each."""
    codes &= 0xFFFF
    codes = (codes | (codes << 8)) & 0x00FF00FF
    return (codes | (codes << 4)) & 0x0F0F0F0F


@triton.jit
def _byte_permute(low, high, selector):
    """The bytes of the words `low` and `high` that the bytes of `selector`, 0 to 7, choose."""
    if _architecture() == "":
        chosen = selector & 0
        for index in tl.static_range(4):
            code = (selector >> (8 * index)) & 7
            chosen |= ((tl.where(code < 4, low, high) >> (8 * (code & 3))) & 255) << (8 * index)
        return chosen
    else:
        return tl.inline_asm_elementwise(
            "v_perm_b32 $0, $1, $2, $3", "=v,v,v,v", [high, low, selector], dtype=tl.int32, is_pure=True, pack=1
        )
