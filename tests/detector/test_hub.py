"""Detectors on the hub, against a stand-in of huggingface_hub's API: a local folder with what the real one adds."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import tiny
import torch

from traj_ood import Detector
from traj_ood.errors import TrajOODError


class Hub:
    """Repositories as folders; snapshots are links beside a .gitattributes, as in the real cache."""

    def __init__(self, root: Path) -> None:
        self.root, self.calls = root, list[str]()

    def api(self, token: str | None = None) -> Any:
        return SimpleNamespace(create_repo=self.create, upload_folder=self.upload)

    def create(self, name: str, *, private: bool, exist_ok: bool) -> None:
        assert exist_ok
        self.calls.append(f"create {name} private={private}")
        (self.root / name).mkdir(parents=True, exist_ok=True)

    def upload(self, *, repo_id: str, folder_path: Path, delete_patterns: list[str], **_: Any) -> Any:
        assert delete_patterns == ["*"]
        place = self.root / repo_id
        shutil.rmtree(place)
        shutil.copytree(folder_path, place)
        (place / ".gitattributes").write_text("*.safetensors filter=lfs\n")
        (place / "evil.py").write_text("raise SystemExit\n")
        return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/1")

    def snapshot(self, name: str, *, allow_patterns: list[str], **_: Any) -> str:
        if not (self.root / name).is_dir():
            raise OSError(f"404 Client Error: {name}")
        assert "detector.json" in allow_patterns
        copy = self.root / "snapshots" / name
        for file in (f for f in (self.root / name).rglob("*") if f.is_file()):
            link = copy / file.relative_to(self.root / name)
            link.parent.mkdir(parents=True, exist_ok=True)
            os.symlink(file, link)
        return str(copy)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    made = Hub(tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "HfApi", made.api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", made.snapshot)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked a question"))
    return made


def test_a_detector_goes_there_and_back(hub: Hub) -> None:
    images = tiny.images(60, seed=1).sigmoid()
    detector = Detector.fit(tiny.conv(), images[:40], "knn:k=2").calibrate(images[40:], tpr=0.9)
    assert detector.push_to_hub("me/garments") == "https://hub/me/garments/commit/1"
    assert hub.calls == ["create me/garments private=True"]
    assert (hub.root / "me" / "garments" / "README.md").read_text().startswith("# OOD detector: knn:k=2")
    again = Detector.from_hub("me/garments", device="cpu")
    assert isinstance(again, Detector)
    assert torch.equal(again.score(images[:5]), detector.score(images[:5]))
    assert again.calibration is not None
    assert detector.calibration is not None
    assert again.calibration.threshold == detector.calibration.threshold


def test_what_is_no_detector_and_what_was_changed_is_refused(hub: Hub) -> None:
    for name in ("garments", "me/garments/x", "https://hub/me/x", ""):
        with pytest.raises(TrajOODError, match="expected owner/name"):
            Detector.from_hub(name)
    with pytest.raises(TrajOODError, match=r"me/none: cannot be read \(404 Client Error"):
        Detector.from_hub("me/none")
    (hub.root / "me" / "other").mkdir(parents=True)
    (hub.root / "me" / "other" / "README.md").write_text("x")
    with pytest.raises(TrajOODError, match=r"me/other: expected a detector, found no detector\.json"):
        Detector.from_hub("me/other")
    images = tiny.images(20, seed=1).sigmoid()
    Detector.fit(tiny.conv(), images, "knn:k=2").push_to_hub("me/changed")
    file = hub.root / "me" / "changed" / "scorer.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    with pytest.raises(TrajOODError, match=r"scorer\.safetensors"):
        Detector.from_hub("me/changed")
