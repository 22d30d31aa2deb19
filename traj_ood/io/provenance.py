"""Provenance of a result: digest of the code, library versions, machine and git commit.

Caches and resumed runs reuse only what code with the same digest has computed.
"""

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
# Modules that call, draw or print, and cannot change a number. All others, including future ones, count as able to.
_WITHOUT_EFFECT = (
    "__main__.py",
    "analysis/drawings.py",
    "cli/",
    "detector/card.py",
    "drawing/",
    "dynamics/progress.py",
    "errors.py",
    "evaluation/cautions.py",
    "evaluation/compare.py",
    "evaluation/dynamics_plots.py",
    "evaluation/leaderboard.py",
    "evaluation/leaderboard_text.py",
    "evaluation/parallel.py",
    "evaluation/plots.py",
    "evaluation/runs.py",
    "evaluation/text_tables.py",
    "evaluation/tracking.py",
    "evaluation/versus.py",
    "export/",
    "io/card.py",
    "monitor/",
    "openood/",
    "report/",
    "serve/",
    "training/card.py",
)
# Another version of a decoder, a resize or a kernel changes numbers, if only in the last digits.
LIBRARIES = (
    *("torch", "torchvision", "timm", "transformers", "diffusers", "openood"),
    *("pillow", "numpy", "scipy", "scikit-learn", "faiss-cpu", "faiss-gpu"),
)


def code_digest() -> str:
    """16 hex digits that identify all code behind a number: :func:`package_digest` and what ``--import`` has added."""
    own = imported()
    if not own:
        return package_digest()
    text = "\0".join([package_digest(), *(extension.digest for extension in own)])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@cache
def package_digest() -> str:
    """16 hex digits over the package's source and the versions of the libraries that can change a number.

    A digest cannot be forgotten, unlike a version number that someone has to raise. Comments count, too: changing one
    costs a cache, not a result. In a zipped package, without source files, the package's version replaces them.
    """
    digest = hashlib.sha256(metadata.version("traj_ood").encode())
    for name in LIBRARIES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            digest.update(f"{name} {metadata.version(name)}".encode() + b"\0")
    for path in deciding_files():
        digest.update(path.relative_to(PACKAGE).as_posix().encode() + b"\0")
        digest.update(path.read_bytes().replace(b"\r\n", b"\n") + b"\0")
    return digest.hexdigest()[:16]


def deciding_files() -> list[Path]:
    """The source files behind :func:`code_digest`, sorted."""
    files = sorted(PACKAGE.rglob("*.py"))
    return [path for path in files if not path.relative_to(PACKAGE).as_posix().startswith(_WITHOUT_EFFECT)]


def environment() -> dict[str, str]:
    """Versions of Python, of the libraries and of the code, from package metadata; nothing heavy is imported.

    ``code`` is :func:`code_digest`. ``faiss`` is the installed package and its version, or ``none`` (the torch index is
    used then). ``threads`` is OMP_NUM_THREADS if set, else the number of CPUs. If the user has imported code,
    ``imported`` names it with the beginning of its SHA-256, and ``package`` is :func:`package_digest`.
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
    """The git commit of ``folder`` (default: this package): 40 hex digits, with ``-dirty`` if tracked files differ.

    None without git, outside a checkout, or if the checkout does not track the folder: a package installed inside a
    project must not report that project's commit.
    """
    tracked = _git(folder, "ls-files", "--", ".")
    commit = _git(folder, "rev-parse", "--verify", "HEAD")
    if not tracked or not commit:
        return None
    return commit + "-dirty" if _git(folder, "status", "--porcelain", "--untracked-files=no") else commit


def _git(folder: str | Path, *arguments: str) -> str | None:
    """The output of a git command, stripped; None if git is not installed, fails, or takes longer than 10 s."""
    command = ["git", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
