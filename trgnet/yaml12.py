"""YAML by the core schema of version 1.2, read and written safely.

In it ``5e-4`` is a number, and ``13_30``, ``on`` and ``no`` are strings. Nothing that a file says is executed,
and a key that stands twice in a mapping is a fault rather than a silent choice.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

__all__ = ["dump", "key_lines", "load"]


def load(text: str) -> Any:
    """The value of a YAML text; None of an empty one.

    Raises:
        ValueError: the text is no valid YAML, or a mapping has a key twice; names line and column.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"no valid YAML: {_told(error)}") from error


def dump(value: Any) -> str:
    """YAML that :func:`load` reads back to an equal value; mappings keep their order."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def key_lines(text: str) -> dict[tuple[str | int, ...], int]:
    """Lines, from 1, of the keys and list entries of a valid YAML text, by their path from the top.

    Raises:
        ValueError: as for :func:`load`.
    """
    try:
        node = yaml.compose(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"no valid YAML: {_told(error)}") from error
    lines: dict[tuple[str | int, ...], int] = {}
    waiting = [((), node)]
    while waiting:
        path, node = waiting.pop()
        for key, line, inner in _parts(node):
            if (*path, key) not in lines:  # an alias that holds itself has been here before
                lines[(*path, key)] = line
                if len(path) < _DEEPEST:
                    waiting.append(((*path, key), inner))
    return lines


_DEEPEST = 4
"""Levels that are looked into: no description is deeper, and an alias may hold itself."""


def _parts(node: yaml.Node | None) -> list[tuple[str | int, int, yaml.Node]]:
    if isinstance(node, yaml.MappingNode):
        return [(str(key.value), key.start_mark.line + 1, value) for key, value in node.value]
    if isinstance(node, yaml.SequenceNode):
        return [(index, value.start_mark.line + 1, value) for index, value in enumerate(node.value)]
    return []


def _told(error: yaml.YAMLError) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        problem = " ".join(part for part in (error.problem, error.note) if part)
        return f"line {mark.line + 1}, column {mark.column + 1}: {problem or error.context}"
    return " ".join(str(error).split())


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with the plain scalars of YAML 1.2's core schema instead of those of YAML 1.1."""

    yaml_implicit_resolvers: dict[str, list] = {}

    def construct_mapping(self, node: yaml.Node, deep: bool = False) -> dict:
        seen: dict[tuple[str, str], int] = {}
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if isinstance(key, yaml.ScalarNode) and (key.tag, key.value) in seen:
                raise yaml.constructor.ConstructorError(
                    problem=f"the key {key.value!r} stands here again, after line {seen[key.tag, key.value]}",
                    problem_mark=key.start_mark,
                )
            if isinstance(key, yaml.ScalarNode):
                seen[key.tag, key.value] = key.start_mark.line + 1
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """PyYAML's safe dumper, which also quotes the strings that :class:`_Loader` would read as numbers."""


_FLOAT = r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(?:0|[1-9][0-9]*)", list("-+0123456789")),
    ("float", _FLOAT, list("-+.0123456789")),
):
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first)
