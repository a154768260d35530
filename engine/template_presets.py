"""Chat layouts by name, for files that bring no template of their own.

All are one template with parameters: what surrounds the system's, the user's and the assistant's words. The layouts are
those that the models were trained on, as their makers' tokenizer configurations and model cards give them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

_SOURCE = """
{%- macro words(message) %}
{%- if message.content is string %}{{ message.content | trim }}
{%- else %}{{ (message.content or []) | map(attribute='text') | join | trim }}
{%- endif %}
{%- endmacro %}
{%- macro marked(pattern) %}{{ pattern.replace('{bos}', bos_token).replace('{eos}', eos_token) }}{% endmacro %}
{%- set waiting = namespace(system='') %}
{{- marked(layout.begin) }}
{%- for message in messages %}
    {%- set role = {'developer': 'system', 'system': 'system', 'assistant': 'assistant'}.get(message.role, 'user') %}
    {%- if role == 'system' and layout.system_in_user %}
        {%- set waiting.system = layout.system.replace('{}', words(message)) %}
    {%- else %}
        {{- marked(layout[role]).replace('{}', waiting.system + words(message)) }}
        {%- set waiting.system = '' %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ marked(layout.answer) }}{% endif %}
"""


@dataclass(frozen=True)
class Preset:
    """A chat layout. In its patterns {} is the message's text, {bos} and {eos} are the vocabulary's own tokens.

    system_in_user: the system's words stand within the first user's. marks: tokens by which a vocabulary shows that it
    was made for the layout. stop: texts that end an answer where the marks are no tokens.
    """

    system: str
    user: str
    assistant: str
    begin: str = ""
    system_in_user: bool = False
    marks: tuple[str, ...] = ()
    stop: tuple[str, ...] = ()

    @property
    def source(self) -> str:
        """The layout as a Jinja template."""
        layout = {
            "system": self.system,
            "user": self.user,
            "assistant": self.assistant,
            "begin": self.begin,
            "system_in_user": self.system_in_user,
            # A space here belongs to the answer's first token.
            "answer": self.assistant.partition("{}")[0].rstrip(" "),
        }
        return "{%- set layout = " + json.dumps(layout) + " %}" + _SOURCE


def _same_for_all(pattern: str, **more: object) -> Preset:
    """A layout that says the role's own name in `pattern`, as ROLE."""
    system, user, assistant = (pattern.replace("ROLE", role) for role in ("system", "user", "assistant"))
    return Preset(system, user, assistant, **more)


# In the order in which a vocabulary is searched for their marks: the special before the general.
PRESETS = {
    "llama3": _same_for_all(
        "<|start_header_id|>ROLE<|end_header_id|>\n\n{}<|eot_id|>",
        begin="{bos}",
        marks=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        stop=("<|eot_id|>",),
    ),
    "llama4": _same_for_all(
        "<|header_start|>ROLE<|header_end|>\n\n{}<|eot|>",
        begin="{bos}",
        marks=("<|header_start|>", "<|header_end|>", "<|eot|>"),
        stop=("<|eot|>",),
    ),
    "phi4": _same_for_all(
        "<|im_start|>ROLE<|im_sep|>{}<|im_end|>",
        marks=("<|im_start|>", "<|im_sep|>", "<|im_end|>"),
        stop=("<|im_end|>",),
    ),
    "chatml": _same_for_all(
        "<|im_start|>ROLE\n{}<|im_end|>\n", marks=("<|im_start|>", "<|im_end|>"), stop=("<|im_end|>",)
    ),
    "gemma": Preset(
        "{}\n\n",
        "<start_of_turn>user\n{}<end_of_turn>\n",
        "<start_of_turn>model\n{}<end_of_turn>\n",
        system_in_user=True,
        begin="{bos}",
        marks=("<start_of_turn>", "<end_of_turn>"),
        stop=("<end_of_turn>",),
    ),
    "deepseek": Preset(
        "{}",
        "<｜User｜>{}",
        "<｜Assistant｜>{}<｜end▁of▁sentence｜>",
        begin="{bos}",
        marks=("<｜User｜>", "<｜Assistant｜>"),
        stop=("<｜User｜>",),
    ),
    "mistral": Preset(
        "{}\n\n",
        "[INST] {} [/INST]",
        " {}{eos}",
        system_in_user=True,
        begin="{bos}",
        marks=("[INST]", "[/INST]"),
        stop=("[INST]",),
    ),
    "command-r": Preset(
        *(
            f"<|START_OF_TURN_TOKEN|><|{role}_TOKEN|>{{}}<|END_OF_TURN_TOKEN|>"
            for role in ("SYSTEM", "USER", "CHATBOT")
        ),
        begin="{bos}",
        marks=("<|START_OF_TURN_TOKEN|>", "<|CHATBOT_TOKEN|>", "<|END_OF_TURN_TOKEN|>"),
        stop=("<|END_OF_TURN_TOKEN|>",),
    ),
    "granite": _same_for_all(
        "<|start_of_role|>ROLE<|end_of_role|>{}<|end_of_text|>\n",
        marks=("<|start_of_role|>", "<|end_of_role|>"),
        stop=("<|end_of_text|>",),
    ),
    "glm4": _same_for_all(
        "<|ROLE|>\n{}",
        begin="[gMASK]<sop>",
        marks=("[gMASK]", "<|user|>", "<|assistant|>"),
        stop=("<|user|>",),
    ),
    "phi3": _same_for_all(
        "<|ROLE|>\n{}<|end|>\n", begin="{bos}", marks=("<|user|>", "<|assistant|>", "<|end|>"), stop=("<|end|>",)
    ),
    "zephyr": _same_for_all("<|ROLE|>\n{}{eos}\n", marks=("<|user|>", "<|assistant|>"), stop=("<|user|>",)),
    "llama2": Preset(
        "<<SYS>>\n{}\n<</SYS>>\n\n",
        "{bos}[INST] {} [/INST]",
        " {} {eos}",
        system_in_user=True,
        stop=("[INST]",),
    ),
    "vicuna": Preset("{} ", "USER: {} ", "ASSISTANT: {}{eos}", stop=("USER:",)),
    "alpaca": Preset(
        "{}\n\n", "### Instruction:\n{}\n\n", "### Response:\n{}\n\n", stop=("### Instruction:", "### Response:")
    ),
    "openchat": Preset(
        "{}<|end_of_turn|>",
        "GPT4 Correct User: {}<|end_of_turn|>",
        "GPT4 Correct Assistant: {}<|end_of_turn|>",
        stop=("<|end_of_turn|>", "GPT4 Correct User:"),
    ),
    "plain": Preset("{}\n\n", "user: {}\n", "assistant: {}\n", stop=("\nuser:",)),
}
