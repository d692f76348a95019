"""A rollout server in this process that rounds as one with `--apply columns` does, in another order than the learner."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import httpx
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load

from learner.adapters.exporter import lora_layers
from learner.passes.lora_product import use_one_product
from learner.sync.probe import AdapterWeights
from shared.adapter_file import LORA_A, LORA_B
from shared.weights import PushReceipt, ServerState, WeightVersion
from tests.support.fake_server import FakeServer

RANK = 8


def adapted(base: torch.nn.Module, *, attention: str = "sdpa") -> PeftModel:
    """Return a bfloat16 base with an adapter in float32 on all linear layers, computed in one product."""
    base.set_attn_implementation(attention)
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    use_one_product(model, "default")
    return model.eval()


class RoundingServer(FakeServer):
    """Scores with a model of its own, in bfloat16, with one rounding, sequence by sequence.

    Attributes:
        behind: serves the version that was pushed so many pushes ago; `stuck_at` serves that push for good.
        silent: modules that are left out of every adapter.

    """

    def __init__(self, base: torch.nn.Module, state: ServerState) -> None:
        self.policy = adapted(base, attention="eager")
        super().__init__(self.policy, state)
        self.weights = AdapterWeights(self.policy)
        self.history = defaultdict[str, list[dict[str, torch.Tensor]]](list)
        self.behind, self.stuck_at, self.silent = 0, -1, frozenset[str]()

    def _push(self, run_id: str, request: httpx.Request) -> PushReceipt:
        self.history[run_id].append(load(request.content))
        return super()._push(run_id, request)

    @torch.no_grad()
    def _logprobs(self, sequence: list[int], version: WeightVersion | None) -> list[float]:
        pushes = self.history[version.run_id] if version else []
        tensors: dict[str, Any] = {}
        if pushes:
            served = len(pushes) - 1 - self.behind
            if self.stuck_at >= 0 and "canary" not in version.run_id:
                served = min(served, self.stuck_at)
            tensors = pushes[max(served, 0)]
        for name, layer in lora_layers(self.policy, "default").items():
            a, b = tensors.get(name + LORA_A), tensors.get(name + LORA_B)
            layer.lora_B["default"].weight.zero_()
            if a is not None and b is not None and name not in self.silent:
                layer.lora_A["default"].weight.copy_(a)
                layer.lora_B["default"].weight.copy_(b.float() / layer.scaling["default"])
        logits_TV = self.policy(input_ids=torch.tensor([sequence]), use_cache=False).logits[0, :-1].float()
        picked = torch.log_softmax(logits_TV, -1).gather(-1, torch.tensor(sequence[1:])[:, None])
        return picked[:, 0].tolist()
