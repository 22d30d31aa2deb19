"""Pages that are made when the site is built: the home page of README, the commands, the API, and one for each scorer.

Links of pages to files of the repository (``../results/…``) work on a code host as they stand; in the site, records
lie in ``records/`` and other files are named without a link.
"""

from __future__ import annotations

import csv
import inspect
import json
import posixpath
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import click
import yaml
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

import traj_ood
from traj_ood.cli import main
from traj_ood.io.options import option_kinds
from traj_ood.scorers import SCORERS, Scorer

ROOT = Path(__file__).parents[2]
RECORDS = (".png", ".csv", ".json", ".md", ".svg")
_SOURCES: dict[str, str] = yaml.safe_load((ROOT / "docs" / "hooks" / "sources.yaml").read_text(encoding="utf-8"))
_NAME = r"[A-Z]\w+(?:-[A-Z]\w+)?"
_CITED = re.compile(  # Sun et al. (2022, eq. 2); Liu and Qin, ICML 2024; Schwarz 1978
    rf"({_NAME})(?: et al\.|(?:, {_NAME})* and {_NAME})?,? \(?(?:[A-Z]\w*[A-Z],? )?((?:19\d|20[0-3])\d)\b"
)
_BACKBONE = "results/backbone/fashion--timm-fashion-resnet--seed0/result.json"
_OF_THE_PAPER = re.compile(r"§[34]\.|Theorem 1|Table 1")
_LINKED = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Every scorer in the navigation, and every guide that it does not name itself."""
    assert config.nav is not None
    guides: list[str] = next(entry["Guides"] for entry in config.nav if isinstance(entry, dict) and "Guides" in entry)
    found = (path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs" / "guides").glob("*.md"))
    guides += sorted(set(found) - set(guides))
    _replace(config.nav, "scorers/", ["scorers/index.md", *(f"scorers/{name}.md" for name in sorted(SCORERS))])
    return config


def _replace(nav: list[Any], what: str, by: list[str]) -> None:
    for entry in nav:
        if isinstance(entry, dict):
            for title, inner in entry.items():
                if inner == what:
                    entry[title] = by
                elif isinstance(inner, list):
                    _replace(inner, what, by)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what is generated, and the records that pages may link to."""
    pages = {
        "index.md": (ROOT / "README.md").read_text(encoding="utf-8").replace("](docs/", "]("),
        "changelog.md": (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"),
        "reference/commands.md": commands(),
        "reference/api.md": api(),
        "scorers/index.md": scorer_index(),
        **{f"scorers/{name}.md": scorer_page(name) for name in SCORERS},
    }
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    for path in sorted((ROOT / "results").rglob("*")):
        if path.suffix in RECORDS:
            name = f"records/{path.relative_to(ROOT / 'results').as_posix()}"
            name = name.replace("README.md", "index.md")
            hidden = InclusionLevel.NOT_IN_NAV  # reached by links
            files.append(File.generated(config, name, abs_src_path=str(path), inclusion=hidden))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links to the repository's files as the site has them."""
    here = posixpath.dirname(page.file.src_uri)
    known = {file.src_uri for file in files}

    def link(found: re.Match[str]) -> str:
        picture, text, target = found.groups()
        place, _, anchor = target.partition("#")
        if not place or re.match(r"[a-z]+:", place):
            return found[0]
        inside = posixpath.normpath(posixpath.join(here, place))
        inside = re.sub(r"^(\.\./)*results/", "records/", inside).replace("records/README.md", "records/index.md")
        inside = {"../CHANGELOG.md": "changelog.md", "../README.md": "index.md"}.get(inside, inside)
        if inside not in known:
            return text if text.startswith("`") or " " in text else f"`{text}`"
        place = posixpath.relpath(inside, here or ".")
        return f"{picture}[{text}]({place}{'#' + anchor if anchor else ''})"

    return _LINKED.sub(link, markdown)


# ---------------------------------------------------------------------------------------------- reference


def commands() -> str:
    """Every command's help, from click."""
    parts = [
        "# Commands",
        "Every command takes `-h`. Exit codes: 0 all well, 2 refused (one line says why), 70 a fault of ours.",
    ]
    for name, command in sorted(main.commands.items()):
        context = click.Context(command, info_name=f"traj-ood {name}", max_content_width=110)
        parts += [f"## traj-ood {name}", f"```text\n{command.get_help(context)}\n```"]
    return "\n\n".join(parts) + "\n"


def api() -> str:
    """The public API, by room."""
    parts = ["# Public API", "All of these are names of `traj_ood`; anything else may change without notice."]
    for module, names in traj_ood._HOME.items():
        parts.append(f"## traj_ood.{module}")
        parts += [f"::: traj_ood.{module}.{name}\n    options:\n      heading_level: 3" for name in names]
    return "\n\n".join(parts) + "\n"


def scorer_index() -> str:
    rows = [f"| [`{name}`]({name}.md) | {_cell(cls.summary)} |" for name, cls in sorted(SCORERS.items())]
    note = "HIGHER = MORE OOD for all. Each page has the equation, the options, the cost, the source, and the records."
    return "\n".join(["# Scorers", "", note, "", "| scorer | what it measures |", "| :-- | :-- |", *rows, ""])


def scorer_page(name: str) -> str:
    """One scorer: its docstring, its options with their defaults, its cost, and where it wins and loses."""
    cls = SCORERS[name]
    made = cls()
    steps = made.needs().steps
    cost = {0: "no evaluation of f", 1: "one evaluation of f"}.get(steps, f"up to {steps} evaluations of f")
    cost = "the whole trajectory of an image, until it settles" if steps > 10**6 else cost
    options = [
        f"| `{key}` | `{value}` | `{_kind(kind)}` |"
        for (key, value), kind in zip(made.options().items(), option_kinds(cls).values(), strict=True)
    ]
    table = ["| option | default | kind |", "| :-- | :-- | :-- |", *options] if options else ["None."]
    return "\n".join(
        [
            f"# {name}",
            "",
            _cell(cls.summary),
            "",
            _text(inspect.getdoc(cls) or ""),
            "",
            f"**Cost an image:** {cost}, beyond the encoding that all scorers share.",
            "",
            "## Options",
            "",
            *table,
            "",
            "## Source",
            "",
            *(f"- {_SOURCES[key]}." for key in cited(name)),
            *([] if cited(name) else ["No publication: it was made here."]),
            "",
            f"Code: `{cls.__module__.replace('.', '/')}.py`.",
            "",
            "## In the records",
            "",
            *_records(name),
            "",
        ]
    )


def cited(name: str) -> list[str]:
    """Keys of sources.yaml for what the scorer's docstrings cite, the paper first."""
    cls = SCORERS[name]
    own = [base for base in cls.__mro__ if base.__module__.startswith("traj_ood.scorers") and base is not Scorer]
    texts = [cls.summary, *(f"{sys.modules[base.__module__].__doc__} {inspect.getdoc(base)}" for base in own)]
    text = " ".join(" ".join(texts).split())
    found = [f"{author} {year}" for author, year in _CITED.findall(text)]
    return [*(["Fumero 2026"] if _OF_THE_PAPER.search(text) else []), *sorted(set(found))]


def _records(name: str) -> Iterator[str]:
    """Mean figures and the place among all scorers, and the OOD sets with the best and the worst AUROC, by variant."""
    lines = []
    for suite, labels in _recorded().items():
        ranked = sorted(labels, key=lambda label: -float(labels[label]["all"]["auroc"]))
        for place, label in enumerate(ranked, 1):
            if label.split(":")[0] == name:
                own = labels[label]
                sets = sorted(own.keys() - {"all", "near", "far"}, key=lambda one: float(own[one]["auroc"]))
                ends = [f"{one} {_figures(own[one])}" for one in (sets[-1], sets[0])]
                shown = [suite, f"`{label}`", _figures(own["all"]), f"{place} of {len(ranked)}", *ends]
                lines.append(f"| {' | '.join(shown)} |")
    if not lines:
        yield "No run of results/ has it."
        return
    yield "AUROC / FPR95 in percent, means over all OOD sets, the place by AUROC among all scorers and variants of the"
    yield "suite, and the sets on which it is best and worst. `fashion` and `cifar10-local`: masked autoencoders, three"
    yield "trained models × three training samples ([protocol](../../results/protocol/tables.md)); ResNet-18: the"
    yield f"frozen features of a classifier, one run ([record](../../{_BACKBONE}))."
    yield ""
    yield "| suite | variant | all | place | best on | worst on |"
    yield "| :-- | :-- | --: | --: | :-- | :-- |"
    yield from lines


@cache
def _recorded() -> dict[str, dict[str, dict[str, dict[str, Any]]]]:
    """AUROC and FPR95 by suite, label, and set or ``all``."""
    found: dict[str, dict[str, dict[str, dict[str, Any]]]] = {}
    with (ROOT / "results" / "protocol" / "scorers.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            found.setdefault(row["suite"], {}).setdefault(row["scorer"], {})[row["set"]] = row
    run = json.loads((ROOT / _BACKBONE).read_text(encoding="utf-8"))
    found["`fashion`, ResNet-18"] = {
        label: {"all": scorer["all"], **{name: one["metrics"] for name, one in scorer["sets"].items()}}
        for label, scorer in run["scorers"].items()
    }
    return found


def _figures(row: dict[str, str]) -> str:
    return f"{100 * float(row['auroc']):.1f} / {100 * float(row['fpr95']):.1f}"


def _kind(kind: Any) -> str:
    return getattr(kind, "__name__", str(kind)).replace("typing.", "").replace("|", "or")


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _text(docstring: str) -> str:
    """A docstring as Markdown: roles of Sphinx become code, Google's sections lists."""
    text = re.sub(r":[a-z]+:`~?([^`]+)`", r"`\1`", docstring).replace("``", "`")
    lines = []
    for line in text.splitlines():
        section = re.fullmatch(r"(Args|Raises|Returns|Attributes):", line)
        if section:
            lines += ["", f"**{section[1]}**", ""]
        elif line.startswith("    ") and re.match(r"\s+[\w, ]+:", line):
            lines.append(f"- {line.strip()}")
        else:
            lines.append(line)
    return "\n".join(lines)
