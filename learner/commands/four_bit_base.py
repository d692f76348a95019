"""`learner four-bit-base`: a base for QLoRA that is the same policy in the learner and on the server.

Quantizing a base moves its logprobs far more than rounding does (SmolLM2-135M's by 1 nat rms in nf4), so a learner with
a quantized base and a server with the original hold two policies. Instead both get a base that was quantized already:
every weight is one of the 16 values of its block, and quantizing it again changes nothing. The learner holds it in
four bits, the server in its own dtype, and both compute with the same numbers.

Four bits as in QLoRA (Dettmers et al. 2023, arXiv:2305.14314): blocks of 64 weights, a scale and 16 code values.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from learner.adapters.quantization import FOUR_BIT, check_bitsandbytes
from learner.adapters.stored import TOKENIZER_FILES, copy_files, fetch_base
from learner.commands.flags import Parser, dtype_name, either_spelling
from learner.utils.atomic import atomic_directory, check_writable, is_missing_or_empty
from shared.adapter_file import DTYPES
from shared.errors import InvalidRequest


def make_base(model: str, out: str | Path, *, revision: str | None = None, dtype: str, quant_type: str = "nf4") -> int:
    """Write `model` with quantized linear layers to `out`, atomically. Return their number; raises `invalid_request`.

    Args:
        model: a directory, or a repository of the hub.
        dtype: of all weights, and the learner's `--dtype` later.
    """
    check_bitsandbytes()
    import torch
    from bitsandbytes import functional, nn
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    target = Path(out).absolute()
    check_writable(out, "--out", directory=True)
    if not is_missing_or_empty(target):
        raise InvalidRequest(f"{target} exists; choose another --out")
    folder = fetch_base(model, revision)
    if json.loads((folder / "config.json").read_text()).get("quantization_config"):
        raise InvalidRequest(f"{model} is quantized already: name the checkpoint that it was made from")
    torch_dtype = getattr(torch, dtype)
    bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=quant_type, bnb_4bit_compute_dtype=torch_dtype)
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch_dtype, quantization_config=bits)
    layers = [name for name, module in loaded.named_modules() if isinstance(module, nn.Linear4bit)]
    if not layers:
        raise InvalidRequest(f"{model} has no linear layer that bitsandbytes quantizes")
    loaded = loaded.dequantize(torch_dtype)
    with torch.no_grad():
        for name in layers:
            weight = loaded.get_submodule(name).weight.detach()
            for _ in range(8):  # the first time rounds the scale of each block to the weights' dtype
                again = functional.dequantize_4bit(*functional.quantize_4bit(weight, quant_type=quant_type))
                stable = torch.equal(again.to(weight.dtype), weight)
                weight.copy_(again)
                if stable:
                    break
            else:
                raise InvalidRequest(
                    f"{name} changes whenever it is quantized again; are there NaN or infinities in it?"
                )
    setattr(loaded.config, FOUR_BIT, {"quant_type": quant_type, "dtype": dtype})
    with atomic_directory(target) as building:
        loaded.save_pretrained(building)
        copy_files(folder, building, TOKENIZER_FILES)
    return len(layers)


def main(argv: Sequence[str]) -> int:
    """Run the command. Return the exit code."""
    options = make_parser().parse_args(argv)
    layers = make_base(
        options.model, options.out, revision=options.model_revision, dtype=options.dtype, quant_type=options.quant_type
    )
    print(
        f"{options.out}: {layers} linear layers of {options.model} in {options.quant_type}\n"
        f"rollout-server {options.out} --dtype {options.dtype} ...\n"
        f"learner train --model_name_or_path {options.out} --dtype {options.dtype} --load_in_4bit true ..."
    )
    return 0


def make_parser() -> argparse.ArgumentParser:
    """Flags of `learner four-bit-base`."""
    summary = (
        "Make a base model for QLoRA: the same for a learner that holds it in four bits and a server that does not."
    )
    parser = Parser(prog="learner four-bit-base", description=summary)
    add = either_spelling(parser)
    add("model", help="a model's directory, or its name on the hub")
    add("--out", required=True, help="directory to write")
    add(
        "--dtype",
        type=dtype_name,
        choices=tuple(DTYPES),
        default="bfloat16",
        help="of both sides' computation (default %(default)s)",
    )
    add("--quant-type", choices=("nf4", "fp4"), default="nf4", help="the 16 values (default %(default)s)")
    add("--model-revision", help="of the model on the hub")
    return parser
