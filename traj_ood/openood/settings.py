"""The yml files that OpenOOD reads: the options of a scorer, how it learns, and what a search may try."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from traj_ood.errors import TrajOODError, unknown_name
from traj_ood.io.files import write_atomic
from traj_ood.io.options import read_options
from traj_ood.scorers import SCORERS, create_scorer
from traj_ood.scorers.base import FeatureScorer, spec_text

PREFIX = "traj_ood_"
"""Of every name here: OpenOOD has a ``knn``, ``vim``, ``msp``, … of its own."""

AUTO = "auto"
"""Value of a static scorer's option ``view``: the backbone's features where there is a backbone, else the default."""

SWEEPS: dict[str, dict[str, list[Any]]] = {
    # Which part of the path tells most is the choice the paper leaves open; all of it is walked once for the sweep.
    "trajectory": {"horizon": [None, 4, 16, 64]},
    # Sun et al. (2022) choose k on validation data; what 2,000 training images allow.
    "knn": {"k": [1, 5, 10, 20, 50, 100]},
}
"""Options that OpenOOD's automatic search may set, by scorer; those that are absent have nothing worth a search."""


def openood_names() -> dict[str, str]:
    """OpenOOD's name → traj_ood's, for every registered scorer."""
    return {PREFIX + name.replace("-", "_"): name for name in SCORERS}


@dataclass(frozen=True, kw_only=True)
class Learning:
    """How a scorer learns.

    Attributes:
        attractors: ID training images that it learns from, as many as there are when fewer. Default 2,000, the paper's.
        seed: draws them, by their place in the image list: the sample that :class:`traj_ood.Evaluator` draws.
        tol, max_steps: of :func:`traj_ood.iterate`; the paper's.
    """

    attractors: int = 2000
    seed: int = 0
    tol: float = 1e-5
    max_steps: int = 500


@dataclass(frozen=True)
class _Section:
    """What stands under ``postprocessor`` in a yml file, under OpenOOD's names."""

    name: str
    APS_mode: bool = False
    postprocessor_args: dict[str, Any] = field(default_factory=dict)
    learning: Learning = field(default_factory=Learning)
    postprocessor_sweep: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Settings(Learning):
    """What a yml file says.

    Attributes:
        scorer: traj_ood's name.
        options: of the scorer.
        sweep: option → values for OpenOOD's automatic parameter search.
        search: whether OpenOOD searches (``APS_mode``). Default off: a search sees OOD images, those of OpenOOD's
            validation set, which the scores here otherwise never do.
    """

    scorer: str
    options: Mapping[str, Any]
    sweep: Mapping[str, list[Any]] = field(default_factory=dict)
    search: bool = False

    @classmethod
    def parse(cls, config: Mapping[str, Any]) -> Settings:
        """Strict, because OpenOOD's own Config answers ``None`` to whatever it does not hold.

        Raises:
            TrajOODError: unknown scorers, sections or options, or values of the wrong kind.
        """
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
        """The scorer with all its options written out; ``view=auto`` is left to the model."""
        options = {**self.options, **changes}
        if options.get("view") == AUTO:
            del options["view"]
        return spec_text(self.scorer, options)

    def combinations(self) -> list[dict[str, Any]]:
        """Every combination of the sweep."""
        return [dict(zip(self.sweep, values, strict=True)) for values in itertools.product(*self.sweep.values())]

    def grid(self) -> list[str]:
        """The specs that one pass over the images has to serve, the default first."""
        swept = [self.spec(**combination) for combination in self.combinations()] if self.search else []
        return list(dict.fromkeys([self.spec(), *swept]))


def config_section(spec: str, *, search: bool, sweep: Mapping[str, Sequence[Any]], **learning: Any) -> dict[str, Any]:
    """What stands under ``postprocessor`` in a yml file: a scorer's options written out, and how it learns.

    Args:
        spec: see :func:`traj_ood.create_scorer`.
        search, sweep: see :class:`Settings`.
        learning: see :class:`Learning`.
    Raises:
        TrajOODError: a bad spec.
    """
    scorer = create_scorer(spec)
    options = scorer.options()
    if isinstance(scorer, FeatureScorer) and ":view=" not in spec:
        options["view"] = AUTO
    return {
        "name": PREFIX + scorer.name.replace("-", "_"),
        "APS_mode": search,
        "postprocessor_args": options,
        "learning": asdict(Learning(**learning)),
        "postprocessor_sweep": {f"{key}_list": list(values) for key, values in sweep.items()},
    }


def config_text(scorer: str) -> str:
    """The yml file of a scorer (traj_ood's name) with every default."""
    import yaml

    section = config_section(scorer, search=False, sweep=SWEEPS.get(scorer, {}))
    note = f"# {SCORERS[scorer].summary}\n# Written by traj_ood.openood.write_configs from the scorer's defaults.\n"
    return note + yaml.safe_dump({"postprocessor": section}, sort_keys=False, default_flow_style=None, width=100)


def write_configs(folder: str | Path, *, keep: bool = False) -> list[Path]:
    """Write the yml file of every registered scorer into ``folder``; ``keep`` leaves files that are there as they are.

    Raises:
        TrajOODError: the folder cannot be written.
    """
    paths = {Path(folder) / f"{name}.yml": scorer for name, scorer in openood_names().items()}
    for path, scorer in paths.items():
        if not (keep and path.exists()):
            write_atomic(path, config_text(scorer).encode())
    return list(paths)


def _plain(value: Any) -> Any:
    """OpenOOD's Config as dicts."""
    return {key: _plain(item) for key, item in dict.items(value)} if isinstance(value, dict) else value
