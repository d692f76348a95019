"""A GRPO script for TRL, trained through a rollout server: one more line, `attach(trainer, URL)`.

    rollout-server Qwen/Qwen2.5-0.5B-Instruct --max-lora-rank 16 --max-model-len 1024
    python examples/trl_script.py

MODEL (a name of the hub, or a directory), ROLLOUT_URL, STEPS and OUTPUT_DIR in the environment choose others.
"""

import os
import random

import torch
from datasets import Dataset
from peft import LoraConfig
from trl import GRPOConfig, GRPOTrainer

from learner import attach

MODEL = os.environ.get("MODEL", "Qwen/Qwen2.5-0.5B-Instruct")
URL = os.environ.get("ROLLOUT_URL", "http://127.0.0.1:8000")
GPU = torch.cuda.is_available()


def sums(count: int) -> Dataset:
    """Return questions as chats, each with its answer."""
    numbers = random.Random(0)
    rows = []
    for _ in range(count):
        terms = [numbers.randint(10, 99) for _ in range(3)]
        question = f"{' + '.join(map(str, terms))} = ? Reply with the number only."
        rows.append({"prompt": [{"role": "user", "content": question}], "answer": str(sum(terms))})
    return Dataset.from_list(rows)


def right(completions, answer, **columns):
    """Return 1 for the answer and nothing else, and something for its digits."""
    texts = [completion[0]["content"].strip() for completion in completions]
    return [
        1.0 if text == gold else 0.1 * sum(map(str.__eq__, text, gold)) / len(gold)
        for text, gold in zip(texts, answer, strict=True)
    ]


trainer = GRPOTrainer(
    model=MODEL,
    reward_funcs=right,
    train_dataset=sums(512),
    peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
    args=GRPOConfig(
        output_dir=os.environ.get("OUTPUT_DIR", "runs/trl-script"),
        max_steps=int(os.environ.get("STEPS", "50")),
        per_device_train_batch_size=32,
        num_generations=8,
        max_completion_length=16,
        learning_rate=1e-4,
        logging_steps=1,
        report_to="none",
        bf16=GPU,
        use_cpu=not GPU,
    ),
)
session = attach(trainer, URL)  # the one line
trainer.train()
trainer.save_model()
summary = session.summary()
session.close()
rewards = [row["reward"] for row in trainer.state.log_history if "reward" in row]
print(
    f"{summary['steps']} steps, {summary['completions']} completions; reward {rewards[0]:.2f}, then {rewards[-1]:.2f}"
)
