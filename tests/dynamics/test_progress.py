"""The progress bar of steps, on a clock of its own."""

from __future__ import annotations

import pytest

from traj_ood.dynamics.progress import StepBar


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that tqdm sees."""
    now = [0.0]
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    return now


def test_steps_are_shown_while_no_image_ends(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    """192 of 500 images end at once, and then none for many steps: the bar must not stand still."""
    with StepBar(500, "fit a\nb") as bar:
        bar.begin(500)
        clock[0] = 10.0
        bar.on_step(100, 500)
        bar.on_step(100, 308)
        for step in range(1, 4):
            clock[0] += 60.0
            bar.on_step(step, 308)
    shown = capsys.readouterr().err.split("\r")
    assert [line for line in shown if "192/500" in line and "step=3" in line]
    assert [line for line in shown if "192/500" in line and "step=2" in line]
    assert all(line.startswith("fit a\\nb: ") for line in shown if "/500" in line)


def test_images_without_steps_are_counted(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with StepBar(10) as bar:
        bar.skip(4)
        bar.begin(6, "far digits")
        clock[0] = 5.0
        bar.finish(6)
        clock[0] = 6.0
        bar.on_step(1, 0)
    assert "far digits: 100%" in capsys.readouterr().err
    with StepBar(10, quiet=True) as bar:
        bar.skip(10)
    assert capsys.readouterr().err == ""
