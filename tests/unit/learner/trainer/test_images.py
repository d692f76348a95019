"""Trainings on images: real TRL, a tiny model that sees, and a fake server with the same processor."""

from __future__ import annotations

import copy
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import transformers
from datasets import Dataset, Features, Image, IterableDataset, List, Value
from peft import LoraConfig
from PIL import Image as Pillow
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import GRPOConfig, GRPOTrainer

import learner
import shared.images
from learner.adapters.lora_rules import language_pattern
from learner.evaluation import prompts as evaluation
from learner.rewards.calls import RewardCall
from learner.servers import prompts
from learner.servers.client import RolloutClient
from learner.session import Session
from learner.trainer import images
from learner.trainer.attach import attach
from shared.errors import LockstepError
from shared.fingerprint import fingerprint_checkpoint
from shared.image_processors import do_without_videos, sight
from tests.support.fake_server import FakeServer
from tests.support.rewards import reward_odd
from tests.support.tiny_vision_model import make_tiny_vision_model


@pytest.fixture(scope="module", params=["qwen2_5_vl"])
def vision_model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_vision_model(tmp_path_factory.mktemp("vision"), request.param)


@pytest.fixture
def seeing(vision_model: Path, server_state) -> FakeServer:
    do_without_videos(transformers)
    update = {"model": str(vision_model), "base": fingerprint_checkpoint(str(vision_model)), "max_images": 4}
    model = AutoModelForImageTextToText.from_pretrained(vision_model, dtype=torch.float32)
    return FakeServer(model, server_state.model_copy(update=update), AutoProcessor.from_pretrained(vision_model))


def picture(seed: int, side: int = 56) -> Pillow.Image:
    pixels = torch.randint(0, 256, (side * side * 3,), generator=torch.Generator().manual_seed(seed))
    return Pillow.frombytes("RGB", (side, side), bytes(pixels.tolist()))


def rows_with(column: str, counts: list[int]) -> Dataset:
    """Return a row for each number of images; `image` holds one or None, `images` a list or None."""
    kind: Any = Image() if column == "image" else List(Image())
    features = Features(prompt=List({"role": Value("string"), "content": Value("string")}))
    features[column] = kind
    seen = iter(range(sum(counts)))
    pictures = [[picture(next(seen), 56 + 28 * (row % 2)) for _ in range(count)] for row, count in enumerate(counts)]
    prompts = [[{"role": "user", "content": f"row {row}"}] for row in range(len(counts))]
    own = [(each[0] if each else None) if column == "image" else each or None for each in pictures]
    return Dataset.from_dict({"prompt": prompts, column: own}, features)


@pytest.fixture
def make_seeing(vision_model: Path, tmp_path: Path, no_workers_left: None) -> Any:
    def make(rows: Dataset, reward: Any = reward_odd, processing_class: Any = None, **config: Any) -> GRPOTrainer:
        do_without_videos(transformers)
        settings = {
            "output_dir": str(tmp_path / "run"),
            "use_cpu": True,
            "bf16": False,
            "max_steps": 3,
            "per_device_train_batch_size": 4,
            "num_generations": 2,
            "max_completion_length": 5,
            "learning_rate": 1e-2,
            "report_to": "none",
            "save_strategy": "no",
            "gradient_checkpointing": False,
            "disable_tqdm": True,
            "shuffle_dataset": False,
            **config,
        }
        return GRPOTrainer(
            model=str(vision_model),
            args=GRPOConfig(**settings),
            peft_config=LoraConfig(r=4, lora_alpha=8, target_modules=language_pattern(("q_proj", "v_proj"))),
            train_dataset=rows,
            reward_funcs=[reward],
            processing_class=processing_class,
        )

    return make


@pytest.mark.parametrize(
    ("vision_model", "column"),
    [
        ("qwen2_5_vl", "image"),
        ("qwen2_5_vl", "images"),
        ("qwen3_vl", "images"),
        ("smolvlm", "images"),
        ("llava", "images"),
    ],
    indirect=["vision_model"],
)
def test_rows_with_and_without_images_train_side_by_side(seeing, make_seeing, column: str) -> None:
    """Batches and passes of both, of one alone, and of none at all; in each the mismatch is rounding."""
    rows = rows_with(column, [1, 0, 0, 0, 2 if column == "images" else 1, 1])  # pairs: mixed, none, images
    trainer = make_seeing(rows, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    session = attached(trainer, seeing)
    scored = calls_of(session.rewards.pool)
    trainer.train()
    kinds = [any(prompt.images for prompt in request.prompts) for request in seeing.generated[1:]]
    assert set(kinds) == {True, False}
    assert len(session.metrics.reports) == 3
    assert max(report.drift.kl for report in session.metrics.reports) < 1e-8
    assert sum(map(len, scored)) == 12, "each reward is computed once, as its completion arrives"


@pytest.mark.parametrize("flat", ["images", "text"])
def test_replaced_groups_are_scored_once_in_the_form_of_all_others(seeing, make_seeing, flat: str) -> None:
    """A batch that had images has none any more, or the other way round."""

    def reward(completion_ids: Any, images: Any, **_: Any) -> list[float]:
        varied = [float(ids[0]) + 600 * i for i, ids in enumerate(completion_ids)]
        return [0.0 if bool(own) == (flat == "images") else one for own, one in zip(images, varied, strict=True)]

    trainer = make_seeing(rows_with("images", [0, 1] * 8), reward, per_device_train_batch_size=2)
    session = attached(trainer, seeing, drop_degenerate_groups=True)
    calls = calls_of(session.rewards.pool)
    trainer.train()
    session.close()
    assert session.summary()["degenerate_replaced"] > 0
    forms = {type(message["content"]) for call in calls for prompt in call.rows["prompts"] for message in prompt}
    assert forms == {list}
    drawn = sum(len(request.prompts) for request in seeing.generated if request.sampling.n == 2)
    assert sum(map(len, calls)) == 2 * drawn


@pytest.mark.parametrize("vision_model", ["qwen2_5_vl", "smolvlm", "llava"], indirect=True)
def test_as_many_images_as_rows_but_not_one_in_each(seeing, make_seeing) -> None:
    """TRL tells by their number whether pixels are those of images or of rows."""
    trainer = make_seeing(rows_with("images", [2, 0]), per_device_train_batch_size=2, gradient_accumulation_steps=2)
    session = attached(trainer, seeing)
    trainer.train()
    assert max(report.drift.kl for report in session.metrics.reports) < 1e-8


def test_a_processor_that_pads_on_the_right(seeing, make_seeing, vision_model: Path) -> None:
    """As Qwen's do: positions of images are those of the ids in short rows, too."""
    texts = ["How many?", "How many circles and how many squares are there in this picture, and which are more?"]
    parts = [[{"role": "user", "content": [{"type": "text", "text": t}, {"type": "image"}]}] for t in texts]
    rows = rows_with("images", [1, 1]).remove_columns("prompt").add_column("prompt", parts)
    do_without_videos(transformers)
    processor = transformers.AutoProcessor.from_pretrained(vision_model, padding_side="right")
    trainer = make_seeing(rows, processing_class=processor)
    session = attached(trainer, seeing)
    trainer.train()
    assert max(report.drift.kl for report in session.metrics.reports) < 1e-8


def test_ranks_are_not_to_wait_for_pictures_of_others(seeing, make_seeing) -> None:
    trainer = make_seeing(rows_with("image", [1, 0]))
    attached(trainer, seeing).close()
    assert not trainer.log_multimodal
    trainer.is_fsdp_enabled = True
    with pytest.raises(LockstepError, match="FSDP or DeepSpeed with a model that sees images"):
        images.check_sight(trainer, agents=False)


def test_a_batch_with_images_is_gone_on_with(seeing, make_seeing, tmp_path: Path) -> None:
    rows = rows_with("images", [1, 0, 2, 1])
    config = {"steps_per_generation": 2, "max_steps": 2, "save_strategy": "steps", "save_steps": 1, "seed": 3}
    whole = make_seeing(rows, output_dir=str(tmp_path / "whole"), **config)
    attached(whole, seeing).close()
    whole.train()
    cut = make_seeing(rows, output_dir=str(tmp_path / "cut"), **config)
    attached(cut, seeing).close()
    cut.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-1"))
    ends = [tmp_path / name / "checkpoint-2" / "adapter_model.safetensors" for name in ("whole", "cut")]
    assert ends[0].read_bytes() == ends[1].read_bytes()


def test_two_sides_that_process_images_differently_are_refused_by_name(seeing, make_seeing) -> None:
    trainer = make_seeing(rows_with("image", [1, 1]))
    config, processor = trainer.model.config, trainer.processing_class.image_processor
    for part, change, said in (
        ("processor", {"image_mean": [0.5, 0.5, 0.5]}, r"image_mean is \[0\.48.* not \[0\.5, 0\.5, 0\.5\]"),
        ("processor", {"size": {"shortest_edge": 56, "longest_edge": 112}}, "size.longest_edge is 50176, not 112"),
        ("config", {"window_size": 56}, "vision_config.window_size is 112, not 56"),
    ):
        other, its_config = copy.deepcopy(processor), copy.deepcopy(config)
        for name, value in change.items():
            setattr(other if part == "processor" else its_config.vision_config, name, value)
        seeing.state = seeing.state.model_copy(update={"sight": sight(other, its_config)})
        with pytest.raises(LockstepError, match=f"process images differently: .*{said}"):
            attached(trainer, seeing)
    seeing.state = seeing.state.model_copy(update={"sight": sight(processor, config)})
    attached(trainer, seeing).close()


@pytest.mark.parametrize("known", [True, False])
def test_a_stream_is_compared_before_the_training_without_being_read(seeing, make_seeing, known: bool) -> None:
    rows = rows_with("images", [1, 2])
    read: list[int] = []

    def drawn() -> Any:
        read.append(1)
        yield from rows

    trainer = make_seeing(IterableDataset.from_generator(drawn, features=rows.features if known else None))
    processor = copy.deepcopy(trainer.processing_class.image_processor)
    processor.image_mean = [0.5, 0.5, 0.5]
    seeing.state = seeing.state.model_copy(update={"sight": sight(processor, trainer.model.config)})
    with pytest.raises(LockstepError, match=r"process images differently: .*image_mean"):
        attached(trainer, seeing)
    seeing.state = seeing.state.model_copy(update={"sight": {}, "max_images": 0})
    if known:
        with pytest.raises(LockstepError, match="without --language-model-only"):
            attached(trainer, seeing)
    else:
        with pytest.warns(UserWarning, match=r"may have images.* tokenizer as processing_class"):
            attached(trainer, seeing).close()
    update = {"sight": {}, "max_images": 4, "max_image_memory": 2**20, "least_image_memory": 2**20 + 1}
    seeing.state = seeing.state.model_copy(update=update)
    if known:
        with pytest.raises(LockstepError, match=rf"the training data, a stream, has images that take {2**20 + 1} "):
            attached(trainer, seeing)
    assert read == []


def test_a_stream_that_is_not_evaluated_asks_for_no_images(seeing, make_seeing) -> None:
    trainer = make_seeing(rows_with("images", [0, 0]).remove_columns("images"))
    trainer.eval_dataset = rows_with("images", [1]).to_iterable_dataset()
    seeing.state = seeing.state.model_copy(update={"max_images": 0})
    attached(trainer, seeing).close()


def test_a_stream_of_text_asks_for_no_images(seeing, make_seeing) -> None:
    text = rows_with("images", [0, 0]).remove_columns("images")
    seeing.state = seeing.state.model_copy(update={"max_images": 0})
    attached(make_seeing(text.to_iterable_dataset()), seeing).close()


def test_a_picture_that_the_server_does_not_take_is_refused_before_the_training(
    seeing, make_seeing, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_seeing(rows_with("image", [1, 1, 0]))
    seeing.state = seeing.state.model_copy(update={"max_image_pixels": 56 * 84})
    with pytest.raises(LockstepError, match=r"data, row 2, has an image of 7056 pixels, .*--max-image-pixels"):
        attached(trainer, seeing)
    monkeypatch.setattr(shared.images, "_LEAST_PIXELS", 1)
    seeing.state = seeing.state.model_copy(update={"max_image_pixels": 0, "max_image_memory": 30 * 84 * 84 - 1})
    with pytest.raises(LockstepError, match=r"data, row 2, has images that take .*--max-bodies-mib"):
        attached(trainer, seeing)
    for update in ({"least_image_memory": 2**20 + 1}, {"shortest_image_edge": 336}):
        seeing.state = seeing.state.model_copy(update={"max_image_memory": 2**20, "shortest_image_edge": 0, **update})
        with pytest.raises(LockstepError, match=r"data, row 1, has images that take .* takes 1048576: "):
            attached(trainer, seeing)
        seeing.state = seeing.state.model_copy(update={"least_image_memory": 0})
    seeing.state = seeing.state.model_copy(update={"max_image_memory": 0, "max_image_bytes": 20_000})
    monkeypatch.setattr(images, "_LARGE_FILE", 10_000)
    with pytest.raises(LockstepError, match=r"data, row 2, has an image whose PNG .* takes 20000: .*--max-image-mib"):
        attached(trainer, seeing)


@pytest.mark.parametrize("row", [0, 2])
@pytest.mark.parametrize("column", ["image", "prompt"])
def test_a_broken_image_is_refused_before_the_training(seeing, make_seeing, column: str, row: int) -> None:
    """By row: one that is as another must be, and one in the middle of those that are measured together."""
    rows = rows_with("image", [1, 1, 1])
    if column == "prompt":
        parts = {"type": Value("string"), "text": Value("string"), "image": Image()}
        features = Features(prompt=List({"role": Value("string"), "content": List(parts)}))
        content = [{"type": "image", "text": None, "image": each} for each in rows["image"]]
        rows = Dataset.from_dict({"prompt": [[{"role": "user", "content": [part]}] for part in content]}, features)
    trainer = make_seeing(rows)
    table = rows.with_format("arrow")[:].to_pylist()
    part = table[row]["image"] if column == "image" else table[row]["prompt"][0]["content"][0]["image"]
    part["bytes"] = part["bytes"][:300]
    trainer.train_dataset = Dataset.from_list(table).cast(rows.features)
    with pytest.raises(LockstepError, match=f"the training data, row {row + 1}, cannot be decoded"):
        attached(trainer, seeing)


def test_the_prompt_that_takes_most_depends_on_the_server(server_state, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few large images, or a large one and many small ones of which the processor makes much."""
    monkeypatch.setattr(images, "_LARGE_FILE", 2**40)
    pictures = {
        "few": [(4000, 2000), (4000, 2000), (4000, 1000)],
        "many": [(3872, 3872), *[(64, 64)] * 7],
    }
    largest, other = images.Largest(), images.Largest()
    for found, (where, sizes) in zip((largest, other), pictures.items(), strict=True):
        found.see_all([SimpleNamespace(size=size, width=size[0], height=size[1]) for size in sizes], where)
    largest.join(other)
    plain = server_state.model_copy(update={"max_images": 8, "max_image_memory": 30 * 20_000_000})
    images.check_images(8, largest, {}, plain)
    tiles = plain.model_copy(update={"max_image_memory": 2**30, "least_image_memory": 90 * 10**6})
    with pytest.raises(LockstepError, match=r"^many has images that take 1079771520 bytes"):
        images.check_images(8, largest, {}, tiles)


def test_a_line_is_refused_before_a_processor_takes_gigabytes_for_it(seeing, make_seeing, monkeypatch) -> None:
    asked = {"prompt": rows_with("image", [0, 0])["prompt"][:], "image": [picture(1), Pillow.new("RGB", (1, 5000))]}
    trainer = make_seeing(Dataset.from_dict(asked))
    processed: list[int] = []
    tokenize = trainer._tokenize_prompts
    trainer._tokenize_prompts = lambda prompts: processed.append(len(prompts)) or tokenize(prompts)
    with pytest.raises(LockstepError, match=r"data, row 2, .*1 x 5000 pixels, and one edge may be at most 20 times"):
        attached(trainer, seeing)
    assert processed == [1]


def test_training_and_evaluation_see_the_same_images() -> None:
    trainer, shown = SimpleNamespace(_is_vlm=True, train_dataset=None, eval_dataset=None), picture(1)
    ask = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "How many?"}]}]
    for columns in ({"images": None, "image": shown}, {"image": None, "images": [shown]}, {"images": [shown]}):
        row = {"prompt": ask, **columns}
        assert images.seen_prompt(trainer, row) == evaluation.seen_prompt(row)
        assert images.image_rows(trainer, [row])[0]["images"] == [shown]
    for seen in (lambda row: images.seen_prompt(trainer, row), evaluation.seen_prompt):
        with pytest.raises(LockstepError, match="put all of them into 'images'"):
            seen({"prompt": ask, "image": shown, "images": [picture(2)]})


@pytest.mark.parametrize("kept", [True, False])
def test_none_that_is_meant_is_seen(kept: bool) -> None:
    """But not as a key of a part, which templates take for an image's, and not where Arrow has filled it in."""
    called = {"role": "assistant", "content": None, "tool_calls": [{"function": {"arguments": {"unit": None, "x": 1}}}]}
    parts = [{"type": "image", "image": None}, {"type": "text", "text": "How many?", "image": None}]
    prompt = [called, {"role": "user", "content": parts}]
    rows = Dataset.from_list([{"prompt": prompt}], **({"on_mixed_types": "use_json"} if kept else {}))
    trainer = SimpleNamespace(_is_vlm=True, train_dataset=rows, eval_dataset=None)
    row = {"prompt": rows[0]["prompt"], "images": [picture(1)]}
    arguments = {"unit": None, "x": 1} if kept else {"x": 1}
    for seen in (images.seen_prompt(trainer, row), images.image_rows(trainer, [row])[0]["prompt"]):
        assert seen[0]["tool_calls"][0]["function"]["arguments"] == arguments
        assert seen[1]["content"][1] == {"type": "text", "text": "How many?"}


def test_images_in_both_columns_are_refused(seeing, make_seeing) -> None:
    asked = rows_with("images", [1, 0])
    columns = {"prompt": asked["prompt"][:], "images": asked["images"][:], "image": [None, picture(9)]}
    rows = Dataset.from_dict(columns)
    with pytest.raises(LockstepError, match="the training data has images in the column 'image' and in 'images'"):
        attached(make_seeing(rows), seeing)


@pytest.mark.parametrize("vision_model", ["smolvlm"], indirect=True)
def test_a_script_loads_a_processor_without_num2words(vision_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.smolvlm import processing_smolvlm

    monkeypatch.setattr(processing_smolvlm, "num2words", None)
    with pytest.raises(ImportError, match="num2words"):
        AutoProcessor.from_pretrained(vision_model)
    learner.do_without_videos()
    assert AutoProcessor.from_pretrained(vision_model).image_processor


def test_images_are_not_encoded_to_be_counted(seeing, make_seeing, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts, "_encoded", OrderedDict())
    trainer = make_seeing(rows_with("image", [1] * 6))
    attached(trainer, seeing).close()
    assert len(prompts._encoded) == 1, "that of the probe"


@pytest.mark.parametrize("side", range(1, images.PROBE_SIDE + 1))
def test_the_probe_has_a_picture_of_any_size(side: int) -> None:
    probe = images.drawn(side)
    assert probe.size == (side, side)
    assert len(probe.getcolors(side**2)) >= min(side, 3)


def test_servers_of_small_pictures_are_proven_with_one(seeing, make_seeing) -> None:
    trainer = make_seeing(
        Dataset.from_dict({"prompt": rows_with("image", [0])["prompt"][:] * 2, "image": [picture(1, 8)] * 2})
    )
    seeing.state = seeing.state.model_copy(update={"max_image_pixels": 64})
    seen = images.image_probe(trainer, [seeing.state])
    assert seen is not None
    assert cast(Any, seen.token_ids).sizes == [(8, 8)]


def test_the_proof_of_sync_sees_an_image(seeing, make_seeing) -> None:
    """The server's model sees otherwise: text alone would not show it."""
    trainer = make_seeing(rows_with("image", [1, 1]))
    with torch.no_grad():
        seeing.base["model.visual.patch_embed.proj.weight"].mul_(1.5)
    attached(trainer, seeing)
    with pytest.raises(LockstepError, match="at the base"):
        trainer.train()


def attached(trainer: GRPOTrainer, server: FakeServer, **options: Any) -> Session:
    return attach(trainer, client=RolloutClient("http://fake", transport=server.transport), **options)


def calls_of(pool: Any) -> list[RewardCall]:
    """Return a list that gets each call of a reward function."""
    submit, calls = pool.submit, list[RewardCall]()

    def submit_kept(index: int, call: RewardCall) -> Any:
        calls.append(call)
        return submit(index, call)

    pool.submit = submit_kept
    return calls
