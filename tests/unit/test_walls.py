"""Check the walls that .importlinter cannot see: private parts of TRL and of vLLM are named in one room each."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
#: What vLLM calls its insides. They carry no underscore, and change from version to version all the same.
VLLM_INSIDES = {
    "lora_a_stacked",
    "lora_b_stacked",
    "lora_manager",
    "model_executor",
    "model_runner",
    "output_processor",
    "punica_wrapper",
}


def files(side: str, *, but: str) -> list[Path]:
    return [path for path in sorted((ROOT / side).rglob("*.py")) if not path.is_relative_to(ROOT / side / but)]


def foreign_private_names(source: str) -> Iterator[str]:
    """Yield private attributes of objects that the module does not define itself, in code or in `getattr`."""
    tree = ast.parse(source)
    own = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"):
            own.add(node.attr)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            own.add(node.target.id)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            # os._exit, torch._foreach_add_, and the name of a model in transformers
            documented = getattr(node.value, "id", "") in ("os", "torch") or node.attr == "_name_or_path"
            name = "" if documented else node.attr
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "setattr", "hasattr"):
            name = node.args[1].value if isinstance(node.args[1], ast.Constant) else ""
        else:
            continue
        if re.match(r"_[a-z]", name) and name not in own:
            yield f"line {node.lineno}: {name}"


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("trainer._step", ["line 1: _step"]),
        ("getattr(model, '_name')", ["line 1: _name"]),
        ("class A:\n    def f(self):\n        self._x = 1\n        return self._x", []),
        ("class A:\n    _x: int\ndef g(a):\n    return a._x", []),
        ("x.__class__, x.name", []),
    ],
)
def test_the_search_finds(source: str, found: list[str]) -> None:
    assert list(foreign_private_names(source)) == found


@pytest.mark.parametrize(("side", "room"), [("learner", "trainer"), ("rollout_server", "vllm_compat"), ("shared", "-")])
def test_private_parts_are_named_in_one_room(side: str, room: str) -> None:
    found = {
        str(path.relative_to(ROOT)): names
        for path in files(side, but=room)
        if (names := list(foreign_private_names(path.read_text())))
    }
    assert not found


def test_the_insides_of_vllm_are_named_in_one_room() -> None:
    named = re.compile(rf"\.({'|'.join(sorted(VLLM_INSIDES))})\b")
    found = {
        str(path.relative_to(ROOT)): names
        for path in files("rollout_server", but="vllm_compat")
        if (names := named.findall(path.read_text()))
    }
    assert not found


def test_no_two_classes_of_one_name() -> None:
    seen: dict[str, str] = {}
    twice = []
    for path in (path for side in ("learner", "rollout_server", "shared") for path in (ROOT / side).rglob("*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef):
                if node.name in seen:
                    twice.append(f"{node.name}: {seen[node.name]} and {path.relative_to(ROOT)}")
                seen[node.name] = str(path.relative_to(ROOT))
    assert not twice
