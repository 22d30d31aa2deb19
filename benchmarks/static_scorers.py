"""knn and mahalanobis against OpenOOD's and pytorch-ood's own: python benchmarks/static_scorers.py
[--out results/benchmarks/static_scorers.json]

50,000 × 768 training features of 10 classes and 10,000 queries, half of them shifted (OOD): a Gaussian mixture of
decaying spectrum, as penultimate features have. Every package gets the same arrays, the same batches of queries and the
same number of threads. In every round each way fits and scores from the start, one way after the other; medians of the
rounds after a warm-up. What an index or an inverse is built from counts where the package builds it: this package
builds the index of knn at the first score. Seconds are CPU seconds.

Scores are brought to one meaning, a distance, before they are compared: OpenOOD's are negative squares, and
pytorch-ood's Mahalanobis is half a square without the division by N. The AUROC is of the shifted queries.

OpenOOD's own classes run where ``openood`` is importable, on a network that hands the features through (their setup
calls ``.cuda()``, which is answered on the CPU); elsewhere they are reported as absent. pytorch-ood likewise.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from traj_ood.evaluation.metrics import compute_metrics
from traj_ood.io.files import write_atomic
from traj_ood.io.provenance import environment, git_commit
from traj_ood.scorers import KNN, Evidence, Mahalanobis, Scorer

CLASSES = 10
Way = Callable[["Data"], tuple[float, float, Tensor]]
"""CPU seconds to fit, seconds to score, and (B,) float64 distances."""


class Data:
    """Training features (N, d) with labels, and queries (B, d), the second half of them shifted."""

    def __init__(self, train: int, queries: int, dimension: int, batch: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        spectrum = torch.arange(1, dimension + 1) ** -0.5
        means = 1.5 * torch.randn(CLASSES, dimension, generator=generator) * spectrum

        def draw(count: int) -> tuple[Tensor, Tensor]:
            labels = torch.arange(count) % CLASSES  # every class occurs
            return 1 + means[labels] + torch.randn(count, dimension, generator=generator) * spectrum, labels

        self.train, self.labels = draw(train)
        self.queries = draw(queries)[0]
        direction = torch.randn(dimension, generator=generator) * spectrum
        self.is_ood = torch.arange(queries) >= queries // 2
        self.queries[self.is_ood] += 0.3 * direction
        self.batches = self.queries.split(batch)


def timed(fit: Callable[[], Any], score: Callable[[Tensor], Tensor], data: Data) -> tuple[float, float, Tensor]:
    # CPU time of one thread hardly depends on what else the machine does; that of several says what they cost together.
    began = time.process_time()
    fit()
    fitted = time.process_time()
    scores = torch.cat([score(batch) for batch in data.batches])
    return fitted - began, time.process_time() - fitted, scores.double()


def ours(make: Callable[[], Scorer]) -> Way:
    def run(data: Data) -> tuple[float, float, Tensor]:
        scorer = make()
        train = Evidence(features={"mean": data.train}, labels=data.labels)
        return timed(lambda: scorer.fit(train), lambda x: scorer.score(Evidence(features={"mean": x})), data)

    return run


def pytorch_ood(name: str, distance: Callable[[Tensor, Data], Tensor], **options: Any) -> Way:
    def run(data: Data) -> tuple[float, float, Tensor]:
        detector = getattr(importlib.import_module("pytorch_ood.detector"), name)(None, **options)
        fit, score, scores = timed(
            lambda: detector.fit_features(data.train, data.labels), detector.predict_features, data
        )
        return fit, score, distance(scores, data)

    return run


class _Network(torch.nn.Module):
    """Features stand in for images; OpenOOD's postprocessors ask a network for them."""

    def forward(self, x: Tensor, return_feature: bool = False) -> Any:
        logits = x[:, :CLASSES]
        return (logits, x) if return_feature else logits


def _openood_module(name: str) -> ModuleType:
    """One postprocessor's own file. The package would import all of its 45, and what those need besides."""
    package = "openood.postprocessors"
    if package not in sys.modules:
        shell = ModuleType(package)
        shell.__path__ = [str(Path(importlib.import_module("openood").__path__[0]) / "postprocessors")]
        sys.modules[package] = shell
    return importlib.import_module(f"{package}.{name}")


def openood(module: str, name: str, **arguments: Any) -> Way:
    def run(data: Data) -> tuple[float, float, Tensor]:
        cls = getattr(_openood_module(module), name)
        config = importlib.import_module("openood.utils.config").Config
        settings = {"postprocessor_args": arguments, "postprocessor_sweep": {}}
        scorer = cls(config({"dataset": {"name": "cifar10"}, "postprocessor": settings}))
        size = len(data.batches[0])
        pairs = zip(data.train.split(size), data.labels.split(size), strict=True)
        loader = [{"data": x, "label": y} for x, y in pairs]
        net = _Network()
        with mock.patch.object(torch.Tensor, "cuda", lambda tensor, *_, **__: tensor):
            fit, score, confidence = timed(
                lambda: scorer.setup(net, {"train": loader}, {}), lambda x: scorer.postprocess(net, x)[1], data
            )
        return fit, score, (-confidence).clamp(min=0).sqrt()

    return run


def ways(k: int) -> dict[str, dict[str, Way]]:
    """Comparisons by name: package → way. The first is ours and what the others are compared with."""

    def plain(scores: Tensor, _: Data) -> Tensor:
        return scores

    def from_half_square(scores: Tensor, data: Data) -> Tensor:
        return (2 * len(data.train) * scores).sqrt()

    return {
        "knn": {
            "traj_ood": ours(lambda: KNN(k=k)),
            "openood": openood("knn_postprocessor", "KNNPostprocessor", K=k),
            "pytorch_ood": pytorch_ood("KNN", plain, k=k),
        },
        "mahalanobis:classes=true:covariance=empirical": {
            "traj_ood": ours(lambda: Mahalanobis(classes=True, covariance="empirical")),
            "openood": openood("mds_postprocessor", "MDSPostprocessor"),
            "pytorch_ood": pytorch_ood("Mahalanobis", from_half_square),
        },
        "mahalanobis": {"traj_ood": ours(Mahalanobis), "scikit-learn": scikit_learn},
    }


def scikit_learn(data: Data) -> tuple[float, float, Tensor]:
    """One Gaussian with scikit-learn's Ledoit–Wolf, which neither other package offers."""
    from sklearn.covariance import LedoitWolf

    estimate = LedoitWolf()
    return timed(
        lambda: estimate.fit(data.train.double().numpy()),
        lambda x: torch.from_numpy(estimate.mahalanobis(x.double().numpy())).sqrt(),
        data,
    )


MODULE = {"openood": "openood", "pytorch_ood": "pytorch_ood", "scikit-learn": "sklearn", "traj_ood": "traj_ood"}


def compare(packages: dict[str, Way], data: Data, rounds: int) -> dict[str, Any]:
    present = {name: way for name, way in packages.items() if importlib.util.find_spec(MODULE[name])}
    runs: dict[str, list[tuple[float, float, Tensor]]] = {name: [] for name in present}
    for number in range(rounds + 1):  # the first warms up
        for name, way in present.items():
            run = way(data)
            runs[name] += [run] if number else []
    expected = runs["traj_ood"][0][2]
    record: dict[str, Any] = {name: "absent" for name in packages if name not in present}
    for name, measured in runs.items():
        record[name] = {
            "fit_seconds": statistics.median(fit for fit, _, _ in measured),
            "score_seconds": statistics.median(score for _, score, _ in measured),
            "fit_and_score_seconds": statistics.median(fit + score for fit, score, _ in measured),
            "fit_and_score_seconds_fastest": min(fit + score for fit, score, _ in measured),
        } | agreement(measured[0][2], expected, data.is_ood)
    for name in runs:
        record[name]["times_of_ours"] = (
            record[name]["fit_and_score_seconds"] / record["traj_ood"]["fit_and_score_seconds"]
        )
    return record


def agreement(scores: Tensor, expected: Tensor, is_ood: Tensor) -> dict[str, float]:
    difference = (scores - expected).abs()
    values = [compute_metrics(s[~is_ood].numpy(), s[is_ood].numpy()).auroc for s in (scores, expected)]
    return {
        "max_absolute_difference": float(difference.max()),
        "max_relative_difference": float((difference / expected).max()),
        "auroc": values[0],
        "auroc_difference": abs(values[0] - values[1]),
    }


def version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/benchmarks/static_scorers.json"))
    parser.add_argument("--train", type=int, default=50_000)
    parser.add_argument("--queries", type=int, default=10_000)
    parser.add_argument("--dimension", type=int, default=768)
    parser.add_argument("--batch", type=int, default=200, help="queries per call; OpenOOD's loaders hand out 200")
    parser.add_argument("--k", type=int, default=50, help="OpenOOD's and pytorch-ood's default")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=ways(1), help="one comparison alone")
    arguments = parser.parse_args()
    if str(arguments.threads) != os.environ.get("OMP_NUM_THREADS"):
        # FAISS, NumPy's BLAS and scikit-learn read it once, when they are loaded
        os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
        os.execv(sys.executable, [sys.executable, *sys.argv])
    torch.set_num_threads(arguments.threads)
    data = Data(arguments.train, arguments.queries, arguments.dimension, arguments.batch, arguments.seed)
    record: dict[str, Any] = {
        name: compare(packages, data, arguments.rounds)
        for name, packages in ways(arguments.k).items()
        if arguments.only in (None, name)
    }
    record["command"] = " ".join(["python", "benchmarks/static_scorers.py", *sys.argv[1:]])
    record["settings"] = {k: str(v) for k, v in vars(arguments).items() if k != "out"}
    names = ("openood", "pytorch-ood", "scikit-learn")
    record["versions"] = environment() | {name: version(name) for name in names}
    record["commit"] = git_commit(Path(__file__).parent)
    write_atomic(arguments.out, (json.dumps(record, indent=2, sort_keys=True) + "\n").encode())
    print(json.dumps(record, indent=2, sort_keys=True))


if __name__ == "__main__":
    main()
