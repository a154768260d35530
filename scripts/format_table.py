"""Prints docs/formats.md: every weight format, its size in the file and on a GPU, and the error of CPU products.

python scripts/format_table.py > docs/formats.md
"""

from __future__ import annotations

import sys

import numpy as np
import torch

from trichord import Weight, WeightFormat
from trichord.dispatch import PRECISIONS, operations
from trichord.quantize import quantize_blocks

_SHAPE = (16, 4096)
_ROWS = (1, 64)

_PAGE = f"""# Weight formats

Every format that GGUF files keep weights in is multiplied as it is packed, on both backends. The table is printed by
`scripts/format_table.py`.

* **Bits per weight**, scales included: in the file, which is what the CPU reads too, and on a GPU, where the blocks are
  split into aligned planes. Some formats keep their scales there in whole bytes, and Q8_K leaves out sums that it can
  compute again.
* **Relative error** of a product on the CPU, with 1 row of activations and with 64, against float64 arithmetic on the
  same quantized weights: {_SHAPE[0]} x {_SHAPE[1]} normal weights, normal activations. It is what the arithmetic adds,
  not what quantizing the weights cost. With 64 rows `exact` and `default` multiply decoded tiles in float32.

| format | bits in the file | bits on a GPU | {" | ".join(f"`{p}`, 1 / 64 rows" for p in PRECISIONS)} |
| --- | ---: | ---: | {" | ".join("---:" for _ in PRECISIONS)} |"""


def main() -> int:
    print(_PAGE)
    cpu, gpu = operations("blocks"), operations("planes")
    for format in sorted(cpu.FUSED_FORMATS & gpu.FUSED_FORMATS, key=lambda format: (format.block_size, format.name)):
        blocks = torch.from_numpy(_blocks(format))
        weight = Weight(blocks, format, _SHAPE, "blocks")
        bits = 8 * gpu.pack(blocks, format, _SHAPE[1]).numel() / (_SHAPE[0] * _SHAPE[1])
        cells = [format.name, f"{format.bits_per_weight:g}", f"{bits:g}"]
        cells += [" / ".join(f"{_error(weight, precision, rows):.1e}" for rows in _ROWS) for precision in PRECISIONS]
        print(f"| {' | '.join(cells)} |", flush=True)
    return 0


def _blocks(format: WeightFormat) -> np.ndarray:
    values = np.random.default_rng(0).normal(0, 0.02, _SHAPE).astype(np.float32)
    return values.astype("<f8").view(np.uint8) if format is WeightFormat.F64 else quantize_blocks(values, format)


def _error(weight: Weight, precision: str, rows: int) -> float:
    x = torch.randn(rows, _SHAPE[1], generator=torch.Generator().manual_seed(1))
    expected = x.double() @ operations("blocks").dequantize(weight).double().T
    (y,) = operations("blocks").matmul(x, [weight], precision)
    return float((y.double() - expected).norm() / expected.norm())


if __name__ == "__main__":
    sys.exit(main())
