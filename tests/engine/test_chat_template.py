"""Chat templates: what real ones use, worked out by hand; what hostile ones try; what is wrong with messages."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path

import gguf
import pytest
from support import parity

from trichord import chat_template, template_worker
from trichord.chat_template import ChatTemplate
from trichord.errors import RequestError, TemplateError
from trichord.gguf_file import GGUFFile
from trichord.template_presets import PRESETS
from trichord.template_process import MAX_CHARACTERS, template_process
from trichord.tokenizers import Tokenizer

SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "Hi <b>é\n"}
ASSISTANT = {"role": "assistant", "content": "Hello"}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}


def render(source: str, messages: object = (USER,), **arguments: object) -> str:
    template = ChatTemplate(source, bos_token="<s>", eos_token="</s>", time_limit=30.0)  # the machine may be busy
    return template.render(messages, **arguments)


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves out the process and the pipes, which take a third of a second for each new template."""

    class InThisProcess:
        def __init__(self, source: str) -> None:
            self.source = source

        def render(self, variables: str, seconds: float) -> str:
            try:
                template = template_worker.make_environment().from_string(self.source)
                return template_worker.rendered(template, json.loads(variables), MAX_CHARACTERS)
            except Exception as error:
                raise TemplateError(template_worker.sentence(error)) from None

    monkeypatch.setattr(chat_template, "template_process", InThisProcess)


@pytest.mark.parametrize(
    ("source", "messages", "arguments", "text"),
    [
        pytest.param("{{ bos_token }}-{{ eos_token }}", [USER], {}, "<s>-</s>", id="tokens"),
        pytest.param(
            "{% for message in messages %}\n"
            "    {% if loop.first %}first {% endif %}\n"
            "    {{- message['role'] }}{{ ',' if not loop.last }}{{ loop.index0 }}\n"
            "{% endfor %}\n",
            [USER, ASSISTANT],
            {},
            "first user,0\nassistant1\n",
            id="loop and white space",
        ),
        pytest.param(
            "{% if add_generation_prompt %}yes{% else %}no{% endif %}",
            [USER],
            {"add_generation_prompt": False},
            "no",
            id="prompt",
        ),
        pytest.param("{% if add_generation_prompt %}yes{% endif %}", [USER], {}, "yes", id="prompt by default"),
        pytest.param(
            "{% set ns = namespace(system='', n=0) %}"
            "{% for m in messages %}{% if m.role == 'system' %}{% set ns.system = m.content %}{% endif %}"
            "{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.system }}{{ ns.n }}",
            [SYSTEM, USER],
            {},
            "Be brief.2",
            id="namespace",
        ),
        pytest.param("{{ messages[0].content | trim | tojson }}", [USER], {}, '"Hi <b>é"', id="tojson escapes no HTML"),
        pytest.param("{{ 'é' | tojson(ensure_ascii=True) }}", [USER], {}, '"\\u00e9"', id="tojson ensure_ascii"),
        pytest.param(
            "{{ {'b': [1], 'a': none} | tojson(indent=2) }}",
            [USER],
            {},
            '{\n  "b": [\n    1\n  ],\n  "a": null\n}',
            id="tojson indent",
        ),
        pytest.param(
            "{{ {'b': 1, 'a': 2} | tojson(separators=(',', ':'), sort_keys=true) }}",
            [USER],
            {},
            '{"a":2,"b":1}',
            id="tojson separators",
        ),
        pytest.param("{{ strftime_now('%Y') }}", [USER], {}, f"{datetime.now():%Y}", id="date"),
        pytest.param(
            "{% if strftime_now is defined and date_string is not defined %}a{% endif %}", [USER], {}, "a", id="defined"
        ),
        pytest.param(
            "{% macro line(role, text='-') %}<{{ role }}>{{ text }}{% endmacro %}"
            "{{ line('a') }}{{ line('b', text='c') }}",
            [USER],
            {},
            "<a>-<b>c",
            id="macro",
        ),
        pytest.param(
            "{% for t in tools %}{{ t.function.name }}:{{ t | tojson }}{% endfor %}",
            [USER],
            {"tools": [TOOL]},
            'add:{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}',
            id="tools",
        ),
        pytest.param("{{ tools is none }}", [USER], {}, "True", id="no tools"),
        pytest.param(
            "{{ enable_thinking }}{{ n + 1 }}", [USER], {"enable_thinking": False, "n": 1}, "False2", id="extra"
        ),
        pytest.param("{% generation %}a{{ 1 }}{% endgeneration %}", [USER], {}, "a1", id="generation"),
        pytest.param(
            "{% for i in range(9) %}{% if i == 2 %}{% continue %}{% elif i == 4 %}{% break %}{% endif %}"
            "{{ i }}{% endfor %}",
            [USER],
            {},
            "013",
            id="loop controls",
        ),
        pytest.param(
            "{% for m in messages[1:] | selectattr('role', 'equalto', 'user') | list %}"
            "{{ m.content.split('|')[-1].strip() }}{% endfor %}"
            "{{ messages[::-1][0].role.startswith('user') }}",
            [SYSTEM, {"role": "user", "content": "a| b "}],
            {},
            "bTrue",
            id="filters and methods",
        ),
        pytest.param(
            "{{ messages[0].tool_calls[0].arguments.items() | list }}{{ messages[0].content is none }}",
            [{"role": "assistant", "content": None, "tool_calls": [{"arguments": {"x": 1}}]}],
            {},
            "[('x', 1)]True",
            id="tool calls",
        ),
        pytest.param(
            "{% for part in messages[0].content %}{{ part.text if part.type == 'text' else '?' }}{% endfor %}",
            [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image"}]}],
            {},
            "a?",
            id="content in parts",
        ),
        pytest.param("{%- set x %}a{% endset -%}\n  {{ x }}\n\n", [USER], {}, "a\n", id="one final newline goes"),
    ],
)
def test_what_templates_use(in_this_process: None, source: str, messages: list, arguments: dict, text: str) -> None:
    assert render(source, messages, **arguments) == text


def test_a_real_template() -> None:
    file = GGUFFile(parity("tokenizers/ggml-vocab-phi-3.gguf"))
    template = ChatTemplate.from_gguf(file, Tokenizer.from_gguf(file))
    assert template.render([{"role": "user", "content": "Hi"}]) == "<s><|user|>\nHi<|end|>\n<|assistant|>\n"


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("{{ raise_exception('Roles must\nalternate') }}", "raised by the template: Roles must alternate"),
        ("a\nb\n{% if %}", "syntax error in line 3"),
        ("{{ messages[0].content.foo.bar }}", "has no attribute 'foo'"),
        ("{{ nothing() }}", "'nothing' is undefined"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ 1 | no_such_filter }}", "no_such_filter"),
        ("{% include 'file' %}", "loader"),
        ("{{ messages[99].role }}", "list object has no element 99"),
        # Attempts to get out
        ("{{ ''.__class__ }}", "'__class__' of 'str' is forbidden"),
        ("{{ ().__class__.__base__.__subclasses__() }}", "'__class__' of 'tuple' is forbidden"),
        ("{{ raise_exception.__globals__['sys'] }}", "'__globals__' of 'function' is forbidden"),
        ("{{ cycler.__init__.__globals__.os.popen('id').read() }}", "'__init__' .*is forbidden"),
        ("{{ self.__init__ }}", "'__init__' .*is forbidden"),
        ("{{ ''|attr('__class__') }}", "'__class__' of 'str' is forbidden"),
        ("{{ '{0.__class__.__mro__}'.format(1) }}", "forbidden|unsafe"),
        ("{{ messages.append(1) }}", "'append' of 'list' is forbidden"),
        ("{{ messages[0].update({'role': 'x'}) }}", "'update' of 'dict' is forbidden"),
        ("{% for i in range(1000000000) %}x{% endfor %}", "range"),
        ("{{ 'x' * 5000000 }}", "more than 4194304 characters"),
        ("{% for i in range(90000) %}{{ 'x' * 100 }}{% endfor %}", "more than 4194304 characters"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "too deeply"),
        ("{{ " + "(" * 5000 + ")" * 5000 + " }}", "too deeply"),
    ],
)
def test_what_ends_in_an_error(in_this_process: None, source: str, says: str) -> None:
    with pytest.raises(TemplateError, match=says) as caught:
        render(source)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 600


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("{{ raise_exception('No system message') }}", "raised by the template: No system message$"),
        ("a\n{% if %}", "syntax error in line 2"),
        ("{{ ''.__class__ }}", "forbidden"),
        ("{{ 'x' * 5000000 }}", "more than 4194304 characters"),
        ("{{ " + "(" * 5000 + ")" * 5000 + " }}", "too deeply"),
    ],
)
def test_errors_come_back_from_the_process(source: str, says: str) -> None:
    with pytest.raises(TemplateError, match=f"^the chat template failed: .*{says}"):
        render(source)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux bounds the memory of a process")
@pytest.mark.parametrize(
    "source",
    [
        "{{ 'x' * 10000000000 }}",
        "{{ [1] * 1000000000 }}",
        "{{ '%01000000000d' % 1 }}",
        "{% set x = namespace(s='xx') %}{% for i in range(40) %}{% set x.s = x.s + x.s %}{% endfor %}",
    ],
)
def test_memory_is_bounded(source: str) -> None:
    with pytest.raises(TemplateError, match="memory"):
        render(source)


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 9 ** (9 ** 9) }}",
        "{{ ('x' * 3000000) | wordwrap(1) }}",
    ],
)
def test_what_takes_too_long_is_stopped(source: str) -> None:
    template = ChatTemplate(source, time_limit=0.3)
    for _ in range(2):  # and once more: the process was killed, the next call starts another
        with pytest.raises(TemplateError, match=r"longer than 0\.3 seconds"):
            template.render([USER])


def test_a_process_that_dies_is_replaced() -> None:
    source = "{{ messages[0].content }}!"
    assert render(source, [ASSISTANT]) == "Hello!"
    process = template_process(source)
    process._process.kill()
    process._process.wait()
    assert render(source, [ASSISTANT]) == "Hello!"


def test_the_process_stays_warm_and_is_one_for_each_template() -> None:
    source = "{{ messages[0].content }}?"
    render(source, [ASSISTANT])
    first = template_process(source)._process.pid
    render(source, [ASSISTANT])
    assert template_process(source)._process.pid == first
    render(source + " ", [ASSISTANT])
    assert template_process(source + " ")._process.pid != first


def test_an_error_leaves_the_process_usable() -> None:
    source = "{{ 'x' * n }}"
    for n, works in ((3, True), (10**11, False), (10**7, False), (4, True), ("", False), (5, True)):
        if works:
            assert render(source, n=n) == "x" * n
        else:
            with pytest.raises(TemplateError):
                render(source, n=n)


def test_large_conversations_and_odd_characters() -> None:
    contents = ["x" * 3_000_000, "\0\x1f\u2028😀\ud800", "{{ 1 }}{% endraw %}"]
    source = "{% for m in messages %}{{ m.content }}{% endfor %}"
    assert render(source, [{"role": "user", "content": content} for content in contents]) == "".join(contents)


def test_several_threads_at_once() -> None:
    with ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(lambda n: render("{{ n }}{{ messages[0].role }}", n=n), range(40)))
    assert texts == [f"{n}user" for n in range(40)]


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ("Hi", "a list of dicts .*, not str"),
        ({"role": "user", "content": "Hi"}, "a list of dicts .*, not dict"),
        ([], "empty"),
        (["Hi"], "message 0 must be a dict"),
        ([USER, {"content": "Hi"}], "message 1 has no 'role'"),
        ([{"role": 1, "content": "Hi"}], "message 0 has no 'role'"),
        ([{"role": "user"}], "message 0 has no 'content'"),
        ([{"role": "user", "content": None}], "message 0 has no 'content'"),
        ([{"role": "user", "content": 5}], "message 0 has no 'content'"),
        ([{"role": "user", "content": "Hi", "image": b"x"}], "plain JSON values"),
    ],
)
def test_messages_that_are_none(messages: object, says: str) -> None:
    with pytest.raises(RequestError, match=says):
        render("x", messages)


@pytest.mark.parametrize(
    ("tokens", "name", "text"),
    [
        (
            ["<|im_start|>", "<|im_end|>"],
            "chatml, whose marks the vocabulary has",
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi <b>é<|im_end|>\n<|im_start|>assistant\n",
        ),
        (
            ["<s>", "<|im_start|>", "<|im_end|>", "<|im_sep|>"],
            "phi4",
            "<|im_start|>system<|im_sep|>Be brief.<|im_end|><|im_start|>user<|im_sep|>Hi <b>é<|im_end|>"
            "<|im_start|>assistant<|im_sep|>",
        ),
        (
            ["<s>"],
            "chatml, though the vocabulary has the marks of none",
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi <b>é<|im_end|>\n<|im_start|>assistant\n",
        ),
    ],
)
def test_a_file_without_a_template(tmp_path: Path, tokens: list[str], name: str, text: str) -> None:
    file = vocabulary(tmp_path / "model.gguf", tokens)
    tokenizer = Tokenizer.from_gguf(file)
    with pytest.warns(UserWarning, match=rf"model.gguf: the file has no chat template; using {name}") as caught:
        template = ChatTemplate.from_gguf(file, tokenizer)
    assert len(caught) == 1
    assert template.render([SYSTEM, USER]) == text
    without_prompt = template.render([SYSTEM, USER], add_generation_prompt=False)
    assert text.startswith(without_prompt) and "assistant" not in without_prompt


# What the models' own templates make of this conversation, which is what their tokenizer configurations say. The
# beginning-of-sequence token is left to the tokenizer where a model's own template leaves it out.
LAYOUTS = {
    "llama3": (
        "<s><|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nU<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nA<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nV<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    ),
    "llama4": (
        "<s><|header_start|>system<|header_end|>\n\nS<|eot|><|header_start|>user<|header_end|>\n\nU<|eot|>"
        "<|header_start|>assistant<|header_end|>\n\nA<|eot|><|header_start|>user<|header_end|>\n\nV<|eot|>"
        "<|header_start|>assistant<|header_end|>\n\n"
    ),
    "phi4": (
        "<|im_start|>system<|im_sep|>S<|im_end|><|im_start|>user<|im_sep|>U<|im_end|><|im_start|>assistant<|im_sep|>A<|im_end|>"
        "<|im_start|>user<|im_sep|>V<|im_end|><|im_start|>assistant<|im_sep|>"
    ),
    "chatml": (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n"
        "<|im_start|>user\nV<|im_end|>\n<|im_start|>assistant\n"
    ),
    "gemma": (
        "<s><start_of_turn>user\nS\n\nU<end_of_turn>\n<start_of_turn>model\nA<end_of_turn>\n"
        "<start_of_turn>user\nV<end_of_turn>\n<start_of_turn>model\n"
    ),
    "deepseek": "<s>S<｜User｜>U<｜Assistant｜>A<｜end▁of▁sentence｜><｜User｜>V<｜Assistant｜>",
    "mistral": "<s>[INST] S\n\nU [/INST] A</s>[INST] V [/INST]",
    "command-r": (
        "<s><|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>S<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|USER_TOKEN|>U"
        "<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>A<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|>"
        "<|USER_TOKEN|>V<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>"
    ),
    "granite": (
        "<|start_of_role|>system<|end_of_role|>S<|end_of_text|>\n<|start_of_role|>user<|end_of_role|>U<|end_of_text|>\n"
        "<|start_of_role|>assistant<|end_of_role|>A<|end_of_text|>\n<|start_of_role|>user<|end_of_role|>V<|end_of_text|>\n"
        "<|start_of_role|>assistant<|end_of_role|>"
    ),
    "glm4": "[gMASK]<sop><|system|>\nS<|user|>\nU<|assistant|>\nA<|user|>\nV<|assistant|>\n",
    "phi3": "<s><|system|>\nS<|end|>\n<|user|>\nU<|end|>\n<|assistant|>\nA<|end|>\n<|user|>\nV<|end|>\n<|assistant|>\n",
    "zephyr": "<|system|>\nS</s>\n<|user|>\nU</s>\n<|assistant|>\nA</s>\n<|user|>\nV</s>\n<|assistant|>\n",
    "llama2": "<s>[INST] <<SYS>>\nS\n<</SYS>>\n\nU [/INST] A </s><s>[INST] V [/INST]",
    "vicuna": "S USER: U ASSISTANT: A</s>USER: V ASSISTANT:",
    "alpaca": "S\n\n### Instruction:\nU\n\n### Response:\nA\n\n### Instruction:\nV\n\n### Response:\n",
    "openchat": (
        "S<|end_of_turn|>GPT4 Correct User: U<|end_of_turn|>GPT4 Correct Assistant: A<|end_of_turn|>"
        "GPT4 Correct User: V<|end_of_turn|>GPT4 Correct Assistant:"
    ),
    "plain": "S\n\nuser: U\nassistant: A\nuser: V\nassistant:",
}


@pytest.mark.parametrize("name", PRESETS)
def test_layouts_by_name(in_this_process: None, name: str) -> None:
    roles = ("system", "user", "assistant", "user")
    messages = [{"role": role, "content": f" {text}\n"} for role, text in zip(roles, "SUAV", strict=True)]
    assert render(PRESETS[name].source, messages) == LAYOUTS[name]
    parts = [{"type": "text", "text": "{}"}, {"type": "text", "text": "{bos}"}]
    assert "{}{bos}" in render(PRESETS[name].source, [{"role": "user", "content": parts}])


def test_a_template_instead_of_the_files_own(tmp_path: Path) -> None:
    file = vocabulary(tmp_path / "model.gguf", ["<s>"], template="own")
    tokenizer = Tokenizer.from_gguf(file)
    (tmp_path / "mine.jinja").write_text("{{ bos_token }}mine", encoding="utf-8")
    assert ChatTemplate.from_gguf(file, tokenizer).source == "own"
    assert ChatTemplate.from_gguf(file, tokenizer, "vicuna").render([USER]) == "USER: Hi <b>é ASSISTANT:"
    assert ChatTemplate.from_gguf(file, tokenizer, "vicuna").stop == ["USER:"]
    assert ChatTemplate.from_gguf(file, tokenizer, tmp_path / "mine.jinja").render([USER]) == "<s>mine"
    (tmp_path / "mine.jinja").write_bytes(b"\xff")
    with pytest.raises(TemplateError, match=r"mine\.jinja: the template cannot be read: it is not UTF-8 text"):
        ChatTemplate.from_gguf(file, tokenizer, tmp_path / "mine.jinja")
    with pytest.raises(TemplateError, match=r"none: there is no such template file, and .* are llama3, llama4"):
        ChatTemplate.from_gguf(file, tokenizer, "none")


def test_a_template_of_the_wrong_type(tmp_path: Path) -> None:
    file = vocabulary(tmp_path / "model.gguf", ["<s>"], template=5)
    with pytest.raises(TemplateError, match=r"tokenizer\.chat_template"):
        ChatTemplate.from_gguf(file, Tokenizer.from_gguf(file))
    assert ChatTemplate.from_gguf(file, Tokenizer.from_gguf(file), "chatml").render([USER])


def vocabulary(path: Path, special: list[str], template: object = None) -> GGUFFile:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_string("tokenizer.ggml.model", "gpt2")
    writer.add_string("tokenizer.ggml.pre", "gpt-2")
    writer.add_array("tokenizer.ggml.tokens", [*special, "a", "b", "ab"])
    writer.add_array("tokenizer.ggml.token_type", [3] * len(special) + [1] * 3)
    writer.add_array("tokenizer.ggml.merges", ["a b"])
    writer.add_uint32("tokenizer.ggml.bos_token_id", 0)
    if template is not None:
        add = writer.add_string if isinstance(template, str) else writer.add_uint32
        add("tokenizer.chat_template", template)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return GGUFFile(path)


def test_a_script_without_a_main_guard_and_no_process_left_behind(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from trichord.chat_template import ChatTemplate\n"
        "from trichord.template_process import template_process\n"
        "print(ChatTemplate('{{ messages[0].content }}').render([{'role': 'user', 'content': 'once'}]))\n"
        "print(template_process('{{ messages[0].content }}')._process.pid)\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120)
    text, pid = done.stdout.split()
    assert (text, done.stderr, done.returncode) == ("once", "", 0)
    assert not alive(int(pid))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_fork_starts_a_process_of_its_own() -> None:
    source = "{{ messages[0].content }}."
    render(source, [ASSISTANT])
    code = (
        "import os, sys\n"
        "from trichord.chat_template import ChatTemplate\n"
        "template = ChatTemplate('{{ messages[0].content }}')\n"
        "say = lambda text: template.render([{'role': 'user', 'content': text}])\n"
        "say('warm')\n"
        "child = os.fork()\n"
        "good = all(say(str(n)) == str(n) for n in range(20))\n"
        "if not child: os._exit(0 if good else 1)\n"
        "sys.exit(not good or os.waitpid(child, 0)[1])\n"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


def alive(pid: int) -> bool:
    for _ in range(50):
        try:
            os.kill(pid, 0)
        except OSError:
            return False
        time.sleep(0.02)
    return True
