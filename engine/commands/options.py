"""Options that several subcommands share, and the objects they make."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trichord.llm import LLM
    from trichord.sampling_params import SamplingParams

MODEL_HELP = "a file, any part of a split one, or OWNER/REPO[:Q4_K_M] to fetch from huggingface.co"

_OPTION_OF = {
    "max_tokens": "--max-tokens",
    "temperature": "--temp",
    "top_k": "--top-k",
    "top_p": "--top-p",
    "min_p": "--min-p",
    "repetition_penalty": "--repeat-penalty",
    "seed": "--seed",
    "stop": "--stop",
    "context_length": "--context",
    "gpu_layers": "--gpu-layers",
    "cpu_experts": "--cpu-experts",
    "kv_dtype": "--kv-dtype",
}
_NAMES = "|".join(_OPTION_OF)
# A parameter is named at the start of a sentence, and elsewhere only if its name is no word of English.
_PARAMETER = re.compile(rf"^(?:{_NAMES})\b|(?<![\w.])(?:{'|'.join(n for n in _OPTION_OF if '_' in n)})\b(?!\.\w)")


def in_options(sentence: str) -> str:
    """An error's sentence with the command line's options in place of the parameters of Python that they set."""
    return _PARAMETER.sub(lambda match: _OPTION_OF[match[0]], sentence)


def add_sampling(parser: argparse.ArgumentParser, max_tokens: int) -> None:
    """Options of `sampling_params`; `max_tokens` is the default of the one for the length."""
    group = parser.add_argument_group("sampling")
    number = _numbers(group)
    group.add_argument(
        "-n",
        "--max-tokens",
        type=int,
        default=max_tokens,
        metavar="N",
        help="generate at most N tokens; -1: to the context's end (default: %(default)s)",
    )
    number("--temp", float, 0.8, "temperature; 0 always takes the likeliest token")
    number("--top-k", int, 40, "draw from the N likeliest tokens; 0: from all")
    number("--top-p", float, 0.95, "draw from the likeliest tokens that hold this probability together")
    number("--min-p", float, 0.05, "leave out tokens below this share of the likeliest one's probability")
    number("--repeat-penalty", float, 1.0, "divide the logits of tokens seen before; 1: do not")
    number("--seed", int, None, "make the draws repeatable")
    group.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be given several times"
    )
    group.add_argument("--ignore-eos", action="store_true", help="go on past the model's own end")


def sampling_params(options: argparse.Namespace) -> SamplingParams:
    """What the options of `add_sampling` ask for."""
    from trichord.sampling_params import SamplingParams

    return SamplingParams(
        temperature=options.temp,
        top_k=options.top_k,
        top_p=options.top_p,
        min_p=options.min_p,
        repetition_penalty=options.repeat_penalty,
        seed=options.seed,
        stop=options.stop,
        ignore_eos=options.ignore_eos,
        max_tokens=None if options.max_tokens == -1 else options.max_tokens,
    )


def add_machine(
    parser: argparse.ArgumentParser, context: str = "positions of context (default: the model's own; fewer save memory)"
) -> None:
    """Options of `load_model`; `context` is the help of the one for the context's length."""
    group = parser.add_argument_group("machine")
    number = _numbers(group)
    group.add_argument(
        "--device",
        default="auto",
        metavar="auto|cuda|cpu",
        help="where to run; cuda:N picks a GPU (default: %(default)s)",
    )
    group.add_argument(
        "--precision",
        default="default",
        choices=("exact", "default", "fast"),
        help="float32, 16-bit or 8-bit activations (default: %(default)s)",
    )
    group.add_argument(
        "--gpu-layers",
        type=_layers,
        default="auto",
        metavar="N|auto",
        help="put the last N layers on the GPU; auto: as many as its memory holds (default: %(default)s)",
    )
    group.add_argument(
        "--cpu-experts",
        action="store_true",
        help="keep the matrices of experts on the CPU and the rest of their layers on the GPU",
    )
    group.add_argument(
        "--no-graphs", action="store_true", help="compute steps call by call, not as CUDA graphs or recordings"
    )
    number("--threads", int, None, "CPU threads (default: one for each core)")
    group.add_argument("-c", "--context", type=int, metavar="N", help=context)
    group.add_argument(
        "--lora",
        action="append",
        default=[],
        type=_adapter,
        metavar="FILE[:X]",
        help="add a LoRA adapter, X times as strong; may be given several times",
    )
    group.add_argument(
        "--kv-dtype",
        choices=("f32", "f16", "q8"),
        help="number format of the key-value cache; q8, 8 bits, takes about half of f16's memory "
        "(default: f16; f32 with --precision exact)",
    )


def load_model(
    options: argparse.Namespace, model: str | None, context_length: int | None, max_sequences: int = 1
) -> LLM:
    """The model, for so many sequences at a time, as the options of `add_machine` say. None: the demo model."""
    from trichord.llm import LLM

    return LLM(
        model,
        device=options.device,
        precision=options.precision,
        context_length=context_length,
        gpu_layers=options.gpu_layers,
        cpu_experts=options.cpu_experts,
        graphs=not options.no_graphs,
        kv_dtype=options.kv_dtype,
        lora=options.lora,
        threads=options.threads,
        max_sequences=max_sequences,
    )


def _layers(argument: str) -> int | str:
    """A number of layers or "auto"."""
    return argument if argument == "auto" else int(argument)


def _adapter(argument: str) -> tuple[str, float]:
    """FILE or FILE:STRENGTH, where a file's own name may have colons."""
    path, colon, strength = argument.rpartition(":")
    try:
        return (path, float(strength)) if colon and path else (argument, 1.0)
    except ValueError:
        return argument, 1.0


def _numbers(group: argparse._ArgumentGroup) -> Callable[[str, type, object, str], None]:
    def add(name: str, kind: type, default: object, what: str) -> None:
        shown = "" if default is None else " (default: %(default)s)"
        group.add_argument(name, type=kind, default=default, metavar="N" if kind is int else "X", help=what + shown)

    return add
