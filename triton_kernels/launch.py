"""Tile sizes, warps and pipeline stages of every product, as data: what to tune for a GPU is in `configs/` alone.

There, too, it says whether kernels start ahead of the end of those before them.

A file there is for one model of GPU, `source` saying whether it was measured on it. A GPU without a file takes that of
the nearest architecture. `scripts/tune.py` writes them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import triton

FEW_ROWS = 8  # rows of activations up to which the weights are streamed past them without tensor cores
SOURCES = ("measured", "estimated from compiled code")
_FOLDER = Path(__file__).parent / "configs"


@dataclass(frozen=True)
class Case:
    """What a tile is for: products with up to `tokens` rows of x, a weight of up to `out` rows, in `format`.

    None stands for any. A tile for more rows of x than the largest case is that of the largest.
    """

    tokens: int
    out: int | None = None
    format: str | None = None


@dataclass(frozen=True)
class GemvTile:
    """A program multiplies `rows` rows of the weight, `groups` groups at a time, by all rows of x.

    As many groups as threads give each thread one group of each row.
    """

    rows: int
    groups: int
    warps: int


@dataclass(frozen=True)
class GemmTile:
    """A program computes `rows` x `tokens` elements of the product, `columns` columns of the weight at a time.

    `group` such tiles side by side, of other rows of x, are worked on before the next rows of the weight. With
    `programs`, that many for each multiprocessor compute all tiles in turn; otherwise there is one for each tile.
    """

    rows: int
    tokens: int
    columns: int
    warps: int
    stages: int
    group: int = 16
    programs: int = 0


@dataclass(frozen=True)
class RowsTile:
    """A program converts `rows` rows, `columns` columns at a time."""

    rows: int
    columns: int
    warps: int


@dataclass(frozen=True)
class Launches:
    """The tiles of one model of GPU, `target` its architecture: "sm_90", "gfx942", or "interpreter"."""

    gpu: str
    target: str
    source: str
    gemv: Mapping[Case, GemvTile]
    gemm: Mapping[Case, GemmTile]
    exact_gemm: Mapping[Case, GemmTile]
    weights: RowsTile  # decoded to float32
    halves: RowsTile  # activations rounded to float16
    limb_groups: int  # groups of activations that a program rounds to limbs
    library_tokens: int | None  # rows of x from which the weight is decoded for the GPU's library; None: never
    library_bytes: int  # of a weight that are decoded for it at a time
    pdl: bool = False  # whether kernels of a decoding step start up while the ones before them finish: see `dependent`

    def __post_init__(self) -> None:
        if self.pdl and not self.pdl_possible:
            raise ValueError(f"{self.gpu}: programmatic dependent launch needs sm_90 or newer, not {self.target}")

    def __hash__(self) -> int:
        return id(self)

    @property
    def pdl_possible(self) -> bool:
        """Whether the target has programmatic dependent launch."""
        family, number = _architecture(self.target)
        return family == "sm_" and number >= 90

    def gemv_tile(self, tokens: int, groups: int, out: int, format: str) -> GemvTile:
        """The tile for `tokens` rows of x and a weight in `format` of `out` rows, `groups` groups each."""
        tile = _best(self, "gemv", tokens, out, format)
        fewer = triton.next_power_of_2(groups)
        if fewer >= tile.groups:
            return tile
        return replace(tile, groups=fewer, warps=max(1, tile.warps * fewer // tile.groups))

    def gemm_tile(self, tokens: int, exact: bool, out: int, format: str) -> GemmTile:
        """The tile for `tokens` rows of x and a weight of `out` rows, in float32 or from float16 operands."""
        return _best(self, "exact_gemm" if exact else "gemm", tokens, out, format)

    def to_json(self) -> str:
        """The text of a file in `configs/`, a line for each tile."""
        lines = []
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Mapping):
                items = ",\n  ".join(json.dumps(_flat(case, tile)) for case, tile in value.items())
                lines.append(f' "{field.name}": [\n  {items}\n ]')
            else:
                value = asdict(value) if isinstance(value, RowsTile) else value
                lines.append(f' "{field.name}": {json.dumps(value)}')
        return "{\n" + ",\n".join(lines) + "\n}\n"

    @classmethod
    def from_json(cls, text: str) -> Launches:
        """The inverse of `to_json`. Raises KeyError or TypeError where the text is something else."""
        given = json.loads(text)
        for name, kind in (("gemv", GemvTile), ("gemm", GemmTile), ("exact_gemm", GemmTile)):
            given[name] = dict(_case_and_tile(entry, kind) for entry in given[name])
        for name in ("weights", "halves"):
            given[name] = RowsTile(**given[name])
        return cls(**given)


def _flat(case: Case, tile: GemvTile | GemmTile) -> dict[str, Any]:
    limits = {"up_to": case.tokens, "out": case.out, "format": case.format}
    return {name: value for name, value in limits.items() if value is not None} | asdict(tile)


def _case_and_tile(entry: dict[str, Any], kind: type) -> tuple[Case, Any]:
    return Case(entry.pop("up_to"), entry.pop("out", None), entry.pop("format", None)), kind(**entry)


@cache
def _best(launches: Launches, table: str, tokens: int, out: int, format: str) -> Any:
    """The tile of the case that fits most closely: the format counts before the rows of x, and these before `out`."""
    tiles = getattr(launches, table)
    fitting = [case for case in tiles if case.format in (None, format) and (case.out is None or case.out >= out)]

    def distance(case: Case) -> tuple[bool, bool, int, float]:
        short = case.tokens < tokens
        return case.format is None, short, -case.tokens if short else case.tokens, case.out or float("inf")

    return tiles[min(fitting, key=distance)]


def configurations(folder: Path = _FOLDER) -> list[Launches]:
    """Every configuration there is, by the name of its file."""
    return [Launches.from_json(path.read_text()) for path in sorted(folder.glob("*.json"))]


def file_name(gpu: str) -> str:
    """`NVIDIA_H200.json` of "NVIDIA H200"."""
    return "".join(letter if letter.isalnum() or letter in "-." else "_" for letter in gpu) + ".json"


def choose(gpu: str, target: str, among: Sequence[Launches]) -> Launches:
    """The configuration of this model, else of the nearest architecture: of the newest that is not newer, if any."""
    family, number = _architecture(target)
    relatives = [each for each in among if _architecture(each.target)[0] == family] or among
    nearest = sorted(relatives, key=lambda each: _architecture(each.target)[1])
    not_newer = [each for each in nearest if _architecture(each.target)[1] <= number]
    return next((each for each in relatives if each.gpu == gpu), (not_newer[::-1] or nearest)[0])


def _architecture(target: str) -> tuple[str, int]:
    """Its family and number within that: ("sm_", 90), ("gfx9", 0x42), ("gfx1", 0x100), or ("interpreter", 0)."""
    for family, base in (("sm_", 10), ("gfx9", 16), ("gfx1", 16)):
        if target.startswith(family):
            return family, int(target.removeprefix(family), base)
    return target, 0


_chosen: Launches | None = None


def use(configuration: Launches | None) -> None:
    """Launch by this configuration from now on; by the GPU's own after None. For tuning."""
    global _chosen
    _chosen = configuration


def launches() -> Launches:
    """The tiles for where the kernels run."""
    if _chosen is not None:
        return _chosen
    if triton.knobs.runtime.interpret:
        return _for_device(None)
    return _for_device(triton.runtime.driver.active.get_current_device())


def processors() -> int:
    """The multiprocessors of the GPU where the kernels run; a number to test with where there is none."""
    if triton.knobs.runtime.interpret:
        return 1
    return _processors(triton.runtime.driver.active.get_current_device())


@cache
def _processors(device: int | str) -> int:
    import torch

    # Compiling for a GPU elsewhere, the device is a name, and nothing depends on how many programs there would be.
    return torch.cuda.get_device_properties(device).multi_processor_count if isinstance(device, int) else 1


@cache
def _for_device(device: int | str | None) -> Launches:
    if device is None:
        return choose("", "interpreter", configurations())
    import torch

    target = triton.runtime.driver.active.get_current_target()
    name = torch.cuda.get_device_name(device) if isinstance(device, int) else ""  # compiling for a GPU elsewhere
    arch = f"sm_{target.arch}" if target.backend == "cuda" else target.arch.split(":")[0]
    return choose(name, arch, configurations())
