"""A trained adapter and its base model on disk: found, checked, and read. Only reading tensors imports torch."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError, safe_open

from learner.adapters.lora_rules import PLAIN_INITS, REFUSED_LORA_FIELDS
from learner.run_dir.checkpoint import ADAPTER_FILES, last_checkpoint, load_state
from learner.run_dir.files import EVALS_FILE, FINAL_ADAPTER, SUMMARY_FILE
from learner.utils.hub import hub_error
from shared.adapter_file import DTYPES, LORA_A, LORA_B
from shared.errors import InvalidRequest, MalformedAdapter, NotFinite, UnsupportedAdapter
from shared.model_files import NOT_LOADED
from shared.weights import ModuleSpec

if TYPE_CHECKING:
    import torch

CONFIG_FILE, WEIGHTS_FILE = ADAPTER_FILES
PEFT_PREFIX = "base_model.model."
#: Safetensors' names of the dtypes that widen to float32 without loss.
FLOATS = {code for code, _ in DTYPES.values()}
_EXPONENTS: dict[str, tuple[Any, int]] = {
    "F32": (np.uint32, 0x7F800000),
    "BF16": (np.uint16, 0x7F80),
    "F16": (np.uint16, 0x7C00),
}
#: Options that PEFT marks as variants of LoRA, beside those in `lora_rules`.
_VARIANTS = ("velora_config", "monteclora_config", "use_bdlora", "arrow_config", "alora_invocation_tokens")
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
#: What a multimodal model makes of images and sound: copied unchanged, too.
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")


@dataclass(frozen=True)
class StoredAdapter:
    """A PEFT directory of plain LoRA on linear layers.

    Attributes:
        config: adapter_config.json.
        modules: rank and scaling of every adapted module, by its name in the base model.
        run: summary of its training; empty if unknown.
        step: optimizer steps it was trained for, if known.
    """

    folder: Path
    config: dict[str, Any]
    modules: dict[str, ModuleSpec]
    run: dict[str, Any]
    step: int | None

    def pair(self, module: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Return A [rank, in] and B [out, rank] of a module in float32, without the scaling.

        Raises `not_finite`, and `unsupported_adapter` for other dtypes than float32, bfloat16 and float16.
        """
        path = self.folder / WEIGHTS_FILE
        tensors, names = open_tensors(path), [PEFT_PREFIX + module + suffix for suffix in (LORA_A, LORA_B)]
        for name in names:
            if (code := tensors.get_slice(name).get_dtype()) not in FLOATS:
                raise _unsupported_dtype(name, path, code)
        a_RI, b_OR = (tensors.get_tensor(name).float() for name in names)
        if not (a_RI.isfinite().all() and b_OR.isfinite().all()):
            raise NotFinite(f"{module} in {self.folder} holds NaN or infinity")
        return a_RI, b_OR

    def check_finite(self) -> None:
        """Raise what `pair` raises of any module, without torch: NaN and infinity set all bits of the exponent."""
        path = self.folder / WEIGHTS_FILE
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header: dict[str, Any] = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        for name, info in header.items():
            if info["dtype"] not in _EXPONENTS:
                raise _unsupported_dtype(name, path, info["dtype"])
            integer, exponent = _EXPONENTS[info["dtype"]]
            bits = np.memmap(path, integer, "r", 8 + length + info["data_offsets"][0], tuple(info["shape"]))
            if (bits & exponent == exponent).any():
                raise NotFinite(f"{name} in {self.folder} holds NaN or infinity: the training had diverged")


def _unsupported_dtype(name: str, path: Path, code: str) -> UnsupportedAdapter:
    return UnsupportedAdapter(f"{name} in {path} is {code}: only {', '.join(DTYPES)} are supported")


def open_tensors(path: Path, framework: str = "pt") -> Any:
    """Map a safetensors file into memory, or raise `malformed_adapter`; "np" reads its header without torch."""
    try:
        return safe_open(path, framework)
    except (SafetensorError, OSError) as error:
        raise MalformedAdapter(f"{path} is not a safetensors file, or has been cut off ({error})") from error


def open_adapter(path: str | Path) -> StoredAdapter:
    """Open the adapter in a PEFT directory, a checkpoint, or a run's output_dir (see `find_adapter`).

    Raises `invalid_request` if there is none, `unsupported_adapter` for all but plain LoRA, `malformed_adapter` if its
    tensors do not fit its settings.
    """
    folder = find_adapter(path)
    config = _json_file(folder / CONFIG_FILE)
    _check_config(config, folder)
    tensors = open_tensors(folder / WEIGHTS_FILE, "np")
    shapes = {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    state = load_state(folder, needed=ADAPTER_FILES)  # the optimizer may have been deleted to save space
    run = {**_json_file(folder.parent / EVALS_FILE), **_json_file(folder.parent / SUMMARY_FILE)}
    step = state.step if state else run.get("steps") if folder.name == FINAL_ADAPTER else None
    return StoredAdapter(folder, config, _modules(config, shapes, folder), run, step)


def find_adapter(path: str | Path) -> Path:
    """Return the PEFT directory at `path`: itself, or in an output_dir the one trained for longest.

    That is the final adapter, unless a resumed training has left a later checkpoint.
    """
    folder = Path(path)
    final, last = folder / FINAL_ADAPTER, last_checkpoint(folder)
    has_final = (final / CONFIG_FILE).is_file()
    if last is None and not has_final and (folder / CONFIG_FILE).is_file():
        return folder
    if last is not None and has_final:
        state, steps = load_state(last), _json_file(folder / SUMMARY_FILE).get("steps")
        has_final = state is None or steps is None or state.step <= steps
    if (found := final if has_final else last) is not None:
        return found
    raise InvalidRequest(
        f"{folder} holds no adapter: give a run's output_dir, a checkpoint of it, or a directory with {CONFIG_FILE}"
    )


def fetch_base(name: str, revision: str | None = None) -> Path:
    """Return the directory of a base model: `name`, or the hub's repository (cached or downloaded).

    Raises `invalid_request` if there is neither, `ConnectionError` if the hub cannot be reached.
    """
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        patterns = ["*.safetensors", "*.json", "*.jinja", "*.py", *TOKENIZER_FILES]
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns, ignore_patterns=[*NOT_LOADED]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise hub_error(
            f"the base model {name!r} is not a directory here and cannot be downloaded from the hub "
            f"({str(error).splitlines()[0]}); name it with --model_name_or_path",
            error,
        ) from error


def copy_files(source: Path, out: Path, names: Iterable[str]) -> None:
    """Copy the files of `names` that exist in `source`, with the code that one of them names."""
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)
            if name.endswith("_config.json"):
                copy_code(source, out, _json_file(source / name))


def copy_code(source: Path, out: Path, settings: Mapping[str, Any]) -> None:
    """Copy the Python modules of `source` if `settings` name classes in them: `auto_map`, for `trust_remote_code`."""
    if "auto_map" in settings:
        for module in source.glob("*.py"):  # those that are named import others
            shutil.copyfile(module, out / module.name)


def _check_config(config: dict[str, Any], folder: Path) -> None:
    """Refuse what `lora_rules.check_lora` refuses to train, by the file alone."""
    has = f"{folder} has"
    if config.get("peft_type") != "LORA":
        raise UnsupportedAdapter(f"{has} a {config.get('peft_type')} adapter, not LoRA")
    for name in (*REFUSED_LORA_FIELDS, *_VARIANTS, "fan_in_fan_out"):
        if config.get(name):
            raise UnsupportedAdapter(f"{has} {name}={config[name]!r}: only plain LoRA on linear layers is supported")
    if config.get("bias", "none") != "none":
        raise UnsupportedAdapter(f"{has} bias={config['bias']!r}: trained biases are not supported")
    if (init := config.get("init_lora_weights", True)) not in PLAIN_INITS:
        raise UnsupportedAdapter(f"{has} init_lora_weights={init!r}, which changed its base weights")


def _modules(config: dict[str, Any], shapes: dict[str, tuple[int, ...]], folder: Path) -> dict[str, ModuleSpec]:
    names = {name.removeprefix(PEFT_PREFIX).removesuffix(LORA_A).removesuffix(LORA_B) for name in shapes}
    wanted = {PEFT_PREFIX + name + suffix for name in names for suffix in (LORA_A, LORA_B)}
    if not names or shapes.keys() != wanted:
        odd = ", ".join(sorted(shapes.keys() ^ wanted)[:3]) or "none at all"
        raise UnsupportedAdapter(f"{folder} holds tensors that are no pairs of lora_A and lora_B: {odd}")
    modules, patterns = {}, config.get("alpha_pattern") or {}
    for name in sorted(names):
        a, b = (shapes[PEFT_PREFIX + name + suffix] for suffix in (LORA_A, LORA_B))
        if len(a) != 2 or len(b) != 2 or a[0] != b[1]:
            raise MalformedAdapter(f"{folder}: {name} has A {list(a)} and B {list(b)}, which are no pair of matrices")
        # As in PEFT, alpha comes from the first pattern that matches the end of the module's name.
        matching = (alpha for pattern, alpha in patterns.items() if re.match(rf"(.*\.)?({pattern})$", name))
        alpha = next(matching, config.get("lora_alpha", 8))
        scaling = alpha / (math.sqrt(a[0]) if config.get("use_rslora") else a[0])
        modules[name] = ModuleSpec(rank=a[0], scaling=scaling)
    return modules


def _json_file(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text())) if path.is_file() else {}
    except (OSError, ValueError, TypeError) as error:
        raise InvalidRequest(f"{path} cannot be read: {error}") from error
