"""Conversations: what a turn computes, what is kept of it, and the terminal's commands."""

from __future__ import annotations

import io
import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
from tiny_model import write_tiny_model

from trichord import LLM, SamplingParams, cli
from trichord.cache import PAGE_SIZE
from trichord.chat_session import ChatSession
from trichord.errors import RequestError

TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}{{ '</s>' if m.role == 'assistant' else '\\n' }}"
    "{% endfor %}a:"
)
LONG = "Tell me of the old house by the river, and of whoever lives in it. "
LETTERS = {letter: 100.0 for letter in range(ord("a"), ord("z") + 1)}  # the model's own bytes are seldom UTF-8
GREEDY = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True, logit_bias=LETTERS)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("model") / "tiny.gguf", context=1024)


@pytest.fixture(scope="module")
def llm(path):
    return LLM(path, device="cpu", precision="exact", max_sequences=1)


@pytest.fixture
def template(tmp_path):
    file = tmp_path / "template.jinja"
    file.write_text(TEMPLATE, encoding="utf-8")
    return str(file)


@pytest.fixture
def computed(monkeypatch):
    """How many tokens each step computed, in order."""
    from trichord.scheduler import Scheduler

    counts = []
    commit = Scheduler.computed
    monkeypatch.setattr(Scheduler, "computed", lambda self, chunk: counts.append(chunk.count) or commit(self, chunk))
    return counts


def test_a_turn_computes_only_what_is_new(llm, template, computed):
    session = ChatSession(llm, GREEDY, template=template, system="Be brief.")
    before = 0
    for number in range(4):
        computed.clear()
        text = "".join(session.ask(f"{number}. {LONG}"))
        turn = session.turns[-1]
        in_cache = turn.prompt + turn.generated - 1  # the last token was drawn, but nothing was computed from it
        assert sum(computed) == in_cache - turn.reused
        # All of the conversation before this turn, answers included, but for what does not fill a page.
        assert turn.reused == before // PAGE_SIZE * PAGE_SIZE
        assert (turn.generated, session.messages[-1]) == (100, {"role": "assistant", "content": text})
        before = in_cache
    assert turn.prompt > 600 and turn.prompt - turn.reused < len(LONG) + 2 * PAGE_SIZE


def test_the_tokens_of_an_answer_are_kept_as_they_were(llm, template):
    # Two letters that the tokenizer would always merge.
    params = replace(GREEDY, temperature=2.0, seed=1, logit_bias=dict.fromkeys(b"he", 100.0))
    session = ChatSession(llm, params, template=template)
    answer = "".join(session.ask("x"))
    assert answer.count("he") > 1
    "".join(session.ask(LONG))
    anew = llm.tokenizer.encode(f"u:x\na:{answer}</s>u:{LONG}\na:", parse_special=True)
    assert session.turns[-1].prompt == len(anew) + answer.count("he")
    assert session.turns[-1].reused == PAGE_SIZE


def test_answers_are_those_of_the_whole_conversation(llm, template):
    session = ChatSession(llm, GREEDY, template=template)
    first = "".join(session.ask("one " + LONG))
    second = "".join(session.ask("two " + LONG))
    prompt = f"u:one {LONG}\na:{first}</s>u:two {LONG}\na:"
    ids = llm.tokenizer.encode(prompt, parse_special=True)
    fresh = LLM(llm.file.path, device="cpu", precision="exact")
    assert fresh.generate([ids], GREEDY)[0].outputs[0].text == second


def test_reset_system_and_what_is_kept_after_an_interruption(llm, template):
    session = ChatSession(llm, GREEDY, template=template, system="Be brief.")
    pieces = session.ask("hello")
    first = next(pieces)
    pieces.close()
    assert session.messages[1:] == [{"role": "user", "content": "hello"}, {"role": "assistant", "content": first}]
    session.system = "Be long."
    assert (session.system, session.messages[0]["content"], len(session.messages)) == ("Be long.", "Be long.", 3)
    session.reset()
    assert session.messages == [{"role": "system", "content": "Be long."}]
    session.system = None
    assert session.messages == []
    with pytest.raises(RequestError, match=r"grown to \d+ tokens, and the context holds 1024"):
        "".join(session.ask("x" * 1100))
    assert session.messages == []


def test_the_template_gets_reasoning_tools_and_variables(llm, tmp_path):
    source = (
        "{{ tools[0].name }},{{ depth }},{% for m in messages %}{{ m.reasoning_content }}{{ m.content }}{% endfor %}"
    )
    (tmp_path / "t.jinja").write_text(source)
    (tmp_path / "old.json").write_text(
        json.dumps([{"role": "assistant", "content": None, "reasoning_content": "hm", "tool_calls": []}])
    )
    session = ChatSession(llm, GREEDY, template=tmp_path / "t.jinja", tools=[{"name": "add"}], depth=3)
    session.load(tmp_path / "old.json")
    seen = []
    session.llm = SimpleNamespace(
        context_length=1024,
        stream=lambda ids, params: seen.append(llm.tokenizer.decode(ids)) or llm.stream(ids, params),
    )
    "".join(session.ask("hi"))
    assert seen == ["add,3,hmNonehi"]


def test_what_a_model_thought_is_a_field_of_its_own():
    from trichord.chat_session import _message

    assert _message("<think>\nhm\n</think>\n\nYes.") == {
        "role": "assistant", "content": "Yes.", "reasoning_content": "hm",
    }  # fmt: skip
    assert _message("hm</think>Yes.")["reasoning_content"] == "hm"  # the prompt began the thought
    assert _message("<think>no end") == {"role": "assistant", "content": "<think>no end"}


def test_save_and_load(llm, tmp_path):
    session = ChatSession(llm, template="plain")
    session.messages = [{"role": "user", "content": "grüß"}, {"role": "assistant", "content": "ok", "more": [1]}]
    session.save(tmp_path / "chat.json")
    other = ChatSession(llm, template="plain")
    other.load(tmp_path / "chat.json")
    assert other.messages == session.messages
    with pytest.raises(RequestError, match="cannot be written"):
        session.save(tmp_path / "absent" / "chat.json")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "cannot be read: No such file"),
        (b"[{", "it is not JSON"),
        (b"\xff", "it is not JSON"),
        (b"[" * 100_000, "it is not JSON"),
        (b'{"role": "user"}', "no conversation: messages must be a list"),
        (b'[{"content": "x"}]', "no conversation: message 0 has no 'role'"),
    ],
)
def test_what_cannot_be_loaded(llm, tmp_path, content, says):
    file = tmp_path / "chat.json"
    if content is not None:
        file.write_bytes(content)
    session = ChatSession(llm, template="plain", system="s")
    with pytest.raises(RequestError, match=rf"chat\.json: .*{says}"):
        session.load(file)
    assert session.messages == [{"role": "system", "content": "s"}]


def test_a_stop_text_of_the_layout_ends_an_answer(llm):
    session = ChatSession(llm, SamplingParams(stop=["x"]), template="alpaca")
    assert session._params.stop == ["x", "### Instruction:", "### Response:"]


# The terminal


def talk(capsys, monkeypatch, path, lines: str | bytes, *options: str) -> SimpleNamespace:
    data = lines.encode() if isinstance(lines, str) else lines
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    status = cli.main(["chat", str(path), "--device", "cpu", "-n", "12", "--temp", "0", "--ignore-eos", *options])
    captured = capsys.readouterr()
    return SimpleNamespace(status=status, out=captured.out, err=captured.err)


def test_a_pipe_gives_a_line_a_turn_and_only_answers(capsys, monkeypatch, path, llm, template, tmp_path):
    params = SamplingParams(temperature=0, top_k=40, top_p=0.95, min_p=0.05, max_tokens=12, ignore_eos=True)
    session = ChatSession(llm, params, template=template, system="S")
    answers = ["".join(session.ask(text)) for text in ("one", "two\nlines", "a\n\n b", "/usr/bin is what?")]
    session.reset()
    answers.append("".join(session.ask("one")))
    saved = tmp_path / "saved.json"
    lines = (
        '/system S\none\n\ntwo\\\nlines\n"""a\n\n b"""\n/usr/bin is what?\n'
        f"/stats\n/reset\none\n/save {saved}\n/load {saved}\n/help\n/quit\nnot read\n"
    )
    result = talk(capsys, monkeypatch, path, lines, "--template", template, "--precision", "exact")
    assert result.status == 0
    assert result.out == "".join(answer + "\n" for answer in answers)
    assert re.search(r"last prompt \d+ tokens, \d+ of them from the cache.* 4 answers, 48 tokens", result.err)
    assert "The conversation begins anew." in result.err and "3 messages are loaded." in result.err
    assert all(name in result.err for name in ("/reset", "/system TEXT", "/save FILE", "/load FILE", "/stats", "/quit"))
    assert json.loads(saved.read_text(encoding="utf-8"))[0] == {"role": "system", "content": "S"}
    resumed = talk(capsys, monkeypatch, path, f"/save {saved}2\n", "--load", str(saved), "--template", template)
    assert resumed.status == 0
    assert (tmp_path / "saved.json2").read_bytes() == saved.read_bytes()


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ("/load absent.json\n", "absent.json: the conversation cannot be read"),
        ("/load\n", "/load needs the name of a file"),
        ("/frobnicate\n", "/frobnicate is no command"),
        (b"\xff\n", "not UTF-8"),
        ("x" * 1100 + "\n", "the context holds 1024: begin a new one, or raise --context"),
    ],
)
def test_mistakes_in_a_turn_are_one_sentence_and_the_next_turn_works(capsys, monkeypatch, path, template, lines, says):
    lines = lines.encode() if isinstance(lines, str) else lines
    result = talk(capsys, monkeypatch, path, lines + b"hello\n", "--template", template)
    assert result.status == 1 and len(result.out) > 1
    assert re.fullmatch(rf"trichord: error: .*{re.escape(says)}.*\n", result.err)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("{{ raise_exception('no') }}", "raised by the template: no"),
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "took longer than"),
        ("{{ ''.__class__.__mro__ }}", "forbidden"),
        ("{% if %}", "syntax error"),
    ],
)
def test_templates_that_fail_loop_or_reach_out(capsys, monkeypatch, path, tmp_path, source, says):
    file = tmp_path / "bad.jinja"
    file.write_text(source)
    result = talk(capsys, monkeypatch, path, "hello\n", "--template", str(file))
    assert (result.status, result.out) == (1, "")
    assert re.fullmatch(rf"trichord: error: the chat template .*{says}.*\n", result.err)


def test_options_that_make_no_sense(capsys, path):
    for arguments, says in (
        (["--template", "absent"], "absent: there is no such template file, and the templates by name are llama3"),
        (["--load", "absent.json"], "absent.json"),
    ):
        assert cli.main(["chat", str(path), "--device", "cpu", *arguments]) == 1
        assert says in capsys.readouterr().err
    for value in ("[]", "{", '{"messages": []}'):
        with pytest.raises(SystemExit):
            cli.main(["chat", str(path), "--template-args", value])
        assert "--template-args" in capsys.readouterr().err


def test_a_file_without_a_template_is_laid_out_as_chatml_with_a_warning(capsys, monkeypatch, path):
    result = talk(capsys, monkeypatch, path, "hello\n")
    assert result.status == 0
    assert re.fullmatch(r"trichord: warning: tiny\.gguf: the file has no chat template; using chatml.*\n", result.err)


@pytest.mark.skipif(os.name == "nt", reason="needs a pseudo-terminal")
def test_ctrl_c_interrupts_an_answer_and_ctrl_d_leaves(tmp_path, template):
    import pty

    endless = write_tiny_model(tmp_path / "endless.gguf", context=1 << 17)  # an answer must not end by itself
    parent, child = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "trichord.cli", "chat", str(endless), "--device", "cpu", "--ignore-eos",
         "-n", "-1", "--precision", "exact", "--template", template],
        stdin=child, stdout=child, stderr=child, start_new_session=True,
    )  # fmt: skip
    os.close(child)
    shown = b""

    def until(pattern: bytes, signal_again: int = 0) -> None:
        nonlocal shown
        deadline = time.monotonic() + 120
        while not re.search(pattern, shown, re.DOTALL):
            assert time.monotonic() < deadline, shown
            if not select.select([parent], [], [], 1.0)[0]:
                if signal_again:  # one that comes just before Python waits for a key is only seen after the next key
                    process.send_signal(signal_again)
                continue
            try:
                shown += os.read(parent, 4096)
            except OSError:  # the process has ended
                pytest.fail(f"{shown!r} does not show {pattern!r}")

    try:
        until(rb"leaves\..*> ")
        os.write(parent, b"hello\n")
        until(rb"hello\r\n.{5}")
        process.send_signal(signal.SIGINT)
        until(rb"\[interrupted\].*> ")
        process.send_signal(signal.SIGINT)
        until(rb"Ctrl-D leaves\..*Ctrl-D leaves\..*> ", signal_again=signal.SIGINT)
        os.write(parent, b"\x04")
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        process.wait()
        os.close(parent)
    assert b"Traceback" not in shown
