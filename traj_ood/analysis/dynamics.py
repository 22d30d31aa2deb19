"""Residuals and norms over hundreds of steps, beyond autoencoders (App. B.8, Figs 16 and 17).

For encoders with separately trained decoders and for causal language models: does iterating f contract, and do latents
stay bounded? With the paper's models, on a machine with a network and a GPU (ImageNet's training images in a folder, a
file with one text of the Pile per line)::

    traj-ood analyze dynamics --paper --device cuda --data-root … --option images=ImageNet1k --option texts=pile.jsonl
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from decimal import ROUND_CEILING, Context
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from traj_ood.analysis.base import Answer, Question, register
from traj_ood.analysis.images import stack
from traj_ood.analysis.measures import finite
from traj_ood.analysis.subjects import training_images
from traj_ood.analysis.workspace import Unit, Workspace
from traj_ood.autoencoders import FAMILIES, MODELS, Autoencoder, load_autoencoder, rehearsals
from traj_ood.autoencoders.identity import model_identity
from traj_ood.autoencoders.language import LANGUAGE_MODELS, LanguageModel
from traj_ood.data import ImageSource
from traj_ood.data.batches import ranges_of
from traj_ood.data.benchmark import sample_indices
from traj_ood.dynamics.fixed_function import few_images
from traj_ood.dynamics.iterate import iterate
from traj_ood.dynamics.observers import Norm, Observer
from traj_ood.dynamics.trajectory import join_tables
from traj_ood.errors import TrajOODError, unknown_name

if TYPE_CHECKING:
    from traj_ood.drawing.style import Figure

DOCUMENTATION = "documentation"
_LAST_STEPS = 50  # steps over which the final factor of the residual is averaged
_PIECE_CHARACTERS = 1000  # characters per text of the documentation
_UNIT_SAMPLES = 6  # samples per unit of work on a CPU
MAX_MODELS = 6  # models per kind, the number of colours of a panel
_PILE = "pile.jsonl"


@register
@dataclass(frozen=True)
class Dynamics(Question):
    """Does iterating f contract, and do latents stay bounded?

    Attributes:
        models: autoencoders as for :func:`traj_ood.load_autoencoder`; ``causal-lm:SOURCE`` for language models, see
            :class:`traj_ood.autoencoders.language.LanguageModel`; ``rehearsal-dinov2``, ``-siglip2``, ``-qwen3`` and
            ``-llama`` for small random models of the paper's architectures. At most 6 autoencoders and 6 language
            models.
        images: source of the images for autoencoders: a benchmark, ``fashion-mnist``, ``mnist`` or ``cifar10`` (their
            training images), or a folder.
        texts: source of the texts for language models: a file with one text per line, or JSON lines with the key
            ``text``; or ``documentation``, that of the Python language, which is on every machine.
        image_samples, text_samples: numbers of images and texts.
        tokens: number of tokens of each text that are used.
    """

    name: ClassVar[str] = "dynamics"
    figure: ClassVar[str] = "Figs 16, 17"
    summary: ClassVar[str] = "residuals and norms over 300 steps of encoders with decoders and of language models"
    choices: ClassVar[tuple[str, ...]] = (
        "Curves are means over the samples of Euclidean norms of the whole latent (all tokens) and the whole image.",
        "No tolerance ends a trajectory: each takes every step unless it becomes NaN or infinite before; means are "
        "over the samples that are still finite.",
        "The paper's models end in a normalisation (the encoder's last LayerNorm, the language model's last RMSNorm), "
        "so that their norms are bounded by construction, which other models need not be; bounded norms alone do not "
        "show that a field is well behaved.",
        "How many tokens the paper's texts have is not stated: the first 64, of texts that have as many.",
        "The paper names only the publication of RAE's decoders: those with a ViT-XL and DINOv2 or SigLIP2 base.",
    )
    unstated: ClassVar[tuple[str, ...]] = ("tokens",)
    at_least: ClassVar = {"image_samples": 1, "text_samples": 1, "tokens": 1, "steps": 2}
    meanings: ClassVar = {
        "texts": {DOCUMENTATION: "the documentation of the Python language", _PILE: f"the Pile ({_PILE})"}
    }

    models: tuple[str, ...] = ("fashion-mae", *rehearsals.PAIRS, *rehearsals.LANGUAGE)
    images: str = "fashion"
    texts: str = DOCUMENTATION
    image_samples: int = 100
    text_samples: int = 100
    steps: int = 300
    tokens: int = 64

    def __post_init__(self) -> None:
        self.expect(bool(self.models) and len(set(self.models)) == len(self.models), "models", "different ones")
        super().__post_init__()
        language = sum(map(_is_language, self.models))
        few = max(language, len(self.models) - language) <= MAX_MODELS
        self.expect(
            few, "models", f"at most {MAX_MODELS} autoencoders and {MAX_MODELS} language models (a figure each)"
        )

    @classmethod
    def paper(cls) -> Dynamics:
        """500 training images of ImageNet, 1,000 texts of the Pile, 300 steps."""
        language = ("causal-lm:Qwen/Qwen3-0.6B", "causal-lm:HuggingFaceTB/SmolLM2-1.7B")
        return cls(
            models=("rae-dinov2", "rae-siglip2", *language),
            images="ImageNet1k",
            texts=_PILE,
            image_samples=500,
            text_samples=1000,
        )

    def answer(self, work: Workspace) -> Answer:
        for name in self.models:  # check all names before hours are spent on the first model
            check_name(name)
        kinds = {_is_language(name) for name in self.models}
        # Missing data are told before hours are spent on models that do not need them.
        images, texts = None, []
        if False in kinds:
            images = training_images(self.images, work.data_root, self.image_samples, self.seed)
        if True in kinds:
            texts = self._every_text(work)
        tables = {name: self._measured(work, name, self._subject(name, images, texts)) for name in self.models}
        curves = {name: means(own) for name, own in tables.items()}
        rows = [summary(name, own) for name, own in tables.items()]
        rehearsed = [row["model"] for row in rows if row["rehearsal"]]
        figures = {"rehearsal": bool(rehearsed), "rehearsed_models": rehearsed, "rows": rows, "curves": curves}
        told = f"{', '.join(rehearsed)}: small and random, a rehearsal that says nothing of trained models"
        return Answer(figures, sentence(rows, self.steps), differences=(told,) if rehearsed else ())

    def drawn(self, figures: Mapping[str, Any]) -> Mapping[str, Callable[[], Figure]]:
        """One figure of the models with images, one of the language models."""
        curves: Mapping[str, Mapping[str, Any]] = figures["curves"]
        kinds = {"pairs.png": {name: own for name, own in curves.items() if "output" in own}}
        kinds["language.png"] = {name: own for name, own in curves.items() if "output" not in own}
        return {file: partial(_draw, kind, figures["rehearsed_models"]) for file, kind in kinds.items() if kind}

    def _measured(self, work: Workspace, name: str, subject: _Subject) -> dict[str, Tensor]:
        """The measurements of all samples of one model, a call of f per unit of work: ``latent`` (B, steps) residuals,
        ``norm`` and for autoencoders ``output`` (B, steps + 1), with NaN past a sample's last point."""
        model = subject.model.to(work.device)
        # What an interruption loses is a unit, and hundreds of steps of a whole chunk may take an hour of a CPU.
        with few_images(_UNIT_SAMPLES) if model.device.type == "cpu" else nullcontext():
            size = model.rows
        identity = model_identity(model) if isinstance(model, Autoencoder) else model.fingerprint()
        key = {"model": identity, "starts": subject.digest, "steps": self.steps}

        def run(rows: range) -> Unit:
            with few_images(len(rows)):  # a whole chunk may cost many times as much as a few samples
                settings: dict[str, Any] = {"tol": 0, "max_steps": self.steps, "chunk": model.rows}
                path = iterate(model.self_map, subject.starts(rows), observers=subject.observers(), **settings)
            return Unit({"latent": path.residuals.sqrt(), **path.measures})

        found = work.pieces("dynamics", key, ranges_of(subject.count, size), run, title=name, unit="sample")
        width = {"latent": self.steps}  # the other tables also have a value at z_0
        return {c: join_tables([table], width.get(c, self.steps + 1)) for c, table in found.items()}

    def _subject(self, name: str, images: ImageSource | None, texts: list[str]) -> _Subject:
        """The model ``name`` with all images or a sample of the texts that are long enough for it."""
        if images is not None and not _is_language(name):
            rehearsed = name in rehearsals.PAIRS
            pair = rehearsals.rehearsal_pair(name, self.seed) if rehearsed else load_autoencoder(name)
            return _Subject(
                pair,
                len(images),
                images.digest(),
                lambda rows: pair.encode(stack(pair.transform, images.select(list(rows)))),
                lambda: [Norm(), OutputResidual(pair)],
            )
        if name in rehearsals.LANGUAGE:
            model = rehearsals.rehearsal_language_model(name, tokens=self.tokens, seed=self.seed)
        else:
            model = LANGUAGE_MODELS.load(name, {"tokens": self.tokens})
        fitting = [text for text in texts if model.fits(text)]
        if len(fitting) < self.text_samples:
            raise TrajOODError(
                f"dynamics: texts: expected {self.text_samples} of at least {self.tokens} tokens, got {len(fitting)} "
                f"from {self.texts}: use fewer texts or tokens"
            )
        drawn = [fitting[i] for i in sample_indices(len(fitting), self.text_samples, self.seed, "texts")]
        digest = hashlib.sha256(json.dumps(drawn).encode()).hexdigest()
        return _Subject(
            model, len(drawn), digest, lambda rows: model.start(drawn[rows.start : rows.stop]), lambda: [Norm()]
        )

    def _every_text(self, work: Workspace) -> list[str]:
        return documentation() if self.texts == DOCUMENTATION else read_texts((work.data_root or Path()) / self.texts)


@dataclass(frozen=True)
class _Subject:
    """A model and its starts: their number, their digest, those of a range, and the observers of their trajectories."""

    model: Autoencoder | LanguageModel
    count: int
    digest: str
    starts: Callable[[range], Tensor]
    observers: Callable[[], list[Observer]]


class OutputResidual:
    """Observer that measures ‖D(z_t) − D(z_{t−1})‖ (Fig. 16a), NaN at z_0; it decodes every point a second time."""

    name = "output"

    def __init__(self, model: Autoencoder) -> None:
        self._model = model
        self._before: dict[int, Tensor] = {}

    def observe(self, steps: Tensor, rows: Tensor, latents: Tensor) -> Tensor:
        decoded = self._model.decode(latents)
        nowhere = torch.full_like(decoded[0], torch.nan)
        before = torch.stack([self._before.get(row, nowhere) for row in rows.tolist()])
        self._before |= dict(zip(rows.tolist(), decoded, strict=True))
        return (decoded - before).flatten(1).norm(dim=1).cpu().double()


def means(tables: Mapping[str, Tensor]) -> dict[str, list[float | None]]:
    """Means over the samples, residuals from step 1 and norms from z_0; None where no sample is left."""
    shown = {column: table[:, 1:] if column == "output" else table for column, table in tables.items()}
    return {column: [finite(float(f"{v:.6g}")) for v in t.nanmean(dim=0).tolist()] for column, t in shown.items()}


def summary(name: str, tables: Mapping[str, Tensor]) -> dict[str, Any]:
    """Summary statistics of a model's curves, as a row of a table."""
    curves = means(tables)
    latent, norm = curves["latent"], curves["norm"]
    # Residuals show which samples are left; a norm in float32 may overflow although z_t is finite.
    left = tables["latent"].isfinite()
    same = bool((left[:, -_LAST_STEPS - 1 :][:, 0] == left[:, -1]).all())
    row: dict[str, Any] = {
        "model": name,
        "rehearsal": name.startswith(rehearsals.PREFIX),
        "samples": len(left),
        "left_the_finite_numbers": int((~left[:, -1]).sum()),
        "latent_residual_first": latent[0],
        "latent_residual_last": latent[-1],
        "latent_residual_falls_until_step": _falls_until(latent),
        "last_factor": _factor(latent) if same else None,  # otherwise the two means are over different samples
        "norm_first": norm[0],
        "norm_last": norm[-1],
        "norm_spread": _spread(norm[1:]),
    }
    if "output" in curves:
        row |= {"output_residual_first": curves["output"][0], "output_residual_last": curves["output"][-1]}
    return row


def read_texts(path: Path) -> list[str]:
    """Read one text per line of a file, or the key ``text`` of each JSON line (``.jsonl``).

    Raises:
        TrajOODError: the file is missing, not UTF-8, not JSON, or holds no texts.
    """
    try:
        # Not splitlines, which also splits at characters that a JSON string may contain unescaped.
        lines = [line for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
        texts = [str(json.loads(line)["text"]) for line in lines] if path.suffix == ".jsonl" else lines
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TrajOODError(
            f"{path}: expected a text per line, or JSON lines with the key 'text' ({error!r}); correct the file or path"
        ) from error
    if not texts:
        raise TrajOODError(f"{path}: expected at least one text, found none; fill the file")
    return texts


def documentation() -> list[str]:
    """The topics of the Python language reference, in pieces: English prose that is on every machine."""
    from pydoc_data.topics import topics

    whole = (" ".join(str(topics[name]).split()) for name in sorted(topics))
    return [text[i : i + _PIECE_CHARACTERS] for text in whole for i in range(0, len(text), _PIECE_CHARACTERS)]


def _falls_until(curve: Sequence[float | None]) -> int:
    """The last step before the first rise of the curve."""
    return next((step for step, (a, b) in enumerate(pairwise(curve), 1) if a is None or b is None or b > a), len(curve))


def _factor(curve: Sequence[float | None]) -> float | None:
    """Geometric mean of r_{t+1} / r_t over the last steps; None if the curve vanishes or ends early."""
    last = curve[-_LAST_STEPS - 1 :]
    first, end = last[0], last[-1]
    if not first or not end or len(last) < 2:
        return None
    return (end / first) ** (1 / (len(last) - 1))


def _spread(curve: Sequence[float | None]) -> float | None:
    """Ratio of the largest to the smallest value; None if a value is missing or 0."""
    values = [v for v in curve if v is not None]
    return max(values) / min(values) if len(values) == len(curve) and min(values) > 0 else None


def _is_language(name: str) -> bool:
    return name in rehearsals.LANGUAGE or (":" in name and name.partition(":")[0] in LANGUAGE_MODELS)


def check_name(name: str) -> None:
    """Refuse, without loading, a name that is not known, nor a folder, nor possibly a hub name."""
    families: dict[str, Any] = {**FAMILIES, **LANGUAGE_MODELS}
    word, _, source = name.partition(":")
    if not source or word not in families:
        word, source = "", name
    named = (*MODELS, *rehearsals.PAIRS, *rehearsals.LANGUAGE)
    if name in named or (source and Path(source).expanduser().is_dir()):
        return
    fewest, most = families.get(word, Autoencoder).hub_slashes
    if source.startswith((".", "/", "~")) or source.count("/") > most:
        raise TrajOODError(
            f"dynamics: models: expected a name or a folder, got {source}, which is no folder: correct {name!r}"
        )
    if source.count("/") < fewest:
        known = (*named, *(f"{family}:SOURCE" for family in families), "owner/name", "a folder")
        raise unknown_name("model of dynamics", name, known)


def sentence(rows: Sequence[Mapping[str, Any]], steps: int) -> str:
    return f"The mean latent residual over {steps} steps: {'; '.join(map(_told, rows))}.{_told_norms(rows)}"


def _told(row: Mapping[str, Any]) -> str:
    """A clause about one model's residual."""
    first, last, factor = row["latent_residual_first"], row["latent_residual_last"], row["last_factor"]
    name = f"{row['model']}{' (random weights)' if row['rehearsal'] else ''}"
    lost = f"{row['left_the_finite_numbers']} of {row['samples']} samples"
    if last is None:
        return f"{name}: becomes NaN or infinite ({lost})"
    slope = "" if factor is None else f" and changes by a factor of {factor:.4g} a step at the end"
    share = f"ends at {last / first:.2g} of its first value" if first and last else "vanishes"
    some = f" (of those still finite; {lost} become NaN or infinite)" if row["left_the_finite_numbers"] else ""
    return f"{name}: {share}{slope}{some}"


def _told_norms(rows: Sequence[Mapping[str, Any]]) -> str:
    """A sentence about the spread of the norms, over the models whose samples all stay finite."""
    kept = {r["model"]: r["norm_spread"] for r in rows if not r["left_the_finite_numbers"] and r["norm_spread"]}
    if not kept:
        return ""
    most = Context(prec=4, rounding=ROUND_CEILING).create_decimal(max(kept.values()))  # rounded up for "at most"
    of = "every model" if len(kept) == len(rows) else ", ".join(kept)
    return f" From the first step on, the largest mean norm of {of} is at most {most} times its smallest."


def _draw(curves_of: Mapping[str, Mapping[str, Any]], rehearsed: Sequence[str]) -> Figure:
    """Residuals in output and latent space and norms over the steps, as Figs 16 and 17; a model may end early."""
    from traj_ood.drawing.charts import Curve, Panel, curves

    columns = {
        "output": r"residual $\|D(z_t) - D(z_{t-1})\|$ in output space",
        "latent": r"latent residual $\|f(z_t) - z_t\|$",
        "norm": r"norm $\|z_t\|$",
    }
    panels = []
    for column, title in columns.items():
        if column in next(iter(curves_of.values())):
            lines = []
            for name, own in curves_of.items():
                last = len(own["latent"])
                steps = range(last + 1 - len(own[column]), last + 1)
                lines.append(Curve(f"{name}{' (random)' if name in rehearsed else ''}", steps, own[column]))
            norm = column == "norm"
            panels.append(Panel(title, "step", "", lines, log_y=not norm, limits=(0, None) if norm else None))
    return curves(panels, "Latent dynamics, means over samples")
