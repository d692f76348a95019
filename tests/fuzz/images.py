"""Images that are broken, huge, or not what they say, on all routes that take images."""

from __future__ import annotations

import base64
import io
from typing import Any

from hypothesis import strategies as st
from PIL import Image

from tests.fuzz.campaign import Target, every, json_bytes
from tests.fuzz.routes import JSON
from tests.fuzz.wild import wild_texts
from tests.support.png import says

_SIZES = (0, 1, 2, 28, 100, 60_000, 2**31 - 1, 2**32 - 1)
_URLS = ("http://127.0.0.1:1/a.png", "file:///etc/passwd", "data:", "data:image/png;base64,", "//a", "https://[")


def _file(kind: str, mode: str, size: tuple[int, int]) -> bytes:
    stream = io.BytesIO()
    Image.effect_noise(size, 60).convert(mode).save(stream, kind)
    return stream.getvalue()


_GOOD = [
    _file(kind, mode, size)
    for kind, mode in (("PNG", "RGB"), ("PNG", "RGB"), ("PNG", "P"), ("PNG", "RGBA"), ("JPEG", "RGB"))
    for size in ((1, 1), (40, 30), (1, 19), (1, 5000))
]


@st.composite
def _files(draw: st.DrawFn) -> bytes:
    if draw(st.integers(0, 4)) == 0:
        width, height = (draw(st.sampled_from(_SIZES)) for _ in range(2))
        return says(
            width,
            height,
            colour=draw(st.sampled_from((2, 2, 0, 3, 6, 7))),
            depth=draw(st.sampled_from((8, 8, 1, 16, 3))),
        )
    data = bytearray(draw(st.sampled_from(_GOOD)))
    for _ in range(draw(st.integers(0, 3))):
        place = draw(st.integers(0, len(data) - 1)) if data else 0
        change = draw(st.sampled_from(("flip", "cut", "repeat", "none")))
        if change == "flip" and data:
            data[place] ^= draw(st.integers(1, 255))
        elif change == "cut":
            del data[place:]
        elif change == "repeat":
            data += data[place:] * draw(st.integers(1, 4))
    return bytes(data)


@st.composite
def _parts(draw: st.DrawFn, url: str) -> dict[str, Any]:
    """Draw a medium as vLLM's routes may be told of one."""
    kind = draw(
        st.sampled_from(("image_url", "image_pil", "image", "video_url", "input_image", "image_embeds", "text"))
    )
    value = draw(st.sampled_from((url, [url], {"url": url}, None)))
    return {**draw(st.sampled_from(({"type": kind}, {}, {"uuid": "a"}))), kind: value}


@st.composite
def _requests(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    files = draw(st.lists(_files(), max_size=4))
    encoded = [base64.b64encode(data).decode() for data in files]
    if draw(st.integers(0, 5)) == 0:
        encoded = [draw(wild_texts) for _ in encoded]
    images = [{"data": data} for data in encoded]
    blank = [{"type": "image"}] * draw(st.sampled_from((len(images), len(images), 0, 3)))
    messages = [{"role": "user", "content": [*blank, {"type": "text", "text": "a"}]}]
    path = draw(st.sampled_from(("/v1/generate", "/v1/score", "/v1/chat/completions", "/tokenize")))
    if path == "/v1/generate":
        prompt = draw(st.sampled_from(({"messages": messages}, {"token_ids": [5, *[514] * len(blank), 6]})))
        return path, {"prompts": [{**prompt, "images": images}], "policy": "base", "sampling": {"max_tokens": 1}}
    if path == "/v1/score":
        sequence = [5, *[514] * draw(st.integers(0, 8)), 6]
        return path, {"sequences": [sequence], "images": [images], "policy": "base"}
    urls = [*(f"data:image/png;base64,{data}" for data in encoded), *_URLS]
    parts = [draw(_parts(draw(st.sampled_from(urls)))) for _ in range(draw(st.integers(0, 2)))]
    content = [*parts, {"type": "text", "text": "a"}]
    return path, {"model": "base", "messages": [{"role": "user", "content": content}], "max_tokens": 1}


def fuzz_images(target: Target, examples: int, number: int) -> None:
    """Send prompts with images."""

    def send(drawn: tuple[str, dict[str, Any]]) -> None:
        path, body = drawn
        target.send("images", "POST", path, content=json_bytes(body), headers=JSON)

    every(_requests(), examples, number, send)
    target.expect_unchanged("images")
