"""The table of docs/performance.md, from the records in results/benchmarks/: python benchmarks/performance_table.py

What no record holds yet is named "not recorded". Ratios are of one run each, so that they can be compared between
machines; seconds and megabytes belong to the machine of their record.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from traj_ood.evaluation.text_tables import put_between_markers

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "performance.md"
RECORDS = ROOT / "results" / "benchmarks"
NOT_YET = "not recorded"

Record = Mapping[str, Any]
Read = Callable[[Record], str]


@dataclass(frozen=True)
class Row:
    """One figure: what it is, what is aimed at, the record that holds it, and how it is read there."""

    what: str
    aim: str
    record: str
    read: Read


def at(*path: str) -> Callable[[Record], float]:
    """The number in a record at this path."""

    def find(record: Record) -> float:
        value: Any = record
        for key in path:
            value = value[key]
        return float(value)

    return find


def share(*path: str) -> Read:
    return lambda record: f"{at(*path)(record):.1%}".replace("%", " %")


def times(*path: str) -> Read:
    return lambda record: f"{at(*path)(record):.2f} ×"


def inverse(*path: str, digits: int = 2) -> Read:
    return lambda record: f"{1 / at(*path)(record):.{digits}f} ×"


def both(form: str, *paths: tuple[str, ...]) -> Read:
    return lambda record: form.format(*(at(*path)(record) for path in paths)).replace("%", " %")


def earned(record: Record) -> str:
    rows = record["compiled"]["rows_to_earn_it_back"]
    return f"{at('compiled', 'compile_seconds')(record):.0f} s, {'never' if rows is None else f'{rows:,.0f}'}"


def growth(record: Record) -> str:
    steep = record["faster_than_linear"]
    return "; ".join(steep) if steep else "nothing"


_BENCH = "bench fashion --quick"
_MDS = "mahalanobis:classes=true:covariance=empirical"
_ONE = "one image"
ROWS = [
    Row(
        f"rows of f that belong to a running sample, `{_BENCH}`",
        "≥ 95 %",
        "streaming",
        share("share_of_rows_used"),
    ),
    Row(
        "CPU time of that bench over that of its matrix products alone",
        "≤ 1.8 ×",
        "streaming",
        times("ratios", f"{_BENCH}: time over that of its products"),
    ),
    Row(
        "a step in the engine, with residuals, stopping and distances to 2,000 attractors, over a bare loop of f",
        "",
        "engine",
        times("overhead", "engine_over_fastest_bare_loop"),
    ),
    Row(
        "scoring the naive way (the slowest sample decides, paths kept, `torch.cdist`) over the engine: time, memory",
        "",
        "engine",
        both("{:.1f} ×, {:.1f} ×", ("naive_over_engine", "seconds"), ("naive_over_engine", "peak_memory")),
    ),
    Row(
        "distances' share of a step at ViT-MAE base's geometry, 2,000 × 151,296 attractors: 32 images, 8 images",
        "",
        "engine",
        both(
            "{:.1%}, {:.1%}",
            ("base_geometry", "32_images", "distances_share_of_step"),
            ("base_geometry", "8_images", "distances_share_of_step"),
        ),
    ),
    Row("peak memory of that process", "≤ 4.5 GB", "engine", both("{:.1f} GB", ("base_geometry", "peak_memory_gb"))),
    Row(
        "chunks of the bundled model's f side by side over one after another: alone, and beside a busy process a core",
        "",
        "engine",
        both("{:.2f} ×, {:.2f} ×", ("side_by_side", "alone"), ("side_by_side", "beside_busy_processes")),
    ),
    Row("the bundled model's f through `torch.compile` over f", "", "engine", times("compiled", "compiled_over_plain")),
    Row(
        "seconds to compile it, and rows of f after which they are earned back",
        "",
        "engine",
        earned,
    ),
    Row("every scorer over the dearest alone", "≤ 1.10 ×", "all_scorers", times("all_over_dearest")),
    Row(
        "KNN, k = 50, over OpenOOD's: 50,000 × 768, 10,000 queries in one call",
        "≤ 0.95 ×",
        "static_scorers",
        inverse("knn", "openood", "times_of_ours"),
    ),
    Row("the same over pytorch-ood's", "", "static_scorers", inverse("knn", "pytorch_ood", "times_of_ours")),
    Row(
        "the same over OpenOOD's, in calls of 200 queries",
        "",
        "static_scorers_batch200",
        inverse("knn", "openood", "times_of_ours"),
    ),
    Row(
        "Mahalanobis, 10 classes, over pytorch-ood's",
        "≤ 0.45 ×",
        "static_scorers",
        inverse(_MDS, "pytorch_ood", "times_of_ours"),
    ),
    Row("the same over OpenOOD's", "", "static_scorers", inverse(_MDS, "openood", "times_of_ours", digits=3)),
    Row(
        "`Detector.score`, one image, one core, `field`: median, 95th percentile",
        "≤ 8 ms, ≤ 12 ms",
        "latency",
        both("{:.1f} ms, {:.1f} ms", (_ONE, "Detector.score", "median_ms"), (_ONE, "Detector.score", "p95_ms")),
    ),
    Row(
        "`as_module`, and the ONNX file in ONNX Runtime, one image",
        "≤ 6 ms, ≤ 3 ms",
        "latency",
        both("{:.1f} ms, {:.1f} ms", (_ONE, "as_module", "median_ms"), (_ONE, "ONNX Runtime", "median_ms")),
    ),
    Row(
        "`traj-ood score DETECTOR one.png`, cold: wall time, peak memory",
        "≤ 2.5 s, ≤ 550 MB",
        "latency",
        both(
            "{:.1f} s, {:.0f} MB",
            ("cold start", "traj-ood score", "seconds"),
            ("cold start", "traj-ood score", "peak_mb"),
        ),
    ),
    Row(
        "`import torch` alone, beside it",
        "",
        "latency",
        both(
            "{:.1f} s, {:.0f} MB", ("cold start", "import torch", "seconds"), ("cold start", "import torch", "peak_mb")
        ),
    ),
    Row(
        "EfficientNet-Lite0's features, the way chosen: speed over that of the fastest way",
        "≥ 0.9 ×",
        "latency",
        inverse("ratios", "features: the way chosen over the fastest"),
    ),
    Row(
        "`score` on JPEG files of 500 px: speed over that of the slower of reading and the network, alone",
        "≥ 0.9 ×",
        "latency",
        inverse("ratios", "score on JPEG files over the slower of reading and the network"),
    ),
    Row("what grows faster than linear", "", "scaling", growth),
    Row(
        "a surrogate on 50,000 × 2,048 features: CPU seconds to train",
        "",
        "surrogate_training",
        both("{:.0f} s", ("training", "seconds")),
    ),
]


def table(records: Path = RECORDS) -> str:
    """Markdown of all rows, with what the records in this folder say."""
    held = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in records.glob("*.json")}
    lines = ["| what | of interest | measured | record |", "|---|--:|--:|---|"]
    for row in ROWS:
        found, link = NOT_YET, ""
        if row.record in held:
            link = f"[{row.record}](../results/benchmarks/{row.record}.json)"
            try:
                found = row.read(held[row.record])
            except (KeyError, TypeError):  # of an older script, or of something that was absent then
                found = NOT_YET
        lines.append(f"| {row.what} | {row.aim} | {found} | {link} |")
    return "\n".join(lines)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    made = table()
    put_between_markers(PAGE, "table", made)
    print(made)


if __name__ == "__main__":
    main()
