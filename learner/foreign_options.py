"""Words of other tools: what to write instead of options of Unsloth, TRL's scripts and vLLM.

Imports nothing large: an unknown word is answered before anything else is looked at. docs/from-unsloth.md and
docs/from-trl.md say the same at length.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Collection, Mapping
from typing import Any

from shared.errors import InvalidRequest
from shared.messages import did_you_mean

#: Options of TRL about a vLLM that the learner would start itself, and what to do instead.
REFUSED = {
    "vllm_mode": "leave it out, or set it to 'server': rollouts come from the server at rollout_url",
    "vllm_model_impl": "give --model-impl to rollout-server",
    "vllm_enable_sleep_mode": "use share_gpu here, and rollout-server --share-gpu",
    "vllm_server_base_url": "use rollout_url",
    "vllm_server_host": "use rollout_url",
    "vllm_server_port": "use rollout_url",
    "vllm_server_timeout": "use ready_timeout_s and generate_timeout_s",
    "vllm_group_port": "the adapter travels over HTTP; no port is needed",
    "vllm_gpu_memory_utilization": "give --gpu-memory-utilization to rollout-server",
    "vllm_max_model_length": "give --max-model-len to rollout-server",
    "vllm_tensor_parallel_size": "give --tensor-parallel-size to rollout-server",
    "use_transformers_continuous_batching": "completions come from the rollout server's vLLM",
    "use_transformers_paged": "completions come from the rollout server's vLLM",
    "transformers_continuous_batching_config": "completions come from the rollout server's vLLM",
    "cache_implementation": "completions come from the rollout server's vLLM; see its --kv-cache-dtype",
}

#: Options that go to the server, under its own name for them; vLLM's, and ours.
_OF_SERVER = {
    "max_seq_length": "max-model-len",
    **{
        name: name.replace("_", "-")
        for name in (
            *("gpu_memory_utilization", "max_model_len", "max_lora_rank", "tensor_parallel_size", "max_num_seqs"),
            *("max_num_batched_tokens", "enforce_eager", "kv_cache_dtype", "enable_prefix_caching", "host", "port"),
            *("served_model_name", "load_format", "trust_request_chat_template", "data_parallel_size", "max_loras"),
            *("enable_lora", "slots_per_run", "max_runs", "apply", "keep_base", "drain_seconds", "ssl_certfile"),
        )
    },
}
#: What else must be said of some of them.
_MORE = {
    "max_lora_rank": "; the rank that is trained is --lora_r",
    "max_seq_length": ", for prompt and completion together; --max_completion_length bounds the completion",
    "max_loras": ", which follows from --slots-per-run and --max-runs: leave it out",
}

#: Options under another name here.
RENAMED = {
    "model_name": "model_name_or_path",
    "model": "model_name_or_path",
    "base_model": "model_name_or_path",
    "revision": "model_revision",
    "torch_dtype": "dtype",
    "r": "lora_r",
    "lora_rank": "lora_r",
    "rank": "lora_r",
    "target_modules": "lora_target_modules",
    "random_state": "seed",
    "use_gradient_checkpointing": "gradient_checkpointing",
    "max_tokens": "max_completion_length",
    "max_new_tokens": "max_completion_length",
    "n": "num_generations",
    "dataset_name": "task",
    "dataset": "task",
    "train_dataset": "task",
    "dataset_path": "task",
    "lr": "learning_rate",
    "epochs": "num_train_epochs",
    "group_size": "num_generations",
    "kl_coef": "beta",
    "model_id": "model_name_or_path",
    "learning_rate_scheduler": "lr_scheduler_type",
    "batch_size": "per_device_train_batch_size",
    "adapter": "init_adapter",
    "peft": "init_adapter",
    "api_key": "token_file",  # pragma: allowlist secret
    "wandb": "report_to",
    "resume": "resume_from_checkpoint",
    "vllm_url": "rollout_url",
    "server_url": "rollout_url",
}

#: Options that are not needed, or cannot be had.
_WHY = {
    "fast_inference": "completions always come from vLLM, in a rollout-server of its own: leave it out",
    "full_finetuning": "only a LoRA adapter is trained and pushed: leave it out (a higher --lora_r comes closest)",
    "max_prompt_length": "prompts are never cut: rollout-server --max-model-len must hold the longest one and "
    "--max_completion_length; leave out longer ones from the data",
    "load_in_16bit": "it is so by default: leave it out, or say --dtype bfloat16",
    "load_in_fp8": "the learner's base is loaded in --dtype, or in 4 bits with --load_in_4bit; the server's may be "
    "quantized: rollout-server --quantization fp8",
    "float8_kv_cache": "rollout-server --kv-cache-dtype fp8 --allow-policy-altering, and --allow_policy_altering here",
    "use_exact_model_name": "models are always named exactly: leave it out",
    "fix_tokenizer": "the tokenizer is used as it is: leave it out",
    "max_grad_steps": "use --max_steps",
    "offload_embedding": "there is none: leave it out; --max_tokens_per_pass bounds the memory of training",
    "unsloth_vllm_standby": "use --share_gpu here and with rollout-server: learner and server take turns on one GPU",
    "dataset_config": "it is part of --task: NAME:CONFIG",
    "dataset_train_split": "it is part of --task: NAME:CONFIG@SPLIT",
    "dataset_test_split": "use --eval_dataset NAME:CONFIG@SPLIT, or --eval_size for held-out rows of --task",
    "reward_model_name_or_path": "name a function that asks it in --reward_funcs; in a script, GRPOTrainer takes one",
    "warmup_ratio": "give --warmup_steps: below 1 it is a share of all steps",
    "token": "set $HF_TOKEN, for models and data of the hub; --token_file is for rollout servers",
    "hf_token": "set $HF_TOKEN, for models and data of the hub",
    "device_map": "the learner takes the first GPU of CUDA_VISIBLE_DEVICES, or none with --use_cpu: leave it out",
    "dataset_streaming": "data is read as a whole, or give an iterable dataset with --task module:object",
    "bias": "biases cannot be served: leave it out",
    "lora_bias": "biases cannot be served: leave it out",
    "modules_to_save": "only the adapter travels to the server: leave it out",
    "loftq_config": "it would change the base, which the server does not know: leave it out",
    "tokenizer": "it comes with the model: leave it out",
    "processing_class": "the tokenizer comes with the model: leave it out",
    "report_to_wandb": "use --report_to wandb",
}
#: The same of all that begin so.
_WHY_BEGINNING = {
    "unsloth_": "it bounds the memory of Unsloth's own passes: leave it out; here --max_tokens_per_pass does",
    "finetune_": "only the language model is adapted: leave it out; --lora_target_modules names layers",
}

SAMPLING = "vllm_sampling_params"
_SAMPLING_OPTIONS = {"max_tokens": "max_completion_length", "n": "num_generations"}
_SAMPLING_OPTIONS |= {name: name for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed")}


def unknown_option(written: str, value: object, known: Collection[str], *, flag: bool = True) -> str:
    """Return what to say of an option that does not exist.

    Args:
        written: its name, as it was written, without the first dashes.
        value: what it was given, if anything.
        flag: it stands on the command line, not in a file.
    """
    name, dashes = written.replace("-", "_"), "--" if flag else ""
    there_is_none = f"there is no {dashes}{written}" if flag else f"there is no option {written}"
    if name == SAMPLING:
        return f"{there_is_none}: {_sampling_options(value, flag=flag)}"
    if server := server_flag(name, value):
        return f"{there_is_none}: it belongs to the server: rollout-server MODEL {server}{_MORE.get(name, '')}"
    if name in RENAMED:
        return f"{there_is_none}: it is {dashes}{RENAMED[name]} here"
    beginnings = (why for beginning, why in _WHY_BEGINNING.items() if name.startswith(beginning))
    if why := _WHY.get(name) or next(beginnings, None):
        return f"{there_is_none}: {why}"
    spelled = [one.replace("_", "-") if "-" in written else one for one in known]
    return there_is_none + did_you_mean(dashes + written, [dashes + one for one in spelled])


def server_flag(name: str, value: object) -> str | None:
    """Return the flag of rollout-server that an option of other tools stands for, with its value, if it is one."""
    if name not in _OF_SERVER:
        return None
    return f"--{_OF_SERVER[name]}" + ("" if value in (None, "", "true", "True", True) else f" {value}")


def sampling_fields(text: str) -> dict[str, Any]:
    """Return the fields in `max_tokens=512, min_p = 0.1`, also with `SamplingParams(...)` around them, or as JSON.

    Raises:
        InvalidRequest: it is neither.
    """
    inner = re.fullmatch(r"\s*[\w.]*\((.*)\)\s*", text, re.DOTALL)
    try:
        if text.lstrip().startswith("{"):
            fields = ast.literal_eval(re.sub(r"\b(true|false|null)\b", lambda m: _JSON[m[0]], text.strip()))
        else:
            call = ast.parse(f"f({inner[1] if inner else text})".replace("\n", " "), mode="eval").body
            # `n=1)+(2` closes the call itself; `**fields` has no name.
            if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name)) or call.args:
                raise ValueError("each field needs its name")
            if any(keyword.arg is None for keyword in call.keywords):
                raise ValueError("each field needs its name")
            fields = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
        fields = dict(fields)  # braces may hold a set, too
        if not all(isinstance(name, str) for name in fields):
            raise ValueError("each field needs its name")
        return fields
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
        raise InvalidRequest(f"{SAMPLING} {text!r:.200}: write its fields as max_tokens=512, min_p=0.1") from error


_JSON = {"true": "True", "false": "False", "null": "None"}


def _sampling_options(value: object, *, flag: bool) -> str:
    """Return the options to write instead of Unsloth's sampling parameters."""
    examples = {"max_tokens": 512, "min_p": 0.1}
    try:
        given = dict(value) if isinstance(value, Mapping) else sampling_fields(str(value)) if value else examples
    except InvalidRequest:
        given = examples
    own = {_SAMPLING_OPTIONS[name]: one for name, one in given.items() if name in _SAMPLING_OPTIONS}
    rest = {name: one for name, one in given.items() if name not in (*_SAMPLING_OPTIONS, "include_stop_str_in_output")}
    if rest:
        own["generation_kwargs"] = repr(rest).replace("'", '"')
    if flag:
        quoted = {name: f"'{one}'" if name == "generation_kwargs" else f"{one}" for name, one in own.items()}
        return "write " + " ".join(f"--{name} {one}" for name, one in quoted.items())
    return "write " + ", ".join(f"`{name}: {one}`" for name, one in own.items())
