"""Export a detector to one file, which is compared with the detector before it is kept."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from traj_ood.data.decoding import AS_STORED
from traj_ood.data.preprocessing import Pixels, Preprocessing, as_pixels, prepare
from traj_ood.detector.decision import REASONS
from traj_ood.dynamics.fixed_function import few_images
from traj_ood.errors import TrajOODError, unknown_name
from traj_ood.export.check import ALLOWED, Agreement, agreement, real_images
from traj_ood.export.decisions import INVALID_CODE, OOD_CODE, Exportable
from traj_ood.export.formats import (
    FORMATS,
    INPUT,
    OUTPUT,
    OUTPUTS,
    Answerer,
    Format,
    check_ending,
    open_answers,
    write,
)
from traj_ood.graph import DetectorModule, as_module, reference
from traj_ood.io.files import write_atomic
from traj_ood.io.provenance import environment
from traj_ood.io.sealed import refuse_inside

SCHEMA = "traj_ood.export/2"
"""Version 2 added p-values and decisions to ONNX files; all metadata of version 1 are kept."""
_QUANTILES = 100


@dataclass(frozen=True)
class Exported:
    """An exported file."""

    path: Path
    size: int  # in bytes
    metadata: dict[str, Any]  # the JSON in the file, see :func:`describe`
    agreement: Agreement  # with the detector


def export_detector(
    detector: Exportable,
    path: str | Path,
    form: Format = "onnx",
    *,
    steps: int | None = None,
    images: Pixels | None = None,
) -> Exported:
    """Export a detector to one file that maps pixels (B, C, H, W) in [0, 1], B >= 1, to scores.

    The file computes :class:`DetectorModule`. An ONNX file of a calibrated detector also returns p-values and
    decisions (:class:`traj_ood.export.decisions.DecisionModule`), if it computes the calibrated score.

    Before it is kept, the file is run and compared with the detector at the same number of steps: its scores agree to
    1e-4, relative, on the compared images.

    Args:
        detector: a detector, or another object with one fitted scorer, its model on the CPU.
        path: the file; an existing one is replaced.
        form: ``onnx`` (default), for ONNX Runtime and other ONNX tools; contains no code. ``torch``: the format of
            ``torch.export.save``, for ``torch.export.load`` and AOTInductor. It contains tensors, a JSON graph and JSON
            metadata and no Python objects, but loading it can run pickle: never load such files from others.
        steps: see :func:`as_module`.
        images: images to compare on, at least one. Default: :func:`real_images`.
    Raises:
        TrajOODError: ``path`` has the ending of the other format or is inside a detector's folder, the scorer or model
            cannot be exported, a library is missing, the model is on another device, or scores disagree (nothing is
            written then).
    """
    if form not in FORMATS:
        raise unknown_name("export format", str(form), FORMATS)
    check_ending(Path(path), form)
    if detector.autoencoder.device.type != "cpu":
        raise TrajOODError(
            f"export: expected the model on the CPU, where graphs are recorded and compared, got "
            f"{detector.autoencoder.device}: use Detector.load(folder, device='cpu')"
        )
    refuse_inside(Path(path).parent)
    module = as_module(detector, steps)
    metadata = describe(detector, module, form)
    compared = real_images(detector.autoencoder) if images is None else _pixels(detector, images)
    found: list[Agreement] = []

    def write_and_check(file: BinaryIO) -> None:
        known = detector.calibration if metadata["calibration"] else None
        write(form, module, known, metadata, file)
        file.flush()
        found.append(_checked(detector, module, form, Path(file.name), compared))

    write_atomic(path, write_and_check)
    return Exported(Path(path), Path(path).stat().st_size, metadata, found[0])


def describe(detector: Exportable, module: DetectorModule, form: Format = "onnx") -> dict[str, Any]:
    """The metadata of an exported file, JSON data.

    ``calibration`` is None if the detector's threshold does not hold for the exported score
    (:attr:`DetectorModule.is_fitted`).
    """
    model, scorer, made = detector.autoencoder, module.scorer, environment()
    calibration = _calibration(detector) if module.is_fitted else None
    decides = form == "onnx" and calibration is not None
    return {
        "schema": SCHEMA,
        "input": {
            "name": INPUT,
            "dtype": "float32",
            "shape": ["batch", *module.preprocessing.shape],
            "batch": "1 or more",
            "range": [0, 1],
        },
        "preprocessing": _how(module.preprocessing),
        "reading": getattr(detector, "reading", AS_STORED).options(),  # of files: EXIF orientation, bit depth
        "output": {"name": OUTPUT, "dtype": "float64", "higher": "more OOD", "nan": "not an image in [0, 1]"},
        "scorer": {
            "label": scorer.label,
            "options": scorer.options(),
            "fitted": detector.scorers.labels[0],
            "is_fitted": module.is_fitted,  # false: the same scorer with other steps
        },
        "steps": module.steps,
        "tol": detector.scorers.tol,
        "model": {"name": model.name, "family": model.family, "fingerprint": model.fingerprint()},
        "calibration": calibration,
        "outputs": list(OUTPUTS if decides else OUTPUTS[:1]),
        "decisions": {str(code): reason for code, reason in enumerate(REASONS)} if decides else None,
        "versions": {key: made.get(key, "none") for key in ("traj_ood", "torch", "transformers", "timm")},
    }


def _calibration(detector: Exportable) -> dict[str, Any] | None:
    known = detector.calibration
    if known is None:
        return None
    shares = torch.linspace(0, 1, _QUANTILES + 1, dtype=torch.float64)
    quantiles = torch.quantile(known.scores, shares, interpolation="higher")
    return {
        "threshold": known.threshold,  # a score above it is OOD
        "tpr": known.tpr,
        "level": known.level,
        "images": len(known),
        "classes": list(known.names) or None,
        "quantiles": quantiles.tolist(),  # of ID scores at 0, 1, …, 100 %
    }


def _how(preprocessing: Preprocessing) -> dict[str, Any]:
    """How a caller prepares an image; mean and std apply to pixels in [0, 1]."""
    mean, std = preprocessing.affine
    return {
        "shape": list(preprocessing.shape),
        "mode": preprocessing.mode,
        "resize": preprocessing.resize,
        "filter": preprocessing.interpolation,
        "short_side": preprocessing.short_side,
        "offset": preprocessing.offset,
        "mean": list(mean),
        "std": list(std),
        "normalisation": "inside: give pixels in [0, 1]",
    }


def _pixels(detector: Exportable, images: Pixels) -> Tensor:
    """Images as (N, C, H, W) float32 pixels in [0, 1], resized and cropped."""
    preprocessing = detector.autoencoder.preprocessing
    assert preprocessing is not None  # as_module has checked it
    pixels = preprocessing.unnormalise(prepare(detector.autoencoder, images).cpu().double())
    return as_pixels(detector.autoencoder.name, pixels).clamp(0, 1)


def _checked(detector: Exportable, module: DetectorModule, form: Format, path: Path, images: Tensor) -> Agreement:
    answer, _ = open_answers(form, path)
    scorers = reference(detector.scorers, module.steps)

    def in_python(pixels: Tensor) -> Tensor:
        scores = scorers.score(pixels).scores[module.scorer.label]
        return torch.where(scores.isfinite(), scores, torch.inf)

    def in_few_rows(pixels: Tensor) -> Tensor:
        with few_images(len(pixels)) if module.scorer.bears_rounding else nullcontext():
            return in_python(pixels)

    found = agreement(lambda pixels: answer(pixels)[OUTPUT], in_python, in_few_rows, images)
    if not found.difference <= ALLOWED:
        raise TrajOODError(
            f"export: expected scores within {ALLOWED:g} (relative) of the detector's, got a difference of "
            f"{found.difference:.2g} over {found.images} images, so nothing was written: this score amplifies rounding "
            "on this model; use another scorer, fewer steps, or the detector in Python"
        )
    _check_decisions(detector, answer, images)
    return found


def _check_decisions(detector: Exportable, answer: Answerer, images: Tensor) -> None:
    """Check that the file's p-values and decisions are those of its scores, and that an invalid pixel is reported."""
    bad = images[:1].clone()
    bad[0, 0, 0, 0] = torch.nan
    outputs = answer(torch.cat([images, bad]))
    known = detector.calibration
    if known is None or OUTPUTS[1] not in outputs:
        return
    scores, p_values, decisions = (outputs[name] for name in OUTPUTS)
    same = torch.allclose(p_values[:-1], known.p_values(scores[:-1]), rtol=1e-12, atol=0)
    same &= torch.equal(decisions[:-1] == OOD_CODE, known.decide(scores[:-1]))
    if not same or int(decisions[-1]) != INVALID_CODE or not scores[-1].isnan():
        raise TrajOODError(
            "export: expected the p-values and decisions of the calibration, got others, so nothing was written: use "
            "--format torch, or the detector in Python"
        )
