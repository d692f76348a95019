"""The probe: token sequences that the learner's own model and every server score."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch.distributed.tensor import DTensor

from learner.adapters.exporter import active_adapter, lora_layers
from learner.servers.pool import ServerPool, serve_base
from learner.utils.distributed import OnMain, gathered, on_every_rank, on_one_rank, overwrite, reshard
from learner.utils.gpu_memory import free_bytes
from shared.rollouts import GenerateRequest, Prompt
from shared.sampling import SamplingParams

#: Sequences of the probe, each the end of a prompt and a completion; in 16 bits more of them, because there a step at a
#: small learning rate shows in their number only.
SEQUENCES, SEQUENCES_IN_16_BITS = 8, 32
PROMPT_TOKENS, COMPLETION_TOKENS = 64, 24
#: Logits of one pass: half a gigabyte with what is computed of them, BYTES_PER_LOGIT each.
LOGITS, BYTES_PER_LOGIT = 2**25, 16
#: Large vocabularies would leave passes of one sequence: a GPU with room has up to TOGETHER in this share of it, with
#: what the canary's backward passes keep of every layer: values per token and unit of width, rounded up from 17 of
#: Korthikanti et al. 2022 (arXiv:2205.05198). Passes without gradient keep nothing, and take all sequences if they fit.
SHARE_OF_FREE, TOGETHER, KEPT_PER_LAYER = 1 / 4, 8, 20
#: Tokens at the end of the one with images that are compared: all of them text.
SEEN_TOKENS = 8
#: Tokens at the end of the long sequence that are compared.
LONG_TOKENS = 128


@dataclass(frozen=True)
class LearnerLogprobs:
    """The learner's side of a measurement.

    Attributes:
        values: logprobs of all probe tokens, float64 [N].
        logit_std: rms over probe positions of the logits' standard deviation over the vocabulary.
        logit_max: largest |logit|.
    """

    values: np.ndarray
    logit_std: float
    logit_max: float


@dataclass(frozen=True)
class SeenText:
    """A prompt with images, and what a forward pass takes beside its ids.

    Attributes:
        token_ids: an `ImagePrompt` [P], which ends with text.
        inputs: pixels and their places; of each token, [1, P].
    """

    token_ids: list[int]
    inputs: dict[str, torch.Tensor]


@dataclass(frozen=True)
class ProbeText:
    """What is scored.

    Attributes:
        sequences: token ids [N][T]; each of two tokens or more.
        long: one sequence as long as prompt and completion may be; None: no longer than the others.
        decoded: sequence -> logprobs of its last tokens, as a server returned them when it drew these from its base.
        seen: with images; None: the model sees none, or the servers' context has no room for it.
    """

    sequences: list[list[int]]
    long: list[int] | None = None
    decoded: dict[int, list[float | None]] = field(default_factory=dict)
    seen: SeenText | None = None


class Probe:
    """Sequences, scored by the learner's model.

    Args:
        sequences: token ids [N][T].
        last: score this many tokens at the end of each; None: all but the first.
        inputs: more arguments of a forward pass of one sequence.
    """

    def __init__(
        self,
        model: PeftModel,
        sequences: Sequence[list[int]],
        *,
        last: int | None = None,
        inputs: Mapping[str, torch.Tensor] | None = None,
        on_main: OnMain = on_one_rank,
    ) -> None:
        self.model, self.sequences, self._on_main = model, list(sequences), on_main
        self._inputs = inputs or {}
        self._scored = [min(last or len(tokens), len(tokens) - 1) for tokens in self.sequences]
        config = model.config.get_text_config()
        kept = KEPT_PER_LAYER * config.num_hidden_layers * config.hidden_size * model.dtype.itemsize
        free = min(on_every_rank(lambda: free_bytes(self._device)))
        logits = max(self._scored) * config.vocab_size
        longest = max(map(len, self.sequences))
        self._passes = self._divided(sequences_at_once(logits, longest * kept, free, TOGETHER))
        self._passes_without_gradient = self._divided(sequences_at_once(logits, 0, free, SEQUENCES_IN_16_BITS))
        #: Of every scored token: its sequence, and its position there.
        self.places = [
            (row, t)
            for row, (tokens, count) in enumerate(zip(self.sequences, self._scored, strict=True))
            for t in range(len(tokens) - count, len(tokens))
        ]
        self.rows = np.array([row for row, _ in self.places])

    def _divided(self, at_once: int) -> list[range]:
        rows = range(len(self.sequences))
        return [rows[start : start + at_once] for start in range(0, len(rows), at_once)]

    @property
    def _device(self) -> torch.device:
        return self.model.get_input_embeddings().weight.device

    def picked(self, served: Sequence[Sequence[float | None]]) -> np.ndarray:
        """Return the scored tokens' logprobs, float64 [N], of those of all tokens but the first."""
        return np.array([served[row][t - 1] for row, t in self.places], dtype=np.float64)

    def logprobs(self, *, adapter: bool = True) -> LearnerLogprobs:
        """Score with the learner's model, teacher-forced, with or without its adapter. Collective.

        In eval mode, so without dropout, but under the training's autocast if it has one; log-softmax in float32.
        """
        values, variances, largest = [], 0.0, 0.0
        with self._evaluated(), torch.no_grad(), nullcontext() if adapter else self._without_adapter():
            for rows in self._passes_without_gradient:
                logits_NV, logprobs_N = self._score(rows)
                values.append(logprobs_N.double().cpu().numpy())
                variances += logits_NV.var(dim=-1).sum().item()
                largest = max(largest, logits_NV.abs().max().item())
            reshard(self.model)
        std = math.sqrt(variances / len(self.places))
        # Rank 0's figures for all, so that all draw the same conclusions.
        return self._on_main(lambda: LearnerLogprobs(np.concatenate(values), std, largest))

    def sensitivities(self, weights_N: np.ndarray, parameters: Sequence[torch.Tensor]) -> np.ndarray:
        """Return d(sum of weights x logprobs) / d(scale of a parameter at 1), [passes, P]."""
        found = []
        with self._evaluated(), torch.enable_grad():
            for rows in self._passes:
                logprobs_N = self._score(rows)[1]
                weights = torch.from_numpy(weights_N[np.isin(self.rows, rows)]).to(logprobs_N)
                gradients = torch.autograd.grad(logprobs_N @ weights, parameters)
                products = [(g.float() * p.float()).sum() for g, p in zip(gradients, parameters, strict=True)]
                found.append(torch.stack(products).detach().cpu().numpy())
        return np.stack(found)

    def _score(self, rows: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the logits [N, V] that predict the scored tokens of some sequences in one pass, and logprobs [N].

        Shorter ones are filled up at their end, which tokens before it do not see.
        """
        longest = max(len(self.sequences[row]) for row in rows)
        ids = [
            [*self.sequences[row], *[self.sequences[row][-1]] * (longest - len(self.sequences[row]))] for row in rows
        ]
        ids_BT = torch.tensor(ids, device=self._device)
        firsts = [len(self.sequences[row]) - self._scored[row] for row in rows]
        first = min(firsts)
        kept: dict[str, Any] = {} if first == 1 else {"logits_to_keep": longest - first + 1}
        kept |= {name: value.to(ids_BT.device) for name, value in self._inputs.items()}
        logits_BTV = self.model(input_ids=ids_BT, use_cache=False, **kept).logits[:, -(longest - first) - 1 : -1]
        positions = [(b, t) for b, row in enumerate(rows) for r, t in self.places if r == row]
        b_N, t_N = torch.tensor(positions, device=ids_BT.device).T
        logits_NV = logits_BTV[b_N, t_N - first].float()
        return logits_NV, torch.log_softmax(logits_NV, dim=-1).gather(-1, ids_BT[b_N, t_N][:, None])[:, 0]

    @contextmanager
    def _evaluated(self) -> Iterator[None]:
        was_training = self.model.training
        self.model.eval()
        try:
            yield
        finally:
            self.model.train(was_training)

    @contextmanager
    def _without_adapter(self) -> Iterator[None]:
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        with self.model.disable_adapter():
            # PEFT freezes it meanwhile: FSDP2, in its first forward, would note no dtype for the gradients to come.
            for parameter in trained:
                parameter.requires_grad_()
            yield


def sequences_at_once(logits: int, kept: int, free: int, most: int) -> int:
    """Return how many sequences are scored in a pass.

    Args:
        logits: of a sequence.
        kept: bytes that a backward pass keeps of it.
        free: bytes of the GPU; 0: on a CPU.
        most: that room on a GPU is used for.
    """
    more = int(SHARE_OF_FREE * free) // (2 * BYTES_PER_LOGIT * logits + kept)  # twice: gradients
    return max(1, LOGITS // logits, min(more, most))


class AdapterWeights:
    """A and B of the active adapter: remembered, changed for a while, and put back."""

    def __init__(self, model: PeftModel) -> None:
        adapter = active_adapter(model)
        layers = lora_layers(model, adapter)
        self.modules = list(layers)
        self._adapter, self._layers = adapter, list(layers.values())
        self.a = [layer.lora_A[adapter].weight for layer in layers.values()]
        self.b = [layer.lora_B[adapter].weight for layer in layers.values()]

    @property
    def sharded(self) -> bool:
        """Whether a rank holds only a part of them."""
        return any(isinstance(weight, DTensor) or hasattr(weight, "ds_id") for weight in self.b)

    def copied(self) -> list[torch.Tensor]:
        """Return copies of all A, then all B; of this rank's shards. Collective."""
        with gathered([*self.a, *self.b]):
            return [weight.detach().clone() for weight in (*self.a, *self.b)]

    @contextmanager
    def kept(self) -> Iterator[list[torch.Tensor]]:
        """Put all of them back at the end of the block, which is given the copies. Collective."""
        copies = self.copied()
        try:
            yield copies
        finally:
            self.write(copies)

    @contextmanager
    def held_in(self, dtype: torch.dtype) -> Iterator[None]:
        """Hold the adapter as servers do in the block: a step may be less than what that rounds away. Collective."""
        if not self._loses_by(dtype):
            yield
            return
        with self.kept() as exact:
            self.write(self.rounded(exact, dtype))
            yield

    def _loses_by(self, dtype: torch.dtype) -> bool:
        """Return whether `dtype` is coarser than what they are kept in."""
        return any(torch.finfo(weight.dtype).eps < torch.finfo(dtype).eps for weight in (*self.a, *self.b))

    def rounded(self, values: Sequence[torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
        """Return `values`, in the form of `copied`, as servers hold them: A, and B times its scaling, in `dtype`."""
        if not self._loses_by(dtype):
            return list(values)
        # Of B that counts for nothing (lora_alpha=0) any will do.
        scalings = [*([1.0] * len(self.a)), *(float(layer.scaling[self._adapter]) or 1.0 for layer in self._layers)]
        return [
            ((value.float() * scaling).to(dtype).float() / scaling).to(value.dtype)
            for value, scaling in zip(values, scalings, strict=True)
        ]

    def write(self, values: Sequence[torch.Tensor]) -> None:
        """Set them to `values`, in the form of `copied`. Collective."""
        weights = [*self.a, *self.b]
        with torch.no_grad(), gathered(weights, written=True):
            for weight, value in zip(weights, values, strict=True):
                weight.copy_(value)

    def write_b(self, values: Sequence[torch.Tensor]) -> None:
        """Set every B to unsharded values. Collective."""
        with torch.no_grad(), gathered(self.b, written=True):
            for weight, value in zip(self.b, values, strict=True):
                overwrite(weight, value)

    def scale_b(self, factors: Sequence[float]) -> None:
        """Multiply every B. Collective."""
        with torch.no_grad(), gathered(self.b, written=True):
            for weight, factor in zip(self.b, factors, strict=True):
                weight.mul_(factor)


def make_probe(pool: ServerPool, prompts: list[list[int]], longest: int, seen: SeenText | None = None) -> ProbeText:
    """Take ends of the first distinct prompts, each with a sampled completion: text like the policy will see.

    Args:
        prompts: token ids [B][P].
        longest: tokens that prompt and completion may have together.

    Returns:
        At most SEQUENCES of them, or SEQUENCES_IN_16_BITS; prompts only where the servers' context has no room for a
        completion.
    """
    replica = pool.available()[0]
    most = SEQUENCES if all(r.known.dtype == "float32" for r in pool.up()) else SEQUENCES_IN_16_BITS
    distinct = list(dict.fromkeys(tuple(prompt[-PROMPT_TOKENS:]) for prompt in prompts))[:most]
    context = min(r.known.max_model_len for r in pool.up())
    room = context - max(map(len, distinct))
    sequences, decoded = [list(prompt) for prompt in distinct], dict[int, list[float | None]]()
    of_base = serve_base([replica.known])
    if room >= 1:
        request = GenerateRequest(
            prompts=[Prompt(token_ids=list(prompt), seed=row) for row, prompt in enumerate(distinct)],
            sampling=SamplingParams(temperature=1.0, max_tokens=min(COMPLETION_TOKENS, room)),
            policy="base" if of_base else "latest",
        )
        groups = replica.client.generate(request).groups
        sequences = [[*group.prompt_token_ids, *group.completions[0].token_ids] for group in groups]
        if of_base:
            decoded = {row: group.completions[0].uncut_logprobs for row, group in enumerate(groups)}
    text = [token for sequence in sequences for token in sequence]
    length = min(longest, context - 1)  # scoring draws one token more
    repeated = (text * (-(-length // len(text))))[:length]
    long = repeated if length > max(map(len, sequences)) else None
    if seen and len(seen.token_ids) >= context:
        seen = None
    decoded = decoded if all(len(s) > 1 for s in sequences) else {}
    return ProbeText([s for s in sequences if len(s) > 1], long, decoded, seen)
