"""Causal language models as self-maps: against transformers' own forward pass from token ids, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from traj_ood.autoencoders.language import LANGUAGE_MODELS, LanguageModel
from traj_ood.dynamics.iterate import iterate
from traj_ood.dynamics.trajectory import Status
from traj_ood.errors import TrajOODError

TEXTS = ["the quick brown fox jumps", "over the lazy dog and away", "six words are not enough here"]
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
KINDS = ("gpt2", "llama", "qwen3")


def causal(kind: str, seed: int = 0) -> Any:
    """A small random model with its head."""
    import transformers as t

    torch.manual_seed(seed)
    shared: dict[str, Any] = {**SIZES, "vocab_size": 256, "max_position_embeddings": 32}
    if kind == "gpt2":
        return t.GPT2LMHeadModel(t.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=256, n_positions=32)).eval()
    if kind == "llama":
        return t.LlamaForCausalLM(t.LlamaConfig(**shared, num_key_value_heads=1)).eval()
    return t.Qwen3ForCausalLM(t.Qwen3Config(**shared, num_key_value_heads=1, head_dim=8)).eval()


def ids(text: str) -> list[int]:
    return list(text.encode())


def body(model: Any) -> nn.Module:
    return model.base_model


@pytest.mark.parametrize("kind", KINDS)
def test_one_step_is_the_models_own_hidden_state(kind: str) -> None:
    """What the head turns into the logits that the whole model gives for the token ids."""
    whole = causal(kind)
    model = LanguageModel(body(whole), ids, tokens=12)
    start = model.start(TEXTS)
    assert start.shape == (3, 12, 16)
    tokens = torch.tensor([ids(text)[:12] for text in TEXTS])
    with torch.inference_mode():
        expected = whole(input_ids=tokens).logits
        torch.testing.assert_close(whole.lm_head(model.self_map(start)), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_no_text_changes_anothers_trajectory(kind: str) -> None:
    model = LanguageModel(body(causal(kind)), ids, tokens=12)
    model.chunk = 2
    together = iterate(model.self_map, model.start(TEXTS), tol=0, max_steps=6, chunk=model.chunk)
    alone = iterate(model.self_map, model.start(TEXTS[2:]), tol=0, max_steps=6, chunk=model.chunk)
    assert bool((together.status == Status.STEP_LIMIT).all())
    torch.testing.assert_close(together.final[2], alone.final[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(together.residuals[2], alone.residuals[0], rtol=1e-5, atol=1e-6)


def test_the_config_changes_f_and_therefore_the_fingerprint() -> None:
    """Heads and the rotary base are in no weight; what a file says of itself is not in f."""
    import transformers as t

    def model(**changes: Any) -> LanguageModel:
        torch.manual_seed(0)
        config = t.LlamaConfig(**{**SIZES, "vocab_size": 256, "num_key_value_heads": 2, "head_dim": 8, **changes})
        return LanguageModel(t.LlamaModel(config), ids, tokens=12)

    plain = model()
    assert model(architectures=["LlamaForCausalLM"]).fingerprint() == plain.fingerprint()
    rope = {"rope_theta": 7.0}  # of transformers 4
    if t.__version__ >= "5":
        rope = {"rope_parameters": {**rope, "rope_type": "default"}}
    for changes in ({"rms_norm_eps": 1e-2}, rope):
        other = model(**changes)
        start = plain.start(TEXTS)
        assert not torch.allclose(other.self_map(start), plain.self_map(start))
        assert other.fingerprint() != plain.fingerprint()


def test_later_tokens_do_not_reach_earlier_ones() -> None:
    """Causality holds along the whole trajectory: the first half of z_t is that of the shorter text."""
    model, half = (LanguageModel(body(causal("llama")), ids, tokens=n) for n in (12, 6))
    long, short = (iterate(m.self_map, m.start(TEXTS[:1]), tol=0, max_steps=5, chunk=1).final for m in (model, half))
    torch.testing.assert_close(long[:, :6], short, atol=1e-5, rtol=1e-4)


def tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=made).save_pretrained(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lm") / "tiny-llama"
    causal("llama").save_pretrained(path)
    tokenizer(path)
    return path


def test_loaded_from_a_folder_with_its_tokenizer(folder: Path) -> None:
    model = LANGUAGE_MODELS.load(f"causal-lm:{folder}", {"tokens": 8})
    assert (model.name, model.tokens, model.device.type) == ("causal-lm:tiny-llama", 8, "cpu")
    from transformers import AutoTokenizer

    whole = causal("llama")
    inputs = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)(
        [t[:8] for t in TEXTS], return_tensors="pt"
    )["input_ids"]
    with torch.inference_mode():
        expected = whole(input_ids=inputs, output_hidden_states=True).hidden_states
    torch.testing.assert_close(model.start(TEXTS), expected[0])
    torch.testing.assert_close(model.self_map(model.start(TEXTS)), expected[-1])
    assert model.fingerprint() == LanguageModel.load(str(folder), tokens=8).fingerprint()
    assert model.fingerprint() != LanguageModel.load(str(folder), tokens=9).fingerprint()


def test_texts_and_tokens_that_do_not_fit() -> None:
    model = LanguageModel(body(causal("gpt2")), ids, tokens=12, name="gpt")
    assert (model.fits("twelve bytes"), model.fits("eleven byte")) == (True, False)
    with pytest.raises(
        TrajOODError, match=r"gpt: text 1 \('short'…\): expected at least 12 tokens, got 5; leave it out"
    ):
        model.start([TEXTS[0], "short"])
    with pytest.raises(TrajOODError, match="tokens: expected 1 to 32, the model's positions, got 33"):
        LanguageModel(body(causal("gpt2")), ids, tokens=33)
    with pytest.raises(TrajOODError, match="tokens: expected 1 to 32, the model's positions, got 0"):
        LanguageModel(body(causal("gpt2")), ids, tokens=0)


def test_hidden_states_must_be_as_wide_as_the_embeddings() -> None:
    class Wider(nn.Module):
        config = type("Config", (), {"max_position_embeddings": 8})()

        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(4, 3)

        def get_input_embeddings(self) -> nn.Module:
            return self.table

        def forward(self, inputs_embeds: Tensor, use_cache: bool) -> Any:
            return type("Output", (), {"last_hidden_state": inputs_embeds.repeat(1, 1, 2)})()

    with pytest.raises(TrajOODError, match="expected hidden states as wide as the embeddings, 3, got 6"):
        LanguageModel(Wider(), ids, tokens=2)


def test_what_is_no_causal_language_model(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(TrajOODError, match=r"causal-lm:\./nowhere: no such folder"):
        LANGUAGE_MODELS.load("causal-lm:./nowhere", {})
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    weights = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").unlink()
    with pytest.raises(TrajOODError, match=r"copy: model\.safetensors can be neither read nor downloaded"):
        LanguageModel.load(str(copy))
    (copy / "model.safetensors").write_bytes(weights)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(TrajOODError, match=r"copy: .*\d+ tensors missing or of another shape \(first: .*2"):
        LanguageModel.load(str(copy), tokens=8)
    (copy / "config.json").write_text(
        json.dumps({**config, "architectures": ["BertForMaskedLM"], "model_type": "bert"})
    )
    with pytest.raises(TrajOODError, match=r"expected a causal language model, got bert \(BertForMaskedLM\)"):
        LanguageModel.load(str(copy))
