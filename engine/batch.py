"""One step's tokens, laid flat: many sequences, each with some tokens to compute over the positions it has cached."""

from __future__ import annotations

from collections.abc import Sequence as List
from dataclasses import dataclass, replace

import numpy as np
import torch

from trichord.cache import PAGE_SIZE
from trichord.scheduler import Chunk


@dataclass(frozen=True)
class Batch:
    """T tokens of S sequences; the tensors are what `Operations.attention` and `rotary_and_cache` describe.

    `logit_rows` (R,) are the tokens whose logits are wanted. `state_slots` (S,) int64 hold the sequences' recurrent
    states; those of `new_slots` begin with this step.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    query_starts: torch.Tensor
    context_lengths: torch.Tensor
    page_tables: torch.Tensor
    logit_rows: torch.Tensor
    state_slots: torch.Tensor
    new_slots: torch.Tensor
    max_query: int

    @classmethod
    def of(cls, chunks: List[Chunk]) -> Batch:
        """Lays out the chunks of a step, on the CPU. A token that is on its way is 0 here."""
        ids, positions, slots, logit_rows = [], [], [], []
        start = 0
        for chunk in chunks:
            sequence = chunk.sequence
            span = np.arange(chunk.start, chunk.end)
            pages = np.asarray(sequence.pages, np.int64)
            known = sequence.tokens[chunk.start : chunk.end]
            ids.append(np.asarray(known + [0] * (chunk.count - len(known)), np.int64))
            positions.append(span)
            slots.append(pages[span // PAGE_SIZE] * PAGE_SIZE + span % PAGE_SIZE)
            start += chunk.count
            logit_rows.append(np.arange(start - chunk.logit_rows, start))
        counts = [chunk.count for chunk in chunks]
        tables = np.zeros((len(chunks), max(len(chunk.sequence.pages) for chunk in chunks)), np.int32)
        for row, chunk in zip(tables, chunks, strict=True):
            row[: len(chunk.sequence.pages)] = chunk.sequence.pages
        return cls(
            token_ids=torch.from_numpy(np.concatenate(ids)),
            positions=torch.from_numpy(np.concatenate(positions)),
            slots=torch.from_numpy(np.concatenate(slots)),
            query_starts=torch.tensor([0, *np.cumsum(counts)], dtype=torch.int32),
            context_lengths=torch.tensor([chunk.end for chunk in chunks], dtype=torch.int32),
            page_tables=torch.from_numpy(tables),
            logit_rows=torch.from_numpy(np.concatenate(logit_rows)),
            state_slots=torch.tensor([chunk.sequence.slot for chunk in chunks]),
            new_slots=torch.tensor([chunk.sequence.slot for chunk in chunks if chunk.start == 0], dtype=torch.int64),
            max_query=max(counts),
        )

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device."""
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        return replace(self, **{name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()})
