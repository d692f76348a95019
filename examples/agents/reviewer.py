"""An agent of two: one answers, the other reviews the answer in a conversation of its own, then the first may revise.

    learner train --config recipes/agent.yaml --agent examples.agents.reviewer:agent --rollout_url ...

Both are the policy, and both are trained, with the reward of the episode: the reviewer's conversation is a fork. It is
written over Anthropic's messages route with httpx, without any SDK.
"""

from __future__ import annotations

import re
from typing import Any

import httpx

ANSWER = "Reply with the result only."
REVIEW = "Is the answer right? Reply yes or no."
_NUMBER = re.compile(r"-?\d+")


def agent(session: Any, row: dict[str, Any]) -> float:
    """Let the policy answer, review and revise; return 1 for the right answer, else 0."""
    prompt = row["prompt"]
    question = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    headers = {"x-api-key": session.api_key}
    with httpx.Client(timeout=session.timeout_s, headers=headers, trust_env=False) as client:  # through no proxy

        def ask(system: str, messages: list[dict[str, str]]) -> str:
            body = {"model": session.model, "system": system, "messages": messages, "max_tokens": 16}
            response = client.post(f"{session.base_url}/messages", json=body)
            response.raise_for_status()
            return "".join(block["text"] for block in response.json()["content"] if block["type"] == "text")

        messages = [{"role": "user", "content": question}]
        answer = ask(ANSWER, messages)
        verdict = ask(REVIEW, [{"role": "user", "content": f"{question} {answer}"}])
        if "yes" not in verdict.lower():
            messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": "Try again."}]
            answer = ask(ANSWER, messages)
    numbers = _NUMBER.findall(answer)
    return float(bool(numbers) and numbers[-1] == str(row.get("answer")))
