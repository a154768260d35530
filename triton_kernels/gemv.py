"""Products with few rows of activations: the weights stream past once, and the time is that of reading them.

Weights that meet the same activations share a launch, whatever their formats: it has the programs of all of them, and
each program knows by its number which weight it works on.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from trichord.triton_kernels.activations import Activations
from trichord.triton_kernels.dependent import await_predecessor, dependent_launch
from trichord.triton_kernels.experts import Pairs
from trichord.triton_kernels.formats import FORMATS, Format
from trichord.triton_kernels.launch import GemvTile, launches
from trichord.triton_kernels.primitives import dot4
from trichord.weight_format import Weight


@triton.jit
def _four(words):
    """(A, B, 4) -> four tensors (A, B)."""
    even, odd = tl.split(tl.reshape(words, (words.shape[0], words.shape[1], 2, 2)))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def _products_of_words(low, high, limbs, word, correction, LIMBS: tl.constexpr):
    """Products (T, R, G) float32 of four or eight words (R, G) with x, whose words begin at `word`, - correction.

    Each adds to the one before it: sums side by side would take as many instructions again to be added up.
    """
    product = 0
    for limb in tl.static_range(LIMBS):
        if limb == LIMBS - 1:
            product = product * 256 - correction[:, None, :]
        x = _four(tl.load(limbs + limb * 8 + word))
        for index in tl.static_range(4):
            product = dot4(low[index][None], x[index][:, None, :], product)
        if high is not None:
            x = _four(tl.load(limbs + limb * 8 + 4 + word))
            for index in tl.static_range(4):
                product = dot4(high[index][None], x[index][:, None, :], product)
    return product.to(tl.float32)


@triton.jit
def _integer_products(
    planes, activations, row, group, valid, token, columns, FORMAT: tl.constexpr, LIMBS: tl.constexpr
):
    """Products of each group by integer arithmetic -> (T, R, G) float32, and the scale of its activations.

    That is zero for the groups that are not `valid`.
    """
    limbs, scales, sums = activations
    groups = columns // 32
    low, high, scale, minimum = FORMAT.decode(planes, row, group, columns)
    low, high = _four(low), _four(high)
    x_group = (token * groups)[:, None] + group[None, :]
    word = (x_group * (8 * LIMBS))[:, :, None] + tl.arange(0, 4)[None, None, :]
    first, second = tl.split(tl.load(sums + (x_group * 2)[:, :, None] + tl.arange(0, 2)[None, None, :]))
    if FORMAT.scale_group == 32:
        x_sum = first + second
        scale = tl.reshape(scale, scale.shape[:2])[None]
        result = _products_of_words(low, high, limbs, word, FORMAT.zero * x_sum, LIMBS) * scale
        if FORMAT.has_minimum:
            result -= x_sum.to(tl.float32)[:, None, :] * tl.reshape(minimum, minimum.shape[:2])[None]
    else:
        scale, other = tl.split(scale)
        result = _products_of_words(low, None, limbs, word, FORMAT.zero * first, LIMBS) * scale[None]
        result += _products_of_words(high, None, limbs, word + 4, FORMAT.zero * second, LIMBS) * other[None]
        if FORMAT.has_minimum:
            minimum, other = tl.split(minimum)
            result -= first.to(tl.float32)[:, None, :] * minimum[None]
            result -= second.to(tl.float32)[:, None, :] * other[None]
    return result, tl.load(scales + x_group, mask=valid[None, :], other=0.0)[:, None, :]


@triton.jit
def _float_products(planes, x, row, group, token, columns, FORMAT: tl.constexpr):
    """Products of each group of a float format, in float32 -> (T, R, G)."""
    weights = FORMAT.decode(planes, row, group, columns)
    column = (group * FORMAT.group_size)[None, None, :, None] + tl.arange(0, FORMAT.group_size)[None, None, None, :]
    values = tl.load(x + (token * columns)[:, None, None, None] + column, mask=column < columns, other=0.0)
    return tl.sum(weights[None] * values, axis=3)


@triton.jit
def product_of_tile(
    tile,
    planes,
    x,
    limbs,
    scale,
    bias,
    experts,
    rows,
    columns,
    tokens,
    FORMATS: tl.constexpr,
    INDEX: tl.constexpr,
    LIMBS: tl.constexpr,
    SHARING: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
):
    """x times rows tile * BLOCK_ROWS and following of one weight, as in `gemv_kernel` -> (TOKENS, BLOCK_ROWS).

    The weight's format is FORMATS[INDEX]. Beyond the last token and row there is anything.
    """
    FORMAT: tl.constexpr = FORMATS[INDEX]
    groups = tl.cdiv(columns, FORMAT.group_size)
    row = tl.minimum(tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS), rows - 1).to(tl.int64)
    token = tl.minimum(tl.arange(0, TOKENS), tokens - 1)
    if SHARING:
        pair = tl.program_id(1)
        row += tl.load(experts + pair).to(tl.int64) * rows
        token += pair // SHARING
    accumulator = tl.zeros((TOKENS, BLOCK_ROWS, BLOCK_GROUPS), tl.float32)
    for start in range(0, groups, BLOCK_GROUPS):
        group = start + tl.arange(0, BLOCK_GROUPS)
        inside = tl.minimum(group, groups - 1)
        if FORMAT.integer:
            products, x_scale = _integer_products(
                planes, limbs, row, inside, group < groups, token, columns, FORMAT, LIMBS
            )
            accumulator += products * x_scale
        else:
            products = _float_products(planes, x, row, inside, token, columns, FORMAT)
            accumulator += tl.where((group < groups)[None, None, :], products, 0.0)
    product = tl.sum(accumulator, axis=2) * scale
    if bias is not None:
        product += tl.load(bias + row)[None, :]
    return product


@triton.jit
def store_tile(product, tile, y, rows, tokens):
    """Stores what is inside of `product_of_tile`'s result to y (tokens, rows)."""
    index = tile * product.shape[1] + tl.arange(0, product.shape[1])[None, :]
    token = tl.arange(0, product.shape[0])[:, None]
    tl.store(y + token.to(tl.int64) * rows + index, product, mask=(token < tokens) & (index < rows))


@triton.jit
def gemv_kernel(
    planes,
    x,
    limbs,
    y,
    scales,
    biases,
    experts,
    rows,
    columns,
    tokens,
    FORMATS: tl.constexpr,
    LIMBS: tl.constexpr,
    SHARING: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    PDL: tl.constexpr,
):
    """y (tokens, rows) = x times the transposed weight times scale + bias, BLOCK_ROWS rows of a weight a program.

    planes, y, scales, biases, rows, FORMATS, BLOCK_ROWS and BLOCK_GROUPS are tuples with an element for each weight.
    Integer formats read `limbs`: the limbs, scales and sums of x. Indices past the end read the last element instead,
    and what they give is dropped. With SHARING, y (pairs, rows) is a row of x times the matrix of its expert for each
    of `experts` (pairs,): SHARING adjacent pairs share the row, tokens is 1.
    """
    tile = tl.program_id(0)
    await_predecessor(PDL)
    for i in tl.static_range(len(FORMATS)):
        tiles = tl.cdiv(rows[i], BLOCK_ROWS[i])
        if len(FORMATS) == 1 or ((tile >= 0) & (tile < tiles)):
            product = product_of_tile(
                tile, planes[i], x, limbs, scales[i], biases[i], experts, rows[i], columns, tokens,
                FORMATS, i, LIMBS, SHARING, TOKENS, BLOCK_ROWS[i], BLOCK_GROUPS[i],
            )  # fmt: skip
            target = y[i]
            if SHARING:
                target += tl.program_id(1).to(tl.int64) * rows[i]
            store_tile(product, tile, target, rows[i], tokens)
        tile -= tiles


class Formats(tuple[Format, ...]):
    """Formats as one constexpr argument, which Triton's cache knows by all that a kernel reads of them."""

    @property
    def cache_key(self) -> str:
        return " ".join(format.cache_key for format in self)


def gemv(
    activations: Activations,
    weights: Sequence[Weight],
    biases: Sequence[torch.Tensor | None],
    limbs: int,
    pairs: Pairs | None = None,
) -> list[torch.Tensor]:
    """At most FEW_ROWS rows of x (T, K) times each transposed weight (N, K) and its scale + bias -> [(T, N) float32].

    With `pairs`, each of them is a row of x times the matrix of its expert in a weight (X, N, K), without the scale
    -> (pairs, N). An integer format multiplies by `limbs` limbs of activations (see `activations.store_limbs`), a float
    format by x. Weights whose tiles take as many warps share a launch.
    """
    tokens, products = (activations.tokens, 1) if pairs is None else (1, pairs.count)
    results = [activations.x.new_empty((tokens * products, weight.out_features)) for weight in weights]
    together: dict[int, list[tuple[Weight, torch.Tensor | None, torch.Tensor, GemvTile]]] = {}
    for weight, bias, y in zip(weights, biases, results, strict=True):
        groups = FORMATS[weight.format].groups(activations.columns)
        padded = triton.next_power_of_2(tokens)
        tile = launches().gemv_tile(padded, groups, weight.out_features, weight.format.name)
        together.setdefault(tile.warps, []).append((weight, bias, y, tile))
    for warps, parts in together.items():
        members, their_biases, targets, tiles = zip(*parts, strict=True)
        formats = Formats(FORMATS[weight.format] for weight in members)
        rows = tuple(weight.out_features for weight in members)
        programs = sum(triton.cdiv(count, tile.rows) for count, tile in zip(rows, tiles, strict=True))
        gemv_kernel[(programs, products)](
            tuple(
                format.arguments(weight.data, weight.rows, activations.columns)
                for format, weight in zip(formats, members, strict=True)
            ),
            activations.x,
            activations.limbs(limbs) if any(format.integer for format in formats) else None,
            targets,
            tuple(float(weight.scale) if pairs is None else 1.0 for weight in members),
            their_biases,
            None if pairs is None else pairs.experts,
            rows,
            activations.columns,
            tokens,
            FORMATS=formats,
            LIMBS=limbs,
            SHARING=0 if pairs is None else pairs.sharing,
            TOKENS=triton.next_power_of_2(tokens),
            BLOCK_ROWS=tuple(tile.rows for tile in tiles),
            BLOCK_GROUPS=tuple(tile.groups for tile in tiles),
            num_warps=warps,
            num_stages=1,
            enable_fp_fusion=True,
            **dependent_launch(),
        )
    return results
