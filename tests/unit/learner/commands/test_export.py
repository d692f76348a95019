"""`learner export` against PEFT's own merge, and what it refuses."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

from learner.adapters.stored import find_adapter, open_adapter
from learner.adapters.target_modules import check_target_modules, model_class
from learner.cli import main
from learner.commands.export import export
from shared.errors import ErrorCode, LockstepError
from shared.module_names import is_of_encoder
from tests.support.architectures import make_model
from tests.support.tiny_vision_model import make_tiny_vision_model

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LORA = {
    "plain": {},
    "rslora": {"use_rslora": True, "r": 16},
    "patterns": {
        "rank_pattern": {"q_proj": 4, "layers.1.mlp.down_proj": 6},
        "alpha_pattern": {"^model.layers.0.self_attn.q_proj": 3, "o_proj": 40},
    },
    "subset": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]},
}


def _adapter(model_dir: Path, folder: Path, **lora) -> PeftModel:
    base = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    config = LoraConfig(**{"r": 8, "lora_alpha": 16, "target_modules": TARGETS, "task_type": "CAUSAL_LM", **lora})
    policy = get_peft_model(base, config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    policy.save_pretrained(folder)
    return policy


@pytest.mark.parametrize("lora", LORA)
def test_a_merged_model_is_pefts(model_dir: Path, tmp_path: Path, lora: str) -> None:
    policy = _adapter(model_dir, tmp_path / "adapter", **LORA[lora])
    scalings = {
        name.removeprefix("base_model.model."): module.scaling["default"]
        for name, module in policy.named_modules()
        if hasattr(module, "lora_A")
    }
    stored = open_adapter(tmp_path / "adapter")
    assert {name: module.scaling for name, module in stored.modules.items()} == pytest.approx(scalings)
    expected = policy.merge_and_unload().state_dict()

    export(tmp_path / "adapter", tmp_path / "float32", merged=True, dtype="float32")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "float32")
    assert merged.dtype is torch.float32
    for name, tensor in merged.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-6)

    export(tmp_path / "adapter", tmp_path / "bfloat16", merged=True)
    written, whole = (load_file(tmp_path / dtype / "model.safetensors") for dtype in ("bfloat16", "float32"))
    assert written.keys() == whole.keys()
    assert len(written) > 10
    for name, tensor in written.items():
        # A neighbour, by stochastic rounding; what is exact stays so.
        below, above = (whole[name] - tensor.float()).abs(), whole[name].abs() * 2.0**-7
        assert bool((below <= above).all()), f"{name} was rounded more than once"
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "bfloat16").dtype is torch.bfloat16
    assert AutoTokenizer.from_pretrained(tmp_path / "bfloat16")("w1 w2")["input_ids"] == [4, 5]


def test_a_small_update_is_in_the_merged_weights(model_dir: Path, tmp_path: Path, capsys) -> None:
    """Of an update of a hundredth of a unit in the last place, the share; and equal bits the second time."""
    policy = _adapter(model_dir, tmp_path / "adapter")
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_" in name:
                parameter.mul_(0.01)
    policy.save_pretrained(tmp_path / "adapter")
    base = tmp_path / "base"
    AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16).save_pretrained(base)
    command = ["export", str(tmp_path / "adapter"), "--merge", "--model_name_or_path", str(base), "--out"]
    assert main([*command, str(tmp_path / "one")]) == 0
    said = capsys.readouterr().out
    assert main([*command, str(tmp_path / "two")]) == 0
    one, two, before = (
        load_file(folder / "model.safetensors") for folder in (tmp_path / "one", tmp_path / "two", base)
    )
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())
    product, meant = 0.0, 0.0
    for module, scaling in ((m, spec.scaling) for m, spec in open_adapter(tmp_path / "adapter").modules.items()):
        a, b = open_adapter(tmp_path / "adapter").pair(module)
        delta = b.double() @ a.double() * scaling
        weight = module + ".weight"
        product += ((one[weight].double() - before[weight].double()) * delta).sum().item()
        meant += delta.square().sum().item()
    assert 0.8 < product / meant < 1.2
    assert f"share of the update in the weights: {product / meant:.3f}" in said


def test_shards_and_other_dtypes(model_dir: Path, tmp_path: Path) -> None:
    """A base in several files, with a tensor that holds integers; blocks smaller than a matrix."""
    policy = _adapter(model_dir, tmp_path / "adapter")
    base = tmp_path / "base"
    AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16).save_pretrained(base, max_shard_size="30KB")
    shard = next(base.glob("model-*.safetensors"))
    save_file({**load_file(shard), "positions": torch.arange(7)}, shard, metadata={"format": "pt"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("learner.adapters.merge._BLOCK_ELEMENTS", 100)
        export(tmp_path / "adapter", tmp_path / "out", merged=True, model=str(base), dtype="float16")
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert len(files) == len(list(base.glob("*.safetensors"))) > 1
    assert {name for file in files for name in load_file(file)} == index["weight_map"].keys()
    tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert tensors.pop("positions").tolist() == list(range(7))
    assert sum(tensor.nbytes for tensor in tensors.values()) + 56 == index["metadata"]["total_size"]

    bfloat16 = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    expected = PeftModel.from_pretrained(bfloat16, tmp_path / "adapter").merge_and_unload().state_dict()
    for name, tensor in tensors.items():
        assert tensor.dtype is torch.float16
        torch.testing.assert_close(tensor.float(), expected[name].half().float(), rtol=2**-10, atol=1e-6)
    del policy


def test_an_adapter_alone(model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    policy = _adapter(model_dir, tmp_path / "adapter")
    command = ["export", str(tmp_path / "adapter"), "--out", str(tmp_path / "out")]
    assert main(command) == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    base = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    loaded = PeftModel.from_pretrained(base, tmp_path / "out")
    tokens = torch.tensor([[3, 5, 8, 13]])
    assert torch.equal(loaded(tokens).logits, policy(tokens).logits)

    assert main(command) == 2
    assert "--force" in capsys.readouterr().err
    assert main([*command, "--force", "--model_name_or_path", "org/base"]) == 0
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["base_model_name_or_path"] == "org/base"
    assert "base_model: org/base" in (tmp_path / "out" / "README.md").read_text()


def test_force_replaces_exports_only(model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _adapter(model_dir, tmp_path / "adapter")
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "README.md").write_text("years of work")
    assert main(["export", str(tmp_path / "adapter"), "--out", str(mine), "--force"]) == 2
    assert "no export" in capsys.readouterr().err
    for source in (model_dir, tmp_path / "adapter"):
        assert main(["export", str(tmp_path / "adapter"), "--out", str(source), "--force"]) == 2
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")], "nothing half done is left"


def test_an_export_into_the_current_directory(model_dir: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    _adapter(model_dir, tmp_path / "adapter")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    command = ["export", str(tmp_path / "adapter"), "--out", "."]
    assert main(command) == 0
    assert Path("adapter_config.json").is_file(), "the directory is still the one that the shell is in"
    assert main([*command, "--force"]) == 2
    assert "is the current directory, which --force cannot replace" in capsys.readouterr().err


def test_a_dtype_needs_a_merge(model_dir: Path, tmp_path: Path, capsys) -> None:
    _adapter(model_dir, tmp_path / "adapter")
    command = ["export", str(tmp_path / "adapter"), "--out", str(tmp_path / "out"), "--dtype", "bf16"]
    assert main(command) == 2
    assert "--dtype is of a merged model" in capsys.readouterr().err
    assert main([*command, "--merge"]) == 0


def test_what_is_mounted_is_not_replaced(model_dir: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    _adapter(model_dir, tmp_path / "adapter")
    command = ["export", str(tmp_path / "adapter"), "--out", str(tmp_path / "volume")]
    assert main(command) == 0
    monkeypatch.setattr(Path, "is_mount", lambda path: path.name == "volume")
    assert main([*command, "--force", "--merge"]) == 2
    assert "is a mount point, which --force cannot replace" in capsys.readouterr().err


def _checkpoint(folder: Path, step: int) -> None:
    folder.mkdir(parents=True)
    state = {"fence": 0, "step": step, "micro_step": 0, "pushes": 0, "completions": 0, "completion_tokens": 0}
    (folder / "lockstep.json").write_text(json.dumps({**state, "geometry": {}}))
    (folder / "adapter_config.json").write_text("{}")


def test_the_adapter_of_a_run_is_the_one_trained_for_longest(tmp_path: Path) -> None:
    with pytest.raises(LockstepError, match="holds no adapter"):
        find_adapter(tmp_path)
    _checkpoint(tmp_path / "checkpoint-4", 4)
    _checkpoint(tmp_path / "checkpoint-10", 10)
    assert find_adapter(tmp_path).name == "checkpoint-10"
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    (tmp_path / "train.json").write_text('{"steps": 10}')
    (tmp_path / "adapter_config.json").write_text("{}")  # a copy, for PEFT
    assert find_adapter(tmp_path).name == "adapter"
    _checkpoint(tmp_path / "checkpoint-12", 12)
    assert find_adapter(tmp_path).name == "checkpoint-12"
    assert find_adapter(tmp_path / "checkpoint-4").name == "checkpoint-4"


@pytest.mark.parametrize(
    ("change", "code", "word"),
    [
        ({"use_dora": True}, ErrorCode.UNSUPPORTED_ADAPTER, "use_dora"),
        ({"peft_type": "IA3"}, ErrorCode.UNSUPPORTED_ADAPTER, "IA3"),
        ({"modules_to_save": ["lm_head"]}, ErrorCode.UNSUPPORTED_ADAPTER, "modules_to_save"),
        ({"bias": "all"}, ErrorCode.UNSUPPORTED_ADAPTER, "bias"),
        ({"init_lora_weights": "pissa"}, ErrorCode.UNSUPPORTED_ADAPTER, "pissa"),
        ({"base_model_name_or_path": None}, ErrorCode.INVALID_REQUEST, "--model_name_or_path"),
        ({"base_model_name_or_path": "/nowhere/at/all"}, ErrorCode.INVALID_REQUEST, "--model_name_or_path"),
    ],
)
def test_settings_that_are_refused(model_dir: Path, tmp_path: Path, change: dict, code: ErrorCode, word: str) -> None:
    _adapter(model_dir, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config | change))
    with pytest.raises(LockstepError, match=word) as refusal:
        export(tmp_path / "adapter", tmp_path / "out", merged=True)
    assert refusal.value.code is code
    assert not (tmp_path / "out").exists()


def test_bases_that_are_refused(model_dir: Path, tmp_path: Path) -> None:
    adapter, out = tmp_path / "runs" / "adapter", tmp_path / "out"
    _adapter(model_dir, adapter)
    quantized = tmp_path / "quantized"
    quantized.mkdir()
    config = json.loads((model_dir / "config.json").read_text())
    (quantized / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "awq"}}))
    (quantized / "model.safetensors").symlink_to(model_dir / "model.safetensors")
    with pytest.raises(LockstepError, match="quantized"):
        export(adapter, out, merged=True, model=str(quantized))
    (tmp_path / "runs" / "train.json").write_text(json.dumps({"base_weights": "0" * 32, "steps": 3}))
    with pytest.raises(LockstepError, match="not the base") as other:
        export(adapter, out, merged=True)
    assert other.value.code is ErrorCode.BASE_MISMATCH
    assert open_adapter(tmp_path / "runs").step == 3


def test_tensors_that_are_refused(model_dir: Path, tmp_path: Path) -> None:
    _adapter(model_dir, tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    one = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    other = one.replace("q_proj", "x_proj")
    for changed, word in (
        ({name: t for name, t in tensors.items() if name != one}, "no pairs"),
        ({**tensors, "base_model.model.lm_head.weight": torch.ones(2, 2)}, "no pairs"),
        ({**tensors, one: tensors[one] * float("nan")}, "NaN"),
        ({**tensors, one: tensors[one][:, 1:].contiguous()}, "its own base"),
        (
            {**tensors, other: torch.ones(8, 32), other.replace("_A", "_B"): torch.ones(32, 8)},
            "x_proj.weight",
        ),
    ):
        save_file(changed, file)
        with pytest.raises(LockstepError, match=word):
            export(tmp_path / "adapter", tmp_path / "out", merged=True)
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(LockstepError, match="cut off"):
        open_adapter(tmp_path / "adapter")
    file.write_bytes(b"nonsense, and more of it")
    with pytest.raises(LockstepError, match="safetensors"):
        open_adapter(tmp_path / "adapter")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_an_adapter_that_is_not_finite_is_not_exported(model_dir: Path, tmp_path: Path, dtype, value) -> None:
    _adapter(model_dir, tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(file).items()}
    save_file(tensors, file)
    export(tmp_path / "adapter", tmp_path / "finite")
    (list(tensors.values())[-1])[-1, -1] = value
    save_file(tensors, file)
    with pytest.raises(LockstepError, match="NaN or infinity") as refusal:
        export(tmp_path / "adapter", tmp_path / "out")
    assert refusal.value.code is ErrorCode.NOT_FINITE
    assert not (tmp_path / "out").exists()


def test_an_adapter_in_another_dtype_is_not_exported(model_dir: Path, tmp_path: Path) -> None:
    _adapter(model_dir, tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({name: tensor.double() for name, tensor in load_file(file).items()}, file)
    with pytest.raises(LockstepError, match="F64"):
        export(tmp_path / "adapter", tmp_path / "out")


def test_the_card_names_a_rank_that_vllm_serves(model_dir: Path, tmp_path: Path) -> None:
    _adapter(model_dir, tmp_path / "adapter", r=24)
    export(tmp_path / "adapter", tmp_path / "out")
    assert "--max-lora-rank 32 " in (tmp_path / "out" / "README.md").read_text()


def test_a_card_with_the_runs_data(model_dir: Path, tmp_path: Path) -> None:
    _adapter(model_dir, tmp_path / "adapter", rank_pattern={"q_proj": 4})
    summary = {
        "run_id": "sums",
        "steps": 40,
        "task": "reasoning_gym:chain_sum",
        "completions": 640,
        "versions": {"trl": "1.16.0", "vllm": "0.32.0"},
    }
    (tmp_path / "train.json").write_text(json.dumps(summary))
    (tmp_path / "summary.json").write_text(json.dumps({"eval_before": 0.25, "eval_after": 0.75, "eval_questions": 64}))
    export(tmp_path, tmp_path / "out", merged=True)
    card = (tmp_path / "out" / "README.md").read_text()
    for line in (
        "# sums",
        "| optimizer steps | 40 |",
        "| task | reasoning_gym:chain_sum |",
        "0.250 before training, 0.750",
        "| LoRA rank | ",
        "4 (2 modules)",
        "vllm serve",
        "library_name: transformers",
        "trl 1.16.0, vllm 0.32.0",
        "| adapted | 14 linear layers: down_proj, gate_proj,",
    ):
        assert line in card, card


@pytest.mark.parametrize("merged", [False, True])
def test_a_card_says_which_revision_and_whether_code_is_trusted(model_dir: Path, tmp_path: Path, merged: bool) -> None:
    _adapter(model_dir, tmp_path / "adapter", revision="v2")
    (tmp_path / "train.json").write_text(json.dumps({"trust_remote_code": True}))
    export(tmp_path, tmp_path / "out", merged=merged)
    card = (tmp_path / "out" / "README.md").read_text()
    if merged:  # it has the files of that revision
        assert '"THIS_DIRECTORY", dtype="bfloat16", trust_remote_code=True)' in card
        assert 'AutoTokenizer.from_pretrained("THIS_DIRECTORY", trust_remote_code=True)' in card
        assert "vllm serve THIS_DIRECTORY --trust-remote-code\n" in card
    else:
        assert f'("{model_dir}", revision="v2", trust_remote_code=True)' in card
        assert f"vllm serve {model_dir} --revision v2 --trust-remote-code --enable-lora" in card


def _as_the_card_says(folder: Path) -> dict[str, Any]:
    """Return what the code in an export's card defines."""
    code = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    assert code
    defined: dict[str, Any] = {}
    with warnings.catch_warnings(action="error", category=UserWarning):  # PEFT's of an adapter that finds no place
        exec(code[1].replace("THIS_DIRECTORY", str(folder)), defined)
    return defined


@pytest.mark.parametrize(
    "row", ["Qwen3", "Qwen2.5-VL", "Gemma 3", "Gemma 4", "Qwen3.5", "SmolVLM", "LLaVA", "Mistral 3"]
)
def test_what_the_card_says_loads_what_was_trained(row: str, tmp_path: Path) -> None:
    """Whatever the checkpoint calls its tensors; PEFT finds no adapter missing, and none in an encoder."""
    model = make_model(row, tmp_path / "model")
    config = AutoConfig.from_pretrained(model)
    lora = check_target_modules(LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False), config)
    policy = get_peft_model(model_class(config).from_pretrained(model), lora).eval()
    policy.save_pretrained(tmp_path / "adapter")
    export(tmp_path / "adapter", tmp_path / "alone")
    export(tmp_path / "adapter", tmp_path / "merged", merged=True, dtype="float32")
    ids = torch.arange(3, 24)[None]
    alone, merged = (_as_the_card_says(tmp_path / name) for name in ("alone", "merged"))
    for loaded in (alone["model"], merged["model"]):
        with torch.no_grad():
            difference = loaded.eval()(input_ids=ids).logits - policy(input_ids=ids).logits
        assert difference.abs().max() < 1e-4
    assert not [name for name, _ in alone["model"].named_parameters() if "lora_" in name and is_of_encoder(name)]
    assert load_file(tmp_path / "merged" / "model.safetensors").keys() == load_file(model / "model.safetensors").keys()
    assert merged["tokenizer"]("w1 w2") == AutoTokenizer.from_pretrained(model)("w1 w2")


def test_an_adapter_of_the_language_model_alone_has_a_card_for_that(tmp_path: Path) -> None:
    model = make_model("Qwen3.5", tmp_path / "model")
    lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    policy = get_peft_model(AutoModelForCausalLM.from_pretrained(model), lora).eval()
    policy.save_pretrained(tmp_path / "adapter")
    export(tmp_path / "adapter", tmp_path / "alone")
    ids = torch.arange(3, 24)[None]
    with torch.no_grad():
        loaded, trained = _as_the_card_says(tmp_path / "alone")["model"].eval(), policy
        torch.testing.assert_close(loaded(input_ids=ids).logits, trained(input_ids=ids).logits)


def test_the_card_of_a_model_that_sees_loads_its_processor(tmp_path: Path) -> None:
    model = make_tiny_vision_model(tmp_path / "model")
    lora = check_target_modules(LoraConfig(r=4, target_modules="all-linear"), AutoConfig.from_pretrained(model))
    get_peft_model(AutoModelForImageTextToText.from_pretrained(model), lora).save_pretrained(tmp_path / "adapter")
    export(tmp_path / "adapter", tmp_path / "merged", merged=True)
    processor = _as_the_card_says(tmp_path / "merged")["processor"]
    assert processor.image_processor.patch_size == 14
    assert "pipeline_tag: image-text-to-text" in (tmp_path / "merged" / "README.md").read_text()


def test_a_merged_model_has_the_code_of_its_base(tmp_path: Path) -> None:
    base = make_model("Qwen3", tmp_path / "base")
    code = {
        "names_of_own": "KIND = 'own'\n",
        "configuration_own": "from transformers import Qwen3Config\nfrom .names_of_own import KIND\n"
        "class OwnConfig(Qwen3Config):\n    model_type = KIND\n",
        "modeling_own": "from transformers import Qwen3ForCausalLM\nfrom .configuration_own import OwnConfig\n"
        "class OwnModel(Qwen3ForCausalLM):\n    config_class = OwnConfig\n",
    }
    for name, text in code.items():
        (base / f"{name}.py").write_text(text)
    config = json.loads((base / "config.json").read_text())
    classes = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"}
    own = {"model_type": "own", "architectures": ["OwnModel"], "auto_map": classes}
    (base / "config.json").write_text(json.dumps(config | own))
    policy = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base, trust_remote_code=True), LoraConfig(target_modules=["q_proj"])
    )
    policy.save_pretrained(tmp_path / "adapter")
    export(tmp_path / "adapter", tmp_path / "merged", merged=True)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", trust_remote_code=True)
    assert type(loaded).__name__ == "OwnModel"
    assert {path.stem for path in (tmp_path / "merged").glob("*.py")} == code.keys()


@pytest.mark.parametrize("own", [True, False])
def test_a_tokenizer_is_exported_with_its_code(model_dir: Path, tmp_path: Path, own: bool) -> None:
    _adapter(model_dir, tmp_path / "adapter")
    settings = {"auto_map": {"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]}} if own else {}
    (tmp_path / "adapter" / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "adapter" / "tokenization_own.py").write_text("")
    export(tmp_path / "adapter", tmp_path / "out")
    assert (tmp_path / "out" / "tokenization_own.py").is_file() == own


@pytest.mark.parametrize("out", ["made", "adapter/../made", "link", "holds"])
def test_what_is_exported_is_not_replaced(model_dir: Path, tmp_path: Path, out: str, capsys) -> None:
    _adapter(model_dir, tmp_path / "adapter")
    made = tmp_path / "made"
    export(tmp_path / "adapter", made)
    (tmp_path / "link").symlink_to("made")
    source = made
    if out == "holds":
        export(tmp_path / "adapter", tmp_path / "holds")
        export(tmp_path / "adapter", source := tmp_path / "holds" / "inner")
    before = (source / "adapter_model.safetensors").read_bytes()
    assert main(["export", str(source), "--out", str(tmp_path / out), "--force", "--merge"]) == 2
    assert "is, or holds, what is to be exported" in capsys.readouterr().err
    assert (source / "adapter_model.safetensors").read_bytes() == before


def test_a_name_on_the_hub_is_no_directory_here(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _adapter(model_dir, tmp_path / "adapter")
    monkeypatch.chdir(tmp_path)
    export("adapter", "Qwen", model="Qwen/Qwen3-0.6B")
    assert Path("Qwen/adapter_config.json").is_file()
