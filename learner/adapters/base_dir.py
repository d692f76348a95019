"""Directory of a base model: fetched, and copied from."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

from shared.errors import InvalidRequest

#: Tokenizer and chat template: copied unchanged beside a model's weights.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
    "chat_template.json",
)


def fetch_base(name: str, revision: str | None = None) -> Path:
    """Return the directory of a base model: `name` itself, or the hub's repository (cached or downloaded).

    Raises:
        LockstepError: `invalid_request` if there is none.
    """
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        patterns = ["*.safetensors", "*.json", "*.jinja", *TOKENIZER_FILES]
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise InvalidRequest(
            f"the base model {name!r} is not a directory here and cannot be downloaded from the hub "
            f"({str(error).splitlines()[0]}); name it with --model_name_or_path"
        ) from error


def copy_files(source: Path, out: Path, names: Iterable[str]) -> None:
    """Copy the files of `names` that exist in `source`."""
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)
