"""Tries one architecture: pushes an adapter into an engine in this process, samples, and compares with Hugging Face.

python -m tests.integration.support.try_model ROW adapter|columns|merge|images FOLDER    # writes FOLDER/found.json
"""

from __future__ import annotations

import asyncio
import copy
import json
import os
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from shared.messages import one_line
from tests.support.architectures import ARCHITECTURES, make_model
from tests.support.png import noise
from tests.support.tiny_vision_model import make_tiny_vision_model

ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}
PROMPTS = [[5, 17, 99, 200, 31, 7], [300, 301, 4, 8, 15, 16, 23, 42]]
#: The way that is `adapter` with a picture in each prompt.
IMAGES = "images"


@dataclass
class Found:
    """What has been found out about a row.

    Attributes:
        targets: kinds of layers that were adapted.
        gap, base_gap: largest |served - own| logprob of sampled tokens, with the adapter and without, in nats.
        moved: how far the adapter moves them.
        other_image: how far they are from those with the other prompt's picture; None: there is none.
        refused: the words, where it does not work.
    """

    targets: list[str] = field(default_factory=list)
    gap: float = float("inf")
    base_gap: float = float("inf")
    moved: float = 0.0
    other_image: float | None = None
    refused: str = ""
    seconds: float = 0.0

    def agrees(self, row: str) -> bool:
        """Return whether both sides compute the same: to 1e-4 in float32; by far less than the adapter moves else."""
        tolerance = 1e-4 if ARCHITECTURES[row].dtype == "float32" else 0.15 * self.moved
        sees = self.other_image is None or self.other_image > 0.01
        return max(self.gap, self.base_gap) < tolerance and self.moved > 0.5 and sees


@dataclass
class Asked:
    """A prompt, as both sides take it.

    Attributes:
        engine_input: of vLLM.
        inputs: of a forward pass, beside ids.
    """

    token_ids: list[int]
    engine_input: dict[str, Any]
    inputs: dict[str, Any] = field(default_factory=dict)


def main(row: str, apply: str, folder: Path) -> None:
    """Write what is found to FOLDER/found.json."""
    found, began = Found(), time.perf_counter()
    try:
        model = folder / "model"
        made = make_tiny_vision_model(model, ARCHITECTURES[row].sees) if apply == IMAGES else make_model(row, model)
        _try(row, apply, made, found)
    except Exception as error:
        found.refused = one_line(error)
        raise
    finally:
        found.seconds = time.perf_counter() - began
        (folder / "found.json").write_text(json.dumps(asdict(found)))


def read(folder: Path) -> Found:
    """Return what `main` has written."""
    return Found(**json.loads((folder / "found.json").read_text()))


def _try(row: str, apply: str, model: Path, found: Found) -> None:
    import torch
    from transformers import AutoConfig

    policy = _policy(row, model, AutoConfig.from_pretrained(model))
    from learner.adapters.exporter import AdapterExporter
    from shared.weights import WeightVersion

    export = AdapterExporter(policy, dtype=ARCHITECTURES[row].dtype).export(WeightVersion(run_id="tried", step=1))
    found.targets = sorted({name.rpartition(".")[2] for name in export.manifest.modules})
    engine, worker = _engine(row, apply, model)
    from rollout_server.vllm_compat import lora_slots, versions

    for module in policy.modules():  # vLLM's Transformers backend changes transformers' own classes in this process
        module.do_not_compile = True
    asked = _pictures(engine, model) if apply == IMAGES else [Asked(ids, {"prompt_token_ids": ids}) for ids in PROMPTS]
    undrawn = versions.media_tokens(engine.model_config)
    with torch.inference_mode():
        if apply == "merge":
            from rollout_server.worker.merged_writer import MergedWriter

            writer: Any = MergedWriter(worker)
        else:
            from rollout_server.worker.slot_writer import SlotWriter

            lora_slots.pin_empty_adapter(worker, 1, 8)
            writer = SlotWriter(worker)
        writer.check(export.layout)
        writer.buffer(export.layout).copy_(export.flat.view(torch.uint8))
        writer.write(1, export.layout, export.manifest.checksum)
        if apply == "merge":
            writer.apply(export.manifest.checksum)
    sampled = _sample(engine, asked, undrawn, None if apply == "merge" else versions.lora_request("slot-1", 1))
    found.gap = _gap(policy, asked, undrawn, sampled)
    if apply == IMAGES:
        found.other_image = _gap(policy, asked[::-1], undrawn, sampled)
    with policy.disable_adapter():
        found.moved = _gap(policy, asked, undrawn, sampled)
        with torch.inference_mode():
            if apply == "merge":
                writer.apply(None)
        engine.reset_prefix_cache()
        found.base_gap = _gap(policy, asked, undrawn, _sample(engine, asked, undrawn, None))


def _policy(row: str, model: Path, config: Any) -> Any:
    """Load a model as `learner train` does, with an adapter on all linear layers that can be served."""
    import torch
    from peft import LoraConfig, get_peft_model

    from learner.adapters.exporter import active_adapter, lora_layers
    from learner.adapters.lora_rules import caps_logits, check_model, check_targets
    from learner.adapters.target_modules import check_target_modules, model_class

    attention = "eager" if caps_logits(config) else None
    served = getattr(
        torch, ARCHITECTURES[row].dtype
    )  # values that both sides can hold; all is computed in float32 here
    base = model_class(config).from_pretrained(model, dtype=served, attn_implementation=attention).float()
    check_model(base.config)
    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        policy = get_peft_model(base, check_target_modules(lora, config)).eval()
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.copy_(parameter.to(served))
    modules = lora_layers(policy, active_adapter(policy))
    check_targets(modules, mixture_of_experts=True)
    return policy


def _engine(row: str, apply: str, model: Path) -> tuple[Any, Any]:
    """Start an engine in this process with the server's own flags; return it and its worker."""
    import torch
    from vllm.model_executor.models import registry
    from vllm.v1.engine.llm_engine import LLMEngine

    from rollout_server.cli import resolve

    torch._dynamo.config.disable = True  # of vLLM's sampler, for which it runs a C++ compiler
    registry._run_in_subprocess = lambda look: look()  # which would import vLLM anew
    length = "256" if apply == IMAGES else "64"
    flags = ["--max-model-len", length, "--max-num-seqs", "2", "--max-num-batched-tokens", length]
    flags += ["--max-lora-rank", "8"]
    flags += [
        "--slots-per-run",
        "2",
        "--dtype",
        ARCHITECTURES[row].dtype,
        "--enforce-eager",
        "--distributed-executor-backend",
        "uni",
    ]
    if apply == IMAGES:
        flags += ["--max-images", "1"]
        apply = "adapter"
    elif ARCHITECTURES[row].parts is not None:
        flags.append("--language-model-only")
    _, config, _ = resolve([str(model), "--apply", apply, *flags])
    engine = LLMEngine.from_vllm_config(config)
    return engine, engine.model_executor.driver_worker.worker


def _pictures(engine: Any, model: Path) -> list[Asked]:
    """Return two prompts that differ in their pictures alone, processed by each side for itself."""
    import transformers

    from rollout_server.vllm_compat import vision
    from shared.image_processors import do_without_videos

    do_without_videos(transformers)
    processor = transformers.AutoProcessor.from_pretrained(model)
    vision.take_our_images(engine)
    asked = []
    for seed in (1, 2):
        picture = noise(seed)
        parts = [{"type": "image", "image": picture}, {"type": "text", "text": "What is it?"}]
        template = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
        made = dict(processor.apply_chat_template([[{"role": "user", "content": parts}]], **template))
        ids = made.pop("input_ids")[0].tolist()
        del made["attention_mask"]
        seen = asyncio.run(vision.engine_prompt(engine, f"prompt {seed}", ids, [picture]))
        assert seen["prompt_token_ids"] == ids
        asked.append(Asked(ids, seen, made))
    return asked


def _sample(engine: Any, asked: list[Asked], undrawn: list[int], lora: Any) -> list[tuple[list[int], list[float]]]:
    """Return completions and their served logprobs, in the order of the prompts.

    Args:
        undrawn: tokens that are never drawn.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    vocabulary = range(engine.model_config.get_vocab_size())
    params = SamplingParams(
        max_tokens=12,
        temperature=1.0,
        logprobs=0,
        ignore_eos=True,
        output_kind=RequestOutputKind.FINAL_ONLY,
        allowed_token_ids=sorted(set(vocabulary) - set(undrawn)) if undrawn else None,
    )
    for number, prompt in enumerate(asked):
        engine.add_request(str(number), prompt.engine_input, params, lora_request=lora)
    sampled = {}
    while engine.has_unfinished_requests():
        for output in engine.step():
            tokens, logprobs = list(output.outputs[0].token_ids), output.outputs[0].logprobs
            served = [step[token].logprob for token, step in zip(tokens, logprobs, strict=True)]
            sampled[int(output.request_id.partition("-")[0])] = tokens, served
    return [sampled[number] for number in range(len(asked))]


def _gap(policy: Any, asked: list[Asked], undrawn: list[int], sampled: list[tuple[list[int], list[float]]]) -> float:
    import torch

    # In float32 transformers is off by more than 1e-4 behind an encoder of images, and vLLM by less than 1e-5.
    exact = copy.deepcopy(policy).double() if asked[0].inputs else policy
    largest = 0.0
    for prompt, (completion, served) in zip(asked, sampled, strict=True):
        ids = torch.tensor([prompt.token_ids + completion])
        inputs = {
            name: torch.nn.functional.pad(value, (0, len(completion)))
            if name.endswith("token_type_ids")
            else value.to(exact.dtype)
            if value.is_floating_point()
            else value
            for name, value in prompt.inputs.items()
        }
        with torch.no_grad():
            logits_TV = exact(input_ids=ids, **inputs).logits[0, len(prompt.token_ids) - 1 : -1]
        logits_TV[:, undrawn] = -torch.inf
        own = logits_TV.log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0]
        largest = max(largest, (own - torch.tensor(served)).abs().max().item())
    return largest


if __name__ == "__main__":
    os.environ.update(ENVIRONMENT)
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
