"""Prompts with images: what a server computes is what transformers computes, and bad images end nothing."""

from __future__ import annotations

import base64
import copy
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image as Pillow
from transformers import AutoModelForImageTextToText, AutoProcessor

from learner.adapters.lora_rules import language_pattern
from learner.commands.export import export
from learner.evaluation.evaluate import evaluate
from learner.servers.client import RolloutClient
from learner.tasks import load_task
from shared.image_processors import do_without_videos
from shared.images import Image, pixel_digest
from shared.rollouts import GenerateRequest, Prompt, ScoreRequest
from shared.sampling import SamplingParams
from tests.fuzz.campaign import Tally, Target, pushed
from tests.fuzz.images import fuzz_images
from tests.integration.support import policy as P
from tests.integration.support.learner_process import LearnerProcess
from tests.integration.support.server import HTTP, ServerProcess, running_server
from tests.support.arguments import arguments
from tests.support.png import png, says, with_chunk
from tests.support.tiny_vision_model import make_tiny_vision_model

FLAGS = arguments(
    {
        "--max-lora-rank": 16,
        "--dtype": "float32",
        "--max-model-len": 512,
        "--max-num-seqs": 16,
        "--max-num-batched-tokens": 512,
        "--enforce-eager": None,
        "--served-model-name": "base",
        "--max-images": 2,
        "--max-image-pixels": 40_000,
        "--max-image-mib": 1,
    }
)
RUN = "sees"
LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def vision_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_vision_model(tmp_path_factory.mktemp("vision"))


@pytest.fixture(scope="module")
def vision_server(vision_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with running_server(vision_model, tmp_path_factory.mktemp("server"), *FLAGS) as process:
        yield process


@pytest.fixture
def client(vision_server: ServerProcess) -> Iterator[RolloutClient]:
    with RolloutClient(vision_server.url) as client:
        yield client


@pytest.fixture(scope="module")
def processor(vision_model: Path) -> Any:
    do_without_videos(transformers)
    return AutoProcessor.from_pretrained(vision_model)


@pytest.fixture(scope="module")
def policy(vision_model: Path) -> PeftModel:
    model = AutoModelForImageTextToText.from_pretrained(vision_model, dtype=torch.float32)
    policy = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=language_pattern(LAYERS)))
    P.randomize(policy, 1)
    return policy


def picture(seed: int, width: int = 84, height: int = 56) -> Pillow.Image:
    pixels = torch.randint(0, 256, (width * height * 3,), generator=torch.Generator().manual_seed(seed))
    return Pillow.frombytes("RGB", (width, height), bytes(pixels.tolist()))


def sent(image: Pillow.Image) -> Image:
    return Image(data=base64.b64encode(png(image)).decode())


def processed(processor: Any, images: list[Pillow.Image], text: str = "What is it?") -> dict[str, torch.Tensor]:
    parts = [{"type": "image", "image": image} for image in images]
    messages = [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]
    made = processor.apply_chat_template(
        [messages], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    return dict(made)


@torch.no_grad()
def distribution(policy: torch.nn.Module, seen: dict[str, torch.Tensor], completion: list[int]) -> torch.Tensor:
    """Return transformers' ln p [T, V] at each token of `completion` after a prompt with images.

    In float64: in float32 transformers is off by more than 1e-4 here, and vLLM by less than 1e-5.
    """
    exact = copy.deepcopy(policy).double()
    ids = torch.cat([seen["input_ids"], torch.tensor([completion])], 1)
    types = torch.nn.functional.pad(seen["mm_token_type_ids"], (0, len(completion)))
    others = {"pixel_values": seen["pixel_values"].double(), "image_grid_thw": seen["image_grid_thw"]}
    logits_TV = exact(input_ids=ids, attention_mask=torch.ones_like(ids), mm_token_type_ids=types, **others).logits[0]
    return logits_TV[-len(completion) - 1 : -1].log_softmax(-1)


def expected(policy: torch.nn.Module, seen: dict[str, torch.Tensor], completion: list[int]) -> torch.Tensor:
    """Return transformers' ln p of `completion` [T] after a prompt with images."""
    return distribution(policy, seen, completion).gather(1, torch.tensor(completion)[:, None])[:, 0].float()


def generated(client: RolloutClient, prompts: list[Prompt], **sampling: Any) -> Any:
    return client.generate(GenerateRequest(prompts=prompts, sampling=SamplingParams(max_tokens=8, **sampling)))


def test_served_logprobs_with_images_equal_transformers(
    client: RolloutClient, processor: Any, policy: PeftModel
) -> None:
    P.push(client, policy, RUN, 0)
    one, two = [picture(1)], [picture(2, 56, 84), picture(3, 112, 56)]
    inputs = [processed(processor, images) for images in (one, two)]
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}]
    prompts = [
        Prompt(token_ids=made["input_ids"][0].tolist(), images=[sent(image) for image in images])
        for made, images in zip(inputs, (one, two), strict=True)
    ]
    answer = generated(client, [*prompts, Prompt(messages=messages, images=[sent(one[0])])], temperature=0.0)
    assert answer.groups[2].prompt_token_ids == prompts[0].token_ids
    assert answer.groups[2].completions[0].token_ids == answer.groups[0].completions[0].token_ids
    assert answer.groups[0].image_digests == [pixel_digest(84, 56, one[0].tobytes())]
    for group, made in zip(answer.groups[:2], inputs, strict=True):
        assert group.prompt_token_ids == made["input_ids"][0].tolist()
        token_ids = group.completions[0].token_ids
        scored = client.score(
            ScoreRequest(
                sequences=[group.prompt_token_ids + token_ids],
                images=[[sent(image) for image in (one if group.prompt_index == 0 else two)]],
            )
        )
        assert scored.image_digests == [group.image_digests]
        served = torch.tensor(scored.logprobs[0][-len(token_ids) :])
        assert (served - expected(policy, made, token_ids)).abs().max() < P.FP32


def test_no_answer_is_of_an_older_adapter_or_another_image(
    client: RolloutClient, processor: Any, policy: PeftModel
) -> None:
    images = [picture(seed, 140, 112) for seed in (4, 5)]
    inputs = [processed(processor, [image]) for image in images]
    ids = inputs[0]["input_ids"][0].tolist()
    assert ids == inputs[1]["input_ids"][0].tolist()
    completion = [65, 70, 75]
    for step in range(1, 21):
        P.randomize(policy, step)
        P.push(client, policy, RUN, step)
        scored = client.score(ScoreRequest(sequences=[ids + completion] * 2, images=[[sent(i)] for i in images]))
        again = generated(client, [Prompt(token_ids=ids, images=[sent(image)]) for image in images], seed=step)
        wanted = [expected(policy, made, completion) for made in inputs]
        assert (wanted[0] - wanted[1]).abs().max() > 0.01
        for served, own in zip(scored.logprobs, wanted, strict=True):
            assert (torch.tensor(served[-3:]) - own).abs().max() < P.FP32, step
        for group, made in zip(again.groups, inputs, strict=True):
            (done,) = group.completions
            assert not {processor.image_token_id, processor.video_token_id} & set(done.token_ids)
            own = expected(policy, made, done.token_ids)
            assert (torch.tensor(done.uncut_logprobs) - own).abs().max() < P.FP32, step
        best = generated(client, [Prompt(token_ids=ids, images=[sent(images[step % 2])])], temperature=0.0)
        (done,) = best.groups[0].completions
        own_TV = distribution(policy, inputs[step % 2], done.token_ids)
        own_TV[:, [processor.image_token_id, processor.video_token_id]] = -torch.inf
        chosen = own_TV.gather(1, torch.tensor(done.token_ids)[:, None])[:, 0]
        assert (own_TV.max(-1).values - chosen).max() < P.FP32, step


def _bad_images() -> dict[str, tuple[list[dict[str, Any]], int]]:
    """Return images of a prompt, and the status with which they are refused."""
    good = png(picture(6))

    def encoded(data: bytes) -> dict[str, str]:
        return {"data": base64.b64encode(data).decode()}

    return {
        "truncated": ([encoded(good[: len(good) // 2])], 400),
        "huge": ([encoded(says(60_000, 60_000))], 413),
        "large": ([encoded(png(Pillow.new("RGB", (300, 300))))], 413),
        "a lie": ([encoded(says(84, 56))], 400),
        "junk behind it": ([encoded(good + b"\0")], 400),
        "an animation": ([encoded(with_chunk(good, b"acTL", bytes(8)))], 400),
        "to be turned": ([encoded(with_chunk(good, b"eXIf", bytes(8)))], 400),
        "transparent": ([encoded(png(Pillow.new("RGBA", (84, 56))))], 400),
        "another type": ([{**encoded(good), "media_type": "image/jpeg"}], 400),
        "empty": ([{"data": ""}], 400),
        "no bytes": ([encoded(b" ")], 400),
        "no base64": ([{"data": "!!!!"}], 400),
        "too many": ([encoded(good)] * 3, 413),
        "more than tokens": ([encoded(good)] * 2, 400),
        "a heavy file": ([encoded(good + bytes(2**20))], 413),
        "a url": ([{"url": "http://127.0.0.1:1/a.png"}], 400),
        "a thin line": ([encoded(png(Pillow.new("RGB", (20_000, 2))))], 400),
        "none for tokens": ([], 400),
    }


@pytest.mark.parametrize("case", _bad_images())
def test_bad_images_are_refused(vision_server: ServerProcess, processor: Any, case: str) -> None:
    images, status = _bad_images()[case]
    ids = [5, *[processor.image_token_id] * (1 if case == "more than tokens" else 6), 6]
    prompt = {"token_ids": ids, "images": images}
    generate = {"prompts": [prompt], "policy": "base", "sampling": {"max_tokens": 1}}
    score = {"sequences": [ids], "images": [images], "policy": "base"}
    for path, body in (("generate", generate), ("score", score)):
        answer = HTTP.post(f"{vision_server.url}/v1/{path}", json=body)
        assert answer.status_code == status, answer.text
        assert answer.json()["error"]["code"] == ("too_large" if status == 413 else "invalid_request")
    assert HTTP.get(f"{vision_server.url}/ready").status_code == 200


@pytest.mark.parametrize(
    ("tokens", "sides", "says"),
    [
        ([16], [56], "preprocessor_config.json"),
        ([3], [56], "preprocessor_config.json"),
        ([16, 16], [56, 56], "preprocessor_config.json"),
        ([1, 4], [56, 56], "preprocessor_config.json"),
        ([4, 4], [56], "preprocessor_config.json"),
        ([1, 1], [56], "preprocessor_config.json"),
        ([1], [56, 56], "2 images and 1 tokens"),
        ([4], [], "and nothing fills them"),
    ],
)
def test_ids_with_other_tokens_than_their_images_fill_are_refused(
    vision_server: ServerProcess, processor: Any, tokens: list[int], sides: list[int], says: str
) -> None:
    start, end = processor.tokenizer.convert_tokens_to_ids(["<|vision_start|>", "<|vision_end|>"])
    ids = [each for count in tokens for each in (start, *[processor.image_token_id] * count, end)]
    images = [sent(picture(6, side, side)).model_dump() for side in sides]
    for path, body in (
        ("generate", {"prompts": [{"token_ids": ids, "images": images}]}),
        ("score", {"sequences": [ids], "images": [images]}),
    ):
        answer = HTTP.post(f"{vision_server.url}/v1/{path}", json={**body, "policy": "base"})
        assert answer.status_code == 400, answer.text
        assert says in answer.text


def test_tokens_of_media_without_media_are_refused_on_every_route(vision_server: ServerProcess, processor: Any) -> None:
    check_media_tokens_refused(vision_server, processor)


def test_a_language_model_alone_takes_and_draws_no_tokens_of_media(
    vision_model: Path, processor: Any, tmp_path: Path
) -> None:
    """What it draws can be scored, and continued."""
    with running_server(vision_model, tmp_path, *FLAGS, "--language-model-only") as served:
        check_media_tokens_refused(served, processor)
        body = {"prompts": [{"token_ids": [5, 6]}], "policy": "base", "sampling": {"n": 32, "max_tokens": 64}}
        (group,) = HTTP.post(f"{served.url}/v1/generate", json=body).raise_for_status().json()["groups"]
        drawn = [each["token_ids"] for each in group["completions"]]
        assert not {processor.image_token_id, processor.video_token_id} & {token for each in drawn for token in each}
        assert all(max(each["log_kept_mass"]) < 0 for each in group["completions"])
        HTTP.post(f"{served.url}/v1/score", json={"sequences": drawn, "policy": "base"}).raise_for_status()


def check_media_tokens_refused(server: ServerProcess, processor: Any) -> None:
    for token in (processor.image_token_id, processor.video_token_id):
        ids = [5, token, 6]
        for path, body in (
            ("/v1/generate", {"prompts": [{"token_ids": ids}], "policy": "base"}),
            ("/v1/score", {"sequences": [ids], "policy": "base"}),
            ("/v1/completions", {"model": "base", "prompt": ids, "max_tokens": 1}),
        ):
            answer = HTTP.post(server.url + path, json=body)
            assert answer.status_code == 400, (path, answer.text)
            assert f"id {token}" in answer.text


@pytest.mark.parametrize("part", [{"image": "/etc/passwd"}, {"image_url": {"url": "http://127.0.0.1:1"}}])
def test_contents_of_images_in_messages_are_refused(vision_server: ServerProcess, part: dict[str, Any]) -> None:
    messages = [{"role": "user", "content": [{"type": "image", **part}]}]
    images = [sent(picture(6)).model_dump()]
    body = {"prompts": [{"messages": messages, "images": images}], "policy": "base"}
    answer = HTTP.post(f"{vision_server.url}/v1/generate", json=body)
    assert answer.status_code == 400
    assert "only text" in answer.text


class _Listener(BaseHTTPRequestHandler):
    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.asked.append(self.path)
        self.send_error(404)

    def log_message(self, *_: Any) -> None:
        pass


def _attacks(place: Any) -> list[tuple[str, dict[str, Any]]]:
    """Return requests to vLLM's routes that name a medium at `place`."""
    parts: list[dict[str, Any]] = [
        {kind: value, **more}
        for kind in ("image_url", "image_pil", "video_url", "audio_url", "image")
        for value in (place, [place], {"url": place})
        for more in ({"type": kind}, {}, {"uuid": "a"}, {"type": kind, "uuid": "a"})
    ]
    base64_source = {"type": "base64", "media_type": "image/png", "data": "AAAA", "url": place}
    sources = [{"type": "image", "source": source} for source in ({"type": "url", "url": place}, base64_source)]
    text = {"type": "text", "text": "a"}
    chats = [[{"role": "user", "content": [part, text]}] for part in (*parts, *sources)]
    inputs = [{"type": "input_image", "image_url": place}, {"type": "input_file", "file_url": place}]
    return [
        *(
            (path, {"messages": chat})
            for path in ("/v1/chat/completions", "/tokenize", "/v1/messages")
            for chat in chats
        ),
        *(("/v1/responses", {"input": [{"role": "user", "content": [part]}]}) for part in (*inputs, *parts)),
        ("/v1/messages/count_tokens", {"messages": chats[-1]}),
        ("/v1/completions", {"prompt": "a", "multi_modal_data": {"image": place}}),
    ]


def test_vllms_routes_take_no_media_and_fetch_nothing(vision_server: ServerProcess, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(picture(7)))
    listener = HTTPServer(("127.0.0.1", 0), _Listener)
    threading.Thread(target=listener.serve_forever, daemon=True).start()
    places = (
        f"http://127.0.0.1:{listener.server_port}/a.png",
        f"{tmp_path}/a.png",
        f"data:;base64,{sent(picture(7)).data}",
    )
    try:
        for path, body in (attack for place in places for attack in _attacks(place)):
            answer = HTTP.post(vision_server.url + path, json={"model": "base", "max_tokens": 1, **body})
            assert answer.status_code == 400, (path, body, answer.text)
            assert "only text is taken" in answer.text, (path, body, answer.text)
    finally:
        listener.shutdown()
        listener.server_close()
    assert _Listener.asked == []


def test_no_image_breaks_the_server(client: RolloutClient, vision_server: ServerProcess, policy: PeftModel) -> None:
    client.delete_run(RUN, P.LEASE, takeover=True)
    tally, pids = Tally(), vision_server.engine_processes()
    target = Target(vision_server.url, tally, alive=lambda: vision_server.engine_processes() == pids)
    try:
        pushed(target, policy, RUN)
        fuzz_images(target, 80, 7)
    finally:
        target.close()
    assert not tally.failures, "\n".join(failure[:1000] for failure in tally.failures[:20])
    assert tally.statuses["images"][200] > 3


def test_a_training_with_images(
    client: RolloutClient, vision_server: ServerProcess, vision_model: Path, processor: Any, tmp_path: Path
) -> None:
    client.delete_run(RUN, P.LEASE, takeover=True)
    task, folder = "learner.tasks.examples.counting:circles", tmp_path / "run"
    flags = {"--train_size": 16, "--max_staleness": 1, "--save_steps": 1}

    def train(steps: int) -> dict[str, Any]:
        own = arguments({**flags, "--max_steps": steps})
        return LearnerProcess(vision_server.url, vision_model, Path(task), folder, *own).finish()

    assert train(2)["steps"] == 2
    summary = train(3)
    assert summary["steps"] == 3
    assert summary["max_logprob_gap"] < P.FP32
    history = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len(history) == 3
    on_policy = history[0], history[2]  # the other batch was read ahead, with the weights of the step before
    assert max(step["drift"]["kl"] for step in on_policy) < 1e-8
    mixed = load_task(task, eval_size=2, train_size=4)
    assert evaluate(client, mixed, run_id=summary["run_id"]).questions == 2
    made = processed(processor, [picture(8)])
    ids, completion = made["input_ids"][0].tolist(), [65, 70, 75]
    scored = client.score(ScoreRequest(sequences=[ids + completion], images=[[sent(picture(8))]]))
    base = AutoModelForImageTextToText.from_pretrained(vision_model, dtype=torch.float32)
    own = expected(PeftModel.from_pretrained(base, folder / "adapter"), made, completion)
    assert (torch.tensor(scored.logprobs[0][-3:]) - own).abs().max() < P.FP32
    export(folder / "adapter", tmp_path / "merged", merged=True, model=str(vision_model), dtype="float32")
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert (expected(merged, made, completion) - own).abs().max() < P.FP32
