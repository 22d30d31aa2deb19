"""A finished run in an experiment tracker: MLflow, Weights & Biases or TensorBoard, each behind :class:`Tracker`.

Nothing of a run depends on it: the folder holds everything, and a tracker gets the figures of ``result.json`` when the
run is over. A tracker is named ``kind:target``:

    mlflow:FOLDER or mlflow:http://…   an experiment named after the benchmark, a run after the run
    wandb:PROJECT                      offline unless WANDB_MODE says otherwise
    tensorboard:FOLDER                 event files below FOLDER/<run>

"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from traj_ood.errors import TrajOODError, foreign_errors, unknown_name
from traj_ood.evaluation.metrics import METRIC_NAMES
from traj_ood.evaluation.results import Result

_MEANS = ("near", "far", "all")
_WRONG = re.compile(r"[^\w ./-]")  # what MLflow refuses in a name; the others take less


class Tracker(Protocol):
    """Where a run is told of. ``params`` are texts, ``metrics`` fractions by ``scorer/region/metric``."""

    def log(self, run: str, group: str, params: Mapping[str, str], metrics: Mapping[str, float], folder: Path) -> None:
        """Tell of one finished run; ``folder`` holds its files, of which result.json is kept as an artifact."""


def tracker(spec: str) -> Tracker:
    """The tracker ``kind:target``, checked before anything is computed.

    Raises:
        TrajOODError: an unknown kind (with near ones), no target, or a library that is not installed.
    """
    kind, _, target = spec.partition(":")
    if kind not in TRACKERS:
        raise unknown_name("tracker", kind, TRACKERS)
    if not target:
        raise TrajOODError(f"--log {spec!r}: expected {kind}:TARGET, such as {kind}:runs/{kind}")
    library, make = TRACKERS[kind]
    with foreign_errors(f"--log {spec}: {library} cannot be used", f": pip install {library}"):
        return make(target)


def log_result(result: Result, folder: Path, to: Tracker) -> None:
    """Tell a tracker of a finished run in ``folder``.

    Raises:
        TrajOODError: whatever the tracker raises.
    """
    config = {f"config.{key}": value for key, value in result.config.items() if not isinstance(value, list | dict)}
    facts = {"benchmark": result.benchmark, "model": result.model["name"], "seed": result.seed, "commit": result.commit}
    params = {key: str(value)[:250] for key, value in {**facts, **config}.items() if value is not None}
    with foreign_errors(f"{folder}: the run is finished, but could not be logged", "; its files are complete"):
        to.log(result.name, result.benchmark, params, figures(result), folder)


def figures(result: Result) -> dict[str, float]:
    """Every mean of every scorer by ``scorer/region/metric``, fractions; and whether the attractors are healthy."""
    found = {
        f"{label}/{region}/{name}": float(getattr(mean, name))
        for label, scorer in result.scorers.items()
        for region in _MEANS
        if (mean := getattr(scorer, region)) is not None
        for name in METRIC_NAMES
    }
    return {**found, "attractors/healthy": float(result.dictionary["healthy"])}


class _MLflow:
    def __init__(self, target: str) -> None:
        import mlflow

        local = re.match(r"\w+:", target) is None
        if local:  # MLflow would rather have a database, and refuses folders unless it is told
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        self._client = mlflow.MlflowClient(Path(target).absolute().as_uri() if local else target)

    def log(self, run: str, group: str, params: Mapping[str, str], metrics: Mapping[str, float], folder: Path) -> None:
        from mlflow.entities import Metric, Param

        known = self._client.get_experiment_by_name(group)
        experiment = self._client.create_experiment(group) if known is None else known.experiment_id
        made = self._client.create_run(experiment, run_name=run).info.run_id
        values = [Metric(_WRONG.sub("_", key), value, 0, 0) for key, value in metrics.items()]
        for start in range(0, len(values), 500):  # at most 1,000 a request
            self._client.log_batch(made, metrics=values[start : start + 500])
        self._client.log_batch(made, params=[Param(_WRONG.sub("_", key), value) for key, value in params.items()])
        self._client.log_artifact(made, str(folder / "result.json"))
        self._client.set_terminated(made)


class _WandB:
    def __init__(self, target: str) -> None:
        import wandb

        self._wandb, self._project = wandb, target

    def log(self, run: str, group: str, params: Mapping[str, str], metrics: Mapping[str, float], folder: Path) -> None:
        mode: Any = os.environ.get("WANDB_MODE", "offline")
        made = self._wandb.init(project=self._project, name=run, group=group, config=dict(params), mode=mode)
        made.summary.update(dict(metrics))
        made.save(str(folder / "result.json"), base_path=str(folder), policy="now")
        made.finish()


class _TensorBoard:
    def __init__(self, target: str) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer, self._target = SummaryWriter, Path(target)

    def log(self, run: str, group: str, params: Mapping[str, str], metrics: Mapping[str, float], folder: Path) -> None:
        with self._writer(str(self._target / run)) as writer:
            for key, value in metrics.items():
                writer.add_scalar(key, value)
            writer.add_text("params", "\n".join(f"- {key}: {value}" for key, value in params.items()))


TRACKERS: dict[str, tuple[str, Callable[[str], Tracker]]] = {
    "mlflow": ("mlflow-skinny", _MLflow),
    "wandb": ("wandb", _WandB),
    "tensorboard": ("tensorboard", _TensorBoard),
}
"""Library and class by kind."""
