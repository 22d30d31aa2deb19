"""``traj-ood new``: write the template of a scorer, and a test that it passes."""

from __future__ import annotations

import keyword
import re
from pathlib import Path

import click

from traj_ood.cli.base import NAME, PATH, examples, main
from traj_ood.cli.console import say
from traj_ood.errors import TrajOODError

SCORER = '''"""The OOD scorer ``{name}``: see ``traj-ood bench fashion --import {module}.py --scorers {name}``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

import traj_ood


@traj_ood.register
@dataclass
class {cls}(traj_ood.FeatureScorer):
    """State what it measures, as a formula: here (|h_i - mean_i| ** power).max() of one feature vector h per image."""

    name: ClassVar[str] = "{name}"
    summary: ClassVar[str] = "largest deviation of one feature from its mean over ID training images"

    power: float = 1.0
    """Every field is an option, as in --scorers {name}:power=2, and needs a default."""

    def learn(self, train: traj_ood.Evidence) -> dict[str, torch.Tensor]:
        """Fit on ID training images only: tensors by name, which score() finds in self.state."""
        return {{"mean": self.features(train).double().mean(dim=0)}}

    def score(self, evidence: traj_ood.Evidence) -> torch.Tensor:
        """(B,) float64, HIGHER = MORE OOD; an image's score must not depend on the other images."""
        deviation = (self.features(evidence).cpu().double() - self.state["mean"]).abs()
        return (deviation**self.power).amax(dim=1)


# FeatureScorer reads one vector per image (option view: mean, cls, tokens, grid, backbone). To read the trajectory,
# derive from traj_ood.Scorer and declare in needs() what score() reads, for instance 16 steps and the distances to the
# attractors along them: return traj_ood.Needs(distances=frozenset({{"tokens"}}), steps=16). In score(), evidence.path()
# is a traj_ood.Trajectory, and evidence.path().measure("distance/tokens") are the distances (B, T + 1) at z_0 ... z_T.
'''

TEST = '''"""Properties that every scorer must have, tested for {name}."""

from pathlib import Path

import pytest
import torch

import traj_ood

traj_ood.import_extension(str(Path(__file__).parent / "{module}.py"))


@pytest.fixture(scope="module")
def scores() -> torch.Tensor:
    """Scores of ten images, five like the training images and five brighter ones, with a small random autoencoder."""
    draw = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    encoder, decoder = torch.nn.Linear(64, 8), torch.nn.Linear(8, 64)
    model = traj_ood.CallableAutoencoder(
        lambda x: encoder(x.flatten(1)), lambda z: decoder(z).reshape(-1, 1, 8, 8), (1, 8, 8), chunk=5
    )
    train, test = torch.rand(40, 1, 8, 8, generator=draw), torch.rand(10, 1, 8, 8, generator=draw)
    test[5:] += 3
    scorers = traj_ood.ScorerSet(model, ["{name}"]).fit(traj_ood.Normalised(train))
    alone = [scorers.score(traj_ood.Normalised(test[i : i + 1])).scores["{name}"] for i in range(10)]
    together = scorers.score(traj_ood.Normalised(test)).scores["{name}"]
    torch.testing.assert_close(torch.cat(alone), together, rtol=1e-9, atol=1e-9)  # independent of the batch
    return together


def test_there_is_one_finite_float64_score_per_image(scores: torch.Tensor) -> None:
    assert scores.shape == (10,)
    assert scores.dtype == torch.float64
    assert bool(scores.isfinite().all())


def test_images_far_from_the_training_images_score_higher(scores: torch.Tensor) -> None:
    assert scores[5:].mean() > scores[:5].mean()


def test_the_label_recreates_the_scorer() -> None:
    scorer = traj_ood.create_scorer("{name}")
    assert traj_ood.create_scorer(scorer.label) == scorer
'''


@main.command(
    epilog=examples(
        "traj-ood new scorer my-score",
        "traj-ood bench fashion --quick --import my_score.py --scorers my-score,field",
    )
)
@click.argument("what", type=click.Choice(["scorer"]))
@click.argument("name", type=NAME)
@click.option("--out", type=PATH, default=Path("."), help="Folder for the two files.  [default: the working directory]")
def new(what: str, name: str, out: Path) -> None:
    """Write NAME.py, a working scorer to start from, and test_NAME.py, a test that it passes."""
    from traj_ood.io.files import write_atomic
    from traj_ood.io.sealed import refuse_inside
    from traj_ood.scorers import SCORERS

    module = re.sub(r"\W", "_", name)
    if not re.fullmatch(r"[a-z][a-z0-9-]*", name) or keyword.iskeyword(module):
        raise TrajOODError(f"{what} name: expected lower-case letters, digits and -, as in my-score, got {name!r}")
    if name in SCORERS:
        raise TrajOODError(f"{what} name {name!r} is taken by {SCORERS[name].__qualname__}: choose another")
    refuse_inside(out)
    cls = "".join(part.capitalize() for part in name.split("-"))
    files = {out / f"{module}.py": SCORER, out / f"test_{module}.py": TEST}
    taken = next((path for path in files if path.exists()), None)
    if taken is not None:
        raise TrajOODError(f"{taken}: exists already: choose another name, or another --out")
    for path, template in files.items():
        write_atomic(path, template.format(name=name, module=module, cls=cls).encode())
    script, test = files
    say(
        f"Written to {script} and {test}. Try it:\n"
        f"  python -m pytest {test}\n"
        f"  traj-ood bench fashion --quick --import {script} --scorers {name},field"
    )
