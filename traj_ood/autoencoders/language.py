"""Causal language models as self-maps: f maps the output of the embedding layer through the whole residual stream.

App. B.8.2 (Fig. 17): f goes from "the embedding layer to the final layer before the softmax". There are no images and
no decoder, so a language model is not an :class:`~traj_ood.autoencoders.Autoencoder`: it provides only what
:func:`traj_ood.iterate` needs, starts and a self-map::

    model = LANGUAGE_MODELS.load("causal-lm:HuggingFaceTB/SmolLM2-1.7B", {"tokens": 64})
    trajectory = iterate(model.self_map, model.start(texts), tol=0, max_steps=300, chunk=model.chunk)

It was never run on published weights, which this project could not download; tests build small random GPT-2, Llama and
Qwen3 models.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from traj_ood.dynamics.chunks import apply_in_chunks, rows_per_call
from traj_ood.dynamics.fixed_function import FixedFunction
from traj_ood.errors import TrajOODError
from traj_ood.io.families import Families
from traj_ood.io.pretrained import Checkpoint, from_pretrained, use_safetensors, whole_network
from traj_ood.io.weights import fingerprint

LANGUAGE_MODELS: Families[LanguageModel] = Families(
    FixedFunction, "language model family", "language model", "family", ("load",)
)
"""Families of language models, by the word before the colon in ``family:source``."""
Encode = Callable[[str], Sequence[int]]
"""Text → token ids, including special tokens at the start of a text."""
_TOKENS_PER_CALL = 2048
_BOOKKEEPING = ("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype")
"""Entries of a config on where and how a checkpoint was stored; f is computed in float32 in any case."""


@LANGUAGE_MODELS.register
class LanguageModel(FixedFunction):
    """A causal transformer without its head; f maps the embeddings of a text to the last hidden states, of equal shape.

    Positions are not part of z: the model adds or rotates them in at every step. The last hidden states come after the
    final norm, so ‖f(z)‖ is bounded by construction, and bounded norms alone prove nothing.

    ``model`` is a transformers model without head (``AutoModel``), and ``encode`` maps a text to token ids. Exactly the
    first T = ``tokens`` tokens of each text are used, by default 64 (the paper does not specify it). There is no
    padding, so no text depends on the length of another.
    """

    family: ClassVar[str] = "causal-lm"
    summary: ClassVar[str] = "causal language models of transformers: causal-lm:<hub name or folder>"
    hub_slashes: ClassVar[tuple[int, int]] = (0, 1)

    def __init__(self, model: nn.Module, encode: Encode, *, tokens: int = 64, name: str = "language-model") -> None:
        config: Any = model.config
        most = int(getattr(config, "max_position_embeddings", None) or tokens)
        if not 1 <= tokens <= most:
            raise TrajOODError(f"{name}: tokens: expected 1 to {most}, the model's positions, got {tokens}")
        self.name, self.module, self.tokens = name, model.eval().requires_grad_(False), tokens
        self._encode = encode
        self.chunk = rows_per_call(min(64, _TOKENS_PER_CALL / tokens))
        table: Any = model.get_input_embeddings()  # type: ignore[operator]
        width = table.weight.shape[1]
        with self.fixed(), torch.inference_mode():
            image = self.self_map(torch.zeros(1, 1, width, device=self.device))
        if image.shape[2] != width:
            raise TrajOODError(
                f"{name}: expected hidden states as wide as the embeddings, {width}, got {image.shape[2]}: use another "
                "model, since f must map a space to itself"
            )

    @classmethod
    def load(cls, source: str, *, tokens: int = 64, name: str | None = None) -> LanguageModel:
        """Load a causal language model of transformers by hub name (``Qwen/Qwen3-0.6B``) or local folder, in float32;
        by default its name is ``causal-lm:`` and the source."""
        from transformers import AutoConfig, AutoModel, AutoTokenizer

        known = Checkpoint(cls.family, source, "a tokenizer", name)
        with known.reading("config.json"):
            config = from_pretrained(AutoConfig, known.place)
        if not _is_causal(config):
            raise TrajOODError(
                f"{known.name}: expected a causal language model, got {config.model_type} "
                f"({', '.join(config.architectures or ['?'])})"
            )
        with known.reading("its tokenizer"):
            tokenizer = from_pretrained(AutoTokenizer, known.place)
        options = {"config": config, "output_loading_info": True, **use_safetensors(known.place)}
        with known.reading("model.safetensors"):
            model = whole_network(from_pretrained(AutoModel, known.place, **options), known.name)
        return cls(model, lambda text: tokenizer(text)["input_ids"], tokens=tokens, name=known.name)

    def fits(self, text: str) -> bool:
        """Whether ``text`` has at least T tokens."""
        return len(self._encode(text)) >= self.tokens

    def start(self, texts: Sequence[str]) -> Tensor:
        """The starts z_0, (B, T, d): embeddings of the first T tokens of each text."""
        ids = torch.empty(len(texts), self.tokens, dtype=torch.int64)
        for row, text in enumerate(texts):
            found = list(self._encode(text))[: self.tokens]
            if len(found) < self.tokens:
                raise TrajOODError(
                    f"{self.name}: text {row} ({text[:30]!r}…): expected at least {self.tokens} tokens, got "
                    f"{len(found)}; leave it out or ask for fewer tokens"
                )
            ids[row] = torch.tensor(found)
        table: Any = self.module.get_input_embeddings()  # type: ignore[operator]
        with self.fixed(), torch.inference_mode():
            return apply_in_chunks(lambda rows: table(rows), ids.to(self.device), self.chunk, f"{self.name}: embedding")

    def self_map(self, latents: Tensor) -> Tensor:
        """f on one chunk of latents (n, T, d); :func:`traj_ood.iterate` does the chunking."""
        return self.module(inputs_embeds=latents, use_cache=False).last_hidden_state

    def fingerprint(self) -> str:
        """SHA-256 (hex) over all weights, T, and the config, as heads or rotary base do not show in the weights."""
        return fingerprint(self.module, ["causal-lm", self.options()])

    def options(self) -> dict[str, Any]:
        """The settings that decide f in addition to the weights; part of the fingerprint."""
        config: Any = self.module.config
        told = config.to_dict() if hasattr(config, "to_dict") else vars(config)
        return {"tokens": self.tokens, "config": {k: v for k, v in told.items() if k not in _BOOKKEEPING}}


def _is_causal(config: Any) -> bool:
    """Whether the checkpoint is a causal model, or, if its config names no architecture, its model type can be one."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if config.architectures:
        return any(a.endswith(("ForCausalLM", "LMHeadModel")) for a in config.architectures)
    return config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
