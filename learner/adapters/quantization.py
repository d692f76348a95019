"""Which quantized base a learner may hold: one that lost nothing by it, see `learner.commands.four_bit_base`. And how it computes."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from shared.errors import InvalidRequest, UnsupportedAdapter

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig
    from trl import ModelConfig

#: In the config.json of a base that `learner.commands.four_bit_base` made: what it was quantized with.
FOUR_BIT = "lockstep_four_bit"
_HOW = "make a base for learner and server with `learner four-bit-base MODEL --out DIR`"


def check_quantized(model_config: Any) -> None:
    """A model that was loaded in few bits has a base that lost nothing by it.

    Raises:
        LockstepError: `unsupported_adapter`.
    """
    quantization = getattr(model_config, "quantization_config", None)
    if quantization is None:
        return
    options: Mapping[str, Any] = quantization if isinstance(quantization, Mapping) else quantization.to_dict()
    if not options.get("load_in_4bit"):
        raise UnsupportedAdapter(
            f"a base quantized by {options.get('quant_method')} in the learner is another policy than the server's: "
            f"load it whole, or in 4 bits; {_HOW}"
        )
    if options.get("bnb_4bit_use_double_quant"):
        raise UnsupportedAdapter(
            "nested quantization (use_bnb_nested_quant) rounds the scales too, and no base stays what it is under "
            "that: leave it out"
        )
    made = getattr(model_config, FOUR_BIT, None)
    if made is None:
        raise UnsupportedAdapter(
            "a base quantized to 4 bits (load_in_4bit) is another policy than the one it was made from, which the "
            f"server would serve: {_HOW}, and give DIR to both"
        )
    compute = str(options.get("bnb_4bit_compute_dtype")).removeprefix("torch.")
    for what, given, needed in (
        ("dtype", compute, made["dtype"]),
        ("bnb_4bit_quant_type", options.get("bnb_4bit_quant_type"), made["quant_type"]),
    ):
        if given != needed:
            raise UnsupportedAdapter(f"the base was made for {what}={needed}, not {given}: give --{what} {needed}")


def keep_dtype_on_cpu(model: Any) -> None:
    """Let no eval pass change how `model` computes.

    On a CPU that has bfloat16 the first one would make bitsandbytes' layers compute in it for good, and backwards they
    would then pass no gradient on.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


DTYPES = ("bfloat16", "float16", "float32")


def quantization(model_args: ModelConfig) -> BitsAndBytesConfig | None:
    """What `load_in_4bit` asks for, refused before the model is loaded; None where it does not.

    Raises:
        LockstepError: `invalid_request`, `unsupported_adapter`.
    """
    from transformers import AutoConfig
    from trl import get_quantization_config

    if not (model_args.load_in_4bit or model_args.load_in_8bit):
        return None
    _check_installed()
    if model_args.dtype not in DTYPES:
        raise InvalidRequest(f"load_in_4bit needs --dtype, as the base was made for ({', '.join(DTYPES)})")
    wanted = get_quantization_config(model_args)
    config = AutoConfig.from_pretrained(model_args.model_name_or_path, revision=model_args.model_revision)
    config.quantization_config = wanted
    check_quantized(config)
    return wanted


def _check_installed() -> None:
    if find_spec("bitsandbytes") is None:
        raise InvalidRequest("four bits need bitsandbytes: pip install 'lockstep-rl[qlora]'")
