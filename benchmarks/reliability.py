"""What is left when things go wrong? python benchmarks/reliability.py [--part kill disk corrupt together soak]
[--out results/benchmarks/reliability.json]

Every part works on a benchmark of generated images, a model with random weights and a detector made of them, all small,
in a temporary folder (--place names another file system). Results are compared with those of a run that nobody
disturbed: byte by byte, but rows of `score` to 1e-9 relative, since what is left is judged in other batches.

kill       `bench` and `score` get SIGKILL at random moments, a quarter of them before anything is written, the others
           between the first part or row and the end, and are started again (`score` with --resume). At no moment may a
           file of a final name be anything but whole. `score` judges thousands of paths, in batches of its own choice.
disk       they run on file systems that are full or read-only: one line of error, exit code 2, earlier results intact,
           and the same command goes on when there is space again. Needs permission to mount a tmpfs; otherwise a limit
           on the size of files stands in for the full disk, and read-only is left out.
corrupt    everything that is read from disk, damaged at random; see corruptions.py. `score` then gets a folder of
           damaged images, and the sources are searched for what could run code out of a file.
together   two processes at once on one folder: one of them refuses, or both end with the same bytes.
soak       very many images through `score`: images per second, and how the memory of the process grows.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import faulthandler
import io
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import corruptions

from traj_ood.evaluation.results import FILE_NAME, Result
from traj_ood.io.files import files_below, write_atomic
from traj_ood.io.provenance import environment, git_commit

PARTS = ("kill", "disk", "corrupt", "together", "soak")
RUN = "tiny--model--seed0"
FINAL = ("scores.parquet", "curves.parquet", "attractors.safetensors")  # and result.json, which holds times
_QUIET = ("--quiet", "--device", "cpu", "--threads", 1)
_PATIENCE = 3600  # seconds until a command is taken to hang; none takes more than some


class BrokenPromiseError(AssertionError):
    """Something that must not happen did."""


def expect(holds: bool, text: str) -> None:
    if not holds:
        raise BrokenPromiseError(text)


# ---------------------------------------------------------------------- what runs


class Command:
    """A started ``traj-ood`` command.

    Args:
        words: after ``traj-ood``.
        log: its standard error goes here.
        forked: in a copy of this process, which has all libraries loaded: some hundred times faster than a new one, but
            without the start that a user's command has. For tests.
        file_limit: most bytes of a file that it may write.
    """

    def __init__(self, *words: object, log: Path, forked: bool = False, file_limit: int | None = None) -> None:
        self.words, self._log, self._forked = [str(word) for word in words], log, forked
        self._code: int | None = None
        log.parent.mkdir(parents=True, exist_ok=True)
        if forked:
            self.pid = os.fork()
            if self.pid == 0:
                self._become(file_limit)
            return
        limit = None if file_limit is None else lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit,) * 2)
        with open(log, "wb") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "traj_ood", *self.words],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                preexec_fn=limit,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )
        self.pid, self.stdin = self._process.pid, self._process.stdin

    def _become(self, file_limit: int | None) -> None:
        """The forked copy: run the command, and end without any of what the original would do at its end."""
        code = 70
        try:
            faulthandler.cancel_dump_traceback_later()
            nowhere = os.open(os.devnull, os.O_RDWR)
            errors = os.open(self._log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            for source, target in ((nowhere, 0), (nowhere, 1), (errors, 2)):
                os.dup2(source, target)
            sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
            if file_limit is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
            from traj_ood.cli import main

            main(self.words, prog_name="traj-ood")
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(Exception):
                sys.stderr.flush()
            os._exit(code)

    def running(self) -> bool:
        if self._code is None and self._forked:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self._code = os.waitstatus_to_exitcode(status) if pid else None
        elif self._code is None:
            self._code = self._process.poll()
        return self._code is None

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        self.wait()

    def wait(self) -> int:
        """The exit code, negative for a signal.

        Raises:
            BrokenPromiseError: it does not end.
        """
        until = time.monotonic() + _PATIENCE
        if not self._forked and self.stdin is not None:
            with contextlib.suppress(OSError):
                self.stdin.close()
        while self.running():
            if time.monotonic() > until:
                os.kill(self.pid, signal.SIGKILL)
                raise BrokenPromiseError(f"hangs: {' '.join(self.words)}")
            time.sleep(0.01)
        assert self._code is not None
        return self._code

    def errors(self) -> list[str]:
        """Lines of its standard error."""
        return self._log.read_text(errors="replace").splitlines()

    def must_end(self, code: int) -> None:
        found = self.wait()
        expect(found == code, f"exit code {found} instead of {code}: {self.words[0]}: {self.errors()[-5:]}")

    def must_be_refused(self, *texts: str) -> str:
        """Exit code 2 and one line of error beside warnings, which is returned."""
        self.must_end(2)
        lines = [line for line in self.errors() if not line.startswith("traj-ood: warning: ")]
        expect(len(lines) == 1 and lines[0].startswith("traj-ood: error: "), f"no line of error: {lines[-5:]}")
        expect(all(text in lines[0] for text in texts), f"{texts} not in {lines[0]!r}")
        return lines[0]


class Place:
    """Everything small that commands work on, below one folder: ``tiny.yaml``, ``model``, ``detector``, ``pool``.

    Args:
        folder: new or empty.
        forked: see :class:`Command`.
        images: in each of the benchmark's sets but the training set, and at least 120 in the pool that is scored.
    """

    def __init__(self, folder: Path, forked: bool = False, images: int = 120) -> None:
        self.folder, self.forked, self._count = folder, forked, 0
        sizes = {"train": 60, "test": images, "near": images, "far": images}
        for seed, (name, count) in enumerate(sizes.items()):
            corruptions.write_images(folder / "images" / name, count, seed, high=256 if name == "far" else 120)
        corruptions.write_images(folder / "pool", max(images, 120), seed=9)  # whose rows fill several pages of a disk
        (folder / "tiny.yaml").write_text(
            "name: tiny\nroot: ./images\ntrain: train\ntest: test\nnear: {dim: near}\nfar: {bright: far}\n"
        )
        corruptions.small_model("vit").save_pretrained(folder / "model")
        self.run(*self.fit(folder / "detector")).must_end(0)

    def run(self, *words: object, file_limit: int | None = None) -> Command:
        self._count += 1
        log = self.folder / "logs" / f"{self._count}.txt"
        return Command(*words, log=log, forked=self.forked, file_limit=file_limit)

    def bench(self, out: Path, *more: object) -> list[object]:
        options = ("--scorers", "trajectory,field,knn:k=3", "--max-steps", 40, "--bootstrap", 10, "--batch-size", 10)
        # FAISS's threads would hang in a copy of a process that has used them.
        flags = ("--no-plots", *_QUIET, "--index", "torch")
        model = ("--model", self.folder / "model")
        return ["bench", self.folder / "tiny.yaml", *model, "--out", out, *options, *flags, *more]

    def score(self, out: Path, *more: object) -> list[object]:
        flags = ("--batch-size", 8, *_QUIET)
        return ["score", self.folder / "detector", self.folder / "pool", "--out", out, *flags, *more]

    def score_many(self, out: Path, images: int, *more: object) -> list[object]:
        """So many paths of the pool, over and over, in batches of the default size."""
        pool = sorted(path.name for path in (self.folder / "pool").iterdir())
        listed = self.folder / f"{images}.txt"
        if not listed.exists():
            listed.write_text("".join(f"{pool[k % len(pool)]}\n" for k in range(images)))
        source = ("--list", listed, "--root", self.folder / "pool")
        return ["score", self.folder / "detector", *source, "--out", out, *_QUIET, *more]

    def fit(self, out: Path, *more: object) -> list[object]:
        return ["fit", self.folder / "images" / "train", "--model", self.folder / "model", "--out", out, *_QUIET, *more]


def contents(run: Path) -> dict[str, bytes]:
    """The files of a finished benchmark run that are the same whenever and wherever it ran."""
    return {name: (run / name).read_bytes() for name in FINAL}


def same_rows(found: bytes, expected: bytes) -> bool:
    """Whether two CSV tables say the same: their numbers to 1e-9 relative, everything else as it stands."""

    def same(a: str, b: str) -> bool:
        with contextlib.suppress(ValueError):
            return a == b or math.isclose(float(a), float(b), rel_tol=1e-9)
        return False

    tables = [list(csv.reader(io.StringIO(os.fsdecode(text), newline=""))) for text in (found, expected)]
    return [len(row) for row in tables[0]] == [len(row) for row in tables[1]] and all(
        same(a, b) for rows in zip(*tables, strict=True) for a, b in zip(*rows, strict=True)
    )


def answers(detector: Path) -> bytes:
    """Scores of a detector that was read from disk, for images of which it knows nothing."""
    import torch

    from traj_ood.data.preprocessing import Normalised
    from traj_ood.detector import Detector

    images = torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(5))
    return Detector.load(detector, device="cpu").score(Normalised(images)).numpy().tobytes()


# ---------------------------------------------------------------------- kill


def kill(place: Place, moments: int, seed: int, images: int = 20_000) -> dict[str, Any]:
    """Both commands; ``images`` are judged by ``score``."""
    return {
        "bench": _kill_all(place, _BenchTrial(place), moments, seed),
        "score": {"images": images, **_kill_all(place, _ScoreTrial(place, images), moments, seed)},
    }


class _BenchTrial:
    """One benchmark run, from nothing to whole; :class:`_ScoreTrial` is the same for ``score``.

    ``amount`` is what is kept so far: parts here, bytes there.
    """

    def __init__(self, place: Place) -> None:
        self._place, self._whole = place, {}  # type: ignore[var-annotated]

    def words(self, out: Path, again: bool) -> list[object]:
        return self._place.bench(out)

    def amount(self, out: Path) -> int:
        return sum(path.suffix == ".safetensors" for path in files_below(out / RUN / "parts"))

    def keep(self, out: Path) -> None:
        """What ``out`` holds now is what every other run must come to."""
        self._whole = contents(out / RUN)

    def check_killed(self, out: Path) -> str:
        """What a killed run left; every file of a final name is whole."""
        run = out / RUN
        for name in FINAL:
            if (run / name).exists():
                expect((run / name).read_bytes() == self._whole[name], f"{name} is there, but not whole")
        if (run / FILE_NAME).exists():
            Result.load(run / FILE_NAME)
            expect(contents(run) == self._whole, f"{FILE_NAME} is there, but not everything that it vouches for")
            return "finished"
        parts = self.amount(out)
        return f"{parts} parts" if parts else "nothing"

    def check_whole(self, out: Path) -> None:
        Result.load(out / RUN / FILE_NAME)
        for name, found in contents(out / RUN).items():
            expect(found == self._whole[name], f"{name} differs from the undisturbed run's")
        expect(not (out / RUN / "parts").exists(), "parts are left")


class _ScoreTrial:
    def __init__(self, place: Place, images: int | None = None) -> None:
        self._place, self._images, self._whole = place, images, b""

    def words(self, out: Path, again: bool) -> list[object]:
        more = ["--resume"] if again else []
        if self._images is None:
            return self._place.score(out / "scores.csv", *more)
        return self._place.score_many(out / "scores.csv", self._images, *more)

    def amount(self, out: Path) -> int:
        with contextlib.suppress(FileNotFoundError):
            return (out / "scores.csv.part").stat().st_size
        return 0

    def keep(self, out: Path) -> None:
        self._whole = (out / "scores.csv").read_bytes()

    def check_killed(self, out: Path) -> str:
        final, part = out / "scores.csv", out / "scores.csv.part"
        if final.exists():
            expect(same_rows(final.read_bytes(), self._whole), "scores.csv is there, but not whole")
            return "finished"
        lines = part.read_bytes().splitlines(keepends=True) if part.exists() else []
        lines = [line for line in lines if line.endswith(b"\n")]  # the last may be half a line
        begin = b"".join(self._whole.splitlines(keepends=True)[: len(lines)])
        expect(same_rows(b"".join(lines), begin), "the unfinished file is not the beginning of the whole one")
        return f"{len(lines) - 1} rows" if lines else "nothing"  # one line is the header

    def check_whole(self, out: Path) -> None:
        expect(
            same_rows((out / "scores.csv").read_bytes(), self._whole), "scores.csv differs from the undisturbed run's"
        )
        expect(not (out / "scores.csv.part").exists(), "scores.csv.part is left")


_Trial = _BenchTrial | _ScoreTrial


def _kill_all(place: Place, trial: _Trial, moments: int, seed: int) -> dict[str, Any]:
    out = place.folder / "kill" / "undisturbed"
    before, working, most = _undisturbed(place, trial, out)
    draw = random.Random(seed)
    early = -(-moments // 4)
    left: list[str] = []
    too_late = 0
    while len(left) < moments:
        number = len(left)
        out = place.folder / "kill" / f"{trial.words(Path(), False)[0]}-{number}"
        command = place.run(*trial.words(out, False))
        if number < early:
            time.sleep(before * (number + draw.random()) / early)
        else:  # by what is kept, not by the clock: a busy machine takes its time
            _wait_for(command, trial, out, most * (number - early + draw.random()) / (moments - early))
            time.sleep(0.01 * draw.random())
        if command.running():
            command.kill()
            left.append(trial.check_killed(out))
            place.run(*trial.words(out, True)).must_end(0)
        else:  # nothing was killed
            command.must_end(0)
            too_late, most = too_late + 1, int(0.9 * most)
        trial.check_whole(out)
        shutil.rmtree(out)
    resumed = sum(text not in ("nothing", "finished") for text in left)
    expect(2 * resumed >= moments - early, f"hardly a run was killed at work: {left}")
    return {
        "moments": moments,
        "identical_after_resuming": len(left),
        "resumed_from_parts_or_rows": resumed,
        "killed_when_there_was": left,
        "ended_before_the_moment": too_late,
        "seconds_before_work": round(before, 2),
        "seconds_of_work": round(working, 2),
    }


def _wait_for(command: Command, trial: _Trial, out: Path, amount: float) -> None:
    """Until so much is kept, something at least."""
    while command.running() and trial.amount(out) < max(amount, 1):
        time.sleep(0.001)


def _undisturbed(place: Place, trial: _Trial, out: Path) -> tuple[float, float, int]:
    """Run once; the seconds until something is kept, from then to the end, and the most that was kept."""
    began = time.perf_counter()
    command = place.run(*trial.words(out, False))
    _wait_for(command, trial, out, 1)
    work, most = time.perf_counter(), 1
    while command.running():
        most = max(most, trial.amount(out))
        time.sleep(0.001)
    command.must_end(0)
    ended = time.perf_counter()
    trial.keep(out)
    trial.check_whole(out)
    shutil.rmtree(out)
    return work - began, ended - work, most


# ---------------------------------------------------------------------- disk


class Disk:
    """A tmpfs of its own, whose size and mode can be changed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True)
        _mount("-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder))

    def resize(self, size: int) -> None:
        page = resource.getpagesize()  # rounded down: tmpfs itself rounds up
        _mount("-o", f"remount,rw,size={max(size // page, 1) * page}", str(self.folder))

    def make_read_only(self) -> None:
        _mount("-o", "remount,ro", str(self.folder))

    def used(self) -> int:
        facts = os.statvfs(self.folder)
        return (facts.f_blocks - facts.f_bfree) * facts.f_frsize

    def close(self) -> None:
        subprocess.run(["umount", str(self.folder)], check=False, capture_output=True)


def _mount(*words: str) -> None:
    done = subprocess.run(["mount", *words], capture_output=True, text=True)
    if done.returncode:
        raise PermissionError(done.stderr.strip())


def disk(place: Place, shares: Sequence[float]) -> dict[str, Any]:
    """``shares``: of the space that a command needs, which it gets."""
    folder = place.folder / "disk"
    try:
        file_system = Disk(folder)
    except (PermissionError, FileNotFoundError) as error:
        return {"tmpfs": f"not possible here: {error}", "file_limit": limited_files(place)}
    try:
        return {"full": _full(place, file_system, shares), "read_only": _read_only(place, file_system)}
    finally:
        file_system.close()


def _full(place: Place, file_system: Disk, shares: Sequence[float]) -> list[str]:
    """Too little space at several stages of each command; the errors."""
    out, errors = file_system.folder, []
    trials: list[_Trial] = [_BenchTrial(place), _ScoreTrial(place)]
    for trial in trials:
        whole = out / "whole"
        place.run(*trial.words(whole, False)).must_end(0)
        trial.keep(whole)
        needed = file_system.used()
        shutil.rmtree(whole)
        for share in shares:
            file_system.resize(file_system.used() + int(share * needed))
            command = place.run(*trial.words(out / "run", False))
            errors.append(command.must_be_refused("No space left on device"))
            trial.check_killed(out / "run")
            file_system.resize(2**26)
            place.run(*trial.words(out / "run", (out / "run" / "scores.csv.part").exists())).must_end(0)
            trial.check_whole(out / "run")
            shutil.rmtree(out / "run")
    return errors + _full_while_replacing(place, file_system)


def _full_while_replacing(place: Place, file_system: Disk) -> list[str]:
    """A detector that is to be replaced is there afterwards, when the new one finds no space."""
    detector = file_system.folder / "detector"
    place.run(*place.fit(detector)).must_end(0)
    before = answers(detector)
    errors = []
    for space in (0, 8192, 16384):
        file_system.resize(file_system.used() + space)
        command = place.run(*place.fit(detector, "--overwrite", "--seed", 1))
        errors.append(command.must_be_refused("No space left on device"))
        expect(answers(detector) == before, "the detector that was to be replaced has changed")
        left = {*os.listdir(file_system.folder)} - {"detector.parts"}  # finished batches, with which it continues
        expect(left == {"detector"}, f"left behind: {left}")
        file_system.resize(2**26)
    shutil.rmtree(detector)
    return errors


def _read_only(place: Place, file_system: Disk) -> list[str]:
    """Finished results can be read, unfinished ones are as they were; and go on when writing is allowed."""
    out, errors = file_system.folder, []
    place.run(*place.bench(out / "done")).must_end(0)
    finished = contents(out / "done" / RUN)
    (out / "half").mkdir()
    place.run(*place.fit(out / "detector")).must_end(0)
    before = answers(out / "detector")
    file_system.make_read_only()
    for words in (
        place.bench(out / "half"),
        place.bench(out / "done", "--fresh"),
        place.score(out / "half" / "scores.csv"),
        place.score(out / "half" / "scores.parquet"),
        place.fit(out / "new"),
        place.fit(out / "detector", "--overwrite"),
    ):
        errors.append(place.run(*words).must_be_refused("Read-only file system"))
    place.run(*place.bench(out / "done")).must_end(0)  # a finished run is shown
    expect(contents(out / "done" / RUN) == finished, "a finished run has changed")
    expect(answers(out / "detector") == before, "a detector has changed")
    file_system.resize(2**26)
    place.run(*place.bench(out / "half")).must_end(0)
    expect(contents(out / "half" / RUN) == finished, "the run after the read-only one differs")
    return errors


def limited_files(place: Place) -> list[str]:
    """Where nothing can be mounted: no file may be longer than the limit, which looks like a full disk to a program."""
    errors = []
    trials: list[_Trial] = [_BenchTrial(place), _ScoreTrial(place)]
    for trial in trials:
        out = place.folder / "limited"
        place.run(*trial.words(out, False)).must_end(0)
        trial.keep(out)
        shutil.rmtree(out)
        errors.append(place.run(*trial.words(out, False), file_limit=2048).must_be_refused("File too large"))
        trial.check_killed(out)
        place.run(*trial.words(out, (out / "scores.csv.part").exists())).must_end(0)
        trial.check_whole(out)
        shutil.rmtree(out)
    return errors


# ---------------------------------------------------------------------- corrupt


def corrupt(place: Place, cases: int, seed: int) -> dict[str, Any]:
    record: dict[str, Any] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of attractors of random weights, and Pillow's of what is damaged
        for subject in corruptions.subjects(place.folder / "corrupt"):
            record[subject.name] = corruptions.run_cases(subject, cases, seed).record()
    record["score of damaged images"] = score_damaged(place, cases, seed)
    record["sources that could run a file's code"] = unsafe_sources()
    bad = {name: found["findings"] for name, found in record.items() if isinstance(found, dict) and found["findings"]}
    expect(not bad, json.dumps(bad, indent=2))
    expect(not record["sources that could run a file's code"], str(record["sources that could run a file's code"]))
    return record


def score_damaged(place: Place, cases: int, seed: int) -> dict[str, Any]:
    """``score`` on a folder of damaged images: a row each, exit code 3, and whole images score as they do alone."""
    folder, whole = place.folder / "damaged", place.folder / "corrupt-pictures"
    corruptions.write_pictures(whole)
    pictures = sorted(whole.iterdir())
    for case in range(cases):
        draw = random.Random(f"{seed}/{case}")
        one = folder / f"{case:05d}"
        one.mkdir(parents=True)
        shutil.copy(draw.choice(pictures), one)
        corruptions.damage(one, ("",), draw)
    out = place.folder / "damaged.csv"
    command = place.run("score", place.folder / "detector", folder, whole, "--out", out, "--device", "cpu", "--quiet")
    command.must_end(3)
    with open(out, newline="", errors="surrogateescape") as file:
        rows = list(csv.DictReader(file))
    failed = [row for row in rows if row["status"] == "error"]
    bad = [r for r in rows if bool(r["error"]) != (r["status"] == "error") or bool(r["score"]) == bool(r["error"])]
    bad += [row for row in failed if "\n" in row["error"] or "Traceback" in row["error"]]
    expected = [row for row in rows if row["path"].startswith(str(whole)) and row["status"] == "error"]
    return {
        "cases": cases,
        "rows": len(rows),
        "errors": len(failed),
        "findings": [str(row) for row in [*bad, *expected]],
    }


UNSAFE = re.compile(
    r"pickle\.load|import pickle|joblib|dill|yaml\.(unsafe_|full_)?load\(|torch\.load\(|(?<![\w.])(eval|exec)\("
    r"|os\.system|shell=True|allow_pickle=True|trust_remote_code=True"
)
_SAFE = re.compile(r"weights_only=True|Loader=_StrictLoader\)")


def unsafe_sources() -> list[str]:
    """Lines of the package that could run what a file says."""
    package = Path(__file__).parents[1] / "traj_ood"
    found = []
    for path in sorted(package.rglob("*.py")):
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            if UNSAFE.search(line) and not _SAFE.search(line) and not line.lstrip().startswith("#"):
                found.append(f"{path.relative_to(package)}:{number}: {line.strip()}")
    return found


# ---------------------------------------------------------------------- together


def together(place: Place, rounds: int, seed: int) -> dict[str, Any]:
    """Each command twice at once, the second up to the whole duration later."""
    folder = place.folder / "together"
    draw = random.Random(seed)
    trials: list[_Trial] = [_BenchTrial(place), _ScoreTrial(place)]
    record: dict[str, Any] = {}
    for trial in trials:
        before, working, _ = _undisturbed(place, trial, folder / "undisturbed")
        ends = []
        for number in range(rounds):
            out = folder / f"{number}"
            ends.append(_two(place, [trial.words(out, False)] * 2, draw.random() * (before * (number % 2) + working)))
            trial.check_whole(out)
            shutil.rmtree(out)
        record[str(trial.words(Path(), False)[0])] = ends
    record["bench --fresh of other settings"] = _fresh_beside(place, folder, draw, rounds)
    record["fit"] = []
    expected = answers(place.folder / "detector")
    for number in range(rounds):
        out = folder / f"detector-{number}"
        record["fit"].append(_two(place, [place.fit(out)] * 2, 0.0))
        expect(answers(out) == expected, "the detector that two processes made differs")
        hidden = [name for name in os.listdir(folder) if name.startswith(".")]
        expect(not hidden, f"left behind: {hidden}")
    return record


def _two(place: Place, words: Sequence[Sequence[object]], delay: float) -> list[str]:
    """How two commands ended: ``ok``, or the error of the one that refused."""
    first = place.run(*words[0])
    time.sleep(delay)
    commands = [first, place.run(*words[1])]
    codes = [command.wait() for command in commands]
    expect(0 in codes, f"none of two was finished: {[c.errors()[-3:] for c in commands]}")
    return ["ok" if not code else command.must_be_refused() for code, command in zip(codes, commands, strict=True)]


def _fresh_beside(place: Place, folder: Path, draw: random.Random, rounds: int) -> list[list[str]]:
    """A run with other settings that discards what is there, beside one that is at work: never a mixture of both."""
    expected = []
    settings: list[list[object]] = [[], ["--fresh", "--tol", 1e-3]]
    for more in settings:
        place.run(*place.bench(folder / "alone", *more)).must_end(0)
        expected.append(contents(folder / "alone" / RUN))
        shutil.rmtree(folder / "alone")
    ends = []
    for _ in range(rounds):
        out = folder / "fresh"
        first = place.run(*place.bench(out))
        while first.running() and not (out / RUN / "parts").exists():
            time.sleep(0.001)
        time.sleep(0.2 * draw.random())
        second = place.run(*place.bench(out, *settings[1]))
        codes = [first.wait(), second.wait()]
        expect(0 in codes, f"none of two was finished: {first.errors()[-3:]}, {second.errors()[-3:]}")
        both = zip(codes, (first, second), strict=True)
        ends.append(["ok" if not code else command.must_be_refused() for code, command in both])
        expect(contents(out / RUN) == expected[codes[1] == 0], "a mixture of two runs")
        shutil.rmtree(out)
    return ends


# ---------------------------------------------------------------------- soak


def soak(place: Place, images: int, seconds_between: float = 1.0) -> dict[str, Any]:
    """``images`` paths through standard input; the process's resident memory while they are judged."""
    pool = sorted((place.folder / "pool").iterdir())
    out = place.folder / "soak.csv"
    words = ["score", place.folder / "detector", "-", "--out", out, "--device", "cpu", "--quiet", "--threads", 1]
    command = Command(*words, log=place.folder / "logs" / "soak.txt")  # a process of its own has a memory of its own
    threading.Thread(target=_feed, args=(command, pool, images), daemon=True).start()
    began, first, samples = time.perf_counter(), None, []
    part = out.with_name(out.name + ".part")
    while command.running():
        written = part.stat().st_size if part.exists() else 0
        if written:
            first = first or time.perf_counter()
            samples.append((time.perf_counter() - began, _resident(command.pid), written))
        time.sleep(seconds_between)
    ended = time.perf_counter()
    command.must_end(0)
    count, distinct = _rows_by_path(out)
    expect(count == images, f"{count} rows for {images} images")
    expect(distinct == min(len(pool), images), f"{distinct} different rows for {len(pool)} different images")
    seconds = ended - (first or began)
    return {
        "images": images,
        "seconds_of_work": round(seconds, 1),
        "images_per_second": round(images / seconds, 1),
        **_growth(samples, out.stat().st_size / images),
    }


def _feed(command: Command, pool: Sequence[Path], images: int) -> None:
    with contextlib.suppress(OSError):
        for k in range(images):
            command.stdin.write(os.fsencode(pool[k % len(pool)]) + b"\n")
        command.stdin.close()


def _resident(pid: int) -> int:
    """Bytes; Linux only."""
    with contextlib.suppress(OSError, IndexError):
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize()
    return 0


def _rows_by_path(out: Path) -> tuple[int, int]:
    """All rows, and the different ones: as many as different images, however they were batched."""
    with open(out, "rb") as file:
        next(file)
        rows = [line for line in file]
    return len(rows), len(set(rows))


def _growth(samples: Sequence[tuple[float, int, int]], bytes_per_row: float) -> dict[str, Any]:
    """Least squares over the samples after the first fifth, which warms up: allocators, caches, threads."""
    import numpy as np

    known = np.array([s for s in samples if s[1]], dtype=float)
    steady = known[len(known) // 5 :]
    if len(steady) < 3:
        return {"samples": len(known)}
    judged, memory = steady[:, 2] / bytes_per_row, steady[:, 1]
    slope = np.polyfit(judged, memory, 1)[0] if np.ptp(judged) else 0.0
    return {
        "samples": len(known),
        "resident_mib_first": round(float(steady[0, 1]) / 2**20, 1),
        "resident_mib_last": round(float(steady[-1, 1]) / 2**20, 1),
        "resident_mib_most": round(float(known[:, 1].max()) / 2**20, 1),
        "bytes_per_image_after_warm_up": round(float(slope), 1),
    }


# ---------------------------------------------------------------------- all of it


@contextlib.contextmanager
def temporary_place(parent: Path | None) -> Iterator[Place]:
    with tempfile.TemporaryDirectory(prefix="reliability-", dir=parent) as folder:
        yield Place(Path(folder))


def _command(arguments: argparse.Namespace) -> str:
    """What decides the numbers, without the folders of this machine."""
    texts = [
        f"--{key} {' '.join(map(str, value)) if isinstance(value, list) else value}"
        for key, value in vars(arguments).items()
        if key not in ("out", "place")
    ]
    return " ".join(["python benchmarks/reliability.py", *texts])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--moments", type=int, default=20, help="at which bench and score are killed, each")
    parser.add_argument("--cases", type=int, default=200, help="of damage to each kind of file")
    parser.add_argument("--rounds", type=int, default=4, help="of two processes at once, for each command")
    parser.add_argument("--images", type=int, default=50_000, help="of the soak")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--place", type=Path, help="folder for temporary files; default: the system's")
    parser.add_argument("--out", type=Path, default=Path("results/benchmarks/reliability.json"))
    arguments = parser.parse_args()
    faulthandler.enable()
    seed = arguments.seed
    parts: dict[str, Callable[[Place], dict[str, Any]]] = {
        "kill": lambda place: kill(place, arguments.moments, seed),
        "disk": lambda place: disk(place, (0.02, 0.3, 0.6, 0.9)),
        "corrupt": lambda place: corrupt(place, arguments.cases, seed),
        "together": lambda place: together(place, arguments.rounds, seed),
        "soak": lambda place: soak(place, arguments.images),
    }
    record = json.loads(arguments.out.read_text()) if arguments.out.is_file() else {}
    commit = git_commit(Path(__file__).parent)  # before the record is written, which may be part of it
    for name in arguments.part:
        began = time.perf_counter()
        with temporary_place(arguments.place) as place:
            # Errors name places that nobody else has.
            found = json.loads(json.dumps(parts[name](place)).replace(str(place.folder), "PLACE"))
        longer = name == "soak" and arguments.images != parser.get_default("images")
        record[f"soak_{arguments.images}" if longer else name] = {
            **found,
            "seconds": round(time.perf_counter() - began, 1),
            "command": _command(arguments),
            "commit": commit,
            "versions": environment(),
        }
        write_atomic(arguments.out, (json.dumps(record, indent=2, sort_keys=True) + "\n").encode())
        print(json.dumps({name: found}, indent=2), flush=True)


if __name__ == "__main__":
    main()
