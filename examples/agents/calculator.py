"""An agent with a tool: it answers sums, and may let a calculator compute them.

    learner train --config recipes/agent.yaml --rollout_url http://127.0.0.1:8000 --output_dir runs/agent

The loop is what one writes for any OpenAI endpoint; the last line is the reward. The tool is asked for in plain text,
since the demo's model is too small for the tool calls of its chat template. Of its two examples one uses the calculator
and one does not: the policy has to find out which pays.
"""

from __future__ import annotations

import ast
import operator
import re
from typing import Any

SYSTEM = "You may use a calculator: reply with an expression, and it is computed. Then reply with the result only."
EXAMPLES = [
    {"role": "user", "content": "What is 12 + 29?"},
    {"role": "assistant", "content": "12 + 29"},
    {"role": "user", "content": "The calculator says 41."},
    {"role": "assistant", "content": "41"},
    {"role": "user", "content": "What is 4 + 3?"},
    {"role": "assistant", "content": "7"},
]
TURNS = 3
_CALL = re.compile(r"\s*([\d\s+*()-]*\d\s*[+*-][\d\s+*()-]*?)\s*=?\s*")
_NUMBER = re.compile(r"-?\d+")
_OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}


async def agent(session: Any, row: dict[str, Any]) -> float:
    """Let the policy answer a question, with a calculator; return 1 for the right answer, else 0."""
    client = session.openai()
    messages = [{"role": "system", "content": SYSTEM}, *EXAMPLES, {"role": "user", "content": question_of(row)}]
    for _ in range(TURNS):
        response = await client.chat.completions.create(model=session.model, messages=messages)
        text = response.choices[0].message.content or ""
        call = _CALL.fullmatch(text)
        if call is None:
            break
        messages.append({"role": "assistant", "content": text})
        messages.append({"role": "user", "content": f"The calculator says {calculate(call[1])}."})
    numbers = _NUMBER.findall(text)
    return float(call is None and numbers[-1:] == [str(row["answer"])])


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
