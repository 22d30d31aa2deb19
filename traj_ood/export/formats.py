"""Write, open and run the two export formats: ONNX and ``torch.export``."""

from __future__ import annotations

import importlib.util
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from typing import Any, BinaryIO, Literal, get_args

import torch
from torch import Tensor, nn

from traj_ood.detector.conformal import Calibration
from traj_ood.errors import TrajOODError
from traj_ood.export.decisions import DecisionModule
from traj_ood.graph import EXAMPLE_ROWS, DetectorModule, can_scan
from traj_ood.text import brief

Format = Literal["onnx", "torch"]
FORMATS: tuple[Format, ...] = get_args(Format)
INPUT, OUTPUT = "images", "scores"
OUTPUTS = (OUTPUT, "p_values", "decisions")
"""Outputs of an ONNX file with a calibration; one without, and every torch file, has only the first."""
_ENDINGS: dict[Format, tuple[str, ...]] = {"onnx": (".onnx",), "torch": (".pt2", ".pt", ".pth")}
METADATA = "traj_ood"
"""Key of the JSON in an ONNX model's metadata; with the suffix .json, the extra file in a torch.export archive."""
MAX_UNROLLED = 32
"""Most steps in a graph without ``scan``, which contains every step separately."""
_MAX_ONNX_BYTES = 2**31 - 1
_INSTALL = "pip install 'traj_ood[export]'"

Runner = Callable[[Tensor], Tensor]
"""Pixels (B, C, H, W) float32 → scores (B,) float64."""
Answerer = Callable[[Tensor], dict[str, Tensor]]
"""Pixels (B, C, H, W) float32 → those of ``OUTPUTS`` that the file has, (B,) each."""


def write(
    form: Format, module: DetectorModule, known: Calibration | None, metadata: Mapping[str, Any], file: BinaryIO
) -> None:
    """Record a module as a graph, in ONNX with the decisions of a ``known`` calibration, and write it with its weights
    and ``metadata``."""
    text = json.dumps(metadata)
    with module.recording():
        if form == "onnx":
            _need("onnx", "onnxscript")
            file.write(_onnx_bytes(module, known, text))
        else:
            with _quiet():
                torch.export.save(record(module, module), file, extra_files={f"{METADATA}.json": text})


def check_ending(path: Path, form: Format) -> None:
    """Check that a file's name does not end as those of another format; other endings are the caller's choice."""
    other = next((name for name, ends in _ENDINGS.items() if name != form and path.suffix.lower() in ends), None)
    if other is not None:
        raise TrajOODError(
            f"{path}: expected a name that ends in {_ENDINGS[form][0]} for format {form}, got {path.suffix}, the "
            f"ending of format {other}: name it {path.with_suffix(_ENDINGS[form][0]).name}, or choose --format {other}"
        )


def open_file(form: Format, path: Path) -> tuple[Runner, dict[str, Any]]:
    """Open a file: a function that computes its scores on the CPU, and its metadata; see :func:`open_answers`."""
    answer, metadata = open_answers(form, path)
    return (lambda images: answer(images)[OUTPUT]), metadata


def open_answers(form: Format, path: Path) -> tuple[Answerer, dict[str, Any]]:
    """Open a file: a function that computes all its outputs on the CPU, and its metadata.

    ``torch.export.load`` is unsafe for files from others (it can fall back on pickle): open only your own exports.
    """
    try:
        return (_open_onnx if form == "onnx" else _open_torch)(path)
    except TrajOODError:
        raise
    except Exception as error:  # each runtime has its own error classes
        raise TrajOODError(f"{path}: cannot be loaded as an exported detector ({_first_cause(error)})") from error


def record(module: DetectorModule, whole: nn.Module) -> torch.export.ExportedProgram:
    """Record ``whole``, which is or contains ``module``, as a graph for any batch size."""
    example = torch.full((EXAMPLE_ROWS, *module.preprocessing.shape), 0.5)
    if module.steps > MAX_UNROLLED and not can_scan():
        raise TrajOODError(
            f"export: expected at most {MAX_UNROLLED} steps with torch {torch.__version__}, whose graphs contain every "
            f"step separately, got {module.steps}: use fewer, or torch >= 2.9"
        )
    try:
        with _quiet(), torch.no_grad():
            if module.steps > 1 and can_scan():
                module.record_loop(example)
            batch = {0: torch.export.Dim("batch")}
            return torch.export.export(whole, (example,), dynamic_shapes=(batch,), strict=False)
    except Exception as error:  # the network's code may raise anything
        raise TrajOODError(
            f"export: the network with scorer {module.scorer.label} cannot be recorded as a graph of any batch size "
            f"({_first_cause(error)}): use the detector in Python, or as_module()"
        ) from error


def _onnx_bytes(module: DetectorModule, known: Calibration | None, metadata: str) -> bytes:
    if "optimize" not in signature(torch.onnx.export).parameters:
        raise TrajOODError(
            f"export: expected torch >= 2.6 for ONNX, got {torch.__version__}: update torch, or use --format torch"
        )
    program = record(module, module if known is None else DecisionModule(module, known))
    names = [OUTPUT] if known is None else list(OUTPUTS)
    try:
        with _quiet():
            made: Any = torch.onnx.export(
                program, dynamo=True, input_names=[INPUT], output_names=names, verbose=False, optimize=True
            )
        proto = made.model_proto
    except Exception as error:
        raise TrajOODError(
            f"export: the graph of scorer {module.scorer.label} cannot be written as ONNX ({_first_cause(error)}): use "
            "--format torch"
        ) from error
    size = proto.ByteSize()
    if size > _MAX_ONNX_BYTES:
        raise TrajOODError(
            f"export: expected at most 2 GiB in one ONNX file, got {size / 2**30:.1f} GiB: use --format torch, or a "
            "scorer with a smaller view"
        )
    entry = proto.metadata_props.add()
    entry.key, entry.value = METADATA, metadata
    return proto.SerializeToString()


def _open_onnx(path: Path) -> tuple[Answerer, dict[str, Any]]:
    _need("onnxruntime")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    names = [output.name for output in session.get_outputs()]

    def run(images: Tensor) -> dict[str, Tensor]:
        return dict(zip(names, map(torch.from_numpy, session.run(names, {INPUT: images.numpy()})), strict=True))

    return run, json.loads(session.get_modelmeta().custom_metadata_map[METADATA])


def _open_torch(path: Path) -> tuple[Answerer, dict[str, Any]]:
    extra = {f"{METADATA}.json": ""}
    with _quiet(), open(path, "rb") as file:
        program = torch.export.load(file, extra_files=extra)
    module = program.module()

    def run(images: Tensor) -> dict[str, Tensor]:
        with torch.no_grad():
            return {OUTPUT: module(images)}

    return run, json.loads(extra[f"{METADATA}.json"])


def _need(*libraries: str) -> None:
    missing = [name for name in libraries if importlib.util.find_spec(name) is None]
    if missing:
        raise TrajOODError(f"export to ONNX needs {' and '.join(missing)}, which are not installed: {_INSTALL}")


@contextmanager
def _quiet() -> Iterator[None]:
    """Context manager that silences warnings and logs of the exporters; the file is verified against the detector."""
    loggers = [logging.getLogger(name) for name in ("torch.export", "torch.onnx", "onnxscript", "onnx_ir")]
    before = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


def _first_cause(error: BaseException) -> str:
    while error.__cause__ is not None:  # the exporters wrap the error in pages of advice
        error = error.__cause__
    return brief(error)
