"""Trains a SurrogateAutoencoder on a frozen backbone's features, and checks the health of its attractors."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from traj_ood.attractors import Health
from traj_ood.autoencoders.surrogate import Activation, SurrogateAutoencoder, SurrogateNetwork, check_features
from traj_ood.backbones import Backbone, Features
from traj_ood.backbones.feature_cache import backbone_answers
from traj_ood.data.benchmark import sample_indices
from traj_ood.dynamics.device import training_settings
from traj_ood.dynamics.progress import StepBar
from traj_ood.errors import TrajOODError, check_word, warn
from traj_ood.io.trees import as_json
from traj_ood.scorers.scorer_set import ScorerSet
from traj_ood.training.card import surrogate_card
from traj_ood.training.config import Recipe, check_bounds
from traj_ood.training.loop import SEED_STRIDE, Trainer, seeded, shuffled
from traj_ood.training.penalties import squared_asymmetry, squared_jacobian

MIN_FEATURES = 32
_MAX_HELD_OUT = 5000
_HEALTH_FEATURES = 2000


@dataclass(frozen=True)
class SurrogateRecipe:
    """The hyperparameters of a surrogate. Defaults were chosen by convergence, distinct attractors and held-out loss
    only.

    Attributes:
        steps: maximum number of optimizer steps. Default 2,000: 11 passes over 45,000 features, which takes minutes on
            two cores.
        check_every: steps between two checks of the held-out loss, each with a log line.
        patience: number of checks without a lower held-out loss after which training stops; the best weights are kept.
        batch_size: features per step.
        learning_rate: the highest rate; after the warm-up it follows a cosine. The optimizer is AdamW with betas 0.9,
            0.95.
        weight_decay: not applied to biases.
        clip: maximum norm of the gradient.
        warmup: share of ``steps`` in which the learning rate rises linearly.
        input_noise: standard deviation of the Gaussian noise added to the standardised features, which makes f
            contract. None (default) is 0.055·√n for n features, at least 0.7: along the few directions in which
            features vary, the variance grows with n, and noise that is small in comparison leaves f close to the
            identity. More noise merges attractors. For measurements of this choice, of ``latent_noise`` and of
            ``jacobian`` see docs/choices.md.
        noise_levels: factors of that standard deviation, of which one is drawn per row of a batch. Default (1,).
        latent_noise: standard deviation of noise added to z, where ‖z‖² = k. Default 0: it improved one feature set and
            worsened another.
        jacobian: weight of the penalty ‖∂f/∂z · v‖² / ‖v‖² at a random direction v. Default 0: it makes f converge
            faster by merging attractors, finally into one.
        contractive: weight of the penalty ‖J_E‖_F² / n at the clean features, as in a contractive autoencoder. Default
            0.
        asymmetry: weight of the penalty ‖J_f − J_fᵀ‖_F² / k, which is 0 if f(z) − z is a gradient. Default 0.
        val_fraction: share of the features that is held out, drawn by the seed; at most 5,000 features.
        hidden: see :class:`SurrogateNetwork`; None takes its default.
        bottleneck: likewise.
        activation: likewise.
        latent_norm: likewise.
    Raises:
        TrajOODError: an impossible value.
    """

    steps: int = 2000
    check_every: int = 100
    patience: int = 5
    batch_size: int = 256
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    clip: float = 1.0
    warmup: float = 0.05
    input_noise: float | None = None
    noise_levels: tuple[float, ...] = (1.0,)
    latent_noise: float = 0.0
    jacobian: float = 0.0
    contractive: float = 0.0
    asymmetry: float = 0.0
    val_fraction: float = 0.1
    hidden: tuple[int, ...] | None = None
    bottleneck: int | None = None
    activation: Activation = "gelu"
    latent_norm: bool = True

    def __post_init__(self) -> None:
        weights = ("weight_decay", "jacobian", "contractive", "asymmetry")
        bounds = {
            "at least 1": ("steps", "check_every", "patience", "batch_size"),
            "above 0 and finite": ("learning_rate", "clip"),
            "0 or more and finite": ("input_noise", "latent_noise", *weights),
            "between 0 and 1": ("val_fraction",),
            "a share from 0 to 1": ("warmup",),
        }
        check_bounds(self, "surrogate recipe", bounds)
        if not self.noise_levels or not all(0 <= level < math.inf for level in self.noise_levels):
            raise TrajOODError(
                "surrogate recipe: noise_levels must be one or more finite factors of at least 0, got "
                f"{self.noise_levels}"
            )
        check_word("surrogate activation", self.activation, Activation)
        if min((*(self.hidden or ()), 1 if self.bottleneck is None else self.bottleneck)) < 1:
            raise TrajOODError(
                f"surrogate recipe: widths must be at least 1, got hidden {self.hidden} and bottleneck "
                f"{self.bottleneck}"
            )

    def noise(self, features: int) -> float:
        """Standard deviation of the input noise for features of a given width."""
        return max(0.7, 0.055 * math.sqrt(features)) if self.input_noise is None else self.input_noise

    def network(self, features: int) -> SurrogateNetwork:
        """Build an untrained network for features of a given width, with weights from torch's global generator."""
        return SurrogateNetwork(
            features, self.hidden, self.bottleneck, activation=self.activation, latent_norm=self.latent_norm
        )


@training_settings()
def fit_surrogate(
    backbone: Backbone,
    features: Tensor,
    recipe: SurrogateRecipe | None = None,
    *,
    seed: int = 0,
    out: str | Path | None = None,
    name: str | None = None,
    data: Mapping[str, Any] | None = None,
    fresh: bool = False,
    quiet: bool = False,
) -> SurrogateAutoencoder:
    """Train a surrogate on features of ID training images, and measure the health of its attractors on up to 2,000.

    The same seed, features and recipe give the same weights on the same machine, even after an interruption, because
    every round of ``check_every`` steps has its own seed. Class labels are not used.

    Args:
        backbone: the backbone of the features; it is not called.
        features: (N, n) as ``backbone.extract`` returns them, not standardised; N >= 32.
        recipe: hyperparameters. Default :class:`SurrogateRecipe`.
        seed: seed of weights, held-out share and batches.
        out: folder for checkpoint, model, ``training.json`` and README.md. Default: nothing is written.
        name: see :class:`SurrogateAutoencoder`.
        data: origin of the features, for the record.
        fresh: ignore a checkpoint in ``out``.
        quiet: whether to show no progress bar.
    Returns:
        The surrogate on the backbone's device; ``record["health"]`` holds the health of its attractors.
    Raises:
        TrajOODError: features that are too few, not finite, of another width or all the same; a loss that is not
            finite; an unwritable folder, or a checkpoint that is damaged or of other settings.
    Warns:
        UserWarning: the attractors are not healthy (see :class:`traj_ood.Health`).
    """
    recipe = recipe or SurrogateRecipe()
    check_features(f"surrogate of {backbone.name}", features, backbone.feature_dim)
    check_count(backbone, len(features))
    features = features.detach().to("cpu", torch.float32)  # where rows are drawn
    features = features.clone() if features.is_inference() else features
    with seeded(seed):
        network = recipe.network(backbone.feature_dim)
    network.set_statistics(features)
    model = SurrogateAutoencoder(backbone, network.to(backbone.device), name=name)
    trainer = SurrogateTrainer(model, features, recipe, seed, out, quiet)
    trainer.run(fresh)
    if out is not None:
        model.save_pretrained(out, asdict(recipe))
    model.record = _record(model, trainer, data)
    trainer.write_record(model.record, surrogate_card(model.record))
    warn_of_health(model)
    return model


def surrogate_health(model: SurrogateAutoencoder, features: Tensor, *, seed: int = 0, quiet: bool = True) -> Health:
    """Health of a surrogate's attractors at the paper's tolerance, from ID training features (N, n), of which a sample
    of at most 2,000 is drawn by ``seed``."""
    rows = sample_indices(len(features), min(_HEALTH_FEATURES, len(features)), seed, "surrogate/health")
    encoding = model.examine_features(Features(features[torch.tensor(rows)], None))
    with StepBar(len(rows), "attractors", quiet=quiet) as bar:
        bar.begin(len(rows))
        dictionary, _ = ScorerSet(model, ["trajectory"]).explore(encoding, tuple(map(str, rows)), bar.on_step)
    assert dictionary is not None  # the trajectory scorer needs one
    return dictionary.health()


class SurrogateTrainer(Trainer):
    """A trainer of surrogate networks that stops early by the held-out loss, and keeps the weights with the lowest;
    arguments as for :func:`fit_surrogate`.

    Attributes:
        val: (V,) indices of the held-out features, drawn by the seed.
        rows: (N − V,) indices of the training features.
    """

    def __init__(
        self,
        model: SurrogateAutoencoder,
        features: Tensor,
        recipe: SurrogateRecipe,
        seed: int,
        out: str | Path | None = None,
        quiet: bool = True,
    ) -> None:
        self.network, self.features, self.options, self.seed = model.network, features, recipe, seed
        order = torch.randperm(len(features), generator=torch.Generator().manual_seed(seed))
        held_out = min(_MAX_HELD_OUT, max(1, round(recipe.val_fraction * len(features))), len(features) - 1)
        self.val, self.rows = order[:held_out].sort().values, order[held_out:]
        super().__init__(
            f"surrogate of {model.backbone.name}",
            self.network,
            Recipe(
                batch_size=min(recipe.batch_size, len(self.rows)),
                learning_rate=recipe.learning_rate,
                weight_decay=recipe.weight_decay,
                clip=recipe.clip,
                warmup=recipe.warmup,
            ),
            steps=recipe.steps,
            round_steps=recipe.check_every,
            seed=seed * SEED_STRIDE + 1,
            out=out,
            identity={
                "recipe": as_json(asdict(recipe)),
                "seed": seed,
                "backbone": model.backbone_fingerprint,
                "features": hashlib.sha256(features.contiguous().numpy().data).hexdigest() if out is not None else "",
            },
            quiet=quiet,
        )

    @property
    def best_check(self) -> int:
        """Index of the first check with the lowest held-out loss."""
        return min(range(len(self.log)), key=lambda i: self.log[i]["val_loss"])

    @property
    def finished(self) -> bool:
        waited = len(self.log) - 1 - self.best_check if self.log else 0
        return super().finished or waited >= self.options.patience

    def run(self, fresh: bool = False) -> None:
        """As :meth:`Trainer.run`; afterwards the network has the best weights."""
        super().run(fresh)
        self.network.load_state_dict(self.kept["best"])

    def losses(self, steps: int, draws: torch.Generator) -> Iterator[Tensor]:
        for rows in shuffled(self.rows, self.recipe.batch_size, steps, draws):
            yield self.loss(self.standardised(rows), draws)

    def check(self) -> dict[str, float]:
        denoising, clean = self.held_out_loss()
        if not math.isfinite(denoising):
            raise TrajOODError(f"{self.title}: the held-out loss is {denoising}: lower the learning rate")
        if not self.log or denoising < self.log[self.best_check]["val_loss"]:
            self.keep("best")
        return {"val_loss": denoising, "val_clean": clean}

    def standardised(self, rows: Tensor) -> Tensor:
        """The features at ``rows`` (B,), standardised, (B, n) on the network's device."""
        return self.network.standardise(self.features.index_select(0, rows).to(self.device))

    def loss(self, clean: Tensor, draws: torch.Generator) -> Tensor:
        """Mean squared error of reconstructing ``clean`` (B, n) with noise added, plus the penalties on Jacobians."""
        recipe, network = self.options, self.network
        latents = network.encode(self.noisy(clean, draws))
        if recipe.latent_noise:
            latents = latents + _noise(latents, recipe.latent_noise, draws)
        return (network.decode(latents) - clean).square().mean() + self.penalties(clean, latents.detach(), draws)

    def noisy(self, clean: Tensor, draws: torch.Generator) -> Tensor:
        """Add noise of the recipe's levels to ``clean`` (B, n)."""
        recipe = self.options
        noise = _noise(clean, recipe.noise(clean.shape[1]), draws)
        if recipe.noise_levels != (1.0,):
            levels = torch.tensor(recipe.noise_levels)
            noise = noise * levels[torch.randint(len(levels), (len(clean), 1), generator=draws)].to(noise)
        return clean + noise

    def penalties(self, clean: Tensor, latents: Tensor, draws: torch.Generator) -> Tensor | float:
        """The sum of the recipe's penalties at features (B, n) and latents (B, k), detached; 0 without penalties."""
        recipe, network = self.options, self.network
        found: Tensor | float = 0.0

        def self_map(z: Tensor) -> Tensor:
            return network.encode(network.decode(z))

        if recipe.jacobian:
            direction = _noise(latents, 1.0, draws)
            along = torch.func.jvp(self_map, (latents,), (direction,))[1]
            stretched = along.square().sum(dim=1) / direction.square().sum(dim=1)
            found = found + recipe.jacobian * stretched.mean()
        if recipe.contractive:
            inputs = clean.detach().requires_grad_(True)
            stretched = squared_jacobian(network.encode(inputs), inputs, draws)
            found = found + recipe.contractive * stretched / clean.shape[1]
        if recipe.asymmetry:
            twisted = squared_asymmetry(self_map, latents, draws)
            found = found + recipe.asymmetry * twisted / latents.shape[1]
        return found

    def held_out_loss(self) -> tuple[float, float]:
        """Mean squared error on the held-out features with noise (the same at every check) and without."""
        draws = torch.Generator().manual_seed(self.seed)
        errors = torch.zeros(2, dtype=torch.float64)
        with torch.inference_mode():
            for rows in self.val.split(1024):
                clean = self.standardised(rows)
                for kind, inputs in enumerate((self.noisy(clean, draws), clean)):
                    restored = self.network.decode(self.network.encode(inputs))
                    errors[kind] += float((restored - clean).square().mean(dim=1).sum())
        denoising, plain = (errors / len(self.val)).tolist()
        return denoising, plain


def _noise(like: Tensor, deviation: float, draws: torch.Generator) -> Tensor:
    return deviation * torch.randn(like.shape, generator=draws).to(like.device)


def _record(model: SurrogateAutoencoder, trainer: SurrogateTrainer, data: Mapping[str, Any] | None) -> dict[str, Any]:
    best, began = trainer.log[trainer.best_check], time.perf_counter()
    health = surrogate_health(model, trainer.features[trainer.rows], seed=trainer.seed, quiet=trainer.quiet)
    return {
        "name": model.name,
        "backbone": {
            "name": model.backbone.name,
            "fingerprint": model.backbone_fingerprint,
            "answers": backbone_answers(model.backbone),
        },
        "network": model.network.geometry(),
        "recipe": as_json(asdict(trainer.options)),
        "input_noise": trainer.options.noise(model.feature_dim),
        "seed": trainer.seed,
        "data": {**(data or {}), "trained_on": len(trainer.rows), "held_out": len(trainer.val)},
        "best_step": best["step"],
        "validation_loss": best["val_loss"],
        "validation_clean": best["val_clean"],
        "parameters": sum(p.numel() for p in model.network.parameters()),
        "fingerprint": model.fingerprint(),
        "health": health.as_dict(),
        "health_seconds": round(time.perf_counter() - began, 1),
        **trainer.record(),
    }


def warn_of_health(model: SurrogateAutoencoder) -> None:
    """Warn of each reason in the model's record why its attractors are unhealthy."""
    for text in model.record.get("health", {}).get("warnings", []):
        warn(f"surrogate of {model.backbone.name}: unhealthy attractors: {text}", stacklevel=4)


def check_count(backbone: Backbone, count: int) -> None:
    """Refuse fewer than 32 features."""
    if count < MIN_FEATURES:
        raise TrajOODError(
            f"surrogate of {backbone.name}: expected features of at least {MIN_FEATURES} ID training images, got "
            f"{count}: give more images"
        )
