"""Models that bring Python code: nothing of it runs and nobody is asked, whatever standard input would answer."""

from __future__ import annotations

import ast
import builtins
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
from click.testing import CliRunner

import traj_ood
from traj_ood.autoencoders import PairAutoencoder, load_autoencoder
from traj_ood.autoencoders.language import LANGUAGE_MODELS
from traj_ood.backbones import load_backbone
from traj_ood.cli import main
from traj_ood.errors import TrajOODError

PACKAGE = Path(traj_ood.__file__).parent
CODE = {
    "AutoConfig": "mine.C",
    "AutoModel": "mine.C",
    "AutoImageProcessor": "mine.C",
    "AutoTokenizer": ["mine.C", None],
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model folder whose code would leave the file ``RAN`` behind."""

    def asked(prompt: str = "") -> str:
        raise AssertionError(f"asked: {prompt}")

    monkeypatch.setattr(builtins, "input", asked)
    path = tmp_path / "foreign"
    path.mkdir()
    (path / "mine.py").write_text(f"open({str(tmp_path / 'RAN')!r}, 'w')\nclass C: pass\n")
    config = {"architectures": ["GPT2LMHeadModel"], "model_type": "mine", "auto_map": CODE}
    (path / "config.json").write_text(json.dumps(config))
    (path / "model.pt").write_bytes(b"")
    return path


@pytest.mark.parametrize("command", ["bench", "fit", "diagnose"])
@pytest.mark.parametrize("prefix", ["transformers:", "diffusers:", ""])
def test_commands_refuse_a_folder_with_code(folder: Path, command: str, prefix: str) -> None:
    yaml = tiny.write_benchmark(folder.parent)
    model = f"{prefix}{folder}"
    out = str(folder.parent / "out")
    arguments = {
        "bench": ["bench", str(yaml), "--model", model, "--out", out],
        "fit": ["fit", str(yaml), "--model", model, "--out", out, "--tpr", "0.5"],
        "diagnose": ["diagnose", model, "--benchmark", str(yaml), "--out", out],
    }[command]
    result = CliRunner().invoke(main, arguments, input="y\n" * 50)
    assert result.exit_code == 2, result.output
    assert len(result.stderr.strip().splitlines()) <= 2  # what is loaded, and the error
    assert "[y/N]" not in result.output
    assert not (folder.parent / "RAN").exists()


def language_model(folder: Path) -> Any:
    return LANGUAGE_MODELS.load(f"causal-lm:{folder}", {})


def pair(folder: Path) -> Any:
    return PairAutoencoder.from_parts(folder, folder / "model.pt")


def backbone(folder: Path) -> Any:
    return load_backbone(f"transformers:{folder}")


@pytest.mark.parametrize("load", [language_model, pair, backbone])
def test_loaders_say_what_is_asked_for(folder: Path, load: Callable[[Path], Any]) -> None:
    with pytest.raises(TrajOODError, match=r"foreign: its config\.json asks for an auto_map .* which is never run"):
        load(folder)
    assert not (folder.parent / "RAN").exists()


def test_a_processor_or_a_tokenizer_with_code_is_refused(folder: Path) -> None:
    """The model itself is one that transformers knows."""
    import transformers as tf

    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}
    tf.ViTModel(tf.ViTConfig(**small, intermediate_size=32)).save_pretrained(folder)
    processor = {"image_processor_type": "Mine", "auto_map": CODE}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    with pytest.raises(TrajOODError, match="which is never run"):
        backbone(folder)
    tf.GPT2Model(tf.GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=9, n_positions=8)).save_pretrained(folder)
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Mine", "auto_map": CODE}))
    with pytest.raises(TrajOODError, match="foreign"):
        language_model(folder)
    assert not (folder.parent / "RAN").exists()


def test_attention_from_the_hub_is_refused(folder: Path) -> None:
    import transformers

    if transformers.__version__ < "5":
        pytest.skip("transformers 4 asks no hub for attention")
    config = {"model_type": "vit", "attn_implementation": "somebody/kernel"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(TrajOODError, match="asks for the attention 'somebody/kernel' from the hub, which"):
        backbone(folder)


@pytest.mark.parametrize("kind", ["Mine", ["mine", "Mine"]])
def test_a_diffusers_class_of_its_own_is_unknown(folder: Path, kind: Any) -> None:
    (folder / "config.json").write_text(json.dumps({"_class_name": kind, "auto_map": {"AutoModel": "mine.C"}}))
    with pytest.raises(TrajOODError, match="unknown diffusers autoencoder"):
        load_autoencoder(f"diffusers:{folder}")
    assert not (folder.parent / "RAN").exists()


def test_every_call_of_a_library_shuts_code_off() -> None:
    """``from_pretrained`` of another library is called in one place, or says trust_remote_code=False itself."""
    for path in [*PACKAGE.rglob("*.py"), *(PACKAGE.parent / "benchmarks").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            owner = ast.unparse(node.func.value)
            if node.func.attr != "from_pretrained" or owner in ("family", "cls", "SurrogateAutoencoder"):
                continue
            told = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            assert told.get("trust_remote_code") == "False", f"{path}:{node.lineno}"
