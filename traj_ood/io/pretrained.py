"""Load models of transformers and diffusers without running code that comes with a model, and without questions."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from traj_ood.errors import TrajOODError, foreign_errors
from traj_ood.io.checkpoints import why_unreadable
from traj_ood.io.trees import MAX_CONFIG, read_json, write_json
from traj_ood.io.weights import check_weights

_ELSEWHERE = ("auto_map", "use_pretrained_backbone", "custom_pipelines")
_SILENT: list[bool] = []
"""Not empty after :func:`silence_libraries`."""
_PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json", "diffusion_pytorch_model.bin")


def silence_libraries() -> None:
    """Turn off the log messages, progress bars and questions on standard input of transformers and diffusers, for
    command lines. The settings are applied when a model of either is first loaded."""
    _SILENT.append(True)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    if "transformers" in sys.modules:
        _silence()


def _silence() -> None:
    from transformers import dynamic_module_utils
    from transformers.utils import logging as transformers_logging

    dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0  # the question whether to run a model's code is answered "no"
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    if "diffusers" in sys.modules:  # warns of entries of a published config.json that it does not know
        from diffusers.utils import logging as diffusers_logging

        diffusers_logging.set_verbosity_error()


def from_pretrained(kind: Any, source: str | Path, **options: Any) -> Any:
    """``kind.from_pretrained(source, **options)`` of transformers or diffusers, without running any code that comes
    with the model.

    By default, transformers asks on standard input whether to run such code, and accepts a "y" from any pipe. For a
    local folder nothing is fetched from the network. Errors of the library pass through.
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
        if "Python object" in (reason := why_unreadable(error)):
            raise TrajOODError(f"{source}: its pickled weights cannot be read ({reason})") from error
        raise
    kernel = getattr(found, "_attn_implementation", None)
    if isinstance(kernel, str) and "/" in kernel:  # names a repository of compiled code on the hub
        raise _refused(source, f"the attention {kernel!r} from the hub")
    return found


def is_local(source: str) -> bool:
    """Whether a model's source can only be meant as a folder, not as ``owner/name`` on the hub: it begins as a path
    does, or its first part is a folder here. Without a network, asking the hub takes half a minute."""
    first = source.partition("/")[0]
    begins = source.startswith((".", "/", "~", "\\")) or re.match(r"[A-Za-z]:[/\\]", source) is not None
    return begins or (first != source and Path(first).is_dir())


class Checkpoint:
    """Where a model ``family:source`` of transformers is, a folder or hub name, and what it is called.

    ``needs`` are the files beside config.json and model.safetensors, for errors.
    """

    def __init__(self, family: str, source: str, needs: str, name: str | None = None) -> None:
        folder = Path(source).expanduser()
        files = f"config.json, model.safetensors and {needs}"
        if not folder.is_dir() and (is_local(source) or source.count("/") > 1):
            raise TrajOODError(f"{family}:{source}: no such folder; expected a folder with {files}")
        self.place = str(folder) if folder.is_dir() else source
        self.name = name or f"{family}:{folder.resolve().name if folder.is_dir() else source}"
        self._advice = f"; give a local folder with {files}: {family}:<folder>"

    def reading(self, file: str) -> AbstractContextManager[None]:
        """Context manager in which any error is that of reading ``file``."""
        return foreign_errors(f"{self.name}: {file} can be neither read nor downloaded", self._advice)


def whole_network(
    answer: tuple[Any, Mapping[str, Any]], where: str, *, optional: Sequence[str] = (), then: str = ""
) -> Any:
    """The network of ``from_pretrained(…, output_loading_info=True)`` in float32, checked to be complete.

    The libraries fill weights that a file lacks with random numbers; here they are an error, which begins with
    ``where`` and ends with ``then``, unless their names contain one of ``optional``.
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
    """The option ``use_safetensors`` for ``source``: true, unless a folder has pickled weights only, which both
    libraries read as plain tensors (torch's ``weights_only``)."""
    folder = Path(source).expanduser()
    pickled = any((folder / name).is_file() for name in _PICKLED) and not any(folder.glob("*.safetensors*"))
    return {"use_safetensors": not pickled}


def refuse_elsewhere(folder: Path) -> None:
    """Refuse a folder if a JSON file in it would make a library load code or weights from outside the folder."""
    for path in sorted(folder.rglob("*.json")):
        content = _read(path)
        asking = sorted(key for key in _ELSEWHERE if content.get(key))
        if asking:
            raise TrajOODError(
                f"{path}: {asking[0]!r} asks for code or files from elsewhere, which is never packed: do not trust "
                "this folder"
            )


def forget_paths(folder: Path) -> None:
    """Remove from every config.json the path that its model was loaded from, which is private to this machine."""
    for path in sorted(folder.rglob("config.json")):
        config = _read(path)
        if config.pop("_name_or_path", None) is not None:
            write_json(path, config)


def _read(path: Path) -> dict[str, Any]:
    return read_json(path, "a description of a model", "copy the folder again", limit=MAX_CONFIG)


def _refused(source: str, what: str) -> TrajOODError:
    return TrajOODError(
        f"{source}: its config.json asks for {what}, which is never run: use a model that transformers itself has, "
        "or build it in Python and wrap it in traj_ood.CallableBackbone or traj_ood.CallableAutoencoder"
    )
