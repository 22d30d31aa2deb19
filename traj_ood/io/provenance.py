"""Which code, libraries, machine and commit made a number. Caches and resumed runs believe their own code alone."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import subprocess
import sys
from functools import cache
from importlib import metadata
from pathlib import Path

from traj_ood.io.extensions import imported

PACKAGE = Path(__file__).parents[1]
_PACKAGES = ("traj_ood", "torch", "torchvision", "transformers", "timm", "numpy", "scikit-learn", "pandas")
_FAISS_PACKAGES = ("faiss-gpu", "faiss-cpu")
# What drives, draws or carries numbers and never makes one. All else decides numbers, a module added later included.
_DECIDES_NOTHING = (
    "__main__.py",
    "analysis/drawings.py",
    "cli/",
    "detector/card.py",
    "drawing/",
    "errors.py",
    "evaluation/compare.py",
    "evaluation/dynamics_plots.py",
    "evaluation/leaderboard.py",
    "evaluation/parallel.py",
    "evaluation/plots.py",
    "evaluation/runs.py",
    "evaluation/text_tables.py",
    "evaluation/tracking.py",
    "evaluation/versus.py",
    "export/",
    "io/card.py",
    "openood/",
    "report/",
    "training/card.py",
)


# A decoder, a resize or a kernel of another version makes other numbers, if only in the last digits.
_LIBRARIES = (
    *("torch", "torchvision", "timm", "transformers", "diffusers", "openood"),
    *("pillow", "numpy", "scipy", "scikit-learn", "faiss-cpu", "faiss-gpu"),
)


def code_digest() -> str:
    """16 hex digits over all code that decides numbers: :func:`package_digest`, and what ``--import`` has added."""
    own = imported()
    if not own:
        return package_digest()
    text = "\0".join([package_digest(), *(extension.digest for extension in own)])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@cache
def package_digest() -> str:
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


def environment() -> dict[str, str]:
    """Versions of what can change a number, by name, from package metadata: nothing heavy is imported.

    ``faiss`` names the installed package and its version, or ``none`` (the torch index then does the search);
    where a user imported code, ``imported`` names it, with the beginning of its SHA-256, and
    ``package`` is :func:`package_digest`;
    ``threads`` is OMP_NUM_THREADS where set, else the number of CPUs; ``code`` is :func:`code_digest`.
    """
    faiss = [f"{name} {_version(name)}" for name in _FAISS_PACKAGES if _version(name) != "none"]
    own = ", ".join(f"{extension.name} {extension.digest[:16]}" for extension in imported())
    return {
        "python": platform.python_version(),
        **{name: _version(name) for name in _PACKAGES},
        "code": code_digest(),
        **({"imported": own, "package": package_digest()} if own else {}),
        "faiss": " + ".join(faiss) or "none",
        "platform": f"{sys.platform} {platform.machine()}",
        "threads": os.environ.get("OMP_NUM_THREADS") or str(os.cpu_count() or 1),
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


def git_commit(folder: str | Path = PACKAGE) -> str | None:
    """The commit checked out around ``folder``, this package's by default: 40 hex digits, and ``-dirty`` when tracked
    files differ from it.

    Untracked files do not count, as in ``git describe --dirty``: the results of an earlier run are some. None without
    git, outside a checkout, or in a folder the checkout does not track (a package installed in someone's project
    must not report that project's commit).
    """
    tracked = _git(folder, "ls-files", "--", ".")
    commit = _git(folder, "rev-parse", "--verify", "HEAD")
    if not tracked or not commit:
        return None
    return commit + "-dirty" if _git(folder, "status", "--porcelain", "--untracked-files=no") else commit


def _git(folder: str | Path, *arguments: str) -> str | None:
    """What git prints, stripped; None when it is not installed, fails, or hangs for 10 s."""
    command = ["git", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
