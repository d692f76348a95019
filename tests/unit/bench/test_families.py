"""What bench.families makes of trainings; nothing is started."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers

from bench.families.__main__ import HYBRID, IMAGES, ROWS, FamiliesBench, figures
from bench.families.checkpoints import CHECKPOINTS
from learner.commands.training import read_options
from shared.image_processors import do_without_videos


def test_figures_are_of_the_counted_steps() -> None:
    steps = [
        {
            "seconds": 2.0 * i,
            "wait_seconds": 1.0,
            "push_seconds": 0.1,
            "completion_length": 8.0,
            "drift": {"delta": 0.01 * i, "kl": 1e-4, "tokens": 64},
        }
        for i in (1, 2, 3)
    ]
    made = figures(steps)
    assert made["n"] == 3
    assert made["step_s"]["median"] == 4.0
    assert made["mismatch"]["mean"] == pytest.approx(0.02)
    assert made["drift_tokens"] == 192


@pytest.mark.parametrize(("name", "billions"), [("qwen2.5-vl-3b", 3.75), ("qwen3.5-4b", 4.54)])
def test_shapes_are_those_of_the_published_models(name: str, billions: float) -> None:
    assert CHECKPOINTS[name].parameters / 1e9 == pytest.approx(billions, rel=0.01)


@pytest.mark.parametrize("row", ROWS)
def test_a_training_has_options_that_learner_train_knows(row: str, tmp_path: Path) -> None:
    bench = FamiliesBench(["--quick", "--json", str(tmp_path / "families.json")])
    options = read_options(bench.words(row, tmp_path / "model", tmp_path / "run"))
    assert options["max_steps"] == "6"
    if row == IMAGES:
        assert options["task"] == "learner.tasks.examples.counting:circles"
    else:
        prompts = [json.loads(line)["prompt"] for line in Path(options["task"]).read_text().splitlines()]
        assert {len(prompt) for prompt in prompts} == {16}


def test_a_checkpoint_loads_with_its_tokenizer_and_processor(tmp_path: Path) -> None:
    do_without_videos(transformers)
    folder = CHECKPOINTS[ROWS[IMAGES][1]].write(tmp_path / "seeing", "cpu", "float32")
    processor = transformers.AutoProcessor.from_pretrained(folder)
    assert processor.tokenizer("ab", return_tensors="pt").input_ids.shape == (1, 2)
    assert processor.image_token_id == 510
    model, info = transformers.AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert model.get_input_embeddings().weight.std().item() == pytest.approx(0.02, rel=0.1)
    hybrid = CHECKPOINTS[ROWS[HYBRID][1]].write(tmp_path / "hybrid", "cpu", "bfloat16")
    assert transformers.AutoModelForImageTextToText.from_pretrained(hybrid).dtype == torch.bfloat16


@pytest.mark.parametrize("row", ROWS)
def test_each_row_can_be_measured_alone(row: str) -> None:
    assert FamiliesBench(["--only", row]).options.only == [row]
