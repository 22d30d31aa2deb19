"""Teams of processes that share the work of a run, wait for each other, and all stop if one fails."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

from traj_ood.errors import TrajOODError
from traj_ood.text import brief

T = TypeVar("T")

_INSTALL = "pip install 'traj_ood[multi]'"
_LAUNCH = ("RANK", "WORLD_SIZE", "LOCAL_RANK")  # variables set by torchrun and accelerate launch
# Processes may wait for hours for another one. 7 days is near the limit of c10d, which has 31 bits for milliseconds.
_TIMEOUT = timedelta(days=7)
_DEATH_TIMEOUT = timedelta(seconds=10)
_KEPT_NOTE = "finished batches are kept: start the same command again"


def is_main_process() -> bool:
    """Whether this process prints messages that do not belong to a :class:`Team`, such as on an interruption."""
    return os.environ.get("RANK", "0") == "0"


class TeammateError(TrajOODError):
    """Raised in a process that stops because of an error in another one, which reports it; nothing is printed here."""


class Team:
    """The processes that compute one run; this base class is a team of one process.

    Processes exchange no tensors. Finished work is stored as files in the run's folder, to which all have access, so
    that a process that dies loses only its current batch.

    Attributes:
        rank: number of this process, 0 … size − 1.
        size: number of processes.
        local_rank: number of this process on its machine, and of its GPU.
    """

    rank = 0
    size = 1
    local_rank = 0

    @staticmethod
    def join() -> Team:
        """The team of a process started by ``torchrun`` or ``accelerate launch``; otherwise a team of one.

        Raises:
            TrajOODError: accelerate is not installed, or the processes cannot reach each other.
        """
        if not all(name in os.environ for name in _LAUNCH) or os.environ["WORLD_SIZE"] == "1":
            return Team()
        return LaunchedTeam()

    @property
    def is_main(self) -> bool:
        """Whether this process opens the run's folder, measures, prints and plots."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """This process's share of ``items``, which must be the same list in every process."""
        return items[self.rank :: self.size]

    def device(self, name: str) -> str:
        """The device for ``name``: with several processes, ``auto`` and ``cuda`` mean the GPU of the local rank."""
        import torch

        if self.size > 1 and (name == "cuda" or (name == "auto" and torch.cuda.is_available())):
            return f"cuda:{self.local_rank}"
        return name

    @contextmanager
    def together(self) -> Iterator[None]:
        """Context manager that all processes leave together, at its end or with the first error raised in any of them.

        Raises:
            TrajOODError: in the main process, the error of any process.
            TeammateError: in every other process.
        """
        yield

    def wait(self) -> None:
        """Wait for all processes. This and the following methods may be called inside :meth:`together` only, and raise
        as it does."""

    def main_first(self, action: Callable[[], T]) -> T:
        """Call ``action`` in the main process, and then in all others, which find its files on disk."""
        if not self.is_main:
            self.wait()
        outcome = action()
        if self.is_main:
            self.wait()
        return outcome

    def check(self) -> None:
        """Raise if another process has failed, without waiting."""


class LaunchedTeam(Team):
    """A team of several processes, launched with Hugging Face accelerate or torchrun.

    They communicate through gloo, also when computing on GPUs, as they only exchange barriers and texts of errors.
    """

    def __init__(self) -> None:
        try:
            from accelerate import PartialState
        except ImportError as error:
            # Reported by one process per machine, as they cannot communicate yet.
            kind = TrajOODError if os.environ["LOCAL_RANK"] == "0" else TeammateError
            raise kind(
                f"started as one of {os.environ['WORLD_SIZE']} processes: expected accelerate, which is not installed "
                f"({error}): {_INSTALL}"
            ) from error
        from torch.distributed import distributed_c10d

        try:
            state: Any = PartialState(cpu=True, backend="gloo", timeout=_TIMEOUT)
        except Exception as error:
            raise TrajOODError(
                f"process {os.environ['RANK']} of {os.environ['WORLD_SIZE']}: expected to reach the others over "
                f"gloo, got: {brief(error)}: check MASTER_ADDR, MASTER_PORT and GLOO_SOCKET_IFNAME"
            ) from error
        self.rank: int = state.process_index
        self.size: int = state.num_processes
        self.local_rank: int = state.local_process_index
        # The store of the process group, which unlike a collective can be read without waiting.
        self._store: Any = distributed_c10d._get_default_store()
        self._round = 0  # number of failures, equal in all processes; part of the keys, as old keys stay in the store
        self._shared: Exception | None = None  # an error that has been shared with all processes
        self._is_lost = False

    @contextmanager
    def together(self) -> Iterator[None]:
        with self._sigterm_as_error():
            try:
                yield
            except Exception as error:
                if error is not self._shared:
                    self._meet(error)
                raise
            self._meet()

    def wait(self) -> None:
        self._meet()

    def check(self) -> None:
        if self._store.check([self._key("failed")]):
            self._meet()

    def _meet(self, error: Exception | None = None) -> None:
        """Wait for all processes; if one of them has an error, raise in all of them."""
        from torch import distributed

        texts: list[str | None] = [None] * self.size
        try:
            if error is not None:
                self._store.set(self._key("failed"), "")  # read by check() in processes that are not waiting yet
            distributed.all_gather_object(texts, None if error is None else self._text_of(error))
            distributed.barrier()  # the store may end with the first process to leave
        except TrajOODError:
            raise  # SIGTERM
        except Exception as problem:
            raise self._lost("another process died, its connection is lost") from (error or problem)
        first = next((rank for rank, text in enumerate(texts) if text is not None), None)
        if first is None:
            return
        self._ignore_sigterm()
        self._round += 1
        bug = error is not None and not isinstance(error, TrajOODError)
        if error is not None and (bug or (self.is_main and first == self.rank)):
            self._shared = error  # unchanged, with its type and traceback
        else:
            self._shared = (TrajOODError if self.is_main else TeammateError)(texts[first])
        raise self._shared from (None if self._shared is error else error)

    def _text_of(self, error: Exception) -> str:
        if isinstance(error, TrajOODError):
            return str(error)
        return f"process {self.rank} failed with {type(error).__name__} ({brief(error)}); {_KEPT_NOTE}"

    def _lost(self, reason: str) -> TrajOODError:
        """The error raised in the surviving processes after one has died; the first to notice reports it."""
        self._is_lost = True
        self._ignore_sigterm()
        first = True
        with suppress(Exception):  # the store may be gone as well
            self._store.set_timeout(_DEATH_TIMEOUT)
            first = self._store.add(self._key("lost"), 1) == 1
        self._shared = (TrajOODError if first else TeammateError)(f"{reason}; {_KEPT_NOTE}")
        return self._shared

    @contextmanager
    def _sigterm_as_error(self) -> Iterator[None]:
        """Context manager that turns SIGTERM, by which launchers stop the surviving processes, into an error."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def stop(*_: object) -> None:
            if self._is_lost:  # the error is being reported
                return
            raise self._lost("stopped by SIGTERM, as launchers do when another process died")

        before = signal.signal(signal.SIGTERM, stop)
        yield
        signal.signal(signal.SIGTERM, before)  # not after an error, see _ignore_sigterm

    def _ignore_sigterm(self) -> None:
        """Ignore SIGTERM from now on, so that the launcher does not end the process before it prints its error."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def _key(self, name: str) -> str:
        return f"traj_ood/{self._round}/{name}"
