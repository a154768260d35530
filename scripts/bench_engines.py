"""The engines that the benchmarks time, behind one small interface, in this process or each in one of its own.

An engine has a `version`, `load_seconds`, and methods that return seconds: `prompt` computes a prompt up to its first
token, `generate` continues sequences of one token. Ours is used through its public API alone. llama.cpp is used through
the C interface that `llama-cpp-python` exposes, as `llama-bench` uses it: its tokens are drawn beforehand, not sampled.

    PYTHON scripts/bench_engines.py '{"engine": "llama.cpp", "model": "FILE.gguf", "threads": 2}'

serves an engine to the process that starts it (see `EngineProcess`), a line of JSON in, a line of JSON out. PYTHON
needs the packages of that engine only: nothing but the standard library is imported before the engine is chosen.
"""

from __future__ import annotations

import ctypes
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

FIRST_WORD = 259
"""Ids below may be control or byte tokens."""


def prompt_ids(count: int, vocabulary: int, seed: int) -> list[int]:
    """Token ids for a prompt: the same for every engine, others for each seed, so that no cache of prompts helps."""
    draw = random.Random(seed)
    return [draw.randrange(min(FIRST_WORD, vocabulary - 1), vocabulary) for _ in range(count)]


def peak_bytes() -> int:
    """The most memory this process has had resident, pages of mapped files included."""
    try:
        # Not getrusage: there a process inherits the peak of the one that started it.
        return 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
    except (OSError, IndexError):
        pass
    if os.name == "nt":
        import psutil

        return psutil.Process().memory_info().peak_wset
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Trichord:
    """This engine. batch: the most sequences that run at once. threads: None follows the machine."""

    def __init__(
        self,
        model: str,
        threads: int | None = None,
        precision: str = "default",
        device: str = "cpu",
        batch: int = 1,
    ) -> None:
        import trichord
        from trichord import LLM, SamplingParams

        self.version = f"trichord {trichord.__version__}"
        started = time.perf_counter()
        self.llm = LLM(model, device=device, precision=precision, threads=threads, max_sequences=batch, progress=False)
        self.load_seconds = time.perf_counter() - started
        self._vocabulary = self.llm.file.tensors["token_embd.weight"].shape[0]
        self._params = SamplingParams

    def prompt(self, tokens: int, seed: int) -> float:
        """Seconds from a prompt of so many tokens to the first token of its completion."""
        return self._timed([prompt_ids(tokens, self._vocabulary, seed)], 1)

    def generate(self, tokens: int, seed: int, batch: int = 1) -> float:
        """Seconds to generate so many tokens for each of `batch` sequences."""
        return self._timed([[token] for token in prompt_ids(batch, self._vocabulary, seed)], tokens)

    def logits(self, tokens: int, seed: int, path: str) -> None:
        """Writes the logits after each token of a prompt to a file: (tokens, vocabulary) float32."""
        self.llm.logits(prompt_ids(tokens, self._vocabulary, seed)).tofile(path)

    def _timed(self, prompts: list[list[int]], tokens: int) -> float:
        params = self._params(temperature=0.0, max_tokens=tokens, ignore_eos=True)
        started = time.perf_counter()
        self.llm.generate(prompts, params)
        return time.perf_counter() - started


class LlamaCpp:
    """llama.cpp by the package `llama-cpp-python`; all but the threads, the context and the device is its default."""

    def __init__(self, model: str, threads: int, device: str = "cpu", context: int = 1024) -> None:
        import llama_cpp as api

        self._api = api
        self._log = api.llama_log_callback(_show_errors)  # the library keeps no reference of its own
        api.llama_log_set(self._log, ctypes.c_void_p())
        self.version = f"llama-cpp-python {api.__version__} ({_enabled(api.llama_print_system_info().decode())})"
        started = time.perf_counter()
        model_params = api.llama_model_default_params()
        model_params.n_gpu_layers = 0 if device == "cpu" else 999
        self._model = api.llama_model_load_from_file(os.fsencode(model), model_params)
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {model}")
        params = api.llama_context_default_params()
        params.n_ctx = context
        params.n_batch = max(params.n_batch, context)
        params.n_threads = params.n_threads_batch = threads
        self._context = api.llama_init_from_model(self._model, params)
        self.load_seconds = time.perf_counter() - started
        self._vocabulary = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self._model))

    def prompt(self, tokens: int, seed: int) -> float:
        """Seconds to compute a prompt of so many tokens and the logits after it."""
        return self._timed([prompt_ids(tokens, self._vocabulary, seed)])

    def generate(self, tokens: int, seed: int) -> float:
        """Seconds to compute so many tokens of one sequence, each by itself."""
        return self._timed([[token] for token in prompt_ids(tokens, self._vocabulary, seed)])

    def logits(self, tokens: int, seed: int, path: str) -> None:
        """Writes the logits after each token of a prompt to a file: (tokens, vocabulary) float32."""
        batch = self._api.llama_batch_init(tokens, 0, 1)
        batch.n_tokens = tokens
        for index, token in enumerate(prompt_ids(tokens, self._vocabulary, seed)):
            batch.token[index], batch.pos[index], batch.logits[index] = token, index, 1
            batch.n_seq_id[index], batch.seq_id[index][0] = 1, 0
        self._forget()
        self._decode(batch)
        logits = self._api.llama_get_logits(self._context)
        Path(path).write_bytes(ctypes.string_at(logits, 4 * tokens * self._vocabulary))
        self._api.llama_batch_free(batch)

    def _timed(self, steps: Iterable[list[int]]) -> float:
        self._forget()
        started = time.perf_counter()
        for ids in steps:
            tokens = (self._api.llama_token * len(ids))(*ids)
            self._decode(self._api.llama_batch_get_one(tokens, len(ids)))
        return time.perf_counter() - started

    def _decode(self, batch: Any) -> None:
        status = self._api.llama_decode(self._context, batch)
        if status:
            raise RuntimeError(f"llama_decode failed with status {status}")
        self._api.llama_synchronize(self._context)

    def _forget(self) -> None:
        self._api.llama_memory_clear(self._api.llama_get_memory(self._context), True)


def _show_errors(level: int, text: bytes, _: object) -> None:
    if level == 4:  # GGML_LOG_LEVEL_ERROR
        sys.stderr.write(text.decode(errors="replace"))


def _enabled(features: str) -> str:
    """ "CPU : AVX2 = 1 | AVX512 = 0 | " -> "AVX2"."""
    pairs = [feature.split(":")[-1].split("=") for feature in features.split("|") if "=" in feature]
    return " ".join(name.strip() for name, value in pairs if value.strip() == "1")


class LlamaBench:
    """llama.cpp by a `llama-bench` binary: every measurement is a process, which loads and warms up untimed."""

    def __init__(self, binary: str, model: str, threads: int, device: str = "cpu") -> None:
        layers = "0" if device == "cpu" else "999"
        self._command = [binary, "-m", model, "-t", str(threads), "-ngl", layers, "-r", "1", "-o", "json"]
        self.version = "llama-bench"

    def prompt(self, tokens: int, seed: int) -> float:
        """Seconds to compute a prompt of so many tokens."""
        return self._timed(["-p", str(tokens), "-n", "0"])

    def generate(self, tokens: int, seed: int) -> float:
        """Seconds to compute so many tokens of one sequence, each by itself."""
        return self._timed(["-p", "0", "-n", str(tokens)])

    def close(self) -> None:
        """There is no process to end."""

    def _timed(self, test: list[str]) -> float:
        done = subprocess.run([*self._command, *test], capture_output=True, text=True)
        try:
            (report,) = json.loads(done.stdout)
            self.version = f"llama-bench {report['build_commit']} (build {report['build_number']})"
            return report["avg_ns"] / 1e9
        except (ValueError, KeyError) as error:
            raise EngineError(f"{self._command[0]} gave no measurement: {_last_line(done.stderr) or error}") from error


class EngineError(Exception):
    """An engine could not be started, or failed; the message is one sentence."""


class EngineProcess:
    """An engine in a process of its own, run by the interpreter `python`; `engine` is "trichord" or "llama.cpp".

    arguments: those of the engine's class. Raises EngineError when it cannot be started, and when a call fails.
    """

    def __init__(self, python: str, engine: str, **arguments: Any) -> None:
        command = [python, __file__, json.dumps({"engine": engine, **arguments})]
        try:
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        except OSError as error:
            raise EngineError(f"{python} cannot be started: {error.strerror}.") from error
        started = self._answer()
        self.version: str = started["version"]
        self.load_seconds: float = started["load_seconds"]

    def prompt(self, tokens: int, seed: int) -> float:
        """Seconds to compute a prompt of so many tokens."""
        return self._call("prompt", tokens=tokens, seed=seed)

    def generate(self, tokens: int, seed: int) -> float:
        """Seconds to generate so many tokens."""
        return self._call("generate", tokens=tokens, seed=seed)

    def logits(self, tokens: int, seed: int, path: str) -> None:
        """Writes the logits after each token of a prompt to a file: (tokens, vocabulary) float32."""
        self._call("logits", tokens=tokens, seed=seed, path=path)

    def peak_bytes(self) -> int:
        """The most memory the process has had resident so far."""
        return self._call("peak_bytes")

    def close(self) -> None:
        """Ends the process."""
        self._process.stdin.close()
        self._process.wait()

    def _call(self, method: str, **arguments: Any) -> Any:
        self._process.stdin.write(json.dumps([method, arguments]) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        line = self._process.stdout.readline()
        if not line:
            raise EngineError(f"{self._process.args[0]} ended with status {self._process.wait()}.")
        answer = json.loads(line)
        if "error" in answer:
            raise EngineError(answer["error"])
        return answer["result"]


def serve(engine: str, **arguments: Any) -> None:
    """Creates an engine and answers an `EngineProcess`, until standard input ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a library prints must not pass for an answer

    def answer(value: dict[str, Any]) -> None:
        answers.write(json.dumps(value) + "\n")

    try:
        served = {"trichord": Trichord, "llama.cpp": LlamaCpp}[engine](**arguments)
        answer({"result": {"version": served.version, "load_seconds": served.load_seconds}})
        for line in sys.stdin:
            method, values = json.loads(line)
            answer({"result": peak_bytes() if method == "peak_bytes" else getattr(served, method)(**values)})
    except Exception as error:
        answer({"error": f"{engine}: {error}"})


def _last_line(text: str) -> str:
    return text.strip().rpartition("\n")[2]


if __name__ == "__main__":
    serve(**json.loads(sys.argv[1]))
