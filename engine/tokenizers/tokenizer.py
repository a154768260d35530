"""The tokenizer of a GGUF file: text to token ids and back, from the file's own vocabulary.

The ids are those that llama.cpp gives for the same file and text, but for two things. Text never turns into a control
token by chance of its merges, only where `parse_special` asks for it. And where llama.cpp simplifies what the model's
own tokenizer does (upper and lower case beyond ASCII, accents, white space), the model's own counts.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, NoReturn, Protocol

import numpy as np

from trichord.errors import GGUFError, RequestError, TokenizerError
from trichord.tokenizers.bpe import BytePairEncoding, Whitespace
from trichord.tokenizers.detokenizer import Detokenizer
from trichord.tokenizers.dna import HybridDNA
from trichord.tokenizers.plamo2 import PLaMo2
from trichord.tokenizers.rwkv import RWKV
from trichord.tokenizers.specials import SpecialTokens, SwallowedSpace
from trichord.tokenizers.spm import SentencePiece
from trichord.tokenizers.unigram import Unigram
from trichord.tokenizers.vocabulary import TokenType, Vocabulary
from trichord.tokenizers.wordpiece import WordPiece

if TYPE_CHECKING:
    from trichord.gguf_file import GGUFFile


class TokenizerModel(Protocol):
    """What is different between kinds of tokenizers: how plain text becomes tokens, and a plain token bytes."""

    adds_bos: bool
    """Whether a text begins with the beginning-of-sequence token, where the file does not say."""
    insists_on_bos: bool
    """Whether it does so even if the file says no."""
    adds_eos: bool
    """Whether it ends with the end-of-sequence token, likewise."""
    adds_space: bool
    """Whether a text begins with a space that it does not have."""

    def __init__(self, vocabulary: Vocabulary, file: GGUFFile) -> None:
        """Raises TokenizerError or GGUFError when the file lacks what this kind needs."""

    @staticmethod
    def default_ids(file: GGUFFile) -> Mapping[str, int]:
        """Which tokens are "bos", "eos" and "unknown", where the file does not say."""

    def encode(self, text: str, after_special: bool) -> list[int]:
        """The ids of a piece of text, not empty, without special tokens in it, but maybe after one or at the start."""

    def bytes_of(self, text: str) -> bytes:
        """The bytes that a normal token of this text stands for."""


MODELS: dict[str, type[TokenizerModel]] = {
    "llama": SentencePiece,
    "gpt2": BytePairEncoding,
    "gemma4": BytePairEncoding,
    "whitespace": Whitespace,
    "hybriddna": HybridDNA,
    "t5": Unigram,
    "plamo2": PLaMo2,
    "rwkv": RWKV,
    "bert": WordPiece,
}
_NO_VOCABULARY = ("no_vocab", "none", "test")

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_MARKS = (TokenType.CONTROL, TokenType.UNKNOWN)
_INVISIBLE = (*_MARKS, TokenType.UNUSED, TokenType.UNDEFINED)
# gpt-oss tells the parts of an answer apart by these, so they belong to its text.
_PART_MARKS = ("<|start|>", "<|channel|>", "<|message|>", "<|constrain|>", "<|end|>")


class Tokenizer:
    """Encodes and decodes by one vocabulary. May be used from several threads at once.

    >>> tokenizer = Tokenizer.from_gguf(GGUFFile("model.gguf"))
    >>> tokenizer.decode(tokenizer.encode("Hello"))
    'Hello'
    """

    n_vocab: int
    bos_id: int | None
    eos_id: int | None
    stop_ids: frozenset[int]
    """The tokens that end an answer: end of sequence, of turn, of message."""

    def __init__(self, vocabulary: Vocabulary, model: TokenizerModel, swallows: SwallowedSpace) -> None:
        self._vocabulary = vocabulary
        self._model = model
        self.n_vocab = len(vocabulary.tokens)
        self.bos_id = vocabulary.bos_id
        self.eos_id = vocabulary.eos_id
        self.stop_ids = vocabulary.stop_ids
        add_bos = None if model.insists_on_bos else vocabulary.add_bos
        self._before = _added("bos", add_bos, model.adds_bos, self.bos_id, vocabulary.file_name)
        self._after = _added("eos", vocabulary.add_eos, model.adds_eos, self.eos_id, vocabulary.file_name)
        invisible = set(np.flatnonzero(np.isin(vocabulary.types, _INVISIBLE)).tolist())
        part_marks = {vocabulary.ids.get(text) for text in _PART_MARKS} - self.stop_ids
        self._invisible = frozenset(invisible - part_marks)
        self._bytes: dict[int, bytes] = {}
        user_defined = vocabulary.ids_of(TokenType.USER_DEFINED)
        self._user_defined = SpecialTokens(user_defined, swallows)
        self._all_special = SpecialTokens(user_defined | vocabulary.ids_of(*_MARKS), swallows)

    @classmethod
    def from_gguf(cls, file: GGUFFile) -> Tokenizer:
        """The tokenizer that the file describes.

        Raises TokenizerError when the file has none, one of a kind that is not supported, or a damaged one.
        """
        try:
            model = file.get("tokenizer.ggml.model", str, "none")
            if model not in MODELS:
                _refuse(file.path.name, model)
            vocabulary = Vocabulary.from_gguf(file, MODELS[model].default_ids(file))
            return cls(vocabulary, MODELS[model](vocabulary, file), SwallowedSpace.from_gguf(file, vocabulary))
        except GGUFError as error:
            raise TokenizerError(str(error)) from None

    def encode(self, text: str, add_special: bool = True, parse_special: bool = False) -> list[int]:
        """The ids of a text.

        add_special: begin and end it with the tokens that the file wants there. parse_special: special tokens written
        in the text, such as `<|im_start|>`, become their ids; else they are text like any other, which is right for
        whatever a user typed. Raises TokenizerError for a text with lone surrogates.
        """
        if not isinstance(text, str):
            raise RequestError(f"the tokenizer encodes str, not {type(text).__name__}")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise TokenizerError(
                f"the text has a lone surrogate, U+{ord(text[error.start]):04X}, at index {error.start}: no character"
            ) from None
        ids = list(self._before) if add_special else []
        after_special = True
        for piece in (self._all_special if parse_special else self._user_defined).split(text):
            if isinstance(piece, int):
                ids.append(piece)
            else:
                ids += self._model.encode(piece, after_special)
            after_special = isinstance(piece, int)
        if add_special:
            ids += self._after
        return ids

    def decode(self, ids: Iterable[int], skip_special: bool = True, continues: bool = False) -> str:
        """The text of these ids: the inverse of `encode`.

        skip_special: leave out what is not text, such as `<s>` or `<|eot_id|>`. continues: the ids carry on a text
        that began before them, as generated ones do; else the space that some vocabularies put before a text is left
        out. Bytes that are no UTF-8 become U+FFFD. Raises TokenizerError for an id outside the vocabulary.
        """
        token_bytes = self._visible_bytes if skip_special else self.token_bytes
        detokenizer = self.detokenizer(skip_special, continues)
        return detokenizer.add_bytes(b"".join(map(token_bytes, ids))) + detokenizer.finish()

    def detokenizer(self, skip_special: bool = True, continues: bool = False) -> Detokenizer:
        """Decodes one id at a time; what it gives out in all is what `decode` gives with the same arguments."""
        token_bytes = self._visible_bytes if skip_special else self.token_bytes
        return Detokenizer(token_bytes, drop_first_space=self._model.adds_space and not continues)

    def token_bytes(self, token: int) -> bytes:
        """The bytes a token stands for; of a special token those of its name. Raises TokenizerError like `decode`."""
        index = self._checked(token)
        data = self._bytes.get(index)
        if data is None:
            data = self._bytes[index] = self._bytes_of(index)
        return data

    def piece(self, token: int) -> str:
        """A token's text as the file writes it, `▁Hello` or `ĠHello`. Raises TokenizerError like `decode`."""
        return self._vocabulary.tokens[self._checked(token)]

    def token_id(self, piece: str) -> int | None:
        """The token that the file writes so, if there is one."""
        return self._vocabulary.ids.get(piece)

    def _visible_bytes(self, token: int) -> bytes:
        index = self._checked(token)
        return b"" if index in self._invisible else self.token_bytes(index)

    def _bytes_of(self, token: int) -> bytes:
        text, token_type = self._vocabulary.tokens[token], self._vocabulary.types[token]
        if token_type == TokenType.NORMAL:
            return self._model.bytes_of(text)
        byte = _BYTE.fullmatch(text) if token_type == TokenType.BYTE else None
        return bytes.fromhex(byte[1]) if byte else text.encode("utf-8", "surrogateescape")

    def _checked(self, token: int) -> int:
        try:
            index = operator.index(token)
        except TypeError:
            raise TokenizerError(f"a token id is an integer, not {token!r:.40}") from None
        if not 0 <= index < self.n_vocab:
            raise TokenizerError(f"token id {index} is outside the vocabulary of {self.n_vocab} tokens")
        return index


def _refuse(file_name: str, model: str) -> NoReturn:
    if model in _NO_VOCABULARY:
        raise TokenizerError(f"{file_name}: the file has no tokenizer that can be used; give token ids instead of text")
    raise TokenizerError(
        f"{file_name}: the tokenizer model {model!r:.80} is not supported ({', '.join(MODELS)} are);"
        " give token ids instead of text"
    )


def _added(name: str, asked: bool | None, usual: bool, token: int | None, file_name: str) -> list[int]:
    """The token that goes before or after a text, if any."""
    if asked and token is None:
        raise TokenizerError(
            f"{file_name}: tokenizer.ggml.add_{name}_token is true, but there is no tokenizer.ggml.{name}_token_id"
        )
    return [token] if token is not None and (usual if asked is None else asked) else []
