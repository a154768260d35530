"""A step that has been given to the device: what will come of it, before anybody waits for that."""

from __future__ import annotations

from collections.abc import Sequence as List
from dataclasses import dataclass

import torch

from trichord.sampling import Drawn
from trichord.scheduler import Chunk


@dataclass(frozen=True)
class Launched:
    """The chunks of a step, and the results of each (see `Chunk.logit_rows`).

    Those of `drawing` are followed by a token that is being `drawn` from their logits (rows, vocabulary).
    """

    chunks: List[Chunk]
    parts: List[torch.Tensor]
    drawing: List[Chunk]
    logits: torch.Tensor | None
    drawn: Drawn | None

    @classmethod
    def of(cls, chunks: List[Chunk], parts: List[torch.Tensor], ahead: int = 0) -> Launched:
        """Begins to draw. Sequences have `ahead` more tokens than the host knows."""
        drawing = [chunk for chunk in chunks if chunk.draws]
        if not drawing:
            return cls(chunks, parts, drawing, None, None)
        logits = torch.stack([part[-1] for chunk, part in zip(chunks, parts, strict=True) if chunk.draws])
        drawn = Drawn(logits.clone(), [chunk.sequence for chunk in drawing], ahead)
        return cls(chunks, parts, drawing, logits, drawn)

    @property
    def is_void(self) -> bool:
        """Whether nobody needs the results any more."""
        return all(chunk.sequence.finished for chunk in self.chunks)

    @property
    def leads_on(self) -> bool:
        """Whether the next step needs nothing of this one but the tokens that it draws, wherever they are."""
        sequences = [chunk.sequence for chunk in self.chunks]
        return len(self.drawing) == len(sequences) > 0 and not any(
            sequence.params.penalizes or sequence.owes_prompt_results for sequence in sequences
        )
