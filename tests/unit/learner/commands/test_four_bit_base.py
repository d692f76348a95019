"""A base that four bits hold exactly, and what is refused in its place."""

from __future__ import annotations

import json
from pathlib import Path

import bitsandbytes
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig
from trl import ModelConfig

from learner.adapters.quantization import FOUR_BIT, check_quantization, pin_compute_dtype, quantization_config
from learner.cli import main
from learner.commands.four_bit_base import make_base
from shared.errors import ErrorCode, LockstepError

IDS = torch.tensor([[5, 9, 14, 20, 33, 8, 40, 41, 3, 7]])


@pytest.fixture(scope="module")
def base(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of float32, nf4."""
    out = tmp_path_factory.mktemp("bases") / "nf4"
    assert main(["four-bit-base", str(model_dir), "--out", str(out), "--dtype", "float32"]) == 0
    return out


def in_four_bits(folder: Path, dtype: torch.dtype, quant_type: str = "nf4") -> torch.nn.Module:
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=quant_type, bnb_4bit_compute_dtype=dtype)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, quantization_config=config)
    pin_compute_dtype(model)
    return model


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_four_bits_hold_every_weight(model_dir: Path, tmp_path: Path, dtype: str, quant_type: str) -> None:
    layers = make_base(str(model_dir), tmp_path / "base", dtype=dtype, quant_type=quant_type)
    kind = getattr(torch, dtype)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=kind)
    quantized = in_four_bits(tmp_path / "base", kind, quant_type)
    held = {
        name: module for name, module in quantized.named_modules() if isinstance(module, bitsandbytes.nn.Linear4bit)
    }
    assert len(held) == layers == 14
    for name, module in held.items():
        weight = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
        assert torch.equal(weight, whole.get_submodule(name).weight), name
    assert (tmp_path / "base" / "tokenizer.json").is_file()


@torch.no_grad()
def test_both_are_one_policy_and_not_that_of_the_original(model_dir: Path, base: Path) -> None:
    original, whole = (AutoModelForCausalLM.from_pretrained(folder)(IDS).logits for folder in (model_dir, base))
    quantized = in_four_bits(base, torch.float32)(IDS).logits
    careless = in_four_bits(model_dir, torch.float32)(IDS).logits
    assert (whole - quantized).abs().max() < 1e-5
    assert (original - careless).abs().max() > 0.1


def test_an_eval_pass_leaves_gradients_as_they_were(base: Path) -> None:
    """Without `pin_compute_dtype` it fails on CPUs that have bfloat16, and on no others."""
    gradients = []
    for model in (AutoModelForCausalLM.from_pretrained(base), in_four_bits(base, torch.float32)):
        torch.manual_seed(0)
        config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
        policy = get_peft_model(model, config)
        policy.eval()
        with torch.no_grad():
            policy(IDS)
        policy.train()
        policy(IDS).logits.square().mean().backward()
        gradients.append([p.grad for p in policy.parameters() if p.requires_grad])
    assert len(gradients[0]) == len(gradients[1]) == 28
    for whole, quantized in zip(*gradients, strict=True):
        assert whole.abs().max() > 0
        assert torch.allclose(whole, quantized, rtol=1e-4, atol=1e-6)


def test_what_is_there_is_kept(model_dir: Path, base: Path, tmp_path: Path) -> None:
    with pytest.raises(LockstepError, match="exists"):
        make_base(str(model_dir), base, dtype="float32")
    (tmp_path / "awq").mkdir()
    config = json.loads((model_dir / "config.json").read_text())
    (tmp_path / "awq" / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "awq"}}))
    with pytest.raises(LockstepError, match="quantized already"):
        make_base(str(tmp_path / "awq"), tmp_path / "out", dtype="float32")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({}, None),
        ({"bnb_4bit_quant_type": "fp4"}, "--bnb_4bit_quant_type nf4"),
        ({"bnb_4bit_compute_dtype": "bfloat16"}, "--dtype float32"),
        ({"bnb_4bit_use_double_quant": True}, "nested"),
        ({"load_in_4bit": False, "load_in_8bit": True}, "load it unquantized, or in 4 bits"),
        ({FOUR_BIT: None}, "four-bit-base MODEL --out DIR"),
    ],
)
def test_other_quantisations_are_refused(base: Path, change: dict, word: str | None) -> None:
    options = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "float32"} | change
    config = AutoConfig.from_pretrained(base)
    if FOUR_BIT in change:
        delattr(config, FOUR_BIT)
        del options[FOUR_BIT]
    config.quantization_config = BitsAndBytesConfig(**options)
    if word is None:
        check_quantization(config)
        check_quantization(AutoConfig.from_pretrained(base))
        return
    with pytest.raises(LockstepError, match=word) as refusal:
        check_quantization(config)
    assert refusal.value.code is ErrorCode.UNSUPPORTED_ADAPTER


def test_flags_of_trl(base: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert quantization_config(ModelConfig(model_name_or_path=str(model_dir))) is None
    asked = {"model_name_or_path": str(base), "load_in_4bit": True, "dtype": "float32"}
    wanted = quantization_config(ModelConfig(**asked))
    assert wanted is not None
    assert wanted.bnb_4bit_compute_dtype is torch.float32
    for change, word in (
        ({"dtype": "auto"}, "--dtype"),
        ({"dtype": "bfloat16"}, "--dtype float32"),
        ({"use_bnb_nested_quant": True}, "nested"),
        ({"model_name_or_path": str(model_dir)}, "four-bit-base"),
    ):
        with pytest.raises(LockstepError, match=word):
            quantization_config(ModelConfig(**asked | change))
    monkeypatch.setattr("learner.adapters.quantization.find_spec", lambda name: None)
    with pytest.raises(LockstepError, match="qlora"):
        quantization_config(ModelConfig(**asked))


def test_what_fails_on_the_way_leaves_nothing(model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("learner.commands.four_bit_base.copy_files", full)
    with pytest.raises(OSError, match="no space left"):
        make_base(str(model_dir), tmp_path / "base", dtype="float32")
    assert not list(tmp_path.iterdir())
