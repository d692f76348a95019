"""Four-bit bases in the learner (QLoRA): only those that quantization does not change, see `four_bit_base`."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from learner.utils.wording import option
from shared.adapter_file import DTYPES
from shared.errors import InvalidRequest, UnsupportedAdapter

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig
    from trl import ModelConfig

#: Key in the config.json of a base made by `learner.commands.four_bit_base`: dtype and quantization type.
FOUR_BIT = "lockstep_four_bit"
_HOW = "make a base for learner and server with `learner four-bit-base MODEL --out DIR`"


def check_quantization(model_config: Any) -> None:
    """Refuse a quantized model, unless its base was made for that quantization and so holds the server's weights.

    Raises `unsupported_adapter`.
    """
    quantization = getattr(model_config, "quantization_config", None)
    if quantization is None:
        return
    options: Mapping[str, Any] = quantization if isinstance(quantization, Mapping) else quantization.to_dict()
    if not options.get("load_in_4bit"):
        raise UnsupportedAdapter(
            f"a base quantized by {options.get('quant_method')} in the learner is another policy than the server's: "
            f"load it unquantized, or in 4 bits; {_HOW}"
        )
    if options.get("bnb_4bit_use_double_quant"):
        raise UnsupportedAdapter(
            "nested quantization (use_bnb_nested_quant) rounds the scales too, which changes every base: leave it out"
        )
    made = getattr(model_config, FOUR_BIT, None)
    if made is None:
        raise UnsupportedAdapter(
            "a base quantized to 4 bits (load_in_4bit) is another policy than the original, which the server would "
            f"serve: {_HOW}, and give DIR to both"
        )
    compute = str(options.get("bnb_4bit_compute_dtype")).removeprefix("torch.")
    for what, given, needed in (
        ("dtype", compute, made["dtype"]),
        ("bnb_4bit_quant_type", options.get("bnb_4bit_quant_type"), made["quant_type"]),
    ):
        if given != needed:
            raise UnsupportedAdapter(f"the base was made for {what}={needed}, not {given}: give --{what} {needed}")


def quantization_config(model_args: ModelConfig) -> BitsAndBytesConfig | None:
    """Return the quantization that `load_in_4bit` asks for, checked before the model is loaded, or None.

    Raises `invalid_request`, `unsupported_adapter`.
    """
    from transformers import AutoConfig
    from trl import get_quantization_config

    if not (model_args.load_in_4bit or model_args.load_in_8bit):
        return None
    check_bitsandbytes()
    if model_args.dtype not in DTYPES:
        raise InvalidRequest(f"load_in_4bit needs {option('dtype')}, as the base was made for ({', '.join(DTYPES)})")
    config = AutoConfig.from_pretrained(model_args.model_name_or_path, revision=model_args.model_revision)
    config.quantization_config = get_quantization_config(model_args)
    check_quantization(config)
    return config.quantization_config


def check_bitsandbytes() -> None:
    """Refuse four bits without bitsandbytes: `invalid_request`."""
    if find_spec("bitsandbytes") is None:
        raise InvalidRequest("four bits need bitsandbytes: pip install 'lockstep-rl[qlora]'")


def pin_compute_dtype(model: Any) -> None:
    """Keep bitsandbytes' layers in the compute dtype they were loaded with.

    On a CPU with bfloat16 the first eval pass would switch them to bfloat16 for good, and no gradient would pass
    backward through them.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
