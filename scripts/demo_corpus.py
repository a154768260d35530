"""The demo model's corpus: short tales and small conversations from the grammar in `demo_corpus.txt`.

All of it was written for this project. The same seed gives the same documents.

    python scripts/demo_corpus.py 3          # prints three documents
"""

from __future__ import annotations

import random
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

END = "<|endoftext|>"
TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"
PRONOUNS = {"she": ("she", "her", "her"), "he": ("he", "him", "his")}

CHOICE = re.compile(r"\[([^\[\]]*)\]")
SLOT = re.compile(r"\{(a )?([^{}]+)\}", re.IGNORECASE)

Row = dict[str, str]


class Grammar:
    """The grammar file, read once: rows of words, tales by what they are about, groups of patterns."""

    def __init__(self, path: Path) -> None:
        self.tables: dict[str, list[Row]] = {}
        self.tales: dict[str, str] = {}
        self.lines: dict[str, list[str]] = {}
        for section in path.read_text(encoding="utf-8").split("\n== ")[1:]:
            heading, _, body = section.partition("\n")
            sort, _, name = heading.partition(" ")
            if sort == "table":
                name, _, columns = name.partition(": ")
                # The one column of a plain list has the table's own name.
                self.tables[name] = table(
                    body, [f"{name}.{column}" for column in cells(columns)] if columns else [name]
                )
            elif sort == "tale":
                self.tales[name] = body
            else:
                self.lines[name] = nonempty(body.split("\n"))


def nonempty(parts: list[str]) -> list[str]:
    """The parts without the space around them, and without those that were nothing else."""
    return [part.strip() for part in parts if part.strip()]


def cells(row: str) -> list[str]:
    """The columns of a row."""
    return nonempty(row.split(" / "))


def table(body: str, columns: list[str]) -> list[Row]:
    """The rows of a table's text, each as column -> pattern."""
    return [dict(zip(columns, cells(row), strict=True)) for row in nonempty(re.split(r"[;\n]", body))]


GRAMMAR = Grammar(Path(__file__).with_suffix(".txt"))


class Teller:
    """Fills patterns in. What a slot was filled with is kept, so that one teller tells of one set of characters."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        cast = {column.removeprefix("cast."): word for column, word in rng.choice(GRAMMAR.tables["cast"]).items()}
        self.words = cast
        for prefix in ("", "friend_"):
            pronouns = PRONOUNS[cast[f"{prefix}pronoun"]]
            self.words |= dict(zip((f"{prefix}he", f"{prefix}him", f"{prefix}his"), pronouns, strict=True))

    def fill(self, pattern: str) -> str:
        """The pattern as text: alternatives chosen from the innermost outwards, then the slots."""
        while choice := CHOICE.search(pattern):
            chosen = self.rng.choice(choice[1].split("|"))
            pattern = pattern[: choice.start()] + chosen + pattern[choice.end() :]
        return re.sub(" +", " ", SLOT.sub(self._fill_slot, pattern)).strip()

    def _fill_slot(self, slot: re.Match[str]) -> str:
        article, name = slot.groups()
        word = self._word(name.lower())
        if article:
            word = f"{'an' if word[0] in 'aeiou' else 'a'} {word}"
        return word[0].upper() + word[1:] if slot[0][1].isupper() else word

    def _word(self, name: str) -> str:
        if name not in self.words:
            row = self.rng.choice(GRAMMAR.tables[name.partition(".")[0]])
            self.words |= {column: self.fill(pattern) for column, pattern in row.items()}
        return self.words[name]

    def line(self, group: str) -> str:
        """One of a group's patterns, filled in."""
        return self.fill(self.rng.choice(GRAMMAR.lines[group]))

    def exchange(self, row: str) -> Exchange:
        """A question and its answer from a line "question / answer"."""
        question, answer = cells(row)
        return self.fill(question), self.fill(answer)


Exchange = tuple[str, str]


@dataclass(frozen=True)
class Tale:
    """A tale, the teller who knows its words, and the lines of questions about it."""

    text: str
    teller: Teller
    questions: list[str]


def tale(rng: random.Random) -> Tale:
    """One tale: an opening, a plot (its cause, its turn and its end) and mostly a closing line."""
    teller = Teller(rng)
    topic = teller.words["topic"] = rng.choice(list(GRAMMAR.tales))
    plot, questions = GRAMMAR.tales[topic].split("---")
    paragraphs = [paragraph.replace("\n", " ") for paragraph in nonempty(plot.split("\n\n"))]
    paragraphs[0] = f"{rng.choice(GRAMMAR.lines['openings'])} {paragraphs[0]}"
    if rng.random() < 0.8:
        paragraphs[-1] += f" {rng.choice(GRAMMAR.lines['closings'])}"
    return Tale("\n\n".join(map(teller.fill, paragraphs)), teller, nonempty(questions.split("\n")))


def conversation(rng: random.Random) -> list[Exchange]:
    """One to four exchanges: a tale and questions about it; or small talk, sums and questions beyond the model."""
    if rng.random() < 0.5:
        told = tale(rng)
        questions = rng.sample(told.questions + GRAMMAR.lines["questions"], rng.choice([0, 0, 1, 2, 3]))
        return [(told.teller.line("requests"), told.text), *map(told.teller.exchange, questions)]
    return [rng.choice([small_talk, small_talk, addition, unknown])(rng) for _ in range(rng.choice([1, 2, 3]))]


def small_talk(rng: random.Random) -> Exchange:
    """A greeting, a question about the model or an easy question, with its answer."""
    return Teller(rng).exchange(rng.choice(GRAMMAR.lines["small talk"]))


def addition(rng: random.Random) -> Exchange:
    """A sum of two numbers up to ten."""
    a, b = rng.randint(0, 10), rng.randint(0, 10)
    return f"What is {a} {rng.choice(['plus', '+', 'and'])} {b}?", f"{a} plus {b} is {a + b}."


def unknown(rng: random.Random) -> Exchange:
    """A question beyond a very small model, and the honest answer."""
    return Teller(rng).line("unknown"), Teller(rng).line("not known")


def chat_text(exchanges: list[Exchange], system: str = "") -> str:
    """A conversation as the chat template writes it (ChatML)."""
    turns = [("system", system)] if system else []
    for question, answer in exchanges:
        turns += [("user", question), ("assistant", answer)]
    return "".join(f"{TURN_START}{role}\n{text}{TURN_END}\n" for role, text in turns)


def documents(seed: int) -> Iterator[str]:
    """Endless documents, the same for the same seed: about two tales in three, otherwise a conversation."""
    rng = random.Random(seed)
    while True:
        if rng.random() < 0.6:
            yield tale(rng).text
        else:
            yield chat_text(conversation(rng), Teller(rng).line("system") if rng.random() < 0.2 else "")


if __name__ == "__main__":
    for document, _ in zip(documents(seed=0), range(int(sys.argv[1])), strict=False):
        print(document, END, sep="\n", end="\n\n")
