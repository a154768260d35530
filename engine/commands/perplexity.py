"""`trichord perplexity`: measures how well a model predicts a text."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from trichord.commands import options as shared
from trichord.errors import RequestError
from trichord.gguf_file import GGUFFile
from trichord.hub import find_model
from trichord.perplexity import DEFAULT_CONTEXT, Estimate, estimates, text_chunks
from trichord.progress import progress_bar
from trichord.terminal import rate


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `trichord perplexity`."""
    parser.description = (
        "Measure how well a model predicts a text: the lower the perplexity, the better. The text is cut into chunks of"
        " one context, of which the second half is scored, as llama.cpp does."
    )
    parser.add_argument("model", metavar="MODEL", help=shared.MODEL_HELP)
    parser.add_argument("-f", "--file", type=Path, required=True, metavar="FILE", help="the text, in UTF-8")
    parser.add_argument("--chunks", type=int, metavar="N", help="only the first N chunks")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    shared.add_machine(parser, f"tokens in a chunk (default: {DEFAULT_CONTEXT}, or the model's context if smaller)")


def run(options: argparse.Namespace) -> int:
    """Prints the running value of each chunk to standard error and the result to standard output."""
    if options.chunks is not None and options.chunks < 1:
        raise RequestError(f"--chunks must be at least 1, not {options.chunks}.")
    model = str(find_model(options.model))
    text = _read(options.file)
    context = options.context
    if context is None:
        from trichord.models.config import ModelConfig

        with GGUFFile(model) as file:
            context = min(DEFAULT_CONTEXT, ModelConfig.from_gguf(file).context_length)
    llm = shared.load_model(options, model, context)
    chunks = text_chunks(llm, text, context)[: options.chunks]
    started = time.perf_counter()
    on_terminal = sys.stderr.isatty()
    with progress_bar("Perplexity", len(chunks), "chunks") as advance:
        for estimate in estimates(llm, chunks):
            advance(1, f"Perplexity {estimate.perplexity:.4f}")
            if not on_terminal:
                print(f"[{estimate.chunks}]{estimate.perplexity:.4f},", end="", file=sys.stderr, flush=True)
    if not on_terminal:
        print(file=sys.stderr)
    seconds = time.perf_counter() - started
    print(json.dumps(_result(estimate, context, seconds), indent=2) if options.json else _sentence(estimate))
    print(
        f"{estimate.chunks} chunks of {context} tokens, {estimate.tokens} tokens scored, {seconds:.1f} s"
        f"{rate(estimate.chunks * context, seconds)}",
        file=sys.stderr,
    )
    return 0


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise RequestError(f"The text cannot be read from {file}: {error.strerror}.") from None
    except UnicodeDecodeError as error:
        raise RequestError(f"{file} is not UTF-8 text: byte {error.start} is invalid.") from None


def _sentence(estimate: Estimate) -> str:
    return f"Final estimate: PPL = {estimate.perplexity:.4f} +/- {estimate.error:.5f}"


def _result(estimate: Estimate, context: int, seconds: float) -> dict[str, float | int]:
    return {
        "perplexity": estimate.perplexity,
        "error": estimate.error,
        "chunks": estimate.chunks,
        "context": context,
        "tokens": estimate.tokens,
        "seconds": round(seconds, 3),
    }
