"""From token ids to text, one token at a time."""

from __future__ import annotations

import codecs
from collections.abc import Callable


class Detokenizer:
    """Gives each character out as soon as its last byte has come; `Tokenizer.decode` runs through here too.

    `token_bytes` gives the bytes a token adds to the text. Bytes that are no UTF-8 become U+FFFD. With
    `drop_first_space` one space at the very start of the text is left out.
    """

    def __init__(self, token_bytes: Callable[[int], bytes], drop_first_space: bool = False) -> None:
        self._token_bytes = token_bytes
        self._drop_space = drop_first_space
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode

    def add(self, token: int) -> str:
        """Takes one more token; the text that became complete by it, never half a character."""
        return self.add_bytes(self._token_bytes(token))

    def add_bytes(self, data: bytes) -> str:
        """Takes the bytes of any number of tokens; the text that became complete by them."""
        if self._drop_space and data:
            self._drop_space = False
            data = data.removeprefix(b" ")
        return self._decode(data)

    def finish(self) -> str:
        """What is left at the end: U+FFFD for a character that was begun and not completed, else nothing."""
        return self._decode(b"", True)
