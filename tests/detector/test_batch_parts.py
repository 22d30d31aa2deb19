"""Fits and calibrations that keep their finished batches, and continue after an interruption."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from traj_ood import Detector
from traj_ood.autoencoders import CallableAutoencoder, Encoding, ViTMAE
from traj_ood.detector.batch_parts import parts_beside, remove_parts
from traj_ood.errors import TrajOODError

TRAIN, HELD_OUT, TEST = (tiny.images(count, seed=count).sigmoid() for count in (30, 32, 7))


class Counted(ViTMAE):
    """Counts the batches that are encoded, and is interrupted before the one numbered ``end``."""

    count, end = 0, 10**9

    def examine(self, images: Tensor) -> Encoding:
        if self.count >= self.end:
            raise KeyboardInterrupt
        self.count += len(images) > 1  # else it is asked what identifies it
        return super().examine(images)


def model(seed: int = 0) -> Counted:
    made = tiny.vit(seed)
    made.__class__ = Counted
    return made  # type: ignore[return-value]


def fit(of: Counted, parts: Path | None, images: Tensor = TRAIN, **options: Any) -> Detector:
    settings: dict[str, Any] = {"tol": 1e-4, "max_steps": 40, "batch_size": 6, **options}
    return Detector.fit(of, images, "trajectory", parts=parts, **settings)


def test_an_interrupted_fit_continues_and_gives_the_same_detector(tmp_path: Path) -> None:
    expected = fit(model(), None)
    broken = model()
    broken.end = 4
    with pytest.raises(KeyboardInterrupt):
        fit(broken, tmp_path)
    kept = len(list(tmp_path.glob("*.safetensors")))
    assert 1 <= kept <= 4
    again = model()
    found = fit(again, tmp_path)
    assert again.count == 5 - kept
    assert found.training == expected.training
    torch.testing.assert_close(found.score(TEST), expected.score(TEST), rtol=1e-9, atol=0)
    # Training images are still recognised: their digests are kept, too.
    with pytest.raises(TrajOODError, match="30 of 30 images are pixel by pixel training images"):
        found.calibrate(TRAIN)


def test_an_interrupted_fit_continues_on_a_machine_that_is_faster_by_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which would choose larger batches."""
    clock, seconds = [0.0], [3.0]  # between two looks at the clock, as around a call of f

    def tick() -> float:
        clock[0] += seconds[0]
        return clock[0]

    monkeypatch.setattr(time, "perf_counter", tick)
    broken = model()
    broken.end = 4
    with pytest.raises(KeyboardInterrupt):
        fit(broken, tmp_path, batch_size=None)
    kept = len(list(tmp_path.glob("*.safetensors")))
    assert 1 <= kept <= 4
    seconds[0] = 0.01
    again = model()
    fit(again, tmp_path, batch_size=None)
    assert again.count == 5 - kept
    remove_parts(tmp_path)
    assert not tmp_path.exists()


def test_an_interrupted_calibration_continues_and_gives_the_same_threshold(tmp_path: Path) -> None:
    expected = fit(model(), None).calibrate(HELD_OUT, 0.9)
    broken = fit(model(), None)
    broken.autoencoder.end = broken.autoencoder.count + 4  # type: ignore[attr-defined]
    with pytest.raises(KeyboardInterrupt):
        broken.calibrate(HELD_OUT, 0.9, parts=tmp_path)
    kept = len(list(tmp_path.glob("*.safetensors")))
    assert 1 <= kept <= 4
    again = fit(model(), None)
    before = again.autoencoder.count  # type: ignore[attr-defined]
    again.calibrate(HELD_OUT, 0.9, parts=tmp_path)
    assert again.autoencoder.count - before == 6 - kept  # type: ignore[attr-defined]
    assert again.calibration is not None
    assert expected.calibration is not None
    assert again.calibration.threshold == pytest.approx(expected.calibration.threshold, rel=1e-9)


@pytest.mark.parametrize("change", ["weights", "tol", "max_steps", "one image"])
def test_parts_of_another_computation_are_not_used(tmp_path: Path, change: str) -> None:
    fit(model(), tmp_path)
    other, images = model(seed=1 if change == "weights" else 0), TRAIN.clone()
    options = {"tol": {"tol": 1e-3}, "max_steps": {"max_steps": 30}}.get(change, {})
    if change == "one image":
        images[8] = images[8].flip(-1)
    found = fit(other, tmp_path, images, **options)
    assert other.count == (1 if change == "one image" else 5)
    expected = fit(model(seed=1 if change == "weights" else 0), None, images, **options)
    torch.testing.assert_close(found.score(TEST), expected.score(TEST), rtol=1e-9, atol=0)


def test_parts_of_another_code_of_the_users_functions_are_not_used(tmp_path: Path) -> None:
    """Also where it answers a fixed picture in the same way."""
    network = tiny.vit()

    def made(limit: float) -> CallableAutoencoder:
        def encode(images: Tensor) -> Tensor:
            dark = images.mean(dim=(1, 2, 3), keepdim=True) < limit
            return network.encode_batch(torch.where(dark, 1 - images, images))

        return CallableAutoencoder(encode, network.decode_batch, (1, 8, 8), module=network.module, chunk=6)

    for limit, kept in ((-9.0, 5), (-9.0, 5), (-8.0, 10)):  # no picture is so dark
        Detector.fit(made(limit), TRAIN, "trajectory", batch_size=6, max_steps=9, parts=tmp_path)
        assert len(list(tmp_path.glob("*.safetensors"))) == kept


def test_a_calibration_of_another_fit_is_not_used(tmp_path: Path) -> None:
    fit(model(), None).calibrate(HELD_OUT, 0.9, parts=tmp_path)
    other = fit(model(), None, TRAIN[:20])
    before = other.autoencoder.count  # type: ignore[attr-defined]
    other.calibrate(HELD_OUT, 0.9, parts=tmp_path)
    assert other.autoencoder.count - before == 6  # type: ignore[attr-defined]


def test_a_damaged_part_is_named(tmp_path: Path) -> None:
    fit(model(), tmp_path)
    part = min(tmp_path.glob("*.safetensors"))
    part.write_bytes(part.read_bytes()[:-3])
    with pytest.raises(TrajOODError, match=rf"{part.name}: .*delete this file to compute it again"):
        fit(model(), tmp_path)


def test_a_fit_that_fails_at_once_leaves_nothing(tmp_path: Path) -> None:
    broken = model()
    broken.end = 0
    with pytest.raises(KeyboardInterrupt):
        fit(broken, tmp_path / "d.parts", batch_size=30)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_record_of_the_batch_size_is_named(tmp_path: Path) -> None:
    fit(model(), tmp_path)
    for content, words in (("{", "delete this folder"), ('{"batch_size": 0}', "expected a whole number of at least 1")):
        (tmp_path / "batch_size.json").write_text(content)
        with pytest.raises(TrajOODError, match=rf"batch_size\.json: .*{words}"):
            fit(model(), tmp_path, batch_size=None)


def test_parts_belong_to_one_process_and_stay_after_an_error(tmp_path: Path) -> None:
    out, folder = tmp_path / "d", tmp_path / "d.parts"
    with parts_beside(out) as parts, parts_beside(out) as others:
        assert (parts, others) == (folder, None)
    assert list(tmp_path.iterdir()) == []
    broken = model()
    broken.end = 4
    with pytest.raises(KeyboardInterrupt), parts_beside(out) as parts:
        fit(broken, parts)
    kept = len(list(folder.glob("*.safetensors")))
    assert kept
    with parts_beside(out) as parts:
        again = model()
        fit(again, parts)
    assert again.count == 5 - kept
    assert list(tmp_path.iterdir()) == []


def test_only_parts_are_removed(tmp_path: Path) -> None:
    folder = tmp_path / "d.parts"
    fit(model(), folder)
    remove_parts(folder)
    assert not folder.exists()
    remove_parts(folder)  # not there
    fit(model(), folder)
    (folder / "mine.safetensors").write_bytes(b"")
    remove_parts(folder)
    assert [path.name for path in folder.iterdir()] == ["mine.safetensors"]
