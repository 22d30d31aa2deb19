"""Files that are complete or absent: the one way anything is written to disk."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from traj_ood.errors import TrajOODError


def write_atomic(path: str | Path, content: bytes | Callable[[BinaryIO], object]) -> None:
    """Write ``content`` (bytes, or a callable given an open binary file) so that ``path`` is whole or unchanged.

    The bytes go to a hidden file in the same folder (a rename across file systems is not atomic), reach the disk, and
    take the place of ``path`` in one step. Missing folders are made. On any failure the hidden file is removed.

    Raises ``TrajOODError`` naming the folder when it cannot be written (no permission, disk full); any error of the
    callable other than OSError passes through.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Opened by name, not through tempfile: its files are private (0600), and results are there to be read.
        with open(temporary, "xb") as file:
            if callable(content):
                content(file)
            else:
                file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        reason = error.strerror or str(error)
        raise TrajOODError(
            f"{path.parent}: expected a folder that can be written (for {path.name}), got: {reason}; "
            "free space, fix its permissions or choose another folder"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
