"""The gallery of a run, for its report: paths in a plane, decoded frames and its worst mistakes, in one small file.

A report is made later, without the model and the data, so everything that it shows has to be in the run's folder. The
choice of samples is deterministic: the same run gives the same bytes.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from traj_ood.attractors import AttractorDictionary
from traj_ood.autoencoders import Autoencoder
from traj_ood.data import Benchmark
from traj_ood.data.preprocessing import as_picture
from traj_ood.dynamics.chunks import apply_in_chunks
from traj_ood.dynamics.iterate import iterate
from traj_ood.dynamics.trajectory import Status, Trajectory
from traj_ood.errors import TrajOODError
from traj_ood.evaluation.results import CONTROL, ScorerResult
from traj_ood.io.tensor_file import open_tensors, write_tensors
from traj_ood.scorers import RECOMMENDED

FILE_NAME = "gallery.safetensors"

SIDE = 64
"""Largest side of a kept image in pixels: 60 mistakes and 54 frames in colour stay below 1.5 MB for any content."""
MISTAKES = 6
"""Mistakes kept per scorer and side (OOD images with low scores, ID images with high scores): one row on a screen."""
FRAME_STEPS = (0, 1, 2, 4, 8, 16, 64)
"""Steps t whose z_t are decoded, besides the end point; dense at the start, where steps are long."""

_ID_PATHS, _OOD_PATHS, _FRAME_SAMPLES = 12, 16, 3  # 28 paths fit in one call of a network with chunks of 32 rows
_STEPS_WITHOUT_DICTIONARY = 128
_PLANE_POINTS = 300  # attractors to which the plane is fitted, and which are drawn in it
_FIELD_SIDE = 21  # arrows per side of the vector field of a 2-D latent
_SCHEMA = "traj_ood.gallery/1"

PlaneKind = Literal["attractors", "starts", "latent"]
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class PathSample:
    """A sample whose path is kept: its origin, number of steps and Status (STEP_LIMIT refers to the limit of
    :func:`keep_pictures`)."""

    split: str
    role: str
    id: str
    steps: int
    status: int


@dataclass(frozen=True)
class Frames:
    """The decoded images along one path: captions such as ``x``, ``D(z0)``, ``D(z*)``, and the keys of the images."""

    sample: int
    captions: tuple[str, ...]
    images: tuple[str, ...]


@dataclass(frozen=True)
class Mistake:
    """An image that a scorer ranks wrongly: its origin, its score (higher = more OOD) and the key of its picture."""

    split: str
    role: str
    id: str
    score: float
    image: str


@dataclass(frozen=True)
class Pictures:
    """The gallery of a run.

    Attributes:
        plane: the two coordinates: the first principal components of the ``attractors``, or of the ``starts`` z0 of the
            kept samples (with fewer than three different attractors), or the ``latent`` itself if it is 2-D.
        explained: share of variance in the plane of the points to which it was fitted; 1 for ``latent``.
        samples: S samples, ID test images before OOD images.
        paths: (S, T+1, 2) float32 points z_0 … z_N in the plane, NaN after the end.
        attractors: (A, 2) float32 end points of training images in the plane; A = 0 without a dictionary.
        field: (G, 4) float32 points z and arrows f(z) − z of a 2-D latent; G = 0 otherwise.
        frames: decoded images of a few samples; empty if the decoder does not decode to images.
        no_frames: the reason if ``frames`` is empty.
        mistakes: by scorer label, the OOD images with the lowest scores (``ood``) and the ID images with the highest
            scores (``id``), worst first.
        images: PNG files by key.
    """

    plane: PlaneKind
    explained: float
    samples: tuple[PathSample, ...]
    paths: Floats
    attractors: Floats
    field: Floats
    frames: tuple[Frames, ...]
    no_frames: str
    mistakes: Mapping[str, Mapping[str, tuple[Mistake, ...]]]
    images: Mapping[str, bytes]

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, with images as bytes and texts as JSON in its header.

        Raises ``TrajOODError`` if the folder cannot be written.
        """
        words = {k: v for k, v in asdict(self).items() if k not in (*_TABLES, "images")}
        tensors = {name: torch.from_numpy(getattr(self, name)) for name in _TABLES}
        tensors |= {f"image/{k}": torch.frombuffer(bytearray(png), dtype=torch.uint8) for k, png in self.images.items()}
        write_tensors(Path(path), tensors, {"gallery": {"schema": _SCHEMA, **words}})

    @classmethod
    def load(cls, path: str | Path) -> Pictures:
        """Read a file written by :meth:`save`, and check that all keys refer to existing images.

        Raises ``TrajOODError`` naming the file if it is unreadable, damaged or of another version.
        """
        with open_tensors(Path(path), "gallery of a run", "delete it and start the run's command again") as file:
            tensors = {name: tensor.numpy() for name, tensor in file.tensors.items()}
            return _from_words(file.header["gallery"], tensors)


_TABLES = {"paths": 3, "attractors": 2, "field": 2}
_PNG = b"\x89PNG\r\n\x1a\n"


def _from_words(words: dict[str, Any], tensors: dict[str, NDArray[Any]]) -> Pictures:
    if words["schema"] != _SCHEMA:
        raise ValueError(f"schema {words['schema']!r}, expected {_SCHEMA!r}")
    pictures = Pictures(
        plane=words["plane"],
        explained=float(words["explained"]),
        samples=tuple(PathSample(**s) for s in words["samples"]),
        **{name: tensors[name] for name in _TABLES},
        frames=tuple(Frames(f["sample"], tuple(f["captions"]), tuple(f["images"])) for f in words["frames"]),
        no_frames=str(words["no_frames"]),
        mistakes={
            label: {side: tuple(Mistake(**m) for m in sides[side]) for side in ("ood", "id")}
            for label, sides in words["mistakes"].items()
        },
        images={k.removeprefix("image/"): v.tobytes() for k, v in tensors.items() if k.startswith("image/")},
    )
    if pictures.plane not in get_args(PlaneKind):
        raise ValueError(f"unknown plane {pictures.plane!r}")
    for name, dimensions in _TABLES.items():
        table = getattr(pictures, name)
        if table.ndim != dimensions or table.dtype != np.float32 or np.isinf(table).any():
            raise ValueError(f"{name}: {table.dtype} of shape {table.shape}, or infinite")
    if len(pictures.samples) != len(pictures.paths):
        raise ValueError(f"{len(pictures.samples)} samples, {len(pictures.paths)} paths")
    shown = [key for f in pictures.frames for key in f.images]
    shown += [m.image for sides in pictures.mistakes.values() for found in sides.values() for m in found]
    for key in shown:
        if not pictures.images[key].startswith(_PNG):
            raise ValueError(f"picture {key!r} is not a PNG")
    for frames in pictures.frames:
        if len(frames.captions) != len(frames.images) or not 0 <= frames.sample < len(pictures.samples):
            raise ValueError("frames without their captions or sample")
    return pictures


def chosen_scorers(scorers: Mapping[str, ScorerResult]) -> list[str]:
    """Labels of the scorers shown in detail, by mean AUROC: the best three, those recommended, and the best
    ``trajectory`` (the paper's score, with any options)."""
    ranked = [s for s in scorers.values() if s.all is not None and s.label != CONTROL]
    ranked.sort(key=lambda s: (-s.all.auroc if s.all else 0.0, s.label))
    labels = [s.label for s in ranked]
    papers = [label for label in labels if label.split(":")[0] == "trajectory"]
    wanted = {*labels[:3], *(found.scorer for found in RECOMMENDED.values()), *papers[:1]}
    return [label for label in labels if label in wanted]


# ---------------------------------------------------------------------------------------------- samples


def keep_pictures(
    autoencoder: Autoencoder,
    benchmark: Benchmark,
    table: pd.DataFrame,
    scorers: Mapping[str, ScorerResult],
    dictionary: AttractorDictionary | None,
    *,
    tol: float = 1e-5,
    max_steps: int = 500,
) -> Pictures:
    """Choose and render the pictures of a run for its report.

    This computes the paths of 28 images. Their length is limited to the 95 % quantile over the training images (without
    a dictionary, to 128 steps), because one path that does not converge would cost more than all the others.

    Args:
        autoencoder: the model of the run.
        benchmark: the sample that was run, from which images are read again by id.
        table: one row per scored image: split, role, id and a column per scorer label.
        scorers: results of the scorers, by which :func:`chosen_scorers` selects.
        dictionary: the attractors of the run; None: the plane is fitted to the starts.
        tol, max_steps: see :func:`traj_ood.iterate`; as in the run.
    Raises:
        TrajOODError: an image can no longer be read, or the table is of another benchmark.
    """
    album = Album(benchmark)
    mistakes = {label: _mistakes(table, label, album) for label in chosen_scorers(scorers)}
    rows = _path_rows(table)
    frame_rows = _frame_rows(rows)
    images = torch.stack([autoencoder.transform(album.load(split, i)) for split, _, i in rows])
    start = autoencoder.examine(images).latents
    plane = _plane(dictionary, start)
    decoded = tuple(autoencoder.decode(start[:1]).shape[1:])
    decodes = decoded == tuple(autoencoder.input_shape) and decoded[0] in (1, 3)
    tracer = _Tracer(plane, frame_rows if decodes else [])
    most = _STEPS_WITHOUT_DICTIONARY if dictionary is None else max(2, int(dictionary.steps.double().quantile(0.95)))
    limit = min(max_steps, most)
    walked = iterate(autoencoder.self_map, start, tol=tol, max_steps=limit, observers=[tracer], chunk=autoencoder.chunk)
    ended = zip(rows, walked.steps.tolist(), walked.status.tolist(), strict=True)
    paths, attractors = tracer.paths(len(rows)), plane.project(_drawn(dictionary, start))
    frames = _frames(autoencoder, images, frame_rows, tracer, walked, album) if decodes else ()
    return Pictures(
        plane=plane.kind,
        explained=plane.explained,
        samples=tuple(PathSample(*row, steps, status) for row, steps, status in ended),
        paths=paths,
        attractors=attractors,
        field=_vector_field(autoencoder, start, paths, attractors),
        frames=frames,
        no_frames="" if decodes else "the decoder of this model returns features of a backbone, not images",
        mistakes=mistakes,
        images=album.pngs,
    )


class Album:
    """Reads scored images of the benchmark by split and id, and stores small versions by key, each once."""

    def __init__(self, benchmark: Benchmark) -> None:
        self._images = {split.name: split.images for split in (benchmark.test, *benchmark.ood)}
        self._places = {name: {i: n for n, i in enumerate(images.ids)} for name, images in self._images.items()}
        self._keys: dict[tuple[str, str], str] = {}
        self.pngs: dict[str, bytes] = {}

    def load(self, split: str, image_id: str) -> Image.Image:
        if split not in self._places:
            raise TrajOODError(f"gallery: expected splits of the benchmark, got {split!r}; start the run again")
        if image_id not in self._places[split]:
            raise TrajOODError(f"gallery: split {split!r} has no image {image_id!r}; start the run again")
        return self._images[split].load(self._places[split][image_id])

    def original(self, split: str, image_id: str) -> str:
        """The key of the small version of an original image."""
        if (split, image_id) not in self._keys:
            self._keys[split, image_id] = self.add(self.load(split, image_id))
        return self._keys[split, image_id]

    def add(self, image: Image.Image) -> str:
        image.thumbnail((SIDE, SIDE), Image.Resampling.BOX)
        file = io.BytesIO()
        image.save(file, format="PNG", optimize=True)
        key = f"{len(self.pngs):03d}"
        self.pngs[key] = file.getvalue()
        return key


def _mistakes(table: pd.DataFrame, label: str, album: Album) -> dict[str, tuple[Mistake, ...]]:
    is_id = (table["role"] == "test").to_numpy()
    found = {}
    for side, part, sign in (("ood", table[~is_id], 1.0), ("id", table[is_id], -1.0)):
        worst = part.iloc[np.argsort(sign * part[label].to_numpy(), kind="stable")[:MISTAKES]]
        columns = (worst["split"], worst["role"], worst["id"], worst[label])
        found[side] = tuple(
            Mistake(split, role, i, float(score), album.original(split, i))
            for split, role, i, score in zip(*columns, strict=True)
        )
    return found


def _path_rows(table: pd.DataFrame) -> list[tuple[str, str, str]]:
    """Split, role and id of the samples whose paths are kept, from the ID test split and each OOD set, near sets first;
    evenly spread, as lists are often sorted by class."""
    ood = [part for _, part in table[table["role"] != "test"].groupby("split", sort=False)]
    each = max(1, _OOD_PATHS // len(ood))
    wanted = [(table[table["role"] == "test"], _ID_PATHS), *((part, each) for part in ood[:_OOD_PATHS])]
    chosen = pd.concat([part.iloc[_places(len(part), count)] for part, count in wanted])
    return [(str(split), str(role), str(i)) for split, role, i in chosen[["split", "role", "id"]].to_numpy()]


def _places(length: int, count: int) -> list[int]:
    """The centres of ``count`` equal intervals of ``length`` positions; all positions if there are fewer."""
    count = min(count, length)
    return [int((k + 0.5) * length / count) for k in range(count)]


def _frame_rows(rows: Sequence[tuple[str, str, str]]) -> list[int]:
    """Indices of three ID samples, and of three OOD samples from different sets."""
    known = [n for n, (_, role, _) in enumerate(rows) if role == "test"]
    first = {split: n for n, (split, role, _) in reversed(list(enumerate(rows))) if role != "test"}
    ood = sorted(first.values())
    return [*known[:_FRAME_SAMPLES], *(ood[k] for k in _places(len(ood), _FRAME_SAMPLES))]


# ---------------------------------------------------------------------------------------------- the plane


@dataclass(frozen=True)
class _Plane:
    """Two coordinates of a latent: (z − origin) · basisᵀ, in float64 on the CPU."""

    kind: PlaneKind
    origin: Tensor
    basis: Tensor
    explained: float

    def project(self, latents: Tensor) -> Floats:
        """Project latents (n, *L) to (n, 2); values beyond float32's range become NaN, which is not drawn."""
        flat = latents.flatten(1).cpu().double() - self.origin
        coordinates = (flat @ self.basis.T).to(torch.float32)
        return torch.where(coordinates.isfinite(), coordinates, torch.nan).numpy()


def _drawn(dictionary: AttractorDictionary | None, start: Tensor) -> Tensor:
    """(A, *L): at most 300 end points, evenly spread over the dictionary; A = 0 without one."""
    if dictionary is None or not bool((dictionary.statuses != Status.NON_FINITE).any()):
        return start[:0].cpu()
    points = dictionary.usable()
    count = min(_PLANE_POINTS, len(points))
    return points[[int(k * len(points) / count) for k in range(count)]]


def _plane(dictionary: AttractorDictionary | None, start: Tensor) -> _Plane:
    """The plane of a 2-D latent, else of the attractors, else (with fewer than three different ones) of the starts."""
    width = start[0].numel()
    if width == 2:
        return _Plane("latent", torch.zeros(2, dtype=torch.float64), torch.eye(2, dtype=torch.float64), 1.0)
    fitted = principal_plane(_drawn(dictionary, start))
    if fitted is not None:
        return _Plane("attractors", *fitted)
    fitted = principal_plane(start.cpu())
    nothing = (torch.zeros(width, dtype=torch.float64), torch.zeros(2, width, dtype=torch.float64), 0.0)
    return _Plane("starts", *(fitted or nothing))


def principal_plane(points: Tensor) -> tuple[Tensor, Tensor, float] | None:
    """Mean (d,), first two principal directions (2, d) and their share of the variance; None if the points (n, *L) do
    not span a plane.

    Computed from the Gram matrix: d is up to 151,296, n at most 300. The largest entry of a direction is positive.
    """
    if len(points) < 3:
        return None
    flat = points.flatten(1)
    origin = flat.double().mean(dim=0)
    blocks = [slice(i, i + 4096) for i in range(0, flat.shape[1], 4096)]  # a float64 copy of all would take 360 MB
    gram = sum((_centred(flat, origin, b) @ _centred(flat, origin, b).T for b in blocks), torch.zeros(()))
    values, vectors = torch.linalg.eigh(gram)
    if not bool(values[-2] > 1e-12 * values[-1].clamp(min=torch.finfo(torch.float64).tiny)):
        return None
    first = vectors[:, [-1, -2]]
    basis = torch.cat([_centred(flat, origin, b).T @ first for b in blocks]).T
    basis = basis / basis.norm(dim=1, keepdim=True)
    basis = basis * basis.gather(1, basis.abs().argmax(dim=1, keepdim=True)).sign()
    return origin, basis, float(values[-2:].sum() / values.clamp(min=0).sum())


def _centred(flat: Tensor, origin: Tensor, block: slice) -> Tensor:
    return flat[:, block].double() - origin[block]


class _Tracer:
    """Observer that records each point's position in the plane, and keeps the latents to be decoded."""

    name = "plane"

    def __init__(self, plane: _Plane, frame_rows: Sequence[int]) -> None:
        self._plane, self._frame_rows = plane, frame_rows
        self._points: list[tuple[Tensor, Tensor, Floats]] = []
        self.frames: dict[tuple[int, int], Tensor] = {}

    def observe(self, steps: Tensor, rows: Tensor, latents: Tensor) -> None:
        self._points.append((rows, steps, self._plane.project(latents)))
        for place, (row, step) in enumerate(zip(rows.tolist(), steps.tolist(), strict=True)):
            if step in FRAME_STEPS and row in self._frame_rows:
                self.frames[row, step] = latents[place].clone()

    def paths(self, count: int) -> Floats:
        """The recorded paths, (count, T+1, 2), NaN after the end of each."""
        width = max((int(steps.max()) + 1 for _, steps, _ in self._points), default=1)
        table = np.full((count, width, 2), np.nan, dtype=np.float32)
        for rows, steps, points in self._points:
            table[rows.numpy(), steps.numpy()] = points
        return table


def view_limits(paths: Floats, attractors: Floats) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The lower and upper corners, (2,) each, of the region to draw: everything, with a margin.

    The region extends at most three widths beyond the central 80 % of starts, ends and attractors, so that one
    diverging path does not shrink the others to a dot.
    """
    known = [path[np.isfinite(path).all(axis=1)].astype(np.float64) for path in (*paths, attractors)]
    marks = np.concatenate([known[-1], *(path[[0, -1]] for path in known[:-1] if len(path))])
    if not len(marks):
        return np.zeros(2), np.ones(2)
    every = np.concatenate(known)
    first, last = np.quantile(marks, [0.1, 0.9], axis=0)
    low = np.maximum(every.min(axis=0), first - 3 * (last - first))
    high = np.minimum(every.max(axis=0), last + 3 * (last - first))
    margin = 0.06 * np.maximum(high - low, 1e-9 + 1e-3 * np.max(high - low))
    return low - margin, high + margin


def _vector_field(model: Autoencoder, start: Tensor, paths: Floats, attractors: Floats) -> Floats:
    """(G, 4): z and f(z) − z on a grid over the drawn region; G = 0 unless the latent is 2-D (Fig. 1)."""
    if start[0].numel() != 2:
        return np.empty((0, 4), dtype=np.float32)
    axes = [np.linspace(a, b, _FIELD_SIDE) for a, b in zip(*view_limits(paths, attractors), strict=True)]
    grid = torch.from_numpy(np.stack(np.meshgrid(*axes), axis=-1).reshape(-1, 2)).float()
    with model.fixed(), torch.inference_mode():
        images = apply_in_chunks(model.self_map, grid.reshape(-1, *start.shape[1:]).to(start.device), model.chunk)
    moved = images.flatten(1).cpu() - grid
    whole = moved.isfinite().all(dim=1)
    return torch.cat([grid, moved], dim=1)[whole].numpy()


# ---------------------------------------------------------------------------------------------- frames


def _frames(
    model: Autoencoder, images: Tensor, rows: Sequence[int], tracer: _Tracer, walked: Trajectory, album: Album
) -> tuple[Frames, ...]:
    """The frames of each row: x, D(z_t) for steps t of the path, and D(z*), or D(z_N) if it did not converge."""
    channels = images.transpose(0, 1).flatten(1)
    limits = torch.stack([channels.amin(dim=1), channels.amax(dim=1)])  # drawn as black and as full brightness
    shown = []
    for row in rows:
        end = int(walked.steps[row])
        steps = [t for t in FRAME_STEPS if (row, t) in tracer.frames and t < end]
        latents = torch.stack([*(tracer.frames[row, t] for t in steps), walked.final[row]])
        pictures = [images[row], *model.decode(latents).cpu()]
        captions = ("x", *(f"D(z{t})" for t in steps), "D(z*)" if walked.converged[row] else f"D(z{end})")
        shown.append(Frames(row, captions, tuple(album.add(_to_image(p, limits)) for p in pictures)))
    return tuple(shown)


def _to_image(pixels: Tensor, limits: Tensor) -> Image.Image:
    """Convert pixels (C, H, W) in the model's units to an image; ``limits`` (2, C) map to 0 and 255, others are
    clipped."""
    low, high = (limit.reshape(-1, 1, 1) for limit in limits)
    return as_picture(((pixels - low) / (high - low).clamp(min=1e-12)).nan_to_num(nan=0.0, posinf=1.0, neginf=0.0))
