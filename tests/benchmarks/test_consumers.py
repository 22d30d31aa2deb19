"""The examples of benchmarks/consumers/ do what they say, each on a detector made here."""

from __future__ import annotations

import csv
import importlib
import importlib.util
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from PIL import Image

from traj_ood import Detector, Normalised
from traj_ood.cli import main

CONSUMERS = Path(__file__).parents[2] / "benchmarks" / "consumers"


def load(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, CONSUMERS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def detector() -> Detector:
    model = tiny.conv()
    made = Detector.fit(model, Normalised(tiny.images(30, model.input_shape)), "field")
    return made.calibrate(Normalised(tiny.images(40, model.input_shape, seed=9)))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Three images of another size than the model's, two grey and one in colour, and a broken file."""
    folder = tmp_path / "photos"
    tiny.write_images(folder / "grey", 2, seed=0, size=20)
    tiny.write_images(folder / "colour", 1, seed=1, size=17, mode="RGB")
    (folder / "torn.png").write_bytes((folder / "grey" / "000.png").read_bytes()[:60])
    return folder


# ---------------------------------------------------------------------- ONNX Runtime alone


@pytest.mark.slow
def test_onnx_runtime_needs_neither_torch_nor_traj_ood(detector: Detector, photos: Path, tmp_path: Path) -> None:
    for library in ("onnxscript", "onnxruntime"):
        pytest.importorskip(library, reason="needs traj_ood[export]")
    from traj_ood.export import export_detector

    model = tmp_path / "detector.onnx"
    export_detector(detector, model, "onnx", images=torch.rand(4, 1, 8, 8))
    paths = [str(photos / name) for name in ("grey/000.png", "torn.png", "colour/000.png", "grey/001.png")]
    deep = np.linspace(0, 65535, 400).astype(np.uint16).reshape(20, 20)
    Image.fromarray(deep).save(photos / "deep.png")
    frames = [Image.new("L", (20, 20), shade) for shade in (0, 255)]
    frames[0].save(photos / "moving.gif", save_all=True, append_images=frames[1:])
    whole_png = (photos / "grey" / "000.png").read_bytes()
    (photos / "odd.png").write_bytes(whole_png[:30] + b"\xff" * 8 + whole_png[38:])  # Pillow: SyntaxError
    (photos / "program.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n")
    Image.new("1", (10_000, 10_000)).save(photos / "bomb.png")
    paths += [str(photos / name) for name in ("deep.png", "moving.gif", "odd.png", "program.png", "bomb.png")]
    paths += ["=1+1.png"]
    bare = "import runpy, sys; sys.modules.update(torch=None, traj_ood=None, pandas=None); sys.argv = sys.argv[1:]; "
    command = [sys.executable, "-c", bare + "runpy.run_path(sys.argv[0], run_name='__main__')"]
    command += [str(CONSUMERS / "onnx_runtime.py"), str(model), *paths]
    done = subprocess.run(command, capture_output=True, text=True, timeout=tiny.PATIENCE, check=False)
    assert done.returncode == 3, done.stderr  # one image could not be read
    rows = list(csv.DictReader(io.StringIO(done.stdout)))
    assert [row["path"] for row in rows] == [*paths[:-1], "'=1+1.png"]  # which no spreadsheet runs
    assert rows[1]["score"] == ""
    failed = [row["reason"].startswith("invalid: ") for row in rows]
    assert failed == [False, True, False, False, False, True, True, True, True, True]
    assert "several frames" in rows[5]["reason"]
    assert "at most 89478485 pixels" in rows[8]["reason"]
    whole = [row for row in rows if row["score"]]
    said = detector.decide([row["path"] for row in whole])
    assert [float(row["score"]) for row in whole] == pytest.approx([one.score for one in said], rel=1e-4)
    assert [row["reason"] for row in whole] == [one.reason for one in said]
    assert [float(row["p_value"]) for row in whole] == [one.p_value for one in said]


# ---------------------------------------------------------------------- a batch job


@pytest.mark.parametrize("suffix", [".parquet", ".csv"])
def test_the_batch_job_writes_a_row_for_every_file(
    suffix: str, detector: Detector, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = load("batch_job")
    monkeypatch.setattr(job, "BATCH", 2)
    held: list[tuple[int, ...]] = []
    judge = detector.judge

    def watched(images: Any, **options: Any) -> Any:
        held.append(tuple(images.images.shape))
        return judge(images, **options)

    monkeypatch.setattr(detector, "judge", watched)
    monkeypatch.setattr(job.Detector, "load", lambda folder: detector)
    out = tmp_path / f"scores{suffix}"
    monkeypatch.setattr(sys, "argv", ["batch_job.py", "detector", str(photos), str(out)])
    with pytest.raises(SystemExit) as ended:
        job.main()
    assert ended.value.code == 3
    table = pd.read_parquet(out) if suffix == ".parquet" else pd.read_csv(out)
    assert list(table.columns) == job.COLUMNS
    assert table["path"].tolist() == ["colour/000.png", "grey/000.png", "grey/001.png", "torn.png"]
    assert held == [(2, 1, 8, 8), (1, 1, 8, 8)]  # of the model's size, not of the photographs'
    said = judge([photos / p for p in table["path"][:3]], whole_chunks=True)
    assert table["score"][:3].tolist() == pytest.approx(said.scores.tolist(), rel=1e-9)
    assert table["ood"][:3].tolist() == said.decisions.tolist()
    assert table["error"].notna().tolist() == [False, False, False, True]
    assert table["score"].isna().tolist() == [False, False, False, True]
    assert table["steps"][:3].tolist() == [1, 1, 1]
    assert table["status"][:3].tolist() == ["ok"] * 3


@pytest.mark.slow
def test_the_batch_job_loads_a_folder_and_raises_the_alarm(
    detector: Detector, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    detector.save(tmp_path / "detector")
    (photos / "torn.png").rename(photos / "=1+1.png")
    (photos / "=1+1.png").write_bytes((photos / "grey" / "000.png").read_bytes())
    command = [sys.executable, str(CONSUMERS / "batch_job.py"), str(tmp_path / "detector"), str(photos)]
    done = subprocess.run(
        [*command, str(tmp_path / "scores.csv"), "--alarm", "-1"],
        capture_output=True,
        text=True,
        timeout=tiny.PATIENCE,
        check=False,
    )
    assert done.returncode == 4, done.stderr
    assert done.stdout.startswith("4 images, 0 unreadable, ")
    assert pd.read_csv(tmp_path / "scores.csv")["path"].tolist()[0] == "'=1+1.png"
    monkeypatch.setattr(sys, "argv", [*command[1:], "scores.txt"])
    with pytest.raises(
        SystemExit, match=r"batch_job: error: scores\.txt: expected a name that ends in \.parquet or \.csv"
    ):
        load("batch_job").main()


# ---------------------------------------------------------------------- containers and servers of others


def steps_of(dockerfile: Path) -> list[tuple[str, str]]:
    """(instruction, arguments) of a Dockerfile, lines continued by a backslash joined."""
    text = "\n".join(line for line in dockerfile.read_text().splitlines() if not line.lstrip().startswith("#"))
    lines = [line.strip() for line in text.replace("\\\n", " ").splitlines() if line.strip()]
    return [(line.split(None, 1)[0].upper(), line.split(None, 1)[1]) for line in lines]


def copied(steps: list[tuple[str, str]], context: Path) -> Path:
    """What the COPY steps take from the repository, in a folder that stands for the image's root."""
    root = CONSUMERS.parents[1]
    for words in [words.split() for name, words in steps if name == "COPY" and "--from" not in words]:
        target = context / words[-1].lstrip("/")
        for source in words[:-1]:
            assert (root / source).exists(), source
            place = target / source if words[-1].endswith("/") else target
            place.parent.mkdir(parents=True, exist_ok=True)
            if (root / source).is_dir():
                shutil.copytree(root / source, place, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(root / source, place)
    return context


def test_the_dockerfile_is_slim_not_root_and_starts_what_there_is(tmp_path: Path, detector: Detector) -> None:
    """Without Docker: its steps, what they copy, the package that is built of it, and the command that it starts."""
    steps = steps_of(CONSUMERS / "docker" / "Dockerfile")
    known = {"FROM", "RUN", "COPY", "ENV", "USER", "EXPOSE", "HEALTHCHECK", "STOPSIGNAL", "ENTRYPOINT", "CMD"}
    assert {name for name, _ in steps} <= known
    assert all("slim" in words for name, words in steps if name == "FROM")
    (user,) = [words for name, words in steps if name == "USER"]
    assert user.isdigit()
    assert int(user) > 0
    root = CONSUMERS.parents[1]
    context = copied(steps, tmp_path / "context")
    assert (context / "src" / "pyproject.toml").is_file()
    tomllib = pytest.importorskip("tomllib", reason="needs Python 3.11")
    extras = tomllib.loads((root / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    install = next(words for name, words in steps if name == "RUN" and "/src" in words)
    assert set(install.split("[")[1].split("]")[0].split(",")) <= extras.keys()

    (entry,) = [json.loads(words) for name, words in steps if name == "ENTRYPOINT"]
    (command,) = [json.loads(words) for name, words in steps if name == "CMD"]
    assert entry[0] == "traj-ood"
    main.make_context("traj-ood", [*entry[1:], *command], resilient_parsing=False).close()
    serving = main.commands[entry[1]]
    with serving.make_context(entry[1], list(command)) as context_of:  # every option is one
        assert context_of.params["port"] == 8000


@pytest.mark.slow
def test_what_the_dockerfile_builds_serves_a_detector(tmp_path: Path, detector: Detector) -> None:
    """Its steps without Docker: the package of the files that it copies is built, installed alone and started by its
    command, on a free port, and its health check asks."""
    pytest.importorskip("fastapi", reason="needs traj_ood[serve]")
    steps = steps_of(CONSUMERS / "docker" / "Dockerfile")
    context = copied(steps, tmp_path / "context")
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--no-index", "--quiet"]
    subprocess.run([*install, "--target", tmp_path / "site", context / "src"], check=True, timeout=tiny.PATIENCE)
    detector.save(tmp_path / "detector")
    (entry,) = [json.loads(words) for name, words in steps if name == "ENTRYPOINT"]
    (command,) = [json.loads(words) for name, words in steps if name == "CMD"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    here = {"/detector": str(tmp_path / "detector"), "8000": port, "0.0.0.0": "127.0.0.1"}
    words = [sys.executable, "-m", "traj_ood", *entry[1:], *(here.get(word, word) for word in command)]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    where = [sys.executable, "-c", "import traj_ood; print(traj_ood.__file__)"]
    told = subprocess.run(where, env=environment, capture_output=True, text=True, check=True, cwd=tmp_path).stdout
    assert told.startswith(str(tmp_path / "site"))
    health = next(words for name, words in steps if name == "HEALTHCHECK")
    check = json.loads(health[health.index("[") :].replace("8000", port))
    with subprocess.Popen(words, env=environment, cwd=tmp_path, stderr=subprocess.DEVNULL) as process:
        try:
            deadline = time.monotonic() + tiny.PATIENCE
            while subprocess.run([sys.executable, *check[1:]], stderr=subprocess.DEVNULL, check=False).returncode:
                assert process.poll() is None
                assert time.monotonic() < deadline
        finally:
            process.terminate()
        assert process.wait(tiny.PATIENCE) in (0, -signal.SIGTERM)


# What Triton's model_config.proto says of the fields that we use; a star is a list.
TRITON = {
    "Reshape": {"shape": "int64*"},
    "Input": {"name": "string", "data_type": "Type", "dims": "int64*", "reshape": "Reshape"},
    "Output": {
        "name": "string",
        "data_type": "Type",
        "dims": "int64*",
        "reshape": "Reshape",
        "label_filename": "string",
    },
    "Batching": {"preferred_batch_size": "int32*", "max_queue_delay_microseconds": "uint64"},
    "Group": {"name": "string", "kind": "Kind", "count": "int32"},
    "Config": {
        "name": "string",
        "backend": "string",
        "max_batch_size": "int32",
        "input": "Input*",
        "output": "Output*",
        "instance_group": "Group*",
        "dynamic_batching": "Batching",
    },
}
TRITON_WORDS = {
    "Type": ("TYPE_INVALID", "TYPE_INT64", "TYPE_FP32", "TYPE_FP64"),
    "Kind": ("KIND_AUTO", "KIND_GPU", "KIND_CPU", "KIND_MODEL"),
}


def triton_config() -> Any:
    """An empty model configuration: Triton's own class where tritonclient is installed, else of ``TRITON``."""
    with suppress(ImportError):
        return importlib.import_module("tritonclient.grpc.model_config_pb2").ModelConfig()
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    file = descriptor_pb2.FileDescriptorProto(name="triton.proto", package="t", syntax="proto3")
    for name, words in TRITON_WORDS.items():
        kind = file.enum_type.add(name=name)
        for number, word in enumerate(words):
            kind.value.add(name=word, number=number)
    for name, fields in TRITON.items():
        message = file.message_type.add(name=name)
        for number, (field, told) in enumerate(fields.items(), 1):
            made = message.field.add(name=field, number=number, label=3 if told.endswith("*") else 1)
            own = told.rstrip("*")
            if own in TRITON or own in TRITON_WORDS:
                made.type_name, made.type = f".t.{own}", 11 if own in TRITON else 14
            else:
                made.type = getattr(made, f"TYPE_{own.upper()}")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("t.Config"))()


def check_model_config(text: str, model: Path) -> None:
    """The configuration is one by Triton's schema, and says of every tensor what the file says."""
    import onnx
    from google.protobuf import text_format

    config = text_format.Parse(text, triton_config())
    assert (config.backend, config.max_batch_size > 0) == ("onnxruntime", True)
    assert config.dynamic_batching.max_queue_delay_microseconds == 5000
    graph = onnx.load(model, load_external_data=False).graph
    for told, own in ((config.input, graph.input), (config.output, graph.output)):
        assert [tensor.name for tensor in told] == [tensor.name for tensor in own]
        for tensor, real in zip(told, own, strict=True):
            kind = real.type.tensor_type
            dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)
            words = tensor.DESCRIPTOR.fields_by_name["data_type"].enum_type.values_by_number
            expected = f"TYPE_{'FP' if dtype.kind == 'f' else 'INT'}{8 * dtype.itemsize}"
            assert words[tensor.data_type].name == expected
            dims = list(tensor.reshape.shape) if tensor.HasField("reshape") else list(tensor.dims)
            assert dims == [d.dim_value for d in kind.shape.dim[1:]]
            assert all(d > 0 for d in tensor.dims)
            assert len(tensor.dims) > 0
            assert np.prod(dims, dtype=int) == np.prod(tensor.dims)
            assert kind.shape.dim[0].dim_param  # of any number of images


@pytest.mark.slow
def test_a_repository_for_triton_is_valid_and_says_what_the_detector_says(detector: Detector, tmp_path: Path) -> None:
    for library in ("onnxscript", "onnxruntime"):
        pytest.importorskip(library, reason="needs traj_ood[export]")
    from traj_ood.export import export_detector, open_answers

    export_detector(detector, tmp_path / "d.onnx", images=torch.rand(3, 1, 8, 8))
    script = CONSUMERS / "triton" / "make_repository.py"
    command = [sys.executable, str(script), str(tmp_path / "d.onnx"), str(tmp_path / "repository")]
    subprocess.run(command, check=True, timeout=tiny.PATIENCE)
    place = tmp_path / "repository" / "traj_ood"
    text = (place / "config.pbtxt").read_text()
    for part in ('name: "images" data_type: TYPE_FP32 dims: [1, 8, 8]', '"p_values" data_type: TYPE_FP64 dims: [1]'):
        assert part in text
    assert '"decisions" data_type: TYPE_INT64' in text
    assert open_answers("onnx", place / "1" / "model.onnx")[0](torch.rand(2, 1, 8, 8))["decisions"].shape == (2,)
    check_model_config(text, place / "1" / "model.onnx")


@pytest.mark.slow
def test_the_bentoml_service_says_what_the_detector_says(
    detector: Detector, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("bentoml", reason="needs bentoml, which no extra brings: pip install bentoml")
    detector.save(tmp_path / "d")
    monkeypatch.setenv("TRAJ_OOD_DETECTOR", str(tmp_path / "d"))
    monkeypatch.setenv("BENTOML_DO_NOT_TRACK", "True")
    made = load("bentoml_service").OutOfDistribution.inner()
    images = [Image.open(photos / "grey" / name) for name in ("000.png", "001.png")]
    expected = [one.as_dict() for one in detector.decide(images)]
    for one, own in zip(made.score(images), expected, strict=True):
        assert one["score"] == pytest.approx(own["score"], rel=1e-4)
        assert one["reason"] == own["reason"]
