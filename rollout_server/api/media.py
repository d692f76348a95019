"""Images in bodies of vLLM's routes: as data, within our limits, and nothing that would be fetched."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rollout_server.generation.images import FORMATS, ImageLimits
from shared.errors import InvalidRequest
from shared.images import Image

#: Parts of a conversation that name a medium by its address, and where conversations are.
_ADDRESSED = ("image_url", "video_url", "audio_url")
_CONVERSATIONS = ("messages", "input", "system")
#: Fields that would change how images are processed, which a learner could not know.
_PROCESSING = ("mm_processor_kwargs", "media_io_kwargs")


@dataclass(frozen=True)
class MediaRules:
    """What vLLM's routes take.

    Args:
        limits: None: the model sees no images.
        fetched: beginnings of addresses from which an operator lets vLLM fetch: `http`, `file:`.
    """

    limits: ImageLimits | None = None
    fetched: tuple[str, ...] = ()

    def check(self, document: dict[str, Any]) -> None:
        """Check all media of a body.

        Raises:
            LockstepError: `invalid_request`, `too_large`.
        """
        for name in _PROCESSING:
            if document.get(name):
                raise InvalidRequest(f"{name}: images are processed as the model's files say; leave it out")
        addresses = [address for name in _CONVERSATIONS for address in _addresses(document.get(name))]
        if self.limits is not None:
            self.limits.check_count("the request", len(addresses))
        for index, address in enumerate(addresses):
            self._check_address(f"image {index}", address)

    def _check_address(self, what: str, address: str) -> None:
        if address[:5].lower() != "data:":
            if not address.lower().startswith(self.fetched or ("\0",)):
                raise InvalidRequest(
                    f"{what}: this server fetches nothing from {address:.60}; send the image as a data: URL, or let "
                    "its operator name hosts with --allowed-media-domains"
                )
            return
        if self.limits is None:
            raise InvalidRequest("this server takes text only; leave images out")
        kind, comma, data = address[5:].partition(",")
        media_type, _, encoding = kind.partition(";")
        if not comma or encoding != "base64" or media_type not in FORMATS:
            raise InvalidRequest(
                f"{what}: {address[: 5 + min(len(kind), 60)]} is no image that is taken; send "
                f"data:TYPE;base64,... with one of {', '.join(FORMATS)}"
            )
        if not data:
            raise InvalidRequest(f"{what} is empty")
        self.limits.decode(what, Image(data=data, media_type=media_type))


def _addresses(part: Any) -> Iterator[str]:
    """Yield the addresses of all media in a conversation.

    Raises:
        LockstepError: `invalid_request` for a medium under a name that its client chose: vLLM would take it for
            another one of that name.
    """
    if isinstance(part, list):
        for each in part:
            yield from _addresses(each)
    elif isinstance(part, dict):
        for name in _ADDRESSED:
            given = part.get(name)
            address = given.get("url") if isinstance(given, dict) else given
            if isinstance(address, str):
                if part.get("uuid") is not None:
                    raise InvalidRequest("uuid: an image is known by its contents; leave it out")
                yield address
        source = part.get("source")  # Anthropic's
        if isinstance(source, dict):
            if isinstance(source.get("url"), str):
                yield source["url"]
            elif isinstance(source.get("data"), str):
                yield f"data:{source.get('media_type')};base64,{source['data']}"
        for value in part.values():
            if isinstance(value, dict | list) and value is not source:
                yield from _addresses(value)


def without_data(part: Any) -> Any:
    """Return a part of a body without data: URLs, and without the data of Anthropic's sources: no text for models."""
    if isinstance(part, dict):
        inner = {name: without_data(value) for name, value in part.items()}
        if isinstance(part.get("data"), str) and part.get("type") == "base64":
            inner["data"] = ""
        return inner
    if isinstance(part, list):
        return [without_data(each) for each in part]
    return "" if isinstance(part, str) and part[:5].lower() == "data:" else part
