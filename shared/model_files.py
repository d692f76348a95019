"""Where a model is named: is there one, and which files are its weights?

Asked before anything is imported that would take long to find out.
"""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from typing import Any

from shared.errors import InvalidRequest
from shared.messages import did_you_mean, one_line

_ASK_HUB_S = 10.0
_CONFIGS = ("config.json", "params.json")  # of transformers, of Mistral
INDEX_FILE, ONE_FILE = "model.safetensors.index.json", "model.safetensors"
#: What a repository holds beside the files that transformers and vLLM load: Mistral's weights, folders of others.
NOT_LOADED = ("consolidated*", "*/*")


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a model: those that its index names, or the one, or all where neither is there.

    Others may lie beside them: shards left behind, the same weights as Mistral names them, an adapter.
    """
    if (index := folder / INDEX_FILE).is_file():
        named = {folder / name for name in json.loads(index.read_text())["weight_map"].values()}
        if files := sorted(path for path in named if path.is_file()):
            return files
    if (one := folder / ONE_FILE).is_file():
        return [one]
    return sorted(
        path for path in folder.glob("*.safetensors") if not path.name.startswith(("adapter_", "consolidated"))
    )


@functools.cache
def check_model_exists(model: str, revision: str | None = None, *, config_elsewhere: bool = False) -> None:
    """Refuse a directory that is missing or holds no model, and a name that neither the cache nor the hub knows.

    Args:
        model: a directory, a file (GGUF), a URL of an object store (not looked at), or a name on the hub.
        config_elsewhere: its configuration is not in `model`.

    Raises:
        InvalidRequest: says what to do.
    """
    path = Path(model).expanduser()
    if "://" in model or path.is_file():
        return
    if path.is_dir():
        _check_directory(path, config_elsewhere)
    elif model.startswith(("/", ".", "~")) or model.count("/") > 1:
        raise InvalidRequest(f"there is no directory {model}{_nearest(path)}")
    else:
        _check_name(model, revision)


def take_chat_template(tokenizer: Any, model: str, revision: str | None, *, sees: bool = False) -> None:
    """Give a checkpoint's tokenizer the chat template that is its processor's alone, if it has none.

    Args:
        sees: a processor is used elsewhere, whose template comes first.
    """
    if (getattr(tokenizer, "chat_template", "") is None or (sees and hasattr(tokenizer, "chat_template"))) and (
        template := processor_template(model, revision)
    ):
        tokenizer.chat_template = template


def processor_template(model: str, revision: str | None = None) -> Any:
    """Return the chat template in files that transformers reads for processors only, in its order; None if none is."""
    for name in ("processor_config.json", "chat_template.json"):
        file = _file(model, name, revision)
        if file is not None and (template := json.loads(file.read_text(encoding="utf-8")).get("chat_template")):
            return template
    return None


def _file(model: str, name: str, revision: str | None) -> Path | None:
    if Path(model).is_dir():
        return path if (path := Path(model) / name).is_file() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

    try:
        return Path(hf_hub_download(model, name, revision=revision))
    except (EntryNotFoundError, HfHubHTTPError, OSError, ValueError):  # there is none, or no hub
        return None


def _check_directory(path: Path, config_elsewhere: bool) -> None:
    names = {entry.name for entry in path.iterdir()}
    if config_elsewhere or names.intersection(_CONFIGS) or any(name.endswith(".gguf") for name in names):
        return
    if "adapter_config.json" in names:
        raise InvalidRequest(
            f"{path} is an adapter, not a model: name its base model (base_model_name_or_path in "
            f"{path}/adapter_config.json)"
        )
    inside = sorted(name for name in names if (path / name / _CONFIGS[0]).is_file())
    raise InvalidRequest(
        f"{path} holds no model, it has no config.json" + (f": did you mean {path / inside[0]}?" if inside else "")
    )


def _check_name(model: str, revision: str | None) -> None:
    from huggingface_hub import HfApi, errors, try_to_load_from_cache
    from huggingface_hub.utils import validate_repo_id

    # vLLM takes `REPOSITORY:QUANTIZATION` for one of a repository's GGUF files.
    if re.fullmatch(r"[^:/]+/[^:/]+:[\w-]+", model):
        model = model.partition(":")[0]
    known = f"{model!r} is neither a directory here nor a model on the Hugging Face hub"
    try:
        validate_repo_id(model)
        if any(isinstance(try_to_load_from_cache(model, name, revision=revision), str) for name in _CONFIGS):
            return
        HfApi().model_info(model, revision=revision, timeout=_ASK_HUB_S)
    except errors.HFValidationError as error:
        raise InvalidRequest(f"{model!r} is neither a directory here nor a name that a hub could have") from error
    except errors.RevisionNotFoundError as error:
        raise InvalidRequest(f"{model} has no revision {revision!r} on the hub") from error
    except errors.GatedRepoError as error:
        raise InvalidRequest(
            f"{model} is gated: accept its terms at https://huggingface.co/{model} and set $HF_TOKEN"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise InvalidRequest(f"{known}: check the spelling; a private one needs $HF_TOKEN") from error
    except Exception as error:  # of the network, of any kind
        raise InvalidRequest(
            f"{model!r} is no directory here and not in the cache, and the hub cannot be asked "
            f"({one_line(error)}): name a directory, or download it first (hf download {model})"
        ) from error


def _nearest(path: Path) -> str:
    """Return a hint at what lies beside the missing `path`, or which of its parents is missing."""
    parent = path.absolute().parent
    while not parent.is_dir():
        path, parent = parent, parent.parent
    guess = did_you_mean(path.name, (entry.name for entry in parent.iterdir() if entry.is_dir()))
    return guess.replace("mean ", f"mean {parent}/", 1) if guess else f": {parent} has no {path.name}"
