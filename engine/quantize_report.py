"""What a quantization did to each tensor, and the tables that say so."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from math import prod, sqrt
from typing import TextIO

from trichord.weight_format import WeightFormat


@dataclass
class TensorReport:
    """One tensor before and after; errors are those of the values that the new blocks decode to."""

    name: str
    shape: tuple[int, ...]
    source: WeightFormat
    format: WeightFormat
    source_bytes: int
    nbytes: int
    squared_error: float = 0.0
    squares: float = 0.0  # of the weights themselves; 0 where the tensor was copied

    @property
    def weights(self) -> int:
        """How many numbers the tensor holds."""
        return prod(self.shape)

    @property
    def converted(self) -> bool:
        """Whether its format changed."""
        return self.source is not self.format


@dataclass
class QuantizeReport:
    """All tensors, in the file's order, and the size of both files."""

    source_bytes: int
    nbytes: int = 0
    tensors: list[TensorReport] = field(default_factory=list)

    @property
    def bits_per_weight(self) -> float:
        """Over all tensors of the new file."""
        weights = sum(tensor.weights for tensor in self.tensors)
        return 8 * sum(tensor.nbytes for tensor in self.tensors) / weights if weights else 0.0

    def render(self, stream: TextIO) -> None:
        """Writes a table of the converted tensors, one of the formats, and a line on the sizes."""
        from rich.box import SIMPLE_HEAD
        from rich.console import Console
        from rich.table import Table

        console = Console(file=stream, width=None if stream.isatty() else 140, markup=False, highlight=False)
        by_tensor = Table("tensor", "shape", "from", "to", box=SIMPLE_HEAD, pad_edge=False)
        by_format = Table("format", box=SIMPLE_HEAD, pad_edge=False)
        by_format.add_column("tensors", justify="right")
        by_format.add_column("bits per weight", justify="right")
        for table in (by_tensor, by_format):
            for heading in ("size", "RMSE", "RMSE / RMS"):
                table.add_column(heading, justify="right")
        groups: dict[WeightFormat, list[TensorReport]] = defaultdict(list)
        for tensor in self.tensors:
            groups[tensor.format].append(tensor)
            if tensor.converted:
                # The name is the file's: a control character in it could drive the terminal.
                name = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in tensor.name)
                shape = " x ".join(map(str, tensor.shape))
                by_tensor.add_row(name, shape, tensor.source.name, tensor.format.name, *_figures([tensor]))
        for format, tensors in sorted(groups.items(), key=lambda item: -sum(tensor.nbytes for tensor in item[1])):
            by_format.add_row(format.name, f"{len(tensors)}", f"{format.bits_per_weight:.4g}", *_figures(tensors))
        if by_tensor.rows:
            console.print(by_tensor)
        console.print(by_format)
        console.print(
            f"{size(self.source_bytes)} -> {size(self.nbytes)} ({self.nbytes / self.source_bytes:.1%}),"
            f" {self.bits_per_weight:.3f} bits per weight"
        )


def _figures(tensors: Iterable[TensorReport]) -> tuple[str, str, str]:
    """Size, root-mean-square error, and its ratio to the weights' root mean square, over the converted tensors."""
    tensors = list(tensors)
    nbytes = sum(tensor.nbytes for tensor in tensors)
    converted = [tensor for tensor in tensors if tensor.converted]
    if not converted:
        return size(nbytes), "-", "-"
    error, squares = sum(t.squared_error for t in converted), sum(t.squares for t in converted)
    rmse = sqrt(error / sum(t.weights for t in converted))
    return size(nbytes), f"{rmse:.3g}", f"{sqrt(error / squares):.2%}" if squares else "-"


def size(nbytes: int) -> str:
    """A number of bytes in binary units: 4.58 GiB."""
    for exponent, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if nbytes >= 1 << exponent:
            return f"{nbytes / (1 << exponent):.2f} {unit}"
    return f"{nbytes} B"
