"""Training, evaluation and server ask the same questions, whichever form of content a chat template takes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers
from datasets import Dataset
from peft import LoraConfig
from PIL import Image as Pillow
from transformers import AutoProcessor, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from learner.adapters.lora_rules import language_pattern
from learner.evaluation.prompts import prompt_of
from learner.trainer.datasets import measure_prompts
from learner.trainer.filled_keys import show_own_text
from learner.trainer.images import tokenized
from rollout_server.generation.tokenization import tokenize
from shared.chat_forms import in_parts
from shared.errors import InvalidRequest
from shared.image_processors import do_without_videos
from tests.support.chat_templates import BOTH, IMAGES_FIRST, PARTS, STRINGS, TEMPLATES
from tests.support.rewards import reward_odd
from tests.support.tiny_model import make_tiny_model
from tests.support.tiny_vision_model import make_tiny_vision_model

QUESTIONS = [f"What is {i} + {i + 1}?" for i in range(4)]


def prompt_with(question: Any) -> list[dict[str, Any]]:
    return [{"role": "system", "content": "Answer with a digit. "}, {"role": "user", "content": question}]


def served(tokenizer: Any, row: dict[str, Any], *, sees: bool = False) -> list[int]:
    """Return the token ids that a server makes of an evaluation's question."""
    tokenizer.max_chars_per_token = 64
    return tokenize(tokenizer, prompt_of(row, sees=sees), {}, 2048)


@pytest.fixture(scope="module")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model") / "text")


@pytest.fixture
def make(tmp_path: Path, no_workers_left: None) -> Callable[..., GRPOTrainer]:
    def make_of(model: Path, rows: list[Any], processing_class: Any) -> GRPOTrainer:
        layers = ["q_proj"] if model.name == "text" else language_pattern(("q_proj", "v_proj"))
        trainer = GRPOTrainer(
            model=str(model),
            args=GRPOConfig(
                output_dir=str(tmp_path / "run"),
                use_cpu=True,
                bf16=False,
                per_device_train_batch_size=4,
                num_generations=2,
                report_to="none",
            ),
            peft_config=LoraConfig(r=4, target_modules=layers),
            train_dataset=Dataset.from_list(rows),
            reward_funcs=[reward_odd],
            processing_class=processing_class,
        )
        show_own_text(trainer)
        return trainer

    return make_of


@pytest.mark.parametrize("form", [list, in_parts], ids=["strings", "parts"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_text_is_the_same_question_everywhere(make, text_model: Path, name: str, form: Any) -> None:
    tokenizer = AutoTokenizer.from_pretrained(text_model)
    tokenizer.chat_template = TEMPLATES[name]
    rows = [{"prompt": form(prompt_with(question))} for question in QUESTIONS]
    asked = measure_prompts(make(text_model, rows, tokenizer)).first
    for question, ids, row in zip(QUESTIONS, asked, rows, strict=True):
        shown = tokenizer.decode(ids)
        assert shown.count(question) == shown.count("Answer with a digit.") == 1
        assert ids == served(tokenizer, row)


@pytest.mark.parametrize(
    ("family", "template"),
    [("smolvlm", PARTS), ("llava", IMAGES_FIRST), ("smolvlm", BOTH)],
    ids=["parts", "images first", "both"],
)
def test_images_are_the_same_question_everywhere(make, tmp_path: Path, family: str, template: str) -> None:
    do_without_videos(transformers)
    model = make_tiny_vision_model(tmp_path / family, family)
    processor = AutoProcessor.from_pretrained(model)
    processor.chat_template, tokenizer = template, AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = template
    trainer = make(model, [{"prompt": prompt_with(question)} for question in QUESTIONS], processor)
    picture = Pillow.new("RGB", (56, 56), "navy")
    for question, images in (("How many circles?", [picture]), ("And without?", [])):
        row = {"prompt": prompt_with(question), "images": images}
        ((ids,), _) = tokenized(trainer, [row])
        text = tokenizer.decode(served(tokenizer, row, sees=True))
        assert text.count(question) == text.count("Answer with a digit.") == 1
        expanded = processor(text=[text], **({"images": [images]} if images else {}))["input_ids"]
        assert list(ids) == list(expanded[0])


def test_text_that_no_form_shows_is_refused_by_row(make, text_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(text_model)
    tokenizer.chat_template = STRINGS
    rows = [{"prompt": in_parts(prompt_with(question))} for question in QUESTIONS]
    rows[2]["prompt"][1]["content"] *= 2
    with pytest.raises(InvalidRequest, match=r"the training data, row 3, .* does not show the text of message 1"):
        measure_prompts(make(text_model, rows, tokenizer))


def test_a_template_of_a_model_that_sees_which_prints_parts(make, tmp_path: Path) -> None:
    """TRL writes all text in parts for a processor, so there is no other form."""
    do_without_videos(transformers)
    model = make_tiny_vision_model(tmp_path / "llava", "llava")
    processor = AutoProcessor.from_pretrained(model)
    processor.chat_template = BOTH.replace("message.content is string", "message.role == 'system'")
    rows = [{"prompt": prompt_with(question)} for question in QUESTIONS]
    with pytest.raises(InvalidRequest, match=r"row 1, .* does not show the text of message 0 \(role 'system'\)"):
        measure_prompts(make(model, rows, processor))


@pytest.mark.parametrize("sees", [False, True])
def test_tokens_of_images_without_an_image_are_refused_by_row(make, tmp_path: Path, sees: bool) -> None:
    """As the server would at the first rollout."""
    do_without_videos(transformers)
    model = make_tiny_vision_model(tmp_path / "qwen")
    processing_class = (AutoProcessor if sees else AutoTokenizer).from_pretrained(model)
    rows = [{"prompt": prompt_with(question)} for question in [*QUESTIONS[:3], "Say <|image_pad|>"]]
    with pytest.raises(InvalidRequest, match=r"row 4, 'Say <\|image_pad\|>': the prompt holds tokens of an image"):
        measure_prompts(make(model, rows, processing_class))
