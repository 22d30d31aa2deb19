"""How soon does the monitor see a change, and how often does it cry wolf?

    python benchmarks/monitoring.py                 # about three minutes on one core
    python benchmarks/monitoring.py --tiny          # a rehearsal of seconds

Streams of scores are drawn: 2,000 calibration scores and ID images are standard normal, OOD images normal with mean 3,
of which 9 % score below the threshold of 95 %. A change comes after 0, 1,000 or 5,000 ID images. ``monitor`` is
:func:`traj_ood.monitor.watch` with its defaults (1 % false alarms, ever); ``martingale`` and ``windows`` are its
halves; ``simple jumper`` is the plain one of Vovk et al. 2021 (three linear bets, no restarts) at the martingale's
level. Beside them the detectors of river, where it is installed, which say nothing of a stream's whole length, on the
split-conformal p-values, with their own defaults, warmed up with the calibration's; and evidently's test of one window,
at its own level for each, where that is installed. Writes results/benchmarks/monitoring.json.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from traj_ood.detector.conformal import Calibration
from traj_ood.io.provenance import environment, git_commit
from traj_ood.monitor import BETS, capitals, online_p_values
from traj_ood.monitor.watch import martingale_alarm, windows_alarm

OUT = Path(__file__).parents[1] / "results" / "benchmarks" / "monitoring.json"
CALIBRATION, AFTER, LEVEL, WINDOW = 2000, 5000, 0.005, 200
Floats = NDArray[np.float64]
CHANGES: dict[str, Callable[[np.random.Generator, int], Floats]] = {
    "1 % OOD": lambda draw, n: _mixed(draw, n, 0.01),
    "5 % OOD": lambda draw, n: _mixed(draw, n, 0.05),
    "20 % OOD": lambda draw, n: _mixed(draw, n, 0.20),
    "all OOD": lambda draw, n: _mixed(draw, n, 1.0),
    "all scores 0.3 sigma higher": lambda draw, n: draw.normal(0.3, 1, n),
    "all scores half as wide": lambda draw, n: draw.normal(0, 0.5, n),
}
RIVER = ("ADWIN", "KSWIN", "PageHinkley")


def _mixed(draw: np.random.Generator, count: int, share: float) -> Floats:
    return np.where(draw.random(count) < share, draw.normal(3, 1, count), draw.normal(0, 1, count))


Alarms = dict[str, list[int | None]]
"""Scored images until each test's alarm in each stream, None without one."""


def alarms(calibration: Floats, scores: Floats) -> Alarms:
    """Of R streams at once: calibration scores (n, R) and scores (T, R)."""
    streams = range(scores.shape[1])
    p_values = np.stack([online_p_values(calibration[:, r], scores[:, r], r) for r in streams], axis=1)
    linear = {name: BETS[name] for name in ("nothing", "higher", "lower")}
    ours, plain = capitals(p_values), capitals(p_values, linear, restarts=False)
    found = {
        "martingale": [martingale_alarm(ours[:, r], LEVEL) for r in streams],
        "windows": [windows_alarm(calibration[:, r], scores[:, r], WINDOW, LEVEL) for r in streams],
        "simple jumper": [martingale_alarm(plain[:, r], LEVEL) for r in streams],
    }
    at: Alarms = {name: [None if one is None else one.at for one in said] for name, said in found.items()}
    halves = zip(at["martingale"], at["windows"], strict=True)
    return {"monitor": [min((n for n in both if n is not None), default=None) for both in halves], **at}


def river_alarms(calibration: Floats, scores: Floats) -> Alarms:
    """The same of river's detectors, each with its defaults."""
    found = [_river(calibration[:, r], scores[:, r], r) for r in range(scores.shape[1])]
    return {name: [one[name] for one in found] for name in found[0]}


def _river(calibration: Floats, scores: Floats, seed: int) -> dict[str, int | None]:
    drift: Any = importlib.import_module("river.drift")
    known = Calibration(torch.from_numpy(calibration))
    warm, p_values = (known.p_values(torch.from_numpy(s)).tolist() for s in (calibration[:1000], scores))
    made = {"ADWIN": drift.ADWIN(), "KSWIN": drift.KSWIN(seed=seed), "PageHinkley": drift.PageHinkley()}
    found: dict[str, int | None] = {}
    for name, detector in made.items():
        for p in warm:
            detector.update(p)
        found[name] = None
        for t, p in enumerate(p_values):
            detector.update(p)
            if detector.drift_detected:
                found[name] = t + 1
                break
    return found


def evidently_alarms(calibration: Floats, scores: Floats) -> Alarms:
    """The same of evidently's Kolmogorov-Smirnov test of each window, at its own level."""
    kolmogorov: Any = importlib.import_module("evidently.legacy.calculations.stattests.ks_stattest")
    test, level = kolmogorov._ks_stat_test, kolmogorov.ks_stat_test.default_threshold
    found: list[int | None] = []
    for r in range(scores.shape[1]):
        ends = range(WINDOW, len(scores) + 1, WINDOW)
        rings = (t for t in ends if test(calibration[:, r], scores[t - WINDOW : t, r], "num", level)[1])
        found.append(next(rings, None))
    return {"Kolmogorov-Smirnov windows": found}


def simulate(runs: int, before: int, after: Callable[..., Floats] | None, length: int, test: Any) -> dict[str, Any]:
    """Over ``runs`` streams: the share of false alarms before the change and the delays after it, by test."""
    columns = []
    for seed in range(runs):
        draw = np.random.default_rng([seed, before])
        calibration, start = draw.normal(size=CALIBRATION), draw.normal(size=before)
        rest = draw.normal(size=length) if after is None else after(draw, length)
        columns.append((calibration, np.concatenate([start, rest])))
    said = test(*(np.stack(part, axis=1) for part in zip(*columns, strict=True)))
    return {name: _summary(at, before, after is None) for name, at in said.items()}


def _summary(at: list[int | None], before: int, same: bool) -> dict[str, Any]:
    if same:
        return {"streams": len(at), "false alarms": sum(n is not None for n in at)}
    early = sum(n is not None and n <= before for n in at)
    delays = sorted(float("inf") if n is None else n - before for n in at if n is None or n > before)
    found = [d for d in delays if d < float("inf")]
    quantile = {name: _quantile(delays, q) for name, q in (("median", 0.5), ("90 %", 0.9))}
    return {"streams": len(at), "early": early, "found": len(found), "images until the alarm": quantile}


def _quantile(delays: list[float], share: float) -> float | None:
    """None where so many streams had no alarm."""
    value = delays[int(share * (len(delays) - 1))] if delays else float("inf")
    return None if value == float("inf") else value


def run(tiny: bool) -> dict[str, Any]:
    """Everything, as JSON."""
    runs, long, length = (4, 600, 600) if tiny else (200, 20_000, AFTER)
    few = 2 if tiny else 20
    started = time.process_time()
    ids = simulate(runs, 0, None, long, alarms)
    changes: dict[str, Any] = {}
    for name, change in CHANGES.items():
        for before in (0, 400) if tiny else (0, 1000, 5000):
            changes.setdefault(name, {})[str(before)] = simulate(few if tiny else 40, before, change, length, alarms)
    record: dict[str, Any] = {
        "command": shlex.join(["python", "benchmarks/monitoring.py", *sys.argv[1:]]),
        "commit": git_commit(),
        "settings": {
            "calibration": CALIBRATION,
            "false_alarms": 2 * LEVEL,
            "window": WINDOW,
            "ID images of a stream without a change": long,
            "images after a change, at most": length,
            "tiny": tiny,
        },
        "streams without a change": ids,
        "changes, by the ID images before them": changes,
    }
    if importlib.util.find_spec("river") is not None:
        record["river, streams without a change"] = simulate(few, 0, None, min(long, 5000), river_alarms)
        record["river, changes after 1,000"] = {
            name: simulate(few // 2 or 1, 400 if tiny else 1000, change, min(length, 2000), river_alarms)
            for name, change in CHANGES.items()
        }
    if importlib.util.find_spec("evidently") is not None:
        record["evidently, streams without a change"] = simulate(few, 0, None, min(long, 5000), evidently_alarms)
        record["evidently, changes after 1,000"] = {
            name: simulate(few // 2 or 1, 400 if tiny else 1000, change, min(length, 2000), evidently_alarms)
            for name, change in CHANGES.items()
        }
    record["seconds of CPU time"] = round(time.process_time() - started, 1)
    record["versions"] = environment()
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a rehearsal: few short streams")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    record = run(options.tiny)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record["streams without a change"], indent=1))


if __name__ == "__main__":
    main()
