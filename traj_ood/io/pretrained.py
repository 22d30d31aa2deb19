"""How models of transformers and diffusers are read: no code of theirs runs, nothing is asked, nothing is followed."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from traj_ood.errors import TrajOODError
from traj_ood.io.checkpoints import reason_of
from traj_ood.io.trees import MAX_CONFIG, read_json, write_json
from traj_ood.io.weights import check_weights

_ELSEWHERE = ("auto_map", "use_pretrained_backbone", "custom_pipelines")
_SILENT: list[bool] = []
"""Not empty where a program has asked for :func:`silence_transformers`."""
_PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json", "diffusion_pytorch_model.bin")


def silence_transformers() -> None:
    """From now on transformers announces no loading, and asks nothing on standard input: for programs with words of
    their own. It is not imported for that: what need not load a model of its does not wait for it."""
    _SILENT.append(True)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    if "transformers" in sys.modules:
        _silence()


def _silence() -> None:
    from transformers import dynamic_module_utils
    from transformers.utils import logging as transformers_logging

    dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0  # in place of a question on standard input: no
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def from_pretrained(kind: Any, source: str | Path, **options: Any) -> Any:
    """``kind.from_pretrained(source, **options)``, with what the source may not do shut off.

    Python files that come with a model are never run: left to itself, transformers asks on standard input whether it
    may, and takes a "y" from any pipe. Of a folder nothing is fetched from the network.

    Args:
        kind: a class of transformers or diffusers, such as ``AutoModel``.
        source: a local folder, or ``owner/name`` on the hub.
        options: of the library.
    Raises:
        TrajOODError: the model brings code of its own, or asks for some from the hub.
        Exception: whatever else the library raises.
    """
    if _SILENT:
        _silence()
    folder = Path(source).expanduser()
    local = {"local_files_only": True} if folder.is_dir() else {}
    source = str(folder) if folder.is_dir() else str(source)
    try:
        found = kind.from_pretrained(source, trust_remote_code=False, **local, **options)
    except Exception as error:
        if "trust_remote_code" in str(error):
            raise _refused(source, "an auto_map to Python files of its own") from error
        if "Python object" in (reason := reason_of(error)):
            raise TrajOODError(f"{source}: its pickled weights cannot be read ({reason})") from error
        raise
    kernel = getattr(found, "_attn_implementation", None)
    if isinstance(kernel, str) and "/" in kernel:  # a repository of compiled code on the hub
        raise _refused(source, f"the attention {kernel!r} from the hub")
    return found


def whole_network(
    answer: tuple[Any, Mapping[str, Any]], where: str, *, optional: Sequence[str] = (), then: str = ""
) -> Any:
    """The network of ``from_pretrained(…, output_loading_info=True)`` in float32, with every weight from its file: what
    a file lacks would be random numbers.

    Args:
        answer: the network, and the library's report. where, then: begin and end the message.
        optional: parts of the names of weights that may be missing.
    Raises:
        TrajOODError: weights are missing, of another shape or NaN.
    """
    network, report = answer
    missing = [key for key in map(str, report["missing_keys"]) if not any(part in key for part in optional)]
    wrong = sorted([*missing, *map(str, report.get("mismatched_keys", ()))])
    if wrong:
        raise TrajOODError(
            f"{where}: weights of another architecture: {len(wrong)} tensors missing or of another shape (first: "
            f"{wrong[0]}){then}"
        )
    network = network.float()
    check_weights(network.state_dict(), network, where)
    return network


def use_safetensors(source: str | Path) -> dict[str, Any]:
    """The option that says which weights of ``source`` a library reads: safetensors, and pickled ones where a folder
    has no others, which both libraries read as plain tensors (torch's ``weights_only``)."""
    folder = Path(source).expanduser()
    pickled = any((folder / name).is_file() for name in _PICKLED) and not any(folder.glob("*.safetensors*"))
    return {"use_safetensors": not pickled}


def refuse_elsewhere(folder: Path) -> None:
    """Refuse a folder with a JSON file that would lead a library to code or weights outside of it.

    Raises:
        TrajOODError: names the file and the entry.
    """
    for path in sorted(folder.rglob("*.json")):
        content = _read(path)
        asking = sorted(key for key in _ELSEWHERE if content.get(key))
        if asking:
            raise TrajOODError(f"{path}: {asking[0]!r} asks for code or files from elsewhere: nothing packed here does")


def forget_paths(folder: Path) -> None:
    """Take out of every config.json where its model came from: a path on this machine, and nobody else's business."""
    for path in sorted(folder.rglob("config.json")):
        config = _read(path)
        if config.pop("_name_or_path", None) is not None:
            write_json(path, config)


def _read(path: Path) -> dict[str, Any]:
    return read_json(path, "a description of a model", "copy the folder again", limit=MAX_CONFIG)


def _refused(source: str, what: str) -> TrajOODError:
    return TrajOODError(
        f"{source}: its config.json asks for {what}, which is never run: take a model that transformers itself knows, "
        "or build it in Python and wrap it in traj_ood.CallableBackbone or traj_ood.CallableAutoencoder"
    )
