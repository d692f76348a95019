"""An agent with a tool: it answers a sum, and may let a calculator compute it first.

    learner train --config recipes/agent.yaml --rollout_url http://127.0.0.1:8000 --output_dir runs/agent

The loop is what one writes for any OpenAI endpoint; `agent` adds nothing but the reward. The tool is asked for in the
text, since the demo's model is too small for the tool calls of its chat template.
"""

from __future__ import annotations

import ast
import operator
import re
from typing import Any

SYSTEM = "You have a calculator. To use it, write the expression in brackets. Then reply with the result only."
EXAMPLE = [
    {"role": "user", "content": "2 + 9 ="},
    {"role": "assistant", "content": "[2 + 9]"},
    {"role": "user", "content": "The calculator says 11"},
    {"role": "assistant", "content": "11"},
]
TURNS = 3
_CALL = re.compile(r"\[([^\]]+)\]")
_NUMBER = re.compile(r"-?\d+")
_OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}


async def agent(session: Any, row: dict[str, Any]) -> float:
    """Let the policy answer a question, with a calculator; return 1 for the right answer, else 0."""
    client = session.openai()
    messages = [{"role": "system", "content": SYSTEM}, *EXAMPLE, {"role": "user", "content": question_of(row)}]
    text = ""
    for _ in range(TURNS):
        response = await client.chat.completions.create(model=session.model, messages=messages)
        text = response.choices[0].message.content or ""
        messages.append({"role": "assistant", "content": text})
        call = _CALL.search(text)
        if call is None:
            break
        messages.append({"role": "user", "content": f"The calculator says {calculate(call[1])}"})
    numbers = _NUMBER.findall(text)
    return float(bool(numbers) and _CALL.search(text) is None and numbers[-1] == str(row.get("answer")))


def question_of(row: dict[str, Any]) -> str:
    """Return the text of the row's question."""
    prompt = row["prompt"]
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]


def calculate(expression: str) -> str:
    """Return the value of sums and products of whole numbers; what a model writes is never run as code.

    Example:
        >>> calculate("2 + 3 * 4")
        '14'
    """
    try:
        return str(_value(ast.parse(expression[:80].strip(), mode="eval").body))
    except (SyntaxError, ValueError, TypeError, KeyError, MemoryError, RecursionError):
        return "error"


def _value(node: ast.expr) -> int:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_value(node.operand)
    if isinstance(node, ast.BinOp):
        return _OPERATORS[type(node.op)](_value(node.left), _value(node.right))
    raise ValueError(type(node).__name__)
