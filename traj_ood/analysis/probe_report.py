"""The answer of the probe: figures, sentence and pictures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from traj_ood.analysis.base import Answer
from traj_ood.analysis.measures import finite, share
from traj_ood.analysis.probe_coding import ATTRACTORS, DICTIONARIES, ONE_STEP, ORTHOGONAL, Coder, Errors
from traj_ood.attractors import AttractorDictionary
from traj_ood.dynamics.trajectory import Status

if TYPE_CHECKING:
    from traj_ood.drawing.style import Figure


_SHARE_SHOWN = 0.05  # share of the atoms in pictures and in the sentence, as in Fig. 4a
_GALLERY_ATOMS = 24
_Row = tuple[str, Tensor, tuple[str, ...]]  # label, images (K, C, H, W) and captions


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
        ends: the end points of noise.
        max_steps: step limit, for the sentence.
        pictured: number of sets in the figures of reconstructions, the first of ``sets``.
    """

    ends: AttractorDictionary
    coder: Coder
    sets: Sequence[Errors]
    max_steps: int
    pictured: int

    @property
    def at(self) -> int:
        """Place of the level that pictures and the sentence show."""
        wanted = _SHARE_SHOWN * len(self.ends)
        return min(range(len(self.coder.levels)), key=lambda i: abs(self.coder.levels[i] - wanted))

    def answer(self) -> Answer:
        ends, level = self.ends, self.coder.levels[self.at]
        ratios = {
            name: {errors.name: self._ratio(errors, name) for errors in self.sets} for name in (ATTRACTORS, ONE_STEP)
        }
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
            "rows": [row for errors in self.sets for row in self._rows(errors)],
            "ratio": ratios,
            "ratio_atoms": level,
            "ratio_share": level / len(ends),
        }
        pictures = {"atoms.png": self._draw_atoms}
        if self.pictured:
            pictures["reconstructions.png"] = self._draw_reconstructions
            pictures["growth.png"] = self._draw_growth
        return Answer(figures, self._sentence(ratios), pictures)

    def _share(self, status: Status) -> float:
        """Share of the starts from noise that ended with ``status``."""
        return share(self.ends.statuses == status)

    def _used(self, errors: Sequence[Errors], name: str, level: int) -> float:
        """Median number of atoms used if ``level`` are allowed, over the images; a pursuit may end early."""
        used = torch.cat([e.tensors["used"][:, DICTIONARIES.index(name)] for e in errors])
        return float(used.clamp(max=level).double().median())

    def _ratio(self, errors: Errors, name: str) -> float | None:
        """Ratio of the error to that of the random basis; None if the basis has no error."""
        return finite((errors.means("image", name) / errors.means("image", ORTHOGONAL))[self.at])

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
        return [
            {
                "set": errors.name,
                "images": int(errors.tensors["decoded"].numel()),
                "dictionary": name,
                "atoms": level,
                "share": level / len(self.ends),
                "median_atoms_used": self._used([errors], name, level),
                "image_mse": float(errors.means("image", name)[i]),
                "latent_mse": float(errors.means("latent", name)[i]),
                "image_mse_of_D(E(x))": float(errors.tensors["decoded"].mean()),
            }
            for name in DICTIONARIES
            for i, level in enumerate(self.coder.levels)
        ]

    def _sentence(self, ratios: Mapping[str, Mapping[str, float | None]]) -> str:
        level, ends = self.coder.levels[self.at], self.ends

        def lower(one: str, other: str) -> str:
            is_lower = {e.name: (e.means("image", one) < e.means("image", other))[self.at] for e in self.sets}
            return _told([name for name, holds in is_lower.items() if holds], len(self.sets))

        converged, lost = (int((ends.statuses == s).sum()) for s in (Status.CONVERGED, Status.NON_FINITE))
        used = {name: f"{self._used(self.sets, name, level):g}" for name in DICTIONARIES}
        return (
            f"Of {len(ends):,} starts from noise {converged:,} ({converged / len(ends):.1%}) converged within "
            f"{self.max_steps:,} steps and {lost:,} became NaN or infinite; the finite end points "
            f"({len(ends) - lost:,}, distinct: {len(ends.distinct()):,}) are the atoms called attractors. With at most "
            f"{level:,} atoms ({level / len(ends):.1%} of the starts; {used[ATTRACTORS]} in the median reconstruction, "
            f"{used[ORTHOGONAL]} of the random basis) they have a lower error than a random orthogonal basis on "
            f"{lower(ATTRACTORS, ORTHOGONAL)} (median ratio {_median(ratios[ATTRACTORS].values())}). f applied once "
            f"to the noise does so on {lower(ONE_STEP, ORTHOGONAL)} ({_median(ratios[ONE_STEP].values())}; "
            f"{used[ONE_STEP]} atoms); attractors have a lower error than that on {lower(ATTRACTORS, ONE_STEP)}."
        )

    def _draw_reconstructions(self) -> Figure:
        rows: list[_Row] = []
        for errors in self.sets[: self.pictured]:
            rows.append((errors.name, errors.tensors["inputs"], ()))
            for name, images in zip(DICTIONARIES, errors.tensors["pictures"][:, :, self.at].unbind(1), strict=True):
                rows.append((_broken(name), images, ()))
        level = self.coder.levels[self.at]
        return self._pictures(rows, f"reconstructions with at most {level} atoms ({level / len(self.ends):.1%})")

    def _draw_growth(self) -> Figure:
        rows: list[_Row] = []
        for errors in self.sets[: self.pictured]:
            label, captions = f"{errors.name}\n", (*(f"{level} atoms" for level in self.coder.levels), "input")
            for name, images in zip(DICTIONARIES, errors.tensors["pictures"][0], strict=True):
                rows.append((label + _broken(name), torch.cat([images, errors.tensors["inputs"][:1]]), captions))
                label, captions = "", ()
        return self._pictures(rows, "one image of a set with more and more atoms")

    def _draw_atoms(self) -> Figure:
        distinct = self.ends.distinct()
        kept = self.ends.usable()[distinct[:_GALLERY_ATOMS]]
        images = self.coder.model.decode(kept.to(self.coder.model.device)).cpu()
        title = (
            f"where noise ends, decoded ({self._share(Status.CONVERGED):.1%} converged), {len(kept)} of "
            f"{len(distinct):,} distinct points"
        )
        return self._pictures([("", part, ()) for part in images.split(8)], title)

    def _pictures(self, rows: Sequence[_Row], title: str) -> Figure:
        """Draw rows of images in the model's units, from its black to its white."""
        from traj_ood.drawing.charts import PictureRow, picture_rows

        model = self.coder.model
        ends = [model.transform(Image.new("RGB", (8, 8), colour)).flatten(1)[:, 0] for colour in ("black", "white")]
        limits = torch.stack(ends).double().numpy()
        shown = [PictureRow(label, images.numpy(), limits, captions) for label, images, captions in rows]
        return picture_rows(shown, f"{model.name}: {title}")


def _median(ratios: Iterable[float | None]) -> str:
    """The median of the known ratios, as text."""
    known = [ratio for ratio in ratios if ratio is not None]
    return f"{median(known):.2g}" if known else "none: the basis makes no error"


def _told(names: Sequence[str], count: int) -> str:
    """The number and names of some of ``count`` sets, as text."""
    some = f" ({', '.join(names)})" if 0 < len(names) < count else ""
    return f"{len(names)} of {count} sets of images{some}"


def _broken(name: str) -> str:
    return name.replace(" ", "\n")
