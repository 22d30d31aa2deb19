"""The README.md that stands beside trained weights, written from the training record."""

from __future__ import annotations

from typing import Any


def model_card(name: str, record: dict[str, Any]) -> str:
    """Markdown: what the model is, its data, recipe, losses, convergence figures and versions, all from ``record``."""
    config, health = record["config"], record["health"]
    (split, data), *_ = record["data"].items()
    lines = [
        f"# {name}",
        "",
        f"A {config['family']} autoencoder with {record['parameters']:,} parameters, trained by `traj-ood train` on",
        f"the ID training split of the benchmark `{config['benchmark']}` ({data['count']:,} images, `{split}`, list",
        f"sha256 `{data['sha256'][:16]}…`). Made for OOD detection with its latent dynamics z → E(D(z)); its",
        "reconstructions are blurred by design, since it was trained to remove noise.",
        "",
        "## Recipe",
        "",
        *_table({**config["model"], **config["recipe"], "seed": config["seed"]}),
        "",
        "## Losses",
        "",
        f"Training loss (corrupted input, mean squared error, normalised units): {record['log'][0]['loss']:.4f} after",
        f"the first epoch, {record['log'][-1]['loss']:.4f} after the last of {len(record['log'])}. "
        + (
            f"Clean reconstruction of held-out ID images: {record['validation_loss']:.4f}."
            if record["validation_loss"] is not None
            else ""
        ),
        "",
    ]
    if health:
        lines += [
            "## Convergence",
            "",
            f"Trajectories of {health['count']:,} ID training images, tolerance 1e-5 on the squared residual, at most "
            "500 steps:",
            "",
            *_table(
                {
                    "converged": f"{health['converged']:.2%}",
                    "distinct attractors (cosine 0.99)": health["distinct"],
                    "steps, quantiles 5/25/50/75/95 %": _numbers(health["steps_quantiles"], ".0f"),
                    "last squared residual, same quantiles": _numbers(health["residual_quantiles"], ".1e"),
                    "displacement ‖z* − z0‖/‖z0‖, same quantiles": _numbers(health["displacement_quantiles"], ".2f"),
                }
            ),
            "",
        ]
    versions = ", ".join(f"{k} {v}" for k, v in sorted(record["versions"].items()))
    lines += [
        "## Provenance",
        "",
        f"Fingerprint `{record['fingerprint'][:16]}…`, commit `{record['commit']}`, {record['seconds']:.0f} s of",
        f"training and checks; {versions}. `training.json` holds all of this, with the loss of every epoch.",
        "",
    ]
    return "\n".join(lines)


def _table(rows: dict[str, Any]) -> list[str]:
    return ["| | |", "|---|---|", *(f"| {k} | {v} |" for k, v in rows.items())]


def _numbers(values: list[float], form: str) -> str:
    return ", ".join(format(v, form) for v in values)
