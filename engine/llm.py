"""`LLM`: a GGUF file, ready to generate. Prompts go in, text comes out; everything between is the engine's."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as List
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import torch

from trichord.cache import PAGE_SIZE, pages_for
from trichord.chat_template import ChatTemplate, encode_rendered
from trichord.completion_text import CompletionText
from trichord.decode_graph import capture_for
from trichord.device import CPU, Place, resolve
from trichord.dispatch import PRECISIONS, Precision, set_threads
from trichord.embedding import Pooling, file_pooling, pool
from trichord.engine import Engine
from trichord.errors import DeviceError, RequestError, TokenizerError
from trichord.gguf_file import GGUFFile
from trichord.hub import find_model
from trichord.models.config import ModelConfig
from trichord.models.decoder import Decoder
from trichord.models.lora import Adapter
from trichord.offload import AMPLE_CONTEXT, ModelSize, activation_bytes, advice, fitting_layers, model_size
from trichord.outputs import RequestOutput
from trichord.progress import progress_bar
from trichord.sampling_params import SamplingParams
from trichord.sequence import Sequence
from trichord.tokenizers import Tokenizer
from trichord.upload import finish_uploads

Prompt: TypeAlias = str | List[int]

DEMO_MODEL = Path(__file__).parent / "demo" / "tales.gguf"

_KV_DTYPES = {"f32": torch.float32, "f16": torch.float16, "q8": torch.int8}


class LLM:
    """A model loaded from one GGUF file.

    path: the file, any part of a split one, "owner/repo" or "owner/repo:Q4_K_M" to fetch it from huggingface.co, or
    None for the demo model. device: "auto", "cpu", "cuda" or "cuda:N".
    precision: "exact" (float32 throughout), "default" or "fast". context_length: None is the model's own. gpu_layers:
    how many layers, counted from the last, go to the GPU; "auto", or None, is as many as its memory holds. cpu_experts:
    whether the matrices of experts stay on the CPU. kv_dtype: "f32", "f16" or "q8" (8 bits, and a
    scale for each 32 elements: 53% of float16's bytes; latents keep 16 bits); None is float32 for "exact", else
    float16. threads: CPU threads; None follows the machine. max_batch_tokens and max_sequences bound a
    step; cache_bytes bounds the key-value cache (None: what a full step of sequences can use, within the memory free).
    lora: adapter files, each by itself or with its strength. graphs: whether steps that only decode run as a whole, as
    CUDA graphs or recordings, where all of the model lies on one GPU or on the CPU.
    progress: whether to show bars on standard error; None is where that is a terminal.

    Raises GGUFError, ModelError, DeviceError or RequestError. May be used from several threads.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        device: str = "auto",
        precision: Precision = "default",
        context_length: int | None = None,
        gpu_layers: int | Literal["auto"] | None = None,
        cpu_experts: bool = False,
        kv_dtype: str | torch.dtype | None = None,
        threads: int | None = None,
        max_batch_tokens: int = 512,
        max_sequences: int = 64,
        cache_bytes: int | None = None,
        lora: str | os.PathLike[str] | List[str | os.PathLike[str] | tuple[str | os.PathLike[str], float]] = (),
        graphs: bool = True,
        progress: bool | None = None,
    ) -> None:
        started = time.perf_counter()
        if precision not in PRECISIONS:
            raise RequestError(f"precision {precision!r} is not one of {', '.join(PRECISIONS)}.")
        for name, value in (("max_batch_tokens", max_batch_tokens), ("max_sequences", max_sequences)):
            if value < 1:
                raise RequestError(f"{name} must be at least 1, not {value}.")
        place = resolve(device)
        if threads is not None:
            set_threads(threads)
        self._progress = progress
        self.file = GGUFFile(DEMO_MODEL if path is None else find_model(path))
        self.config = ModelConfig.from_gguf(self.file)
        self.tokenizer, self._no_tokenizer = _tokenizer(self.file)
        self.context_length = _context(context_length, self.config)
        dtype = _kv_dtype(kv_dtype, precision)
        limits = {"max_batch_tokens": max_batch_tokens, "max_sequences": max_sequences}
        sizes = partial(model_size, self.file, self.config, place, **limits)
        free = place.free_bytes()
        # A context that nobody asked for is rather shortened than paid for with layers.
        asked = min(self.context_length, context_length or AMPLE_CONTEXT)
        on_gpu = _gpu_layers(place, gpu_layers, len(self.config.layers))
        if on_gpu is None:
            on_gpu = _fitting(sizes(dtype, cpu_experts), free, asked)
        places = [CPU] * (len(self.config.layers) - on_gpu) + [place] * on_gpu
        outer = place if places[0] == place else CPU
        expert_place = CPU if cpu_experts and self.config.experts else None
        file_bytes = sum(tensor.nbytes for tensor in self.file.tensors.values())
        try:
            with progress_bar("Loading", file_bytes, "bytes", progress) as advance:
                adapters = self._adapters(lora)
                self.model = Decoder(self.file, self.config, places, outer, advance, adapters, expert_place)
            finish_uploads()
            working = activation_bytes(self.config, self.model.vocabulary, **limits)
            pages, sequences = self._capacity(dtype, max_sequences, cache_bytes, working)
            self._engine = Engine(
                self.model,
                precision=precision,
                kv_dtype=dtype,
                pages=pages,
                max_batch_tokens=max_batch_tokens,
                max_sequences=sequences,
                max_pages=pages_for(self.context_length),
                piece=self.tokenizer.piece if self.tokenizer else str,
                capture=capture_for(self.model) if graphs else None,
            )
        except DeviceError as error:
            if not on_gpu:
                raise
            others = _smaller(sizes, dtype, cpu_experts or not self.config.experts)
            raise DeviceError(f"{error} {advice(sizes(dtype, cpu_experts), free, on_gpu, asked, others)}") from error
        self.load_seconds = time.perf_counter() - started

    def generate(
        self,
        prompts: Prompt | List[Prompt],
        params: SamplingParams | List[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Completes one prompt or many, text or token ids; results come in the prompts' order.

        params: one for all prompts or one each. Raises RequestError, before anything is computed, for a prompt that is
        empty, too long for the context or out of the vocabulary, and TokenizerError for text the file cannot encode.
        """
        prompts = _prompt_list(prompts)
        each = list(params) if isinstance(params, (list, tuple)) else [params or SamplingParams()] * len(prompts)
        if len(each) != len(prompts):
            raise RequestError(f"{len(each)} sampling parameters were given for {len(prompts)} prompts.")
        requests = [self._request(prompt, param) for prompt, param in zip(prompts, each, strict=True)]
        self._run([sequence for request in requests for sequence in request])
        return [_output(prompt, request) for prompt, request in zip(prompts, requests, strict=True)]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> TextStream:
        """Completes one prompt, yielding its text as it comes, never half a character."""
        params = params or SamplingParams()
        if params.n != 1:
            raise RequestError("stream() yields one completion: n must be 1.")
        (sequence,) = self._request(prompt, params)
        return TextStream(self._engine, prompt, sequence)

    def chat(
        self,
        messages: List[Mapping[str, Any]],
        params: SamplingParams | None = None,
        *,
        tools: List[Mapping[str, Any]] | None = None,
        **template_arguments: Any,
    ) -> RequestOutput:
        """Answers a conversation of {"role", "content"} messages, laid out by `chat_template`.

        Raises TemplateError when the template fails, besides what `generate` raises.
        """
        prompt = self.chat_prompt(messages, tools=tools, **template_arguments)
        (output,) = self.generate([prompt], self.chat_template.with_stops(params))
        return output

    @cached_property
    def chat_template(self) -> ChatTemplate:
        """The file's own chat template, or where it has none the layout its vocabulary looks made for."""
        return ChatTemplate.from_gguf(self.file, self.require_tokenizer())

    def chat_prompt(
        self,
        messages: List[Mapping[str, Any]],
        *,
        tools: List[Mapping[str, Any]] | None = None,
        **template_arguments: Any,
    ) -> list[int]:
        """The token ids that the chat template makes of a conversation, up to where the answer begins."""
        text = self.chat_template.render(messages, tools=tools, **template_arguments)
        return encode_rendered(self.require_tokenizer(), text)

    def logits(self, token_ids: List[int]) -> np.ndarray:
        """The logits (n_tokens, n_vocab) float32 after each of these tokens; needs no tokenizer."""
        return np.stack(self._prompt_results([token_ids], "logits")[0])

    def log_likelihoods(self, token_ids: List[int], first: int = 1) -> np.ndarray:
        """The natural logarithm of each token's probability after those before it, from number `first` on.

        float64 (n_tokens - first,). The logits stay on the device. Raises RequestError like `generate`, and for a
        `first` below 1, because nothing predicts the first token.
        """
        if first < 1:
            raise RequestError(f"The first token to be predicted must be number 1 or a later one, not {first}.")
        (results,) = self._prompt_results([token_ids], "likelihoods", first - 1)
        return np.array(results[first - 1 : -1], np.float64)

    def embed(
        self, texts: Prompt | List[Prompt], *, pooling: Pooling | None = None, normalize: bool = True
    ) -> np.ndarray:
        """One vector for each text (or list of token ids): (n_texts, n_hidden) float32.

        pooling: "mean" of the tokens' states, the "first" or the "last" of them; None is as the file says. normalize
        scales each to length 1. Raises RequestError for an empty or too long text.
        """
        if pooling is None:
            pooling = file_pooling(self.file, self.config.architecture.name, self.config.architecture.causal)
        elif pooling not in get_args(Pooling):
            raise RequestError(f"pooling {pooling!r} is not one of {', '.join(get_args(Pooling))}.")
        prompts = [self._encode(text) if isinstance(text, str) else text for text in _prompt_list(texts)]
        results = self._prompt_results(prompts, "hidden")
        vectors = [pool(np.stack(states), pooling, normalize) for states in results]
        return np.stack(vectors) if vectors else np.empty((0, self.config.hidden_size), np.float32)

    def require_tokenizer(self) -> Tokenizer:
        """The file's tokenizer. Raises TokenizerError where it has none that can be used."""
        if self.tokenizer is None:
            raise TokenizerError(self._no_tokenizer)
        return self.tokenizer

    @property
    def weight_bytes(self) -> int:
        """Bytes of packed weights that stay resident."""
        return self.model.weight_bytes

    def _adapters(self, lora: Any) -> list[Adapter]:
        files = [lora] if isinstance(lora, (str, os.PathLike)) else lora
        pairs = [file if isinstance(file, tuple) else (file, 1.0) for file in files]
        return [Adapter(path, strength, self.config.architecture.name) for path, strength in pairs]

    def _request(self, prompt: Prompt, params: SamplingParams) -> list[Sequence]:
        if not self.config.architecture.causal:
            raise RequestError(
                f"A model of architecture {self.config.architecture.name} does not write from left to right: "
                "it gives embeddings and logits."
            )
        ids = self._checked(self._encode(prompt) if isinstance(prompt, str) else prompt, room=1)
        named = [*params.stop_token_ids, *(params.logit_bias or ())]
        if named and max(named) >= self.model.vocabulary:
            raise RequestError(f"Token id {max(named)} is outside the vocabulary of {self.model.vocabulary}.")
        ends = self.tokenizer.stop_ids if self.tokenizer and not params.ignore_eos else frozenset()
        limit = self.context_length
        if params.max_tokens is not None:
            limit = min(limit, len(ids) + params.max_tokens)
        return [
            Sequence(
                list(ids),
                params,
                CompletionText(self.tokenizer.detokenizer(continues=True) if self.tokenizer else None, params.stop),
                ends | set(params.stop_token_ids),
                limit,
                index=index,
                prompt_report="logprobs" if params.prompt_logprobs is not None and index == 0 else None,
            )
            for index in range(params.n)
        ]

    def _prompt_results(self, prompts: List[List[int]], report: str, report_from: int = 0) -> list[list[Any]]:
        sequences = [
            Sequence(
                ids,
                SamplingParams(),
                CompletionText(None, ()),
                frozenset(),
                len(ids),
                generates=False,
                prompt_report=report,
                report_from=report_from,
            )
            for ids in (self._checked(prompt, room=0) for prompt in prompts)
        ]
        self._run(sequences)
        return [sequence.prompt_results for sequence in sequences]

    def _encode(self, text: str) -> list[int]:
        if not text:
            raise RequestError("The prompt is empty.")
        return self.require_tokenizer().encode(text)

    def _checked(self, token_ids: List[int], room: int) -> list[int]:
        try:
            if isinstance(token_ids, (bytes, bytearray)):  # text that was not decoded
                raise TypeError
            ids = [int(token) for token in token_ids]
        except (TypeError, ValueError):
            raise RequestError(f"A prompt is text or a list of token ids, not {token_ids!r:.80}.") from None
        if not ids:
            raise RequestError("The prompt is empty.")
        outside = [token for token in ids if not 0 <= token < self.model.vocabulary]
        if outside:
            raise RequestError(f"Token id {outside[0]} is outside the vocabulary of {self.model.vocabulary}.")
        if len(ids) + room > self.context_length:
            raise RequestError(
                f"The prompt has {len(ids)} tokens, but the context holds {self.context_length}"
                f"{' with at least one to generate' if room else ''}: shorten the prompt"
                f"{' or raise context_length' if self.context_length < self.config.context_length else ''}."
            )
        return ids

    def _run(self, sequences: List[Sequence]) -> None:
        with progress_bar("Generating", len(sequences), "completions", self._progress) as advance:
            finished = 0
            for _ in self._engine.run(sequences):
                now = sum(sequence.finished for sequence in sequences)
                advance(now - finished)
                finished = now

    def _capacity(
        self, dtype: torch.dtype, max_sequences: int, cache_bytes: int | None, working: int
    ) -> tuple[int, int]:
        """How many cache pages to allocate, and how many sequences' states, beside the bytes that a GPU works in.

        Warns where memory holds the states of fewer sequences, or not even one context: then it is shortened.
        """
        of_context = pages_for(self.context_length)
        per_place: dict[Place, int] = {}
        slots: dict[Place, int] = {}
        for layer in self.model.layers:
            per_place[layer.place] = per_place.get(layer.place, 0) + sum(c.page_bytes(dtype) for c in layer.caches)
            slots[layer.place] = slots.get(layer.place, 0) + sum(c.slot_bytes for c in layer.caches)
        sequences, budgets = max_sequences, {}
        for place, page_bytes in per_place.items():
            budget = cache_bytes
            if budget is None:
                # The CPU's pages are only touched when used, but the memory is shared with everything else.
                free = place.free_bytes()
                budget = max(free - working, free // 4) if place.device.type == "cuda" else free // 4
            budgets[place] = budget
            if slots[place]:  # half of the memory at most, where there are positions to remember as well
                sequences = min(sequences, int(budget / (2 if page_bytes else 1) // slots[place]))
        if sequences < max_sequences:
            states = f"{sum(slots.values()) / 2**20:.1f} MiB of states"
            if sequences < 1:
                raise DeviceError(f"No memory for a sequence's {states}.")
            warnings.warn(
                f"There is memory for {sequences} of {max_sequences} sequences at a time, each with {states}: "
                "others wait.",
                stacklevel=3,
            )
        pages = of_context * sequences
        for place, page_bytes in per_place.items():
            if page_bytes:
                pages = min(pages, int((budgets[place] - sequences * slots[place]) // page_bytes))
        if pages < of_context:
            needed = sum(per_place.values())
            if pages < 1:
                raise DeviceError(
                    f"No memory for the key-value cache: {needed / 2**20:.1f} MiB hold {PAGE_SIZE} positions."
                )
            self.context_length = pages * PAGE_SIZE
            warnings.warn(
                f"The key-value cache has room for {self.context_length} of {of_context * PAGE_SIZE} positions "
                f"({needed * of_context / 2**30:.1f} GiB would hold them all): the context is shortened to that.",
                stacklevel=3,
            )
        return pages, sequences


class TextStream(Iterator[str]):
    """The text of one completion, piece by piece; closing it early aborts the completion.

    prompt_seconds and generation_seconds: time to the first token, and from there to the last, as far as it has come.
    """

    def __init__(self, engine: Engine, prompt: Prompt, sequence: Sequence) -> None:
        self._prompt = prompt
        self._sequence = sequence
        self._steps = engine.run([sequence])
        self.prompt_seconds = 0.0
        self.generation_seconds = 0.0

    def __next__(self) -> str:
        while True:
            started = time.perf_counter()
            alive = next(self._steps, self) is None
            elapsed = time.perf_counter() - started
            if len(self._sequence.completion_ids) > 1:
                self.generation_seconds += elapsed
            else:
                self.prompt_seconds += elapsed
            piece = self._sequence.text.take()
            if piece:
                return piece
            if not alive:
                raise StopIteration

    @property
    def reused_tokens(self) -> int:
        """How many of the prompt's tokens were found in the cache instead of being computed."""
        return self._sequence.reused

    @property
    def output(self) -> RequestOutput:
        """The request's output as far as it has come."""
        return _output(self._prompt, [self._sequence])

    def close(self) -> None:
        """Aborts the completion if it is still going."""
        self._steps.close()


def _prompt_list(prompts: Prompt | List[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str):
        return [prompts]
    prompts = list(prompts)
    if prompts and not any(isinstance(prompt, str) or hasattr(prompt, "__len__") for prompt in prompts):
        return [prompts]
    return prompts


def _output(prompt: Prompt, sequences: list[Sequence]) -> RequestOutput:
    first = sequences[0]
    reported = first.params.prompt_logprobs is not None
    return RequestOutput(
        prompt=prompt if isinstance(prompt, str) else None,
        prompt_token_ids=first.tokens[: first.prompt_length],
        outputs=[sequence.output() for sequence in sequences],
        prompt_logprobs=[None, *first.prompt_results[:-1]] if reported else None,
    )


def _tokenizer(file: GGUFFile) -> tuple[Tokenizer | None, str]:
    """The file's tokenizer, or why it has none that can be used: token ids work without."""
    try:
        return Tokenizer.from_gguf(file), ""
    except TokenizerError as error:
        return None, str(error)


def _context(asked: int | None, config: ModelConfig) -> int:
    if asked is None:
        return config.context_length
    if not 1 <= asked <= config.context_length:
        raise RequestError(f"context_length must be from 1 to the model's {config.context_length}, not {asked}.")
    return asked


def _gpu_layers(place: Place, asked: int | str | None, layers: int) -> int | None:
    """How many of the layers go to the GPU; None: as many as fit."""
    if asked in (None, "auto"):
        return 0 if place == CPU else None
    if not isinstance(asked, int) or asked < 0:
        raise RequestError(f"gpu_layers must be 0 or more, or 'auto', not {asked!r}.")
    if place == CPU and asked:
        raise DeviceError(f"gpu_layers={asked} needs a GPU, and the device is the CPU.")
    return min(asked, layers)


def _fitting(size: ModelSize, free: int, context_length: int) -> int:
    """How many layers fit on the GPU; warns when these are not all."""
    count, layers = fitting_layers(size, free, pages_for(context_length)), len(size.layers)
    if count < layers:
        warnings.warn(
            f"{free / 2**30:.1f} GiB of free GPU memory hold {count} of the {layers} layers with {context_length} "
            "positions of context: the others run on the CPU.",
            stacklevel=3,
        )
    return count


def _smaller(sizes: Callable[..., ModelSize], dtype: torch.dtype, cpu_experts: bool) -> dict[str, ModelSize]:
    """The same model by each option that would make it smaller on the GPU."""
    dtypes = {name: other for name, other in _KV_DTYPES.items() if other.itemsize < dtype.itemsize}
    smaller = {f"kv_dtype={name}": sizes(other, cpu_experts) for name, other in dtypes.items()}
    return smaller if cpu_experts else {**smaller, "cpu_experts": sizes(dtype, True)}


def _kv_dtype(asked: str | torch.dtype | None, precision: Precision) -> torch.dtype:
    if asked is None:
        return torch.float32 if precision == "exact" else torch.float16
    dtype = _KV_DTYPES.get(asked) if isinstance(asked, str) else asked
    if dtype not in _KV_DTYPES.values():
        raise RequestError(f"kv_dtype {asked!r} is not one of {', '.join(_KV_DTYPES)}.")
    return dtype
