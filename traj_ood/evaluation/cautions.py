"""What figures of runs do not show, in words: images that two sets share, and seeds that changed nothing."""

from __future__ import annotations

import json
from collections.abc import Sequence

from traj_ood.data import OOD_ROLES
from traj_ood.evaluation.identity import effective_settings
from traj_ood.evaluation.results import Result


def cautions(results: Sequence[Result]) -> list[str]:
    """A line of Markdown for each pair of splits with common images, and for seeds that drew the same training images.

    The results are those of one benchmark.
    """
    return [*_copies(results), *_idle_seeds(results)]


def other_settings(results: Sequence[Result]) -> list[str]:
    """A line for each model whose runs, all of one benchmark, differ in settings that have an effect on scores."""
    lines = []
    for name in dict.fromkeys(str(result.model["name"]) for result in results):
        configs = [effective_settings(result) for result in results if result.model["name"] == name]
        keys = dict.fromkeys(key for config in configs for key in config)
        told = {key: list(dict.fromkeys(str(config.get(key, "not set")) for config in configs)) for key in keys}
        different = [f"{key} ({', '.join(values)})" for key, values in told.items() if len(values) > 1]
        if different:
            lines.append(f"⚠ Runs of `{name}` have other settings: {'; '.join(different)}.")
    return lines


def other_contents(results: Sequence[Result]) -> list[str]:
    """Names of the test and OOD sets of which runs, all of one benchmark, had other images or labels. Older results do
    not tell."""
    contents: dict[str, set[str]] = {}
    for name, data in (item for result in results for item in result.data.items()):
        if data["role"] in ("test", *OOD_ROLES) and "contents" in data:
            contents.setdefault(name, set()).add(data["contents"])
    return [name for name, found in contents.items() if len(found) > 1]


def _copies(results: Sequence[Result]) -> list[str]:
    """A line for each pair of splits that share images by content, with the largest number found by a run."""
    most: dict[tuple[str, str], tuple[int, int]] = {}
    for result in results:
        for name, data in result.data.items():
            for other, count in data.get("copies", {}).items():
                most[name, other] = max(most.get((name, other), (0, 0)), (count, data["count"]))
    return [
        f"⚠ {count} of {total} images of `{name}` are copies of images of `{other}`."
        for (name, other), (count, total) in most.items()
    ]


def _idle_seeds(results: Sequence[Result]) -> list[str]:
    """A line for each model of which several seeds drew the same training images, such as all that there are."""
    seeds: dict[str, set[int]] = {}
    names: dict[str, str] = {}
    for result in results:
        if "train" in result.data:
            identity = [result.model["fingerprint"], effective_settings(result), result.data["train"]]
            key = json.dumps(identity, sort_keys=True, default=str)
            seeds.setdefault(key, set()).add(result.seed)
            names[key] = result.model["name"]
    return [
        f"⚠ Seeds {', '.join(map(str, sorted(found)))} of `{names[key]}` drew the same training images: their runs are "
        "one measurement, and a deviation over them says nothing."
        for key, found in seeds.items()
        if len(found) > 1
    ]
