"""Measures how fast a model runs: tokens a second for prompts and for generation, time to the first token, memory.

    python scripts/bench_throughput.py model.gguf
    python scripts/bench_throughput.py --synthetic tinyllama-1.1b:Q4_K_M --batch 1 8 64 --threads 2
    python scripts/bench_throughput.py model.gguf --device cuda --json result.json

Tests are named as llama-bench names them. pp512: a prompt of 512 random tokens up to the first token of its completion.
tg128: 128 tokens generated after a prompt of one; "tg128 x 8" is eight such sequences at once, and counts the tokens of
all. Every test runs once untimed, since kernels compile at their first use.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from bench_engines import Trichord, peak_bytes
from bench_tools import Spread, environment, figure, positive, table

from trichord import TrichordError


def main(arguments: list[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    if (options.model is None) == (options.synthetic is None):
        parser.error("name a MODEL.gguf or a model to make up (--synthetic SHAPE:MIX)")
    try:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            result = _measure(options.model or synthesize(options.synthetic, Path(folder)), options)
    except TrichordError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 1
    print(_render(result))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Measure tokens a second for prompts and generation, time to the first token, and memory.",
        epilog="Figures are medians of --runs, with the lowest and the highest beside them.",
    )
    parser.add_argument("model", nargs="?", type=Path, metavar="MODEL.gguf", help="the model's file")
    parser.add_argument(
        "--synthetic",
        metavar="SHAPE:MIX",
        help="make a model up, such as tinyllama-1.1b:Q4_K_M (see synthetic_model.py)",
    )
    parser.add_argument("--prompt", type=positive, default=512, metavar="N", help="prompt tokens (%(default)s)")
    parser.add_argument("--generate", type=positive, default=128, metavar="N", help="tokens to generate (%(default)s)")
    parser.add_argument(
        "--batch", type=positive, nargs="+", default=[1], metavar="N", help="sequences to generate at once (1)"
    )
    parser.add_argument("--runs", type=positive, default=5, metavar="N", help="runs of each test (%(default)s)")
    parser.add_argument("--device", default="auto", metavar="auto|cuda|cpu", help="where to run (%(default)s)")
    parser.add_argument(
        "--precision", choices=("exact", "default", "fast"), default="default", help="of activations (%(default)s)"
    )
    parser.add_argument("--threads", type=positive, metavar="N", help="CPU threads (those of the machine)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every figure here")
    return parser


def synthesize(named: str, folder: Path) -> Path:
    from synthetic_model import write_synthetic_model

    shape, _, mix = named.partition(":")
    path = folder / f"{shape}-{mix}.gguf"
    write_synthetic_model(path, shape, mix)
    return path


def _measure(model: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Every figure, ready for JSON."""
    engine = Trichord(str(model), options.threads, options.precision, options.device, max(options.batch))
    first = engine.prompt(1, seed=0)
    tests = [_test(f"pp{options.prompt}", options.prompt, partial(engine.prompt, options.prompt), options.runs)]
    for batch in options.batch:
        name = f"tg{options.generate}" + (f" x {batch}" if batch > 1 else "")
        generate = partial(engine.generate, options.generate, batch=batch)
        tests.append(_test(name, options.generate * batch, generate, options.runs))
    return {
        "model": model.name,
        "environment": environment(),
        "device": options.device,
        "precision": options.precision,
        "threads": options.threads,
        "load_seconds": engine.load_seconds,
        "first_request_seconds": first,
        "first_token_seconds": tests[0]["seconds"]["median"],
        "weight_bytes": engine.llm.weight_bytes,
        "peak_bytes": peak_bytes(),
        "peak_gpu_bytes": _peak_gpu_bytes(),
        "tests": tests,
    }


def _test(name: str, tokens: int, run: Callable[..., float], runs: int) -> dict[str, Any]:
    run(seed=0)
    seconds = [run(seed=number) for number in range(1, runs + 1)]
    return {
        "name": name,
        "tokens": tokens,
        "runs": seconds,
        "seconds": asdict(Spread.of(seconds)),
        "tokens_per_second": asdict(Spread.of(tokens / each for each in seconds)),
    }


def _peak_gpu_bytes() -> int:
    import torch

    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0


def _render(result: dict[str, Any]) -> str:
    lines = [f"{name}: {value}" for name, value in result["environment"].items()]
    threads = f", {result['threads']} threads" if result["threads"] else ""
    lines.append(f"model: {result['model']}, device {result['device']}, precision {result['precision']}{threads}")
    memory = [("weights", "weight_bytes"), ("peak", "peak_bytes"), ("peak on the GPU", "peak_gpu_bytes")]
    shown = [f"{name} {result[key] / 2**20:.0f} MiB" for name, key in memory if result[key]]
    lines.append(f"memory: {', '.join(shown)}")
    prompt = result["tests"][0]
    lines.append(
        f"start: load {result['load_seconds']:.2f} s, first request {result['first_request_seconds']:.2f} s; "
        f"then {result['first_token_seconds']:.2f} s to the first token after {prompt['tokens']} of a prompt"
    )
    rows = []
    for test in result["tests"]:
        rates, seconds = test["tokens_per_second"], test["seconds"]
        rows.append([test["name"], *(figure(value) for value in (rates["median"], rates["low"], rates["high"]))])
        rows[-1].append(figure(seconds["median"]))
    return "\n".join([*lines, "", table(["test", "tokens/s", "lowest", "highest", "seconds"], rows)])


if __name__ == "__main__":
    sys.exit(main())
