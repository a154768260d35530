"""The text of a completion as it grows: whole characters only, ended by a stop string, streamed without taking back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Detokenizer(Protocol):
    """Turns token ids into text, incrementally."""

    def add(self, token: int) -> str:
        """Takes one more token; the text that became complete by it."""

    def finish(self) -> str:
        """What is left at the end: the replacement for bytes that never became a character."""


class CompletionText:
    """Collects a completion's text and finds stop strings in it, across token borders too."""

    def __init__(self, detokenizer: Detokenizer | None, stop: Sequence[str]) -> None:
        self._detokenizer = detokenizer
        self._stop = stop
        self._overlap = max((len(text) for text in stop), default=1) - 1
        self._streamed = 0
        self._closed = False
        self.text = ""

    def add(self, token: int) -> str | None:
        """Takes one more token. Returns the stop string that it completed, if any; the text then ends before it."""
        return self._extend(self._detokenizer.add(token)) if self._detokenizer else None

    def close(self) -> None:
        """Ends the completion, unless a stop string already has."""
        if not self._closed and self._detokenizer:
            self._extend(self._detokenizer.finish())
        self._closed = True

    def take(self) -> str:
        """The text not yet taken that no later stop string can cut off."""
        end = len(self.text) if self._closed else len(self.text) - self._begun_stop()
        piece = self.text[self._streamed : end]
        self._streamed += len(piece)
        return piece

    def _extend(self, piece: str) -> str | None:
        searched_from = max(0, len(self.text) - self._overlap)
        self.text += piece
        found = [(self.text.find(stop, searched_from), stop) for stop in self._stop]
        found = [(position, stop) for position, stop in found if position >= 0]
        if not found:
            return None
        position, stop = min(found)
        self.text = self.text[:position]
        self._closed = True
        return stop

    def _begun_stop(self) -> int:
        """Length of the longest ending of the text that begins a stop string."""
        for length in range(min(self._overlap, len(self.text)), 0, -1):
            if any(stop.startswith(self.text[-length:]) for stop in self._stop):
                return length
        return 0
