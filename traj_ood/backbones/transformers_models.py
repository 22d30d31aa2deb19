"""Backbones from transformers: image classifiers and encoders, from a local folder or the hub."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor, nn

from traj_ood.backbones.base import Features
from traj_ood.backbones.image_processor import check_agreement, from_processor
from traj_ood.backbones.network import ClassifierInputBackbone, NetworkBackbone, find_classifier
from traj_ood.backbones.registry import register_backbone
from traj_ood.data.preprocessing import Preprocessing, trial_pictures
from traj_ood.errors import TrajOODError
from traj_ood.io.files import write_atomic
from traj_ood.io.pretrained import Checkpoint, from_pretrained, use_safetensors, whole_network
from traj_ood.io.trees import as_json

_CLASSIFIER = "ForImageClassification"
_PROCESSOR = "preprocessor_config.json"
_PACKED = "backbone"  # folder name of a packed model


@register_backbone
class TransformersEncoder(NetworkBackbone):
    """A transformers model without classifier. Features are the pooler's output, else the first token, else the mean of
    the feature maps."""

    library = "transformers"
    summary = "vision models of transformers: transformers:<hub name or folder>"

    def forward_batch(self, images: Tensor) -> Features:
        output = self.module(pixel_values=images)
        pooled = getattr(output, "pooler_output", None)
        if pooled is not None:
            return Features(pooled.flatten(1), None)
        hidden = output.last_hidden_state
        return Features(hidden[:, 0] if hidden.ndim == 3 else hidden.flatten(2).mean(dim=2), None)

    @classmethod
    def load(cls, source: str, *, name: str | None = None) -> TransformersEncoder:
        """Load a classifier or an encoder.

        Pickled weights are read only from a folder that has no others, and only as plain tensors. Code that comes with
        the model is never run.

        Args:
            source: a local folder with config.json, model.safetensors and preprocessor_config.json, or a name on the
                Hugging Face hub.
            name: the backbone's name. Default: ``transformers:`` and the folder's or hub name.
        """
        from transformers import AutoConfig, AutoImageProcessor

        known = Checkpoint(cls.library, source, _PROCESSOR, name)
        shown = known.name
        with known.reading("config.json"):
            config = from_pretrained(AutoConfig, known.place)
        if config.model_type == "vit_mae":
            raise TrajOODError(
                f"{shown}: expected a classifier or encoder, got a ViT-MAE, which is itself an autoencoder: use it as "
                "the model, without transformers:"
            )
        network = _network(known, config)
        with known.reading(_PROCESSOR):
            processor = from_pretrained(AutoImageProcessor, known.place)
        preprocessing = _preprocessing(processor, int(getattr(config, "num_channels", 3)), shown)
        settings: dict[str, Any] = {
            "name": shown,
            "spec": f"transformers:{source}",
            "preprocessing": preprocessing,
            "options": {"transform": as_json(processor.to_dict()), "pooling": type(network).__name__},
        }
        if not type(network).__name__.endswith(_CLASSIFIER):
            return TransformersEncoder(network, **settings)

        def call(images: Tensor) -> Tensor:
            return network(pixel_values=images).logits

        layer = find_classifier(shown, network, call, preprocessing.shape)
        return TransformersClassifier(network, call, layer, **settings)

    def pack(self, folder: Path) -> dict[str, Any]:
        network: Any = self.module
        (folder / _PACKED).mkdir(parents=True, exist_ok=True)
        network.save_pretrained(folder / _PACKED, max_shard_size="1000GB")  # in one file, as unpack expects
        processor = json.dumps(self.options()["transform"], indent=2, sort_keys=True)
        write_atomic(folder / _PACKED / _PROCESSOR, processor.encode())
        return {}

    @classmethod
    def unpack(cls, described: Mapping[str, Any], folder: Path) -> TransformersEncoder:
        return cls.load(str(folder / _PACKED), name=described["name"])


class TransformersClassifier(ClassifierInputBackbone, TransformersEncoder):
    """A transformers classifier. Features are the input of its last linear layer (a CLS token, pooled maps, …)."""


def _network(known: Checkpoint, config: Any) -> nn.Module:
    from transformers import AutoModel, AutoModelForImageClassification

    classifier = any(a.endswith(_CLASSIFIER) for a in config.architectures or ())
    kind = AutoModelForImageClassification if classifier else AutoModel
    options = {"config": config, "output_loading_info": True, **use_safetensors(known.place)}
    with known.reading("model.safetensors"):
        network, report = from_pretrained(kind, known.place, **options)
        missing = report["missing_keys"]
        if missing and all(key.startswith("pooler.") for key in missing):
            network, report = from_pretrained(kind, known.place, **options, add_pooling_layer=False)
        return whole_network((network, report), known.name)


def _preprocessing(processor: Any, channels: int, name: str) -> Preprocessing:
    """The preprocessing of an image processor, checked against the processor itself."""

    def prepare(image: Image.Image) -> Tensor:
        if image.mode == "L":  # processors expect a channel axis
            array = np.asarray(image)[None]
            return processor(images=array, return_tensors="pt", input_data_format="channels_first")["pixel_values"][0]
        return processor(images=image, return_tensors="pt")["pixel_values"][0]

    mode = "L" if channels == 1 else "RGB"
    shapes = {tuple(prepare(picture).shape) for picture in trial_pictures(mode)}
    where = f"{name}: {_PROCESSOR}"
    if len(shapes) != 1 or len(shape := shapes.pop()) != 3 or shape[0] != channels:
        raise TrajOODError(
            f"{where}: expected settings that bring images of any size to one size {channels} x H x W, by a resize to "
            "height and width or a crop: correct do_resize, size, do_center_crop and crop_size"
        )
    made = from_processor(as_json(processor.to_dict()), (shape[0], shape[1], shape[2]), where)
    check_agreement(made, prepare, where)
    return made
