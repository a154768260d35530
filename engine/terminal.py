"""Text for terminals. That of files and models is untrusted: control characters in it could drive the terminal."""

from __future__ import annotations

import unicodedata


def printable(text: str, allowed: str = "\n\t") -> str:
    """The text with every character that does not simply print shown as its escape, but for the `allowed` ones."""

    def shown(character: str) -> str:
        harmless = character in allowed or character.isprintable() or unicodedata.category(character) == "Zs"
        return character if harmless else ascii(character)[1:-1]

    return "".join(map(shown, text))


def rate(tokens: int, seconds: float) -> str:
    """How fast so many tokens went, to follow their number in a summary: ", 12.5 tokens/s"; empty for none."""
    return f", {tokens / seconds:.1f} tokens/s" if tokens > 0 and seconds > 0 else ""
