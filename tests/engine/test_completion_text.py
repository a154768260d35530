"""Stop strings and streaming, over a detokenizer that maps letters to numbers."""

from __future__ import annotations

import random

import pytest

from trichord.completion_text import CompletionText


class Letters:
    """Tokens are code points; a token that is 0 is an incomplete byte, shown only at the end."""

    def __init__(self) -> None:
        self.pending = False

    def add(self, token: int) -> str:
        self.pending = token == 0
        return "" if token == 0 else chr(token)

    def finish(self) -> str:
        return "\ufffd" if self.pending else ""


def play(text: str, stop: list[str]) -> tuple[str, str | None, list[str]]:
    completion = CompletionText(Letters(), stop)
    pieces, found = [], None
    for letter in text:
        found = completion.add(ord(letter))
        if found is not None:
            break
        pieces.append(completion.take())
    completion.close()
    pieces.append(completion.take())
    assert "".join(pieces) == completion.text
    return completion.text, found, pieces


@pytest.mark.parametrize(
    ("text", "stop", "expected", "found"),
    [
        ("abcdef", ["cd"], "ab", "cd"),
        ("abcdef", ["x", "f"], "abcde", "f"),
        ("abcabd", ["abd"], "abc", "abd"),
        ("aaab", ["aab"], "a", "aab"),
        ("abc", ["abcd"], "abc", None),
        ("abc", [], "abc", None),
        ("abc", ["c", "bc"], "a", "bc"),  # both end here; the earlier one wins
    ],
)
def test_stop_strings(text, stop, expected, found):
    assert play(text, stop)[:2] == (expected, found)


def test_nothing_that_a_stop_string_could_take_back_is_streamed():
    rng = random.Random(5)
    for _ in range(300):
        text = "".join(rng.choices("ab", k=12))
        stop = ["".join(rng.choices("ab", k=rng.randint(1, 4))) for _ in range(2)]
        result, found, _ = play(text, stop)
        ends = [(text.find(s) + len(s), text.find(s), s) for s in stop if s in text]
        if ends:
            first_end = min(ends)[0]  # the stop string whose last letter comes first ends the completion
            position = min(at for end, at, _ in ends if end == first_end)
            assert result == text[:position] and found is not None
        else:
            assert result == text and found is None


def test_text_without_stop_strings_streams_at_once_and_the_last_bytes_at_the_end():
    completion = CompletionText(Letters(), [])
    completion.add(ord("h"))
    assert completion.take() == "h"
    completion.add(0)
    assert completion.take() == ""
    completion.close()
    completion.close()
    assert completion.take() == "\ufffd" and completion.text == "h\ufffd"
