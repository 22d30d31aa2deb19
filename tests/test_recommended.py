"""The scorer to try first: one declaration, which pages, commands and detectors follow."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import tiny
from click.testing import CliRunner

import traj_ood
from traj_ood.autoencoders import SurrogateAutoencoder
from traj_ood.cli import main
from traj_ood.data.preprocessing import Normalised
from traj_ood.scorers import RECOMMENDED, Recommendation, create_scorers, recommended
from traj_ood.scorers.registry import lacking

ROOT = Path(__file__).parents[1]


def surrogate() -> SurrogateAutoencoder:
    return SurrogateAutoencoder(tiny.backbone(), traj_ood.SurrogateNetwork(16))


def test_each_kind_of_model_has_its_own() -> None:
    assert recommended(tiny.conv()) is RECOMMENDED["autoencoder"]
    assert recommended(surrogate()) is RECOMMENDED["backbone"]


@pytest.mark.parametrize("kind", ["autoencoder", "backbone"])
def test_it_can_be_made_and_has_a_record(kind: str) -> None:
    found = RECOMMENDED[kind]  # type: ignore[index]
    model = tiny.conv() if kind == "autoencoder" else surrogate()
    (scorer,) = create_scorers([found.scorer], model)
    assert not scorer.needs().labels, "not everybody has labels"
    assert lacking(model, scorer.needs()) is None
    assert (ROOT / found.record).is_file()


def test_a_detector_takes_it_where_none_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    model, images = tiny.conv(), Normalised(tiny.images(20))
    assert traj_ood.Detector.fit(model, images).scorer.label == RECOMMENDED["autoencoder"].scorer
    monkeypatch.setitem(RECOMMENDED, "autoencoder", Recommendation("mahalanobis", "record"))
    assert traj_ood.Detector.fit(model, images).scorer.label == "mahalanobis"
    listed = CliRunner().invoke(main, ["list", "scorers"]).output
    assert re.search(r"on autoencoders +mahalanobis\n", listed)


def test_the_pages_name_it() -> None:
    own = RECOMMENDED["autoencoder"].scorer
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for kind, found in RECOMMENDED.items():
        assert re.search(
            rf"^- \*\*On an? (frozen )?{kind}\*\* (try )?`{re.escape(found.scorer)}`", readme, flags=re.M
        ), kind
    first = (ROOT / "docs" / "which-score.md").read_text(encoding="utf-8").split("\n\n")[1]
    assert {f"`{found.scorer}`" for found in RECOMMENDED.values()} <= set(re.findall(r"`[^`]+`", first))
    faq = (ROOT / "docs" / "faq.md").read_text(encoding="utf-8").split("\n\n")
    (answer,) = (part for part in faq if part.startswith("**Which scorer should I take?**"))
    assert f"`{own}`" in answer
