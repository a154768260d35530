"""Says what the kernels cost on GPUs that are not here, from their machine code.

    python scripts/kernel_report.py                                         # all formats on an H200, one row
    python scripts/kernel_report.py --target sm_80 --format Q4_K Q6_K --rows 1 8 16 128
    python scripts/kernel_report.py --gpu RTX-4090 --precision fast --json report.json

Every kernel is compiled as it would be launched, and the instructions of its main loop are counted and shared out
among the pipes of a multiprocessor.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from bench_tools import positive, table
from kernel_assembly import TARGETS, Launch, disassemble, launches_of, load_widths, main_loop, opcode, pipe_of, usage

from trichord.progress import progress_bar

_SHAPE = (4096, 4096)


@dataclass(frozen=True)
class Gpu:
    """What sets a GPU's pace: the target it runs, multiprocessors, clock in Hz, memory in bytes a second.

    `fma` and `tensor` are a multiprocessor's float32 and float16 multiply-adds a cycle, `l1` the bytes that its first
    cache delivers a cycle.
    """

    target: str
    processors: int
    clock: float
    bandwidth: float
    fma: int
    tensor: int
    l1: int = 128


# The makers' figures at boost clock; of the H200's bandwidth, what a copy reaches of the 4.8 TB/s on paper.
GPUS = {
    "T4": Gpu("sm_75", 40, 1.59e9, 0.320e12, 64, 512, 64),
    "A100": Gpu("sm_80", 108, 1.41e9, 2.039e12, 64, 1024),
    "RTX-4090": Gpu("sm_89", 128, 2.52e9, 1.008e12, 128, 256),
    "H200": Gpu("sm_90", 132, 1.98e9, 4.3e12, 128, 2048),
    "H100": Gpu("sm_90", 132, 1.98e9, 3.35e12, 128, 2048),
    "B200": Gpu("sm_100", 148, 1.965e9, 8.0e12, 128, 4096),
    "RTX-5090": Gpu("sm_120", 170, 2.41e9, 1.792e12, 128, 256),
}
_LANES = 32  # of a warp
_ISSUE, _HALF, _MEMORY, _QUARTER_OF_HALF = 128, 64, 32, 16  # lanes that a multiprocessor serves a cycle
# A gather from a codebook: how many words the busiest of 32 banks must deliver, for 32 lanes at random places.
_GATHER_CYCLES = {2: 3.3, 4: 3.5, 8: 6.2}
# Main-loop instructions a weight of llama.cpp's kernels for one row, compiled for sm_90 (ggml 0.25.3).
_LLAMA_CPP = {
    **{"Q4_0": 2.7, "Q4_1": 2.3, "Q5_0": 5.2, "Q5_1": 4.6, "Q8_0": 3.7, "MXFP4": 5.6, "NVFP4": 4.5},
    **{"Q2_K": 6.1, "Q3_K": 8.0, "Q4_K": 4.8, "Q5_K": 5.9, "Q6_K": 6.9, "IQ4_NL": 4.8, "IQ4_XS": 4.1},
    **{"IQ1_S": 5.4, "IQ1_M": 4.2, "IQ2_XXS": 5.0, "IQ2_XS": 5.3, "IQ2_S": 5.2, "IQ3_XXS": 5.7, "IQ3_S": 5.8},
}

_INTRODUCTION = """\
# Kernels, from their machine code

Printed by `{command}`.

No GPU took part: the kernels were compiled as they would be launched, for a weight of {rows} x {columns} in each
format, and their machine code was read.

* **Instructions a weight** are those of the main loop that a thread executes for each weight it decodes{llama_cpp}.
  Dequantizing has no loop: its whole kernel counts.
* **Ceiling** is how fast the weights could be worked off, as a multiple of the GPU's memory bandwidth, if the busiest
  pipe never waited. Above 1 the memory is what limits the kernel, unless it waits for latency, which no count shows.
* **Busiest pipe**: a multiprocessor issues 128 lanes a cycle. Integer logic, shifts and comparisons take 64 of them,
  integer products and dot products 64, float arithmetic 64 or 128, loads and shuffles 32, and fewer the wider they
  are; conversions by the special-function unit take 16. A gather from a codebook counts as if its 32 lanes hit random
  banks.
* **Loads** are those of the loop, bytes a thread x how many.
* **Registers** are a thread's, **shared** memory is a program's, in bytes; **spills** are bytes of stack (on AMD,
  registers).
* Of AMD's kernels only what can be read is given: the rates of its pipes depend on pairings that the text hides.
"""


@dataclass(frozen=True)
class Record:
    """One kernel for one format and target; see the introduction of the report for what the figures mean."""

    kernel: str
    format: str
    target: str
    gpu: str | None
    bits_per_weight: float
    instructions_per_weight: float
    busiest_pipe: str | None
    bandwidth_ceiling: float | None
    tensor_cores: list[str]
    registers: int
    shared_bytes: int
    spills: int
    load_widths: dict[int, int]


def main(arguments: list[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    from trichord.weight_format import WeightFormat

    unknown = [name for name in options.format if name not in WeightFormat.__members__]
    if unknown:
        print(f"{parser.prog}: error: {unknown[0]!r} is not a weight format", file=sys.stderr)
        return 1
    gpus = [GPUS[name] for name in options.gpu]
    names = {gpu.target: name for name, gpu in zip(options.gpu, gpus, strict=True)}
    targets = options.target or list(names) or ["sm_90"]
    places = [(target, names.get(target) or _first_gpu(target)) for target in targets]
    records = report(places, options.format or _every_format(), options.rows, options.precision, options.workers)
    print(_render(records, options.precision, _command(options)))
    if options.json:
        options.json.write_text(json.dumps([asdict(record) for record in records], indent=1) + "\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", nargs="+", choices=TARGETS, default=[], help="architectures (default: sm_90)")
    parser.add_argument("--gpu", nargs="+", choices=GPUS, default=[], help="GPUs whose pace to compare with")
    parser.add_argument("--format", nargs="+", default=[], metavar="NAME", help="weight formats (default: all)")
    parser.add_argument("--rows", nargs="+", type=positive, default=[1], metavar="T", help="rows of activations (1)")
    parser.add_argument("--precision", choices=("exact", "default", "fast"), default="default")
    parser.add_argument("--workers", type=positive, default=os.cpu_count(), help="processes (one a core)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as well")
    return parser


def _command(options: argparse.Namespace) -> str:
    """What makes the same report again."""
    chosen = {"target": options.target, "gpu": options.gpu, "format": options.format, "rows": options.rows}
    words = [f"--{name} {' '.join(map(str, values))}" for name, values in chosen.items() if values]
    return " ".join(["python scripts/kernel_report.py", *words, f"--precision {options.precision}"])


def _first_gpu(target: str) -> str | None:
    return next((name for name, gpu in GPUS.items() if gpu.target == target), None)


def _every_format() -> list[str]:
    from trichord.triton_kernels.formats import FORMATS

    return [weight_format.name for weight_format in FORMATS]


@contextmanager
def _compiling() -> Iterator[None]:
    """Processes started here compile kernels, even if this one interprets them."""
    interpreting = os.environ.pop("TRITON_INTERPRET", None)
    try:
        yield
    finally:
        if interpreting is not None:
            os.environ["TRITON_INTERPRET"] = interpreting


def report(
    places: Iterable[tuple[str, str | None]], formats: list[str], rows: list[int], precision: str, workers: int = 1
) -> list[Record]:
    """The products with `rows` rows of activations, and dequantizing, for each (target, GPU's name) and format."""
    tasks = [(target, gpu, name, rows, precision) for target, gpu in places for name in formats]
    # A fresh process each: Triton decides at import whether it interprets.
    with (
        _compiling(),
        ProcessPoolExecutor(min(workers, len(tasks)), mp_context=get_context("spawn")) as pool,
        progress_bar("Compiling", len(tasks), "formats") as advance,
    ):
        futures = [pool.submit(_records, *task) for task in tasks]
        for _ in as_completed(futures):
            advance(1)
    return [record for future in futures for record in future.result()]


def _records(target: str, gpu: str | None, name: str, rows: list[int], precision: str) -> list[Record]:
    return [
        describe(kernel, launch, target, gpu, bits) for kernel, launch, bits in _compiled(target, name, rows, precision)
    ]


def _compiled(target: str, name: str, rows: list[int], precision: str) -> Iterator[tuple[str, Launch, float]]:
    import torch

    from trichord import triton_kernels
    from trichord.triton_kernels import launch
    from trichord.weight_format import Weight, WeightFormat

    weight_format = WeightFormat[name]
    blocks = torch.zeros((_SHAPE[0], weight_format.row_bytes(_SHAPE[1])), dtype=torch.uint8)
    weight = Weight(triton_kernels.pack(blocks, weight_format, _SHAPE[1]), weight_format, _SHAPE, "planes")
    bits = 8 * weight.data.numel() / (_SHAPE[0] * _SHAPE[1])

    def product(count: int) -> None:
        """Fused, also where the GPU's library would multiply."""
        launch.use(replace(launch.launches(), library_tokens=None))
        try:
            triton_kernels.matmul(torch.zeros((count, _SHAPE[1])), [weight], precision)
        finally:
            launch.use(None)

    calls: dict[str, Callable[[], object]] = {
        f"product, {count} row{'s' * (count > 1)}": partial(product, count) for count in rows
    }
    calls["dequantize"] = lambda: triton_kernels.dequantize(weight)
    for kernel, call in calls.items():
        yield kernel, launches_of(call, target)[-1], bits  # those before it prepare the activations


def describe(kernel: str, launch: Launch, target: str, gpu: str | None, bits: float) -> Record:
    """What the machine code of a launch says."""
    loop = main_loop(disassemble(launch.compiled))
    used = usage(launch.compiled)
    weights = _weights_of_loop(launch, loop)
    cycles = _cycles(launch, loop, weights, GPUS[gpu]) if gpu else {}
    busiest = max(cycles, key=cycles.__getitem__, default=None)
    ceiling = None
    if busiest:
        model = GPUS[gpu]
        rate = model.processors * model.clock * _LANES * weights / cycles[busiest]
        ceiling = rate * bits / 8 / model.bandwidth
    tensor = sorted({opcode(each) for each in loop if pipe_of(opcode(each)) == "tensor" or "mfma" in each[:8]})
    return Record(
        kernel=kernel,
        format=_given(launch)["FORMAT"].weight_format.name,
        target=target,
        gpu=gpu,
        bits_per_weight=round(bits, 4),
        instructions_per_weight=round(len(loop) / weights, 3),
        busiest_pipe=busiest,
        bandwidth_ceiling=ceiling and round(ceiling, 3),
        tensor_cores=tensor or sorted({opcode(each) for each in loop if each.startswith("v_wmma")}),
        registers=used.registers,
        shared_bytes=used.shared_bytes,
        spills=used.spills,
        load_widths=dict(sorted(load_widths(loop).items(), reverse=True)),
    )


def _given(launch: Launch) -> dict[str, Any]:
    """What the kernel was given by keyword, of tuples with an element for each weight the only one."""
    given = {name: value[0] if isinstance(value, tuple) else value for name, value in launch.arguments.items()}
    return {"FORMAT": given.get("FORMATS")} | given


def _weights_of_loop(launch: Launch, loop: list[str]) -> float:
    """Weights that a thread decodes in one pass of the loop.

    The tile says how many there are in the source's loop; how often the compiler unrolled it, the products in it say.
    """
    given = _given(launch)
    threads = launch.compiled.metadata.num_warps * launch.compiled.metadata.target.warp_size
    if "BLOCK_GROUPS" in given:
        weights = given["BLOCK_ROWS"] * given["BLOCK_GROUPS"] * given["FORMAT"].group_size / threads
        dots = sum(bool(re.match(r"IDP|v_dot4", each)) for each in loop)
        expected = weights * given["LIMBS"] * given["TOKENS"] / 4
    else:
        weights = given["BLOCK_ROWS"] * given["BLOCK_COLUMNS"] / threads
        dots = sum(map(_multiply_adds, loop))
        expected = weights * given.get("BLOCK_TOKENS", 0) * launch.compiled.metadata.target.warp_size
    return weights * max(1, round(dots / expected if expected else 1))


def _multiply_adds(instruction: str) -> int:
    """Multiply-adds that a warp's share of a tensor-core instruction of CUDA does, by its name."""
    if shape := re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)", instruction):
        rows, columns, depth = map(int, shape.groups())
        return rows * columns * depth // 4  # four warps issue it together
    if shape := re.match(r"HMMA\.(16)(8)(16|8)\b", instruction):
        rows, columns, depth = map(int, shape.groups())
        return rows * columns * depth
    return 0


def _cycles(launch: Launch, loop: list[str], weights: float, gpu: Gpu) -> dict[str, float]:
    """Cycles that each pipe of a multiprocessor takes for a warp's pass of the loop."""
    codes = [opcode(each) for each in loop]
    pipes = Counter(map(pipe_of, codes))
    products = pipes["dot product"] + sum(code.startswith(("IMAD", "IMUL")) for code in codes)
    widths = load_widths(loop)
    gathers, width = _gathers(launch, weights, widths)
    memory = (pipes["load/store"] - widths.total()) * _LANES / _MEMORY
    memory += sum(count * max(1.0, _LANES * size / gpu.l1) for size, count in widths.items())
    if gathers:
        memory += gathers * (_GATHER_CYCLES[width] - max(1.0, _LANES * width / gpu.l1))
    cycles = {
        "issue": len(loop) * _LANES / _ISSUE,
        "integer": pipes["integer"] * _LANES / _HALF,
        "integer products": products * _LANES / _HALF,
        "float": (pipes["FMA"] + pipes["dot product"]) * _LANES / gpu.fma,
        "load/store": memory,
        "conversion": pipes["conversion"] * _LANES / _QUARTER_OF_HALF,
    }
    if pipes["tensor"]:
        cycles["tensor"] = weights * _LANES * _given(launch)["BLOCK_TOKENS"] / gpu.tensor
    return cycles


def _gathers(launch: Launch, weights: float, widths: Counter[int]) -> tuple[float, int]:
    """Loads from a codebook in a pass of the loop, and their width in bytes."""
    format = _given(launch)["FORMAT"]
    if format.codebook is None:
        return 0, 0
    from gguf import quants

    gathers = weights / getattr(quants, format.weight_format.name).grid_shape[-1]
    return gathers, next((width for width in (4, 8, 2) if widths[width] >= gathers), 4)


def _render(records: list[Record], precision: str, command: str) -> str:
    compared_with = ";\n  in parentheses, those as a multiple of llama.cpp's kernels for one row"
    compared = any(_llama_cpp(record, precision) for record in records)
    parts = [
        _INTRODUCTION.format(
            command=command,
            rows=_SHAPE[0],
            columns=_SHAPE[1],
            llama_cpp=compared_with if compared else "",
        )
    ]
    for target, gpu, kernel in dict.fromkeys((record.target, record.gpu, record.kernel) for record in records):
        parts.append(f"## {target}{f' ({gpu})' if gpu else ''}: {kernel}\n")
        chosen = [record for record in records if (record.target, record.kernel) == (target, kernel)]
        heads = ["format", "bits", "instructions a weight", "busiest pipe", "ceiling", "registers", "shared", "spills"]
        if any(record.tensor_cores for record in chosen):
            heads.append("tensor cores")
        parts.append(
            table([*heads, "loads"], [_cells(record, precision, "tensor cores" in heads) for record in chosen])
        )
        parts.append("")
    return "\n".join(parts).rstrip()


def _cells(record: Record, precision: str, tensor: bool) -> list[str]:
    each = f"{record.instructions_per_weight:.2f}"
    if ratio := _llama_cpp(record, precision):
        each += f" ({ratio:.2f})"
    ceiling = "" if record.bandwidth_ceiling is None else f"{record.bandwidth_ceiling:.2f}"
    loads = ", ".join(f"{width} x {count}" for width, count in record.load_widths.items())
    counts = [str(count) for count in (record.registers, record.shared_bytes, record.spills)]
    names = [", ".join(record.tensor_cores)] if tensor else []
    return [
        record.format,
        f"{record.bits_per_weight:g}",
        each,
        record.busiest_pipe or "",
        ceiling,
        *counts,
        *names,
        loads,
    ]


def _llama_cpp(record: Record, precision: str) -> float | None:
    """Instructions a weight as a multiple of llama.cpp's, where the two do the same."""
    comparable = (record.target, record.kernel, precision) == ("sm_90", "product, 1 row", "default")
    if not comparable or record.format not in _LLAMA_CPP:
        return None
    return record.instructions_per_weight / _LLAMA_CPP[record.format]


if __name__ == "__main__":
    sys.exit(main())
