"""Where the time of a CPU step goes: shares of the products, attention, norms and all else, kernel by kernel.

    python scripts/profile_cpu.py model.gguf --context 2048 --generate 32
    python scripts/profile_cpu.py --synthetic tinyllama-1.1b:Q4_K_M --threads 2

First a prompt is profiled, of whole pages of the cache, then steps of one token behind it. Every table of jobs that is
worth threads is timed by itself, and in recorded steps every one, which costs some microseconds each; what is left of
the wall time is Python, torch, sampling and jobs smaller than that.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from bench_engines import prompt_ids
from bench_throughput import synthesize
from bench_tools import environment, figure, positive, table

from trichord import LLM, SamplingParams, TrichordError
from trichord.dispatch import PRECISIONS
from trichord.errors import RequestError

_PAGE = 64
"""Positions of a page of the cache."""
REST = "Python, torch, sampling"
_KINDS = {
    "dot_": "products",
    "tile_": "products",
    "prepare_": "rounding of activations",
    "dequantize_": "embedding rows",
    "_kernel": "attention",
    "_combine": "attention",
    "work__normalize": "norms",
    "work__rotate": "rotary embedding, cache",
    "work_activate": "activations",
}


class Profile:
    """Seconds and calls of each kernel."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.calls: dict[str, int] = defaultdict(int)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Times tables of jobs one by one, those of recordings as well that are made meanwhile."""
        from trichord.cpu_fallback import jobs

        work_off = jobs._work_off

        def timed(_: np.ndarray, tables: list[np.ndarray], __: np.ndarray) -> None:
            for jobs_of_table in tables:
                started = time.perf_counter()
                work_off(jobs_of_table, [jobs_of_table], np.array([len(jobs_of_table)]))
                name = jobs.KERNEL_NAMES.get(int(jobs_of_table[0, 0]), "?")
                self.seconds[name] += time.perf_counter() - started
                self.calls[name] += 1

        jobs._work_off = timed
        try:
            yield
        finally:
            jobs._work_off = work_off

    def reset(self) -> None:
        """Forget what was measured."""
        self.seconds.clear()
        self.calls.clear()

    def render(self, seconds: float, steps: int) -> str:
        """The table of what was measured in so many seconds."""
        kinds: dict[str, float] = defaultdict(float)
        rows = []
        for name, spent in sorted(self.seconds.items(), key=lambda item: -item[1]):
            kind = next((kind for prefix, kind in _KINDS.items() if name.startswith(prefix)), name)
            kinds[kind] += spent
            rows.append(
                [name, kind, str(self.calls[name] // steps), figure(1e3 * spent / steps), _share(spent, seconds)]
            )
        kinds[REST] = seconds - sum(self.seconds.values())
        shares = [[kind, figure(1e3 * spent / steps), _share(spent, seconds)] for kind, spent in kinds.items()]
        shares.sort(key=lambda row: -float(row[2].rstrip("%")))
        return "\n\n".join(
            [
                table(["part of a step", "ms", "share"], shares),
                table(["kernel", "part", "calls", "ms", "share"], rows),
            ]
        )


def _share(spent: float, seconds: float) -> str:
    return f"{100 * spent / seconds:.1f}%"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path, metavar="MODEL.gguf", help="the model's file")
    parser.add_argument("--synthetic", metavar="SHAPE:MIX", help="make a model up (see synthetic_model.py)")
    parser.add_argument(
        "--context",
        type=positive,
        default=2048,
        metavar="N",
        help="prompt tokens, as far as the model can take as many (%(default)s)",
    )
    parser.add_argument("--generate", type=positive, default=32, metavar="N", help="steps after it (%(default)s)")
    parser.add_argument("--precision", choices=PRECISIONS, default="default", help="of activations (%(default)s)")
    parser.add_argument("--threads", type=positive, metavar="N", help="CPU threads (those of the machine)")
    options = parser.parse_args(arguments)
    if (options.model is None) == (options.synthetic is None):
        parser.error("name either a model's file or --synthetic SHAPE:MIX")
    try:
        if options.model:
            _profile(options.model, options)
        else:
            with tempfile.TemporaryDirectory() as folder:
                _profile(synthesize(options.synthetic, Path(folder)), options)
    except TrichordError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 1
    return 0


def _profile(model: Path, options: argparse.Namespace) -> None:
    llm = LLM(model, device="cpu", precision=options.precision, threads=options.threads, progress=False)
    for described in (f"{name}: {value}" for name, value in environment().items()):
        print(described)
    print(f"model: {model.name}, precision {options.precision}, {options.threads or 'all'} threads")
    vocabulary = llm.file.tensors["token_embd.weight"].shape[0]
    context = min(options.context, llm.context_length - options.generate - 1) // _PAGE * _PAGE
    if context < _PAGE:
        raise RequestError(
            f"A prompt of {_PAGE} tokens is the least, and the context of {llm.context_length} must hold "
            f"--generate {options.generate} behind it."
        )
    profile = Profile()
    with profile.watching():
        for seed in range(2):  # the first time, kernels are compiled and steps recorded
            # The pages of a prompt are kept: the second time only its last token is computed.
            prompt = prompt_ids(context + 1, vocabulary, seed)
            prompt_seconds = _timed(llm, prompt, 1, profile)
            of_prompt = profile.render(prompt_seconds, 1)
            seconds = _timed(llm, prompt, options.generate, profile)
    print(f"\n## A prompt of {context + 1} tokens: {context / prompt_seconds:.1f} tokens/s\n\n{of_prompt}")
    of_step = profile.render(seconds, options.generate)
    print(f"\n## A token after it: {options.generate / seconds:.1f} tokens/s\n\n{of_step}")


def _timed(llm: LLM, prompt: list[int], tokens: int, profile: Profile) -> float:
    params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
    profile.reset()
    started = time.perf_counter()
    llm.generate([prompt], params)
    return time.perf_counter() - started


if __name__ == "__main__":
    sys.exit(main())
