"""Prompts with images: what a server computes is what transformers computes, and bad images end nothing."""

from __future__ import annotations

import base64
import io
import struct
import threading
import zlib
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

from learner.adapters.lora_rules import ONLY_LANGUAGE
from learner.servers.client import RolloutClient
from shared.image_processors import do_without_videos
from shared.images import Image, pixel_digest
from shared.rollouts import GenerateRequest, Prompt, ScoreRequest
from shared.sampling import SamplingParams
from tests.fuzz.campaign import Tally, Target, pushed
from tests.fuzz.images import fuzz_images
from tests.integration.support import policy as P
from tests.integration.support.server import HTTP, ServerProcess, running_server
from tests.support.arguments import arguments
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
    policy = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=ONLY_LANGUAGE))
    P.randomize(policy, 1)
    return policy


def picture(seed: int, width: int = 84, height: int = 56) -> Pillow.Image:
    pixels = torch.randint(0, 256, (width * height * 3,), generator=torch.Generator().manual_seed(seed))
    return Pillow.frombytes("RGB", (width, height), bytes(pixels.tolist()))


def sent(image: Pillow.Image, kind: str = "PNG") -> Image:
    stream = io.BytesIO()
    image.save(stream, kind)
    return Image(data=base64.b64encode(stream.getvalue()).decode(), media_type=f"image/{kind.lower()}")


def processed(processor: Any, images: list[Pillow.Image], text: str = "What is it?") -> dict[str, torch.Tensor]:
    parts = [{"type": "image", "image": image} for image in images]
    messages = [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]
    made = processor.apply_chat_template(
        [messages], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    return dict(made)


@torch.no_grad()
def expected(
    policy: PeftModel, seen: dict[str, torch.Tensor], completion: list[int], bias: dict[int, float] | None = None
) -> torch.Tensor:
    """Return transformers' ln p of `completion` [T] after a prompt with images."""
    ids = torch.cat([seen["input_ids"], torch.tensor([completion])], 1)
    types = torch.nn.functional.pad(seen["mm_token_type_ids"], (0, len(completion)))
    others = {name: seen[name] for name in ("pixel_values", "image_grid_thw")}
    logits_TV = policy(input_ids=ids, attention_mask=torch.ones_like(ids), mm_token_type_ids=types, **others).logits[0]
    logits_TV = logits_TV[-len(completion) - 1 : -1].float()
    for token, value in (bias or {}).items():
        logits_TV[:, token] += value
    return logits_TV.log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0]


def no_image_tokens(processor: Any) -> dict[int, float]:
    """Return the bias without which random weights draw tokens that no image fills."""
    return {processor.image_token_id: -100.0, processor.video_token_id: -100.0}


def generated(client: RolloutClient, processor: Any, prompts: list[Prompt], **sampling: Any) -> Any:
    drawn = SamplingParams(max_tokens=8, logit_bias=no_image_tokens(processor), **sampling)
    return client.generate(GenerateRequest(prompts=prompts, sampling=drawn))


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
    answer = generated(client, processor, [*prompts, Prompt(messages=messages, images=[sent(one[0])])], temperature=0.0)
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
        again = generated(client, processor, [Prompt(token_ids=ids, images=[sent(image)]) for image in images])
        wanted = [expected(policy, made, completion) for made in inputs]
        assert (wanted[0] - wanted[1]).abs().max() > 0.01
        for served, own in zip(scored.logprobs, wanted, strict=True):
            assert (torch.tensor(served[-3:]) - own).abs().max() < P.FP32, step
        for group, made in zip(again.groups, inputs, strict=True):
            (done,) = group.completions
            own = expected(policy, made, done.token_ids, no_image_tokens(processor))
            assert (torch.tensor(done.logprobs) - own).abs().max() < P.FP32, step


def _png(width: int, height: int) -> bytes:
    """Return a PNG that says it has so many pixels, and holds none."""
    chunk = struct.pack(">4sIIBBBBB", b"IHDR", width, height, 8, 2, 0, 0, 0)
    head = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return b"\x89PNG\r\n\x1a\n" + head + struct.pack(">I", 100) + b"IDAT"


def _encoded(data: bytes, media_type: Any = "image/png") -> dict[str, str]:
    return {"data": base64.b64encode(data).decode(), "media_type": media_type}


def _bad_images() -> dict[str, tuple[list[dict[str, str]], int]]:
    """Return images of a prompt, and the status with which they are refused."""
    good = sent(picture(6)).model_dump()
    whole = base64.b64decode(good["data"])
    return {
        "truncated": ([_encoded(whole[: len(whole) // 2])], 400),
        "huge": ([_encoded(_png(60_000, 60_000))], 413),
        "large": ([sent(Pillow.new("RGB", (300, 300))).model_dump()], 413),
        "another type": ([_encoded(whole, "image/jpeg")], 400),
        "an unknown type": ([_encoded(whole, "image/svg+xml")], 422),
        "empty": ([{"data": "", "media_type": "image/png"}], 422),
        "no bytes": ([_encoded(b" ")], 400),
        "no base64": ([{"data": "!!!!", "media_type": "image/png"}], 400),
        "too many": ([good] * 3, 413),
        "a heavy file": ([_encoded(whole + b"\0" * 2**20)], 413),
        "a url": ([{"url": "http://127.0.0.1:1/a.png"}], 422),
        "a thin line": ([sent(Pillow.new("RGB", (20_000, 2))).model_dump()], 400),
        "none for a token": ([], 200),
    }


@pytest.mark.parametrize("case", _bad_images())
def test_bad_images_are_refused(vision_server: ServerProcess, processor: Any, case: str) -> None:
    images, status = _bad_images()[case]
    ids = processed(processor, [picture(6)])["input_ids"][0].tolist()
    body = {"prompts": [{"token_ids": ids, "images": images}], "policy": "base", "sampling": {"max_tokens": 1}}
    answer = HTTP.post(f"{vision_server.url}/v1/generate", json=body)
    accepted = (400, 413, 422) if status != 200 else (200, 400)
    assert answer.status_code in accepted, answer.text
    if status == 413:
        assert answer.json()["error"]["code"] == "too_large"
    assert HTTP.get(f"{vision_server.url}/ready").status_code == 200


def test_ids_of_another_processor_are_refused(vision_server: ServerProcess, processor: Any) -> None:
    ids = processed(processor, [picture(6, 112, 112)])["input_ids"][0].tolist()
    body = {"prompts": [{"token_ids": ids, "images": [sent(picture(6, 56, 56)).model_dump()]}], "policy": "base"}
    answer = HTTP.post(f"{vision_server.url}/v1/generate", json=body)
    assert answer.status_code == 400, answer.text
    assert "preprocessor_config.json" in answer.text


class _Listener(BaseHTTPRequestHandler):
    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.asked.append(self.path)
        self.send_error(404)

    def log_message(self, *_: Any) -> None:
        pass


def test_vllms_routes_take_data_and_fetch_nothing(
    client: RolloutClient, vision_server: ServerProcess, processor: Any, policy: PeftModel, tmp_path: Path
) -> None:
    P.push(client, policy, RUN, 30)
    image = picture(7)
    (tmp_path / "a.png").write_bytes(base64.b64decode(sent(image).data))
    listener = HTTPServer(("127.0.0.1", 0), _Listener)
    threading.Thread(target=listener.serve_forever, daemon=True).start()

    def chat(url: str) -> Any:
        parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What is it?"}]
        body = {"model": "policy", "messages": [{"role": "user", "content": parts}], "max_tokens": 4}
        more = {"logprobs": True, "return_token_ids": True, "temperature": 1.0}
        return HTTP.post(
            f"{vision_server.url}/v1/chat/completions",
            json={**body, **more, "logit_bias": {str(k): v for k, v in no_image_tokens(processor).items()}},
        )

    try:
        for url in (f"http://127.0.0.1:{listener.server_port}/a.png", f"file://{tmp_path}/a.png", "data:image/png,x"):
            assert chat(url).status_code == 400, url
    finally:
        listener.shutdown()
        listener.server_close()
    assert _Listener.asked == []
    answer = chat(f"data:image/png;base64,{sent(image).data}")
    assert answer.status_code == 200, answer.text
    choice = answer.json()["choices"][0]
    served = torch.tensor([token["logprob"] for token in choice["logprobs"]["content"]])
    own = expected(policy, processed(processor, [image]), choice["token_ids"], no_image_tokens(processor))
    assert (served - own).abs().max() < P.FP32


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
