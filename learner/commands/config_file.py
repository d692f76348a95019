"""Options in YAML files: each value is the text that was written, since only its option knows what it is.

YAML 1.1 decides by itself: `no` is false, `1e-6` is text, `007` is 7, `2024-01-01` a date. That is why a value at the
top is left as text, and a nested one follows YAML 1.2, where only `true` and `false` are booleans.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any, ClassVar

import yaml

from shared.errors import InvalidRequest
from shared.messages import one_line

#: Parts of a recipe that are no options of the learner: its environment, and the rollout server's flags.
SECTIONS = ("env", "server")

_TAG = "tag:yaml.org,2002:"
_WORD = "!word"
#: Kinds of scalars that are no names: neither Python nor JSON would keep them as they are written. Integers in decimals
#: are names of GPUs, say, or of tokens.
_NO_NAME = tuple(_TAG + kind for kind in ("null", "bool", "int", "float"))
_DECIMALS = re.compile(r"0|-?[1-9][0-9]*")
#: Where the first characters of a scalar allow it, the first pattern that matches decides what it is; else it is text.
_PLAIN: tuple[tuple[str, str, str | None], ...] = (
    (_TAG + "null", r"~|null|Null|NULL|", None),
    (_TAG + "bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    (_WORD, r"(?i:yes|no|on|off)", "yYnNoO"),
    (_TAG + "int", r"[-+]?(0|[1-9][0-9]*)", "-+0123456789"),
    (_TAG + "float", r"[-+]?(\.[0-9]+|(0|[1-9][0-9]*)(\.[0-9]*)?)([eE][-+]?[0-9]+)?", "-+.0123456789"),
    (_TAG + "merge", r"<<", "<"),
)


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}  # none of YAML 1.1

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        keys = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.tag != _TAG + "merge"]
        times = Counter(key.value for key in keys)
        for key in reversed(keys):
            if times[key.value] > 1:
                raise _refusal(key, f"{key.value} is there twice: leave one out")
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        for key, _ in node.value:
            if key.tag in _NO_NAME and not _DECIMALS.fullmatch(key.value):
                raise _refusal(key, f"the name {key.value or 'null'} must be text: put it in quotes")
        return super().construct_mapping(node, deep)


def _refuse_word(_: Any, node: yaml.ScalarNode) -> Any:
    raise _refusal(node, f"{node.value} may be text or a boolean: write true or false, or put it in quotes")


for _tag, _pattern, _first in _PLAIN:
    _Loader.add_implicit_resolver(_tag, re.compile(rf"^(?:{_pattern})$"), list(_first) if _first else ["", *"~nN"])
_Loader.add_constructor(_WORD, _refuse_word)


def read_config_file(path: str | Path) -> dict[str, Any]:
    """Return the options in a YAML file by name, with underscores: text, None, lists of these, or a dict.

    Values inside a dict have the types that YAML 1.2 gives them; those of `env` are the text that was written.

    Raises:
        InvalidRequest: no readable YAML mapping, an option given twice, an ambiguous word, or an environment that
            cannot be.
    """
    try:
        loader = _Loader(Path(path).read_text(encoding="utf-8"))
        try:
            return _options(loader)
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        line = f" line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise InvalidRequest(f"--config {path}{line}: {error.problem or one_line(error)}") from error
    except OSError as error:
        raise InvalidRequest(f"--config {path}: {error.strerror or one_line(error)}") from error
    except (ValueError, yaml.YAMLError, RecursionError) as error:  # no UTF-8, control characters, or far too deep
        raise InvalidRequest(f"--config {path} is not YAML: {one_line(error)}") from error


def _options(loader: _Loader) -> dict[str, Any]:
    document = loader.get_single_node()
    if document is None:
        raise ValueError("it is empty; write one `option: value` a line")
    if not isinstance(document, yaml.MappingNode):
        raise _refusal(document, "a file of options is a mapping: write one `option: value` a line")
    loader.flatten_mapping(document)
    options: dict[str, Any] = {}
    own = document.value  # what is merged in with `<<` comes first, and gives way
    for key, node in own:
        if not isinstance(key, yaml.ScalarNode):
            raise _refusal(key, "the name of an option must be text")
        name = key.value.lstrip("-").replace("-", "_")
        options[name] = _environment(loader, node) if name == "env" else _value(loader, node)
    names = Counter(key.value.lstrip("-").replace("-", "_") for key in {k.value: k for k, _ in own}.values())
    if twice := [name for name, times in names.items() if times > 1]:
        raise _refusal(document, f"{twice[0]} is there twice, with dashes and with underscores: leave one out")
    return options


def _value(loader: _Loader, node: yaml.Node) -> Any:
    if isinstance(node, yaml.SequenceNode):
        return [_value(loader, item) for item in node.value]
    if isinstance(node, yaml.ScalarNode) and (node.tag == _WORD or node.tag.startswith(_TAG)):
        return None if node.tag == _TAG + "null" else node.value
    return loader.construct_object(node, deep=True)


def _environment(loader: _Loader, node: yaml.Node) -> dict[str, str]:
    """Return environment variables, each with the text that was written; refuse what the system would not take."""
    if isinstance(node, yaml.ScalarNode) and node.tag == _TAG + "null":
        return {}
    if not isinstance(node, yaml.MappingNode):
        raise _refusal(node, "env must hold one `VARIABLE: value` a line")
    loader.flatten_mapping(node)
    variables: dict[str, str] = {}
    for key, value in node.value:
        name, text = _value(loader, key), _value(loader, value)
        if not isinstance(name, str) or not name or "=" in name or "\0" in name:
            raise _refusal(key, f"env: {name!r} cannot be set: a variable's name is not empty and holds no =")
        if not isinstance(text, str):
            raise _refusal(value, f'env: {name} must be text: write one value, or "" for an empty one')
        if "\0" in text:
            raise _refusal(value, f"env: {name!r} cannot be set: it holds a zero byte")
        variables[name] = text
    return variables


def _refusal(node: yaml.Node, problem: str) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
