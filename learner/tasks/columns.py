"""Columns of a task's dataset: nested values that keep exactly their own keys, and names that rewards can be given."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

import pyarrow as pa
from datasets import Dataset, Features, IterableDataset, Value
from datasets.features.features import register_feature

from learner.tasks.base import REWARD_ARGUMENTS, TaskError
from shared.images import pixel_digest
from shared.media import MEDIA, TEXT_KINDS

T = TypeVar("T", Dataset, IterableDataset)
R = TypeVar("R")

#: Columns that TRL reads as images of the prompt.
IMAGE_COLUMNS = ("image", "images")
#: Columns of one of these types keep every value as it is; integers up to 64 bits.
_PLAIN = {str: "string", bool: "bool", int: "int64", float: "float64"}
#: Keys under which processors look for an image that is not in its part.
_ADDRESSES = ("url", "path", "base64")
#: Keys by which templates tell a part of text from one of media.
_OF_MEDIA = re.compile(r"(image|video|audio|input_(image|video|audio))\w*")
_TEXT_PART = '{"type": "text", "text": ...}'


@dataclass
class ExactJson:
    """A feature of `datasets`: any JSON value, which comes back as it was put in.

    Arrow would give the dicts of a column one set of keys, with None where a row has none, and its numbers one type.
    """

    pa_type: ClassVar[Any] = pa.large_binary()
    _type: str = field(default="ExactJson", init=False, repr=False)

    def __call__(self) -> pa.DataType:
        return self.pa_type

    def encode_example(self, value: Any) -> bytes:
        """Return the stored form; bytes, which no JSON value is, have been encoded before."""
        return value if isinstance(value, bytes) else json.dumps(value, ensure_ascii=False).encode()

    def decode_example(self, stored: bytes, token_per_repo_id: Any = None) -> Any:
        """Return the value."""
        return json.loads(stored)


with warnings.catch_warnings(action="ignore"):  # "experimental"
    register_feature(ExactJson, "ExactJson")


def exact_dataset(columns: Mapping[str, Sequence[Any]], where: str) -> Dataset:
    """Return a dataset of JSON values, each of which comes back as it was put in.

    Raises:
        TaskError: a value is none of JSON's, or a text holds half of a surrogate pair; with `where`, row and column.
    """
    arrays, features = dict[str, Any](), Features()
    for name, values in columns.items():
        features[name] = feature = _feature(values)
        try:
            if isinstance(feature, ExactJson):
                stored = [None if value is None else feature.encode_example(value) for value in values]
                arrays[name] = pa.array(stored, feature())
            else:
                arrays[name] = pa.array(values, feature())
        except (UnicodeEncodeError, TypeError) as error:
            row, why = next((i, why) for i, value in enumerate(values, 1) if (why := _refusal(value)))
            raise TaskError(f"{where}, row {row}, column {name!r}: {why}") from error
    return Dataset.from_dict(arrays, features)


def is_filled(feature: Any) -> bool:
    """Return whether Arrow has given all dicts in a column of this feature the same keys."""
    if isinstance(feature, dict):
        return True
    if isinstance(feature, list):
        return is_filled(feature[0])
    return is_filled(feature.feature) if hasattr(feature, "feature") else False


def without_filled_keys(prompt: Any) -> Any:
    """Return a prompt of a column that `is_filled`, without keys whose value is None; a message keeps its content."""
    if not isinstance(prompt, list):
        return prompt
    return [
        {key: _without_none(value) for key, value in message.items() if value is not None or key == "content"}
        if isinstance(message, Mapping)
        else message
        for message in prompt
    ]


def own_keys(prompt: Any, *, filled: bool, images: bool) -> Any:
    """Return a prompt as chat templates are to see it: what Arrow has filled in is not shown, None that is meant is.

    Args:
        filled: the column `is_filled`.
        images: templates of models that see take a part for an image's that has such a key, whatever its value, so
            parts have no None.
    """
    if filled or not images or not isinstance(prompt, list):
        return without_filled_keys(prompt) if filled else prompt
    return [
        {**message, "content": _without_none(message["content"])}
        if isinstance(message, Mapping) and isinstance(message.get("content"), list)
        else message
        for message in prompt
    ]


def prompted(rows: T, what: str, *, images: bool = False) -> T:
    """Return the rows of data that is trained on as it is, checked as `usable` does.

    Raises:
        TaskError: also where it is no dataset, or one that is known to have no column `prompt`.
    """
    if not isinstance(rows, Dataset | IterableDataset):
        raise TaskError(f"{what} is a {type(rows).__name__}, not a dataset: make one (datasets.Dataset.from_list)")
    if (names := rows.column_names) is not None and "prompt" not in names:
        raise TaskError(f"{what} has no column 'prompt'; it has {', '.join(names)}: rename the question's to it")
    return usable(rows, what, images=images)


def usable(rows: T, what: str, *, images: bool = False) -> T:
    """Return the rows, checked; without image columns, which TRL would read, where these hold no image.

    Args:
        images: the model sees images.

    Raises:
        TaskError: a column would take the place of an argument of reward functions, a row has an image and the model
            sees none, or an image cannot be decoded.
    """
    names = rows.column_names or ()
    if taken := [name for name in names if name in REWARD_ARGUMENTS]:
        raise TaskError(
            f"{what} has a column {taken[0]!r}, the name of an argument that every reward function gets: rename it"
        )
    for name in set(IMAGE_COLUMNS) & set(names) if isinstance(rows, Dataset) else ():
        seen = next(((i, value) for i, value in enumerate(decoded(rows[name], what), 1) if _is_seen(value)), None)
        if seen is None:
            rows = rows.remove_columns(name)
            continue
        where = f"{what}, row {seen[0]}"
        if not images:
            raise TaskError(
                f"{where}, column {name!r}: an image, and the model sees none: train another, or remove the column "
                "(docs/images.md)"
            )
        try:
            _listed(name, seen[1])
        except TaskError as error:
            raise TaskError(f"{where}, {error.message}") from error
    if set(IMAGE_COLUMNS) <= set(rows.column_names or ()) and isinstance(rows, Dataset):
        raise TaskError(f"{what} has images in the column 'image' and in 'images': put all of them into 'images'")
    return rows


def decoded(rows: Iterable[R], what: str, first: int = 1) -> Iterator[R]:
    """Yield rows, or values of a column, whose images are decoded as they are read.

    Args:
        first: number of the first of them.

    Raises:
        TaskError: a row cannot be decoded; with `what` and its number.
    """
    row = first - 1
    try:
        for row, value in enumerate(rows, first):  # noqa: B007
            yield value
    except Exception as error:  # whatever Pillow raises of a damaged file, and user code that transforms rows
        why = f"{type(error).__name__}: {' '.join(str(error).split()):.300}"
        raise TaskError(
            f"{what}, row {row + 1}, cannot be decoded ({why}): replace its image, or leave the row out"
        ) from error


def has_images(rows: Any) -> bool:
    """Return whether a prompt of a dataset has images: in a column of TRL's, or as a part of a message.

    Raises:
        TaskError: an image cannot be decoded; with its row.
    """
    if not isinstance(rows, Dataset):
        return False
    names = [name for name in IMAGE_COLUMNS if name in rows.column_names]
    values = {name: decoded(rows[name], "the task's data") for name in [*names, "prompt"]}
    return any(_is_seen(value) for name in names for value in values[name]) or any(map(_has_part, values["prompt"]))


def may_have_images(rows: Dataset | IterableDataset) -> bool | None:
    """Return whether a dataset can have images, by its columns alone; None for a stream that does not tell them."""
    features = rows.features
    if features is None:
        return None
    return any(name in features for name in IMAGE_COLUMNS) or "Image(" in repr(features)


def row_images(row: Mapping[str, Any]) -> list[Any]:
    """Return the images in a row's columns: those of `images`, or the one of `image`.

    Raises:
        TaskError: one holds anything else, or the two hold other images.
    """
    single, several = (_listed(name, row.get(name)) for name in IMAGE_COLUMNS)
    if single and several and single != several:
        raise TaskError("a row has other images in the column 'image' than in 'images': put all of them into 'images'")
    return several or single


def _listed(name: str, value: Any) -> list[Any]:
    """Return a row's images in the column of this name; raises `TaskError` if it holds anything else."""
    if value is None:
        return []
    several = name == "images" and isinstance(value, list | tuple)
    images = list(value) if several else [value]
    if other := [image for image in images if not _is_picture(image)]:
        raise TaskError(
            f"column {name!r}: {other[0]!r:.60} is not an image: load it, cast the column (datasets.Image), or leave "
            "it out"
        )
    if name == "images" and not several:
        raise TaskError("column 'images': an image that is in no list: put it into one, or name the column 'image'")
    return images


def _is_seen(value: Any) -> bool:
    return value is not None and value != []


def _has_part(prompt: Any) -> bool:
    return any(part.get("type") == "image" for part in message_parts(prompt))


def message_parts(prompt: Any) -> list[Mapping[str, Any]]:
    """Return the parts of all messages of a prompt, in order; a message whose content is text has none."""
    messages = prompt if isinstance(prompt, list) else []
    contents = [message.get("content") for message in messages if isinstance(message, Mapping)]
    parts = [part for content in contents if isinstance(content, list | tuple) for part in content]
    return [part for part in parts if isinstance(part, Mapping)]


def check_parts(prompt: Any, *, images: bool = True) -> None:
    """Check that messages hold text, and images where these are seen: of other media a chat template would make tokens
    with nothing behind them, or nothing at all.

    Args:
        prompt: as its template sees it (`own_keys`).
        images: the model sees images; otherwise keys without a value count, too, which templates take for media.

    Raises:
        TaskError: with what to write instead.
    """
    for message in prompt if isinstance(prompt, list) else ():
        if not isinstance(message, Mapping):
            raise TaskError(f'{message!r:.60} is no message: write {{"role": "user", "content": ...}}')
        content = message.get("content")
        if not isinstance(content, str | list | tuple | None):
            raise TaskError(f"the content of a message is {content!r:.60}: write text, or a list of parts")
        for part in content if isinstance(content, list | tuple) else ():
            _check_part(part, images=images)


def _check_part(part: Any, *, images: bool, inside: bool = False) -> None:
    """Check a part as `check_parts` does. `inside`: it is in another one, where nothing looks for images."""
    if not isinstance(part, Mapping):
        raise TaskError(f"{part!r:.60} is no part of a message: write {_TEXT_PART}")
    kind, keys = part.get("type"), [key for key, value in part.items() if value is not None or not images]
    named = f"a part of type {kind!r:.60}"
    if kind == "image":
        if not images:
            raise TaskError(f"{named}, and the model sees none: train another, or leave it out (docs/images.md)")
        known = not inside
        media = [key for key in keys if key in _ADDRESSES or (key != "image" and MEDIA.fullmatch(key))]
    else:
        known = isinstance(part.get("text"), str) if kind is None else isinstance(kind, str) and kind in TEXT_KINDS
        media = [key for key in keys if _OF_MEDIA.fullmatch(key)]
    if media or not known:
        named += f" with {media[0]!r}" if media else ""
        raise TaskError(
            f"{named}: only text and images are taken. Put an image into a column `images`, and a part "
            f'{{"type": "image"}} in its place; write anything else as {_TEXT_PART}, or leave it out'
        )
    contents = part.get("content")
    for each in contents if isinstance(contents, list) else ():
        _check_part(each, images=images, inside=True)


def holds_images(prompt: Any) -> bool:
    """Return whether a part of a prompt's messages holds an image, and not only its place."""
    return any(part.get("image") is not None for part in message_parts(prompt))


def image_key(image: Any) -> str:
    """Return what tells an image from others: its size and pixels."""
    return pixel_digest(image.width, image.height, image.tobytes()) if _is_picture(image) else ""


def _is_picture(value: Any) -> bool:
    """Return whether a value is an image of PIL's, which need not be installed for text."""
    return hasattr(value, "tobytes") and hasattr(value, "width")


def _feature(values: Sequence[Any]) -> Value | ExactJson:
    types = {type(value) for value in values if value is not None}
    if not types:
        return Value("null")
    name = _PLAIN.get(types.pop()) if len(types) == 1 else None
    if name == "int64" and not all(value is None or -(2**63) <= value < 2**63 for value in values):
        name = None
    return Value(name) if name else ExactJson()


def _refusal(value: Any) -> str | None:
    """Return why a value has no form in JSON; None if it has one."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return "half of a surrogate pair (\\ud800-\\udfff) is no character"
    except TypeError as error:
        place, what = next(_unwritable(value), ("a key", str(error)))
        return f"{place or 'it'} is {what}, which JSON has no form for: write it as text"
    return None


def _unwritable(value: Any, place: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping | list | tuple):
        for key, part in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from _unwritable(part, f"{place}[{key!r}]")
    elif value is not None and not isinstance(value, str | int | float):
        yield place, f"a {type(value).__name__}"


def _without_none(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_none(part) for key, part in value.items() if part is not None}
    return [_without_none(part) for part in value] if isinstance(value, list) else value
