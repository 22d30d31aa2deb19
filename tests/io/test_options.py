"""The parser of options: trees of YAML and JSON, and text that is read as the value it was written from."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from traj_ood.errors import TrajOODError
from traj_ood.io.options import MAX_INT, check_options, read_options, write_option


@dataclass(frozen=True)
class Rates:
    low: float = 0.1
    kind: Literal["sgd", "adam"] = "adam"


@dataclass(frozen=True)
class Plan:
    name: str
    count: int = 1
    on: bool = False
    limit: int | None = None
    shares: tuple[float, ...] = (0.5,)
    words: tuple[str, ...] = ()
    rates: Rates = field(default_factory=Rates)
    free: dict[str, Any] = field(default_factory=dict)


def read(**tree: Any) -> Plan:
    return Plan(**read_options(Plan, {"name": "x", **tree}, "plan.yaml", noun="key"))


def test_a_tree_is_read_by_the_kinds_of_the_fields() -> None:
    made = read(count=3, on=True, limit=None, shares=[1, 0.25, "5e-3"], rates={"low": 1}, free={"a": [1]})
    assert made == Plan("x", 3, True, None, (1.0, 0.25, 0.005), rates=Rates(1.0), free={"a": [1]})
    assert type(made.shares[0]) is float
    assert read(name=5).name == "5"  # YAML takes a name of digits for a number
    assert read(rates=None, free=None) == Plan("x")  # a section without lines


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ({"nmae": 1}, "unknown key of plan.yaml 'nmae': did you mean 'name'"),
        ({"rates": {"lwo": 1}}, "unknown key of plan.yaml, rates 'lwo': did you mean 'low'"),
        ({"rates": {"kind": "adm"}}, "unknown rates.kind of plan.yaml 'adm': did you mean 'adam'"),
        ({"rates": 3}, "plan.yaml, key rates: expected a mapping, got 3"),
        ({"free": [1]}, r"plan.yaml, key free: expected a mapping, got \[1\]"),
        ({"count": True}, "key count: expected int, got True"),
        ({"count": 3.0}, "key count: expected int, got 3.0"),
        ({"count": None}, "key count: expected int, got None"),
        ({"count": MAX_INT + 1}, "key count: expected int, got 4294967296"),
        ({"on": 1}, "key on: expected true or false, got 1"),
        ({"limit": "many"}, "key limit: expected int or none, got 'many'"),
        ({"shares": 0.5}, "key shares: expected a list of floats, got 0.5"),
        ({"shares": None}, "key shares: expected a list of floats, got None"),
        ({"shares": [0.5, math.nan]}, "key shares: expected float, got nan"),
        ({"name": ["x"]}, r"key name: expected str, got \['x'\]"),
    ],
)
def test_what_is_refused_is_named_with_what_was_expected(tree: dict[str, Any], words: str) -> None:
    with pytest.raises(TrajOODError, match=words):
        read(**tree)


def test_all_that_is_missing_is_named() -> None:
    with pytest.raises(TrajOODError, match=r"plan\.yaml: missing name: expected a value, as there is no default"):
        read_options(Plan, {}, "plan.yaml")


texts = st.text(st.characters(categories=["L", "N"]), min_size=1, max_size=9).filter(lambda text: text != "none")


@given(
    st.sampled_from("+,"),
    st.builds(
        Plan,
        texts,
        st.integers(-MAX_INT, MAX_INT),
        st.booleans(),
        st.none() | st.integers(0, MAX_INT),
        st.lists(st.floats(allow_nan=False, allow_infinity=False)).map(tuple),
        st.lists(texts).map(tuple),
    ),
)
def test_what_is_written_is_read_as_the_same_value(joint: str, made: Plan) -> None:
    options = {key: value for key, value in vars(made).items() if key not in ("rates", "free")}
    written = {key: write_option(value, joint) for key, value in options.items()}
    assert Plan(**read_options(Plan, written, "plan", joint=joint)) == made


def test_a_value_that_text_cannot_hold_is_refused() -> None:
    check_options(Rates, {"low": 0.5, "kind": "sgd"}, "plan", reserved=":,")
    for values, words in (
        ({"low": math.inf, "kind": "sgd"}, "plan, option low: expected float, got 'inf'"),
        ({"low": 0.5, "kind": "a:b"}, "plan, option kind: expected text without ':' and ',', got 'a:b'"),
    ):
        with pytest.raises(TrajOODError, match=words):
            check_options(Rates, values, "plan", reserved=":,")
