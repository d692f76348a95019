"""A small random model with a real tokenizer, made in place in a second: what integration tests serve and train.

python -m tests.support.tiny_model [DIR]     # build one and check that vLLM serves it as Hugging Face computes it
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Literal

Arch = Literal["qwen3", "llama"]

SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CORPUS = (
    "The quick brown fox jumps over the lazy dog while the rain in Spain stays mainly in the plain.",
    "State the final answer to the following arithmetic problem: 3 + 4 = 7, and then 12 - 5 = 7.",
    "system user assistant: you are a helpful assistant. Reply with the result only, please.",
    "A policy is a base model and the adapter of one run; rollouts are sampled from one version of it.",
    "What is the sum of one, two, three, four, five, six, seven, eight, nine and ten? It is fifty-five.",
    "Every sampled token is known to come from exactly one version of the weights, whatever happens between.",
    'Numbers such as 10, 25, 100 and 2048 come in digits; brackets, quotes and braces {"like": [these]} come too.',
)


def make_tiny_model(
    directory: str | Path,
    *,
    seed: int = 0,
    arch: Arch = "qwen3",
    vocab: int = 512,
    hidden: int = 64,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 32,
    max_position: int = 2048,
    std: float = 0.2,
    dtype: str = "float32",
) -> Path:
    """Write a random model and its tokenizer to `directory`, and return it. Equal arguments give equal bytes.

    `std` is large against the usual 0.02, so that logits are not flat: greedy answers depend on the prompt and a wrong
    weight shows in the logprobs. A head size of 32 is the smallest that vLLM's CPU attention takes.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tiny_tokenizer(vocab, max_position)
    sizes = {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": max_position,
        "initializer_range": std,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config_class, model_class = {
        "qwen3": (Qwen3Config, Qwen3ForCausalLM),
        "llama": (LlamaConfig, LlamaForCausalLM),
    }[arch]
    with torch.random.fork_rng(devices=[]):  # the caller's random numbers stay as they were
        torch.manual_seed(seed)
        model = model_class(config_class(**sizes)).to(getattr(torch, dtype))
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def make_tiny_tokenizer(vocab: int = 512, max_length: int = 2048):
    """A byte-level BPE tokenizer with ChatML's special tokens, which encodes and gives back any text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", model_max_length=max_length
    )
    fast.chat_template = CHAT_TEMPLATE
    assert len(fast) == vocab, f"the corpus gives {len(fast)} tokens: a sampled id beyond them would have no text"
    return fast


def check_with_vllm(directory: Path) -> None:
    """Serve the model with vLLM on the CPU and compare its greedy tokens and logprobs with Hugging Face's."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from vllm import LLM, SamplingParams

    tokenizer = AutoTokenizer.from_pretrained(directory)
    prompts = [
        tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True)["input_ids"]
        for text in ("What is 3 + 4?", "Tell me about the fox, please.", "12 - 5 =")
    ]
    llm = LLM(model=str(directory), dtype="float32", enforce_eager=True, max_model_len=256, max_num_seqs=8)
    sampling = SamplingParams(temperature=0.0, max_tokens=24, logprobs=0)
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], sampling)
    llm.llm_engine.engine_core.shutdown()  # left to the interpreter's exit, this can take minutes
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    for ids, output in zip(prompts, outputs, strict=True):
        completion = output.outputs[0]
        served = torch.tensor(
            [step[t].logprob for t, step in zip(completion.token_ids, completion.logprobs, strict=True)]
        )
        with torch.no_grad():
            logits = model(torch.tensor([ids + list(completion.token_ids)])).logits[0, len(ids) - 1 : -1]
        own = logits.log_softmax(-1)
        gap = (own.gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0] - served).abs().max().item()
        greedy = (own.argmax(-1) == torch.tensor(completion.token_ids)).all().item()
        print(
            f"{len(set(completion.token_ids))} different of {len(completion.token_ids)} tokens, gap {gap:.1e}, "
            f"greedy {greedy}, {completion.finish_reason}: {completion.text!r:.60}"
        )
        assert greedy
        assert gap < 1e-4


if __name__ == "__main__":
    import os

    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    chosen: Arch = "llama" if sys.argv[1:] == ["llama"] else "qwen3"
    with tempfile.TemporaryDirectory() as scratch:
        check_with_vllm(make_tiny_model(scratch, arch=chosen))
