"""Nothing is fetched for a client of vLLM's routes, and no medium gets past our limits."""

from __future__ import annotations

import base64
import io
from typing import Any

import pytest
from PIL import Image as Pillow

from rollout_server.api.media import MediaRules, without_data
from rollout_server.generation.images import ImageLimits
from shared.errors import InvalidRequest, LockstepError, TooLarge

RULES = MediaRules(ImageLimits(count=1, mib=1, pixels=10_000))


def _data(width: int = 4, height: int = 4, kind: str = "PNG") -> str:
    stream = io.BytesIO()
    Pillow.new("RGB", (width, height)).save(stream, kind)
    return base64.b64encode(stream.getvalue()).decode()


def _chat(*urls: str, **more: Any) -> dict[str, Any]:
    parts = [{"type": "image_url", "image_url": {"url": url}, **more} for url in urls]
    return {"messages": [{"role": "user", "content": parts}]}


def _anthropic(**source: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": [{"type": "image", "source": source}]}]}


def test_an_image_as_data_is_taken_in_every_form() -> None:
    url = f"data:image/png;base64,{_data()}"
    RULES.check(_chat(url))
    RULES.check({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": url}]}]})
    RULES.check(_anthropic(type="base64", media_type="image/png", data=_data()))
    RULES.check({"messages": [{"role": "user", "content": "text"}], "mm_processor_kwargs": {}})


@pytest.mark.parametrize(
    "url", ["http://a.example/b.png", "HTTPS://a.example/b", "file:///etc/passwd", "//a.example/b", "ftp://a", "", " "]
)
def test_nothing_is_fetched(url: str) -> None:
    for document in (
        _chat(url),
        {"input": [{"content": [{"type": "input_image", "image_url": url}]}]},
        _anthropic(type="url", url=url),
        {"messages": [{"content": [{"type": "video_url", "video_url": {"url": url}}]}]},
        {"messages": [{"content": [{"type": "audio_url", "audio_url": {"url": url}}]}]},
    ):
        with pytest.raises(InvalidRequest, match="fetches nothing"):
            RULES.check(document)


def test_an_operator_may_let_vllm_fetch() -> None:
    rules = MediaRules(RULES.limits, ("http://", "https://"))
    rules.check(_chat("https://a.example/b.png"))
    with pytest.raises(InvalidRequest):
        rules.check(_chat("file:///etc/passwd"))


@pytest.mark.parametrize(
    ("document", "error"),
    [
        (_chat(f"data:image/png;base64,{_data(200, 100)}"), TooLarge),
        (_chat(*[f"data:image/png;base64,{_data()}"] * 2), TooLarge),
        (_chat(f"data:image/png;base64,{_data()[:40]}"), InvalidRequest),
        (_chat(f"data:image/jpeg;base64,{_data()}"), InvalidRequest),
        (_chat(f"data:image/png,{_data()}"), InvalidRequest),
        (_chat("data:image/png;base64,"), InvalidRequest),
        (_chat("data:video/jpeg;base64,AAAA"), InvalidRequest),
        (_chat("data:"), InvalidRequest),
        (_chat(f"data:image/png;base64,{_data()}", uuid="another's"), InvalidRequest),
        ({**_chat(), "mm_processor_kwargs": {"size": {"longest_edge": 10**9}}}, InvalidRequest),
        ({**_chat(), "media_io_kwargs": {"image": {}}}, InvalidRequest),
    ],
)
def test_bad_media_are_refused(document: dict[str, Any], error: type[LockstepError]) -> None:
    with pytest.raises(error):
        RULES.check(document)


def test_a_text_model_takes_no_images() -> None:
    with pytest.raises(InvalidRequest, match="text only"):
        MediaRules().check(_chat(f"data:image/png;base64,{_data()}"))


def test_data_is_no_text_to_tokenize() -> None:
    document = {**_chat(f"data:image/png;base64,{_data()}"), "prompt": "data: a word"}
    assert _data() not in str(without_data(document))
    assert _data() not in str(without_data(_anthropic(type="base64", data=_data())))
