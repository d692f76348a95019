from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForImageTextToText, PretrainedConfig

from learner.adapters.peft_dir import trainable_adapter
from learner.adapters.target_modules import check_target_modules
from shared.errors import InvalidRequest, UnsupportedAdapter
from shared.module_names import is_of_encoder
from tests.support.architectures import ARCHITECTURES, make_model


@pytest.fixture(scope="module")
def multimodal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("Qwen2.5-VL", tmp_path_factory.mktemp("model"))


def _adapted(model: Path, targets: list[str] | str, **settings: object) -> set[str]:
    lora = check_target_modules(LoraConfig(r=4, target_modules=targets, **settings), AutoConfig.from_pretrained(model))
    policy = get_peft_model(AutoModelForImageTextToText.from_pretrained(model), lora)
    return {
        name.partition(".lora_A")[0].split("base_model.model.")[1]
        for name, _ in policy.named_parameters()
        if ".lora_A" in name
    }


@pytest.mark.parametrize(
    "target",
    ["up_proj", "mlp.up_proj", "layers.0.mlp.up_proj", "language_model.layers.0.mlp.up_proj"],
)
def test_names_hit_the_same_modules_of_a_language_model_as_in_peft(multimodal: Path, target: str) -> None:
    adapted = _adapted(multimodal, [target, "model.language_model.layers.1.self_attn.q_proj"])
    assert "model.language_model.layers.0.mlp.up_proj" in adapted
    assert "model.language_model.layers.1.self_attn.q_proj" in adapted
    assert all(name.endswith((target, "layers.1.self_attn.q_proj")) for name in adapted)


def test_names_of_an_encoder_are_refused(multimodal: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"the model has no qkv; its linear layers are .*q_proj"):
        _adapted(multimodal, ["q_proj", "qkv"])


def test_a_name_of_the_head_is_not_left_out(multimodal: Path) -> None:
    """The server refuses it by name, as that of a text model."""
    assert "lm_head" in _adapted(multimodal, ["q_proj", "lm_head"])


@pytest.mark.parametrize("targets", [["q_proj", "mlp.up_proj"], "all-linear"])
def test_names_may_be_of_some_layers_and_without_others(multimodal: Path, targets: list[str] | str) -> None:
    for excluded in (["up_proj"], r".*up_proj"):
        adapted = _adapted(multimodal, targets, exclude_modules=excluded)
        assert "model.language_model.layers.0.self_attn.q_proj" in adapted
        assert not [name for name in adapted if is_of_encoder(name) or name.endswith("up_proj")]
    if isinstance(targets, list):  # PEFT refuses layers of a string
        layer = "model.language_model.layers.1"
        adapted = _adapted(multimodal, targets, layers_to_transform=[1], layers_pattern="layers")
        assert adapted == {f"{layer}.self_attn.q_proj", f"{layer}.mlp.up_proj"}


def test_layers_that_no_name_is_in_are_refused(multimodal: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"the LoRA settings do not fit the model: .*layers_to_transform"):
        _adapted(multimodal, ["q_proj"], layers_to_transform=[7])


def test_an_adapter_of_names_is_read_as_it_was_trained(multimodal: Path, tmp_path: Path) -> None:
    settings = {"layers_to_transform": [1], "rank_pattern": {"v_proj": 2}, "init_lora_weights": False}
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], **settings)
    lora = check_target_modules(lora, AutoConfig.from_pretrained(multimodal))
    policy = get_peft_model(AutoModelForImageTextToText.from_pretrained(multimodal), lora)
    policy.save_pretrained(tmp_path)
    assert sorted(json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]) == ["q_proj", "v_proj"]
    again = trainable_adapter(AutoModelForImageTextToText.from_pretrained(multimodal), str(tmp_path))
    trained = {name: tensor for name, tensor in policy.named_parameters() if "lora_" in name}
    read = {name: tensor for name, tensor in again.named_parameters() if "lora_" in name}
    assert read.keys() == trained.keys()
    assert sorted(tensor.shape[0] for name, tensor in read.items() if "lora_A" in name) == [2, 4]
    assert all(torch.equal(read[name], tensor) for name, tensor in trained.items())


def test_a_pattern_that_takes_an_encoder_is_refused_with_one_that_works(multimodal: Path) -> None:
    with pytest.raises(UnsupportedAdapter, match=r"belongs to an encoder") as refusal:
        _adapted(multimodal, r".*(q_proj|attn\.qkv)")
    pattern = re.search(r"target_modules '(.*?)' ", refusal.value.message)
    assert pattern
    assert all(name.endswith("q_proj") for name in _adapted(multimodal, pattern[1]))


def _mixture(row: str) -> PretrainedConfig:
    architecture = ARCHITECTURES[row]
    small = {"num_hidden_layers": 2, "vocab_size": 64, "pad_token_id": None}
    config = getattr(transformers, architecture.config)(**architecture.text, **small)
    config.architectures = [architecture.name]
    return config


@pytest.mark.parametrize(
    ("row", "targets", "name"),
    [
        ("gpt-oss", ["q_proj", "router"], r"model\.layers\.0\.mlp\.router"),
        ("Qwen2-MoE", ["q_proj", "gate"], r"model\.layers\.0\.mlp\.gate"),
        ("Qwen2-MoE", r".*(q_proj|gate)", r"model\.layers\.0\.mlp\.gate"),
        ("Qwen3-MoE", ["q_proj", "gate"], r"model\.layers\.0\.mlp\.gate"),
        ("Qwen3-MoE", r".*(q_proj|gate_proj|up_proj)", r"model\.layers\.0\.mlp\.experts"),
        ("Qwen3-Next", ["gate_proj", "up_proj", "down_proj"], r"model\.layers\.\d\.mlp\.experts"),
        ("Mixtral", r".*experts.*", r"model\.layers\.0\.mlp\.experts"),
    ],
)
def test_experts_and_routers_are_refused_by_name(row: str, targets: list[str] | str, name: str) -> None:
    with pytest.raises(UnsupportedAdapter, match=f"^{name}.* belongs to the experts of a mixture, or routes to them"):
        check_target_modules(LoraConfig(target_modules=targets), _mixture(row))


def test_names_that_peft_takes_for_those_of_experts_are_refused_with_others() -> None:
    with pytest.raises(InvalidRequest, match=r"up_proj .*; name layers outside MLPs, .*: .*q_proj, k_proj, v_proj"):
        check_target_modules(LoraConfig(target_modules=["q_proj", "shared_expert.up_proj"]), _mixture("Qwen3-Next"))


def test_the_shared_experts_of_some_mixtures_can_be_named() -> None:
    lora = LoraConfig(target_modules=["q_proj", "shared_expert.up_proj"])
    assert check_target_modules(lora, _mixture("Qwen2-MoE")) == lora


@pytest.mark.parametrize("row", ["text", "multimodal"])
def test_all_linear_of_a_mixture_is_outside_mlps(row: str) -> None:
    text = {
        "num_hidden_layers": 2,
        "vocab_size": 64,
        "layer_types": ["linear_attention", "full_attention"],
        "num_experts": 4,
        "pad_token_id": None,
    }
    if row == "text":
        config = transformers.Qwen3_5MoeTextConfig(**text, architectures=["Qwen3_5MoeForCausalLM"])
    else:
        config = transformers.Qwen3_5MoeConfig(
            text_config=text, vision_config={"depth": 1}, architectures=["Qwen3_5MoeForConditionalGeneration"]
        )
    attention = {"q_proj", "k_proj", "v_proj", "o_proj"}
    expected = {*attention, "in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj"}
    assert check_target_modules(LoraConfig(target_modules="all-linear"), config).target_modules == expected
    with pytest.raises(InvalidRequest) as refusal:
        check_target_modules(LoraConfig(target_modules=["nope"]), config)
    listed = re.search(r"layers outside MLPs are (.*), and all-linear stands for all of them", refusal.value.message)
    assert listed
    assert set(listed[1].split(", ")) == expected


def test_an_adapter_under_other_names_is_refused(multimodal: Path, tmp_path: Path) -> None:
    """PEFT warns only, and goes on with new weights."""
    lora = LoraConfig(r=4, target_modules=r".*language_model.*q_proj", init_lora_weights=False)
    model = AutoModelForImageTextToText.from_pretrained(multimodal)
    get_peft_model(model.model, lora).save_pretrained(tmp_path)
    base = AutoModelForImageTextToText.from_pretrained(multimodal)
    with pytest.raises(InvalidRequest, match=r"init_adapter .* was made for another model class.*ForConditional"):
        trainable_adapter(base, str(tmp_path))
