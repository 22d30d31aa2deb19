"""A question that the paper asks of a model, its options, and the record of the answer.

A question is a frozen dataclass of options in a file of its own, which ``analysis/__init__.py`` imports::

    @register
    @dataclass(frozen=True)
    class Memorization(Question):
        name: ClassVar[str] = "memorization"
        figure: ClassVar[str] = "Figs 2, 13"
        summary: ClassVar[str] = "how close decoded attractors come to training images, over the bottleneck's width"
        choices: ClassVar[tuple[str, ...]] = ("The width d of Table 4 is not stated: 16.",)

        epochs: int = 20  # every field has a default that fits two cores

        @classmethod
        def paper(cls) -> Memorization:
            return cls(epochs=500)

        def answer(self, work: Workspace) -> Answer:
            unit = work.unit("model", {"epochs": self.epochs, "seed": self.seed}, lambda: Unit(...))
            return Answer({"rows": [...]}, "One sentence.", pictures={"curves.png": lambda: draw(...)})

``question.run(work, folder)`` then writes ``folder/finding.json`` and the pictures, and returns the :class:`Finding`.
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
from traj_ood.io.files import write_atomic
from traj_ood.io.options import read_options, split_pairs
from traj_ood.io.provenance import environment, git_commit
from traj_ood.io.trees import as_json, read_json

if TYPE_CHECKING:
    from traj_ood.drawing.style import Figure

FILE_NAME = "finding.json"
SCHEMA = "traj_ood.finding/1"
QUESTIONS: dict[str, type[Question]] = {}
"""Every question by its name, in the paper's order; filled by ``analysis/__init__.py``, which imports their files."""

_Q = TypeVar("_Q", bound="type[Question]")


@dataclass(frozen=True)
class Answer:
    """What a question found.

    Attributes:
        figures: numbers, texts, and tables as lists of rows {column: value}; None where nothing could be measured
            (NaN and infinity are refused: a reader would not know which of the two reasons they stand for).
        sentence: one sentence that says what was found, with its numbers.
        pictures: file name → function that draws it.
        differences: further ones, beside those that the options show, for what only the run knows.
    """

    figures: Mapping[str, Any]
    sentence: str
    pictures: Mapping[str, Callable[[], Figure]] = field(default_factory=dict)
    differences: tuple[str, ...] = ()


@dataclass(frozen=True)
class Finding:
    """The record of one answer, as ``finding.json`` holds it.

    Attributes:
        question, paper: the name, and the figure or section of the paper it belongs to.
        options: every option, as text shows it. figures, sentence: see :class:`Answer`.
        differences: where this run departs from the paper's settings, a sentence each; empty when nowhere.
        choices: what the paper leaves open, and what was chosen.
        pictures: names of the files beside the record.
        seed, command, commit, versions: what it takes to run it again.
        seconds: wall time, that of resumed units included.
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
        """Write ``folder/finding.json``, whole or not at all.

        Raises:
            TrajOODError: figures that JSON cannot hold (NaN, infinity, objects), or an unwritable folder.
        """
        write_atomic(folder / FILE_NAME, (self.text() + "\n").encode())

    def text(self) -> str:
        """The JSON.

        Raises:
            TrajOODError: as :meth:`save`.
        """
        try:
            return json.dumps({"schema": SCHEMA, **asdict(self)}, indent=1, allow_nan=False, ensure_ascii=False)
        except (TypeError, ValueError) as error:
            raise TrajOODError(
                f"{self.question}: expected finite plain figures, got: {error}; use None where nothing was measured"
            ) from error

    @classmethod
    def load(cls, path: Path) -> Finding:
        """Read what :meth:`save` wrote; ``path`` is the file or its folder.

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
    """Options of one question; the fields of a subclass are what ``--option key=value`` can set.

    Attributes:
        name, figure, summary: what lists and records call it; the figure or section of the paper; one line.
        choices: what the paper leaves open and what was chosen, with the reason, a sentence each.
        unstated: options that the paper does not state: :meth:`paper` holds our choice for them, and says so.
        at_least: the smallest values of options. above_0: options that are positive numbers.
        meanings: what special values of an option mean, such as ``{"images": {0: "all"}}``.
        seed: of everything that is drawn. Default 0.

    Fields may be int, float, bool, str, and tuples of them. Checks that are not declared stand in ``__post_init__`` of
    a subclass, see :meth:`expect`.
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
        """The paper's own settings; for what it does not state, the default."""

    @abstractmethod
    def answer(self, work: Workspace) -> Answer:
        """Compute the answer; each expensive step through :meth:`Workspace.unit`."""

    def run(self, work: Workspace, folder: Path, *, command: str = "") -> Finding:
        """Answer, draw, and record everything in ``folder``; returns the record.

        Args:
            work: see :class:`Workspace`. folder: of ``finding.json`` and the pictures.
            command: what was typed, for the record.
        Raises:
            TrajOODError: bad options or data, an unwritable folder.
        """
        self.expect(0 <= self.seed < 2**31, "seed", f"0 to {2**31 - 1}")
        began, commit = time.perf_counter(), git_commit()
        answer = self.answer(work)
        finding = Finding(
            question=self.name,
            paper=self.figure,
            options=self.options(),
            figures=answer.figures,
            sentence=answer.sentence,
            differences=(*self.differences(), *answer.differences),
            choices=self.choices,
            pictures=tuple(answer.pictures),
            seed=self.seed,
            command=command,
            commit=commit,
            versions=environment(),
            seconds=round(time.perf_counter() - began + work.resumed, 1),
        )
        finding.text()  # before anything is drawn: are the figures fit to be recorded?
        finding.save(folder)
        for file, draw in answer.pictures.items():
            from traj_ood.drawing.style import save_png

            save_png(draw(), folder / file)
        return finding

    def options(self) -> dict[str, Any]:
        """Every option by name, as plain data."""
        return as_json(asdict(self))

    def differences(self) -> tuple[str, ...]:
        """One sentence per option that is not the paper's."""
        mine, theirs = self.options(), self.paper().options()
        return tuple(
            f"{key}: {self.shown(key, mine[key])} here, {self.shown(key, theirs[key])} "
            + ("with --paper (the paper does not state it)" if key in self.unstated else "in the paper")
            for key in mine
            if key != "seed" and mine[key] != theirs[key]
        )

    def shown(self, option: str, value: Any) -> str:
        """An option's value in words, for differences; see :attr:`meanings`."""
        words = self.meanings.get(option, {})
        return words.get(value) or _shown(value) if words else _shown(value)

    def expect(self, condition: bool, option: str, expected: str) -> None:
        """For ``__post_init__``: refuse an option.

        Raises:
            TrajOODError: ``condition`` is false; names the question, the option, what was expected and what arrived.
        """
        if not condition:
            raise TrajOODError(f"{self.name}: {option}: expected {expected}, got {_shown(getattr(self, option))}")


def register(cls: _Q) -> _Q:
    """Class decorator: make a question available under its name.

    Raises:
        TrajOODError: a name that is taken.
    """
    taken = QUESTIONS.get(cls.name)
    if taken is not None and (taken.__module__, taken.__qualname__) != (cls.__module__, cls.__qualname__):
        raise TrajOODError(f"question {cls.name!r} is taken by {taken.__module__}.{taken.__qualname__}")
    QUESTIONS[cls.name] = cls
    return cls


def find_question(name: str) -> type[Question]:
    """The question's class.

    Raises:
        TrajOODError: unknown name, with near ones.
    """
    if name not in QUESTIONS:
        raise unknown_name("question", name, QUESTIONS)
    return QUESTIONS[name]


def options_from(cls: type[Question], pairs: Iterable[str], *, paper: bool = False) -> Question:
    """A question with options written ``key=value``; tuples are comma-separated.

    Args:
        cls: the question. pairs: later ones win.
        paper: start from the paper's settings and not from the defaults.
    Raises:
        TrajOODError: unknown option (with near ones), no ``=``, a value of another kind, or one the question refuses.
    """
    given = dict(split_pairs(pairs, cls.name))
    return replace(cls.paper() if paper else cls(), **read_options(cls, given, cls.name, joint=","))


def _shown(value: Any) -> str:
    return ", ".join(map(_shown, value)) if isinstance(value, (list, tuple)) else str(value)
