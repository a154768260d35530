"""SentencePiece's normalization of characters, which a file carries with it (`tokenizer.ggml.precompiled_charsmap`).

It is a list of replacements: at each place of a text the longest of their keys that stands there is replaced. The keys
are the paths through a trie, packed as a double array of 32-bit units, after which the replacements follow, each ended
by a zero byte. Layout: https://github.com/s-yata/darts-clone/blob/master/include/darts.h (DoubleArrayUnit).
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator

import numpy as np

from trichord.errors import TokenizerError
from trichord.tokenizers.longest_match import LongestMatch

_MAX_BYTES = 256  # of a key or a replacement; real ones have less than 40


class Charsmap:
    """The replacements of one charsmap. Raises TokenizerError for one that is damaged."""

    def __init__(self, data: bytes, file_name: str) -> None:
        try:
            replacements = dict(_replacements(data))
        except (ValueError, IndexError):  # also what is no UTF-8
            raise TokenizerError(
                f"{file_name}: metadata key 'tokenizer.ggml.precompiled_charsmap' is damaged"
            ) from None
        self._one = {ord(key): value for key, value in replacements.items() if len(key) == 1}
        self._more = {key: value for key, value in replacements.items() if len(key) > 1}
        self._longest = LongestMatch(self._more)
        starts = sorted({key[0] for key in self._more}), sorted({key[1] for key in self._more})
        self._start = re.compile(
            "".join(f"[{''.join(map(re.escape, characters))}]" for characters in starts if characters)
        )

    def normalize(self, text: str) -> str:
        """The text with everything replaced."""
        if not self._more:
            return text.translate(self._one)
        parts, position = [], 0
        place = self._start.search(text)
        while place:
            start = place.start()
            end = self._longest.end(text, start, len(text))
            if end > start:
                parts += [text[position:start].translate(self._one), self._more[text[start:end]]]
                position = end
            place = self._start.search(text, max(end, start + 1))
        return "".join([*parts, text[position:].translate(self._one)])


def _replacements(data: bytes) -> Iterator[tuple[str, str]]:
    """Every key with its replacement. Raises ValueError or IndexError where the data do not hold together."""
    size = int.from_bytes(data[:4], "little")
    if len(data) < 4 or size % 4 or 4 + size > len(data):
        raise ValueError
    units = np.frombuffer(data, "<u4", size // 4, 4).astype(np.int64)
    texts = data[4 + size :]
    labels = units & 0xFF
    offsets = (units >> 10) << ((units & (1 << 9)) >> 6)
    has_value = (units >> 8) & 1
    # A unit's place is that of its parent's children, which the parent's offset says, XOR its own label.
    children: dict[int, list[int]] = defaultdict(list)
    for unit in np.flatnonzero((labels != 0) & (units >> 31 == 0)).tolist():
        children[unit ^ int(labels[unit])].append(unit)
    visited, todo = 0, [(0, b"")]
    while todo:
        unit, key = todo.pop()
        visited += 1
        place = unit ^ int(offsets[unit])
        if visited > len(units) or len(key) > _MAX_BYTES:
            raise ValueError  # no tree
        if has_value[unit] and key:
            start = int(units[place]) & 0x7FFFFFFF
            yield key.decode(), texts[start : texts.index(b"\0", start, start + _MAX_BYTES)].decode()
        todo += [(child, key + bytes([int(labels[child])])) for child in children.get(place, ())]
