"""The command line, in process where that shows it and as a real process for pipes and Ctrl-C."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from tiny_model import write_tiny_model

from trichord import LLM, SamplingParams, __version__, cli, progress
from trichord.commands.options import in_options
from trichord.terminal import printable

COMMAND = [sys.executable, "-m", "trichord.cli"]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return str(write_tiny_model(tmp_path_factory.mktemp("model") / "tiny.gguf"))


def run(capsys, *arguments: str) -> SimpleNamespace:
    try:
        status = cli.main(list(arguments))
    except SystemExit as end:
        status = end.code
    captured = capsys.readouterr()
    return SimpleNamespace(status=status, out=captured.out, err=captured.err)


def feed(monkeypatch, text: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text)))


OPTIONS = ("--device", "cpu", "-n", "8", "--seed", "3", "--ignore-eos")


def test_run_prints_the_completion_and_a_summary(capsys, path):
    result = run(capsys, "run", path, "abc", *OPTIONS)
    params = SamplingParams(temperature=0.8, top_k=40, top_p=0.95, min_p=0.05, seed=3, max_tokens=8, ignore_eos=True)
    assert result.status == 0
    assert result.out == LLM(path, device="cpu").generate("abc", params)[0].outputs[0].text + "\n"
    assert re.search(r"load [\d.]+ s · prompt 4 tokens, [\d.]+ tokens/s · generation 8 tokens", result.err)
    size = LLM(path, device="cpu").weight_bytes / 2**20
    assert f"weights {size:.1f} MiB resident" in result.err


def test_every_sampling_option_reaches_the_sampler(capsys, path, monkeypatch):
    seen = []
    stream = LLM.stream
    monkeypatch.setattr(LLM, "stream", lambda self, prompt, params: seen.append(params) or stream(self, prompt, params))
    options = "--temp 0.5 --top-k 7 --top-p 0.9 --min-p 0.1 --repeat-penalty 1.1 --seed 5 --stop xyz --stop b -n 2"
    assert (
        run(capsys, "run", path, "abc", "--device", "cpu", "--threads", "1", "--context", "64", *options.split()).status
        == 0
    )
    assert seen == [
        SamplingParams(temperature=0.5, top_k=7, top_p=0.9, min_p=0.1, repetition_penalty=1.1, seed=5,
                       stop=["xyz", "b"], max_tokens=2)
    ]  # fmt: skip


def test_the_prompt_comes_from_an_argument_a_file_or_standard_input(capsys, path, tmp_path, monkeypatch):
    expected = run(capsys, "run", path, "héllo", *OPTIONS).out
    (tmp_path / "prompt.txt").write_text("héllo\n", encoding="utf-8")
    assert run(capsys, "run", path, "-f", str(tmp_path / "prompt.txt"), *OPTIONS).out == expected
    feed(monkeypatch, "héllo\n".encode())
    assert run(capsys, "run", path, *OPTIONS).out == expected


@pytest.mark.parametrize(
    ("arguments", "stdin", "message"),
    [
        (["absent.gguf", "hi"], b"", r"absent\.gguf: there is no such file"),
        (["a\x1b[31mb.gguf"], b"", r"a\\x1b\[31mb\.gguf: there is no such file"),
        (["absent.gguf"], b"", r"absent\.gguf: there is no such file"),
        (["{path}", "hi", "--stop", ""], b"", "--stop must be"),
        (["{path}", "hi", "--device", "cpu", "--gpu-layers", "2"], b"", "--gpu-layers=2 needs a GPU"),
        (["{path}"], b"", "prompt is empty"),
        (["{path}", "two", "words"], b"", "quotes"),
        (["{path}", "hi", "-f", "{path}"], b"", "given twice"),
        (["{path}", "-f", "absent.txt"], b"", "absent.txt"),
        (["{path}"], b"\xff\xfe", "not UTF-8"),
        (["{path}", "hi", "--temp", "-1"], b"", "--temp must be a number at least 0, not -1"),
        (["{path}", "hi", "-n", "0"], b"", "--max-tokens must be"),
        (["{path}", "hi", "--context", "0"], b"", "--context must be from 1 to the model's 512, not 0"),
        (["{path}", "hi", "--threads", "0"], b"", "threads"),
        (["{path}", "hi", "--device", "tpu"], b"", "tpu"),
        (["{path}", "x" * 600], b"", "context holds 512"),
        (["x" * 600, "-c", "100"], b"", r"shorten the prompt or raise --context\."),
    ],
)
def test_mistakes_are_one_sentence(capsys, path, monkeypatch, arguments, stdin, message):
    feed(monkeypatch, stdin)
    result = run(capsys, "run", *(argument.format(path=path) for argument in arguments))
    assert result.status == 1 and result.out == ""
    assert re.fullmatch(rf"trichord: error: .*{message}.*\n", result.err)


def test_info_as_text_and_json(capsys, path):
    text = run(capsys, "info", path)
    assert text.status == 0 and "llama" in text.out and "blk.0.attn_q.weight" not in text.out
    assert "blk.0.attn_q.weight" in run(capsys, "info", path, "--tensors").out
    assert json.loads(run(capsys, "info", path, "--json").out)["architecture"] == "llama"


def test_help_and_version(capsys):
    assert run(capsys, "--version").out == f"trichord {__version__}\n"
    assert "complete a prompt" in run(capsys, "--help").out
    for option in ("--max-tokens", "--temp", "--device", "--precision", "--threads", "--context", "--stop"):
        assert option in run(capsys, "run", "--help").out
    assert run(capsys).status == 2


def test_words_may_stand_on_both_sides_of_options(capsys, path):
    expected = run(capsys, "run", path, "abc", *OPTIONS).out
    assert run(capsys, "run", path, *OPTIONS, "abc").out == expected
    assert run(capsys, "run", *OPTIONS, path, "abc").out == expected
    assert run(capsys, "run", path, "abc", "--colour").status == 2
    assert run(capsys, "info", path, "--json", "more").status == 2


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_output_that_cannot_be_written_is_one_sentence(path):
    with open("/dev/full", "w") as full:
        process = subprocess.run([*COMMAND, "info", path], stdout=full, stderr=subprocess.PIPE, text=True)
    assert process.returncode == 1
    assert re.fullmatch(r"trichord: error: The output cannot be written: .*\n", process.stderr)


def test_control_characters_do_not_reach_a_terminal():
    assert printable("a\x1b[31m\u202eb\x07\n\tü\u00a0é") == "a\\x1b[31m\\u202eb\\x07\n\tü\u00a0é"
    assert printable("a\n\x85\u2028\u3000b", allowed="") == "a\\n\\x85\\u2028\u3000b"


@pytest.mark.parametrize(
    ("sentence", "shown"),
    [
        ("top_p must be a number.", "--top-p must be a number."),
        ("Shorten it or raise context_length.", "Shorten it or raise --context."),
        ("gpu_layers=3 needs a GPU.", "--gpu-layers=3 needs a GPU."),
        ("The key 'llama.context_length' is missing", "The key 'llama.context_length' is missing"),
        ("The seed must stop at the temperature.", "The seed must stop at the temperature."),
    ],
)
def test_errors_name_options(sentence, shown):
    assert in_options(sentence) == shown


INTERRUPTED = """
import sys

class Interrupted:
    def find_spec(self, name, path=None, target=None):
        if name == sys.argv[1]:
            raise KeyboardInterrupt

sys.meta_path.insert(0, Interrupted())
from trichord.cli import main
sys.exit(main(["run", "hello"]))
"""


@pytest.mark.parametrize("module", ["argparse", "trichord.quantize", "torch"])
def test_ctrl_c_during_the_first_imports_shows_no_traceback(module):
    process = subprocess.run([sys.executable, "-c", INTERRUPTED, module], capture_output=True, stdin=subprocess.DEVNULL)
    assert (process.returncode, process.stdout, process.stderr.strip()) == (130, b"", b"")


@pytest.mark.parametrize(("seconds", "lines"), [((0.0, 0.0), 0), ((0.3, 0.3), 1), ((0.15, 0.15, 0.3), 1)])
def test_long_compilations_are_announced_once(capsys, monkeypatch, seconds, lines):
    monkeypatch.setattr(progress, "_PATIENCE", 0.4)
    notice = progress.CompileNotice()

    def say(text: str) -> None:
        notice.handle(logging.LogRecord("trichord.compile", logging.INFO, "", 0, text, (), None))

    say("compiling outer")  # which has the others compiled
    for number, each in enumerate(seconds):
        say(f"compiling {number}")
        time.sleep(each)
        say(f"compiled {number}")
    say("compiled outer")
    time.sleep(0.5)  # does not count: nothing is being compiled
    assert capsys.readouterr().err.count("Compiling kernels for this CPU, once") == lines


def test_each_compiled_kernel_is_named_to_the_log(tmp_path):
    code = (
        "import logging, sys\n"
        "logging.basicConfig(stream=sys.stdout, level='INFO', format='%(name)s %(message)s')\n"
        "import double\n"
        "double.double(2)\n"
    )
    (tmp_path / "double.py").write_text(
        "from trichord.cpu_fallback.jit import compiled\n@compiled\ndef double(x):\n    return 2 * x\n"
    )
    environment = os.environ | {"TRICHORD_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": str(tmp_path)}
    for expected in ("trichord.compile compiling double.double\ntrichord.compile compiled double.double\n", ""):
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.stdout == expected, done.stderr


def test_a_reader_that_leaves_ends_the_run_quietly(path):
    process = subprocess.Popen(
        [*COMMAND, "run", path, "abc", "--device", "cpu", "-n", "400", "--ignore-eos"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    process.stdout.read(1)
    process.stdout.close()
    assert b"Traceback" not in process.stderr.read()
    process.stderr.close()
    process.wait(timeout=60)


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_ctrl_c_stops_with_a_summary_and_no_traceback(path):
    process = subprocess.Popen(
        [*COMMAND, "run", path, "abc", "--device", "cpu", "-n", "-1", "--ignore-eos", "--precision", "exact"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    process.stdout.read(1)
    time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert b"Traceback" not in errors and b"generation" in errors
    assert process.returncode in (0, 130)  # 0: it had reached the context's end already


def test_an_interrupt_that_is_lost_on_its_way_ends_the_text_all_the_same():
    from trichord.terminal import interruptible

    def pieces():
        for number in range(5):
            if number == 2:
                with contextlib.suppress(KeyboardInterrupt):  # as a callback's exceptions are
                    signal.raise_signal(signal.SIGINT)
            yield str(number)

    seen, before = [], signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        for piece in interruptible(pieces()):
            seen.append(piece)
    assert seen == ["0", "1", "2"]
    assert signal.getsignal(signal.SIGINT) is before
