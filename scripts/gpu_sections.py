"""What `gpu_check.py` checks and measures: each section is a generator of findings, so that none is lost to a failure.

Every section also runs in Triton's interpreter, on CPU tensors and with a small `Size`, except those that read what the
GPU's compiler made.
"""

from __future__ import annotations

import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
from bench_engines import Trichord, prompt_ids
from synthetic_model import write_synthetic_model

from trichord import LLM, SamplingParams, Weight, WeightFormat
from trichord.device import CPU, Place, interpreting, resolve
from trichord.llm import DEMO_MODEL
from trichord.quantize import quantize_blocks
from trichord.triton_kernels.launch import FEW_ROWS, launches, use


@dataclass(frozen=True)
class Size:
    """How much a run does. Shapes are (out_features, in_features); the first of `shapes` is for every format."""

    parity_shape: tuple[int, int] = (300, 1024)
    parity_rows: tuple[int, ...] = (1, 3, 8, 9, 40, 130)
    shapes: tuple[tuple[int, int], ...] = ((14336, 4096), (4096, 14336), (4096, 4096), (1024, 4096))
    rows: tuple[int, ...] = (1, 8, 64, 512)
    many_rows: int = 4096
    rounds: int = 9
    moved_bytes: int = 1 << 30
    models: tuple[str, ...] = ("tinyllama-1.1b:Q4_K_M", "llama-3-8b:Q4_K_M")
    prompt: int = 512
    generate: int = 64
    batches: tuple[int, ...] = (1, 8, 64)
    logits: int = 24
    repeats: int = 3


QUICK = Size(
    parity_shape=(20, 256),
    parity_rows=(1, 9),
    shapes=((64, 256),),
    rows=(1, 9),
    many_rows=16,
    rounds=2,
    moved_bytes=1 << 16,
    models=("tiny:Q4_K_M",),
    prompt=2,
    generate=2,
    batches=(1, 2),
    logits=1,
    repeats=1,
)


@dataclass(frozen=True)
class Finding:
    """One thing that was checked or measured. `ok` is None for what is only measured."""

    name: str
    values: dict[str, float] = field(default_factory=dict)
    ok: bool | None = None
    note: str = ""

    def to_dict(self) -> dict:
        return asdict(self)


# Relative Frobenius errors that a product may have against float64: see "precision" in the README.
_BOUNDS = {"exact": 2e-6, "default": 6e-4, "fast": 2e-2, "library": 6e-4}
_LOGIT_BOUNDS = {"exact": 1e-4, "default": 2e-3}
_MAIN_FORMATS = ("Q4_K", "Q6_K", "Q8_0", "Q5_K", "Q4_0", "IQ4_XS", "MXFP4", "Q3_K", "Q2_K", "IQ3_XXS", "IQ2_XXS", "F16")


def random_weight(place: Place, format: WeightFormat, rows: int, columns: int) -> Weight:
    """A weight of blocks drawn from a few that were quantized; alike for every place."""
    pool = _pool(format)
    choice = np.random.default_rng(rows).integers(0, len(pool), (rows, columns // format.block_size))
    blocks = torch.from_numpy(pool[choice].reshape(rows, -1)).to(place.device)
    return Weight(place.operations.pack(blocks, format, columns), format, (rows, columns), place.layout)


@cache
def _pool(format: WeightFormat) -> np.ndarray:
    values = np.random.default_rng(0).normal(0, 0.02, (16, 256)).astype(np.float32)
    if format is WeightFormat.F64:
        return values.astype("<f8").reshape(-1, 1).view(np.uint8)
    if format is WeightFormat.Q8_1:  # no quantizer writes it: scales of 1/4096 to 1/1024, and any bytes
        rng = np.random.default_rng(0)
        heads = np.stack([rng.uniform(2**-12, 2**-10, 64), np.zeros(64)], axis=1).astype("<f2").view(np.uint8)
        return np.concatenate([heads, rng.integers(0, 256, (64, 32), dtype=np.uint8)], axis=1)
    return quantize_blocks(values, format).reshape(-1, format.block_bytes)


def _formats(place: Place) -> list[WeightFormat]:
    """Those with kernels, the most common first."""
    order = {name: index for index, name in enumerate(_MAIN_FORMATS)}
    return sorted(place.operations.FUSED_FORMATS, key=lambda each: (order.get(each.name, len(order)), each.ggml_id))


def _activations(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))


@contextmanager
def library_from(tokens: int | None) -> Iterator[None]:
    """Within, the GPU's library multiplies from so many rows of activations on, or never."""
    use(replace(launches(), library_tokens=tokens))
    try:
        yield
    finally:
        use(None)


def parity(place: Place, size: Size) -> Iterator[Finding]:
    """Products, embeddings and dequantizing in every format against the CPU path; "library" is default through that."""
    rows, columns = size.parity_shape
    for format in _formats(place):
        here, there = random_weight(place, format, rows, columns), random_weight(CPU, format, rows, columns)
        truth = CPU.operations.dequantize(there)
        ids = torch.arange(rows - 1, -1, -3)
        decoded = place.operations.dequantize(here).cpu()
        embedded = place.operations.embedding(ids.to(place.device), here).cpu()
        worst = {
            "dequantize": float((decoded - truth).abs().max()),
            "embedding": float((embedded - truth[ids]).abs().max()),
        }
        good = max(worst.values()) == 0
        for precision, bound in _BOUNDS.items():
            errors = []
            for count in size.parity_rows:
                x = _activations(count, columns)
                expected = x.double() @ truth.double().T
                with library_from(FEW_ROWS + 1 if precision == "library" else None):
                    (y,) = place.operations.matmul(
                        x.to(place.device), [here], "default" if precision == "library" else precision
                    )
                errors.append(float((y.cpu().double() - expected).norm() / expected.norm()))
            worst[precision] = max(errors)
            good &= worst[precision] < bound
        yield Finding(format.name, worst, good)


def operations(place: Place, size: Size) -> Iterator[Finding]:
    """The tests that hold both backends against float64: attention, norms, rotary embedding, scans, routing."""
    tests = Path(__file__).resolve().parents[1] / "tests"
    for path in sorted((tests / "parity").glob("test_*.py")):
        if path.stem in ("test_models", "test_formats"):
            continue  # the section "models", and the section "parity"
        command = [sys.executable, "-m", "pytest", "-q", "-x", "--no-header", "-p", "no:cacheprovider", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tests.parent)
        last = (done.stdout.strip().splitlines() or done.stderr.strip().splitlines() or [""])[-1]
        yield Finding(path.stem, ok=done.returncode == 0, note=last)


def models(place: Place, size: Size, data: Path | None = None) -> Iterator[Finding]:
    """Logits of whole models against the CPU's, and of the parity data's against the reference there."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        tiny = Path(folder, "tiny.gguf")
        write_synthetic_model(tiny, "tiny", "Q4_K_M")
        for name, path in (("synthetic", tiny), ("demo", DEMO_MODEL)):
            tokens = prompt_ids(size.logits, 500, seed=1)
            truth = LLM(path, device="cpu", precision="exact", progress=False).logits(tokens)
            yield _logits_finding(name, path, tokens, truth)
    for path in sorted(data.glob("*/*.npz")) if data else []:
        if not path.with_suffix(".gguf").exists():
            continue
        with np.load(path) as archive:
            reference = dict(archive)
        tokens, truth = reference["tokens"][: size.logits], reference.get("exact", reference["logits"])
        try:
            yield _logits_finding(path.stem, path.with_suffix(".gguf"), tokens, truth[: size.logits])
        except Exception as error:
            yield Finding(path.stem, ok=False, note=f"{type(error).__name__}: {error}")


def _logits_finding(name: str, path: Path, tokens: list[int], truth: np.ndarray) -> Finding:
    errors = {}
    for precision in _LOGIT_BOUNDS:
        llm = LLM(path, device="cuda", precision=precision, progress=False, max_sequences=1)
        logits = llm.logits(tokens)
        errors[precision] = float(np.linalg.norm(logits - truth) / np.linalg.norm(truth))
    return Finding(name, errors, all(errors[precision] < bound for precision, bound in _LOGIT_BOUNDS.items()))


def exactness(place: Place, size: Size) -> Iterator[Finding]:
    """No operand of an exact kernel is rounded to TF32, bfloat16 or half: as compiled for this GPU."""
    from kernel_assembly import launches_of

    rows, columns = size.parity_shape
    for format in _formats(place):
        weight = random_weight(place, format, rows, columns)
        found = set()
        for count in (1, 64):
            x = _activations(count, columns).to(place.device)
            for made in launches_of(lambda x=x, weight=weight: place.operations.matmul(x, [weight], "exact")):
                found.update(roundings(made.compiled.asm.get("ptx") or made.compiled.asm["amdgcn"]))
        yield Finding(format.name, ok=not found, note=", ".join(sorted(found)))


def roundings(assembly: str) -> set[str]:
    """Instructions of PTX or AMDGCN that multiply less than float32, or round to it."""
    return set(
        re.findall(
            r"[\w.]*tf32[\w.]*|cvt\.r[nz][\w.]*\.b?f16[\w.]*|w?g?mma\.[\w.]+|v_mfma_f32_\w*f16|\w*xf32", assembly
        )
    )


def products(place: Place, size: Size) -> Iterator[Finding]:
    """Products in every format at the shapes of Llama-3-8B, beside a copy of memory and a float16 product.

    Those of very many rows are fused, and through the library.
    """
    copied = copy_bandwidth(place, size)
    yield Finding("device copy", {"GB/s": copied / 1e9})
    for shape in size.shapes:
        half = torch.randn(shape, device=place.device, dtype=torch.float32).to(torch.float16)
        halves = copies(half, size)
        baseline = {count: _float16_time(place, halves, count, size) for count in (*size.rows, size.many_rows)}
        main = [WeightFormat[name] for name in _MAIN_FORMATS[:3]]
        for format in _formats(place) if shape == size.shapes[0] else main:
            weight = random_weight(place, format, *shape)
            weights = [Weight(data, format, shape, place.layout) for data in copies(weight.data, size)]
            ways = [(count, launches().library_tokens, "") for count in size.rows]
            if format in main:
                ways += [(size.many_rows, None, ", fused"), (size.many_rows, size.many_rows, ", through the library")]
            for count, least, how in ways:
                x = _activations(count, shape[1]).to(place.device)
                product = _in_turn(lambda w, x=x: place.operations.matmul(x, [w], "default"), weights)
                with library_from(least):
                    took = seconds(place, product, size.rounds)
                yield Finding(
                    f"{format.name} {shape[0]} x {shape[1]}, {count} row{'s' * (count > 1)}{how}",
                    {
                        "microseconds": 1e6 * took,
                        "GB/s": weight.nbytes / took / 1e9,
                        "share of copy": weight.nbytes / took / copied,
                        "speed of float16": baseline[count] / took,
                        "TFLOP/s": 2 * count * shape[0] * shape[1] / took / 1e12,
                    },
                )


def _float16_time(place: Place, weights: list[torch.Tensor], count: int, size: Size) -> float:
    """Seconds of a product of float16 by torch."""
    x = _activations(count, weights[0].shape[1]).to(place.device, torch.float16)
    return seconds(place, _in_turn(lambda w: x @ w.T, weights), size.rounds)


def copies(data: torch.Tensor, size: Size) -> list[torch.Tensor]:
    """As many copies as no cache of the GPU holds."""
    return [data.clone() for _ in range(min(64, max(1, size.moved_bytes // 2 // max(1, data.nbytes))))]


def _in_turn(product: Callable, operands: list) -> list[Callable[[], object]]:
    return [lambda operand=operand: product(operand) for operand in operands]


def copy_bandwidth(place: Place, size: Size) -> float:
    """Bytes a second that a copy within the device's memory reads and writes, together."""
    source = torch.ones(size.moved_bytes // 4, device=place.device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds(place, [lambda: target.copy_(source)], size.rounds)


def seconds(place: Place, tasks: list[Callable[[], object]], rounds: int) -> float:
    """Median time of a task, of which all are done a round; on a GPU as one CUDA graph, so launching counts little."""
    for task in (tasks[0], *tasks):  # the first compiles
        task()
    if place.device.type != "cuda":
        return statistics.median(_wall_time(tasks) for _ in range(rounds)) / len(tasks)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for task in tasks:
            task()
    return statistics.median(_event_time(graph) for _ in range(rounds)) / len(tasks)


def _wall_time(tasks: list[Callable[[], object]]) -> float:
    started = time.perf_counter()
    for task in tasks:
        task()
    return time.perf_counter() - started


def _event_time(graph: torch.cuda.CUDAGraph) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def generation(place: Place, size: Size) -> Iterator[Finding]:
    """Whole models of random weights: prompts, time to the first token, generation at several batch sizes."""
    copied = copy_bandwidth(place, size)
    for described in size.models:
        shape, mix = described.split(":")
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            path = Path(folder, f"{shape}-{mix}.gguf")
            write_synthetic_model(path, shape, mix)
            engine = Trichord(str(path), device="cuda", batch=max(size.batches))
            yield Finding(f"{described}: load", {"seconds": engine.load_seconds})
            engine.prompt(size.prompt, seed=-1)  # compiles
            took = statistics.median(engine.prompt(size.prompt, seed=seed) for seed in range(size.repeats))
            speed = {"tokens/s": size.prompt / took, "seconds to first token": took}
            yield Finding(f"{described}: prompt of {size.prompt}", speed)
            took = statistics.median(engine.prompt(1, seed=seed) for seed in range(size.repeats))
            yield Finding(f"{described}: prompt of 1", {"seconds to first token": took})
            for batch in size.batches:
                engine.generate(2, seed=0, batch=batch)
                took = engine.generate(size.generate, seed=1, batch=batch)
                steps = size.generate / took
                share = steps * engine.llm.weight_bytes / copied
                speed = {"tokens/s": batch * steps, "share of copy": share}
                yield Finding(f"{described}: {batch} x {size.generate} tokens", speed)
            del engine


def dependent(place: Place, size: Size) -> Iterator[Finding]:
    """One model's generation with and without programmatic dependent launch: the same tokens, and how fast they come.

    Where it is faster and right, "pdl" of the GPU's launch configuration should be true.
    """
    own = launches()
    if not own.pdl_possible:
        yield Finding("dependent launch", note=f"skipped: {own.target} has none")
        return
    described = size.models[0]
    shape, mix = described.split(":")
    tokens: dict[bool, list[int]] = {}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        path = Path(folder, f"{shape}-{mix}.gguf")
        write_synthetic_model(path, shape, mix)
        for ahead in (False, True):
            use(replace(own, pdl=ahead))
            engine = Trichord(str(path), device="cuda")
            greedy = SamplingParams(temperature=0, max_tokens=size.generate, ignore_eos=True)
            tokens[ahead] = engine.llm.generate([prompt_ids(size.prompt, 500, seed=1)], greedy)[0].outputs[0].token_ids
            took = statistics.median(engine.generate(size.generate, seed=1) for _ in range(size.repeats))
            name = f"{described}: {'with' if ahead else 'without'} dependent launch"
            yield Finding(name, {"tokens/s": size.generate / took}, tokens[ahead] == tokens[False])
            del engine
    use(None)


@dataclass(frozen=True)
class Section:
    """A section's work, how long it may take in seconds, and whether it needs a real GPU."""

    run: Callable[..., Iterator[Finding]]
    limit: int
    needs_gpu: bool = False


SECTIONS = {
    "parity": Section(parity, 110),
    "exactness": Section(exactness, 40, needs_gpu=True),
    "models": Section(models, 70),
    "operations": Section(operations, 100),
    "products": Section(products, 90),
    "generation": Section(generation, 90),
    "dependent": Section(dependent, 40, needs_gpu=True),
}


def run_section(name: str, size: Size, data: Path | None = None) -> Iterator[Finding]:
    """The findings of a section on the GPU, or in the interpreter."""
    section, place = SECTIONS[name], resolve("cuda")
    if section.needs_gpu and interpreting():
        yield Finding(name, note="skipped: there is nothing to see in the interpreter")
        return
    yield from section.run(place, size, data) if name == "models" else section.run(place, size)
