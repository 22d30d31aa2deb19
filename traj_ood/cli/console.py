"""Output of the command line on any console: results on standard output, everything else on standard error.

All output goes through :func:`say`, :func:`note`, :func:`warn` and :func:`fail`. Control characters are escaped, as
names may come from anyone. Characters that the console's encoding lacks are spelled in ASCII. If standard output is
closed or full, the command fails, because a lost result must not end with exit code 0.
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
from traj_ood.io.files import abandon
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
_LOG_INTERVAL = "10"  # seconds


def prepare() -> None:
    """Make the standard streams safe to write to. Called once, before anything is printed or opened."""
    codecs.register_error(_ERRORS, _spelled)
    _fill_descriptors()
    sys.stdout = _ClosedOutput() if sys.stdout is None else sys.stdout
    sys.stderr = _Forgiving(open(os.devnull, "w") if sys.stderr is None else sys.stderr)  # noqa: SIM115 (to the end)
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors=_ERRORS)
    if not sys.stderr.isatty():  # in a log file each state of a progress bar is a line that stays
        os.environ.setdefault("TQDM_MININTERVAL", _LOG_INTERVAL)
    warnings.showwarning = lambda message, *_, **__: warn(str(message))
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it warns of cache folders that it cannot write


def say(text: str, *, end: str = "\n", kept: str = "") -> None:
    """Print a result on standard output, with control characters other than line ends escaped.

    ``kept`` says where the result has been saved, for the error if standard output is closed or cannot be written; a
    reader that has left gives a BrokenPipeError.
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
    """Print a line on standard error, if it is open."""
    sys.stderr.write(one_line(text) + "\n")
    sys.stderr.flush()


def warn(text: str) -> None:
    note(f"traj-ood: warning: {one_line(text)}")


def fail(text: str, code: int) -> NoReturn:
    """Print an error and exit with ``code``."""
    note(f"traj-ood: error: {one_line(text)}")
    sys.exit(code)


def leave(code: str | int | None) -> NoReturn:
    """Exit without unloading libraries, which for torch with CUDA takes half a second and reads 130 MB from disk.

    Functions registered with ``atexit`` are called. Members of a team (torchrun) and processes that are profiled or
    traced exit in the usual way.
    """
    if not isinstance(code, int | None) or "WORLD_SIZE" in os.environ or sys.getprofile() or sys.gettrace():
        sys.exit(code)
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code or 0)


def lost(error: BaseException, kept: str = "") -> str:
    """The error message for standard output that could not be written; the stream is abandoned."""
    abandon(sys.stdout)
    reason = getattr(error, "strerror", None) or str(error)
    done = f"; {kept}" if kept else ""
    return f"standard output cannot be written ({reason}){done}: send it to a terminal, a file with room or a pipe"


def _spelled(error: UnicodeError) -> tuple[str, int]:
    """Error handler for codecs that spells in ASCII what the console's encoding lacks."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end].translate(_SPELLING)
    return text.encode("ascii", "backslashreplace").decode("ascii"), error.end


def _fill_descriptors() -> None:
    """Open the null device for closed standard descriptors; otherwise the next opened file would get their number."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, which is this one


class _ClosedOutput(io.TextIOBase):
    """Standard output of a process that was started without one."""

    encoding, errors = "utf-8", "strict"  # read by click

    def writable(self) -> bool:
        return True

    def write(self, text: str, /) -> int:
        raise OSError(errno.EBADF, "it is closed")


class _Forgiving:
    """Standard error that ignores failed writes: progress and warnings may be lost, but the command continues."""

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
