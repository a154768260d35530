"""Byte-pair encoding by a list of merges (`tokenizer.ggml.model` "gpt2"): GPT-2, Llama 3, Qwen and most models since.

A text is cut into words (`pre_tokenizers`), each word's UTF-8 bytes are written as 256 printable characters, and
neighbours are merged in the order of the file's list of merges, of equal ones the leftmost first. Gemma 4 ("gemma4")
and a few others merge characters instead of bytes; one that is no token becomes byte tokens, such as `<0xC3>`.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from itertools import repeat, starmap
from operator import concat, contains
from typing import TYPE_CHECKING

from trichord.errors import TokenizerError
from trichord.tokenizers.cache import WordCache
from trichord.tokenizers.pre_tokenizers import PRE_TOKENIZERS, PreTokenizer
from trichord.tokenizers.vocabulary import TokenType, Vocabulary, string_array

if TYPE_CHECKING:
    from tokenizers.models import BPE

    from trichord.gguf_file import GGUFFile


def _byte_characters() -> dict[int, str]:
    """GPT-2's alphabet: a printable Latin-1 character stands for its own byte, U+0100 and up for the others in order.

    https://github.com/openai/gpt-2/blob/master/src/encoder.py (bytes_to_unicode)
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(256) if byte not in printable)
    return {byte: chr(byte) for byte in printable} | {byte: chr(0x100 + i) for i, byte in enumerate(others)}


_CHARACTER_OF = _byte_characters()
_BYTE_OF = {character: bytes([byte]) for byte, character in _CHARACTER_OF.items()}


class BytePairEncoding:
    """Encodes text and gives the bytes of normal tokens, by one file's vocabulary and merges.

    What the vocabulary has no token for, not even for its bytes, is left out of the ids, as the models' own tokenizers
    do.
    """

    adds_eos = adds_space = False

    @staticmethod
    def default_ids(file: GGUFFile) -> Mapping[str, int]:
        """None: these vocabularies have no ids in common."""
        return {}

    def __init__(self, vocabulary: Vocabulary, file: GGUFFile) -> None:
        self._pre_tokenizer = _pre_tokenizer(file)
        self.adds_bos, self.insists_on_bos = self._pre_tokenizer.adds_bos, self._pre_tokenizer.insists_on_bos
        self._merger = _merger(vocabulary, _merges(file), byte_tokens=not self._pre_tokenizer.byte_level)
        self._marks = frozenset(vocabulary.ids_of(TokenType.CONTROL, TokenType.UNKNOWN).values())
        self._ids = vocabulary.ids
        self._may_be_whole = re.compile(self._pre_tokenizer.whole_words).fullmatch
        self._words = WordCache(self._encode_word)

    def encode(self, text: str, after_special: bool) -> list[int]:
        """The ids of a piece of text that has no special tokens in it."""
        return self._words.encode(self._pre_tokenizer.split(text))

    def bytes_of(self, text: str) -> bytes:
        """The bytes that a normal token of this text stands for."""
        if not self._pre_tokenizer.byte_level:
            return text.replace(self._pre_tokenizer.space, " ").encode("utf-8", "surrogateescape")
        return b"".join(_BYTE_OF.get(character) or character.encode("utf-8", "surrogateescape") for character in text)

    def _encode_word(self, word: str) -> list[int]:
        if self._pre_tokenizer.byte_level:
            word = word.encode().decode("latin-1").translate(_CHARACTER_OF)
        whole = self._ids.get(word)
        if whole is None or whole in self._marks or not self._may_be_whole(word):
            return [token.id for token in self._merger.tokenize(word)]
        return [whole]


class Whitespace(BytePairEncoding):
    """The same (`tokenizer.ggml.model` "whitespace"), after putting the text in lower case where the file says so."""

    def __init__(self, vocabulary: Vocabulary, file: GGUFFile) -> None:
        super().__init__(vocabulary, file)
        self._lowercase = file.get("tokenizer.ggml.normalizer.lowercase", bool, False)

    def encode(self, text: str, after_special: bool) -> list[int]:
        """The ids of a piece of text that has no special tokens in it."""
        return super().encode(text.lower() if self._lowercase else text, after_special)


def _pre_tokenizer(file: GGUFFile) -> PreTokenizer:
    model = file.get("tokenizer.ggml.model", str)
    name = model if model == "gemma4" else file.get("tokenizer.ggml.pre", str, "")
    if name in PRE_TOKENIZERS:
        return PRE_TOKENIZERS[name]
    said = f"names the pre-tokenizer {name!r:.80}, which is not known here" if name else "names no pre-tokenizer"
    warnings.warn(
        f"{file.path.name}: the vocabulary {said}; the default one cuts texts instead, and quality may suffer",
        stacklevel=2,
    )
    return PRE_TOKENIZERS["default"]


def _merges(file: GGUFFile) -> list[tuple[str, str]]:
    """The file's merges as pairs, in order; of equal ones the first counts."""
    lines = string_array(file, "tokenizer.ggml.merges")
    if lines is None:
        raise TokenizerError(f"{file.path.name}: metadata key 'tokenizer.ggml.merges' is missing")
    lines = list(dict.fromkeys(lines))
    parts = " ".join(lines).split(" ") if lines else []
    if len(parts) != 2 * len(lines) or not all(map(contains, lines, repeat(" "))):
        line = next(line for line in lines if line.count(" ") != 1)
        raise TokenizerError(f"{file.path.name}: the merge {line!r:.80} is not two tokens with a space between")
    return list(zip(parts[::2], parts[1::2], strict=True))


def _merger(vocabulary: Vocabulary, merges: list[tuple[str, str]], byte_tokens: bool) -> BPE:
    """Merges, but to no control token: a merge that has to do with one is left out."""
    from tokenizers.models import BPE  # here: the import takes longer than that of this whole module

    marks = vocabulary.ids_of(TokenType.CONTROL, TokenType.UNKNOWN)
    plain = {text: token for text, token in vocabulary.ids.items() if text not in marks}
    if not all(map(plain.__contains__, starmap(concat, merges))):
        merges = [pair for pair in merges if not marks.keys() & {*pair, "".join(pair)}]
        _refuse_unknown(vocabulary, merges)  # the library would not survive it
    try:
        # Words are kept here, not there too.
        return BPE(plain, merges, cache_capacity=0, byte_fallback=byte_tokens)
    except Exception:  # of no particular class, and said in the library's own terms
        _refuse_unknown(vocabulary, merges)
        raise TokenizerError(f"{vocabulary.file_name}: the vocabulary has tokens that are not valid UTF-8") from None


def _refuse_unknown(vocabulary: Vocabulary, merges: list[tuple[str, str]]) -> None:
    for left, right in merges:
        for text in (left, right, left + right):
            if text not in vocabulary.ids:
                raise TokenizerError(
                    f"{vocabulary.file_name}: the merge {left + ' ' + right!r:.80} needs the token {text!r:.80},"
                    " which is not in the vocabulary"
                )
