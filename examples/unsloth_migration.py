"""A GRPO script written for Unsloth, moved over: lines that changed stand above their successors, behind `# -`.

What changes: the model is loaded by its name and wrapped by TRL, vLLM runs in a process of its own, and one line joins
the two. What stays: rewards, data, GRPOConfig, `vllm_sampling_params`. docs/from-unsloth.md has every setting.

    rollout-server Qwen/Qwen3-0.6B --max-lora-rank 16 --max-model-len 2048 --gpu-memory-utilization 0.6
    python examples/unsloth_migration.py

MODEL (a name of the hub, or a directory), ROLLOUT_URL, STEPS and OUTPUT_DIR in the environment choose others.
"""

import os
import re

# - from unsloth import FastLanguageModel
import httpx
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from learner import attach

# - from vllm import SamplingParams       may stay: it is taken as it is, where vLLM is installed beside the learner

MODEL = os.environ.get("MODEL", "Qwen/Qwen3-0.6B")
URL = os.environ.get("ROLLOUT_URL", "http://127.0.0.1:8000")
STEPS = int(os.environ.get("STEPS", "100"))
GPU = torch.cuda.is_available()

# - max_seq_length = 2048                 is the server's: --max-model-len 2048
lora_rank = 16  # at most the server's --max-lora-rank

# - model, tokenizer = FastLanguageModel.from_pretrained(
# -     model_name="Qwen/Qwen3-0.6B",
# -     max_seq_length=max_seq_length,
# -     load_in_4bit=False,
# -     fast_inference=True,              is always so
# -     max_lora_rank=lora_rank,
# -     gpu_memory_utilization=0.6,       is the server's
# - )
tokenizer = AutoTokenizer.from_pretrained(MODEL)

# - model = FastLanguageModel.get_peft_model(
# -     model,
# -     r=lora_rank,
# -     target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
# -     lora_alpha=lora_rank * 2,
# -     use_gradient_checkpointing="unsloth",
# -     random_state=3407,                is GRPOConfig's seed
# - )
lora = LoraConfig(
    r=lora_rank,
    target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    lora_alpha=lora_rank * 2,
)

SYSTEM = "Work the problem out between <think> and </think>. Then give the number between <answer> and </answer>."
PROBLEMS = [(a, b) for a in range(11, 31) for b in range(3, 9)]
dataset = Dataset.from_list(
    [
        {
            "prompt": [
                {"role": "system", "content": SYSTEM},
                {"role": "user", "content": f"Ann packs {b} boxes of {a} apples and eats {b}. How many are left?"},
            ],
            "answer": str(a * b - b),
        }
        for a, b in PROBLEMS
    ]
)

MATCH_FORMAT = re.compile(r"<think>.*?</think>\s*<answer>\s*(-?\d+)\s*</answer>\s*$", re.DOTALL)


def match_format(completions, **kwargs):
    return [3.0 if MATCH_FORMAT.search(completion[0]["content"]) else 0.0 for completion in completions]


def check_answer(prompts, completions, answer, **kwargs):
    scores = []
    for completion, truth in zip(completions, answer, strict=True):
        found = MATCH_FORMAT.search(completion[0]["content"])
        scores.append(5.0 if found and found[1] == truth else 0.0)
    return scores


training_args = GRPOConfig(
    # - vllm_sampling_params=SamplingParams(...)     an argument of Unsloth's GRPOConfig: below, of attach
    temperature=1.0,
    learning_rate=5e-6,
    weight_decay=0.001,
    lr_scheduler_type="linear",
    # - warmup_ratio=0.1,
    warmup_steps=0.1,
    # - optim="adamw_8bit",                          may stay where bitsandbytes is installed
    logging_steps=1,
    # - per_device_train_batch_size=1,               Unsloth raises it to num_generations by itself
    per_device_train_batch_size=4,
    gradient_accumulation_steps=1,
    num_generations=4,
    # - max_prompt_length=256,                       prompts are never cut: one that does not fit is named at the start
    max_completion_length=int(os.environ.get("MAX_COMPLETION_LENGTH", "512")),
    max_steps=STEPS,
    report_to="none",
    output_dir=os.environ.get("OUTPUT_DIR", "runs/from-unsloth"),
    seed=3407,
    bf16=GPU,
    use_cpu=not GPU,
)

trainer = GRPOTrainer(
    # - model=model,
    model=MODEL,
    processing_class=tokenizer,
    reward_funcs=[match_format, check_answer],
    args=training_args,
    train_dataset=dataset,
    peft_config=lora,
)
session = attach(
    trainer,
    URL,
    vllm_sampling_params={
        "min_p": 0.1,
        "top_p": 1.0,
        "top_k": -1,
        "seed": 3407,
        "stop": ["</answer>"],
        "include_stop_str_in_output": True,
    },
)
trainer.train()

# - model.save_lora("grpo_saved_lora")
trainer.save_model(f"{training_args.output_dir}/grpo_saved_lora")
session.close()

# - text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
# - output = model.fast_generate([text], sampling_params, lora_request=model.load_lora("grpo_saved_lora"))
asked = {
    "model": f"policy:{session.run_id}",  # the base has the name that the server was started with
    "messages": dataset[0]["prompt"],
    "max_tokens": training_args.max_completion_length,
}
answer = httpx.post(f"{URL}/v1/chat/completions", json=asked, timeout=300).raise_for_status().json()
print(answer["choices"][0]["message"]["content"])

# - model.save_pretrained_merged("model", tokenizer, save_method="merged_16bit")
print(f"a merged model: learner export {training_args.output_dir}/grpo_saved_lora --merge --out model")
