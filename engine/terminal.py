"""Text for terminals. That of files and models is untrusted: control characters in it could drive the terminal."""

from __future__ import annotations

import signal
import unicodedata
from collections.abc import Iterable, Iterator
from types import FrameType


def printable(text: str, allowed: str = "\n\t") -> str:
    """The text with every character that does not simply print shown as its escape, but for the `allowed` ones."""

    def shown(character: str) -> str:
        harmless = character in allowed or character.isprintable() or unicodedata.category(character) == "Zs"
        return character if harmless else ascii(character)[1:-1]

    return "".join(map(shown, text))


def rate(tokens: int, seconds: float) -> str:
    """How fast so many tokens went, to follow their number in a summary: ", 12.5 tokens/s"; empty for none."""
    return f", {tokens / seconds:.1f} tokens/s" if tokens > 0 and seconds > 0 else ""


def interruptible(pieces: Iterable[str]) -> Iterator[str]:
    """The pieces; Ctrl-C raises KeyboardInterrupt, and if that got lost in a callback, again after the next one.

    For the main thread alone.
    """
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler:  # whoever started this ignores it, or handles it otherwise
        yield from pieces
        return
    interrupted = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal interrupted
        interrupted = True
        signal.default_int_handler(number, frame)

    signal.signal(signal.SIGINT, note)
    try:
        for piece in pieces:
            yield piece
            if interrupted:
                raise KeyboardInterrupt
    finally:
        signal.signal(signal.SIGINT, before)
