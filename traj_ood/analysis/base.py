"""Question, the base class of the paper's analyses; Answer, its result; and Finding, the record of a run.

A question is a frozen dataclass, whose fields are its options, each with a default that fits two cores; it stands in a
file of its own, imported by ``analysis/__init__.py``. CONTRIBUTING.md has an example. ``question.run(work, folder)``
writes ``folder/finding.json`` and the pictures, and returns the :class:`Finding`.
"""

from __future__ import annotations

import json
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from traj_ood.analysis.workspace import Workspace
from traj_ood.errors import TrajOODError, unknown_name
from traj_ood.io.files import check_can_write, write_atomic
from traj_ood.io.options import read_options, split_pairs
from traj_ood.io.provenance import environment, git_commit
from traj_ood.io.trees import as_json, read_json

if TYPE_CHECKING:
    from traj_ood.drawing.style import Figure

FILE_NAME = "finding.json"
SCHEMA = "traj_ood.finding/1"
QUESTIONS: dict[str, type[Question]] = {}
"""All questions by name, in the paper's order; registered when ``analysis/__init__.py`` imports their files."""

_Q = TypeVar("_Q", bound="type[Question]")


@dataclass(frozen=True)
class Answer:
    """The result of a question.

    Attributes:
        figures: numbers, texts, and tables as lists of rows {column: value}; None where nothing could be measured. NaN
            and infinity are refused, because their meaning would be ambiguous.
        sentence: one sentence that states the result with its numbers.
        pictures: file name → function that draws the figure, in addition to those of :meth:`Question.drawn`.
        differences: differences from the paper's settings that are known only after the run, in addition to those of
            the options.
    """

    figures: Mapping[str, Any]
    sentence: str
    pictures: Mapping[str, Callable[[], Figure]] = field(default_factory=dict)
    differences: tuple[str, ...] = ()


@dataclass(frozen=True)
class Finding:
    """The record of a run of a question, the contents of ``finding.json``.

    Attributes:
        question, paper, choices: name, figure and choices, see :class:`Question`.
        options: all options, as plain data.
        figures, sentence: see :class:`Answer`.
        differences: differences from the paper's settings, one sentence each.
        pictures: names of the figure files in the same folder.
        command: the command line of the run.
        commit: the commit of the code; None if unknown.
        versions: versions of the libraries.
        seconds: wall time, including that of units resumed from earlier runs.
    """

    question: str
    paper: str
    options: Mapping[str, Any]
    figures: Mapping[str, Any]
    sentence: str
    differences: tuple[str, ...]
    choices: tuple[str, ...]
    pictures: tuple[str, ...]
    seed: int
    command: str
    commit: str | None
    versions: Mapping[str, str]
    seconds: float

    def save(self, folder: Path) -> None:
        """Write ``folder/finding.json``, atomically.

        Raises:
            TrajOODError: figures that JSON cannot hold (NaN, infinity, objects), or an unwritable folder.
        """
        try:
            text = json.dumps({"schema": SCHEMA, **asdict(self)}, indent=1, allow_nan=False, ensure_ascii=False)
        except (TypeError, ValueError) as error:
            raise TrajOODError(
                f"{self.question}: expected finite plain figures, got: {error}; use None where nothing was measured"
            ) from error
        write_atomic(folder / FILE_NAME, (text + "\n").encode(errors="backslashreplace"))

    @classmethod
    def load(cls, path: Path) -> Finding:
        """Read a record that :meth:`save` wrote; ``path`` is the file or its folder.

        Raises:
            TrajOODError: no such file, not JSON, another schema, or missing keys.
        """
        path = path / FILE_NAME if path.is_dir() else path
        tree = read_json(path, "a finding", "run traj-ood analyze again")
        schema = tree.pop("schema", None)
        if schema != SCHEMA:
            raise TrajOODError(f"{path}: expected a finding of schema {SCHEMA}, got schema {schema}; run it again")
        return cls(**read_options(cls, tree, str(path), noun="key", strict=True))


@dataclass(frozen=True)
class Question(ABC):
    """A question of the paper. The fields of a subclass are its options, which ``--option key=value`` sets.

    Fields may be int, float, bool, str, and tuples of these. Checks that cannot be declared by the attributes below
    belong in the subclass's ``__post_init__``, see :meth:`expect`.

    Attributes:
        figure: the figure or section of the paper.
        summary: one-line description.
        choices: what the paper leaves open and what was chosen, with the reason, one sentence each.
        unstated: options that the paper does not state; for these :meth:`paper` holds our choice, and records say so.
        at_least: smallest allowed values of options.
        above_0: options that must be positive.
        meanings: meanings of special values of options, such as ``{"images": {0: "all"}}``.
        seed: seed of all randomness. Default 0.
    """

    name: ClassVar[str]
    figure: ClassVar[str]
    summary: ClassVar[str]
    choices: ClassVar[tuple[str, ...]] = ()
    unstated: ClassVar[tuple[str, ...]] = ()
    at_least: ClassVar[Mapping[str, int]] = {}
    above_0: ClassVar[tuple[str, ...]] = ()
    meanings: ClassVar[Mapping[str, Mapping[Any, str]]] = {}

    seed: int = 0

    def __post_init__(self) -> None:
        for option, least in self.at_least.items():
            word = self.meanings.get(option, {}).get(least)
            self.expect(
                getattr(self, option) >= least, option, f"{least} ({word}) or more" if word else f"at least {least}"
            )
        for option in self.above_0:
            self.expect(getattr(self, option) > 0, option, "above 0")

    @classmethod
    @abstractmethod
    def paper(cls) -> Question:
        """The question with the paper's settings."""

    @abstractmethod
    def answer(self, work: Workspace) -> Answer:
        """Compute the answer. Run expensive steps through :meth:`Workspace.unit`, which stores their results."""

    def drawn(self, figures: Mapping[str, Any]) -> Mapping[str, Callable[[], Figure]]:
        """The pictures that the figures of an answer suffice for, file name → function that draws the figure: they can
        be drawn again from a record. Default: none."""
        return {}

    def run(self, work: Workspace, folder: Path, *, command: str = "") -> Finding:
        """Compute the answer, write the record and the figures to ``folder``, and return the record, in which
        ``command`` is the command line.

        Raises:
            TrajOODError: bad options or data, an unwritable folder.
        """
        self.expect(0 <= self.seed < 2**31, "seed", f"0 to {2**31 - 1}")
        check_can_write(folder, FILE_NAME)
        began, commit = time.perf_counter(), git_commit()
        answer = self.answer(work)
        pictures = {**self.drawn(answer.figures), **answer.pictures}
        finding = Finding(
            question=self.name,
            paper=self.figure,
            options=self.options(),
            figures=answer.figures,
            sentence=answer.sentence,
            differences=(*self.differences(), *answer.differences),
            choices=self.choices,
            pictures=tuple(pictures),
            seed=self.seed,
            command=command,
            commit=commit,
            versions=environment(),
            seconds=round(time.perf_counter() - began + work.resumed, 1),
        )
        finding.save(folder)
        _save(pictures, folder)
        return finding

    def options(self) -> dict[str, Any]:
        """All options by name, as plain data."""
        return as_json(asdict(self))

    def settings(self, *names: str) -> dict[str, Any]:
        """These options by name, for the key of a unit of work."""
        return {name: getattr(self, name) for name in names}

    def differences(self) -> tuple[str, ...]:
        """One sentence per option whose value differs from the paper's."""
        mine, theirs = self.options(), self.paper().options()
        return tuple(
            f"{key}: {self.shown(key, mine[key])} here, {self.shown(key, theirs[key])} "
            + ("with --paper (the paper does not state it)" if key in self.unstated else "in the paper")
            for key in mine
            if key != "seed" and mine[key] != theirs[key]
        )

    def shown(self, option: str, value: Any) -> str:
        """The value of an option as text, by :attr:`meanings` if it has a special meaning."""
        words = self.meanings.get(option)
        return words.get(value, _shown(value)) if words else _shown(value)

    def expect(self, condition: bool, option: str, expected: str) -> None:
        """Raise ``TrajOODError`` unless ``condition`` on an option holds; ``expected`` describes the allowed values."""
        if not condition:
            raise TrajOODError(f"{self.name}: {option}: expected {expected}, got {_shown(getattr(self, option))}")


def register(cls: _Q) -> _Q:
    """Class decorator that registers a question by its name, which no other question may have."""
    taken = QUESTIONS.get(cls.name)
    if taken is not None and (taken.__module__, taken.__qualname__) != (cls.__module__, cls.__qualname__):
        raise TrajOODError(
            f"question {cls.name!r} is taken by {taken.__module__}.{taken.__qualname__}: choose another name"
        )
    QUESTIONS[cls.name] = cls
    return cls


def find_question(name: str) -> type[Question]:
    """The class of a question; raises ``TrajOODError`` for an unknown name."""
    if name not in QUESTIONS:
        raise unknown_name("question", name, QUESTIONS)
    return QUESTIONS[name]


def options_from(cls: type[Question], pairs: Iterable[str], *, paper: bool = False) -> Question:
    """Create a question from options written as ``key=value``; tuples are comma-separated, and of repeated options the
    last counts. ``paper`` starts from the paper's settings instead of the defaults.

    Raises:
        TrajOODError: an unknown option (the message lists similar ones), no ``=``, a value of the wrong type, or one
            that the question refuses.
    """
    given = dict(split_pairs(pairs, cls.name))
    return replace(cls.paper() if paper else cls(), **read_options(cls, given, cls.name, joint=","))


def redraw(folder: Path) -> list[Path]:
    """Draw what :meth:`Question.drawn` can of the record in ``folder``; returns the files, each of which was there.

    Raises:
        TrajOODError: no record, one of an unknown question or with options that it no longer has, an unwritable folder.
    """
    found = Finding.load(folder)
    cls = find_question(found.question)
    asked = cls(**read_options(cls, found.options, cls.name))
    pictures = {file: draw for file, draw in asked.drawn(found.figures).items() if file in found.pictures}
    _save(pictures, folder)
    return [folder / file for file in pictures]


def _save(pictures: Mapping[str, Callable[[], Figure]], folder: Path) -> None:
    if pictures:  # else matplotlib is not needed
        from traj_ood.drawing.style import save_figure

        for file, draw in pictures.items():
            save_figure(draw(), folder / file)


def _shown(value: Any) -> str:
    return ", ".join(map(_shown, value)) if isinstance(value, (list, tuple)) else str(value)
