"""Options of scorers: every annotation that has a text, labels that recreate the scorer, classes refused at once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Optional

import pandas as pd
import pytest
import tiny
import torch
from torch import Tensor

from traj_ood.autoencoders import CallableAutoencoder
from traj_ood.errors import TrajOODError
from traj_ood.scorers import GMM, SCORERS, Evidence, Needs, Scorer, create_scorer, register
from traj_ood.scorers.scorer_set import ScorerSet


@pytest.fixture(autouse=True)
def registry() -> Iterator[None]:
    before = dict(SCORERS)
    yield
    SCORERS.clear()
    SCORERS.update(before)


class Constant(Scorer):
    """What every class below needs to be a scorer."""

    summary: ClassVar[str] = "nothing"

    def needs(self) -> Needs:
        return Needs(features=frozenset({"tokens"}))

    def score(self, evidence: Evidence) -> Tensor:
        return torch.zeros(len(evidence.features["tokens"]), dtype=torch.float64)


@dataclass
class Every(Constant):
    """Each kind of option; annotations are text here."""

    name: ClassVar[str] = "every"
    old: Optional[int] = 3  # noqa: UP045 (what this test is about)
    new: int | None = None
    how: Literal["pointwise", "all", "int"] = "all"
    maybe: Optional[Literal["a", "b"]] = None  # noqa: UP045
    share: float = 0.5
    on: bool = False
    text: str = "x"
    steps: tuple[int, ...] = (1, 4)
    weights: tuple[float, ...] = field(default_factory=tuple)
    either: int | Literal["auto"] = "auto"


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("old=none", None),
        ("old=7", 7),
        ("new=5", 5),
        ("how=pointwise", "pointwise"),
        ("how=int", "int"),
        ("maybe=b", "b"),
        ("share=1e-07", 1e-7),
        ("share=1e300", 1e300),
        ("on=true", True),
        ("text=a=b", "a=b"),
        ("steps=0+2+16", (0, 2, 16)),
        ("weights=0.5+1e20", (0.5, 1e20)),
        ("either=9", 9),
    ],
)
def test_a_label_recreates_its_scorer(option: str, value: Any) -> None:
    register(Every)
    made = create_scorer(f"every:{option}")
    assert getattr(made, option.partition("=")[0]) == value
    assert type(getattr(made, option.partition("=")[0])) is type(value)
    assert create_scorer(made.label) == made
    assert made.label.startswith("every:")
    assert made == Every(**{option.partition("=")[0]: value})


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("old=many", "scorer every, option old: expected int or none, got 'many'"),
        ("old=5.0", "option old: expected int or none, got '5.0'"),
        ("old=1_0", "option old: expected int or none"),
        ("old=" + "9" * 5000, "option old: expected int or none"),
        (
            "how=pointwize",
            "unknown how of scorer every 'pointwize': did you mean 'pointwise' or 'int'",
        ),
        ("maybe=c", "unknown maybe of scorer every 'c'"),
        ("share=inf", "option share: expected float, got 'inf'"),
        ("share=nan", "option share: expected float, got 'nan'"),
        ("on=yes", "option on: expected true or false, got 'yes'"),
        ("steps=1+x", r"option steps: expected int, got 'x'"),
        ("either=other", "option either: expected int or one of auto, got 'other'"),
        ("none=1", "unknown option of scorer every 'none'"),
    ],
)
def test_values_of_another_kind_are_refused_with_what_is_allowed(option: str, words: str) -> None:
    register(Every)
    with pytest.raises(TrajOODError, match=words):
        create_scorer(f"every:{option}")


@pytest.mark.parametrize(
    "options",
    [
        {"old": "3"},
        {"old": 3.0},
        {"on": 1},
        {"how": "other"},
        {"share": float("nan")},
        {"text": "a:b"},
        {"text": "a,b"},
    ],
)
def test_values_whose_label_would_be_another_scorer_are_refused_in_python_too(options: dict[str, Any]) -> None:
    with pytest.raises(TrajOODError, match=r"of scorer every|scorer every, option"):
        Every(**options)


def test_a_seed_may_be_none_where_its_type_says_so() -> None:
    @register
    @dataclass
    class Drawn(Constant):
        name: ClassVar[str] = "drawn"
        seed: int | None = None

    assert create_scorer("drawn:seed=none") == Drawn()
    for seed in ("x", None):
        with pytest.raises(TrajOODError, match="scorer gmm, option seed: expected int"):
            GMM(seed=seed)  # type: ignore[arg-type]


def test_every_scorer_of_the_package_is_recreated_by_its_label() -> None:
    for name, cls in SCORERS.items():
        assert create_scorer(name) == cls()
        assert cls().label == name
    for spec in ("knn:k=none", "knn:reduce=mean", "alignment:target=mean", "early-trajectory:steps=0+1"):
        assert create_scorer(spec).label == spec


def bad_classes() -> Iterator[tuple[type, str]]:
    """Classes that are no scorers, with what is said of them."""

    class Abstract(Scorer):
        name: ClassVar[str] = "abstract"
        summary: ClassVar[str] = "x"

        def score(self, evidence: Evidence) -> Tensor:
            raise NotImplementedError

    class Nameless(Constant):
        pass

    class Wordless(Constant):
        name: ClassVar[str] = "wordless"
        summary: ClassVar[str] = ""

    class Spaced(Constant):
        name: ClassVar[str] = "a b"

    class All(Constant):
        name: ClassVar[str] = "all"

    class Undecorated(Constant):
        name: ClassVar[str] = "undecorated"
        k: int = 3

    @dataclass
    class Unwritable(Constant):
        name: ClassVar[str] = "unwritable"
        table: dict[str, int] = field(default_factory=dict)

    @dataclass
    class Unknown(Constant):
        name: ClassVar[str] = "unknown"
        k: Missing = 3  # type: ignore[name-defined]  # noqa: F821

    @dataclass(kw_only=True)
    class Required(Constant):
        name: ClassVar[str] = "required"
        k: int

    class Needless(Constant):
        name: ClassVar[str] = "needless"

        def needs(self) -> Needs:
            return None  # type: ignore[return-value]

    class Knn(Constant):
        name: ClassVar[str] = "knn"

    yield Abstract, r"Abstract is abstract: expected needs\(\): define it"
    yield Nameless, "Nameless: expected its name: write name: ClassVar"
    yield Wordless, "Wordless: expected its summary"
    yield Spaced, "expected a name without spaces"
    yield All, "other than 'all', got 'all'"
    yield Undecorated, "k would not be its options: put @dataclass below @register"
    yield Unwritable, "Unwritable, option table: expected bool, int, .* got dict"
    yield Unknown, "the annotations of its options cannot be read"
    yield Required, "option k has no default: add one, and document its reason"
    yield Needless, r"expected needs\(\) to return traj_ood.Needs\(...\), got NoneType"
    yield Knn, "scorer name 'knn' is taken by"
    yield dict, "expected a subclass of traj_ood.Scorer"


@pytest.mark.parametrize(("cls", "words"), [pytest.param(c, w, id=c.__name__) for c, w in bad_classes()])
def test_register_refuses_at_once_and_says_what_is_missing(cls: type, words: str) -> None:
    before = dict(SCORERS)
    with pytest.raises(TrajOODError, match=words):
        register(cls)
    assert before == SCORERS


# ---------------------------------------------------------------------------------------------- labels and dtypes


def test_labels_are_taken_as_lists_arrays_and_columns() -> None:
    draw = torch.Generator().manual_seed(0)
    images, names = torch.rand(24, 1, 8, 8, generator=draw), ["cat", "dog", "ant"] * 8
    numbers = torch.tensor([1, 2, 0] * 8)  # in the order of their names
    scores = [
        ScorerSet(tiny.conv(), ["mahalanobis:classes=true"]).fit(images, labels=labels).score(images[:5]).scores
        for labels in (numbers, numbers.tolist(), names, pd.Series(names), numbers.numpy())
    ]
    for other in scores[1:]:
        assert torch.equal(other["mahalanobis:classes=true"], scores[0]["mahalanobis:classes=true"])
    for bad, words in ((names[:3], "got 3 of str"), ([0.5] * 24, "got 24 of float")):
        with pytest.raises(TrajOODError, match=f"labels: expected 24 whole numbers or texts, one per image, {words}"):
            ScorerSet(tiny.conv(), ["mahalanobis:classes=true"]).fit(images, labels=bad)


def _model(dtype: torch.dtype) -> CallableAutoencoder:
    """z = tanh(x W), D(z) = 0.9 z Wᵀ, in one dtype."""
    weight = torch.linalg.qr(torch.randn(64, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).Q
    weight = weight.to(dtype)
    return CallableAutoencoder(
        lambda x: torch.tanh(x.to(dtype).flatten(1) @ weight),
        lambda z: (0.9 * z @ weight.T).reshape(-1, 1, 8, 8),
        (1, 8, 8),
        chunk=8,
    )


CHANGED = ["signature", "knn-auto", "contraction-rate:two_sided=true", "field", "trajectory"]


def _scores(dtype: torch.dtype) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(1)
    train, test = (torch.rand(n, 1, 8, 8, generator=draw, dtype=torch.float32) for n in (40, 6))
    return ScorerSet(_model(dtype), CHANGED, max_steps=20).fit(train).score(test).scores


@pytest.mark.parametrize("case", ["a float64 model", "a float64 default"])
def test_scores_are_those_of_float32_to_its_rounding(case: str) -> None:
    plain = _scores(torch.float32)
    torch.set_default_dtype(torch.float64 if case == "a float64 default" else torch.float32)
    try:
        other = _scores(torch.float64 if case == "a float64 model" else torch.float32)
    finally:
        torch.set_default_dtype(torch.float32)
    for label, scores in plain.items():
        torch.testing.assert_close(other[label], scores, rtol=1e-4, atol=0)
