"""Products with few rows of activations whose results go through the feed-forward network's activation at once.

The next product reads them rounded in groups of 32, more than a program computes: the last one of a group rounds it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import triton
import triton.language as tl

from trichord.triton_kernels.activation import activate, gated
from trichord.triton_kernels.activations import LIMBS, Activations, store_limbs
from trichord.triton_kernels.arrival import arrives_last, counters
from trichord.triton_kernels.dependent import await_predecessor, dependent_launch
from trichord.triton_kernels.formats import FORMATS
from trichord.triton_kernels.gemv import Formats, product_of_tile, store_tile
from trichord.triton_kernels.launch import FEW_ROWS, GemvTile, launches
from trichord.triton_kernels.matmul import check, matmul, streams
from trichord.weight_format import Weight


@triton.jit
def gated_gemv_kernel(
    planes,
    x,
    limbs,
    y,
    y_limbs,
    arrivals,
    scales,
    biases,
    rows,
    columns,
    tokens,
    FORMATS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    LIMBS: tl.constexpr,
    Y_LIMBS: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    PDL: tl.constexpr,
):
    """y (tokens, rows) = the activation of x times a gate, times x times an up: BLOCK_ROWS rows of each a program.

    planes, scales, biases and FORMATS are tuples of gate and up, or of one weight for the activation alone; the rest is
    as in `gemv_kernel`. With Y_LIMBS, y_limbs take that many limbs of y, for which BLOCK_ROWS divides 32, and 32 rows.
    """
    tile = tl.program_id(0)
    await_predecessor(PDL)
    gate = product_of_tile(
        tile, planes[0], x, limbs, scales[0], biases[0], None, rows, columns, tokens,
        FORMATS, 0, LIMBS, 0, TOKENS, BLOCK_ROWS, BLOCK_GROUPS[0],
    )  # fmt: skip
    up = None
    if len(FORMATS) == 2:
        up = product_of_tile(
            tile, planes[1], x, limbs, scales[1], biases[1], None, rows, columns, tokens,
            FORMATS, 1, LIMBS, 0, TOKENS, BLOCK_ROWS, BLOCK_GROUPS[1],
        )  # fmt: skip
    store_tile(gated(gate, up, ACTIVATION), tile, y, rows, tokens)
    if Y_LIMBS:
        group = tile * BLOCK_ROWS // 32
        if arrives_last(arrivals + group, 32 // BLOCK_ROWS):
            token = tl.arange(0, TOKENS)[:, None]
            element = group * 32 + tl.arange(0, 32)[None, :]
            values = tl.load(y + token * rows + element, mask=token < tokens, other=0.0)
            store_limbs(values, token * (rows // 32) + group, token < tokens, y_limbs, Y_LIMBS)


def activated_matmul(
    x: torch.Tensor | Activations,
    weights: Sequence[Weight],
    precision: str,
    activation: str,
    biases: Sequence[torch.Tensor | None] | None = None,
) -> Activations:
    """x (T, K) times a gate and an up (F, K) -> activation(gate) * up (T, F), as `matmul` reads it in this precision.

    Of one weight it is the activation alone. See `matmul` for the products and `activate` for the activations.
    """
    activations = Activations.of(x)
    for weight in weights:
        check(activations.x, weight, 2)
    tiles = _tiles(activations, weights, precision)
    if not tiles:
        gate, *up = matmul(activations, weights, precision, biases)
        return activate(gate, up[0] if up else None, activation, prepare=precision)
    tokens, rows = activations.tokens, weights[0].out_features
    result = Activations(activations.x.new_empty((tokens, rows)))
    limbs, wanted = LIMBS.get(precision, 0), result.wanted_limbs(precision)
    formats = Formats(FORMATS[weight.format] for weight in weights)
    gated_gemv_kernel[(triton.cdiv(rows, tiles[0].rows),)](
        tuple(
            format.arguments(weight.data, weight.rows, activations.columns)
            for format, weight in zip(formats, weights, strict=True)
        ),
        activations.x,
        activations.limbs(limbs) if any(format.integer for format in formats) else None,
        result.x,
        result.new_limbs(wanted) if wanted else None,
        counters(result.x.device) if wanted else None,
        tuple(float(weight.scale) for weight in weights),
        tuple(biases or [None] * len(weights)),
        rows,
        activations.columns,
        tokens,
        FORMATS=formats,
        ACTIVATION=activation,
        LIMBS=limbs,
        Y_LIMBS=wanted,
        TOKENS=triton.next_power_of_2(tokens),
        BLOCK_ROWS=tiles[0].rows,
        BLOCK_GROUPS=tuple(tile.groups for tile in tiles),
        num_warps=tiles[0].warps,
        num_stages=1,
        enable_fp_fusion=True,
        **dependent_launch(),
    )
    return result


def _tiles(activations: Activations, weights: Sequence[Weight], precision: str) -> list[GemvTile]:
    """The tile of each weight, of the same rows for all; none where the products are of another kind, or many."""
    few = 0 < activations.tokens <= FEW_ROWS
    if not few or not all(streams(weight, precision) for weight in weights):
        return []
    tiles = [
        launches().gemv_tile(
            triton.next_power_of_2(activations.tokens),
            FORMATS[weight.format].groups(activations.columns),
            weight.out_features,
            weight.format.name,
        )
        for weight in weights
    ]
    if any(tile.warps != tiles[0].warps for tile in tiles):
        return []
    return [replace(tile, rows=min(tiles[0].rows, 32)) for tile in tiles]
