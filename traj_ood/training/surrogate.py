"""Train a SurrogateAutoencoder on a frozen backbone's features: resumable, logged, checked for healthy attractors."""

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
from tqdm import tqdm

from traj_ood.attractors import Health
from traj_ood.autoencoders.surrogate import Activation, SurrogateAutoencoder, SurrogateNetwork, check_features
from traj_ood.backbones import Backbone, Features
from traj_ood.backbones.feature_cache import backbone_answers
from traj_ood.data.benchmark import sample_indices
from traj_ood.dynamics.device import training_settings
from traj_ood.errors import TrajOODError, check_word, warn
from traj_ood.io.trees import as_json
from traj_ood.scorers.scorer_set import ScorerSet
from traj_ood.training.card import surrogate_card
from traj_ood.training.config import Recipe
from traj_ood.training.loop import SEED_STRIDE, Trainer, shuffled
from traj_ood.training.penalties import squared_asymmetry, squared_jacobian

MIN_FEATURES = 32
_MAX_HELD_OUT = 5000
_HEALTH_FEATURES = 2000


@dataclass(frozen=True)
class SurrogateRecipe:
    """How to train a surrogate. Defaults were chosen on convergence, distinct attractors and held-out loss alone.

    Attributes:
        steps: most optimizer steps. Default 2,000: 11 passes over 45,000 features, minutes on two cores, and as many
            for a small set.
        check_every: steps between two checks of the held-out loss, each with a log line and a checkpoint.
        patience: checks without a better held-out loss before training stops; the best weights are kept.
        batch_size, learning_rate, weight_decay, clip: as usual; AdamW with betas 0.9, 0.95; ``clip`` is the
            gradient's norm; biases do not decay. The rate follows a cosine after ``warmup``, a share of ``steps``.
        input_noise: deviation of the Gaussian noise added to the standardised features; it is what makes f contract.
            None (default) is 0.055·√n of n features, at least 0.7: along the few directions in which features vary, the
            variance grows with n, and noise that is small beside it leaves f close to the identity. More noise merges
            attractors. Figures of this choice, of ``latent_noise`` and of ``jacobian``: docs/choices.md.
        noise_levels: multiples of that deviation, of which each row of a batch draws one. Default (1,): one level.
        latent_noise: likewise on z, where ‖z‖² = k. Default 0: it helped one feature set and hurt another.
        jacobian: weight of ‖∂f/∂z · v‖² / ‖v‖² at a random direction v. Default 0: it speeds f up by merging
            attractors, in the end into one.
        val_fraction: share of the features held out, drawn by the seed; 5,000 features at most.
        hidden, bottleneck, activation, latent_norm: of :class:`SurrogateNetwork`; None takes its defaults.
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
        for key in ("steps", "check_every", "patience", "batch_size"):
            if not getattr(self, key) >= 1:
                raise TrajOODError(f"surrogate recipe: {key} must be at least 1, got {getattr(self, key)}")
        for key in ("learning_rate", "clip"):
            if not 0 < getattr(self, key) < math.inf:
                raise TrajOODError(f"surrogate recipe: {key} must be above 0 and finite, got {getattr(self, key)}")
        for key in ("weight_decay", "input_noise", "latent_noise", "jacobian", "contractive", "asymmetry"):
            if getattr(self, key) is not None and not 0 <= getattr(self, key) < math.inf:
                raise TrajOODError(f"surrogate recipe: {key} must be 0 or more and finite, got {getattr(self, key)}")
        if not self.noise_levels or not all(0 <= level < math.inf for level in self.noise_levels):
            raise TrajOODError(
                f"surrogate recipe: noise_levels must be one or more finite multiples from 0 on, got "
                f"{self.noise_levels}"
            )
        if not 0 < self.val_fraction < 1:
            raise TrajOODError(f"surrogate recipe: val_fraction must be between 0 and 1, got {self.val_fraction}")
        if not 0 <= self.warmup <= 1:
            raise TrajOODError(f"surrogate recipe: warmup must be a share from 0 to 1, got {self.warmup}")
        check_word("surrogate activation", self.activation, Activation)
        if min((*(self.hidden or ()), 1 if self.bottleneck is None else self.bottleneck)) < 1:
            raise TrajOODError(
                f"surrogate recipe: widths must be at least 1, got hidden {self.hidden} and bottleneck "
                f"{self.bottleneck}"
            )

    def noise(self, features: int) -> float:
        """Deviation of the input noise for features of that width."""
        return max(0.7, 0.055 * math.sqrt(features)) if self.input_noise is None else self.input_noise

    def network(self, features: int) -> SurrogateNetwork:
        """An untrained network for features of that width; torch's global generator draws its weights."""
        return SurrogateNetwork(
            features, self.hidden, self.bottleneck, activation=self.activation, latent_norm=self.latent_norm
        )


def fit_surrogate(
    backbone: Backbone,
    features: Tensor,
    recipe: SurrogateRecipe | None = None,
    *,
    seed: int = 0,
    out: Path | None = None,
    name: str | None = None,
    data: Mapping[str, Any] | None = None,
    fresh: bool = False,
    quiet: bool = False,
) -> SurrogateAutoencoder:
    """Train a surrogate on features of ID training images, and follow the trajectories of up to 2,000 of them.

    The same seed, features and recipe give the same weights on one machine, also after an interruption: every round
    of ``check_every`` steps draws from its own seed. Class labels play no part.

    Args:
        backbone: whose features these are; it is not called.
        features: (N, n) as ``backbone.extract`` gives them, not standardised; at least 32.
        recipe: default :class:`SurrogateRecipe`.
        seed: of weights, held-out share and batches.
        out: folder for checkpoint, model, ``training.json`` and README.md. Default: nothing is written.
        name: see :class:`SurrogateAutoencoder`.
        data: where the features come from, for the record.
        fresh: ignore a checkpoint in ``out``.
        quiet: no progress bar.
    Returns:
        The surrogate on the backbone's device; ``record["health"]`` is its dictionary's health.
    Raises:
        TrajOODError: features that are too few, not finite, of another width or all the same; a loss that is not
            finite; an unwritable folder, or a checkpoint that is damaged or of other settings.
    Warns:
        UserWarning: the attractors are not healthy (see :class:`traj_ood.Health`).
    """
    recipe = recipe or SurrogateRecipe()
    check_features(f"surrogate of {backbone.name}", features, backbone.feature_dim)
    check_count(backbone, len(features))
    with training_settings():
        features = features.float().clone() if features.is_inference() else features.float()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
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
    """Convergence of f at the paper's tolerance, on up to 2,000 of (N, n) ID training features drawn by ``seed``."""
    rows = sample_indices(len(features), min(_HEALTH_FEATURES, len(features)), seed, "surrogate/health")
    encoding = model.examine_features(Features(features[torch.tensor(rows)], None))
    with tqdm(total=len(rows), desc="attractors", unit="img", delay=2, disable=quiet, leave=False) as bar:

        def on_step(step: int, running: int) -> None:
            bar.update(len(rows) - running - bar.n)
            bar.set_postfix(step=step, running=running, refresh=False)

        dictionary, _ = ScorerSet(model, ["trajectory"]).explore(encoding, tuple(map(str, rows)), on_step)
    assert dictionary is not None  # the trajectory scorer needs one
    return dictionary.health()


class SurrogateTrainer(Trainer):
    """Trains on batches of features; checks of the held-out loss say when to stop, and which weights are kept.

    Args:
        model: whose network is trained. features: (N, n), of which the seed draws those that are held out.
        recipe, seed, out, quiet: see :func:`fit_surrogate`.
    Attributes:
        val, rows: (V,) and (N − V,) rows of ``features`` that are held out and trained on.
    """

    def __init__(
        self,
        model: SurrogateAutoencoder,
        features: Tensor,
        recipe: SurrogateRecipe,
        seed: int,
        out: Path | None = None,
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
                "features": _digest(features) if out is not None else "",
            },
            quiet=quiet,
        )

    @property
    def best_check(self) -> int:
        """Number of the check with the lowest held-out loss, the first of equals."""
        return min(range(len(self.log)), key=lambda i: self.log[i]["val_loss"])

    @property
    def finished(self) -> bool:
        waited = len(self.log) - 1 - self.best_check if self.log else 0
        return super().finished or waited >= self.options.patience

    def run(self, fresh: bool = False) -> None:
        """As :meth:`Trainer.run`; the best weights are in the network at the end."""
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
        """(B, n) features of these rows (B,), standardised, on the network's device."""
        return self.network.standardise(self.features.index_select(0, rows).to(self.device))

    def loss(self, clean: Tensor, draws: torch.Generator) -> Tensor:
        """Mean squared error of ``clean`` (B, n) from its noisy self, plus the recipe's penalties on Jacobians."""
        recipe, network = self.options, self.network
        latents = network.encode(self.noisy(clean, draws))
        if recipe.latent_noise:
            latents = latents + _noise(latents, recipe.latent_noise, draws)
        return (network.decode(latents) - clean).square().mean() + self.penalties(clean, latents.detach(), draws)

    def noisy(self, clean: Tensor, draws: torch.Generator) -> Tensor:
        """``clean`` (B, n) with noise of the recipe's levels."""
        recipe = self.options
        noise = _noise(clean, recipe.noise(clean.shape[1]), draws)
        if recipe.noise_levels != (1.0,):
            levels = torch.tensor(recipe.noise_levels)
            noise = noise * levels[torch.randint(len(levels), (len(clean), 1), generator=draws)].to(noise)
        return clean + noise

    def penalties(self, clean: Tensor, latents: Tensor, draws: torch.Generator) -> Tensor | float:
        """The recipe's, at features (B, n) and latents (B, k), neither with a gradient; 0 without any."""
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
        """Mean squared error of the denoising (same noise at every check) and of the clean reconstruction."""
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
    """Warn of every reason why the attractors are unhealthy, as the model's record has them."""
    for text in model.record.get("health", {}).get("warnings", []):
        warn(f"surrogate of {model.backbone.name}: unhealthy attractors: {text}", stacklevel=3)


def check_count(backbone: Backbone, count: int) -> None:
    """Refuse too few features.

    Raises:
        TrajOODError: names the backbone.
    """
    if count < MIN_FEATURES:
        raise TrajOODError(
            f"surrogate of {backbone.name}: expected features of at least {MIN_FEATURES} ID training images, got "
            f"{count}: give more images"
        )


def _digest(features: Tensor) -> str:
    digest = hashlib.sha256(repr(tuple(features.shape)).encode())
    for block in features.split(4096):
        digest.update(block.cpu().contiguous().numpy().data)
    return digest.hexdigest()
