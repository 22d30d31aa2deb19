"""The answer of the probe: figures, sentence and pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from traj_ood.analysis.base import Answer
from traj_ood.analysis.measures import finite, share
from traj_ood.analysis.probe_coding import ATTRACTORS, DICTIONARIES, ONE_STEP, ORTHOGONAL, Coder, Errors, Floats, Noise
from traj_ood.dynamics.trajectory import Status

if TYPE_CHECKING:
    from traj_ood.drawing.style import Figure


_SHARE_SHOWN = 0.05
"""Share of the atoms in pictures and in the sentence, as in Fig. 4a."""

_GALLERY_ATOMS = 24


def errors_figure(figures: Mapping[str, Any]) -> Figure:
    """Draw errors over the atoms that may be used, a panel for each set."""
    from traj_ood.drawing.charts import Curve, Panel, curves

    panels = []
    for name in dict.fromkeys(row["set"] for row in figures["rows"]):
        own = [row for row in figures["rows"] if row["set"] == name]
        lines = []
        for dictionary in DICTIONARIES:
            rows = [row for row in own if row["dictionary"] == dictionary]
            lines.append(Curve(dictionary, [r["atoms"] for r in rows], [r["image_mse"] for r in rows]))
        levels, floor = lines[0].x, own[0]["image_mse_of_D(E(x))"]
        lines.append(Curve("D(E(x))", levels, [floor for _ in rows]))
        log_y = floor > 0 or any(row["image_mse"] > 0 for row in own)
        panels.append(Panel(name, "atoms used", "MSE of decoded images", lines, log_x="2", log_y=log_y))
    return curves(panels, f"Data-free probing of {figures['model']}: {figures['atoms']:,} starts from noise")


@dataclass(frozen=True)
class Report:
    """Makes the answer from the measurements.

    Attributes:
        noise: the trajectories from noise.
        coder: model, dictionaries and levels.
        sets: the errors on each set of images.
        max_steps: step limit, for the sentence.
        pictured: number of sets in the figures of reconstructions, the first of ``sets``.
    """

    noise: Noise
    coder: Coder
    sets: Sequence[Errors]
    max_steps: int
    pictured: int

    def answer(self) -> Answer:
        rows = [row for errors in self.sets for row in self._rows(errors)]
        wanted = _SHARE_SHOWN * len(self.noise.dictionary)
        at = min(range(len(self.coder.levels)), key=lambda i: abs(self.coder.levels[i] - wanted))
        ratios = {name: [self._ratio(errors, name, at) for errors in self.sets] for name in (ATTRACTORS, ONE_STEP)}
        ends = self.noise.dictionary
        figures = {
            "model": self.coder.model.name,
            "latent_dimension": int(ends.points[0].numel()),
            "atoms": len(ends),
            "converged": self._share(Status.CONVERGED),
            "finite": 1 - self._share(Status.NON_FINITE),
            "median_steps": float(ends.steps.double().median()),
            "distinct_end_points": len(ends.distinct()),
            "dictionaries": [self._about(name) for name in DICTIONARIES],
            "unit": "mean squared error in the model's normalised pixel units, mean over images",
            "rows": rows,
            "ratio": {name: dict(zip([e.name for e in self.sets], r, strict=True)) for name, r in ratios.items()},
            "ratio_atoms": self.coder.levels[at],
            "ratio_share": self.coder.levels[at] / len(ends),
        }
        pictures: dict[str, Callable[[], Figure]] = {
            "probe.png": partial(errors_figure, figures),
            "atoms.png": self._draw_atoms,
        }
        if self.pictured:
            pictures["reconstructions.png"] = partial(self._draw_reconstructions, at)
            pictures["growth.png"] = self._draw_growth
        return Answer(figures, self._sentence(ratios, at), pictures)

    def _share(self, status: Status) -> float:
        """Share of the starts from noise that ended with ``status``."""
        return share(self.noise.dictionary.statuses == status)

    def _used(self, errors: Sequence[Errors], name: str, level: int) -> float:
        """Median number of atoms used if ``level`` are allowed, over the images; a pursuit may end early."""
        used = torch.cat([e.tensors["used"][:, DICTIONARIES.index(name)] for e in errors])
        return float(used.clamp(max=level).double().median())

    def _ratio(self, errors: Errors, name: str, at: int) -> float | None:
        """Ratio of the error to that of the random basis; None if the basis has no error."""
        means = errors.means("image")[:, at]
        return finite(means[DICTIONARIES.index(name)] / means[DICTIONARIES.index(ORTHOGONAL)])

    def _about(self, name: str) -> dict[str, Any]:
        dictionary = self.coder.dictionaries[name]
        rank, energy = dictionary.spectrum()
        return {
            "dictionary": name,
            "atoms": len(dictionary),
            "rank": rank,
            "directions_of_90_percent": energy,
            "median_atoms_used": self._used(self.sets, name, len(dictionary)),
        }

    def _rows(self, errors: Errors) -> list[dict[str, Any]]:
        image, latent = errors.means("image"), errors.means("latent")
        count = len(self.noise.dictionary)
        return [
            {
                "set": errors.name,
                "images": int(errors.tensors["decoded"].numel()),
                "dictionary": name,
                "atoms": level,
                "share": level / count,
                "median_atoms_used": self._used([errors], name, level),
                "image_mse": float(image[d, i]),
                "latent_mse": float(latent[d, i]),
                "image_mse_of_D(E(x))": float(errors.tensors["decoded"].mean()),
            }
            for d, name in enumerate(DICTIONARIES)
            for i, level in enumerate(self.coder.levels)
        ]

    def _sentence(self, ratios: Mapping[str, list[float | None]], at: int) -> str:
        level, ends = self.coder.levels[at], self.noise.dictionary
        names = [errors.name for errors in self.sets]
        means = [errors.means("image")[:, at].tolist() for errors in self.sets]

        def lower(one: str, other: str) -> str:
            a, b = DICTIONARIES.index(one), DICTIONARIES.index(other)
            return _told([n for n, errors in zip(names, means, strict=True) if errors[a] < errors[b]], len(names))

        converged, lost = (int((ends.statuses == s).sum()) for s in (Status.CONVERGED, Status.NON_FINITE))
        used = {name: f"{self._used(self.sets, name, level):g}" for name in DICTIONARIES}
        return (
            f"Of {len(ends):,} starts from noise {converged:,} ({converged / len(ends):.1%}) converged within "
            f"{self.max_steps:,} steps and {lost:,} became NaN or infinite; the finite end points "
            f"({len(ends) - lost:,}, distinct: {len(ends.distinct()):,}) are the atoms called attractors. With at most "
            f"{level:,} atoms ({level / len(ends):.1%} of the starts; {used[ATTRACTORS]} in the median reconstruction, "
            f"{used[ORTHOGONAL]} of the random basis) they have a lower error than a random orthogonal basis on "
            f"{lower(ATTRACTORS, ORTHOGONAL)} (median ratio {_median(ratios[ATTRACTORS])}). f applied once "
            f"to the noise does so on {lower(ONE_STEP, ORTHOGONAL)} ({_median(ratios[ONE_STEP])}; "
            f"{used[ONE_STEP]} atoms); attractors have a lower error than that on {lower(ATTRACTORS, ONE_STEP)}."
        )

    def _draw_reconstructions(self, at: int) -> Figure:
        from traj_ood.drawing.charts import PictureRow, picture_rows

        rows = []
        for errors in self.sets[: self.pictured]:
            rows.append(PictureRow(errors.name, errors.tensors["inputs"].numpy(), self._limits()))
            for d, name in enumerate(DICTIONARIES):
                rows.append(PictureRow(_broken(name), errors.tensors["pictures"][:, d, at].numpy(), self._limits()))
        level = self.coder.levels[at]
        used = level / len(self.noise.dictionary)
        return picture_rows(rows, f"{self.coder.model.name}: reconstructions with at most {level} atoms ({used:.1%})")

    def _draw_growth(self) -> Figure:
        from traj_ood.drawing.charts import PictureRow, picture_rows

        rows = []
        for errors in self.sets[: self.pictured]:
            for d, name in enumerate(DICTIONARIES):
                line = torch.cat([errors.tensors["pictures"][0, d], errors.tensors["inputs"][:1]])
                captions = [*(f"{level} atoms" for level in self.coder.levels), "input"]
                label = f"{errors.name}\n{_broken(name)}" if d == 0 else _broken(name)
                rows.append(PictureRow(label, line.numpy(), self._limits(), captions if d == 0 else ()))
        return picture_rows(rows, f"{self.coder.model.name}: one image of a set with more and more atoms")

    def _draw_atoms(self) -> Figure:
        from traj_ood.drawing.charts import PictureRow, picture_rows

        ends = self.noise.dictionary
        kept = ends.distinct()[:_GALLERY_ATOMS]
        images = self.coder.model.decode(ends.usable()[kept].to(self.coder.model.device)).cpu()
        title = (
            f"{self.coder.model.name}: where noise ends, decoded ({self._share(Status.CONVERGED):.1%} converged), "
            f"{len(kept)} of {len(ends.distinct()):,} distinct points"
        )
        rows = [PictureRow("", part.numpy(), self._limits()) for part in images.split(8)]
        return picture_rows(rows, title)

    def _limits(self) -> Floats:
        """Black and white in the model's units, (2, C)."""
        ends = [
            self.coder.model.transform(Image.new("RGB", (8, 8), colour)).flatten(1)[:, 0]
            for colour in ("black", "white")
        ]
        return torch.stack(ends).double().numpy()


def _median(ratios: Sequence[float | None]) -> str:
    """The median of the known ratios, as text."""
    known = [ratio for ratio in ratios if ratio is not None]
    return f"{median(known):.2g}" if known else "none: the basis makes no error"


def _told(names: Sequence[str], count: int) -> str:
    """The number and names of some of ``count`` sets, as text."""
    some = f" ({', '.join(names)})" if 0 < len(names) < count else ""
    return f"{len(names)} of {count} sets of images{some}"


def _broken(name: str) -> str:
    return name.replace(" ", "\n")
