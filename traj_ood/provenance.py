"""Which code this is, ours and the libraries': caches and resumed runs believe only what the same code has made."""

from __future__ import annotations

import contextlib
import hashlib
from functools import cache
from importlib import metadata
from pathlib import Path

PACKAGE = Path(__file__).parent
# What drives, draws or carries numbers and never makes one. All else decides numbers, a module added later included.
_DECIDES_NOTHING = (
    "__main__.py",
    "cli/",
    "compare.py",
    "errors.py",
    "export/",
    "leaderboard.py",
    "model_card.py",
    "openood/",
    "parallel.py",
    "plots.py",
    "report/",
    "analysis/draw",
)


# A decoder, a resize or a kernel of another version makes other numbers, if only in the last digits.
_LIBRARIES = (
    *("torch", "torchvision", "timm", "transformers", "diffusers", "openood"),
    *("pillow", "numpy", "scipy", "scikit-learn", "faiss-cpu", "faiss-gpu"),
)


@cache
def code_digest() -> str:
    """16 hex digits over the source of this package that decides numbers, and the versions of the libraries that do.

    A digest and not a version that somebody has to raise: what is forgotten once is a wrong number in every cache. It
    is taken once per process, in milliseconds. A comment counts, too: its change costs a cache, not a result. Where
    there are no source files (a zipped package) the package's version stands for them.
    """
    digest = hashlib.sha256(metadata.version("traj_ood").encode())
    for name in _LIBRARIES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            digest.update(f"{name} {metadata.version(name)}".encode() + b"\0")
    for path in deciding_files():
        digest.update(path.relative_to(PACKAGE).as_posix().encode() + b"\0")
        digest.update(path.read_bytes().replace(b"\r\n", b"\n") + b"\0")
    return digest.hexdigest()[:16]


def deciding_files() -> list[Path]:
    """The source files behind :func:`code_digest`, sorted."""
    files = sorted(PACKAGE.rglob("*.py"))
    return [path for path in files if not path.relative_to(PACKAGE).as_posix().startswith(_DECIDES_NOTHING)]
