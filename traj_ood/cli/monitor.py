"""``traj-ood monitor``: test whether scored images still resemble the calibration images."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from traj_ood.cli.base import NAME, PATH, SEED, examples, main
from traj_ood.cli.console import note, say

if TYPE_CHECKING:
    from traj_ood.monitor import StreamState

ALARM = 4
"""Exit code if the stream differs from the calibration."""


@main.command(
    epilog=examples(
        "traj-ood monitor my.detector scores/",
        "traj-ood monitor my.detector service.jsonl --prometheus /var/lib/node_exporter/traj_ood.prom --quiet",
        "*/5 * * * * traj-ood monitor my.detector scores/ --quiet || mail -s 'OOD alarm' operator",
    )
)
@click.argument("detector", type=NAME)
@click.argument("rows", nargs=-1, required=True, type=NAME, metavar="ROWS...")
@click.option(
    "--false-alarms",
    type=float,
    default=0.01,
    show_default=True,
    help="Probability of any false alarm, ever, however often this is run.",
)
@click.option("--window", type=int, default=200, show_default=True, help="Images per window.")
@click.option("--confidence", type=float, default=0.95, show_default=True, help="Confidence level of the intervals.")
@click.option(
    "--seed",
    type=SEED,
    default=0,
    show_default=True,
    help="Seed of the martingale's random draws; use the same for the whole stream.",
)
@click.option("--format", "form", type=click.Choice(["text", "json"]), default="text", show_default=True)
@click.option("--prometheus", type=PATH, help="Also write the numbers to this file, as Prometheus text.")
@click.option("-q", "--quiet", is_flag=True, help="Print alarms only.")
def monitor(
    detector: str, rows: tuple[str, ...], form: str, prometheus: Path | None, quiet: bool, **options: Any
) -> None:
    """Compare ROWS scored by DETECTOR with its calibration: CSV, JSON lines, Parquet, folders, or a service's log.

    Give all rows of the stream from its start, in order; the files of a folder are read in the order of their names.
    The exit code is 0 while the stream resembles the calibration, and 4 from the first alarm on. The test is valid
    after every image: the probability that a stream without a change ever has an alarm is --false-alarms. After a
    change that you accept, calibrate again and start new rows.
    """
    from traj_ood.detector.folder import read_calibration
    from traj_ood.io.files import write_atomic
    from traj_ood.monitor import read_rows, watch
    from traj_ood.monitor.metrics import prometheus_text

    calibration = read_calibration(Path(detector).expanduser())
    found = read_rows(rows)
    found.check(calibration)
    state = watch(calibration, found.scores, found.invalid, **options)
    if prometheus is not None:
        write_atomic(prometheus, prometheus_text(state, Path(detector).name).encode())
    if not quiet or (state.is_alarm and form == "json"):
        say(json.dumps(state.as_dict()) if form == "json" else _text(state))
    if state.is_alarm:
        note(_alarms(state))
        sys.exit(ALARM)


def _text(state: StreamState) -> str:
    lines = [f"{state.images:,} images, {state.invalid:,} without a score"]
    if state.rate is not None and state.interval is not None and state.uniformity is not None:
        low, high = state.interval
        lines.append(
            f"OOD: {state.ood:,} of {state.images - state.invalid:,}, {state.rate:.2%} "
            f"({state.confidence:.0%} interval {low:.2%} to {high:.2%}); "
            f"at most {state.expected:.2%} expected for ID images"
        )
        if state.recent is not None:
            low, high = state.recent["interval"]
            lines.append(f"last {state.window:,}: {state.recent['rate']:.2%} ({low:.2%} to {high:.2%})")
        lines.append(
            f"scores against calibration scores: Kolmogorov-Smirnov {state.uniformity[0]:.3f}, "
            f"p = {state.uniformity[1]:.3g} (valid for a single test)"
        )
    lines.append(
        f"martingale: capital {state.capital:.3g}, highest {state.highest:.3g}, alarm at {2 / state.false_alarms:.3g}"
    )
    verdict = "ALARM: differs from the calibration" if state.is_alarm else "resembles the calibration"
    lines.append(verdict if state.images > state.invalid else "nothing to compare yet: no image has a score")
    return "\n".join(lines)


def _alarms(state: StreamState) -> str:
    tests = " and ".join(f"{a.test} after {a.at:,} scored images ({a.evidence:.3g})" for a in state.alarms)
    return f"traj-ood: alarm: the stream differs from the calibration: {tests}"
