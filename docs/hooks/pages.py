"""Pages that are made when the site is built: the home page of README, the commands, the API, and one for each scorer.

Links of pages to files of the repository (``../results/…``) work on a code host as they stand; in the site, records
lie in ``records/`` and other files are named without a link.
"""

from __future__ import annotations

import csv
import inspect
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

import traj_ood
from traj_ood.cli import main
from traj_ood.io.options import option_kinds
from traj_ood.scorers import SCORERS

ROOT = Path(__file__).parents[2]
RECORDS = (".png", ".csv", ".json", ".md", ".svg")
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
    note = "HIGHER = MORE OOD for all. Each page has the equation, the options, the cost, and what the records say."
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
            "## In the records",
            "",
            *_records(name),
            "",
            f"Source: `{cls.__module__.replace('.', '/')}.py`.",
            "",
        ]
    )


def _records(name: str) -> Iterator[str]:
    """Mean figures in the protocol, and the OOD sets with the best and the worst AUROC, for each variant."""
    with (ROOT / "results" / "protocol" / "scorers.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["scorer"].split(":")[0] == name]
    if not rows:
        yield "Not part of the recorded protocol."
        return
    yield "Masked autoencoders, three trained models × three training samples;"
    yield "[protocol](../../results/protocol/tables.md). AUROC / FPR95 in percent, means over all OOD sets, and the"
    yield "sets on which it is best and worst:"
    yield ""
    yield "| suite | variant | all | best on | worst on |"
    yield "| :-- | :-- | --: | :-- | :-- |"
    for key in dict.fromkeys((row["suite"], row["scorer"]) for row in rows):
        own = {row["set"]: row for row in rows if (row["suite"], row["scorer"]) == key}
        sets = sorted((n for n in own if n not in ("all", "near", "far")), key=lambda n: float(own[n]["auroc"]))
        if "all" in own and sets:
            shown = [_figures(own["all"]), *(f"{n} {_figures(own[n])}" for n in (sets[-1], sets[0]))]
            yield f"| {key[0]} | `{key[1]}` | {' | '.join(shown)} |"


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
