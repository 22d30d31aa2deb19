"""Trainer, the training loop of all models: an interrupted run resumes and ends with the same weights."""

from __future__ import annotations

import json
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from traj_ood.dynamics.device import training_settings
from traj_ood.errors import TrajOODError
from traj_ood.io.checkpoints import open_checkpoint, write_checkpoint
from traj_ood.io.files import write_atomic
from traj_ood.io.provenance import code_digest, environment, git_commit
from traj_ood.io.trees import write_json
from traj_ood.text import printable
from traj_ood.training.config import Recipe

RECORD = "training.json"
"""File name of the record of a finished training."""
SEED_STRIDE = 1_000_003
"""Distance between the round seeds of two consecutive seeds, and hence the maximum number of rounds."""
CHECKPOINT_SECONDS = 10.0
"""Minimum time between two checkpoints, since a short round takes less time than writing its checkpoint."""
_CHECKPOINT = "checkpoint.pt"


class Trainer(ABC):
    """A training run in rounds of optimizer steps, with a log line and possibly a checkpoint after each round.

    A round is an epoch, or the steps between two checks. Subclasses implement :meth:`losses`, and may override
    :meth:`rate`, :meth:`check` and :attr:`finished`. Each round has its own random seed, so a run that resumes from a
    checkpoint ends with the same weights as an uninterrupted one. The caller's random state is not changed.

    Args:
        title: title of the run in messages and the progress bar.
        module: the network, on the device where it trains; afterwards in evaluation mode and without gradients.
        recipe: optimizer, learning rate, weight decay, clipping and schedule; other fields are for subclasses. Biases,
            norms, class and mask tokens do not decay.
        steps: maximum number of optimizer steps.
        round_steps: steps per round; the last round may be shorter.
        seed: seed of the first round; each later round has the next number.
        out: folder of ``checkpoint.pt`` and ``log.jsonl``. Default: nothing is written.
        identity: plain data that identify the run; a checkpoint with another identity is refused. The digest of the
            code is added.
        parameters: the parameters to train. Default: all of the module's.
        on_round: called with the trainer after each new log line, before the checkpoint.
        quiet: whether to show no progress bar.
    Attributes:
        log: one line per finished round: ``step`` (steps made so far), mean ``loss``, ``learning_rate`` of the last
            step, ``seconds``, and the result of :meth:`check`.
        kept: weights that :meth:`keep` has copied, by name; part of the checkpoint.
    """

    def __init__(
        self,
        title: str,
        module: nn.Module,
        recipe: Recipe,
        *,
        steps: int,
        round_steps: int,
        seed: int,
        out: str | Path | None = None,
        identity: Mapping[str, Any] | None = None,
        parameters: Iterable[nn.Parameter] | None = None,
        on_round: Callable[[Trainer], object] | None = None,
        quiet: bool = True,
    ) -> None:
        self.title, self.module, self.recipe, self.quiet = title, module, recipe, quiet
        self.out = None if out is None else Path(out)
        self.parameters = list(module.parameters() if parameters is None else parameters)
        self.steps, self.round_steps, self._seed, self._on_round = steps, round_steps, seed, on_round
        self._identity = {**(identity or {}), "code": code_digest()}
        self.log: list[dict[str, float]] = []
        self.kept: dict[str, dict[str, Tensor]] = {}
        self._saved = time.monotonic()
        groups: list[dict[str, Any]] = [
            {"params": [p for p in self.parameters if p.squeeze().ndim > 1], "weight_decay": recipe.weight_decay},
            {"params": [p for p in self.parameters if p.squeeze().ndim <= 1], "weight_decay": 0.0},
        ]
        self.optimizer: torch.optim.Optimizer = (
            torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.95))
            if recipe.optimizer == "adamw"
            else torch.optim.Adam(groups, lr=recipe.learning_rate)
        )

    # ------------------------------------------------------------------ for subclasses

    @abstractmethod
    def losses(self, steps: int, draws: torch.Generator) -> Iterator[Tensor]:
        """Yield the scalar losses of ``steps`` batches, one at a time; all randomness comes from ``draws``."""

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        return learning_rate(self.recipe, step, self.steps)

    def check(self) -> dict[str, float]:
        """Further entries for the log line of the round that has just ended. Default: none."""
        return {}

    @property
    def finished(self) -> bool:
        return self.step >= self.steps

    # ------------------------------------------------------------------ state and checkpoint

    @property
    def step(self) -> int:
        """Number of steps made in finished rounds."""
        return int(self.log[-1]["step"]) if self.log else 0

    @property
    def device(self) -> torch.device:
        return self.parameters[0].device

    def keep(self, name: str) -> None:
        """Copy the current weights to :attr:`kept`."""
        self.kept[name] = {key: value.detach().clone() for key, value in self.module.state_dict().items()}

    def save(self) -> None:
        """Write checkpoint and log."""
        if self.out is None:
            return
        state = {"identity": self._identity, "log": self.log, "kept": self.kept}
        state |= {"model": self.module.state_dict(), "optimizer": self.optimizer.state_dict()}
        write_checkpoint(self.out / _CHECKPOINT, state)
        write_atomic(self.out / "log.jsonl", "".join(json.dumps(line) + "\n" for line in self.log).encode())
        self._saved = time.monotonic()

    def resume(self) -> None:
        """Restore the state from the checkpoint, if there is one.

        Raises:
            TrajOODError: the checkpoint is damaged, or of another run.
        """
        if self.out is None or not (self.out / _CHECKPOINT).is_file():
            return
        path = self.out / _CHECKPOINT
        with open_checkpoint(path, self.device, "delete it, or start over with --fresh (fresh=True)") as state:
            different = [key for key, value in self._identity.items() if state["identity"].get(key) != value]
            if different:
                raise TrajOODError(
                    f"{path}: checkpoint of a run with another {', '.join(different)}: choose another folder (--out), "
                    "or start over with --fresh (fresh=True)"
                )
            self.module.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.log, self.kept = state["log"], state["kept"]

    # ------------------------------------------------------------------ training

    @training_settings()
    def run(self, fresh: bool = False) -> None:
        """Train until :attr:`finished`, from the checkpoint if there is one.

        Args:
            fresh: ignore the checkpoint.
        Raises:
            TrajOODError: an unwritable folder, a checkpoint that is damaged or of another run, or a loss or weights
                that are not finite.
        """
        if not fresh:
            self.resume()
        self.save()  # fails now, before hours of work, if the folder is not writable
        try:
            with tqdm(
                total=self.steps,
                initial=self.step,
                desc=printable(self.title),
                unit="step",
                delay=2,
                disable=self.quiet,
                dynamic_ncols=True,
            ) as bar:
                while not self.finished:
                    self.train_round(bar)
        finally:
            self.module.eval().requires_grad_(False)
        if self.out is not None:  # the record of an earlier training does not describe the model that is written next
            (self.out / RECORD).unlink(missing_ok=True)

    def train_round(self, bar: tqdm[Any]) -> None:
        """Run the next round: ``round_steps`` steps (the last round may be shorter), then :meth:`check`."""
        began, seed, before, total = time.perf_counter(), self._seed + len(self.log), self.step, 0.0
        draws = torch.Generator().manual_seed(seed)
        with seeded(seed, self.device):  # for dropout
            self.module.train()
            for p in self.parameters:
                p.requires_grad_(True)
            losses = self._in_precision(self.losses(min(self.round_steps, self.steps - before), draws))
            for done, loss in enumerate(losses, start=1):
                total += self._descend(loss, before + done - 1)
                bar.set_postfix(loss=f"{total / done:.4f}", refresh=False)
                bar.update()
        self.module.eval()
        self._check_weights(before + done)
        line = {"step": before + done, "loss": total / done, "learning_rate": self.optimizer.param_groups[0]["lr"]}
        self.log.append(line | self.check() | {"seconds": round(time.perf_counter() - began, 2)})
        if self._on_round is not None:
            self._on_round(self)
        if self.finished or time.monotonic() - self._saved >= CHECKPOINT_SECONDS:
            self.save()

    def _in_precision(self, losses: Iterator[Tensor]) -> Iterator[Tensor]:
        """``losses``, each computed in the recipe's precision; between them, where the optimizer steps, autocast is
        closed."""
        low = self.recipe.precision == "bfloat16"
        while True:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=low):
                loss = next(losses, None)
            if loss is None:
                return
            yield loss

    def _descend(self, loss: Tensor, step: int) -> float:
        """Make one optimizer step on ``loss``, and return its value."""
        if not bool(loss.isfinite()):
            raise TrajOODError(
                f"{self.title}: the loss is {loss.item()} in step {step} of {self.steps}: lower the learning rate"
            )
        rate = self.rate(step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, self.recipe.clip)
        self.optimizer.step()
        return loss.item()

    def _check_weights(self, step: int) -> None:
        lost = sum(not bool(p.isfinite().all()) for p in self.parameters)
        if lost:
            raise TrajOODError(
                f"{self.title}: expected finite weights after step {step} of {self.steps}, got NaN or infinity in "
                f"{lost} of {len(self.parameters)} parameters: lower the learning rate"
            )

    # ------------------------------------------------------------------ record

    def record(self) -> dict[str, Any]:
        """The part of the record that all trainings share: log, seconds, commit and versions of libraries."""
        return {
            "log": self.log,
            "seconds": round(sum(line["seconds"] for line in self.log), 1),
            "commit": git_commit(),
            "versions": environment(),
        }

    def write_record(self, record: Mapping[str, Any], card: str) -> None:
        """Write README.md and ``training.json``, and remove the checkpoint.

        The record is written after all other files, so its presence shows that the training is complete.
        """
        if self.out is not None:
            write_atomic(self.out / "README.md", card.encode())
            write_json(self.out / RECORD, record, sort_keys=True)
            (self.out / _CHECKPOINT).unlink(missing_ok=True)


@contextmanager
def seeded(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """Context in which torch draws from ``seed``, on the CPU and on ``device``; the caller's random state comes back at
    the end."""
    with torch.random.fork_rng(devices=[device] if device is not None and device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def check_folder(out: Path, fresh: bool) -> None:
    """Check, before anything is computed, that ``out`` is new, empty or of an unfinished training (with ``fresh``, of
    any training), because files of other origin, such as a README.md, or hours of training would be replaced.

    Raises:
        TrajOODError: the folder holds other files, or a finished training.
    """
    names = sorted(path.name for path in out.iterdir()) if out.is_dir() else []
    strangers = [name for name in names if not name.startswith(".")]
    if strangers and not {RECORD, _CHECKPOINT} & {*names}:
        raise TrajOODError(
            f"{out}: expected a new or empty folder, or one with {_CHECKPOINT} or {RECORD} of an earlier training, "
            f"found {strangers[0]!r}, beside which a model would be written: choose another --out"
        )
    if RECORD in names and _CHECKPOINT not in names and not fresh:
        raise TrajOODError(
            f"{out}: holds a finished training ({RECORD}): choose another --out, or train again with --fresh "
            "(fresh=True)"
        )


def shuffled(rows: Tensor, batch_size: int, steps: int, draws: torch.Generator) -> tuple[Tensor, ...]:
    """``steps`` batches from ``rows`` (N,), in as many randomly ordered passes as needed, of which the last is cut."""
    count = steps * batch_size
    passes = [rows[torch.randperm(len(rows), generator=draws)] for _ in range(-(-count // len(rows)))]
    return torch.cat(passes)[:count].split(batch_size)


def learning_rate(recipe: Recipe, step: int, steps: int) -> float:
    """The learning rate of a step (from 0): linear warm-up, then the recipe's schedule down to 0, or constant."""
    warmup = max(1, round(recipe.warmup * steps))
    if step < warmup:
        return recipe.learning_rate * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    factor = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}
    return recipe.learning_rate * factor[recipe.schedule]
