"""Reference logprobs, computed from the adapters that the learner has pushed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import load
from transformers import AutoModelForCausalLM

from learner.sync.tolerance import derived_tolerance
from shared.adapter_file import LORA_A, LORA_B, header_length, parse_header

Version = tuple[int, int]
#: Least tolerance, in nats: between float32 on a server and float32 here.
TOLERANCE = 1e-3
#: How often what rounding explains may be exceeded: that is derived for the largest of some hundred tokens, not of all
#: that a run compares.
_SLACK = 2.0


class Reference:
    """The base model with one pushed adapter at a time merged into its weights, in float32.

    Args:
        pushed: returns the files of pushed adapters, by fence and step.
        dtype: in which servers compute.

    Attributes:
        exact: whether that is float32.
        tolerance: of the sequence seen last, in nats.
    """

    def __init__(self, model: Path, pushed: Callable[[], dict[Version, Path]], dtype: str = "float32") -> None:
        self._model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        self._base = {name: weight.detach().clone() for name, weight in self._model.named_parameters()}
        self._pushed, self._merged = pushed, None
        self._checksums: dict[Version, str] = {}
        self._dtype, self.exact, self.tolerance = dtype, dtype == "float32", TOLERANCE

    @torch.no_grad()
    def logprobs(self, version: Version, sequence: Sequence[int]) -> torch.Tensor | None:
        """Return ln p of tokens 1.. of `sequence` [T - 1]; None if that version is not stored."""
        if self._merged != version and not self._merge(version):
            return None
        logits_TV = self._model(torch.tensor([list(sequence)])).logits[0, :-1]
        derived = derived_tolerance(
            [self._dtype, "float32"],
            layers=self._model.config.num_hidden_layers,
            width=self._model.config.hidden_size,
            logit_std=logits_TV.std(-1).square().mean().sqrt().item(),
            logit_max=logits_TV.abs().max().item(),
        )
        self.tolerance = max(_SLACK * derived, TOLERANCE)
        return logits_TV.log_softmax(-1).gather(1, torch.tensor(list(sequence[1:]))[:, None])[:, 0]

    def checksum(self, version: Version) -> str | None:
        """Return the checksum that the learner announced; None if the version is not stored."""
        if version not in self._checksums and (blob := self._read(version)) is not None:
            self._checksums[version] = parse_header(blob[8 : 8 + header_length(blob)]).manifest.checksum
        return self._checksums.get(version)

    def _read(self, version: Version) -> bytes | None:
        path = self._pushed().get(version)
        try:
            return path.read_bytes() if path else None
        except FileNotFoundError:  # deleted to limit the disk space
            return None

    def _merge(self, version: Version) -> bool:
        blob = self._read(version)
        if blob is None:
            return False
        tensors = load(blob)
        self._merged = None
        for name, weight in self._model.named_parameters():
            module = name.removesuffix(".weight")
            a, b = tensors.get(module + LORA_A), tensors.get(module + LORA_B)
            weight.copy_(self._base[name] if a is None or b is None else self._base[name] + b @ a)
        self._merged = version
        return True
