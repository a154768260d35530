"""Byte-pair encoding in which DNA sequences are cut by six letters (`tokenizer.ggml.model` "hybriddna").

What stands between `<dna>` and `</dna>` is a sequence. Its tokens are told from words of the same letters by U+E000,
which the file writes after each; as in llama.cpp's `llm_tokenizer_hybriddna_session`.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from trichord.tokenizers.bpe import BytePairEncoding
from trichord.tokenizers.vocabulary import Vocabulary

if TYPE_CHECKING:
    from trichord.gguf_file import GGUFFile

_BEGIN, _END, _UNKNOWN = "<dna>", "</dna>", "<oov>"
_SEQUENCE = re.compile(f"({_BEGIN})(.*?)({_END}|\\Z)", re.DOTALL)
_MARK = "\ue000"
_LETTERS = 6
_UPPER_CASE = {code: code - 32 for code in range(ord("a"), ord("z") + 1)}


class HybridDNA(BytePairEncoding):
    """Encodes text and sequences by one file's vocabulary and merges."""

    def __init__(self, vocabulary: Vocabulary, file: GGUFFile) -> None:
        super().__init__(vocabulary, file)
        self._has_sequences = {_BEGIN, _END, _UNKNOWN} <= vocabulary.ids.keys()

    def encode(self, text: str, after_special: bool) -> list[int]:
        """The ids of a piece of text that has no special tokens in it, though maybe sequences."""
        if not self._has_sequences:
            return super().encode(text, after_special)
        ids: list[int] = []
        position = 0
        for place in _SEQUENCE.finditer(text):
            ids += super().encode(text[position : place.start()], after_special)
            ids += [self._ids[_BEGIN], *self._sequence(place[2])]
            ids += [self._ids[_END]] if place[3] else []
            position = place.end()
        return ids + super().encode(text[position:], after_special)

    def bytes_of(self, text: str) -> bytes:
        """The bytes that a normal token of this text stands for."""
        return super().bytes_of(text.removesuffix(_MARK))

    def _sequence(self, letters: str) -> list[int]:
        """Six letters a token, the last ones filled up with A; unknown where there are others than A, C, G and T."""
        letters = letters.translate(_UPPER_CASE)
        starts = range(0, len(letters), _LETTERS)
        words = (letters[start : start + _LETTERS].ljust(_LETTERS, "A") + _MARK for start in starts)
        return [self._ids.get(word, self._ids[_UNKNOWN]) for word in words]
