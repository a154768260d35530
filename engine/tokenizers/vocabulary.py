"""The vocabulary of a GGUF file: its tokens, what kind each is, their scores, and which ids begin and end a text.

A vocabulary is untrusted: whatever does not fit together is a TokenizerError that names the file and the place. The
keys are those of https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (section "Tokenizer").
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING

import numpy as np

from trichord.errors import TokenizerError

if TYPE_CHECKING:
    from trichord.gguf_file import GGUFFile

SPACE = "▁"  # U+2581: how SentencePiece and its heirs write a space in a token
_NO_ID = 0xFFFFFFFF  # converters write -1 as uint32 where a model has no such token


class TokenType(IntEnum):
    """What a token stands for; the numbers are GGUF's (SentencePiece's)."""

    UNDEFINED = 0
    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


# A model ends its answer with one of these, and files often name only one of them as their end-of-sequence token.
_STOP_TEXTS = {
    *("</s>", "<eos>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "[e~[", "<end_of_turn>", "<end_of_utterance>", "<turn|>"),
    *("<|tool_response>", "<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<|endoftext|>", "<|end_of_text|>"),
    *("<|return|>", "<|call|>", "<|calls|>", "<|flush|>", "<｜end▁of▁sentence｜>"),
    # A code model writes these after the end of the file it completes.
    *("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<reponame>"),
    *("<repo_name>", "<REPO>", "<|file_sep|>", "<PAD>", "[PAD]"),
}
# Vocabularies in which one of the texts above only ends a part of the answer: (text, the tokens they are known by).
_NO_STOP = (
    ("<|end|>", frozenset({"<|return|>", "<|call|>"})),
    ("<|end|>", frozenset({"<|flush|>", "<|calls|>"})),
    ("</s>", frozenset({"<|tool_response>"})),
)
_STOP_KEYS = ("eos", "eot", "eom", "fim_pad", "fim_rep", "fim_sep")


@dataclass(frozen=True)
class Vocabulary:
    """A checked vocabulary.

    `tokens[id]` is a token's text as the file writes it (bytes that are not UTF-8 as surrogate escapes), `types[id]`
    its `TokenType` as a number, `ids` the inverse of `tokens`. `scores` is None where the file has none, `add_bos`
    and `add_eos` where it leaves the matter to the kind of its tokenizer.
    """

    file_name: str
    tokens: list[str]
    types: np.ndarray
    ids: dict[str, int]
    scores: np.ndarray | None
    bos_id: int | None
    eos_id: int | None
    unk_id: int | None
    stop_ids: frozenset[int]
    add_bos: bool | None
    add_eos: bool | None

    @classmethod
    def from_gguf(cls, file: GGUFFile, default_ids: Mapping[str, int]) -> Vocabulary:
        """Reads and checks the vocabulary.

        default_ids: which tokens are "bos", "eos" and "unknown" where the file does not say. Raises TokenizerError
        where the vocabulary is missing or inconsistent, GGUFError where a key is of the wrong type.
        """
        name = file.path.name
        tokens = string_array(file, "tokenizer.ggml.tokens")
        if not tokens:
            raise TokenizerError(f"{name}: the vocabulary (metadata key 'tokenizer.ggml.tokens') is missing or empty")
        ids = dict(zip(tokens, range(len(tokens)), strict=True))
        if len(ids) != len(tokens):
            _refuse_duplicates(name, tokens, ids)
        ids.pop("", None)  # a token without text stands for nothing in a text
        types = _types(file, len(tokens))
        keys = ("bos", "unknown", *_STOP_KEYS)
        special = {key: _special_id(file, key, default_ids.get(key), len(tokens)) for key in keys}
        stop_ids = _stop_ids(ids, types, (special[key] for key in _STOP_KEYS))
        for token in stop_ids:
            if types[token] == TokenType.USER_DEFINED:  # else anyone could end the model's turn by writing its text
                types[token] = TokenType.CONTROL
        return cls(
            file_name=name,
            tokens=tokens,
            types=types,
            ids=ids,
            scores=_scores(file, len(tokens)),
            bos_id=special["bos"],
            eos_id=special["eos"],
            unk_id=special["unknown"],
            stop_ids=stop_ids,
            add_bos=file.get("tokenizer.ggml.add_bos_token", bool),
            add_eos=file.get("tokenizer.ggml.add_eos_token", bool),
        )

    def ids_of(self, *types: TokenType) -> dict[str, int]:
        """The tokens of these kinds that have a text, text to id."""
        found = np.flatnonzero(np.isin(self.types, types)).tolist()
        return {self.tokens[token]: token for token in found if self.tokens[token]}


def string_array(file: GGUFFile, key: str) -> list[str] | None:
    """An array of strings, None where the file has no such key. Raises TokenizerError for an array of anything else."""
    values = file.get(key, list)
    if values is None or (isinstance(values, list) and isinstance(values[0] if values else "", str)):
        return values
    raise TokenizerError(f"{file.path.name}: metadata key {key!r} is not an array of strings")


def number_array(file: GGUFFile, key: str, count: int) -> np.ndarray | None:
    """An array of `count` numbers, None where the file has no such key. Raises TokenizerError for anything else."""
    values = file.get(key, list)
    if values is None:
        return None
    if not isinstance(values, np.ndarray):
        raise TokenizerError(f"{file.path.name}: metadata key {key!r} is not an array of numbers")
    if len(values) != count:
        raise TokenizerError(
            f"{file.path.name}: metadata key {key!r} has {len(values)} entries for a vocabulary of {count} tokens"
        )
    return values


def required_scores(vocabulary: Vocabulary) -> np.ndarray:
    """The tokens' scores. Raises TokenizerError where the file has none."""
    if vocabulary.scores is None:
        raise TokenizerError(f"{vocabulary.file_name}: metadata key 'tokenizer.ggml.scores' is missing")
    return vocabulary.scores


def _types(file: GGUFFile, count: int) -> np.ndarray:
    types = number_array(file, "tokenizer.ggml.token_type", count)
    if types is None:
        return np.full(count, TokenType.NORMAL)
    return np.where(np.isin(types, list(TokenType)), types, TokenType.UNDEFINED)


def _scores(file: GGUFFile, count: int) -> np.ndarray | None:
    scores = number_array(file, "tokenizer.ggml.scores", count)
    if scores is None:
        return None
    scores = scores.astype(np.float32)
    if np.isnan(scores).any():
        token = int(np.flatnonzero(np.isnan(scores))[0])
        raise TokenizerError(f"{file.path.name}: the score of token {token} is not a number")
    return scores


def _special_id(file: GGUFFile, name: str, default: int | None, count: int) -> int | None:
    key = f"tokenizer.ggml.{name}_token_id"
    token = file.get(key, int)
    if token is None and default is not None and default < count:
        return default
    if token is None or token in (-1, _NO_ID):
        return None
    if 0 <= token < count:
        return token
    warnings.warn(
        f"{file.path.name}: {key} is {token}, outside the vocabulary of {count} tokens; it is ignored", stacklevel=2
    )
    return None


def _stop_ids(ids: dict[str, int], types: np.ndarray, named: Iterable[int | None]) -> frozenset[int]:
    # A plain token of such a text is no mark: '</s>' is also how HTML ends struck-out text.
    plain = (TokenType.NORMAL, TokenType.BYTE)
    texts = {text for text in _STOP_TEXTS & ids.keys() if types[ids[text]] not in plain}
    texts -= {text for text, others in _NO_STOP if others <= texts}
    return frozenset({token for token in named if token is not None} | {ids[text] for text in texts})


def _refuse_duplicates(name: str, tokens: list[str], last: dict[str, int]) -> None:
    for first, text in enumerate(tokens):
        if text and last[text] != first:
            raise TokenizerError(f"{name}: tokens {first} and {last[text]} of the vocabulary are both {text[:80]!r}")
