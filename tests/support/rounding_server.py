"""A rollout server in this process that rounds as `--apply columns` does, in another order than the learner."""

from __future__ import annotations

import copy
from collections import defaultdict
from typing import Any

import httpx
import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load
from transformers import Qwen3Config, Qwen3ForCausalLM

from learner.adapters.exporter import lora_layers
from learner.passes.lora_product import use_one_product
from learner.run_dir.lease import Lease
from learner.servers.client import RolloutClient
from learner.servers.pool import ServerPool
from learner.sync.probe import COMPLETION_TOKENS, PROMPT_TOKENS, SEQUENCES_IN_16_BITS
from learner.sync.proof import SyncProof
from learner.sync.publisher import Publisher
from shared.adapter_file import LORA_A, LORA_B
from shared.images import Image
from shared.weights import BaseFingerprint, PushReceipt, ServerState, WeightVersion
from tests.support.fake_server import FakeServer

VOCABULARY, RANK = 256, 8
#: Of the probe of a training.
SEQUENCES, TOKENS = SEQUENCES_IN_16_BITS, PROMPT_TOKENS + COMPLETION_TOKENS
#: Learning rate -> movement of one optimizer step over the noise of the pair, both rms: SmolLM2-135M moves by 0.05
#: nats a step at 1e-5, and vLLM's and transformers' logprobs of its base differ by 0.078.
RATIOS = {1e-4: 6.4, 1e-5: 0.64, 1e-6: 0.064}


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
        behind: serves the version that was pushed so many pushes ago.
        stuck_at: serves this push, and none after it; None: all.
        silent: modules that are left out of every adapter.
        loses: modules of which nothing is left where their B is smaller than this (rms), as rounding does.
    """

    def __init__(self, base: torch.nn.Module, state: ServerState) -> None:
        self.policy = adapted(base, attention="eager")
        super().__init__(self.policy, state)
        self.history = defaultdict[str, list[dict[str, torch.Tensor]]](list)
        self.behind, self.stuck_at, self.silent = 0, None, frozenset[str]()
        self.loses: dict[str, float] = {}

    def quantize(self, blur: float) -> None:
        """Change every weight of the base by noise of relative rms `blur`, as a coarse grid does."""
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for layer in lora_layers(self.policy, "default").values():
                noise = torch.randn(layer.base_layer.weight.shape, generator=generator)
                layer.base_layer.weight.add_((noise * blur * layer.base_layer.weight.float().std()).bfloat16())
        self.state = self.state.model_copy(update={"quantization": "fp8"})

    def _push(self, run_id: str, request: httpx.Request) -> PushReceipt:
        self.history[run_id].append(load(request.content))
        return super()._push(run_id, request)

    @torch.no_grad()
    def _logprobs(self, sequence: list[int], images: list[Image], version: WeightVersion | None) -> list[float]:
        pushes, tensors = (self.history[version.run_id] if version else []), dict[str, Any]()
        if pushes:
            served = max(len(pushes) - 1 - self.behind, 0)
            tensors = pushes[served if self.stuck_at is None else min(served, self.stuck_at)]
        for name, layer in lora_layers(self.policy, "default").items():
            layer.lora_B["default"].weight.zero_()
            loud = tensors and float(tensors[name + LORA_B].float().square().mean().sqrt()) >= self.loses.get(name, 0.0)
            if loud and name not in self.silent:
                layer.lora_A["default"].weight.copy_(tensors[name + LORA_A])
                layer.lora_B["default"].weight.copy_(tensors[name + LORA_B].float() / layer.scaling["default"])
        logits_TV = self.policy(input_ids=torch.tensor([sequence]), use_cache=False).logits[0, :-1].float()
        picked = torch.log_softmax(logits_TV, -1).gather(-1, torch.tensor(sequence[1:])[:, None])
        return picked[:, 0].tolist()


class Pair:
    """A learner in bfloat16 and a server of its base, with a proof between them.

    Args:
        layers: of seven modules each.
        quantized: the server's base differs by noise of so much (relative rms), and is said to be quantized.
        state: changes to the server's.
    """

    def __init__(self, *, layers: int = 2, seed: int = 0, quantized: float = 0.0, **state: Any) -> None:
        torch.manual_seed(seed)
        config = Qwen3Config(
            vocab_size=VOCABULARY,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            initializer_range=0.05,
            tie_word_embeddings=True,
        )
        base = Qwen3ForCausalLM(config).to(torch.bfloat16)
        base.get_input_embeddings().weight.data.normal_(std=0.3)  # logits that spread as a trained model's
        self.model = adapted(copy.deepcopy(base))
        unknown = BaseFingerprint(weights=None, tokenizer=None, chat_template=None)
        known = {
            "epoch": "e1",
            "ready": True,
            "model": "m",
            "base": unknown,
            "vllm_version": "0.32.0",
            "device": "cpu",
            "dtype": "bfloat16",
            "lora_dtype": "bfloat16",
            "max_model_len": 256,
            "max_lora_rank": 16,
            "workers": 1,
            "slots_per_run": 2,
            "max_runs": 2,
            "logprobs_mode": "processed_logprobs",
            "apply": "columns",
            **state,
        }
        self.server = RoundingServer(base, ServerState(**known))
        if quantized:
            self.server.quantize(quantized)
        self.client = RolloutClient("http://fake", transport=self.server.transport)
        self.generator = torch.Generator().manual_seed(seed)
        self.sequences = torch.randint(0, VOCABULARY, (SEQUENCES, TOKENS), generator=self.generator).tolist()
        self.texts = torch.randint(0, VOCABULARY, (4, 4, 32), generator=self.generator)
        self.steps = 0
        pool = ServerPool.of(self.client)
        self.proof = SyncProof(pool, self.model, self.sequences, one_product=True)
        self.publisher = Publisher(pool, self.model, Lease("r", "s", 0))

    def begin(self, ratio: float) -> None:
        """Prove the base and push the initial adapter; steps will move the probe by `ratio` times the noise."""
        noise = self.proof.check_base()[0].rms_mismatch
        self.proof.check(self.publisher.push(0).version)
        self.proof.keep_step()
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.0)
        start = self.proof.weights.copied()
        self.step()
        moved = self.proof._last_step()  # enlarged, so that it is not the noise that is seen
        self.proof.weights.write(start)
        self.proof.keep_step()
        # AdamW's first step is as long as the learning rate, and B = 0 makes what it moves linear in it.
        rate = 1e-3 * ratio * noise / np.sqrt(np.mean(moved**2))
        self.optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)

    def step(self) -> None:
        """Make an optimizer step, on one of four texts in turn."""
        ids = self.texts[self.steps % len(self.texts)]
        self.steps += 1
        self.model(input_ids=ids, labels=ids).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def train(self, first: int, last: int) -> None:
        """Make steps `first` to `last`, and push and prove each."""
        for number in range(first, last + 1):
            self.step()
            self.proof.check(self.publisher.push(number).version)
            self.proof.keep_step()
