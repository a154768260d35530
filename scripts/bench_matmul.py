"""Times products with packed weights: how fast, how exact and how small, format by format.

    python scripts/bench_matmul.py --format Q4_K                    # one row of activations, 4096 x 14336, on the CPU
    python scripts/bench_matmul.py --format all --rows 1 8 256 --device cuda --json figures.json

Every product goes through `dispatch_matmul`. Two baselines run in between, on the same weights: dequantizing them and
multiplying by the result (on the CPU by gguf's NumPy code, where it knows the format; on a GPU by our own kernel), and
multiplying by float32 weights that are resident already. Times are medians of rounds in which all take turns, so what
else the machine does falls on all alike. Relative errors are against a float64 product of the dequantized weights.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trichord import TrichordError, Weight, WeightFormat, dispatch_matmul
from trichord.device import Place, resolve
from trichord.dispatch import PRECISIONS, set_threads
from trichord.quantize import quantize_blocks

_DISTINCT_ROWS = 16
"""Rows that are quantized, then repeated down the matrix: quantizing all of them would take longer than measuring."""
_CACHE_BYTES = 512 << 20
"""A GPU's turns go round copies of the weight of this size in all, more than its cache holds."""
_DEQUANTIZE, _RESIDENT = "dequantize, then multiply", "resident float32"

Task = Callable[[int], torch.Tensor]
"""A product with the copy of the weight of that number."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default: %(default)s)")
    parser.add_argument("--format", nargs="+", default=["Q4_K"], metavar="NAME", help="format names, or all")
    parser.add_argument("--shape", nargs=2, type=_positive, default=[4096, 14336], metavar=("N", "K"))
    parser.add_argument("--rows", nargs="+", type=_positive, default=[1], metavar="T", help="rows of activations")
    parser.add_argument("--threads", type=_positive, help="CPU threads")
    parser.add_argument("--rounds", type=_positive, default=15, help="rounds of measurement (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as well")
    options = parser.parse_args()
    try:
        place = resolve(options.device)
        if options.threads:
            set_threads(options.threads)
        formats = _formats(options.format, place)
        figures = [
            figure
            for format in formats
            for rows in options.rows
            for figure in _measure(place, format, *options.shape, rows, options.rounds)
        ]
    except (TrichordError, ValueError) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 1
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")
    return 0


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return number


def _formats(names: list[str], place: Place) -> list[WeightFormat]:
    unmade = (WeightFormat.F64, WeightFormat.Q8_1)  # no quantizer writes them
    fused = {f.name: f for f in WeightFormat if f in place.operations.FUSED_FORMATS and f not in unmade}
    if names == ["all"]:
        return [format for format in fused.values() if format is not WeightFormat.Q8_1]  # ggml's own intermediate
    for name in names:
        if name not in fused:
            raise ValueError(f"{name} is not multiplied in place on this device; formats are {', '.join(fused)}")
    return [fused[name] for name in names]


def _measure(
    place: Place, format: WeightFormat, out: int, columns: int, rows: int, rounds: int
) -> list[dict[str, Any]]:
    """Prints one table; returns its lines as records."""
    blocks = _blocks(format, out, columns)
    packed = place.operations.pack(torch.from_numpy(blocks).to(place.device), format, columns)
    copies = -(-_CACHE_BYTES // packed.nbytes) if place.device.type == "cuda" else 1
    weights = [Weight(packed.clone(), format, (out, columns), place.layout) for _ in range(copies)]
    weight, float_bytes = weights[0], 4 * out * columns
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(1)).to(place.device)
    resident = place.operations.dequantize(weight)
    tasks: dict[str, Task] = {p: lambda i, p=p: dispatch_matmul(x, weights[i], p) for p in PRECISIONS}
    tasks[_DEQUANTIZE] = lambda i: x @ _dequantize(weights[i], blocks, place).T
    tasks[_RESIDENT] = lambda i: x @ resident.T
    times = _times(tasks, copies, place.device, rounds)
    sample = _DISTINCT_ROWS
    expected = x.double() @ resident[:sample].double().T
    print(
        f"\n{format.name}, {out} x {columns}, {rows} row{'s' * (rows > 1)} on {_describe(place)}: "
        f"{weight.nbytes / 1e6:.1f} MB packed, {float_bytes / weight.nbytes:.2f} times less than float32"
    )
    heads = ["", "ms", "G weights/s", "GB/s", "GFLOP/s", "vs dequantize", "vs float32", "relative error"]
    print("".join(head.rjust(width) for head, width in zip(heads, _WIDTHS, strict=True)))
    figures = []
    for name, seconds in times.items():
        read = weight.nbytes if name in PRECISIONS else float_bytes
        error = (tasks[name](0)[:, :sample].double() - expected).norm() / expected.norm()
        figure = {
            "device": _describe(place),
            "format": format.name,
            "shape": [out, columns],
            "rows": rows,
            "what": name,
            "milliseconds": seconds * 1e3,
            "weights_per_second": out * columns / seconds,
            "bytes_per_second": read / seconds,
            "flops": 2 * rows * out * columns / seconds,
            "speedup_over_dequantize": times[_DEQUANTIZE] / seconds,
            "speedup_over_float32": times[_RESIDENT] / seconds,
            "relative_error": float(error),
            "memory_ratio": float_bytes / weight.nbytes,
        }
        figures.append(figure)
        cells = [name, f"{seconds * 1e3:.3f}", f"{out * columns / seconds / 1e9:.1f}", f"{read / seconds / 1e9:.1f}"]
        cells += [f"{figure['flops'] / 1e9:.1f}", f"{figure['speedup_over_dequantize']:.1f}"]
        cells += [f"{figure['speedup_over_float32']:.1f}", f"{figure['relative_error']:.1e}"]
        print("".join(cell.rjust(width) for cell, width in zip(cells, _WIDTHS, strict=True)), flush=True)
    return figures


_WIDTHS = (26, 10, 13, 9, 10, 15, 12, 16)


def _blocks(format: WeightFormat, out: int, columns: int) -> np.ndarray:
    values = np.random.default_rng(0).normal(0, 0.02, (min(out, _DISTINCT_ROWS), columns)).astype(np.float32)
    distinct = quantize_blocks(values, format)
    return np.resize(distinct, (out, distinct.shape[1]))


def _dequantize(weight: Weight, blocks: np.ndarray, place: Place) -> torch.Tensor:
    """The baseline's float32 weights, decoded anew."""
    if weight.layout == "blocks" and weight.format.block_size > 1:
        from gguf import GGMLQuantizationType, quants

        try:
            return torch.from_numpy(quants.dequantize(blocks, GGMLQuantizationType(weight.format.ggml_id)))
        except (NotImplementedError, ValueError):  # a type gguf does not decode, or does not know
            pass
    return place.operations.dequantize(weight)


def _times(tasks: dict[str, Task], copies: int, device: torch.device, rounds: int) -> dict[str, float]:
    """Median seconds of each task."""
    for task in tasks.values():
        task(0)
        task(0)
    time_once = _time_on_gpu if device.type == "cuda" else _time_on_cpu
    timers = {name: time_once(task, copies) for name, task in tasks.items()}
    seconds = [{name: timer() for name, timer in timers.items()} for _ in range(rounds)]
    return {name: statistics.median(each[name] for each in seconds) for name in tasks}


def _time_on_cpu(task: Task, copies: int) -> Callable[[], float]:
    def timer() -> float:
        start = time.perf_counter()
        task(0)
        return time.perf_counter() - start

    return timer


def _time_on_gpu(task: Task, copies: int) -> Callable[[], float]:
    """Times one CUDA graph of a product with each copy, so that what Python takes to launch does not count."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for copy in range(copies):
            task(copy)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def timer() -> float:
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / copies

    return timer


def _describe(place: Place) -> str:
    if place.device.type == "cuda":
        return torch.cuda.get_device_name(place.device)
    return f"{torch.get_num_threads()} CPU threads"


if __name__ == "__main__":
    sys.exit(main())
