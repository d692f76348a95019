from __future__ import annotations

from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForImageTextToText

from learner.adapters.peft_dir import trainable_adapter
from learner.adapters.target_modules import check_target_modules
from shared.errors import InvalidRequest
from tests.support.architectures import make_model


@pytest.fixture(scope="module")
def multimodal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("Qwen2.5-VL", tmp_path_factory.mktemp("model"))


def _adapted(model: Path, targets: list[str], **settings: object) -> set[str]:
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


def test_settings_that_patterns_exclude_are_refused(multimodal: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"the LoRA settings do not fit the model: .*layers_to_transform"):
        _adapted(multimodal, ["q_proj"], layers_to_transform=[0])


def test_an_adapter_under_other_names_is_refused(multimodal: Path, tmp_path: Path) -> None:
    """PEFT warns only, and goes on with new weights."""
    lora = LoraConfig(r=4, target_modules=r".*language_model.*q_proj", init_lora_weights=False)
    model = AutoModelForImageTextToText.from_pretrained(multimodal)
    get_peft_model(model.model, lora).save_pretrained(tmp_path)
    base = AutoModelForImageTextToText.from_pretrained(multimodal)
    with pytest.raises(InvalidRequest, match=r"init_adapter .* was made for another model class.*ForConditional"):
        trainable_adapter(base, str(tmp_path))
