"""Prints docs/architectures.md: every architecture that runs, what is special of it, and what is missing.

python scripts/architecture_table.py > docs/architectures.md
"""

from __future__ import annotations

import sys

from trichord.models.architectures import ARCHITECTURES
from trichord.models.record import describe

_PAGE = """# Architectures

These {count} run, by the name under `general.architecture` in a file; `trichord archs` prints the same list. What the
file itself shows (experts, biases, norms of queries and keys, attention sinks, a tied output matrix) is not listed: any
of them may have it. Where sizes of a family differ, the metadata refines the record:
{refined}.

[Adding an architecture](add-an-architecture.md) is one record. `scripts/architecture_table.py` prints this page.

| architecture | what is special |
| --- | --- |
{rows}

## What is missing, and why

A file of these is refused with a sentence that names its architecture.

| architectures | why |
| --- | --- |
| `t5`, `t5encoder` | biases by relative position, and in `t5` a decoder that reads an encoder; neither is written |
| `modern-bert`, `gemma-embedding` | windows that reach to both sides; those here look back |
| `rwkv6`, `rwkv7`, `rwkv6qwen2`, `arwkv7` | blocks of their own, which are not written yet (their tokenizer is) |
| `gemma3n`, `gemma4` | embeddings for every layer, and layers that share keys and values; not written yet |
| `deepseek32`, `deepseek4`, `glm-dsa` | sparse attention, for which a network chooses positions; not written yet |
| `apertus` | its activation (xIELU) is not written yet |
| `gemma4-assistant`, `eagle3`, `dflash` | drafts for another model; nothing here decodes speculatively |
| `clip`, `wavtokenizer-dec` | images and sound |
| `chameleon`, `deepseek2-ocr`, `eurobert`, `jina-bert-v2`, `jina-bert-v3`, `laguna`, `llama-embed`, `mistral4`, \
`neo-bert`, `nomic-bert-moe`, `plm`, `step35` | no record yet |

* Of models that see (`qwen2vl`, `qwen3vl`, `cogvlm`, `hunyuan_vl`, `paddleocr`) the language model runs, with text.
* Layers that predict further tokens (`nextn_predict_layers`) are left out.
* `hrm_text` reads prompts from left to right; files that let a prompt's tokens see later ones are refused.
* Models that read both ways give embeddings and logits, and do not write.
* `bert`, `nomic-bert` and `bitnet` have not been held against llama.cpp's logits, as the others have."""


def page() -> str:
    """The page, without its last line end."""
    rows = (f"| `{name}` | {', '.join(describe(ARCHITECTURES[name]))} |" for name in sorted(ARCHITECTURES))
    refined = ", ".join(f"`{name}`" for name in sorted(ARCHITECTURES) if ARCHITECTURES[name].refined)
    return _PAGE.format(count=len(ARCHITECTURES), refined=refined, rows="\n".join(rows).replace("|  |", "| |"))


def main() -> int:
    print(page())
    return 0


if __name__ == "__main__":
    sys.exit(main())
