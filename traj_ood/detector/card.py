"""The model card of a detector, the README.md in its folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from traj_ood.io.card import listed, markdown_card


def card(record: Mapping[str, Any]) -> str:
    """The card as Markdown: what the detector is, its training and calibration data, how to load it, and its limits."""
    model, scorer, attractors = record["model"], record["scorer"], record["training"]["attractors"]
    own_code = model["kind"] == "callable"
    load = 'Detector.load("this-folder"' + (", autoencoder=my_model)" if own_code else ")")
    unhealthy = ""
    if attractors is not None and not attractors["healthy"]:
        unhealthy = f"> **Unhealthy attractors:** {'; '.join(attractors['warnings'])}"
    return markdown_card(
        f"OOD detector: {scorer['label']} on {model['name']}",
        [
            "Decides whether an image differs from the in-distribution (ID) images that it was fitted on. Higher "
            "scores are more out of distribution.",
            unhealthy,
            "```python\n"
            "from traj_ood import Detector\n\n"
            f"detector = {load}\n"
            'judgement = detector.judge(["photo.jpg"])  # scores, p_values, decisions (True = OOD), steps, status\n'
            "```",
            "The model's code is not part of this folder: build the model and pass it as `autoencoder=`; its weights "
            "are compared."
            if own_code
            else "The folder contains the model's weights; nothing is downloaded, and no code in it is run.",
            _rows(record),
        ],
        {
            "Threshold": [_threshold(record["calibration"]), _history(record["history"])],
            "Limits": [
                "Nothing here was measured on OOD images: how many of them are detected depends on what they are. The "
                "share of accepted ID images holds for new images drawn like the calibration images, not for another "
                "camera, preprocessing or season."
            ],
            "Versions": [f"Saved {record['created']} with {listed(record['versions'])}."],
        },
    )


def _rows(record: Mapping[str, Any]) -> dict[str, str]:
    model, scorer, training, settings = (record[k] for k in ("model", "scorer", "training", "settings"))
    skipped = f" ({training['skipped']} more could not be read)" if training["skipped"] else ""
    rows = {
        "score": "; ".join(filter(None, [scorer["summary"], listed(scorer["options"], " = ")])),
        "model": f"{model['name']} ({model['family']}, {model['parameters']:,} parameters), fingerprint "
        f"`{model['fingerprint'][:16]}…`",
        "images": " × ".join(map(str, model["input_shape"])) + " (C × H × W)" + _prepared(model.get("preprocessing")),
        "training images": f"{training['images']:,}{skipped}"
        + (f", {training['classes']} classes" if training["classes"] else ""),
    }
    if scorer["steps"]:
        steps = "1 step" if scorer["steps"] == 1 else f"at most {scorer['steps']} steps"
        rows["trajectories"] = f"{steps}, tolerance {settings['tol']:g} on the squared residual"
    if training.get("reading"):
        rows["image files"] = f"read with {listed(training['reading'], ' = ')}"
    if training["list"]:
        rows["training list"] = f"sha256 `{training['list'][:16]}…`"
    health = training["attractors"]
    if health is not None:
        rows["attractors"] = f"{health['distinct']} distinct, {health['converged']:.1%} of the trajectories converged"
    return rows


def _prepared(how: Mapping[str, Any] | None) -> str:
    """The preprocessing in words; empty for detectors of older versions, which do not record it."""
    if how is None:
        return ""
    if "own" in how:
        return ", by a user-defined transform"
    sized = {
        "direct": f"resized ({how['interpolation']})",
        "crop": f"shorter side to {how['short_side']} ({how['interpolation']}), centre crop",
        "none": "not resized",
    }[how["resize"]]
    unit = "" if how["rescale"] == 1 / 255 else f", times {how['rescale']:g} of 0 … 255"
    return f", {sized}{unit}, mean {_numbers(how['mean'])}, std {_numbers(how['std'])}"


def _numbers(values: Sequence[float]) -> str:
    return " ".join(f"{value:.4g}" for value in values)


def _threshold(known: Mapping[str, Any] | None) -> str:
    if known is None:
        return "None: `detector.calibrate(held_out_id_images, tpr=0.95)` sets one."
    low, high = known["acceptance"]
    how = (
        f"the conformal quantile of {known['images']:,} held-out ID images for which at least {known['tpr']:.4g} of "
        "new ID images are accepted, on average over such calibration sets. For one set of this size"
    )
    if known["classes"] is not None:
        counts = [entry["images"] for entry in known["classes"]]
        how = (
            f"at least {known['tpr']:.4g} of new ID images of every class are accepted, on average over calibration "
            f"sets, by the conformal quantiles of {len(counts)} classes with {min(counts):,} to {max(counts):,} "
            "held-out ID images each, the highest of which is the threshold. For the smallest class"
        )
    return (
        f"A score above **{known['threshold']:.6g}** counts as OOD: {how} the share lies between {low:.3f} and "
        f"{high:.3f} with 90 % confidence. The same decision by p-value: p <= {known['level']:.6g}."
    )


def _history(entries: Sequence[Mapping[str, Any]]) -> str:
    """A table of all calibrations, if there is more than one."""
    if len(entries) < 2:
        return ""
    rows = [
        f"| {e['at']} | {e['images']:,} | {e['classes'] or '–'} | {e['tpr']:.4g} | "
        f"{e['threshold']:.6g} | {e['note'].replace('|', '/')} |"
        for e in entries
    ]
    head = "| calibrated | images | classes | accepts | threshold | from |\n|---|--:|--:|--:|--:|---|"
    return "\n".join(["All calibrations, of which the last is used:\n", head, *rows])
