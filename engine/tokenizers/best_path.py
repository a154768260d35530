"""The way through a text, from token to token, of the highest total score (Viterbi's algorithm)."""

from __future__ import annotations

from collections.abc import Mapping

from trichord.errors import TokenizerError


class BestPath:
    """Cuts texts into the tokens of highest total score, in float64.

    scores: of each token, by its text. A character that is no token counts `unknown`, below every score; neighbours of
    that kind stay together. Where two ways to a place have the same total, that with the longer last token is taken.
    """

    def __init__(self, scores: Mapping[str, float], unknown: float, file_name: str) -> None:
        from tokenizers.models import Unigram  # here: the import takes longer than that of this whole module

        # The library counts an unknown character 10 below the least of all scores. The first entry, which no text
        # matches, makes that the figure asked for.
        entries = [("", unknown + 10.0), *scores.items()]
        try:
            self._model = Unigram(entries, 0, False)
        except Exception:  # of no particular class, and said in the library's own terms
            raise TokenizerError(f"{file_name}: the vocabulary has tokens that are not valid UTF-8") from None

    def cut(self, text: str) -> list[str]:
        """The text's tokens in order, and the runs of characters that are none."""
        return [token.value for token in self._model.tokenize(text)]
