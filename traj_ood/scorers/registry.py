"""The registry of scorers, and their creation from text such as ``name:key=value:key=value``."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import MISSING
from typing import Any, TypeVar

from traj_ood.autoencoders import Autoencoder
from traj_ood.errors import TrajOODError, foreign_errors, unknown_name
from traj_ood.io.extensions import load_plugins, origin_of
from traj_ood.io.options import check_writable, option_defaults, option_kinds, read_options, split_pairs
from traj_ood.scorers.base import FeatureScorer, Needs, Scorer

SCORERS: dict[str, type[Scorer]] = {}
_PLUGINS = "traj_ood.scorers"

_P = TypeVar("_P", bound=type[Scorer])


def register(cls: _P) -> _P:
    """Class decorator that makes a scorer available by its ``name``. Put it above ``@dataclass``.

    Raises:
        TrajOODError: the class is not a :class:`Scorer`, is abstract, or lacks ``name`` or ``summary``; an option has
            no default, is not a dataclass field, or has a type that cannot be written as text (see
            :mod:`traj_ood.io.options`); ``needs()`` fails or returns something else; or another class has the name.
    """
    _check_class(cls)
    taken = SCORERS.get(cls.name)
    home = (cls.__module__, cls.__qualname__)
    if taken is not None and (taken.__module__, taken.__qualname__) != home:  # a reloaded module may register again
        where = (origin_of(taken) or {}).get("file", taken.__module__)
        raise TrajOODError(f"scorer name {cls.name!r} is taken by {taken.__qualname__} of {where}: choose another")
    SCORERS[cls.name] = cls
    return cls


def _check_class(cls: type[Any]) -> None:
    """Refuse at registration a class that would fail when it is first used."""
    where = f"scorer class {getattr(cls, '__qualname__', cls)}"
    if not (isinstance(cls, type) and issubclass(cls, Scorer)):
        raise TrajOODError(f"{where}: expected a subclass of traj_ood.Scorer: derive it from that")
    missing = sorted(cls.__abstractmethods__)
    if missing:
        names, them = ", ".join(f"{m}()" for m in missing), "it" if len(missing) == 1 else "them"
        raise TrajOODError(f"{where} is abstract: expected {names}: define {them}")
    for key, example in (("name", "my-scorer"), ("summary", "what it measures, in a line")):
        text = getattr(cls, key, None)
        if not isinstance(text, str) or not text.strip():
            raise TrajOODError(f'{where}: expected its {key}: write {key}: ClassVar[str] = "{example}" in the class')
    if cls.name == "all" or set(cls.name) & set(":,=") or cls.name.split() != [cls.name]:
        raise TrajOODError(
            f"{where}: expected a name without spaces, ':', ',' and '=', other than 'all', got {cls.name!r}"
        )
    check_writable(cls)
    known = option_kinds(cls)
    plain = [
        key
        for key, kind in inspect.get_annotations(cls).items()
        if key not in known and "ClassVar" not in str(kind) and not key.startswith("_")
    ]
    if plain:
        raise TrajOODError(f"{where}: {', '.join(plain)} would not be its options: put @dataclass below @register")
    bare = [key for key, default in option_defaults(cls).items() if default is MISSING]
    if bare:
        raise TrajOODError(f"{where}: option {', '.join(bare)} has no default: add one, and document its reason")
    with foreign_errors(f"{where}: with its defaults it cannot be made, or its needs() fail"):
        needs = cls().needs()
    if not isinstance(needs, Needs):
        raise TrajOODError(f"{where}: expected needs() to return traj_ood.Needs(...), got {type(needs).__name__}")


def scorer_class(name: str) -> type[Scorer]:
    """The scorer class registered under a name, from an installed plugin (entry points ``traj_ood.scorers``) if need
    be.

    Raises:
        TrajOODError: unknown name (the message lists similar ones), or a plugin that cannot be imported.
    """
    if name not in SCORERS:
        load_plugins(_PLUGINS, name)
    if name not in SCORERS:
        raise unknown_name("scorer", name, SCORERS, "; one of your own needs --import FILE.py")
    return SCORERS[name]


def create_scorer(spec: str) -> Scorer:
    """Create a scorer from ``name`` or ``name:key=value:…``; options that are not named have their defaults.

    >>> create_scorer("knn:k=5:view=cls").k
    5

    Raises:
        TrajOODError: unknown name or option (the message lists similar ones), or a value of the wrong type.
    """
    name, *pairs = spec.strip().split(":")
    cls = scorer_class(name)
    options: dict[str, str] = {}
    for key, text in split_pairs(pairs, f"scorer {spec!r}"):
        if key in options:
            raise TrajOODError(f"scorer {spec!r}: option {key} is given twice: leave one out")
        options[key] = text
    return cls(**read_options(cls, options, f"scorer {name}", joint="+"))


def create_scorers(specs: Sequence[str], autoencoder: Autoencoder) -> list[Scorer]:
    """Create the scorers of a run; ``all`` stands for :func:`default_suite`.

    Raises:
        TrajOODError: no scorer, an unknown one, two with the same label, or a text in place of a list.
    """
    if isinstance(specs, str):
        raise TrajOODError(f"scorers: expected a list of names, got the text {specs!r}: give [{specs!r}]")
    expanded = [s for spec in specs for s in (default_suite(autoencoder) if spec.strip() == "all" else [spec])]
    scorers = [create_scorer(_with_backbone(s, autoencoder)) for s in expanded]
    labels = [s.label for s in scorers]
    if not labels:
        raise TrajOODError("scorers: expected at least one, got none; name some, or all")
    twice = next((label for label in labels if labels.count(label) > 1), None)
    if twice:
        raise TrajOODError(f"scorers: {twice} is listed twice")
    return scorers


def _with_backbone(spec: str, autoencoder: Autoencoder) -> str:
    """Add ``view=backbone``, the published form, to a static scorer without a view if the model has a backbone."""
    name, *pairs = spec.strip().split(":")
    static = issubclass(scorer_class(name), FeatureScorer)
    has_view = any(pair.partition("=")[0].strip() == "view" for pair in pairs)
    return f"{spec}:view=backbone" if autoencoder.feature_dim and static and not has_view else spec


def default_suite(autoencoder: Autoencoder) -> list[str]:
    """The scorers of the suite ``all``: the variants that scorers declare (:attr:`Scorer.suite`) and the model
    supports.

    Scorers that need class labels are left out, because a model does not tell whether the images have any, and so are
    variants with a ``view`` if the latent has a single token, where all views are equal. Plugins are included.
    """
    load_plugins(_PLUGINS)
    places = {
        f"{name}:{options}".rstrip(":"): place
        for name, cls in SCORERS.items()
        for options, place in cls.suite.items()
        if autoencoder.has_cls or "view=" not in options
    }
    scorers = {spec: create_scorer(spec) for spec in sorted(places, key=places.__getitem__)}
    return [spec for spec, s in scorers.items() if not s.needs().labels and lacking(autoencoder, s.needs()) is None]


def lacking(autoencoder: Autoencoder, needs: Needs) -> str | None:
    """The first input in ``needs`` that the model does not provide, with a remedy; None if nothing is missing."""
    name = f"{autoencoder.name} ({autoencoder.family})"
    if (needs.logits or needs.head) and not autoencoder.classes:
        return (
            f"reads the logits of a classifier, and {name} has none: use a model with a classifier, such as timm:<name>"
        )
    if "backbone" in needs.features and not autoencoder.feature_dim:
        return (
            f"reads the features of a frozen backbone, and {name} has none: use another view, or a model such as "
            "timm:<name>"
        )
    if needs.head and autoencoder.head() is None:
        return (
            f"needs a linear classifier over the features, and {autoencoder.name} declares none: leave this scorer "
            "out, or return weight and bias from head() if the backbone is your own"
        )
    if "masked" in needs.reconstruction and not autoencoder.reconstruction_masks():
        return f"{name} has no masked reconstruction: only masked autoencoders do"
    return None
