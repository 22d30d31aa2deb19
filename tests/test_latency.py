"""What a program that starts for one image waits for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from traj_ood import Detector, load_autoencoder

# sympy and dynamo come with torch's compiler; torch.distributed comes with torch itself.
NOT_IMPORTED = (
    *("pandas", "pyarrow", "scipy", "sklearn", "skimage", "matplotlib", "jinja2", "faiss"),
    *("transformers", "timm", "diffusers", "torchvision", "openood", "accelerate", "huggingface_hub"),
    *("sympy", "torch._dynamo", "torch._inductor", "torch.onnx", "onnx", "onnxruntime"),
    *("traj_ood.evaluation.evaluator", "traj_ood.analysis", "traj_ood.export", "traj_ood.report", "traj_ood.training"),
)
SCORE = """
import json, sys
from traj_ood.cli import main
try:
    main(sys.argv[1:])
except SystemExit as end:
    assert not end.code, end.code
print(json.dumps(sorted(sys.modules)), file=sys.stderr)
"""


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the bundled model, fitted on noise."""
    folder = tmp_path_factory.mktemp("latency")
    images = torch.randint(0, 256, (40, 1, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    made = Detector.fit(load_autoencoder("fashion-mae"), images[:20]).calibrate(images[20:])
    made.save(folder / "detector")
    Image.fromarray(images[0, 0].numpy()).save(folder / "one.png")
    return folder


def test_scoring_one_png_imports_nothing_that_it_does_not_need(detector: Path) -> None:
    command = [sys.executable, "-c", SCORE, "score", "detector", "one.png", "--quiet"]
    done = subprocess.run(command, cwd=detector, capture_output=True, text=True, env={**os.environ, "RANK": "0"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[1].startswith("one.png,")
    loaded = json.loads(done.stderr.splitlines()[-1])
    assert "torch" in loaded
    assert [name for name in NOT_IMPORTED if name in loaded] == []
