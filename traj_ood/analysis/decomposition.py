"""Decomposition of the test error into prototype error and coverage error, and tests of the bound of Prop. 3.2 (A.8).

With z = E(x), Π(z) the nearest attractor, a = x − D(Π(z)) and b = D(Π(z)) − D(z), the reconstruction error is
‖a + b‖². The paper bounds it by ‖a‖² + L_D²‖z − Π(z)‖², using ‖a + b‖² ≤ ‖a‖² + ‖b‖², which fails if ⟨a, b⟩ > 0 (on
a line, x = 0, D the identity, Π(z) = 1 and z = 2 give 4 ≤ 1 + 1). The inequality ‖a + b‖² ≤ 2‖a‖² + 2‖b‖² always
holds. Four forms of the bound are checked for every image:

* ``proof step``: ‖a‖² + ‖b‖², before the Lipschitz constant is used;
* ``stated``: ‖a‖² + L_D²‖z − Π(z)‖², the proposition;
* ``corrected``: 2‖a‖² + 2 L_D²‖z − Π(z)‖²;
* ``held out``: the corrected form with an L_D estimated on the other half of the images, which can fail, too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from traj_ood.analysis.base import Answer, register
from traj_ood.analysis.images import sample, spread, stack
from traj_ood.analysis.measures import finite, share
from traj_ood.analysis.models import PAPER_EPOCHS, PAPER_STEPS, PAPER_TOL
from traj_ood.analysis.singular import spectral_norms
from traj_ood.analysis.subjects import TRAINED, ModelQuestion, Subject
from traj_ood.analysis.workspace import Unit, Workspace
from traj_ood.attractors.health import group_directions
from traj_ood.autoencoders.identity import model_identity
from traj_ood.dynamics.iterate import iterate
from traj_ood.errors import TrajOODError
from traj_ood.index import NeighborIndex

if TYPE_CHECKING:
    from traj_ood.drawing.style import Figure

_CHUNK_NORMS = 16  # rows per call when spectral norms for L_D are computed
_ROUNDING = 1e-9  # relative rounding of sums over pixels in float64


@register
@dataclass(frozen=True)
class Decomposition(ModelQuestion):
    """The terms of Prop. 3.2 for test images, and how often each form of its bound holds.

    Attributes:
        data: see :meth:`traj_ood.analysis.subjects.ModelQuestion.subject`.
        attractors: number of training images whose attractors form the dictionary.
        sizes: sizes of further dictionaries, made of the first attractors, as far as there are enough.
        images: number of test images.
        points: number of segments from z to Π(z) on which the decoder's Jacobian is measured, for L_D.
        tol: tolerance on the squared residual.
        max_steps: step limit.
    """

    name: ClassVar[str] = "decomposition"
    figure: ClassVar[str] = "§3.2, Prop. 3.2"
    summary: ClassVar[str] = "test error against prototype and coverage error, and how often the bound holds"
    choices: ClassVar[tuple[str, ...]] = (
        "The paper measures neither term; its settings are taken to be those of its other experiments of §3.2.",
        "L_D is estimated from below: the largest of ‖D(z) − D(Π(z))‖ / ‖z − Π(z)‖ over the test images and of the "
        "spectral norm of the decoder's Jacobian at z, Π(z) and halfway.",
        "Since those secants are of the images that the forms are tested on, the corrected form cannot fail there; it "
        "is a check of the code. Held out is the test: L_D of the images at even places for those at odd ones, and "
        "the other way round.",
        "Errors are sums over pixels in the model's normalised units, as the proposition has them.",
    )
    unstated: ClassVar[tuple[str, ...]] = (
        "model", "data", "attractors", "sizes", "images", "points", "tol", "max_steps", "train_images", "epochs",
        "bottleneck", "width",
    )  # fmt: skip

    at_least: ClassVar = {**ModelQuestion.at_least, "attractors": 1, "points": 1, "images": 2, "max_steps": 2}
    above_0: ClassVar = ("tol",)

    data: str = "fashion"
    attractors: int = 500
    sizes: tuple[int, ...] = (10, 30, 100, 300, 500)
    images: int = 500
    points: int = 16
    tol: float = 1e-5
    max_steps: int = 500

    def __post_init__(self) -> None:
        super().__post_init__()
        self.expect(bool(self.sizes) and min(self.sizes, default=0) >= 1, "sizes", "numbers of at least 1")

    @classmethod
    def paper(cls) -> Decomposition:
        return cls(
            model=TRAINED, data="mnist", train_images=0, epochs=PAPER_EPOCHS, width=32, tol=PAPER_TOL,
            max_steps=PAPER_STEPS,
        )  # fmt: skip

    def answer(self, work: Workspace) -> Answer:
        about = self.subject(work, self.data)
        if about.test is about.train:
            raise TrajOODError(
                f"decomposition: data: expected an image set or a benchmark, with test images other than the training "
                f"images, got the folder {self.data}: describe it in a benchmark's YAML file"
            )
        key = self.settings("attractors", "images", "points", "tol", "max_steps", "seed")
        key |= {"model": model_identity(about.model), "data": [about.train.digest(), about.test.digest()]}
        ends = self._attractors(work, about)
        points = ends.tensors["points"]
        rows = []
        sizes = sorted({min(size, len(points)) for size in self.sizes} | {len(points)})
        for size in work.track(sizes, "decomposition", "dictionary"):
            unit = work.unit("halves", {**key, "size": size}, partial(self._terms, about, points[:size]))
            rows.append({"attractors": size, **summary(unit.tensors)})
        figures = {"model": about.model.name, "images": self.images, **ends.notes, "rows": rows}
        pictures = {"decomposition.png": partial(terms_figure, rows, unit.tensors, about.model.name)}
        return Answer(figures, sentence_of(about.model.name, rows[-1]), pictures)

    def _attractors(self, work: Workspace, about: Subject) -> Unit:
        """End points of the training trajectories that converged."""
        model = about.model
        chosen = sample(about.train, self.attractors, self.seed, "attractors")

        def compute(start: Tensor) -> dict[str, Tensor]:
            path = iterate(model.self_map, start, tol=self.tol, max_steps=self.max_steps, chunk=model.chunk)
            return {"ends": path.final, "converged": path.converged}

        found = self.over_latents(work, "ends", model, chosen, self.settings("tol", "max_steps"), compute)
        ends, converged = found["ends"], found["converged"]
        points = ends[converged]
        if not len(points):
            raise TrajOODError(
                f"decomposition: expected trajectories that converge, got 0 of {len(ends)}: raise max_steps or tol, or "
                f"see traj-ood diagnose {model.name}"
            )
        distinct = len(group_directions(points)[0])
        return Unit({"points": points}, {"converged": share(converged), "distinct": distinct})

    def _terms(self, about: Subject, attractors: Tensor) -> Unit:
        """All terms of the decomposition for each test image."""
        model = about.model
        images = stack(model.transform, sample(about.test, self.images, self.seed, "decomposition"))
        codes = model.encode(images).cpu()
        prototypes = nearest(codes, attractors)
        targets = model.examine(images).target.cpu()
        errors = terms(targets, model.decode(codes).cpu(), model.decode(prototypes).cpu(), codes, prototypes)
        chosen = torch.tensor(spread(len(codes), self.points))
        a, b = codes[chosen], prototypes[chosen]
        probes = torch.cat([a, b, (a + b) / 2]).to(model.device)
        parts = probes.split(_CHUNK_NORMS)
        norms = torch.cat([spectral_norms(model.decode_batch, p, chunk=_CHUNK_NORMS, seed=self.seed) for p in parts])
        distortion, gap, places = errors["distortion"], errors["gap"], chosen.repeat(3)
        found = {"lipschitz": lipschitz(distortion, gap, norms), "elsewhere": elsewhere(distortion, gap, norms, places)}
        return Unit({**errors, **found})


def nearest(codes: Tensor, attractors: Tensor) -> Tensor:
    """Π(z), (B, *L): the nearest of ``attractors`` (N, *L) to each of ``codes`` (B, *L), in Euclidean distance."""
    found = NeighborIndex(attractors.flatten(1), backend="torch").search(codes.flatten(1), 1)
    return attractors[found.indices[:, 0].cpu()]


def terms(images: Tensor, own: Tensor, prototype: Tensor, codes: Tensor, nearest: Tensor) -> dict[str, Tensor]:
    """The squared lengths in the proposition, (B,) float64 each: ``error`` ‖x − D(z)‖², ``prototype`` ‖x − D(Π(z))‖²,
    ``distortion`` ‖D(Π(z)) − D(z)‖² and ``gap`` ‖z − Π(z)‖², from x, D(z) and D(Π(z)) (B, …), z and Π(z) (B, *L)."""
    x, full, near = (v.flatten(1).double() for v in (images, own, prototype))
    return {
        "error": (x - full).square().sum(dim=1),
        "prototype": (x - near).square().sum(dim=1),
        "distortion": (near - full).square().sum(dim=1),
        "gap": (codes.flatten(1).double() - nearest.flatten(1).double()).square().sum(dim=1),
    }


def lipschitz(distortion: Tensor, gap: Tensor, norms: Tensor) -> Tensor:
    """The largest measured stretch of the decoder, a lower bound of L_D, scalar tensor: over secants, from
    ``distortion`` ‖D(Π(z)) − D(z)‖² and ``gap`` ‖z − Π(z)‖² (B,), and over spectral ``norms`` of J_D (P,).

    It is infinite if the decoder's values or products became NaN or infinite, and 0 if there is nothing to measure.
    """
    secants = (distortion / gap)[gap > 0].sqrt()
    return torch.cat([secants, norms.double().cpu(), torch.zeros(1).double()]).nan_to_num(nan=torch.inf).max()


def elsewhere(distortion: Tensor, gap: Tensor, norms: Tensor, places: Tensor) -> Tensor:
    """For each image an estimate of L_D from the other half of the images (even indices for odd ones), (B,). ``places``
    (P,) are the indices of the images of the norms; see :func:`lipschitz`."""
    found = torch.empty(len(gap), dtype=torch.float64)
    for half in (0, 1):
        found[1 - half :: 2] = lipschitz(distortion[half::2], gap[half::2], norms.cpu()[places % 2 == half])
    return found


def bounds(terms: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The right-hand sides (B,) of the four forms, see the module; only ``corrected`` must hold for every x.

    Args:
        terms: those of :func:`terms`; ``lipschitz``, L_D as a scalar; and ``elsewhere`` (B,), that of ``held out``.
    """
    prototype, gap = terms["prototype"], terms["gap"]
    coverage = terms["lipschitz"] ** 2 * gap
    return {
        "proof step": prototype + terms["distortion"],
        "stated": prototype + coverage,
        "corrected": 2 * prototype + 2 * coverage,
        "held out": 2 * prototype + 2 * terms["elsewhere"] ** 2 * gap,
    }


def summary(terms: Mapping[str, Tensor]) -> dict[str, Any]:
    """Means of all ``terms`` (see :func:`bounds`), and how often and how tightly each form holds.

    For each form, ``holds`` is the share of images for which it holds (None if L_D is not finite), ``median_ratio`` the
    median of bound / error over images with an error, and ``worst_ratio`` the smallest such ratio, below 1 if the form
    fails (both None if no image has an error). ``needed`` is the smallest L_D with which the stated form would hold for
    all images: 0 if the prototype error suffices, None if no L_D would.
    """
    error, gap, lipschitz = terms["error"], terms["gap"], terms["lipschitz"]
    # Equality up to rounding is not a violation; it occurs for images whose code is an attractor.
    missing = error * (1 - _ROUNDING) - terms["prototype"]
    short = missing > 0
    needed = (missing[short] / gap[short]).sqrt().max() if bool(short.any()) else torch.zeros(())
    return {
        **{name: float(terms[name].mean()) for name in ("error", "prototype", "distortion")},
        "coverage": finite(lipschitz**2 * gap.mean()),
        "gap": float(gap.sqrt().mean()),
        "lipschitz": finite(lipschitz),
        "needed": finite(needed),
        "forms": {form: _form(error, bound) for form, bound in bounds(terms).items()},
    }


def _form(error: Tensor, bound: Tensor) -> dict[str, float | None]:
    if not bool(bound.isfinite().all()):
        return dict.fromkeys(("holds", "median_ratio", "worst_ratio"))
    ratios = (bound / error)[error > 0]
    return {
        "holds": share(bound >= error * (1 - _ROUNDING)),
        "median_ratio": finite(ratios.median()) if len(ratios) else None,
        "worst_ratio": finite(ratios.min()) if len(ratios) else None,
    }


def sentence_of(model: str, row: dict[str, Any]) -> str:
    def told(form: str) -> str:
        found = row["forms"][form]
        return "an unknown share" if found["holds"] is None else f"{found['holds']:.1%}"

    worst = row["forms"]["proof step"]["worst_ratio"]
    coverage = (
        "coverage error not measurable (L_D is not finite)"
        if row["coverage"] is None
        else f"coverage error {row['coverage']:.1f} (L_D at least {row['lipschitz']:.2f})"
    )
    return (
        f"{model}, {row['attractors']} attractors: mean test error {row['error']:.1f}, prototype error "
        f"{row['prototype']:.1f}, {coverage}; the stated form holds for {told('stated')} of the images, its proof's "
        f"step without L_D for {told('proof step')}"
        + ("" if worst is None else f" (worst: {worst:.2f} of the error)")
        + f", the corrected form for {told('corrected')}, and with the L_D of other images for {told('held out')}."
    )


def terms_figure(rows: list[dict[str, Any]], terms: Mapping[str, Tensor], model: str) -> Figure:
    """Draw over the dictionary's size the mean terms and how often each form holds; and how tight each form is."""
    from traj_ood.drawing.charts import Curve, Panel, curves

    sizes, axis = [row["attractors"] for row in rows], "attractors in the dictionary"
    labels = {
        "error": "reconstruction error ‖x − F(x)‖²",
        "prototype": "prototype error",
        "distortion": "decoder distortion",
        "coverage": r"coverage error $L_D^2\,\|z - \Pi(z)\|^2$",
    }
    means = [Curve(label, sizes, [row[key] for row in rows]) for key, label in labels.items()]
    error = terms["error"]
    holds, tight = [], []
    for form, side in bounds(terms).items():
        shares = [row["forms"][form]["holds"] for row in rows]
        holds.append(Curve(form, sizes, [None if share is None else 100 * share for share in shares]))
        ratio = (side[error > 0] / error[error > 0]).sort().values
        ratio = ratio if ratio.isfinite().all() else ratio[:0]  # L_D, and so a ratio, may not be finite
        percent = 100 * torch.arange(1, len(ratio) + 1) / max(1, len(ratio))
        tight.append(Curve(form, ratio.tolist(), percent.tolist(), kind="steps"))
    panels = [
        Panel("terms", axis, "mean over test images", means, log_x="10", log_y=True),
        Panel("how often each form holds", axis, "images for which it holds (%)", holds, log_x="10", limits=(-3, 103)),
        Panel(f"how tight, with {sizes[-1]} attractors", "bound / error (left of the line it fails)",
              "images up to here (%)", tight, log_x="10", mark=1),
    ]  # fmt: skip
    return curves(panels, f"Prototype and coverage error (Prop. 3.2): {model}")
