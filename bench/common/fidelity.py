"""Served logprobs of sampled tokens beside the learner's own for the same tokens."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from peft import PeftModel
from peft.tuners.lora import Linear

from bench.common.load import Sampled, random_prompts
from learner.passes.lora_product import OneProductLinear, use_one_product
from rollout_server.vllm_compat.versions import batch_invariant_kernels

PROMPT_TOKENS, SEQUENCES, TOKENS = 16, 8, 64
#: Of both LoRA matrices. At rank 32 it changes the base's weights by a twentieth of their size (0.0011 of 0.02).
ADAPTER_STD = 0.01


def fidelity(
    ask: Callable[[list[list[int]], int], Sequence[Sampled]], model: PeftModel, vocab: int, *, adapter: bool
) -> dict[str, float]:
    """Compare served logprobs with the learner's own: with an adapter by PEFT's layers, and as one product, too.

    Args:
        ask: returns what the server samples: so many tokens for each prompt of token ids.
        adapter: whether it samples by the model's adapter, and not by the base.
    """
    prompts = random_prompts(SEQUENCES, vocab, PROMPT_TOKENS, seed=1_000_000)
    found = ask(prompts, TOKENS)
    ids_BT = torch.tensor([prompt + ids for prompt, (ids, _) in zip(prompts, found, strict=True)])
    served_BT = torch.tensor([logprobs for _, logprobs in found], dtype=torch.float64)
    own_BT = own_logprobs(model, ids_BT, adapter=adapter)
    figures = divergence(served_BT, own_BT)
    if adapter:  # about the gap of a server that forgot the adapter
        figures["adapter_effect"] = (own_BT - own_logprobs(model, ids_BT, adapter=False)).abs().mean().item()
        with one_product(model):
            of_product = divergence(served_BT, own_logprobs(model, ids_BT, adapter=True))
        figures |= {f"one_product_{name}": of_product[name] for name in ("mean_abs_gap", "max_abs_gap", "kl_k3")}
    return figures


@contextlib.contextmanager
def one_product(model: PeftModel) -> Iterator[None]:
    """Compute base and adapter as the learner does by default, with one rounding."""
    use_one_product(model, "default")
    try:
        yield
    finally:
        for layer in model.modules():
            if isinstance(layer, OneProductLinear):
                layer.__class__ = Linear


def compute_batch_invariantly() -> torch.library.Library:
    """Let linear layers of this process compute with vLLM's batch-invariant products for as long as the result lives.

    A `rollout-server --deterministic` has the same ones. Attention, norms and rotary embeddings stay transformers' own.
    """
    kernels = batch_invariant_kernels()
    library = torch.library.Library("aten", "IMPL")
    for name in ("linear", "mm", "addmm"):
        library.impl(f"aten::{name}", getattr(kernels, f"{name}_batch_invariant"), "CUDA")
    return library


def divergence(served: torch.Tensor, own: torch.Tensor) -> dict[str, float]:
    """Return mean |served - own| and KL(served || own) of tokens that were sampled from `served`, by two estimators.

    Args:
        served, own: logprobs, of one shape.
    """
    gap = served - own
    k3 = (-gap).expm1() + gap
    return {
        "tokens": gap.numel(),
        "mean_abs_gap": gap.abs().mean().item(),
        "max_abs_gap": gap.abs().max().item(),
        "kl_k1": gap.mean().item(),
        "kl_k3": k3.mean().item(),
    }


@torch.no_grad()
def own_logprobs(model: PeftModel, ids_BT: torch.Tensor, *, adapter: bool) -> torch.Tensor:
    """Return teacher-forced logprobs of the tokens behind the prompts, by the learner's model in its own dtype."""
    model.eval()
    ids_BT = ids_BT.to(model.get_input_embeddings().weight.device)
    with contextlib.nullcontext() if adapter else model.disable_adapter():
        logits_BTV = model(input_ids=ids_BT, use_cache=False).logits[:, PROMPT_TOKENS - 1 : -1].float()
    logprobs_BTV = torch.log_softmax(logits_BTV, dim=-1)
    return logprobs_BTV.gather(-1, ids_BT[:, PROMPT_TOKENS:, None])[..., 0].double().cpu()
