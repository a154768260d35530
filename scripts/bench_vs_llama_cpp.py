"""Runs this engine and llama.cpp on the same files, in turns, and prints how they compare.

    python scripts/bench_vs_llama_cpp.py model.gguf                      # llama-cpp-python is installed here
    python scripts/bench_vs_llama_cpp.py model.gguf --peer-python ~/peer/bin/python
    python scripts/bench_vs_llama_cpp.py model.gguf --llama-bench ~/llama.cpp/build/bin/llama-bench

Both use the same number of threads, each in a process of its own. A machine's speed drifts, so each round runs every
engine once, in an order that turns around from round to round, and what counts is the ratio within a round. llama.cpp
is timed without sampling; this engine with its scheduler and greedy sampling, as `LLM.generate` runs. Let nothing else
run meanwhile: threads that wait for each other lose much more than their share of a busy machine.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from bench_engines import EngineError, EngineProcess, LlamaBench
from bench_tools import Spread, available_cores, environment, figure, positive, table

PEER = "llama.cpp"
PRECISIONS = ("default", "fast")
LOGIT_TOKENS = 8
"""Few enough that the kernels of generation compute them, not those of long prompts."""

NO_PEER = (
    "there is no llama.cpp to compare with: pip install llama-cpp-python, here or for another interpreter "
    "(--peer-python PYTHON), or name a llama-bench binary (--llama-bench FILE)"
)

Engine: TypeAlias = EngineProcess | LlamaBench
Figures: TypeAlias = dict[str, dict[str, list[float]]]
"""Quantity -> engine -> one value a round."""


def main(arguments: list[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    results = []
    try:
        _check_peer(options)
        for model in options.models:
            results.append(_compare(model, options))
            print(_render(results[-1]), end="\n\n", flush=True)
    except EngineError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 1
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Compare this engine with llama.cpp on the same files: speed, start, memory, error of the logits.",
        epilog="Ratios are ours / theirs within a round: above 1 is better for tokens/s, below 1 for all else.",
    )
    parser.add_argument("models", nargs="+", type=Path, metavar="MODEL.gguf", help="the files")
    peer = parser.add_mutually_exclusive_group()
    peer.add_argument(
        "--peer-python",
        default=sys.executable,
        metavar="PYTHON",
        help="an interpreter that has llama-cpp-python (default: the one that runs this)",
    )
    peer.add_argument("--llama-bench", metavar="FILE", help="a llama-bench binary: compares tokens/s alone")
    parser.add_argument("--prompt", type=positive, default=512, metavar="N", help="prompt tokens (%(default)s)")
    parser.add_argument("--generate", type=positive, default=128, metavar="N", help="tokens to generate (%(default)s)")
    parser.add_argument("--runs", type=positive, default=5, metavar="N", help="rounds (%(default)s)")
    parser.add_argument(
        "--threads",
        type=positive,
        default=available_cores(),
        metavar="N",
        help="CPU threads of both (the cores of this machine: %(default)s)",
    )
    parser.add_argument(
        "--device", default="cpu", metavar="cpu|cuda", help="where both run, if llama.cpp can (%(default)s)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figure of every round here")
    return parser


def _check_peer(options: argparse.Namespace) -> None:
    if options.llama_bench:
        found = shutil.which(options.llama_bench)
    else:
        command = [options.peer_python, "-c", "import llama_cpp"]
        found = shutil.which(options.peer_python) and not subprocess.run(command, capture_output=True).returncode
    if not found:
        raise EngineError(NO_PEER)


def _compare(model: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Every figure of one file, ready for JSON."""
    common = {"model": str(model), "threads": options.threads, "device": options.device}
    ours = partial(EngineProcess, sys.executable, "trichord", **common)
    starts: dict[str, Callable[[], Engine]] = {name: partial(ours, precision=name) for name in PRECISIONS}
    if options.llama_bench:
        starts[PEER] = partial(LlamaBench, options.llama_bench, **common)
    else:
        context = max(options.prompt, options.generate, LOGIT_TOKENS)
        starts[PEER] = partial(EngineProcess, options.peer_python, PEER, **common, context=context)
    figures: Figures = defaultdict(lambda: defaultdict(list))
    described = environment()
    with ExitStack() as stack:
        engines = {name: stack.enter_context(closing(start())) for name, start in starts.items()}
        _measure_speed(engines, figures, options)
        versions = {name: engine.version for name, engine in engines.items()}
        if not options.llama_bench:
            for name, engine in engines.items():
                figures["peak memory, MiB"][name].append(engine.peak_bytes() / 2**20)
            _measure_errors(engines, partial(ours, precision="exact"), figures)
    if not options.llama_bench:
        _measure_start(starts, figures, options.runs)
    return {
        "model": model.name,
        "environment": described,
        "threads": options.threads,
        "device": options.device,
        "versions": versions,
        "figures": figures,
    }


def _rounds(what: str, runs: int) -> Iterator[tuple[int, list[str]]]:
    """The number of each round from 1, and its order of engines, in which both of ours are neighbours of llama.cpp."""
    order = [PRECISIONS[0], PEER, PRECISIONS[1]]
    for number in range(1, runs + 1):
        print(f"{what}: round {number} of {runs}", file=sys.stderr)
        yield number, order
        order = order[::-1]


def _measure_speed(engines: dict[str, Engine], figures: Figures, options: argparse.Namespace) -> None:
    for engine in engines.values():  # kernels compile, pages of the file are read
        engine.prompt(options.prompt, seed=0)
        engine.generate(2, seed=0)
    for seed, order in _rounds("speed", options.runs):
        for name in order:
            seconds = engines[name].prompt(options.prompt, seed)
            figures[f"pp{options.prompt}, tokens/s"][name].append(options.prompt / seconds)
        for name in order:
            seconds = engines[name].generate(options.generate, seed)
            figures[f"tg{options.generate}, tokens/s"][name].append(options.generate / seconds)


def _measure_errors(engines: dict[str, Engine], start_exact: Callable[[], Engine], figures: Figures) -> None:
    """How far each engine's logits are from those of the same weights in float32: ||a - b|| / ||b||."""
    with tempfile.TemporaryDirectory() as folder, closing(start_exact()) as exact:

        def logits(engine: Engine) -> np.ndarray:
            path = Path(folder, "logits")
            engine.logits(LOGIT_TOKENS, seed=0, path=str(path))
            return np.fromfile(path, np.float32).astype(np.float64)

        truth = logits(exact)
        for name, engine in engines.items():
            error = np.linalg.norm(logits(engine) - truth) / np.linalg.norm(truth)
            figures["error of the logits"][name].append(float(error))


def _measure_start(starts: dict[str, Callable[[], Engine]], figures: Figures, runs: int) -> None:
    """How long a fresh process takes to load the file, and from its start to a first token.

    The file lies in the page cache and our kernels, compiled, on disk. Starting includes Python and its imports.
    """
    for _, order in _rounds("start", runs):
        for name in order:
            started = time.perf_counter()
            with closing(starts[name]()) as engine:
                engine.prompt(1, seed=0)
                figures["process to first token, s"][name].append(time.perf_counter() - started)
                figures["load, s"][name].append(engine.load_seconds)


def _render(result: dict[str, Any]) -> str:
    lines = [f"{name}: {value}" for name, value in result["environment"].items()]
    lines.append(f"model: {result['model']}, device {result['device']}, {result['threads']} threads")
    lines.append(f"engines: {result['versions'][PRECISIONS[0]]} and {result['versions'][PEER]}")
    rows = []
    for quantity, engines in result["figures"].items():
        for precision in PRECISIONS:
            pairs = list(zip(engines[precision], engines[PEER], strict=True))
            mine, theirs = (Spread.of(values).median for values in zip(*pairs, strict=True))
            ratio = Spread.of(a / b for a, b in pairs)
            shown = [mine, theirs, ratio.low, ratio.median, ratio.high]
            rows.append([quantity, precision, *map(figure, shown)])
    columns = ["", "precision", "ours", PEER, "ratio: lowest", "median", "highest"]
    return "\n".join([*lines, "", table(columns, rows)])


if __name__ == "__main__":
    sys.exit(main())
