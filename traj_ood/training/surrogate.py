"""Train a SurrogateAutoencoder on a frozen backbone's features: resumable, logged, checked for healthy attractors."""

from __future__ import annotations

import hashlib
import io
import json
import math
import re
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from tqdm import tqdm

from traj_ood.attractors import Health
from traj_ood.autoencoders.surrogate import Activation, SurrogateAutoencoder, SurrogateNetwork, check_features
from traj_ood.backbones import Backbone, Features, load_backbone
from traj_ood.backbones.feature_cache import BLOCK, FeatureCache, backbone_answers
from traj_ood.data import Benchmark, ImageSource, preflight
from traj_ood.data.benchmark import sample_indices
from traj_ood.data.contents import distrust
from traj_ood.dynamics.behaviour import agree, transform_digest
from traj_ood.dynamics.device import training_settings
from traj_ood.errors import TrajOODError, unknown_name, warn
from traj_ood.io.files import cache_folder, write_atomic
from traj_ood.io.provenance import code_digest, environment, git_commit
from traj_ood.scorers.scorer_set import ScorerSet
from traj_ood.text import printable

LIMIT = 50_000
"""Training features a surrogate is trained on at most: 400 MB at 2,048 dimensions."""
MIN_FEATURES = 32
_MAX_HELD_OUT = 5000
_HEALTH_FEATURES = 2000
_SAMPLE_SEED = 0  # of the sample of LIMIT images: surrogates of several seeds share one extraction


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
            variance grows with n, and noise that is small beside it leaves f close to the identity. At 0.7, 74 % of the
            trajectories of a mixture in 512 dimensions settled, at 1.24 93 %. More merges attractors: a classifier of 8
            classes has 14 at 0.8 and 11 at 0.88.
            (Tried while the default was chosen, not recorded; so are the figures below.)
        latent_noise: likewise on z, where ‖z‖² = k. Default 0: it helped one feature set and hurt another.
        jacobian: weight of ‖∂f/∂z · v‖² / ‖v‖² at a random direction v. Default 0: it speeds f up by merging attractors
            (at 0.1 from 9 to 7), in the end into one.
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
    latent_noise: float = 0.0
    jacobian: float = 0.0
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
        for key in ("weight_decay", "input_noise", "latent_noise", "jacobian"):
            if getattr(self, key) is not None and not 0 <= getattr(self, key) < math.inf:
                raise TrajOODError(f"surrogate recipe: {key} must be 0 or more and finite, got {getattr(self, key)}")
        if not 0 < self.val_fraction < 1:
            raise TrajOODError(f"surrogate recipe: val_fraction must be between 0 and 1, got {self.val_fraction}")
        if not 0 <= self.warmup <= 1:
            raise TrajOODError(f"surrogate recipe: warmup must be a share from 0 to 1, got {self.warmup}")
        if self.activation not in get_args(Activation):
            raise unknown_name("surrogate activation", str(self.activation), get_args(Activation))
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

    The same seed, features and recipe give the same weights on one machine, also after an interruption: every stretch
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
    _check_count(backbone, len(features))
    with training_settings():
        features = features.float().clone() if features.is_inference() else features.float()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = recipe.network(backbone.feature_dim)
        network.set_statistics(features)
        model = SurrogateAutoencoder(backbone, network.to(backbone.device), name=name)
        run = _Run(model, features, recipe, seed, out)
        run.resume(fresh)
        run.train(quiet)
    model.record = _record(model, run, features, data, quiet)
    if out is not None:
        _write(model, recipe, out)
    _warn(model)
    return model


def surrogate_for(
    backbone: str | Backbone,
    benchmark: Benchmark,
    *,
    out: Path | None = None,
    recipe: SurrogateRecipe | None = None,
    seed: int = 0,
    workers: int = 2,
    on_error: Literal["raise", "skip"] = "raise",
    limit: int = LIMIT,
    device: torch.device | None = None,
    fresh: bool = False,
    quiet: bool = False,
) -> SurrogateAutoencoder:
    """The surrogate of a backbone for a benchmark's ID training split: a finished one from ``out``, else trained now.

    Args:
        backbone: a spec such as ``timm:resnet18`` (see :func:`traj_ood.backbones.load_backbone`), or a backbone.
        benchmark: its training split alone is read.
        out: features go to ``out/features``, the surrogate to a folder of ``out/surrogates`` that is named after the
            backbone's fingerprint and transform, the images' contents, recipe and seed; one that other code of this
            package has trained is trained again. Default: ``$TRAJ_OOD_DATA``, or ``~/.cache/traj_ood``.
        recipe, seed, quiet: see :func:`fit_surrogate`.
        workers: threads that read images.
        on_error: ``raise`` (default) or ``skip`` images that cannot be read.
        limit: most training images; a larger split is sampled, the same whatever the seed. Default 50,000.
        device: where backbone and surrogate run. Default: where the backbone is.
        fresh: train again even when a finished surrogate or a checkpoint is there, on features that are extracted
            again of images that are hashed again.
    Raises:
        TrajOODError: see :func:`fit_surrogate`; also images that are missing or cannot be read, damaged files in
            ``out``, and impossible arguments.
    """
    if workers < 1 or limit < MIN_FEATURES:
        raise TrajOODError(
            f"surrogate: expected at least 1 worker and a limit of at least {MIN_FEATURES} images, got {workers} and "
            f"{limit}"
        )
    if on_error not in ("raise", "skip"):
        raise unknown_name("value of on_error", str(on_error), ("raise", "skip"))
    recipe, root = recipe or SurrogateRecipe(), out if out is not None else cache_folder()
    backbone = load_backbone(backbone) if isinstance(backbone, str) else backbone
    if device is not None:
        backbone.to(device)
    images = benchmark.train.images
    _check_count(backbone, len(images))
    if len(images) > limit:
        images = images.select(sample_indices(len(images), limit, _SAMPLE_SEED, f"surrogate/{benchmark.train.name}"))
    if fresh:
        distrust()
    data = {
        "benchmark": benchmark.name,
        "split": benchmark.train.name,
        "count": len(images),
        "sha256": images.digest(),
    }
    transform = transform_digest(backbone.transform)
    folder = root / "surrogates" / _folder_name(backbone, [data["sha256"], transform, asdict(recipe), seed])
    if not fresh and (folder / "training.json").is_file():
        model = SurrogateAutoencoder.from_pretrained(folder, backbone)
        if _is_wanted(model, on_error):
            _warn(model)
            return model
    if on_error == "raise":
        preflight(benchmark)
    cache = FeatureCache(root / "features")
    if fresh:
        cache.distrust()
    features, failures = _extract(backbone, images, cache, workers, on_error, quiet)
    data |= {"skipped": len(failures)}
    return fit_surrogate(backbone, features, recipe, seed=seed, out=folder, data=data, fresh=fresh, quiet=quiet)


def _is_wanted(model: SurrogateAutoencoder, on_error: str) -> bool:
    """Whether a finished surrogate is what training would give now: made by this code, of this backbone's answers, and
    not without images that the caller wants read or reported."""
    record, own = model.record, backbone_answers(model.backbone)
    return (
        record.get("versions", {}).get("code") == code_digest()
        and (own is None or agree(record.get("backbone", {}).get("answers"), own))
        and (on_error == "skip" or not record.get("data", {}).get("skipped"))
    )


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


class _Run:
    """State of a training run: weights, best weights, optimizer and log, checkpointed at every check."""

    def __init__(
        self, model: SurrogateAutoencoder, features: Tensor, recipe: SurrogateRecipe, seed: int, out: Path | None
    ) -> None:
        self.network, self.features, self.recipe, self.seed = model.network, features, recipe, seed
        self.device, self.title = model.device, f"surrogate of {model.backbone.name}"
        order = torch.randperm(len(features), generator=torch.Generator().manual_seed(seed))
        held_out = min(_MAX_HELD_OUT, max(1, round(recipe.val_fraction * len(features))), len(features) - 1)
        self.val, self.rows = order[:held_out].sort().values, order[held_out:]
        self.batch_size = min(recipe.batch_size, len(self.rows))
        self.log: list[dict[str, float]] = []
        self.best = {k: v.clone() for k, v in self.network.state_dict().items()}
        parameters = list(self.network.parameters())
        groups: list[dict[str, Any]] = [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": recipe.weight_decay},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.95))
        self.checkpoint = None if out is None else out / "checkpoint.pt"
        self.identity = {
            "recipe": json.loads(json.dumps(asdict(recipe))),
            "seed": seed,
            "backbone": model.backbone_fingerprint,
            "features": _digest(features) if out is not None else "",
            "code": code_digest(),
        }

    # ------------------------------------------------------------------ where it stands

    @property
    def steps(self) -> int:
        return int(self.log[-1]["step"]) if self.log else 0

    @property
    def best_check(self) -> int:
        """Number of the check with the lowest held-out loss, the first of equals."""
        return min(range(len(self.log)), key=lambda i: self.log[i]["val_loss"])

    @property
    def finished(self) -> bool:
        waited = len(self.log) - 1 - self.best_check if self.log else 0
        return self.steps >= self.recipe.steps or waited >= self.recipe.patience

    def resume(self, fresh: bool) -> None:
        if fresh or self.checkpoint is None or not self.checkpoint.is_file():
            return
        try:
            state = torch.load(self.checkpoint, map_location=self.device, weights_only=True)
            if state["identity"] != self.identity:
                different = [k for k in self.identity if state["identity"].get(k) != self.identity[k]]
                raise TrajOODError(
                    f"{self.checkpoint}: made with another {', '.join(different)}: choose another folder or pass "
                    "fresh=True"
                )
            self.network.load_state_dict(state["network"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.best, self.log = state["best"], state["log"]
        except TrajOODError:
            raise
        except Exception as error:
            raise TrajOODError(
                f"{self.checkpoint}: damaged checkpoint ({' '.join(str(error).split())[:200]}): delete it or pass "
                "fresh=True"
            ) from error

    def save(self) -> None:
        if self.checkpoint is None:
            return
        buffer = io.BytesIO()
        state = {"identity": self.identity, "log": self.log, "best": self.best}
        state |= {"network": self.network.state_dict(), "optimizer": self.optimizer.state_dict()}
        torch.save(state, buffer)
        write_atomic(self.checkpoint, buffer.getvalue())

    # ------------------------------------------------------------------ training

    def train(self, quiet: bool) -> None:
        """Train to the end and leave the best weights in the network."""
        if not self.finished:
            self.save()  # before minutes of work: is the folder writable at all?
        self.network.requires_grad_(True)
        try:
            with tqdm(total=self.recipe.steps, desc=printable(self.title), unit="step", delay=2, disable=quiet) as bar:
                bar.update(self.steps)
                while not self.finished:
                    self.stretch(bar)
        finally:
            self.network.requires_grad_(False)
        self.network.load_state_dict(self.best)

    def stretch(self, bar: tqdm[Any]) -> None:
        """``check_every`` steps and one check."""
        recipe, began, total = self.recipe, time.perf_counter(), 0.0
        draws = torch.Generator().manual_seed(self.seed * 1_000_003 + len(self.log) + 1)
        count = min(recipe.check_every, recipe.steps - self.steps)
        batches = self._order(count * self.batch_size, draws).split(self.batch_size)
        for step, rows in enumerate(batches, start=self.steps):
            rate = _learning_rate(recipe, step)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            clean = self.network.standardise(self.features.index_select(0, rows).to(self.device))
            loss = self._loss(clean, draws)
            if not bool(loss.isfinite()):
                raise TrajOODError(f"{self.title}: the loss is {loss.item()} in step {step}: lower the learning rate")
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.network.parameters(), recipe.clip)
            self.optimizer.step()
            total += loss.item()
            bar.update()
        val_loss, val_clean = self._held_out_loss()
        if not math.isfinite(val_loss):
            raise TrajOODError(f"{self.title}: the held-out loss is {val_loss}: lower the learning rate")
        seconds = round(time.perf_counter() - began, 2)
        line = {"step": self.steps + count, "loss": total / count, "val_loss": val_loss, "val_clean": val_clean}
        self.log.append({**line, "learning_rate": rate, "seconds": seconds})
        if self.best_check == len(self.log) - 1:
            self.best = {k: v.clone() for k, v in self.network.state_dict().items()}
        bar.set_postfix(loss=f"{line['loss']:.4f}", held_out=f"{val_loss:.4f}", refresh=False)
        self.save()

    def _order(self, count: int, draws: torch.Generator) -> Tensor:
        """``count`` training rows: as many whole passes in random order as it takes, cut off."""
        passes = -(-count // len(self.rows))
        return torch.cat([self.rows[torch.randperm(len(self.rows), generator=draws)] for _ in range(passes)])[:count]

    def _loss(self, clean: Tensor, draws: torch.Generator) -> Tensor:
        recipe, network = self.recipe, self.network
        latents = network.encode(clean + self._noise(clean, recipe.noise(network.features), draws))
        if recipe.latent_noise:
            latents = latents + self._noise(latents, recipe.latent_noise, draws)
        loss = (network.decode(latents) - clean).square().mean()
        if recipe.jacobian:
            start, direction = latents.detach(), self._noise(latents, 1.0, draws)
            along = torch.func.jvp(lambda z: network.encode(network.decode(z)), (start,), (direction,))[1]
            stretched = along.square().sum(dim=1) / direction.square().sum(dim=1)
            loss = loss + recipe.jacobian * stretched.mean()
        return loss

    def _held_out_loss(self) -> tuple[float, float]:
        """Mean squared error of the denoising (same noise at every check) and of the clean reconstruction."""
        draws = torch.Generator().manual_seed(self.seed)
        errors = torch.zeros(2, dtype=torch.float64)
        with torch.inference_mode():
            for rows in self.val.split(1024):
                clean = self.network.standardise(self.features.index_select(0, rows).to(self.device))
                noisy = clean + self._noise(clean, self.recipe.noise(clean.shape[1]), draws)
                for kind, inputs in enumerate((noisy, clean)):
                    restored = self.network.decode(self.network.encode(inputs))
                    errors[kind] += float((restored - clean).square().mean(dim=1).sum())
        denoising, plain = (errors / len(self.val)).tolist()
        return denoising, plain

    @staticmethod
    def _noise(like: Tensor, deviation: float, draws: torch.Generator) -> Tensor:
        return deviation * torch.randn(like.shape, generator=draws).to(like.device)


def _learning_rate(recipe: SurrogateRecipe, step: int) -> float:
    warmup = max(1, round(recipe.warmup * recipe.steps))
    if step < warmup:
        return recipe.learning_rate * (step + 1) / warmup
    done = (step - warmup) / max(1, recipe.steps - warmup)
    return recipe.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


def _extract(
    backbone: Backbone,
    images: ImageSource,
    cache: FeatureCache,
    workers: int,
    on_error: str,
    quiet: bool,
) -> tuple[Tensor, list[dict[str, str]]]:
    """(N, n) features of every image that can be read, and the failures."""
    parts: list[Tensor] = []
    failures: list[dict[str, str]] = []
    read = _reader(backbone, images, workers, on_error)
    with tqdm(
        total=len(images), desc=printable(f"features of {backbone.name}"), unit="img", delay=2, disable=quiet
    ) as bar:
        for start in range(0, len(images), BLOCK):
            indices = range(start, min(start + BLOCK, len(images)))
            _, answer, failed = cache.extract(backbone, images, indices, read)
            failures += failed
            if answer is not None:
                parts.append(answer.features.cpu())
            bar.update(len(indices))
    if not parts:
        raise TrajOODError(f"surrogate of {backbone.name}: none of its {len(images)} training images could be read")
    return torch.cat(parts), failures


def _reader(
    backbone: Backbone, images: ImageSource, workers: int, on_error: str
) -> Callable[[range], tuple[tuple[str, ...], Tensor, list[dict[str, str]]]]:
    """Reads a range of images: ids and (B, C, H, W) of those that can be read, and the failures."""

    def one(index: int) -> Tensor | TrajOODError:
        try:
            return backbone.transform(images.load(index))
        except TrajOODError as error:
            if on_error == "raise":
                raise
            return error

    def read(indices: range) -> tuple[tuple[str, ...], Tensor, list[dict[str, str]]]:
        with ThreadPoolExecutor(workers) as pool:
            outcomes = list(zip((images.ids[i] for i in indices), pool.map(one, indices), strict=True))
        good = [(i, o) for i, o in outcomes if isinstance(o, Tensor)]
        failures = [{"id": i, "error": str(o)} for i, o in outcomes if not isinstance(o, Tensor)]
        batch = torch.stack([o for _, o in good]) if good else torch.empty(0, *backbone.input_shape)
        return tuple(i for i, _ in good), batch, failures

    return read


# ---------------------------------------------------------------------- what is written


def _record(
    model: SurrogateAutoencoder, run: _Run, features: Tensor, data: Mapping[str, Any] | None, quiet: bool
) -> dict[str, Any]:
    best, began = run.log[run.best_check], time.perf_counter()
    health = surrogate_health(model, features[run.rows], seed=run.seed, quiet=quiet).as_dict()
    return {
        "name": model.name,
        "backbone": {
            "name": model.backbone.name,
            "fingerprint": model.backbone_fingerprint,
            "answers": backbone_answers(model.backbone),
        },
        "network": model.network.geometry(),
        "recipe": run.identity["recipe"],
        "input_noise": run.recipe.noise(model.feature_dim),
        "seed": run.seed,
        "data": {**(data or {}), "trained_on": len(run.rows), "held_out": len(run.val)},
        "log": run.log,
        "best_step": best["step"],
        "validation_loss": best["val_loss"],
        "validation_clean": best["val_clean"],
        "parameters": sum(p.numel() for p in model.network.parameters()),
        "fingerprint": model.fingerprint(),
        "health": health,
        "health_seconds": round(time.perf_counter() - began, 1),
        "seconds": round(sum(line["seconds"] for line in run.log), 1),
        "commit": git_commit(),
        "versions": environment(),
    }


def _write(model: SurrogateAutoencoder, recipe: SurrogateRecipe, out: Path) -> None:
    """The model, its card and its record, the record last: its presence says that everything else is there."""
    model.save_pretrained(out, asdict(recipe))
    write_atomic(out / "README.md", _card(model.record).encode())
    write_atomic(out / "training.json", (json.dumps(model.record, indent=2, sort_keys=True) + "\n").encode())
    (out / "checkpoint.pt").unlink(missing_ok=True)


def _card(record: Mapping[str, Any]) -> str:
    health, data, network = record["health"], record["data"], record["network"]
    widths = " → ".join(str(w) for w in (network["features"], *network["hidden"], network["bottleneck"]))
    source = f"`{data['split']}` of the benchmark `{data['benchmark']}`" if "benchmark" in data else "features given"
    steps, moved = health["steps_quantiles"], health["displacement_quantiles"]
    return "\n".join(
        [
            f"# Surrogate of {record['backbone']['name']}",
            "",
            f"An autoencoder ({widths} and back, {record['parameters']:,} parameters) of the frozen backbone's",
            f"standardised features, trained on {data['trained_on']:,} images ({source}) to remove noise. Made for OOD",
            "detection with its latent dynamics z → E(D(z)).",
            "",
            "| | |",
            "|---|---|",
            f"| held-out loss: denoising, clean | {record['validation_loss']:.4f}, {record['validation_clean']:.4f} |",
            f"| best of {record['log'][-1]['step']:,} steps | {record['best_step']:,} |",
            f"| converged, of {health['count']:,} training features | {health['converged']:.2%} |",
            f"| distinct attractors (cosine 0.99) | {health['distinct']} |",
            f"| steps, quantiles 5/25/50/75/95 % | {', '.join(f'{v:.0f}' for v in steps)} |",
            f"| displacement ‖z* − z0‖/‖z0‖, same quantiles | {', '.join(f'{v:.2f}' for v in moved)} |",
            *(f"| warning | {text} |" for text in health["warnings"]),
            "",
            f"Backbone fingerprint `{record['backbone']['fingerprint'][:16]}…`, seed {record['seed']}, commit",
            f"`{record['commit']}`, {record['seconds']:.0f} s of training. `training.json` holds recipe, log and",
            "versions.",
            "",
        ]
    )


def _warn(model: SurrogateAutoencoder) -> None:
    for text in model.record.get("health", {}).get("warnings", []):
        warn(f"surrogate of {model.backbone.name}: unhealthy attractors: {text}", stacklevel=3)


def _check_count(backbone: Backbone, count: int) -> None:
    if count < MIN_FEATURES:
        raise TrajOODError(
            f"surrogate of {backbone.name}: expected features of at least {MIN_FEATURES} ID training images, got "
            f"{count}: give more images"
        )


def _folder_name(backbone: Backbone, rest: list[Any]) -> str:
    key = hashlib.sha256(json.dumps([backbone.fingerprint(), *rest], sort_keys=True).encode()).hexdigest()
    return f"{re.sub(r'[^A-Za-z0-9.-]+', '-', backbone.name)}-{key[:16]}"


def _digest(features: Tensor) -> str:
    digest = hashlib.sha256(repr(tuple(features.shape)).encode())
    for block in features.split(4096):
        digest.update(block.cpu().contiguous().numpy().data)
    return digest.hexdigest()
