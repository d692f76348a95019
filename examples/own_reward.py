"""A reward of your own: any function of TRL's form, named by its import path.

    python examples/own_reward.py                     # what it gives to a few completions, without any model

    rollout-server Qwen/Qwen2.5-0.5B-Instruct --max-lora-rank 16 --max-model-len 1024
    PYTHONPATH=examples learner train --rollout-url http://127.0.0.1:8000 \
        --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --task examples/questions.jsonl \
        --reward_funcs own_reward:right own_reward:short --reward_weights 1.0 0.2 \
        --lora_target_modules all-linear --num_generations 8 --max_completion_length 64 --eval_size 8 \
        --output_dir runs/own-reward

It is called with lists, one entry a completion: `prompts`, `completions`, and every column of the task's file by its
name. It returns a number for each, or None for a completion that it does not score. It runs in worker processes,
within `--reward_timeout_s`.
"""

import re


def right(prompts, completions, answer, **columns):
    """Return 1 where the last number of the completion is the answer."""
    return [float(last_number(text_of(c)) == float(gold)) for c, gold in zip(completions, answer, strict=True)]


def short(prompts, completions, completion_ids, **columns):
    """Return 1 for a completion of one token, less for each more, 0 from 64 tokens on."""
    return [max(0.0, 1.0 - (len(ids) - 1) / 63) for ids in completion_ids]


def text_of(completion):
    """Return a completion's text: of chats it is a list of messages."""
    return completion if isinstance(completion, str) else completion[-1]["content"]


def last_number(text):
    """Return the last number of a text, or None."""
    numbers = re.findall(r"-?\d+(?:\.\d+)?", text.replace(",", ""))
    return float(numbers[-1]) if numbers else None


if __name__ == "__main__":
    tried = ["The answer is 42.", "6 * 7 = 42, or was it 43?", "I do not know."]
    chats = [[{"role": "assistant", "content": text}] for text in tried]
    rewards = right(prompts=[None] * 3, completions=chats, answer=["42"] * 3)
    for text, reward in zip(tried, rewards, strict=True):
        print(f"{reward:4.1f}  {text}")
