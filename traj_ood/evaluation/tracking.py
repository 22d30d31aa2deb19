"""Log finished runs to an experiment tracker: MLflow, Weights & Biases or TensorBoard.

The run's folder is complete without it; a tracker gets the values of ``result.json`` after the run. A tracker is
specified as ``kind:target``:

    mlflow:FOLDER or mlflow:http://…   an experiment named after the benchmark, with a run of the same name
    wandb:PROJECT                      offline unless WANDB_MODE is set
    tensorboard:FOLDER                 event files below FOLDER/<run>

"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

from traj_ood.errors import TrajOODError, foreign_errors, unknown_name
from traj_ood.evaluation.metrics import METRIC_NAMES
from traj_ood.evaluation.results import REGIONS, Result

_INVALID = re.compile(r"[^\w ./-]")  # characters that MLflow does not accept in names


Tracker: TypeAlias = Callable[[str, str, dict[str, str], dict[str, float], Path], None]
"""Logs a finished run: its name and benchmark, settings as text, fractions by ``scorer/region/metric``, and its folder,
of which result.json becomes an artifact."""


def tracker(spec: str) -> Tracker:
    """Create the tracker ``kind:target``, before anything is computed.

    Raises:
        TrajOODError: the kind is unknown (similar ones are suggested), the target is missing, or the library is not
            installed.
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
    """Log a finished run in ``folder`` to a tracker.

    Raises:
        TrajOODError: the tracker raised an error.
    """
    config = {f"config.{key}": value for key, value in result.config.items() if not isinstance(value, list | dict)}
    facts = {"benchmark": result.benchmark, "model": result.model["name"], "seed": result.seed, "commit": result.commit}
    params = {key: str(value)[:250] for key, value in {**facts, **config}.items() if value is not None}
    with foreign_errors(f"{folder}: the run is finished, but could not be logged", "; its files are complete"):
        to(result.name, result.benchmark, params, figures(result), folder)


def figures(result: Result) -> dict[str, float]:
    """All means of all scorers, fractions by ``scorer/region/metric``; and whether the attractors are healthy."""
    found = {
        f"{label}/{region}/{name}": float(getattr(mean, name))
        for label, scorer in result.scorers.items()
        for region in REGIONS
        if (mean := getattr(scorer, region)) is not None
        for name in METRIC_NAMES
    }
    return {**found, "attractors/healthy": float(result.dictionary["healthy"])}


def _mlflow(target: str) -> Tracker:
    import mlflow
    from mlflow.entities import Metric, Param

    local = re.match(r"\w+:", target) is None
    if local:  # MLflow prefers databases, and refuses folders without this variable
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
    client = mlflow.MlflowClient(Path(target).absolute().as_uri() if local else target)

    def log(run: str, group: str, params: dict[str, str], metrics: dict[str, float], folder: Path) -> None:
        known = client.get_experiment_by_name(group)
        experiment = client.create_experiment(group) if known is None else known.experiment_id
        made = client.create_run(experiment, run_name=run).info.run_id
        values = [Metric(_INVALID.sub("_", key), value, 0, 0) for key, value in metrics.items()]
        for start in range(0, len(values), 500):  # at most 1,000 per request
            client.log_batch(made, metrics=values[start : start + 500])
        client.log_batch(made, params=[Param(_INVALID.sub("_", key), value) for key, value in params.items()])
        client.log_artifact(made, str(folder / "result.json"))
        client.set_terminated(made)

    return log


def _wandb(target: str) -> Tracker:
    import wandb

    def log(run: str, group: str, params: dict[str, str], metrics: dict[str, float], folder: Path) -> None:
        mode: Any = os.environ.get("WANDB_MODE", "offline")
        made = wandb.init(project=target, name=run, group=group, config=params, mode=mode)
        made.summary.update(metrics)
        made.save(str(folder / "result.json"), base_path=str(folder), policy="now")
        made.finish()

    return log


def _tensorboard(target: str) -> Tracker:
    from torch.utils.tensorboard import SummaryWriter

    def log(run: str, group: str, params: dict[str, str], metrics: dict[str, float], folder: Path) -> None:
        with SummaryWriter(str(Path(target) / run)) as writer:
            for key, value in metrics.items():
                writer.add_scalar(key, value)
            writer.add_text("params", "\n".join(f"- {key}: {value}" for key, value in params.items()))

    return log


TRACKERS: dict[str, tuple[str, Callable[[str], Tracker]]] = {
    "mlflow": ("mlflow-skinny", _mlflow),
    "wandb": ("wandb", _wandb),
    "tensorboard": ("tensorboard", _tensorboard),
}
"""Library, and the function that creates the tracker for a target, by kind."""
