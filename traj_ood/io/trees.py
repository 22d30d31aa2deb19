"""Strict reading of YAML and JSON files from untrusted folders, in bounded time and memory.

A hostile file can be huge, nest endlessly, or use aliases so that half a kilobyte expands to gigabytes. Files written
by hand need none of that, so each such case is refused with a message that names it.
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
"""Largest YAML file in bytes: thousands of lines, which PyYAML reads in a fraction of a second."""
MAX_JSON = 2**28
"""Largest JSON file in bytes; the result of a large run has a record for each failed image."""
MAX_CONFIG = 2**22
"""Largest JSON config of a model in bytes; some list 1,000 classes twice."""
MAX_DEPTH = 50
"""Most lists and mappings inside each other."""

_MAX_VALUES = 5_000  # in a YAML file; values repeated by aliases count each time
_MAX_TEXT = 4_096  # characters of one YAML value: the longest path
_MAX_DIGITS = 40  # of an integer; Python refuses to print integers of thousands of digits

_T = TypeVar("_T")


def read_yaml(path: Path, what: str) -> Any:
    """Read a YAML file in UTF-8, called ``what`` in messages, as plain Python types. Duplicate keys are errors, and
    aliases count towards the size limits."""
    try:
        text = _content(path, what, MAX_YAML).decode("utf-8-sig")
        return yaml.load(text, Loader=_StrictLoader)  # a SafeLoader: builds no objects
    except UnicodeDecodeError as error:
        raise TrajOODError(f"{path}: expected a YAML file in UTF-8, got other bytes; save it as UTF-8") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: an invalid date or number
        if isinstance(error, TrajOODError):
            raise
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or "not readable"
        raise TrajOODError(f"{path}{line}: malformed YAML ({problem}); correct the line") from error


def read_json(path: Path, what: str, fix: str, *, limit: int = MAX_JSON) -> dict[str, Any]:
    """Read a JSON file in UTF-8, called ``what`` in messages, that contains an object; ``fix`` says what to do about a
    damaged one. NaN and Infinity, which are not part of JSON, are refused."""
    content = _content(path, what, limit, fix)
    try:
        tree = json.loads(content, parse_constant=no_number)
        _check_depth(tree)
    except (ValueError, RecursionError) as error:  # ValueError includes bytes that are not UTF-8
        raise TrajOODError(f"{path}: expected JSON, got {error}; {fix}") from error
    if not isinstance(tree, dict):
        raise TrajOODError(f"{path}: expected a JSON object, got {type(tree).__name__}; {fix}")
    return tree


def write_json(path: str | Path, tree: Any, **options: Any) -> None:
    """Write data as a JSON file, indented by two spaces and atomically; ``options`` are further arguments of
    ``json.dumps``. Bytes of file names that are not UTF-8 are escaped, as JSON allows."""
    text = json.dumps(tree, **{"indent": 2, **options}) + "\n"
    write_atomic(path, text.encode(errors="backslashreplace"))


def field_of(tree: Mapping[str, Any], key: str, kind: type[_T], where: str) -> _T:
    """``tree[key]``, checked to be of type ``kind`` and finite; an int is accepted as a float, a bool is no number."""
    value = tree.get(key)
    if kind is float and type(value) is int:
        value = float(value) if abs(value) < 2**1023 else math.inf
    if type(value) is not kind or (isinstance(value, float) and not math.isfinite(value)):
        got = "nothing" if key not in tree else f"{type(value).__name__} {str(value)[:40]!r}"
        raise TrajOODError(f"{where}: {key}: expected {kind.__name__}, got {got}: the file is damaged")
    return value


def as_json(value: Any) -> Any:
    """Data as it would be read back from a JSON file: tuples become lists, other objects their text."""
    return json.loads(json.dumps(value, default=str))


def _content(path: Path, what: str, limit: int, fix: str = "correct the path") -> bytes:
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            content = file.read(limit + 1)  # bounded, because a device reports size 0 and may never end
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


def no_number(name: str) -> None:
    """Refuse the constants NaN and Infinity of Python's JSON, as its argument ``parse_constant``."""
    raise ValueError(f"{name} is not a JSON number")


class _StrictLoader(yaml.SafeLoader):
    """PyYAML's safe loader with limits and without duplicate keys, of which plain YAML keeps only the last."""

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
                raise _refused(f"the alias {event.anchor!r} inside the value it refers to", event)
            self._values += self._sizes[node]
        else:
            self._values += 1
        if self._values > _MAX_VALUES:
            raise _refused(f"more than {_MAX_VALUES} values, those repeated by aliases included", event)
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
