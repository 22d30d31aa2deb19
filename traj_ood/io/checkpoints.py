"""Read weights, from safetensors files or PyTorch checkpoints, without running any code in them; write checkpoints."""

from __future__ import annotations

import io
import json
import re
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from traj_ood.errors import TrajOODError
from traj_ood.io.files import write_atomic
from traj_ood.text import brief

# Keys under which checkpoints keep tensors, in timm's order of preference: averaged weights (EMA) before raw ones.
_NESTS = ("state_dict_ema", "model_ema", "state_dict", "model", "model_state_dict", "net")
_MAX_NESTED = 8  # of these inside each other; a mapping in a file may contain itself
# Prefixes that torch.compile, nn.DataParallel and DistributedDataParallel add to names, in any order.
_WRAPPERS = re.compile(r"^(?:_orig_mod\.|module\.)+")
_AVERAGING = "n_averaged"  # update counter of torch's AveragedModel, not a weight
# Classes of the settings and counters that training scripts save beside the weights. None of them is imported: while a
# file is read, _DICTIONARIES are replaced by dictionaries and _RECORDS by objects without content.
_DICTIONARIES = (
    "collections.defaultdict",
    "lightning.fabric.utilities.data.AttributeDict",
    "lightning.pytorch.utilities.parsing.AttributeDict",
    "lightning_fabric.utilities.data.AttributeDict",
    "pytorch_lightning.utilities.parsing.AttributeDict",
)
_RECORDS = (
    "argparse.Namespace",
    "builtins.bool",
    "builtins.dict",
    "builtins.float",
    "builtins.int",
    "builtins.list",
    "builtins.str",
    "builtins.tuple",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "numpy.dtype",
    "omegaconf.base.ContainerMetadata",
    "omegaconf.base.Metadata",
    "omegaconf.dictconfig.DictConfig",
    "omegaconf.listconfig.ListConfig",
    "omegaconf.nodes.AnyNode",
    "pathlib.PosixPath",
    "pathlib.WindowsPath",
    "pathlib._local.PosixPath",
    "pathlib._local.WindowsPath",
    "types.SimpleNamespace",
    "typing.Any",
)


class _Dictionary:
    """Constructs an empty dictionary, whatever the arguments."""

    def __new__(cls, *_: Any) -> Any:
        return OrderedDict()


class _Record:
    """Accepts any arguments and any state, and keeps none of it."""

    def __init__(self, *_: Any) -> None: ...

    def __setstate__(self, _: Any) -> None: ...


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Read the tensors of a safetensors file or a PyTorch checkpoint, on the CPU, without running any code in it.

    The format is recognised by content, not by the file's name; an index of shards (``*.index.json``) stands for the
    shards beside it. A checkpoint may keep its tensors under ``state_dict``, ``model``, ``model_state_dict`` or
    ``net``; averaged weights (``state_dict_ema``, ``model_ema``) are preferred to raw ones, as in timm. The wrapper
    prefixes ``module.`` and ``_orig_mod.`` are removed, and module versions are kept as the attribute ``_metadata``.
    Everything else in the file (epoch, optimizer, arguments) is ignored.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        found = "a folder" if path.is_dir() else "nothing"
        raise TrajOODError(
            f"{path}: expected a file of weights (.safetensors or .pth), found {found}; correct the path"
        )
    if path.name.endswith(".index.json"):
        return {key: value for shard in _shards(path) for key, value in read_weights(shard).items()}
    try:
        with open(path, "rb") as file:
            head = file.read(512)
        other = _other_content(head, path)
        if other:
            raise ValueError(other)
        if head[8:9] == b"{" or (path.suffix == ".safetensors" and head[:2] not in (b"PK", b"\x80\x02")):
            return load_file(path)
        with _plain_data(), open(path, "rb") as file:  # given a path, newer versions of torch go by its suffix
            tree = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # safetensors, zipfile, pickle and torch each have error classes of their own
        raise TrajOODError(
            f"{path}: cannot be read as plain weights ({why_unreadable(error)}); expected a whole .safetensors file or "
            "a state dict saved by torch.save"
        ) from error
    return _tensors(tree, path)


def write_checkpoint(path: str | Path, state: Mapping[str, Any]) -> None:
    """Write tensors and plain data, such as the states of a module and its optimizer, to one file, atomically."""
    buffer = io.BytesIO()  # a full disk then raises OSError in write_atomic, not an error of torch
    torch.save(state, buffer)
    write_atomic(path, buffer.getvalue())


@contextmanager
def open_checkpoint(path: str | Path, device: torch.device, fix: str) -> Iterator[Mapping[str, Any]]:
    """Context manager that yields what :func:`write_checkpoint` wrote, with its tensors on ``device``; any exception in
    the ``with`` block is reported as damage, with the advice ``fix``."""
    try:
        yield torch.load(path, map_location=device, weights_only=True)
    except TrajOODError:
        raise
    except Exception as error:  # pickle, zipfile and torch raise different error classes
        raise TrajOODError(f"{path}: damaged checkpoint ({brief(error)}): {fix}") from error


# In the words of zipfile, pickle, and safetensors before and since 0.5.
_CUT_OFF = r"central directory|unexpected EOF|Ran out of input|IncompleteBuffer|not fully covered"


def why_unreadable(error: BaseException) -> str:
    """Why weights could not be read; for a pickle, the Python object that it requires."""
    cause: BaseException | None = error
    while cause is not None:
        found = re.search(r"GLOBAL ([\w.]+)|unrecognized function (.+)", str(cause))
        if found:
            wanted = found[1] or found[2]
            return f"it requires the Python object {wanted[:100]}, and no code in a file is run: save only state_dict()"
        if "Unsupported operand" in str(cause):
            return "it is a pickle that torch.save did not write"
        if re.search(_CUT_OFF, str(cause)):
            return "it is cut off: copy or download it again"
        cause = cause.__cause__ or cause.__context__
    return brief(error)


def _other_content(head: bytes, path: Path) -> str:
    """What a file is, if its first bytes show that it cannot contain weights; else an empty string."""
    if not head:
        return "it is empty"
    if head.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer in place of the file: run git lfs pull"
    if re.match(rb"\s*<(!doctype|html|\?xml)", head, re.IGNORECASE):
        return "it is a web page: download the file itself"
    if head.startswith(b"\x89HDF"):
        return "it is an HDF5 file, as Keras writes"
    if head.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ")):
        return "it is compressed: unpack it first"
    if head.startswith(b"\x93NUMPY") or path.suffix in (".npz", ".npy"):
        return "it is a NumPy archive, as JAX training writes: convert it"
    if head.startswith(b"PK") and zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if any(name.endswith("/constants.pkl") for name in archive.namelist()):
                return "it is a TorchScript program: save only state_dict()"
    return ""


def _plain_data() -> AbstractContextManager[Any]:
    """Context manager in which torch's restricted unpickler replaces the classes above by inert objects."""
    allow = getattr(torch.serialization, "safe_globals", None)  # torch 2.5
    if allow is None:
        return nullcontext()
    stands: list[Any] = []
    for base, names in ((_Dictionary, _DICTIONARIES), (_Record, _RECORDS)):
        for name in names:
            module, _, own = name.rpartition(".")
            stands.append(type(own, (base,), {"__module__": module, "__qualname__": own}))
    return allow(stands)


def _shards(index: Path) -> Iterator[Path]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        if not all(isinstance(name, str) and Path(name).name == name for name in names):
            raise ValueError("a shard that is not in the same folder")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise TrajOODError(
            f"{index}: expected the weight_map of a sharded checkpoint, got none ({error}): copy the model again"
        ) from error
    yield from (index.parent / name for name in names)


def _tensors(tree: Any, path: Path) -> dict[str, Tensor]:
    for _ in range(_MAX_NESTED if isinstance(tree, Mapping) else 0):
        tree = next((tree[key] for key in _NESTS if isinstance(tree.get(key), Mapping)), tree)
    found = {str(k): v for k, v in tree.items() if isinstance(v, Tensor)} if isinstance(tree, Mapping) else {}
    if not found:
        raise TrajOODError(f"{path}: expected a state dict (names to tensors), got {_describe(tree)}")
    weights: OrderedDict[str, Tensor] = OrderedDict()
    for key, value in found.items():
        name = _WRAPPERS.sub("", key)
        if name in weights:
            raise TrajOODError(f"{path}: contains {name} twice, with and without a wrapper's prefix: save it again")
        if name != _AVERAGING:
            weights[name] = value
    versions = getattr(tree, "_metadata", None)
    if isinstance(versions, Mapping):
        weights._metadata = {_WRAPPERS.sub("", f"{key}.").removesuffix("."): v for key, v in versions.items()}  # type: ignore[attr-defined]
    return weights


def _describe(tree: Any) -> str:
    if isinstance(tree, Mapping):
        odd = next((k for k, v in tree.items() if not isinstance(v, Tensor)), None)
        return f"a mapping whose {odd!r} is a {type(tree[odd]).__name__}" if tree else "an empty one"
    return f"a {type(tree).__name__}"
