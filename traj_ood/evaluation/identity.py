"""Whether a recorded run is the one that is asked for, and in words what differs."""

from __future__ import annotations

import contextlib
import inspect
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from traj_ood.dynamics.behaviour import agree
from traj_ood.dynamics.own_functions import written_code
from traj_ood.evaluation.results import Result
from traj_ood.io.extensions import imported, origin_of
from traj_ood.io.provenance import LIBRARIES, code_digest, environment, package_digest
from traj_ood.io.trees import as_json

_SHOWN = 3  # differences in a message
_SHOWN_CHARACTERS = 40  # of each value
_NOTHING = "nothing"  # in place of an absent value
_IDLE = {"seed", "scorers", "own_scorers", "resamples", "control"}  # settings without effect on scores
_NEWER = {"transform", "answers", "contents", "copies", "own_scorers", "own_code"}  # keys that older results lack


def own_file(cls: type[Any]) -> str | None:
    """The digest of the file that defines a user's class, or of the class's code if no file has it, as in a notebook;
    None for our own classes."""
    origin = origin_of(cls)
    if origin is None:
        return None
    with contextlib.suppress(OSError, TypeError):  # raised if the class is in no file, or not in this one
        inspect.getsource(cls)
        return origin["sha256"]
    return written_code(cls)


def _are_older(model: dict[str, Any]) -> bool:
    """Whether a model's ``answers`` are those of an earlier version, one list for E and D, beside a digest of its
    code."""
    found = model.get("answers")
    return "own_code" in model and isinstance(found, list) and not any(isinstance(value, list) for value in found)


def comparable(mine: Any, other: Any) -> Any:
    """``mine`` in the form in which ``other`` can be compared with it: without entries that older results lack, with
    its ``answers`` if both agree up to rounding, and with its ``copies``, which follow from images and model."""
    if not isinstance(mine, dict) or not isinstance(other, dict):
        return mine
    if "answers" in mine and (agree(other.get("answers"), mine["answers"]) or _are_older(other)):
        mine = {**mine, "answers": other["answers"]}
    if mine.get("own_code", "").split(" ")[0] != str(other.get("own_code", "")).split(" ")[0]:
        mine = {**mine, "own_code": other.get("own_code")}  # of another Python, or version of written_code
    if "copies" in other:
        mine = {**mine, "copies": other["copies"]}
    newer = _NEWER - other.keys()
    return {key: comparable(value, other.get(key)) for key, value in mine.items() if key not in newer}


def identity_of(result: Result) -> dict[str, Any]:
    """The identity of a finished run."""
    tree = {k: getattr(result, k) for k in ("benchmark", "model", "seed", "data")}
    return as_json(tree | {"config": _settings(result)})


def effective_settings(result: Result) -> dict[str, Any]:
    """The settings of a finished run that have an effect on scores."""
    return {key: value for key, value in _settings(result).items() if key not in _IDLE}


def _settings(result: Result) -> dict[str, Any]:
    return {"precision": "fp32", "approximate": "none", **result.config}  # older results lack these


def changed_imports(result: Result) -> list[str]:
    """Names of the imported files and modules that a finished run was made with and that have changed since."""
    now = _imports_now()
    return [name for name, digest in _imports_of(result).items() if digest != now.get(name, digest)]


def other_code(result: Result) -> str:
    """What other code a finished run was made by, in words; empty if it is the code of this process."""
    if result.versions.get("code") == code_digest():
        return ""
    then, now = _imports_of(result), _imports_now()
    if then != now and result.versions.get("package", result.versions.get("code")) == package_digest():
        return f"with other imports ({_files(then)} there, {_files(now)} here)"
    here = environment()
    version = f"traj_ood {result.versions.get('traj_ood')}, commit {(result.commit or 'unknown')[:12]}"
    others = [
        f"{name} {result.versions[name]} there, {here[name]} here"
        for name in LIBRARIES
        if name in result.versions and name in here and result.versions[name] != here[name]
    ]
    return f"by another version of the code ({'; '.join([version, *others])})"


def differences(mine: Mapping[str, Any], other: Mapping[str, Any], explained: Collection[str] = ()) -> str:
    """The first differences between two identities, each with the recorded value (there) and the one asked for (here);
    without the places that are ``explained`` otherwise, such as ``model.fingerprint``.

    >>> differences({"config": {"tol": 1e-4, "on_error": "skip"}}, {"config": {"tol": 1e-5, "on_error": "skip"}})
    'config.tol: 1e-05 there, 0.0001 here'
    """
    found = list(_differences(mine, other, explained))
    return "; ".join([*found[:_SHOWN], *(["…"] if len(found) > _SHOWN else [])])


def _differences(mine: Any, other: Any, explained: Collection[str], *keys: str) -> Iterator[str]:
    """The differences of what two identities have under ``keys``."""
    place = ".".join(keys)
    if mine == other or place in explained:
        return
    if isinstance(mine, Mapping) and isinstance(other, Mapping):
        is_split = len(keys) == 2 and keys[0] == "data"  # of which the digests say nothing to a reader
        names = [k for k in ("role", "count") if mine.get(k) != other.get(k)] if is_split else sorted({*mine, *other})
        if not names:
            yield f"{place}: other images or labels"
        if any(key in names and mine[key] != other.get(key) for key in ("fingerprint", "own_code")):
            explained = [*explained, f"{place}.answers"]  # which follow from weights and code
        for name in names:
            yield from _differences(mine.get(name, _NOTHING), other.get(name, _NOTHING), explained, *keys, name)
    elif place == "config.scorers" and isinstance(other, list):
        kinds = {"only here": [s for s in mine if s not in other], "only there": [s for s in other if s not in mine]}
        words = [f"{_listed(names)} {kind}" for kind, names in kinds.items() if names]
        yield f"{place}: {', '.join(words) or 'in another order'}"
    elif keys[:2] == ("config", "own_scorers"):
        yield f"config.scorers: another version of {'.'.join(keys[2:]) or 'own ones'}"
    elif place == "model.answers":
        yield "model: its code, or what it reads, gives other answers"
    elif place == "model.own_code":
        yield "model: its code has changed"
    elif place == "code":
        yield "code: that of traj_ood, of a library or of an imported file"
    else:
        yield f"{place}: {_short(other)} there, {_short(mine)} here"


def _listed(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def _short(value: Any) -> str:
    text = "something" if isinstance(value, Mapping) else value if value is _NOTHING else repr(value)
    return text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 1] + "…"


def _imports_of(result: Result) -> dict[str, str]:
    """The digests of the files that a run was made with, by name, as :func:`environment` has recorded them."""
    return dict(re.findall(r"(.+?) ([0-9a-f]{16})(?:, |$)", result.versions.get("imported", "")))


def _imports_now() -> dict[str, str]:
    return {extension.name: extension.digest[:16] for extension in imported()}


def _files(found: Mapping[str, str]) -> str:
    return ", ".join(found) or "nothing"
