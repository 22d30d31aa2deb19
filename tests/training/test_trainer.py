"""The training loop itself, against a plain loop of torch; what it keeps, and what it refuses."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn

from traj_ood.errors import TrajOODError
from traj_ood.training.config import Recipe
from traj_ood.training.loop import Trainer, shuffled

STEPS, ROUND = 12, 5
RECIPE = Recipe(batch_size=8, learning_rate=0.05, weight_decay=0.1, clip=0.5, warmup=0.25)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Dropout(0.2), nn.Linear(16, 3))


class Denoiser(Trainer):
    """Learns to remove noise from points of a plane."""

    scale = 1.0

    def losses(self, steps: int, draws: torch.Generator) -> Iterator[Tensor]:
        for _ in range(steps):
            points = torch.randn(self.recipe.batch_size, 3, generator=draws)
            noisy = points + 0.1 * torch.randn(points.shape, generator=draws)
            yield self.scale * (self.module(noisy) - points).square().mean()

    def check(self) -> dict[str, float]:
        return {"norm": float(sum(p.detach().norm() for p in self.parameters))}


def trainer(out: Path | None = None, recipe: Recipe = RECIPE, **options: Any) -> Denoiser:
    return Denoiser("denoiser", network(), recipe, steps=STEPS, round_steps=ROUND, seed=7, out=out, **options)


def weights(run: Trainer) -> list[Tensor]:
    return [p.detach().clone() for p in run.parameters]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_weights_are_those_of_a_plain_loop(precision: Any) -> None:
    run, plain = trainer(recipe=replace(RECIPE, precision=precision)), network().train()
    run.run()
    matrices, biases = ([p for p in plain.parameters() if p.ndim == n] for n in (2, 1))
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": biases, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    for step in range(STEPS):
        if step % ROUND == 0:
            draws = torch.Generator().manual_seed(7 + step // ROUND)
            torch.manual_seed(7 + step // ROUND)
        points = torch.randn(8, 3, generator=draws)
        noisy = points + 0.1 * torch.randn(8, 3, generator=draws)
        warming, falling = (step + 1) / 3, (1 + math.cos(math.pi * (step - 3) / 9)) / 2
        for group in optimizer.param_groups:
            group["lr"] = 0.05 * (warming if step < 3 else falling)
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            loss = (plain(noisy) - points).square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        optimizer.step()
    for found, expected in zip(run.parameters, plain.parameters(), strict=True):
        torch.testing.assert_close(found.detach(), expected.detach(), rtol=1e-5, atol=1e-6)
        assert not found.requires_grad
    assert [line["step"] for line in run.log] == [5, 10, 12]
    assert run.log[-1]["norm"] == pytest.approx(float(sum(p.detach().norm() for p in plain.parameters())), rel=1e-5)
    assert not run.module.training


def test_the_callers_random_numbers_are_the_callers() -> None:
    run = trainer()
    before = torch.get_rng_state()
    run.run()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("rounds", [0, 1, 2])
def test_an_interrupted_run_ends_with_the_same_weights_and_log(tmp_path: Path, rounds: int) -> None:
    def keep(run: Trainer) -> None:
        run.keep(str(len(run.log)))

    whole = trainer(on_round=keep)
    whole.run()
    with pytest.MonkeyPatch.context() as patch:
        tiny.interrupt_training(patch, rounds)
        with pytest.raises(KeyboardInterrupt):
            trainer(tmp_path, on_round=keep).run()
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == rounds
    resumed = trainer(tmp_path, on_round=keep)
    resumed.run()
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(resumed), strict=True))
    assert [line["loss"] for line in resumed.log] == [line["loss"] for line in whole.log]
    assert list(resumed.kept) == ["1", "2", "3"]
    for name, kept in whole.kept.items():
        assert all(torch.equal(kept[key], resumed.kept[name][key]) for key in kept)
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == resumed.log


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    trainer(tmp_path, identity={"data": "a", "seed": 1}).run()
    other = trainer(tmp_path, identity={"data": "b", "seed": 1})
    with pytest.raises(TrajOODError, match=r"checkpoint of a run with another data: choose another folder"):
        other.run()
    other.run(fresh=True)
    trainer(tmp_path, identity={"data": "b", "seed": 1}).run()


def test_the_record_is_written_last_and_the_checkpoint_removed(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    run.run()
    assert (tmp_path / "checkpoint.pt").is_file()
    run.write_record({"name": "d", **run.record()}, "# d\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "log.jsonl", "training.json"]
    record = json.loads((tmp_path / "training.json").read_text())
    assert record["log"] == run.log
    assert record["seconds"] == pytest.approx(sum(line["seconds"] for line in run.log), abs=0.06)
    assert record["versions"]["torch"]


def test_the_record_of_an_earlier_training_goes_before_another_model_is_written(tmp_path: Path) -> None:
    (tmp_path / "training.json").write_text("{}")
    run = trainer(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        tiny.interrupt_training(patch, 1)
        with pytest.raises(KeyboardInterrupt):
            run.run(fresh=True)
    assert (tmp_path / "training.json").is_file()  # and the model of that training, as it was
    trainer(tmp_path).run()
    assert not (tmp_path / "training.json").exists()


def test_a_log_that_a_kill_left_behind_its_checkpoint_is_completed(tmp_path: Path) -> None:
    trainer(tmp_path).run()
    whole = (tmp_path / "log.jsonl").read_text()
    (tmp_path / "log.jsonl").write_text("".join(whole.splitlines(keepends=True)[:1]))
    trainer(tmp_path).run()
    assert (tmp_path / "log.jsonl").read_text() == whole


def test_a_loss_or_weights_that_are_not_finite_are_refused() -> None:
    run = trainer()
    run.scale = math.nan
    with pytest.raises(TrajOODError, match="denoiser: the loss is nan in step 0 of 12: lower the learning rate"):
        run.run()
    # A step overflows the two matrices, which it multiplies by 1 − learning_rate · weight_decay; biases do not decay.
    steep = Recipe(batch_size=8, learning_rate=1e30, weight_decay=1e30, schedule="constant", warmup=0.0)
    run = Denoiser("denoiser", network(), steep, steps=1, round_steps=1, seed=0)
    with pytest.raises(TrajOODError, match=r"finite weights after step 1 of 1, got NaN or infinity in 2 of 4 param"):
        run.run()
    assert run.log == []


def test_batches_are_whole_passes_in_random_order() -> None:
    rows = torch.arange(10, 20)
    batches = shuffled(rows, 4, 6, torch.Generator().manual_seed(0))
    assert [len(batch) for batch in batches] == [4] * 6
    order = torch.cat(batches)
    assert order[:10].sort().values.tolist() == order[10:20].sort().values.tolist() == rows.tolist()
    assert order[:10].tolist() != order[10:20].tolist()
