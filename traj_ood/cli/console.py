"""What the command line says, on any console: results on standard output, everything else on standard error.

All of it goes through :func:`say`, :func:`note`, :func:`warn` and :func:`fail`. Names in it are anybody's, so what a
terminal would obey is escaped; a console of another encoding gets a spelling that it has; and standard output that is
closed or full is an error, because a result that nobody got must not end with exit code 0.
"""

from __future__ import annotations

import atexit
import codecs
import contextlib
import errno
import io
import logging
import os
import sys
import warnings
from typing import Any, NoReturn

from traj_ood.errors import TrajOODError
from traj_ood.text import one_line, printable

_SPELLING = str.maketrans(
    {"±": "+/-", "↑": "^", "↓": "v", "→": "->", "×": "x", "·": "-", "—": "-", "–": "-", "−": "-", "‖": "||"}
    | {
        "²": "^2",
        "…": "...",
        "⚠": "!",
        "∘": " o ",
        "≥": ">=",
        "≤": "<=",
        "§": "sec. ",
        "ε": "eps",
        "ρ": "rho",
        "σ": "sigma",
    }
)
_ERRORS = "traj_ood.spelled"


def prepare() -> None:
    """Make the process's own streams safe to write to. Called once, before anything else is said or opened."""
    codecs.register_error(_ERRORS, _spelled)
    _fill_descriptors()
    sys.stdout = _ClosedOutput() if sys.stdout is None else sys.stdout
    sys.stderr = _Forgiving(open(os.devnull, "w") if sys.stderr is None else sys.stderr)  # noqa: SIM115 (to the end)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=_ERRORS)
    warnings.showwarning = lambda message, *_, **__: warn(str(message))
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it tells of every cache folder that it cannot write


def say(text: str, *, end: str = "\n", kept: str = "") -> None:
    """A result, on standard output.

    Args:
        text: lines; what a terminal would obey is escaped, line ends apart.
        kept: where the result is all the same, for the error.
    Raises:
        TrajOODError: standard output is closed, or cannot take it. BrokenPipeError: nobody reads it any more.
    """
    try:
        sys.stdout.write("\n".join(map(printable, text.split("\n"))) + end)
        sys.stdout.flush()
    except BrokenPipeError:
        abandon(sys.stdout)
        raise
    except (OSError, ValueError) as error:
        raise TrajOODError(lost(error, kept)) from error


def note(text: str) -> None:
    """A line on standard error; where that is closed, nothing."""
    sys.stderr.write(one_line(text) + "\n")
    sys.stderr.flush()


def warn(text: str) -> None:
    note(f"traj-ood: warning: {one_line(text)}")


def fail(text: str, code: int) -> NoReturn:
    """End the process with an error line."""
    note(f"traj-ood: error: {one_line(text)}")
    sys.exit(code)


def leave(code: str | int | None) -> NoReturn:
    """End the process without taking its libraries apart: torch's for CUDA read 130 MB from the disk for it, in half a
    second, whether or not there is a GPU. What Python has registered for its end is done; members of a team say
    goodbye to each other in the usual way, and so does a process that is profiled or traced.

    Args:
        code: of ``SystemExit``.
    """
    if not isinstance(code, int | None) or "WORLD_SIZE" in os.environ or sys.getprofile() or sys.gettrace():
        sys.exit(code)
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code or 0)


def lost(error: BaseException, kept: str = "") -> str:
    """The words for standard output that could not be written. Nothing is tried again when the process ends."""
    abandon(sys.stdout)
    reason = getattr(error, "strerror", None) or str(error)
    done = f"; {kept}" if kept else ""
    return f"standard output cannot be written ({reason}){done}: send it to a terminal, a file with room or a pipe"


def abandon(stream: Any) -> None:
    """Python flushes its streams once more when it ends; what is still in this one must not fail again."""
    with contextlib.suppress(OSError, ValueError):
        number, nowhere = stream.fileno(), os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, number)
        os.close(nowhere)


def _spelled(error: UnicodeError) -> tuple[str, int]:
    """For codecs: what the console's encoding has no sign for, in ASCII."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end].translate(_SPELLING)
    return text.encode("ascii", "backslashreplace").decode("ascii"), error.end


def _fill_descriptors() -> None:
    """Closed standard descriptors become the null device: else the next file to be opened would be standard output."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one


class _ClosedOutput(io.TextIOBase):
    """Standard output of a process that was started without one."""

    encoding, errors = "utf-8", "strict"  # read by click

    def writable(self) -> bool:
        return True

    def write(self, text: str, /) -> int:
        raise OSError(errno.EBADF, "it is closed")


class _Forgiving:
    """Standard error: progress and warnings that cannot be written are lost, but the work goes on."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
