"""Model cards (README.md) of trained autoencoders, classifiers and surrogates, made from their records."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from traj_ood.io.card import listed, markdown_card, numbers


def autoencoder_card(name: str, record: Mapping[str, Any]) -> str:
    """Markdown card of an autoencoder: description, data, recipe, losses, convergence and versions."""
    config, log, validation = record["config"], record["log"], record["validation_loss"]
    noise, hidden = config["recipe"]["input_noise"], any(config["recipe"]["mask_ratios"])
    inputs = "corrupted input, " if noise or hidden else ""
    blur = "; its reconstructions are blurred by design, since it was trained to remove noise" if noise else ""
    return markdown_card(
        name,
        [
            f"A {config['family']} autoencoder with {record['parameters']:,} parameters, trained by `traj-ood train` "
            f"on {_training_split(record)}. Made for OOD detection with its latent dynamics z → E(D(z)){blur}."
        ],
        {
            "Recipe": [_recipe(record)],
            "Losses": [
                f"Training loss ({inputs}mean squared error, normalised units): {log[0]['loss']:.4f} after the first "
                f"epoch, {log[-1]['loss']:.4f} after the last of {len(log)}."
                + (f" Clean reconstruction of held-out ID images: {validation:.4f}." if validation is not None else "")
            ],
            "Convergence": _convergence(record["health"]),
            "Provenance": [_provenance(record)],
        },
    )


def classifier_card(name: str, record: Mapping[str, Any]) -> str:
    """Markdown card of a classifier: description, data, accuracy, recipe and versions."""
    classes, log = record["classes"], record["log"]
    reached = [
        f"- {role}: {found['accuracy']:.2%} of {found['count']:,} images" for role, found in record["accuracy"].items()
    ]
    return markdown_card(
        name,
        [
            f"A classifier ({record['config']['model']['architecture']} of timm, {record['parameters']:,} parameters) "
            f"of {len(classes)} classes, trained from scratch by `traj-ood train` on {_training_split(record)}. "
            f"Classes: {', '.join(classes)}.",
            "Load it with `traj-ood bench <benchmark> --model timm:<this folder>`, or in timm with "
            "`create_model('local-dir:<this folder>', pretrained=True)`.",
        ],
        {
            "Accuracy": [
                "\n".join(reached) or "Not measured: the benchmark's other ID splits have no labels.",
                f"Training loss (cross-entropy): {log[0]['loss']:.4f} in the first epoch, {log[-1]['loss']:.4f} in "
                f"the last of {len(log)}.",
            ],
            "Recipe": [_recipe(record)],
            "Provenance": [_provenance(record)],
        },
    )


def surrogate_card(record: Mapping[str, Any]) -> str:
    """Markdown card of a surrogate: description, data, losses, convergence and versions."""
    backbone, data, network = record["backbone"], record["data"], record["network"]
    widths = " → ".join(str(w) for w in (network["features"], *network["hidden"], network["bottleneck"]))
    source = f"`{data['split']}` of the benchmark `{data['benchmark']}`" if "benchmark" in data else "features given"
    return markdown_card(
        f"Surrogate of {backbone['name']}",
        [
            f"An autoencoder ({widths} and back, {record['parameters']:,} parameters) of the frozen backbone's "
            f"standardised features, trained on {data['trained_on']:,} images ({source})"
            f"{' to remove noise' if record['input_noise'] else ''}. Made for OOD detection with its latent dynamics "
            "z → E(D(z)).",
            {
                "held-out loss: denoising, clean": numbers(
                    (record["validation_loss"], record["validation_clean"]), ".4f"
                ),
                f"best of {record['log'][-1]['step']:,} steps": f"{record['best_step']:,}",
                "backbone": f"fingerprint `{backbone['fingerprint'][:16]}…`",
                "seed": record["seed"],
            },
        ],
        {
            "Convergence": _convergence(record["health"]),
            "Provenance": [_provenance(record)],
        },
    )


def _training_split(record: Mapping[str, Any]) -> str:
    (split, data), *_ = record["data"].items()
    return (
        f"the ID training split of the benchmark `{record['config']['benchmark']}` ({data['count']:,} images, "
        f"`{split}`, list sha256 `{data['sha256'][:16]}…`)"
    )


def _recipe(record: Mapping[str, Any]) -> dict[str, Any]:
    config = record["config"]
    return {**config["model"], **config["recipe"], "seed": config["seed"]}


def _convergence(health: Mapping[str, Any]) -> list[str | Mapping[str, Any]]:
    if not health:
        return []
    warnings = {"warnings": "; ".join(health["warnings"])} if health["warnings"] else {}
    return [
        f"Trajectories of {health['count']:,} ID training images, tolerance 1e-5 on the squared residual, at most 500 "
        "steps:",
        {
            "converged": f"{health['converged']:.2%}",
            "distinct attractors (cosine 0.99)": health["distinct"],
            "steps, quantiles 5/25/50/75/95 %": numbers(health["steps_quantiles"], ".0f"),
            "last squared residual, same quantiles": numbers(health["residual_quantiles"], ".1e"),
            "displacement ‖z* − z0‖/‖z0‖, same quantiles": numbers(health["displacement_quantiles"], ".2f"),
            **warnings,
        },
    ]


def _provenance(record: Mapping[str, Any]) -> str:
    return (
        f"Fingerprint `{record['fingerprint'][:16]}…`, commit `{record['commit']}`, {record['seconds']:.0f} s of "
        f"training; {listed(record['versions'])}. `training.json` holds all of this, with the whole log."
    )
