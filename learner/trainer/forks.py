"""Rows that hold several sequences: an agent's episode whose conversation has forked.

TRL sees one row for each episode, whose completion holds the first trajectory, and then each other one with its prompt,
which is masked. So every loss counts an episode once, over all the tokens that it sampled, however many trajectories
they lie in. Only the forward pass has to know: here each trajectory becomes a sequence of its own, which sees nothing
of the others, and its logprobs go back to where its tokens lie in the row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from trl import GRPOTrainer

from learner.passes.packing import Part

Logps = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]
#: Key in TRL's batches: int64 [B, K, 2], the parts of each row, padded with -1.
PARTS = "lockstep_parts"


class Forks:
    """Knows the parts of the rows that are being scored.

    Attributes:
        parts: of each row; None: no row has any.
    """

    def __init__(self) -> None:
        self.parts: Sequence[Sequence[Part]] | None = None

    def begin(self, parts: Sequence[Sequence[Part]] | None) -> None:
        """Note the parts of the rows that are scored from now on."""
        self.parts = parts if parts is not None and any(parts) else None

    @contextmanager
    def of_rows(self, rows: Sequence[int]) -> Iterator[None]:
        """Within this context only these rows are scored."""
        parts = self.parts
        self.parts = None if parts is None else [parts[row] for row in rows]
        try:
            yield
        finally:
            self.parts = parts

    def to_tensor(self, device: torch.device) -> torch.Tensor | None:
        """Return the parts for TRL's batch; None if no row has any."""
        if self.parts is None:
            return None
        rows = [torch.tensor(row, dtype=torch.int64).reshape(-1, 2) for row in self.parts]
        return pad_sequence(rows, batch_first=True, padding_value=-1).to(device)

    def see(self, inputs: dict[str, Any]) -> None:
        """Note the parts of a batch whose loss is computed from now on."""
        parts = inputs.get(PARTS)
        self.begin(None if parts is None else [[(s, n) for s, n in row if s >= 0] for row in parts.tolist()])


def score_forks(trainer: GRPOTrainer, forks: Forks) -> None:
    """Score each part of a row as a sequence of its own, where passes are not packed."""
    score = trainer._get_per_token_logps_and_entropies

    def score_parts(
        model: Any,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        **options: Any,
    ) -> Logps:
        if forks.parts is None:
            return score(model, input_ids, attention_mask, logits_to_keep, batch_size=batch_size, **options)
        size, scored = batch_size or len(input_ids), []
        # All sequences of a chunk in one pass: ranks with sharded weights make as many passes as each other.
        for start in range(0, len(input_ids), size):
            rows = slice(start, start + size)
            chunk = _Split(input_ids[rows], attention_mask[rows], logits_to_keep, forks.parts[rows])
            scored.append(chunk.merged(score(model, chunk.ids, chunk.mask, chunk.width, **options)))
        logps, entropies, aux_losses = zip(*scored, strict=True)
        return (
            torch.cat(logps),
            None if entropies[0] is None else torch.cat(entropies),
            None if aux_losses[0] is None else torch.stack(aux_losses).mean(),
        )

    trainer._get_per_token_logps_and_entropies = score_parts


class _Split:
    """The sequences of some rows, as a padded batch.

    Attributes:
        ids, mask: [S, P' + T'].
        width: T'.
    """

    def __init__(self, ids: torch.Tensor, mask: torch.Tensor, width_T: int, parts: Sequence[Sequence[Part]]) -> None:
        width_P = ids.size(1) - width_T
        self._shape, prompts, completions = (len(ids), width_T), [], []
        self._at: list[tuple[int, int, int]] = []  # of each sequence: row, first column, length
        for row, (own, kept) in enumerate(zip(ids, mask.bool(), strict=True)):
            length = int(kept[width_P:].sum())
            of_row = parts[row] if length else ()
            ends = [*(start for start, _ in of_row), length]
            completion = own[width_P:]
            prompts.append(own[:width_P][kept[:width_P]])
            completions.append(completion[: ends[0]])
            self._at.append((row, 0, ends[0]))
            for (start, prompt), end in zip(of_row, ends[1:], strict=True):
                prompts.append(completion[start : start + prompt])
                completions.append(completion[start + prompt : end])
                self._at.append((row, start + prompt, end - start - prompt))
        self.width = max(1, *(len(completion) for completion in completions))
        height = max(len(prompt) for prompt in prompts)
        self.ids = ids.new_zeros(len(prompts), height + self.width)
        self.mask = mask.new_zeros(self.ids.shape)
        for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            columns = slice(height - len(prompt), height + len(completion))
            self.ids[i, columns], self.mask[i, columns] = torch.cat([prompt, completion]), 1

    def merged(self, scored: Logps) -> Logps:
        """Return logprobs and entropies [B, T] of the rows, 0 at prompts and padding; differentiable."""
        logps, entropies, aux_loss = scored
        return self._merge(logps), None if entropies is None else self._merge(entropies), aux_loss

    def _merge(self, values_ST: torch.Tensor) -> torch.Tensor:
        rows, width_T = self._shape
        index = [row * width_T + column + i for row, column, length in self._at for i in range(length)]
        flat = torch.cat([values[:length] for values, (_, _, length) in zip(values_ST, self._at, strict=True)])
        at = torch.tensor(index, device=values_ST.device)
        return values_ST.new_zeros(rows * width_T).index_put((at,), flat).view(rows, width_T)
