"""YAML and JSON of a user's, or a stranger's, folder: read strictly, in bounded time and memory.

A file may be of any size, nest without end, or name one list in another until half a kilobyte stands for gigabytes.
What people write by hand needs none of that, so it is refused by name.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml

from traj_ood.errors import TrajOODError
from traj_ood.io.files import write_atomic

MAX_YAML = 2**16
"""Bytes of a YAML file: thousands of lines, which PyYAML reads in a fraction of a second."""
MAX_JSON = 2**28
"""Bytes of a JSON file; the result of a large run holds a record for each failed image."""
MAX_CONFIG = 2**22
"""Bytes of a JSON file that people or libraries write to describe a model; some list 1,000 classes twice."""
MAX_DEPTH = 50
"""Lists and mappings inside each other."""

_MAX_VALUES = 5_000  # of a YAML file, those that aliases repeat counted each time
_MAX_TEXT = 4_096  # characters of one YAML value: the longest path
_MAX_DIGITS = 40  # of a whole number; Python refuses to print those of thousands

_T = TypeVar("_T")


def read_yaml(path: Path, what: str) -> Any:
    """The tree in a YAML file: plain types, each key of a mapping once, aliases only as far as they stay small.

    Args:
        path: of the file, in UTF-8.
        what: it is, for errors: ``the benchmark file``.
    Raises:
        TrajOODError: unreadable, not UTF-8, malformed, or beyond the bounds above.
    """
    try:
        text = _content(path, what, MAX_YAML).decode("utf-8-sig")
        return yaml.load(text, Loader=_StrictLoader)  # a SafeLoader: builds no objects
    except UnicodeDecodeError as error:
        raise TrajOODError(f"{path}: expected a YAML file in UTF-8, got other bytes; save it as UTF-8") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a date or number that is none
        if isinstance(error, TrajOODError):
            raise
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or "not readable"
        raise TrajOODError(f"{path}{line}: malformed YAML ({problem}); correct the line") from error


def read_json(path: Path, what: str, fix: str, *, limit: int = MAX_JSON) -> dict[str, Any]:
    """The object in a JSON file; the words NaN and Infinity, which JSON has not, are refused.

    Args:
        path: of the file, in UTF-8.
        what: it is, for errors: ``the config of a model``.
        fix: what to do about a damaged one, for errors.
        limit: bytes, at most.
    Raises:
        TrajOODError: unreadable, not JSON, no object, or beyond the bounds above.
    """
    content = _content(path, what, limit, fix)
    try:
        tree = json.loads(content, parse_constant=_no_number)
        _check_depth(tree)
    except (ValueError, RecursionError) as error:  # also of bytes that are not UTF-8
        raise TrajOODError(f"{path}: expected JSON, got {error}; {fix}") from error
    if not isinstance(tree, dict):
        raise TrajOODError(f"{path}: expected a JSON object, got {type(tree).__name__}; {fix}")
    return tree


def write_json(path: str | Path, tree: Any, **options: Any) -> None:
    """Write plain data as a JSON file with two spaces of indentation, whole or not at all.

    Args:
        options: of ``json.dumps``, such as ``sort_keys=True``.
    Raises:
        TrajOODError: the file cannot be written. TypeError, ValueError: what JSON cannot hold; nothing is written.
    """
    write_atomic(path, (json.dumps(tree, **{"indent": 2, **options}) + "\n").encode())


def field_of(tree: Mapping[str, Any], key: str, kind: type[_T], where: str) -> _T:
    """``tree[key]``, which must be a ``kind``; an int counts as a float, a bool never as a number.

    Raises:
        TrajOODError: missing, of another type, or not finite.
    """
    value = tree.get(key)
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind or (isinstance(value, float) and not math.isfinite(value)):
        got = "nothing" if key not in tree else f"{type(value).__name__} {str(value)[:40]!r}"
        raise TrajOODError(f"{where}: {key}: expected {kind.__name__}, got {got}: the file is damaged")
    return value


def as_json(value: Any) -> Any:
    """Plain data as it comes back from a JSON file: tuples as lists, other objects as their text."""
    return json.loads(json.dumps(value, default=str))


def _content(path: Path, what: str, limit: int, fix: str = "correct the path") -> bytes:
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            content = file.read(limit + 1)  # a device says that it is empty, and never ends
    except OSError as error:
        raise TrajOODError(f"{path}: expected {what}, got {error.strerror}; {fix}") from error
    if len(content) > limit:
        raise TrajOODError(f"{path}: {what}: expected at most {limit} bytes, got {max(size, len(content))}; shorten it")
    return content


def _check_depth(tree: Any) -> None:
    level = [tree] if isinstance(tree, dict | list) else []
    for _ in range(MAX_DEPTH):
        children = (child for node in level for child in (node.values() if isinstance(node, dict) else node))
        level = [child for child in children if isinstance(child, dict | list)]
        if not level:
            return
    raise ValueError(f"more than {MAX_DEPTH} lists and objects inside each other")


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


class _StrictLoader(yaml.SafeLoader):
    """Safe YAML that is bounded, and refuses a key given twice: plain YAML keeps the last one and drops the rest."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._values = self._depth = 0
        self._sizes: dict[yaml.Node, int] = {}  # values in a finished node, aliases written out

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event, before = self.peek_event(), self._values
        if isinstance(event, yaml.ScalarEvent) and len(event.value) > _MAX_TEXT:
            raise _refused(f"a value of {len(event.value)} characters, expected at most {_MAX_TEXT}", event)
        if isinstance(event, yaml.CollectionStartEvent) and self._depth == MAX_DEPTH:
            raise _refused(f"more than {MAX_DEPTH} lists and mappings inside each other", event)
        self._depth += 1
        node: yaml.Node | None = super().compose_node(parent, index)
        self._depth -= 1
        if isinstance(event, yaml.AliasEvent):
            if node not in self._sizes:
                raise _refused(f"the alias {event.anchor!r} of what it stands in", event)
            self._values += self._sizes[node]
        else:
            self._values += 1
        if self._values > _MAX_VALUES:
            raise _refused(f"more than {_MAX_VALUES} values, those of aliases counted each time", event)
        if isinstance(node, yaml.ScalarNode) and node.tag.endswith(":int") and len(node.value) > _MAX_DIGITS:
            raise _refused(f"a number of {len(node.value)} digits, expected at most {_MAX_DIGITS}", event)
        if node is not None:
            self._sizes[node] = self._values - before
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key.value!r} is given twice", key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def _refused(problem: str, event: yaml.Event) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(None, None, problem, event.start_mark)  # type: ignore[arg-type]  # the stub's mark
