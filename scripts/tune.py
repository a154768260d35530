"""Finds the fastest tiles of the products on this machine's GPU, and writes them as its launch configuration.

    python scripts/tune.py                                    # all formats, to triton_kernels/configs/
    python scripts/tune.py --format Q4_K Q6_K --limit 300

For each kernel, number of rows of activations and class of shape, the candidates are timed with CUDA events, on copies
of the weight that no cache holds. A format keeps tiles of its own only where they beat the best for all formats by
more than noise. Then the fused products race against the GPU's library, for the number of rows from which on that is
faster. What has not been timed when the limit is reached stays as it was.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench_tools import figure, positive
from gpu_check import no_gpu

CONFIGS = Path(__file__).resolve().parents[1] / "triton_kernels" / "configs"
_FORMATS = ("Q4_K", "Q6_K", "Q8_0", "Q5_K", "Q4_0", "IQ4_XS", "Q3_K", "Q2_K", "IQ3_XXS", "IQ2_XXS", "F16")
_SHAPES = ((1024, 4096), (4096, 4096), (14336, 4096), (4096, 14336))
"""Of a weight, (out_features, in_features): a class of shapes is all weights with as few rows."""
_GEMV_ROWS, _GEMM_ROWS = (1, 4, 8), (16, 32, 64, 128, 256)
_LIBRARY_ROWS, _LIBRARY_FORMATS = (64, 256, 512, 1024, 2048, 4096), 2  # the first of the formats that are tuned
_LIBRARY_SHARE = 0.1  # of the time
_GAIN = 1.03  # how much faster a tile of a format's or shape's own must be

Times = dict[tuple[str, int, tuple[int, int]], dict[Any, float]]
"""Seconds of each tile for (format, rows of activations, shape)."""


def main(arguments: list[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    if reason := no_gpu():
        print(f"{parser.prog}: tuning needs a GPU: {reason}.", file=sys.stderr)
        return 1
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        print(f"{parser.prog}: tuning needs a GPU: TRITON_INTERPRET=1 would time the interpreter.", file=sys.stderr)
        return 1
    from gpu_sections import Size, seconds

    from trichord.device import resolve
    from trichord.triton_kernels.launch import file_name

    place = resolve("cuda")
    size = Size(rounds=options.rounds)
    tuned = tune(place, size, options.format, _SHAPES, options.limit, lambda tasks: seconds(place, tasks, size.rounds))
    path = options.output / file_name(tuned.gpu)
    path.write_text(tuned.to_json())
    print(f"written to {path}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--format", nargs="+", default=_FORMATS, metavar="NAME", help="weight formats to time")
    parser.add_argument("--limit", type=positive, default=500, metavar="SECONDS", help="default: %(default)s")
    parser.add_argument("--rounds", type=positive, default=7, help="of measurement, the median counts (%(default)s)")
    parser.add_argument("--output", type=Path, default=CONFIGS, metavar="FOLDER", help="default: where they are read")
    return parser


def gemv_candidates() -> list[Any]:
    """Tiles that give a thread one group of each row, or two."""
    from trichord.triton_kernels.launch import GemvTile

    return [
        GemvTile(rows, 32 * warps * each, warps)
        for rows, warps, each in itertools.product((1, 2, 4, 8), (2, 4, 8), (1, 2))
        if rows * each <= 8
    ]


def gemm_candidates(tokens: int) -> list[Any]:
    """Tiles for so many rows of activations; for many, also with programs that go on from tile to tile."""
    from trichord.triton_kernels.launch import GemmTile

    tiles = [
        GemmTile(rows, min(tokens, 256), columns, warps, stages)
        for rows, columns, warps, stages in itertools.product((64, 128), (64, 128), (4, 8), (2, 3, 4))
        if rows * min(tokens, 256) <= 128 * warps * 32
    ]
    return tiles + [replace(tile, programs=1) for tile in tiles if tokens >= 128 and tile.stages == 3]


def tune(
    place: Any,
    size: Any,
    formats: Iterable[str],
    shapes: Iterable[tuple[int, int]],
    limit: float,
    timer: Callable[[list[Callable[[], object]]], float],
    candidates: Callable[[str, int], list[Any]] | None = None,
) -> Any:
    """The configuration of the GPU at `place` with the tiles that `timer` finds fastest.

    candidates(table, rows) are the tiles to try: those above by default.
    """
    from trichord.triton_kernels import launch

    candidates = candidates or (lambda table, rows: gemv_candidates() if table == "gemv" else gemm_candidates(rows))
    base = launch.launches()
    end = time.monotonic() + limit
    deadline = end - _LIBRARY_SHARE * limit
    tables: dict[str, dict[Any, Any]] = {}
    for table, counts in (("gemv", _GEMV_ROWS), ("gemm", _GEMM_ROWS)):
        times: Times = {}
        for count, shape, name in itertools.product(counts, shapes, formats):
            if time.monotonic() > deadline:
                break
            tiles = candidates(table, count)
            times[name, count, shape] = _times(place, size, base, table, tiles, name, count, shape, timer)
            if times[name, count, shape]:
                best = min(times[name, count, shape], key=times[name, count, shape].__getitem__)
                took = times[name, count, shape][best]
                print(
                    f"{table} {name} {shape[0]} x {shape[1]}, {count} rows: {figure(1e6 * took)} us, {best}", flush=True
                )
        tables[table] = dict(getattr(base, table)) | choose_tiles(times)
    tuned = replace(base, gpu=_name(place) or base.gpu, source="measured", **tables)
    return replace(tuned, library_tokens=_library_tokens(place, size, tuned, formats, shapes, end, timer))


def _name(place: Any) -> str:
    import torch

    return torch.cuda.get_device_name(place.device) if place.device.type == "cuda" else ""


def _times(
    place: Any,
    size: Any,
    base: Any,
    table: str,
    tiles: list[Any],
    name: str,
    count: int,
    shape: tuple[int, int],
    timer: Callable[[list[Callable[[], object]]], float],
) -> dict[Any, float]:
    """Seconds of each tile; those that the GPU cannot launch are left out."""
    from trichord.triton_kernels.launch import Case

    products, taken = _products(place, size, name, count, shape), {}
    for tile in tiles:
        try:
            taken[tile] = _timed(products, replace(base, **{table: {Case(count): tile}}, library_tokens=None), timer)
        except Exception as error:  # too much shared memory, too many registers, an unsupported shape
            print(f"  {tile}: {str(error).splitlines()[0]}", file=sys.stderr)
    return taken


def _products(place: Any, size: Any, name: str, count: int, shape: tuple[int, int]) -> list[Callable[[], object]]:
    """Products with `count` rows of activations, with so many weights that no cache holds them."""
    import torch
    from gpu_sections import copies, random_weight

    from trichord import Weight, WeightFormat

    weight = random_weight(place, WeightFormat[name], *shape)
    weights = [Weight(data, weight.format, shape, weight.layout) for data in copies(weight.data, size)]
    x = torch.randn(count, shape[1], device=place.device)
    return [lambda w=w: place.operations.matmul(x, [w], "default") for w in weights]


def _timed(
    products: list[Callable[[], object]], configuration: Any, timer: Callable[[list[Callable[[], object]]], float]
) -> float:
    """Seconds of a product that is launched as the configuration says."""
    from trichord.triton_kernels import launch

    launch.use(configuration)
    try:
        return timer(products)
    finally:
        launch.use(None)


def _library_tokens(
    place: Any,
    size: Any,
    tuned: Any,
    formats: Iterable[str],
    shapes: Iterable[tuple[int, int]],
    deadline: float,
    timer: Callable[[list[Callable[[], object]]], float],
) -> int | None:
    """Rows of activations from which on the library is the faster, over the first formats and all shapes."""
    ratios: dict[int, list[float]] = {}
    for count, shape, name in itertools.product(_LIBRARY_ROWS, shapes, list(formats)[:_LIBRARY_FORMATS]):
        if time.monotonic() > deadline:
            return tuned.library_tokens
        products = _products(place, size, name, count, shape)
        fused, library = (_timed(products, replace(tuned, library_tokens=least), timer) for least in (None, count))
        ratios.setdefault(count, []).append(library / fused)
        print(f"{name} {shape[0]} x {shape[1]}, {count} rows: the library takes {library / fused:.2f} of the time")
    return switch_point(ratios)


def switch_point(ratios: Mapping[int, list[float]]) -> int | None:
    """The fewest rows from which on the library's time is always less: the geometric mean of its ratios is below 1."""
    least = None
    for count in sorted(ratios, reverse=True):
        if sum(map(math.log, ratios[count])) >= 0:
            break
        least = count
    return least


def choose_tiles(times: Times, gain: float = _GAIN) -> dict[Any, Any]:
    """A table of launches: the best tile for all formats and shapes by rows of activations, and the exceptions.

    Tiles are compared by the geometric mean of their times relative to the best, over what is to share them.
    """
    from trichord.triton_kernels.launch import Case

    table: dict[Any, Any] = {}
    for count in dict.fromkeys(rows for _, rows, _ in times):
        here = {(name, shape): taken for (name, rows, shape), taken in times.items() if rows == count and taken}
        if not here:
            continue
        common = table[Case(count)] = _best(here.values())
        for name in dict.fromkeys(name for name, _ in here):
            own = {shape: taken for (other, shape), taken in here.items() if other == name}
            best = _best(own.values())
            if _cost(common, own.values()) > gain * _cost(best, own.values()):
                table[Case(count, format=name)] = best
            taken_tile = table.get(Case(count, format=name), common)
            # A class holds all weights with at most so many rows: only the smallest shapes need one of their own.
            smallest = min(own, key=lambda shape: shape[0])
            narrow = _best([own[smallest]])
            if len(own) > 1 and _cost(taken_tile, [own[smallest]]) > gain * _cost(narrow, [own[smallest]]):
                table[Case(count, smallest[0], name)] = narrow
    return table


def _best(measured: Iterable[Mapping[Any, float]]) -> Any:
    measured = list(measured)
    everywhere = [tile for tile in measured[0] if all(tile in taken for taken in measured)]
    return min(everywhere or measured[0], key=lambda tile: _cost(tile, measured))


def _cost(tile: Any, measured: Iterable[Mapping[Any, float]]) -> float:
    ratios = [taken[tile] / min(taken.values()) if tile in taken else 10.0 for taken in measured]
    return math.exp(sum(map(math.log, ratios)) / len(ratios))


if __name__ == "__main__":
    sys.exit(main())
