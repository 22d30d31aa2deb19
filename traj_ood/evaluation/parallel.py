"""Several processes as one team: each takes a share of the work, all wait at common points, and one error stops them
all."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

from traj_ood.errors import TrajOODError

T = TypeVar("T")

_INSTALL = "pip install 'traj_ood[multi]'"
_LAUNCH = ("RANK", "WORLD_SIZE", "LOCAL_RANK")  # what torchrun and accelerate launch tell each process
# One process may work for hours while the others wait. Not longer: c10d counts milliseconds in 31 bits.
_TIMEOUT = timedelta(days=7)
_DEATH_TIMEOUT = timedelta(seconds=10)
_KEPT_NOTE = "finished batches are kept: start the same command again"


def is_main_process() -> bool:
    """Whether this process prints what happens before there is a :class:`Team`, such as an interruption."""
    return os.environ.get("RANK", "0") == "0"


class TeammateError(TrajOODError):
    """This process stops because of an error that another process reports; the command line prints nothing for it."""


class Team:
    """The processes that compute one run; this base class is a team of one, and costs nothing.

    Members exchange no tensors. What one has finished is a file in the run's folder, which all of them must see, so
    that a process can die at any moment without taking more than its current batch along.

    Attributes:
        rank: number of this process, 0 … size − 1.
        size: number of processes.
        local_rank: number of this process on its machine: that of its GPU.
    """

    rank = 0
    size = 1
    local_rank = 0

    @staticmethod
    def join() -> Team:
        """The team that ``torchrun`` or ``accelerate launch`` started this process for; a team of one otherwise.

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
        """This process's share of work that every process lists alike."""
        return items[self.rank :: self.size]

    def device(self, name: str) -> str:
        """``name``, except that among several processes ``auto`` and ``cuda`` are the GPU of this one's local rank."""
        import torch

        if self.size > 1 and (name == "cuda" or (name == "auto" and torch.cuda.is_available())):
            return f"cuda:{self.local_rank}"
        return name

    @contextmanager
    def together(self) -> Iterator[None]:
        """A block that all processes leave together: at its end, or with the first error raised in any of them.

        Raises:
            TrajOODError: in the main process, what went wrong in any of them.
            TeammateError: the same, in every other process.
        """
        yield

    def wait(self) -> None:
        """Wait for all processes; inside :meth:`together` only.

        Raises:
            TrajOODError, TeammateError: as :meth:`together`.
        """

    def main_first(self, action: Callable[[], T]) -> T:
        """``action()`` in the main process, and then in every other one, which finds what the main one left on disk.

        Raises:
            TrajOODError, TeammateError: as :meth:`together`, inside which it belongs.
        """
        if not self.is_main:
            self.wait()
        outcome = action()
        if self.is_main:
            self.wait()
        return outcome

    def check(self) -> None:
        """Stop here if another process has failed, without waiting; inside :meth:`together` only.

        Raises:
            TrajOODError, TeammateError: as :meth:`together`.
        """


class LaunchedTeam(Team):
    """A team of several processes, over Hugging Face accelerate.

    They talk through gloo also where they compute on GPUs: all they say is "I am here" and the text of an error.
    """

    def __init__(self) -> None:
        try:
            from accelerate import PartialState
        except ImportError as error:
            # Only one process of a machine says so: none of them can reach the others yet.
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
                f"gloo, got: {_line(error)}: check MASTER_ADDR, MASTER_PORT and GLOO_SOCKET_IFNAME"
            ) from error
        self.rank: int = state.process_index
        self.size: int = state.num_processes
        self.local_rank: int = state.local_process_index
        # The store behind the process group: unlike a collective it can be asked without waiting for anybody.
        self._store: Any = distributed_c10d._get_default_store()
        self._round = 0  # failures so far, the same number in every process: a failed round leaves its keys behind
        self._shared: Exception | None = None  # the error that all processes know of already
        self._is_lost = False

    @contextmanager
    def together(self) -> Iterator[None]:
        with self._told_to_stop():
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
        """Wait for all processes; if one of them brought an error, raise in all of them."""
        from torch import distributed

        told: list[str | None] = [None] * self.size
        try:
            if error is not None:
                self._store.set(self._key("failed"), "")  # for those that do not wait yet, see check()
            distributed.all_gather_object(told, None if error is None else self._tell(error))
            distributed.barrier()  # the first to leave may take the store along
        except TrajOODError:
            raise  # SIGTERM
        except Exception as problem:
            raise self._lost("another process died, its connection is lost") from (error or problem)
        first = next((rank for rank, text in enumerate(told) if text is not None), None)
        if first is None:
            return
        self._leave()
        self._round += 1
        bug = error is not None and not isinstance(error, TrajOODError)
        if error is not None and (bug or (self.is_main and first == self.rank)):
            self._shared = error  # as it was raised: with its type and, for a bug, its traceback
        else:
            self._shared = (TrajOODError if self.is_main else TeammateError)(told[first])
        raise self._shared from (None if self._shared is error else error)

    def _tell(self, error: Exception) -> str:
        if isinstance(error, TrajOODError):
            return str(error)
        return f"process {self.rank} failed with {type(error).__name__} ({_line(error)}); {_KEPT_NOTE}"

    def _lost(self, reason: str) -> TrajOODError:
        """The error of a process whose team has broken up; the first survivor to notice reports it."""
        self._is_lost = True
        self._leave()
        first = True
        with suppress(Exception):  # the store may have died, too
            self._store.set_timeout(_DEATH_TIMEOUT)
            first = self._store.add(self._key("lost"), 1) == 1
        self._shared = (TrajOODError if first else TeammateError)(f"{reason}; {_KEPT_NOTE}")
        return self._shared

    @contextmanager
    def _told_to_stop(self) -> Iterator[None]:
        """Turn SIGTERM, with which launchers stop the survivors of a process that died, into an error like any
        other."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def stop(*_: object) -> None:
            if self._is_lost:  # it is being said
                return
            raise self._lost("stopped by SIGTERM, as launchers do when another process died")

        before = signal.signal(signal.SIGTERM, stop)
        yield
        signal.signal(signal.SIGTERM, before)  # not after an error: see _leave

    def _leave(self) -> None:
        """Ignore the launcher's SIGTERM from here on: it must not come between an error and its printing."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def _key(self, name: str) -> str:
        return f"traj_ood/{self._round}/{name}"


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
