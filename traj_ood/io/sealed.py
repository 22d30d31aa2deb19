"""Sealed folders: one JSON file lists the size and hash of every other file, and contains its own digest.

The seal detects damage and incomplete copies. It is not a signature: whoever can write the folder can seal it again.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import stat
import uuid
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from traj_ood.errors import TrajOODError
from traj_ood.io.files import folder_errors, write_atomic
from traj_ood.io.trees import no_number

_BLOCK = 2**20
_MAX_JSON = 2**26
DETECTOR = "traj_ood.detector"
"""Schema, without its version, of a detector's record, the sealed folder that :func:`refuse_inside` looks for."""
FILE_NAME = "detector.json"
"""File name of that record."""


@contextmanager
def replaced_folder(folder: str | Path, name: str, known: Collection[str], overwrite: bool = True) -> Iterator[Path]:
    """Context manager that yields a new folder to write into, which replaces ``folder`` at the end.

    On any failure ``folder`` is unchanged. A crash leaves the old folder or the new one; a crash between the two
    renames leaves both, complete, under hidden names beside it. As ``folder`` is deleted, it must be empty, or have the
    JSON file ``name`` and nothing else but the ``known`` names. ``overwrite=False`` refuses any folder that is not
    empty, also one that another process fills meanwhile.
    """
    target = Path(os.path.realpath(Path(folder).expanduser()))
    fresh = target.with_name(f".{target.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        with folder_errors(target):
            _refuse_strangers(target, name, known)
            fresh.mkdir(parents=True)
            yield fresh
            if overwrite:
                _swap(fresh, target)
            else:
                _take(fresh, target)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _refuse_strangers(target: Path, name: str, known: Collection[str]) -> None:
    if target.exists() and not target.is_dir():
        raise TrajOODError(f"{target}: expected a folder or nothing, found a file: choose another folder")
    present = set(os.listdir(target)) if target.is_dir() else set()
    strangers = sorted(present - set(known) if name in present else present)
    if strangers:
        raise TrajOODError(f"{target}: contains {strangers[0]!r}, which would be deleted: choose an empty folder")


def _take(fresh: Path, target: Path) -> None:
    """Rename ``fresh`` to ``target``, which succeeds in one process only."""
    try:
        os.rename(fresh, target)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        raise TrajOODError(f"{target}: was made by another process meanwhile; choose another folder") from error


def _swap(fresh: Path, target: Path) -> None:
    aside = fresh.with_suffix(".old")
    if not target.exists():
        os.rename(fresh, target)
        return
    os.rename(target, aside)
    try:
        os.rename(fresh, target)
    except BaseException:
        os.rename(aside, target)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def refuse_inside(folder: str | Path) -> None:
    """Refuse ``folder`` for output files if it is, or is inside, a detector, whose seal allows no other files."""
    place = Path(os.path.realpath(Path(folder).expanduser()))
    for above in (place, *place.parents):
        if _is_detector(above):
            raise TrajOODError(
                f"{folder}: expected a place outside of any detector, but {above} is one, and would be refused as "
                "damaged with another file in it; choose another place"
            )


def _is_detector(folder: Path) -> bool:
    try:
        record = json.loads((folder / FILE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(record, dict) and str(record.get("schema", "")).startswith(DETECTOR)


def seal(folder: Path, name: str, record: Mapping[str, Any]) -> None:
    """Write ``folder/name``: the record, the size and sha256 of every file, and a digest of itself. Call it last."""
    files = {path: {"size": size, "sha256": _sha256(folder / path)} for path, size in _listing(folder).items()}
    whole = {**record, "files": files}
    write_atomic(folder / name, _canonical({**whole, "digest": hashlib.sha256(_canonical(whole)).hexdigest()}))


def open_sealed(folder: Path, name: str, schema: str) -> dict[str, Any]:
    """Check every file of a sealed folder and return its record, the JSON file ``name``, of the ``schema``
    ``<what>/<newest supported version>``.

    Hidden files at the top level are ignored, as nothing reads them.
    """
    try:
        return _opened(folder, name, schema)
    except OSError as error:
        raise TrajOODError(f"{folder}: cannot be read ({error.strerror or error}): fix its permissions") from error


def _opened(folder: Path, name: str, schema: str) -> dict[str, Any]:
    path = folder / name
    if not folder.is_dir():
        aside = sorted(p.name for p in folder.parent.glob(f".{folder.name}.*.old") if p.is_dir())
        hint = f"an interrupted save left the one before as {aside[0]!r} beside it" if aside else "correct the path"
        raise TrajOODError(f"{folder}: expected a folder with {name}, found {_what(folder)}: {hint}")
    if path.is_symlink() or not path.is_file():
        raise TrajOODError(f"{path}: expected a file, found {_what(path)}: this folder is no {_subject(schema)}")
    if path.stat().st_size > _MAX_JSON:
        raise TrajOODError(f"{path}: expected at most {_MAX_JSON} bytes, got {path.stat().st_size}: damaged")
    content = path.read_bytes()
    record = _parsed(content, path, schema)
    _check_files(folder, record, path)
    return record


def _parsed(content: bytes, path: Path, schema: str) -> dict[str, Any]:
    try:
        record = json.loads(content.decode("utf-8"), parse_constant=no_number)
        if not isinstance(record, dict):
            raise ValueError("no object")
        _check_schema(record.get("schema"), path, schema)
        whole = {key: value for key, value in record.items() if key != "digest"}
        intact = record.get("digest") == hashlib.sha256(_canonical(whole)).hexdigest() and _canonical(record) == content
    except TrajOODError:
        raise
    except (ValueError, RecursionError, OverflowError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)[:120]
        raise TrajOODError(f"{path}: damaged ({reason}): copy or save the {_subject(schema)} again") from error
    if not intact:
        raise TrajOODError(
            f"{path}: damaged or edited by hand (its digest does not fit its content): copy or save the "
            f"{_subject(schema)} again"
        )
    return record


def _check_schema(found: object, path: Path, schema: str) -> None:
    kind, _, newest = schema.rpartition("/")
    own, _, version = str(found).rpartition("/")
    if not isinstance(found, str) or own != kind or not (version.isascii() and version.isdigit()):
        raise TrajOODError(f"{path}: expected schema {schema}, got {str(found)[:60]!r}: no {_subject(schema)}")
    if len(version) > 9 or int(version) > int(newest):
        raise TrajOODError(
            f"{path}: schema {version[:9]} is newer than {newest}, the newest this traj_ood reads: upgrade traj_ood"
        )


def _check_files(folder: Path, record: Mapping[str, Any], path: Path) -> None:
    files = record.get("files")
    if not isinstance(files, dict):
        raise TrajOODError(f"{path}: files: expected a table of files: the file is damaged")
    for file, facts in files.items():
        if any(part in ("", ".", "..") for part in file.split("/")) or "\\" in file or ":" in file or "\0" in file:
            raise TrajOODError(
                f"{path}: names the file {file!a}, which is outside the folder: do not trust this folder"
            )
        if not (isinstance(facts, dict) and type(facts.get("size")) is int and type(facts.get("sha256")) is str):
            raise TrajOODError(f"{path}: files: {file!a}: expected a size and a sha256: the file is damaged")
    present = {file: size for file, size in _listing(folder).items() if file != path.name}
    missing = sorted(files.keys() - present.keys())
    if missing:
        raise TrajOODError(f"{folder / missing[0]}: missing ({len(missing)} in all): copy the whole folder again")
    extra = sorted(present.keys() - files.keys())
    if extra:
        raise TrajOODError(
            f"{folder / extra[0]}: not part of the {_subject(str(record['schema']))} ({len(extra)} such): remove it"
        )
    for file, size in present.items():
        if size != files[file]["size"]:
            raise TrajOODError(
                f"{folder / file}: damaged: expected {files[file]['size']} bytes, got {size}: copy it again"
            )
    for file in present:
        if _sha256(folder / file) != files[file]["sha256"]:
            raise TrajOODError(f"{folder / file}: damaged: its content has changed since it was saved: copy it again")


def _listing(folder: Path) -> dict[str, int]:
    """Size of every file below ``folder`` by relative path, without hidden ones at the top level. Links and devices,
    whose content is not in the folder, are refused."""
    found = {}
    for current, folders, files in os.walk(folder):
        top = Path(current) == folder
        if top:
            folders[:] = [name for name in folders if not name.startswith(".")]
        for name in folders:
            if (Path(current) / name).is_symlink():
                raise TrajOODError(f"{Path(current) / name}: expected a folder, found a link: copy the folder")
        for name in files:
            if top and name.startswith("."):
                continue
            path = Path(current) / name
            facts = path.lstat()
            if not stat.S_ISREG(facts.st_mode):
                raise TrajOODError(f"{Path(current) / name}: expected a file, found {_what(path)}: copy the file")
            found[path.relative_to(folder).as_posix()] = facts.st_size
    return found


def _canonical(record: Mapping[str, Any]) -> bytes:
    """The canonical JSON of a record, so that a change of white space is noticed, too."""
    return (json.dumps(record, indent=2, sort_keys=True, allow_nan=False) + "\n").encode("ascii")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _subject(schema: str) -> str:
    return schema.partition("/")[0].rpartition(".")[2]


def _what(path: Path) -> str:
    if path.is_symlink():
        return "a link"
    return "a folder" if path.is_dir() else "something else" if path.exists() else "nothing"
