"""The yml files of OpenOOD for our scorers: options, settings of the fit, and values for a search."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from traj_ood.errors import TrajOODError, unknown_name
from traj_ood.io.files import write_atomic
from traj_ood.io.options import read_options, split_pairs
from traj_ood.scorers import SCORERS, create_scorer
from traj_ood.scorers.base import FeatureScorer, spec_text

PREFIX = "traj_ood_"
"""Prefix of our names, as OpenOOD has its own ``knn``, ``vim``, ``msp``, …"""

AUTO = "auto"
"""Value of a static scorer's option ``view``: the backbone's features if there is a backbone, else the default view."""

SWEEPS: dict[str, dict[str, list[Any]]] = {
    # The paper leaves open which part of the path to use; the trajectory is computed once for all horizons.
    "trajectory": {"horizon": [None, 4, 16, 64]},
    # Sun et al. (2022) choose k on validation data; these are values that 2,000 training images allow.
    "knn": {"k": [1, 5, 10, 20, 50, 100]},
}
"""Options that OpenOOD's automatic search may set, by scorer; other scorers have no option worth a search."""


def openood_names() -> dict[str, str]:
    """The name of every registered scorer in traj_ood by its name in OpenOOD."""
    return {PREFIX + name.replace("-", "_"): name for name in SCORERS}


@dataclass(frozen=True, kw_only=True)
class Learning:
    """Settings of the fit."""

    attractors: int = 2000  # ID training images to fit on, or all if there are fewer; as many as in the paper
    seed: int = 0  # of their draw by position in the image list, the same as in Evaluator
    tol: float = 1e-5  # this and the next: see traj_ood.iterate; the defaults are the paper's
    max_steps: int = 500


@dataclass(frozen=True)
class _Section:
    """The section ``postprocessor`` of a yml file, with OpenOOD's keys."""

    name: str
    APS_mode: bool = False
    postprocessor_args: dict[str, Any] = field(default_factory=dict)
    learning: Learning = field(default_factory=Learning)
    postprocessor_sweep: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Settings(Learning):
    """The content of a yml file.

    Attributes:
        scorer: the scorer's name in traj_ood.
        options: its options.
        sweep: values by option for OpenOOD's automatic parameter search.
        search: whether OpenOOD searches (``APS_mode``). Default false, because a search uses the OOD images of
            OpenOOD's validation set, and our scorers are otherwise never fitted on OOD images.
    """

    scorer: str
    options: Mapping[str, Any]
    sweep: Mapping[str, list[Any]] = field(default_factory=dict)
    search: bool = False

    @classmethod
    def parse(cls, config: Mapping[str, Any]) -> Settings:
        """Parse OpenOOD's Config. Unknown keys are errors, as Config returns ``None`` for any missing key."""
        section = _plain(config.get("postprocessor", {}))
        name = section.get("name", "")
        if name not in openood_names():
            raise unknown_name("postprocessor of traj_ood", str(name), openood_names())
        where = f"OpenOOD config of {name!r}"
        read = _Section(**read_options(_Section, section, where, noun="key"))
        sweep = {}
        for key, values in read.postprocessor_sweep.items():
            if not isinstance(values, list) or not values:
                raise TrajOODError(f"{where}: postprocessor_sweep.{key}: expected a list of values, got {values!r}")
            sweep[key.removesuffix("_list")] = values
        if read.APS_mode and not sweep:
            raise TrajOODError(f"{where}: APS_mode asks for a search, but postprocessor_sweep is empty: turn it off")
        learning = asdict(read.learning)
        made = cls(openood_names()[name], read.postprocessor_args, sweep=sweep, search=read.APS_mode, **learning)
        for spec in made.grid():
            create_scorer(spec)
        return made

    def spec(self, **changes: Any) -> str:
        """The spec of the scorer with all options, with ``changes`` applied; ``view=auto`` is left out."""
        options = {**self.options, **changes}
        if options.get("view") == AUTO:
            del options["view"]
        return spec_text(self.scorer, options)

    def grid(self) -> list[str]:
        """The specs to compute in one pass over the images, the default first: in a search, of all combinations."""
        combinations = itertools.product(*self.sweep.values()) if self.search else ()
        swept = (self.spec(**dict(zip(self.sweep, values, strict=True))) for values in combinations)
        return list(dict.fromkeys([self.spec(), *swept]))


def config_section(spec: str, *, search: bool, sweep: Mapping[str, Sequence[Any]], **learning: Any) -> dict[str, Any]:
    """The section ``postprocessor`` of a yml file, with all options of the scorer ``spec`` and the settings of the fit;
    ``search`` and ``sweep`` as in :class:`Settings`."""
    scorer = create_scorer(spec)
    options = scorer.options()
    given = {key for key, _ in split_pairs(spec.split(":")[1:], f"scorer {spec!r}")}
    if isinstance(scorer, FeatureScorer) and "view" not in given:
        options["view"] = AUTO
    return {
        "name": PREFIX + scorer.name.replace("-", "_"),
        "APS_mode": search,
        "postprocessor_args": options,
        "learning": asdict(Learning(**learning)),
        "postprocessor_sweep": {f"{key}_list": list(values) for key, values in sweep.items()},
    }


def config_text(scorer: str) -> str:
    """The yml file of a scorer, given by its name in traj_ood, with all defaults."""
    section = config_section(scorer, search=False, sweep=SWEEPS.get(scorer, {}))
    note = f"# {SCORERS[scorer].summary}\n# Written by traj_ood.openood.write_configs from the scorer's defaults.\n"
    return note + yaml.safe_dump({"postprocessor": section}, sort_keys=False, default_flow_style=None, width=100)


def write_configs(folder: str | Path, *, keep: bool = False) -> list[Path]:
    """Write the yml file of every registered scorer into ``folder``; ``keep`` does not overwrite existing files."""
    paths = {Path(folder) / f"{name}.yml": scorer for name, scorer in openood_names().items()}
    for path, scorer in paths.items():
        if not (keep and path.exists()):
            write_atomic(path, config_text(scorer).encode())
    return list(paths)


def _plain(value: Any) -> Any:
    """OpenOOD's Config as dicts."""
    return {key: _plain(item) for key, item in dict.items(value)} if isinstance(value, dict) else value
