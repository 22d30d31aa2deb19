"""Scorers by name, with their options written ``name:key=value:key=value``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any, TypeVar

from traj_ood.autoencoders import Autoencoder
from traj_ood.errors import TrajOODError, unknown_name
from traj_ood.postprocessors.base import FeatureScorer, Postprocessor

POSTPROCESSORS: dict[str, type[Postprocessor]] = {}

_LARGEST = 2**32 - 1  # the largest seed that NumPy and scikit-learn take; nothing else is as large
_P = TypeVar("_P", bound=type[Postprocessor])


def register(cls: _P) -> _P:
    """Class decorator: make a scorer available by its ``name``; a name is taken once.

    Raises:
        TrajOODError: the name is taken by another class.
    """
    taken = POSTPROCESSORS.get(cls.name)
    home = (cls.__module__, cls.__qualname__)
    if taken is not None and (taken.__module__, taken.__qualname__) != home:  # a reloaded module may register again
        raise TrajOODError(
            f"scorer name {cls.name!r} is taken by {taken.__module__}.{taken.__qualname__}: choose another"
        )
    POSTPROCESSORS[cls.name] = cls
    return cls


def create_postprocessor(spec: str) -> Postprocessor:
    """A scorer from ``name`` or ``name:key=value:…``, such as ``knn:k=5:view=cls``.

    Raises:
        TrajOODError: unknown name or option (with near ones), or a value of the wrong kind.
    """
    name, *pairs = spec.strip().split(":")
    if name not in POSTPROCESSORS:
        raise unknown_name("scorer", name, POSTPROCESSORS)
    cls = POSTPROCESSORS[name]
    defaults = {f.name: f.default for f in fields(cls)}
    types = {f.name: str(f.type) for f in fields(cls)}
    options = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals:
            raise TrajOODError(f"scorer {spec!r}: expected options as key=value, got {pair!r}")
        if key not in defaults:
            raise unknown_name(f"option of scorer {name}", key, defaults or ["(none)"])
        if key in options:
            raise TrajOODError(f"scorer {spec!r}: option {key} is given twice: leave one out")
        options[key] = _parse(f"scorer {name}, option {key}", types[key], text)
    return cls(**options)


def create_postprocessors(specs: Sequence[str], autoencoder: Autoencoder) -> list[Postprocessor]:
    """The scorers of a run; ``all`` stands for :func:`default_suite`. Duplicates (by label) are refused.

    Raises:
        TrajOODError: no scorer, an unknown one, or one listed twice.
    """
    expanded = [s for spec in specs for s in (default_suite(autoencoder) if spec.strip() == "all" else [spec])]
    scorers = [create_postprocessor(_with_backbone(s, autoencoder)) for s in expanded]
    labels = [s.label for s in scorers]
    if not labels:
        raise TrajOODError("scorers: expected at least one, got none")
    twice = next((label for label in labels if labels.count(label) > 1), None)
    if twice:
        raise TrajOODError(f"scorers: {twice} is listed twice")
    return scorers


def _with_backbone(spec: str, autoencoder: Autoencoder) -> str:
    """A static scorer stands, as published, on the features of the backbone where there is one."""
    cls = POSTPROCESSORS.get(spec.strip().split(":")[0])
    static = cls is not None and issubclass(cls, FeatureScorer)
    return f"{spec}:view=backbone" if autoencoder.feature_dim and static and ":view=" not in spec else spec


def default_suite(autoencoder: Autoencoder) -> list[str]:
    """Every registered scorer that the model allows, with its defaults, and the variants of the paper's open choices.

    ``mahalanobis:classes=true`` is to be asked for by name: whether images have labels, a model does not know.
    """
    suite = ["field", "field:start_only=true", "early-path", "early-path:shuffled=true"]
    suite += ["trajectory", "trajectory:horizon=16"]
    suite += ["early-trajectory", "early-trajectory:whiten=true"]
    suite += ["early-trajectory:reference=features", "early-trajectory:reference=centroids"]
    suite += ["signature", "alignment", "contraction-rate", "contraction-rate:two_sided=true"]
    suite += ["path-energy", "path-energy:two_sided=true"]
    suite += ["start-distance", "end-distance", "first-residual", "steps"]
    suite += ["mahalanobis", "mahalanobis:normalize=true", "knn", "knn-auto", "knn-paper", "gmm", "pca-residual"]
    suite += ["pca-residual:normalize=true", "kernel-pca", "isolation-forest", "lid"]
    suite += ["feature-norm", "feature-norm:two_sided=true", "reconstruction"]
    if autoencoder.has_cls:  # a latent of one token has one view; with more, every scorer may show its best
        suite += ["trajectory:view=mean", "trajectory:view=cls", "start-distance:view=mean"]
        suite += ["knn:view=cls", "knn:view=tokens", "mahalanobis:view=cls", "mahalanobis:view=grid"]
        suite += ["gmm:view=cls", "kernel-pca:view=cls", "lid:view=cls"]
    if autoencoder.reconstruction_masks():
        suite += ["reconstruction:masked=true"]
    if autoencoder.classes:
        suite += ["msp", "max-logit", "energy"]
        suite += ["vim"] if autoencoder.head() is not None else []
    return suite


def _parse(where: str, kind: str, text: str) -> Any:
    if text == "none" and "None" in kind:
        return None
    try:
        if "bool" in kind:
            return {"true": True, "false": False}[text.lower()]
        if "int" in kind:
            number = int(text)
            if abs(number) > _LARGEST:
                raise ValueError(text)
            return number
        if "float" in kind:
            return float(text)
    except (KeyError, ValueError) as error:
        raise TrajOODError(f"{where}: expected {kind}, got {text!r}") from error
    return text
