"""A model repository for Triton's ONNX Runtime backend, from a file that `traj-ood export --format onnx` wrote:

    python benchmarks/consumers/triton/make_repository.py detector.onnx repository
    tritonserver --model-repository repository

Writes repository/traj_ood/1/model.onnx and repository/traj_ood/config.pbtxt: pixels in, scores, p-values and decisions
out (0 ok, 1 ood, 2 invalid), batches across clients for at most 5 ms. Preprocessing of files stands in the ONNX file's
metadata. Needs onnx alone.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import onnx

TYPES = {
    onnx.TensorProto.FLOAT: "TYPE_FP32",
    onnx.TensorProto.DOUBLE: "TYPE_FP64",
    onnx.TensorProto.INT64: "TYPE_INT64",
}
MAX_BATCH, DELAY = 64, 5000  # images, microseconds


def config(model: onnx.ModelProto) -> str:
    """config.pbtxt of an exported detector; dims are without the batch."""

    def tensor(value: onnx.ValueInfoProto) -> str:
        kind = value.type.tensor_type
        # A score is one number an image: Triton wants at least one dimension, and takes it away again.
        dims = [d.dim_value for d in kind.shape.dim[1:]] or [1]
        reshape = " reshape: { shape: [ ] }" if len(kind.shape.dim) == 1 else ""
        return f'{{ name: "{value.name}" data_type: {TYPES[kind.elem_type]} dims: {dims}{reshape} }}'

    inputs, outputs = (", ".join(map(tensor, part)) for part in (model.graph.input, model.graph.output))
    return (
        'name: "traj_ood"\nbackend: "onnxruntime"\n'
        f"max_batch_size: {MAX_BATCH}\ninput [ {inputs} ]\noutput [ {outputs} ]\n"
        f"dynamic_batching {{ max_queue_delay_microseconds: {DELAY} }}\n"
        "instance_group [ { kind: KIND_CPU count: 1 } ]\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("repository", type=Path)
    options = parser.parse_args()
    place = options.repository / "traj_ood"
    (place / "1").mkdir(parents=True)
    shutil.copy(options.model, place / "1" / "model.onnx")
    (place / "config.pbtxt").write_text(config(onnx.load(options.model, load_external_data=False)))


if __name__ == "__main__":
    main()
