"""Draw the rooms of traj_ood and what imports what, from the source: ``python benchmarks/house.py`` → docs/house.svg.

Every arrow points down. An arrow that another path implies (a → c beside a → b → c) is left out.
"""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "traj_ood"
PICTURE = ROOT / "docs" / "house.svg"
ABOUT = {
    "cli": "parse, call, print",
    "distributed": "rows over a cluster",
    "serve": "a detector behind HTTP",
    "openood": "bridge",
    "export": "ONNX, torch.export",
    "stream": "images in, rows out",
    "monitor": "rows in, an alarm out",
    "analysis": "the paper's questions",
    "report": "the page",
    "training": "a model from data",
    "detector": "a decision from a score",
    "evaluation": "a table from a benchmark",
    "graph": "scorers as a torch module",
    "scorers": "one file each, ScorerSet",
    "attractors": "dictionary, health",
    "autoencoders": "the protocol, families",
    "backbones": "frozen networks",
    "index": "nearest neighbours",
    "drawing": "colours, panels, charts",
    "io": "files, provenance",
    "data": "images, preprocessing",
    "dynamics": "iterate, Trajectory",
}
"""Room → what is in it; a room that is missing here is an error, so that the picture names every one."""


def room_of(path: Path) -> str:
    """The folder below the package that a file is in, or the file's own name."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@cache
def imports() -> dict[str, set[str]]:
    """Room → rooms that its files import, at any place in them."""
    found: dict[str, set[str]] = {room: set() for room in ABOUT}
    for path in PACKAGE.rglob("*.py"):
        room = room_of(path)
        if room not in ABOUT:
            if path.parent != PACKAGE:
                raise SystemExit(f"{path.relative_to(ROOT)}: say in ABOUT what the room {room!r} holds")
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("traj_ood"):
                names = [node.module.split(".")[1]] if "." in (node.module or "") else [a.name for a in node.names]
                found[room] |= {name for name in names if name in ABOUT and name != room}
    return found


@cache
def height(room: str) -> int:
    """0 for a room that imports no other one, else one more than the highest that it imports."""
    return 1 + max(map(height, imports()[room]), default=-1)


@cache
def below(room: str) -> frozenset[str]:
    """All rooms that can be reached from this one."""
    return frozenset().union(*({other} | below(other) for other in imports()[room]))


def arrows() -> list[tuple[str, str]]:
    """(from, to), sorted, without those that another path implies."""
    return sorted(
        (room, other)
        for room, others in imports().items()
        for other in others
        if not any(other in below(between) for between in others)
    )


def draw(path: Path) -> None:
    """Write the picture: a row for each height, the highest at the top."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    matplotlib.rcParams.update({"svg.hashsalt": "house", "svg.fonttype": "none", "font.family": "sans-serif"})
    rows: dict[int, list[str]] = {}
    for room in ABOUT:
        rows.setdefault(height(room), []).append(room)
    place = {r: (3.0 * (i - (len(row) - 1) / 2), 1.5 * level) for level, row in rows.items() for i, r in enumerate(row)}
    widest, top = max(map(len, rows.values())), max(rows)
    figure, axes = pyplot.subplots(figsize=(2.2 * widest, 1.15 * (top + 1)))
    for start, end in arrows():
        (x, y), (u, v) = place[start], place[end]
        axes.annotate(
            "",
            (u, v + 0.34),
            (x, y - 0.34),
            arrowprops={"arrowstyle": "-|>", "color": "#9aa5b1", "linewidth": 0.9},
            zorder=1,  # boxes hide an arrow that passes behind them
        )
    for room, (x, y) in place.items():
        axes.add_patch(
            pyplot.Rectangle((x - 1.3, y - 0.34), 2.6, 0.68, facecolor="#eef3f8", edgecolor="#3b5b7a", zorder=2)
        )
        axes.text(x, y + 0.1, f"{room}/", ha="center", va="center", fontsize=11, weight="bold", color="#1f2d3a")
        axes.text(x, y - 0.16, ABOUT[room], ha="center", va="center", fontsize=7.5, color="#44535f")
    axes.set_xlim(-1.5 * widest - 0.1, 1.5 * widest + 0.1)
    axes.set_ylim(-0.5, 1.5 * top + 0.5)
    axes.axis("off")
    path.parent.mkdir(exist_ok=True)
    notes = {"Date": None, "Creator": None, "Description": described()}
    figure.savefig(path, bbox_inches="tight", pad_inches=0.05, metadata=notes, facecolor="white")
    pyplot.close(figure)


def described() -> str:
    """The arrows as text, which stands in the picture: a test compares it with the source."""
    return "; ".join(f"{start} > {end}" for start, end in arrows())


if __name__ == "__main__":
    draw(PICTURE)
    print(f"{PICTURE.relative_to(ROOT)}: {len(ABOUT)} rooms, {len(arrows())} arrows")
