"""Export of a PEFT adapter: names, scaling, rounding, and nothing trainable left out."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load, load_file
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers import AutoModelForCausalLM

from learner.adapters.exporter import AdapterExport, AdapterExporter
from learner.adapters.peft_dir import save_adapter
from shared.adapter_file import header_length, parse_header
from shared.errors import ErrorCode, LockstepError
from shared.weights import WeightVersion

VERSION = WeightVersion(run_id="r", step=0)


def peft_model(model_dir, **lora):
    base = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    model = get_peft_model(base, LoraConfig(**{**settings, **lora}))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def export_adapter(model, version, dtype) -> AdapterExport:
    return AdapterExporter(model, dtype=dtype).export(version)


def decoded(export):
    blob = b"".join(export.pieces())
    header = parse_header(blob[8 : 8 + header_length(blob)])
    assert header.total_bytes == len(blob)
    return header.manifest, load(blob)


@pytest.mark.parametrize(
    "lora",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 8, "layers.1.mlp.up_proj": 2}, "alpha_pattern": {"v_proj": 3}},
        {"target_modules": ["q_proj", "down_proj"]},
    ],
)
def test_delta_equals_pefts_own(model_dir, lora):
    model = peft_model(model_dir, **lora)
    manifest, tensors = decoded(export_adapter(model, VERSION, "float32"))
    layers = {n: m for n, m in model.get_base_model().named_modules() if hasattr(m, "lora_A")}
    assert set(manifest.modules) == set(layers)
    assert len(tensors) == 2 * len(layers)
    for name, layer in layers.items():
        delta = tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"]
        torch.testing.assert_close(delta, layer.get_delta_weight("default"), atol=1e-6, rtol=1e-5)
        assert manifest.modules[name].rank == layer.r["default"]
        assert manifest.modules[name].scaling == layer.scaling["default"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rounded_once_after_scaling(model_dir, dtype):
    model = peft_model(model_dir, lora_alpha=3)
    manifest, tensors = decoded(export_adapter(model, VERSION, dtype))
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    expected = (layer.lora_B["default"].weight.float() * 0.75).to(getattr(torch, dtype))
    assert torch.equal(tensors["model.layers.0.self_attn.q_proj.lora_B.weight"], expected)
    assert manifest.dtype == dtype


def test_same_weights_have_the_same_checksum(model_dir):
    model = peft_model(model_dir)
    first, again = (decoded(export_adapter(model, VERSION, "float32"))[0] for _ in range(2))
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad).view(-1)[0] += 1e-3
    changed = decoded(export_adapter(model, VERSION, "float32"))[0]
    assert first.checksum == again.checksum != changed.checksum


def test_nothing_trainable_is_left_out(model_dir):
    model = peft_model(model_dir)
    model.get_base_model().model.norm.weight.requires_grad_(True)
    with pytest.raises(LockstepError, match=r"norm\.weight"):
        export_adapter(model, VERSION, "float32")


def test_all_servers_are_sent_the_same_copy(model_dir):
    export = export_adapter(peft_model(model_dir), VERSION, "float32")
    one, other = export.pieces(), export.pieces()
    assert [id(piece) for piece in one] == [id(piece) for piece in other]
    kept = bytes(one[1])
    export.flat.zero_()  # as the next export may
    assert bytes(export.pieces()[1]) == kept


def test_second_adapter_stays_at_home(model_dir):
    model = peft_model(model_dir)
    model.add_adapter("ref", LoraConfig(r=2, target_modules=["q_proj"]))
    manifest, _ = decoded(export_adapter(model, VERSION, "float32"))
    assert max(module.rank for module in manifest.modules.values()) == 4
    assert len(manifest.modules) == 14


def test_embeddings_and_merged_adapters_are_refused(model_dir):
    with pytest.raises(LockstepError, match="embedding"):
        export_adapter(peft_model(model_dir, target_modules=["embed_tokens"]), VERSION, "float32")
    model = peft_model(model_dir)
    model.merge_adapter()
    with pytest.raises(LockstepError, match="unmerge"):
        export_adapter(model, VERSION, "float32")


def test_diverged_training_is_said_before_the_push(model_dir):
    model = peft_model(model_dir)
    with torch.no_grad():
        model.get_base_model().model.layers[1].mlp.up_proj.lora_B["default"].weight[0, 0] = float("nan")
    with pytest.raises(LockstepError, match=r"layers\.1\.mlp\.up_proj.*diverged") as caught:
        export_adapter(model, VERSION, "float32")
    assert caught.value.code is ErrorCode.NOT_FINITE


def test_names_are_those_of_the_model_without_wrappers(model_dir, tmp_path):
    model = peft_model(model_dir)

    def saved():
        save_adapter(model, tmp_path, writes=True)
        return load_file(tmp_path / "adapter_model.safetensors")

    plain, tensors = decoded(export_adapter(model, VERSION, "float32"))[0], saved()
    layers = model.get_base_model().model.layers
    for index, layer in enumerate(layers):
        layers[index] = torch.compile(checkpoint_wrapper(layer))
    assert decoded(export_adapter(model, VERSION, "float32"))[0] == plain
    wrapped = saved()
    assert wrapped.keys() == tensors.keys() == get_peft_model_state_dict(peft_model(model_dir)).keys()
    assert all(torch.equal(wrapped[name], tensors[name]) for name in tensors)
