"""Write and read the folder of a detector; everything in it is verified before use.

The folder contains detector.json (the record and the seal), README.md, model/ (see :mod:`traj_ood.detector.packing`),
scorer.safetensors, training.safetensors (digests of the training images), and, if the detector has them,
attractors.safetensors and calibration.safetensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from traj_ood.attractors import AttractorDictionary
from traj_ood.autoencoders import Autoencoder
from traj_ood.backbones.packing import check_same
from traj_ood.detector.card import card
from traj_ood.detector.conformal import Calibration
from traj_ood.detector.origins import check_origin, origin
from traj_ood.detector.packing import pack, unpack
from traj_ood.detector.probe import check_probe, probe
from traj_ood.detector.scorer import forget_fit, one_scorer
from traj_ood.detector.tensors import check_tensors, read_column, specs_of
from traj_ood.dynamics.device import resolve_device
from traj_ood.errors import TrajOODError, warn
from traj_ood.io.files import write_atomic
from traj_ood.io.provenance import environment
from traj_ood.io.sealed import DETECTOR, FILE_NAME, open_sealed, refuse_inside, replaced_folder, seal
from traj_ood.io.tensor_file import write_tensors
from traj_ood.io.trees import as_json, field_of
from traj_ood.scorers.base import spec_text
from traj_ood.scorers.scorer_set import ScorerSet

SCHEMA = f"{DETECTOR}/2"
"""Version 2 added class-wise calibration and the history of calibrations; version 1 can be read."""
_SCORER, _ATTRACTORS, _CALIBRATION, _TRAINING = (
    f"{name}.safetensors" for name in ("scorer", "attractors", "calibration", "training")
)
_MODEL, _CARD = "model", "README.md"
KNOWN_FILES = (FILE_NAME, _SCORER, _ATTRACTORS, _CALIBRATION, _TRAINING, _MODEL, _CARD)
_COMPARED = ("traj_ood", "torch", "torchvision", "transformers", "timm", "numpy", "faiss")


def write_detector(
    folder: Path,
    overwrite: bool,
    *,
    scorers: ScorerSet,
    training: Mapping[str, Any],
    seen: Tensor,
    calibration: Calibration | None,
    history: Sequence[Mapping[str, Any]],
) -> None:
    """Write the parts of a detector to ``folder``, replacing one that is there; see :meth:`traj_ood.Detector.save`."""
    refuse_inside(folder.expanduser().absolute().parent)
    with replaced_folder(folder, FILE_NAME, KNOWN_FILES, overwrite) as fresh:
        tensors = {_SCORER: scorers.scorers[0].state, _TRAINING: {"digests": seen}}
        scorers.scorers[0].save(fresh / _SCORER)
        write_tensors(fresh / _TRAINING, tensors[_TRAINING])
        if calibration is not None:
            tensors[_CALIBRATION] = {"scores": calibration.scores}
            if calibration.classes is not None:
                tensors[_CALIBRATION]["classes"] = calibration.classes
            write_tensors(fresh / _CALIBRATION, tensors[_CALIBRATION])
        if scorers.dictionary is not None:
            tensors[_ATTRACTORS] = scorers.dictionary.tensors()
            scorers.dictionary.save(fresh / _ATTRACTORS)
        record = {
            **_record(scorers, calibration),
            "training": dict(training),
            "history": [dict(entry) for entry in history],
            "model": {
                **pack(scorers.autoencoder, fresh / _MODEL),
                "parameters": scorers.autoencoder.parameter_count(),
                **origin(scorers.autoencoder),
            },
            "tensors": {file: specs_of(content) for file, content in tensors.items()},
        }
        write_atomic(fresh / _CARD, card(record).encode())
        seal(fresh, FILE_NAME, record)


def _record(scorers: ScorerSet, known: Calibration | None) -> dict[str, Any]:
    scorer = scorers.scorers[0]
    return {
        "schema": SCHEMA,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "scorer": {
            "name": scorer.name,
            "label": scorer.label,
            "summary": scorer.summary,
            "options": scorer.options(),
            "steps": min(scorers.needs.steps, scorers.max_steps),
            **origin(scorer),
        },
        "settings": {
            "tol": float(scorers.tol),
            "max_steps": scorers.max_steps,
            "backend": scorers.backend,
            "approximate": scorers.approximate,
        },
        "calibration": None
        if known is None
        else {
            "images": len(known),
            "tpr": float(known.tpr),
            "threshold": known.threshold,
            "level": known.level,
            "acceptance": list(known.acceptance()),
            "classes": _classes(known),
        },
        "probe": probe(scorers),
        "versions": environment(),
    }


def _classes(known: Calibration) -> list[dict[str, Any]] | None:
    if known.classes is None:
        return None
    return [
        {"name": name, "images": len(group), "threshold": group.threshold}
        for name, group in zip(known.names, known.groups, strict=True)
    ]


def read_detector(folder: Path, device: str, autoencoder: Autoencoder | None, compile: bool) -> dict[str, Any]:
    """The parts of the detector in ``folder``, as of :func:`write_detector`; see :meth:`traj_ood.Detector.load`."""
    record = open_sealed(folder, FILE_NAME, SCHEMA)
    where = str(folder / FILE_NAME)
    described = field_of(record, "model", dict, where)
    if autoencoder is None:
        check_origin(described, str(described.get("kind")), "model family", where)
        model = unpack(described, folder / _MODEL, resolve_device(device))
    else:
        check_same(described, autoencoder, where)
        model = autoencoder if device == "auto" else autoencoder.to(resolve_device(device))
    stored = field_of(record, "tensors", dict, where)
    scorers = _scorer(model, record, stored, folder, compile)
    parts: dict[str, Any] = {
        "scorers": scorers,
        "training": field_of(record, "training", dict, where),
        "seen": read_column(folder / _TRAINING, stored, "digests", torch.int64),
        "calibration": _calibration(record, stored, folder),
        "history": _history(record, where),
    }
    check_probe(scorers, field_of(record, "probe", dict, where), where)
    _compare_versions(field_of(record, "versions", dict, where), folder)
    _warn_of_attractors(parts["training"], folder)
    return parts


def _scorer(
    model: Autoencoder, record: Mapping[str, Any], stored: Mapping[str, Any], folder: Path, compile: bool
) -> ScorerSet:
    """The fitted scorer, with its attractors if it measures distances to them."""
    where = str(folder / FILE_NAME)
    settings, facts = (field_of(record, key, dict, where) for key in ("settings", "scorer"))
    options = field_of(facts, "options", dict, where)
    # All options are given, because the default view of a static scorer depends on the model.
    name = field_of(facts, "name", str, where)
    check_origin(facts, name, "scorer", where)
    spec = spec_text(name, options)
    scorers = one_scorer(
        model,
        spec,
        field_of(settings, "tol", float, where),
        field_of(settings, "max_steps", int, where),
        field_of(settings, "backend", str, where),  # type: ignore[arg-type]
        field_of(settings, "approximate", str, where),  # type: ignore[arg-type]
        compile,
    )
    scorer = scorers.scorers[0]
    if as_json(scorer.options()) != options:
        raise TrajOODError(f"{where}: options of {scorer.name}: expected {scorer.options()}, got {options}: damaged")
    scorer.load(folder / _SCORER)
    check_tensors(folder / _SCORER, scorer.state, stored)
    forget_fit(scorers)
    if scorers.needs.distances:
        dictionary = AttractorDictionary.load(folder / _ATTRACTORS)
        # Residuals of diverging trajectories are NaN.
        check_tensors(folder / _ATTRACTORS, dictionary.tensors(), stored, finite=False)
        scorers.attach(dictionary)
    return scorers


def read_calibration(folder: Path) -> Calibration:
    """Read only the calibration of a detector's folder, without loading its model."""
    record = open_sealed(folder, FILE_NAME, SCHEMA)
    found = _calibration(record, field_of(record, "tensors", dict, str(folder / FILE_NAME)), folder)
    if found is None:
        raise TrajOODError(
            f"{folder}: expected a calibrated detector, got one without threshold: use traj-ood calibrate"
        )
    return found


def _calibration(record: Mapping[str, Any], stored: Mapping[str, Any], folder: Path) -> Calibration | None:
    where = str(folder / FILE_NAME)
    if ("calibration" not in record) or (record["calibration"] is None) == (folder / _CALIBRATION).is_file():
        raise TrajOODError(f"{where}: expected calibration, as {_CALIBRATION} is there or not: damaged; fit it again")
    if record["calibration"] is None:
        return None
    facts = field_of(record, "calibration", dict, where)
    scores = read_column(folder / _CALIBRATION, stored, "scores", torch.float64)
    tpr = field_of(facts, "tpr", float, where)
    if facts.get("classes") is None:  # as in all folders of version 1
        calibration = Calibration(scores, tpr)
    else:
        classes = read_column(folder / _CALIBRATION, stored, "classes", torch.int64)
        listed = field_of(facts, "classes", list, where)
        names = tuple(field_of(entry, "name", str, where) for entry in listed if isinstance(entry, dict))
        calibration = Calibration(scores, tpr, classes, names)
    if calibration.threshold != field_of(facts, "threshold", float, where):
        raise TrajOODError(
            f"{folder / _CALIBRATION}: its threshold is {calibration.threshold!r}, but {FILE_NAME} says "
            f"{facts['threshold']!r}: damaged"
        )
    return calibration


def _history(record: Mapping[str, Any], where: str) -> list[Mapping[str, Any]]:
    """The history; for version 1, its one calibration, dated by the time of saving."""
    if "history" in record:
        entries = field_of(record, "history", list, where)
        if not all(isinstance(entry, dict) for entry in entries):
            raise TrajOODError(f"{where}: history: expected a table for each calibration: damaged")
        return entries
    facts = record["calibration"]
    if facts is None:
        return []
    kept = {key: facts[key] for key in ("images", "tpr", "threshold")}
    return [{"at": field_of(record, "created", str, where), **kept, "classes": None, "note": ""}]


def _warn_of_attractors(training: Mapping[str, Any], folder: Path) -> None:
    """Repeat the warning given by ``fit``, which the user who loads the detector may not have seen."""
    health = training.get("attractors")
    if isinstance(health, dict) and health.get("healthy") is False:
        reasons = "; ".join(map(str, field_of(health, "warnings", list, str(folder / FILE_NAME))))
        warn(f"{folder}: fitted on unhealthy attractors, its scores may mean nothing: {reasons}", stacklevel=4)


def _compare_versions(stored: Mapping[str, Any], folder: Path) -> None:
    """Warn of libraries whose major or minor version differs; the probe has shown that results agree."""
    own = environment()

    def release(version: object) -> list[str]:
        return str(version).split("+")[0].split(".")[:2]

    changed = [k for k in _COMPARED if k in stored and k in own and release(stored[k]) != release(own[k])]
    if changed:
        text = ", ".join(f"{k} {str(stored[k])[:20]} (here {own[k]})" for k in changed)
        warn(
            f"{folder}: saved with {text}: its results on two test images agree, others may differ slightly",
            stacklevel=4,
        )
