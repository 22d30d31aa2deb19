"""The bridge: the contract with OpenOOD on a stand-in of its few entry points, and on the real one where it is."""

from __future__ import annotations

import importlib
import importlib.util
import json
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from tiny import images, vit, write_images
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from traj_ood import ScorerSet, openood
from traj_ood.data.benchmark import sample_indices
from traj_ood.data.preprocessing import Normalised
from traj_ood.errors import TrajOODError
from traj_ood.openood import AutoencoderNet, config_root, openood_names, register
from traj_ood.openood.__main__ import run_script
from traj_ood.openood.bridge import Bridge, postprocessor_class
from traj_ood.openood.loaders import check_normalisation
from traj_ood.openood.nets import backbone_of
from traj_ood.openood.settings import Settings, config_section, config_text
from traj_ood.scorers import SCORERS

SHAPE = (1, 8, 8)

# What the bridge meets in OpenOOD, and no more.
FAKE = {
    "__init__": "",
    "utils/__init__": "",
    "utils/config": """
        class Config(dict):
            def __init__(self, **tree):
                super().__init__({k: Config(**v) if isinstance(v, dict) else v for k, v in tree.items()})
            def __getattr__(self, key):
                return self.get(key)
            def __getstate__(self):
                return dict(self)
            def __setstate__(self, state):
                self.update(state)
        """,
    "postprocessors/__init__": """
        class BasePostprocessor:
            def __init__(self, config):
                self.config = config
        from .utils import get_postprocessor
        """,
    "postprocessors/utils": """
        def get_postprocessor(config):
            return {"knn": "OpenOOD's own"}[config.postprocessor.name]
        """,
    "pipelines": "from openood.postprocessors import get_postprocessor\n",
    "evaluation_api/__init__": """
        from .evaluator import Evaluator
        """,
    "evaluation_api/postprocessor": """
        import yaml
        from openood.utils.config import Config
        postprocessors = {"knn": object}
        def get_postprocessor(config_root, name, id_name):
            with open(f"{config_root}/postprocessors/{name}.yml") as file:
                config = Config(**yaml.safe_load(file))
            made = postprocessors[name](config)
            made.APS_mode, made.hyperparam_search_done = config.postprocessor.APS_mode, False
            return made
        """,
    "evaluation_api/evaluator": """
        from .postprocessor import get_postprocessor
        class Evaluator:
            loaders = None
            def __init__(self, net, id_name, data_root="./data", config_root="./configs", preprocessor=None,
                         postprocessor_name=None, postprocessor=None, batch_size=200, shuffle=False, num_workers=4):
                self.net, self.preprocessor = net, preprocessor
                self.postprocessor = postprocessor or get_postprocessor(config_root, postprocessor_name, id_name)
                self.dataloader_dict = self.loaders
                self.postprocessor.setup(net, self.loaders["id"], self.loaders["ood"])
                self.metrics = {"id_acc": None, "csid_acc": None}
                self.scores = {"id_preds": None, "id_labels": None, "csid_preds": {}, "csid_labels": {}}
        """,
}


def forget() -> None:
    for name in [m for m in sys.modules if m.split(".")[0] == "openood"]:
        del sys.modules[name]
    postprocessor_class.cache_clear()


def write_fake(folder: Path, **changes: str | None) -> None:
    import textwrap

    for name, text in {**FAKE, **changes}.items():
        if text is not None:
            path = folder / "openood" / f"{name}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(textwrap.dedent(text))


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A stand-in for OpenOOD that can be imported."""
    write_fake(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    forget()
    yield tmp_path
    forget()


class Images(Dataset[dict[str, Any]]):
    """What OpenOOD's data sets hand out."""

    def __init__(self, count: int, seed: int, shift: float = 0.0, classes: int = 3) -> None:
        self.data = images(count, SHAPE, seed) + shift
        self.classes = classes

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {"data": self.data[i], "label": i % self.classes, "image_name": f"{i:03d}.png", "index": i}


def loader(count: int, seed: int, shift: float = 0.0, **options: Any) -> DataLoader[dict[str, Any]]:
    return DataLoader(Images(count, seed, shift), **{"batch_size": 7, **options})


def loaders(train: int = 40, **options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    ids = {"train": loader(train, 0, **options), "val": loader(9, 1), "test": loader(11, 2)}
    return ids, {"val": loader(8, 3, 1.0), "near": {}, "far": {}}


class Net(nn.Module):
    """An OpenOOD classifier: 64 pixels → 6 features → 3 logits."""

    def __init__(self, answer: str = "both") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.fc, self.answer = nn.Linear(64, 6), nn.Linear(6, 3), answer

    def forward(self, x: Tensor, return_feature: bool = False) -> Any:
        features = self.body(x.flatten(1)).relu()
        logits = self.fc(features)
        if not return_feature or self.answer == "logits":
            return logits
        return logits, features[:, :, None] if self.answer == "map" else features

    def get_fc(self) -> tuple[Any, Any]:
        return self.fc.weight.detach().numpy(), self.fc.bias.detach().numpy()


class Featureless(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)


def made(spec: str, **options: Any) -> Bridge:
    return openood.postprocessor(spec, **{"max_steps": 20, **options})


# ---------------------------------------------------------------------------------------------- scores


@pytest.mark.filterwarnings("ignore:unhealthy")
def test_confidences_are_the_scores_with_their_sign_flipped(fake: Path) -> None:
    model, (ids, oods) = vit(), loaders()
    for spec in ("trajectory", "knn:k=3", "mahalanobis", "reconstruction"):
        post = made(spec)
        post.setup(AutoencoderNet(model), ids, oods)
        predictions, confidences, labels = post.inference(AutoencoderNet(model), ids["test"], progress=False)
        own = ScorerSet(model, [spec], max_steps=20).fit(Normalised(ids["train"].dataset.data))
        expected = own.score(Normalised(ids["test"].dataset.data)).scores[spec]
        assert confidences.dtype == np.float64
        np.testing.assert_allclose(confidences, -expected.numpy(), rtol=1e-9)  # though the batches differ
        assert np.array_equal(labels, [i % 3 for i in range(11)])
        assert predictions.dtype == labels.dtype == np.dtype(int)
        assert set(predictions) == {-1}
        batch = post.postprocess(AutoencoderNet(model), ids["test"].dataset.data)[1]
        assert torch.equal(batch, -expected)


def test_training_images_are_drawn_by_place_whatever_the_loaders_order(fake: Path) -> None:
    model = vit()
    results = []
    for options in ({}, {"shuffle": True, "batch_size": 5}):
        post = made("knn:k=3", attractors=15, seed=4)
        ids, oods = loaders(**options)
        post.setup(AutoencoderNet(model), ids, oods)
        results.append(post.inference(AutoencoderNet(model), ids["test"], False)[1])
    chosen = ids["train"].dataset.data[sample_indices(40, 15, 4, "train")]  # the sample of traj_ood's own Evaluator
    scorers = ScorerSet(model, ["knn:k=3"]).fit(Normalised(chosen))
    own = scorers.score(Normalised(ids["test"].dataset.data)).scores["knn:k=3"]
    np.testing.assert_allclose(results[0], results[1], rtol=1e-9)
    np.testing.assert_allclose(results[0], -own.numpy(), rtol=1e-9)


def test_setup_learns_once_and_refuses_other_weights(fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    post, (ids, oods) = made("knn:k=3"), loaders()
    net = AutoencoderNet(vit())
    with pytest.raises(TrajOODError, match=r"knn: call setup with OpenOOD's loaders first"):
        post.inference(net, ids["test"])
    post.setup(net, ids, oods)
    monkeypatch.setattr(Bridge, "_learn", None)  # calling it again would fail
    post.setup(net, ids, oods)
    post.setup(AutoencoderNet(vit()), ids, oods)  # equal weights
    with pytest.raises(TrajOODError, match="was set up with other weights than those of this AutoencoderNet"):
        post.setup(AutoencoderNet(vit(seed=1)), ids, oods)


def test_an_unhealthy_dictionary_is_told(fake: Path) -> None:
    ids, oods = loaders(train=12)
    with pytest.warns(UserWarning, match="unhealthy attractors: "):
        made("trajectory").setup(AutoencoderNet(vit()), ids, oods)


def test_a_classifier_is_read_through_its_features(fake: Path) -> None:
    net, (ids, oods) = Net().train(), loaders()
    post = made("knn:k=3")
    post.setup(net, ids, oods)
    predictions, confidences, _ = post.inference(net, ids["test"], False)
    with torch.no_grad():
        logits, query = net(ids["test"].dataset.data, return_feature=True)
        bank = nn.functional.normalize(net(ids["train"].dataset.data, return_feature=True)[1], dim=1)
    far = torch.cdist(nn.functional.normalize(query, dim=1).double(), bank.double()).sort(dim=1).values[:, 2]
    assert confidences == pytest.approx(-far.numpy(), abs=1e-6)
    assert np.array_equal(predictions, logits.argmax(1).numpy())
    assert all(p.requires_grad for p in net.parameters())  # OpenOOD's other postprocessors may need gradients


def test_a_classifier_gets_a_surrogate_where_the_scorer_reads_trajectories(fake: Path) -> None:
    net, (ids, oods) = Net(), loaders(train=48)
    post = made("trajectory:horizon=2", max_steps=3)
    with pytest.warns(UserWarning, match="unhealthy"):
        post.setup(net, ids, oods)
    confidences = post.inference(net, ids["test"], False)[1]
    assert np.isfinite(confidences).all()
    assert len(set(confidences)) > 1
    again = pickle.loads(pickle.dumps(post))
    assert np.array_equal(again.inference(Net(), ids["test"], False)[1], confidences)


class Predicted(Images):
    """Images that a net puts into one of ``kept`` classes, with these classes as labels."""

    def __init__(self, net: Net, kept: list[int]) -> None:
        super().__init__(400, 0)
        with torch.no_grad():
            found = net(self.data).argmax(1)
        chosen = torch.isin(found, torch.tensor(kept))
        self.data, self.found = self.data[chosen], found[chosen]

    def __getitem__(self, i: int) -> dict[str, Any]:
        return super().__getitem__(i) | {"label": int(self.found[i])}


@pytest.mark.parametrize("kept", [[0, 1, 2], [1, 2], [0, 2]])
def test_labels_number_the_logits_though_a_class_has_no_image(fake: Path, kept: list[int]) -> None:
    net, (ids, oods) = Net().eval(), loaders()
    train = Predicted(net, kept)
    post = made("she")
    post.setup(net, {**ids, "train": DataLoader(train, batch_size=7)}, oods)
    confidences = post.inference(net, ids["test"], False)[1]
    patterns = torch.zeros(3, 6, dtype=torch.float64)
    with torch.no_grad():
        features = net(train.data, return_feature=True)[1].double()
        logits, query = net(ids["test"].dataset.data, return_feature=True)
    for label in kept:
        patterns[label] = features[train.found == label].mean(0)
    assert confidences == pytest.approx((query.double() * patterns[logits.argmax(1)]).sum(1).numpy(), abs=1e-6)


def test_the_head_is_taken_only_where_it_makes_the_logits() -> None:
    net = Net().eval()
    head = backbone_of(net, SHAPE).head()
    assert head is not None
    assert torch.equal(head[0], net.fc.weight)
    try:
        torch.set_default_dtype(torch.float64)  # which is not the type of this net
        assert backbone_of(net, SHAPE).head() is not None
    finally:
        torch.set_default_dtype(torch.float32)
    net.get_fc = lambda: (np.zeros((3, 6)), np.zeros(3))  # type: ignore[method-assign]
    assert backbone_of(net, SHAPE).head() is None


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (Featureless(), r"net Featureless: expected \(logits, features\) .* does not take return_feature"),
        (Net("logits"), r"this network returns one tensor \(2, 3\) with return_feature=True: use a network of"),
        (Net("map"), r"got \(2, 3\), \(2, 6, 1\): use a network of openood.networks that does, or an AutoencoderNet"),
    ],
)
def test_a_net_without_features_is_refused(fake: Path, net: nn.Module, message: str) -> None:
    with pytest.raises(TrajOODError, match=message):
        made("knn:k=3").setup(net, *loaders())


def test_bad_loaders_and_nets_are_refused(fake: Path) -> None:
    net, (ids, oods) = AutoencoderNet(vit()), loaders()
    with pytest.raises(TrajOODError, match="knn: expected a loader of ID training images, got none"):
        made("knn").setup(net, {"test": ids["test"]}, oods)
    with pytest.raises(TrajOODError, match="expected a data set with a length, got list"):
        made("knn").setup(net, {"train": []}, oods)
    with pytest.raises(TrajOODError, match="expected one network, got a dict"):
        made("knn").setup({"backbone": net}, ids, oods)  # type: ignore[arg-type]
    with pytest.raises(TrajOODError, match="k = 10 neighbours, but only 5 training images"):
        made("knn", attractors=5).setup(net, ids, oods)


# ---------------------------------------------------------------------------------------------- search and pickles


@pytest.mark.filterwarnings("ignore:unhealthy")
def test_the_sweep_walks_the_trajectories_once(fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net, (ids, oods) = AutoencoderNet(vit()), loaders()
    post = made("trajectory", sweep={"horizon": [None, 2, 5]})
    assert post.APS_mode
    assert post.args_dict == {"horizon": [None, 2, 5]}
    post.setup(net, ids, oods)
    passes: list[int] = []
    original = Bridge._pass
    monkeypatch.setattr(Bridge, "_pass", lambda *a: passes.append(1) or original(*a))
    for horizon in (None, 2, 5, 2):
        post.set_hyperparam([horizon])
        assert post.get_hyperparam() == [horizon]
        for some in (ids["val"], oods["val"]):
            confidences = post.inference(net, some, False)[1]
            alone = made(f"trajectory:horizon={str(horizon).lower()}")
            alone.setup(net, ids, oods)
            passes_before = len(passes)
            np.testing.assert_allclose(confidences, alone.inference(net, some, False)[1], rtol=1e-9)
            del passes[passes_before:]
    assert len(passes) == 2  # one for each validation loader
    post.hyperparam_search_done = True
    post.inference(net, ids["test"], False)
    assert list(post._sets)[-1] == ("trajectory:view=tokens:horizon=2",)  # and no other is computed any more


def test_a_search_after_another_setup_scores_again(fake: Path) -> None:
    """Python may give a new loader the id of one that is gone; here one list takes the part of both."""
    net, (ids, oods) = AutoencoderNet(vit()), loaders()
    post, alone = made("knn:k=3", sweep={"k": [3, 1]}), made("knn:k=3")
    alone.setup(net, ids, oods)
    ids["val"] = []
    for seed in (100, 101):
        ids["val"][:] = loader(9, seed)
        post.setup(net, ids, oods)
        found = post.inference(net, ids["val"], False)[1]
        np.testing.assert_allclose(found, alone.inference(net, ids["val"], False)[1], rtol=1e-9)


def test_a_view_is_taken_however_the_spec_is_written() -> None:
    for spec in ("knn:view=cls", "knn: view=cls", "knn:k=5:view = cls"):
        assert config_section(spec, search=False, sweep={})["postprocessor_args"]["view"] == "cls"
    assert config_section("knn:k=5", search=False, sweep={})["postprocessor_args"]["view"] == "auto"


def test_values_that_so_few_images_do_not_allow_leave_the_sweep(fake: Path) -> None:
    net, (ids, oods) = AutoencoderNet(vit()), loaders()
    post = made("knn:k=3", sweep={"k": [1, 5, 100]})
    post.setup(net, ids, oods)
    assert post.args_dict == {"k": [1, 5]}
    with pytest.raises(TrajOODError, match="k = 50 neighbours, but only 40 training images"):
        made("knn:k=3", sweep={"k": [50]}).setup(net, ids, oods)
    with pytest.raises(TrajOODError, match=r"knn: expected a value for each of k, got \[1, 2\]"):
        post.set_hyperparam([1, 2])


@pytest.mark.filterwarnings("ignore:unhealthy")
def test_a_pickle_keeps_what_was_learnt_and_not_the_net(fake: Path) -> None:
    net, (ids, oods) = AutoencoderNet(vit()), loaders()
    for spec in ("mahalanobis", "start-distance"):
        post = made(spec)
        post.setup(net, ids, oods)
        written = pickle.dumps(post)
        again = pickle.loads(written)
        assert type(again).__name__ == "TrajOODPostprocessor"
        assert again.setup_flag
        assert again._net is None
        expected = post.inference(net, ids["test"], False)[1]
        assert np.array_equal(again.inference(AutoencoderNet(vit()), ids["test"], False)[1], expected)
        with pytest.raises(TrajOODError, match="other weights"):
            pickle.loads(written).inference(AutoencoderNet(vit(seed=1)), ids["test"], False)


# ---------------------------------------------------------------------------------------------- names and files


def test_register_fills_both_registries_and_touches_no_name_of_openood(fake: Path, tmp_path: Path) -> None:
    import openood.pipelines as pipelines  # type: ignore[import-not-found]
    from openood.evaluation_api import postprocessor as api  # type: ignore[import-not-found]
    from openood.utils.config import Config  # type: ignore[import-not-found]

    assert register() == register() == sorted(openood_names())
    assert api.postprocessors["knn"] is object
    config = Config(postprocessor=config_section("knn-paper", search=False, sweep={}))
    assert config.postprocessor.name == "traj_ood_knn_paper"
    post = pipelines.get_postprocessor(config)  # imported before register was called
    assert isinstance(post, importlib.import_module("openood.postprocessors").BasePostprocessor)
    assert pipelines.get_postprocessor(Config(postprocessor={"name": "knn"})) == "OpenOOD's own"
    api.postprocessors["traj_ood_knn"] = dict
    with pytest.raises(TrajOODError, match="name 'traj_ood_knn' is taken by dict"):
        register()


def test_register_writes_missing_configs_and_keeps_edited_ones(fake: Path, tmp_path: Path) -> None:
    edited = tmp_path / "configs" / "postprocessors" / "traj_ood_knn.yml"
    edited.parent.mkdir(parents=True)
    edited.write_text("mine")
    register(tmp_path / "configs")
    assert edited.read_text() == "mine"
    assert len(list(edited.parent.iterdir())) == len(SCORERS)


def test_configs_are_written_of_every_scorer_that_is_registered() -> None:
    folder = Path(config_root(), "postprocessors")
    assert {path.stem for path in folder.iterdir()} == set(openood_names())
    for name, scorer in openood_names().items():
        text = (folder / f"{name}.yml").read_text()
        assert text == config_text(scorer)
        settings = Settings.parse(yaml.safe_load(text))
        assert settings == Settings(scorer, settings.options, sweep=settings.sweep)
        assert not settings.search


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "knn"}, "unknown postprocessor of traj_ood 'knn'"),
        ({"postprocesor_args": {}}, "unknown key of .*did you mean 'postprocessor_args'"),
        ({"postprocessor_args": {"K": 5}}, "unknown option of scorer knn 'K'"),
        ({"learning": {"attractor": 5}}, "did you mean 'attractors'"),
        ({"learning": {"tol": "small"}}, "key learning.tol: expected float, got 'small'"),
        ({"learning": {"seed": True}}, "key learning.seed: expected int, got True"),
        ({"APS_mode": "maybe"}, "key APS_mode: expected true or false, got 'maybe'"),
        ({"postprocessor_sweep": {"k_list": []}}, r"postprocessor_sweep.k_list: expected a list of values, got \[\]"),
        ({"APS_mode": True, "postprocessor_sweep": {}}, "APS_mode asks for a search, but postprocessor_sweep is empty"),
        ({"APS_mode": True, "postprocessor_sweep": {"k_list": ["x"]}}, "option k: expected int or none, got 'x'"),
    ],
)
def test_bad_configs_are_refused(changes: dict[str, Any], message: str) -> None:
    section = config_section("knn", search=False, sweep={}) | changes
    with pytest.raises(TrajOODError, match=message):
        Settings.parse({"postprocessor": section})


# ---------------------------------------------------------------------------------------------- the evaluator


def test_evaluator_prepares_the_accuracy(fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    api = importlib.import_module("openood.evaluation_api")
    ids, oods = loaders()
    monkeypatch.setattr(api.Evaluator, "loaders", {"id": ids, "ood": oods, "csid": {"c": ids["val"]}}, raising=False)
    auto = openood.evaluator(vit(), "cifar10", "traj_ood_knn", num_workers=0)
    assert type(auto) is api.Evaluator
    assert np.isnan(auto.metrics["id_acc"])
    assert np.isnan(auto.metrics["csid_acc"])
    assert auto.preprocessor.transforms[-1].mean == list(vit().mean)  # OpenOOD's ImageNet benchmarks look there
    net = Net()
    classifier = openood.evaluator(net, "cifar10", made("knn"), fsood=True)
    assert classifier.metrics["id_acc"] is None
    assert torch.equal(classifier.scores["id_preds"], net(ids["test"].dataset.data).argmax(1))
    assert torch.equal(classifier.scores["id_labels"], torch.arange(11) % 3)
    assert len(classifier.scores["csid_preds"]["c"]) == 9
    assert classifier.preprocessor is None


def test_accuracy_of_a_model_without_classes_is_not_a_number() -> None:
    net = AutoencoderNet(vit())
    predictions = torch.cat([net(images(n)).argmax(1).cpu() for n in (3, 2)])  # what OpenOOD does
    assert predictions.tolist() == [-1] * 5
    assert np.isnan((predictions == torch.arange(5)).sum().item())
    assert {id(p) for p in net.parameters()} == {id(p) for p in net.autoencoder.module.parameters()}


@pytest.mark.parametrize("kind", ["compose", "preprocessor", "subset"])
def test_images_normalised_for_another_network_are_refused(kind: str) -> None:
    from torchvision.transforms import Compose, Normalize, ToTensor

    def data(mean: float) -> Any:
        transform: Any = Compose([ToTensor(), Normalize((mean,), (0.5,))])
        if kind == "preprocessor":
            return SimpleNamespace(dataset=SimpleNamespace(preprocessor=SimpleNamespace(transform=transform)))
        made = SimpleNamespace(transform=transform)
        return SimpleNamespace(dataset=SimpleNamespace(dataset=made) if kind == "subset" else made)

    check_normalisation(data(0.5), vit())
    check_normalisation(loader(2, 0), vit())  # one that does not tell
    with pytest.raises(TrajOODError, match=r"mean \[0\.5\] and std \[0\.5\], got a loader with mean \[0\.1307\]"):
        check_normalisation(data(0.1307), vit())


def test_preprocessor_is_the_autoencoders_transform(tmp_path: Path) -> None:
    from PIL import Image

    write_images(tmp_path, 1, seed=0, mode="RGB", size=20)
    image = Image.open(tmp_path / "000.png")
    model = vit()
    assert torch.equal(openood.preprocessor(model)(image), model.transform(image))
    assert openood.preprocessor(AutoencoderNet(model)).transforms[-1].std == list(model.std)


# ---------------------------------------------------------------------------------------------- without OpenOOD


def test_import_needs_no_openood() -> None:
    code = "import sys, traj_ood.openood; print('openood' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict.fromkeys(FAKE), "openood is not installed, and it is not on PyPI: pip install git[+]https://github"),
        ({k: None for k in FAKE if k.startswith("evaluation_api")}, "got a version without openood.evaluation_api"),
        (
            {"evaluation_api/postprocessor": "get_postprocessor = 0"},
            "without openood.evaluation_api.postprocessor.post",
        ),
        (
            {"evaluation_api/evaluator": "class Evaluator:\n    def __init__(self, net, id_name): ...\n"},
            "without argument data_root of openood.evaluation_api.Evaluator: pip install",
        ),
        ({"evaluation_api/evaluator": "import not_there"}, "needs 'not_there', which is not: install it"),
        ({"evaluation_api/evaluator": "1 / 0"}, r"importing openood.evaluation_api fails \(division by zero\): repair"),
    ],
)
def test_a_missing_or_older_openood_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, str | None], message: str
) -> None:
    write_fake(tmp_path, **changes)
    forget()
    if (tmp_path / "openood").is_dir():
        monkeypatch.syspath_prepend(tmp_path)
    else:
        monkeypatch.setitem(sys.modules, "openood", None)  # hides an installed one
        monkeypatch.setattr("importlib.import_module", _absent)
    with pytest.raises(TrajOODError, match=message):
        register()
    forget()


def _absent(name: str) -> ModuleType:
    raise ModuleNotFoundError("No module named 'openood'", name="openood")


@pytest.mark.slow
def test_scripts_run_with_the_names_known(fake: Path) -> None:
    script = fake / "scripts" / "eval.py"
    script.parent.mkdir()
    script.write_text(
        "import sys\nfrom openood.evaluation_api.postprocessor import postprocessors\n"
        "print(sys.argv[1:], 'traj_ood_knn' in postprocessors, __name__)\n"
    )
    command = [sys.executable, "-m", "traj_ood.openood"]
    done = subprocess.run([*command, str(script), "--x"], capture_output=True, text=True)
    assert done.stdout.strip() == "['--x'] True __main__", done.stderr
    assert (fake / "configs" / "postprocessors" / "traj_ood_knn.yml").is_file()
    with pytest.raises(TrajOODError, match=r"usage: python -m traj_ood\.openood SCRIPT"):
        run_script(["absent.py"])


# ---------------------------------------------------------------------------------------------- the real OpenOOD

REAL = importlib.util.find_spec("openood") is not None
needs_openood = pytest.mark.skipif(not REAL, reason="openood is not installed (it is not on PyPI)")


@pytest.fixture
def agreement() -> ModuleType:
    """benchmarks/openood_agreement.py, after its stand-ins for what OpenOOD imports and never calls here."""
    path = Path(__file__).parents[2] / "benchmarks" / "openood_agreement.py"
    spec = importlib.util.spec_from_file_location("openood_agreement", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.stand_in()
    return module


def folders(root: Path) -> tuple[Path, Path]:
    for seed, part in enumerate(("train", "test")):
        for label in ("cat", "dog"):
            write_images(root / "cifar10" / part / label, 20, seed, mode="RGB", size=32)
            for path in (root / "cifar10" / part / label).iterdir():
                path.rename(path.with_name(f"{label}-{path.name}"))
    write_images(root / "other", 45, seed=9, mode="RGB", size=40)
    return root / "cifar10", root / "other"


@needs_openood
def test_the_real_evaluator_agrees(
    agreement: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cifar10, other = folders(tmp_path)
    out = tmp_path / "record.json"
    numbers = ["--train", "20", "--attractors", "15", "--per-set", "6", "--max-steps", "3"]
    monkeypatch.setattr(
        sys, "argv", ["x", "--cifar10", str(cifar10), "--images", str(other), *numbers, "--out", str(out)]
    )
    agreement.main()
    record = json.loads(out.read_text())
    assert record["agree"]
    assert set(record["scorers"]) == {"trajectory", "knn", "mahalanobis"}
    assert "cifar100" in record["scorers"]["knn"]["sets"]
    assert str(tmp_path) not in out.read_text()


@needs_openood
def test_the_real_evaluator_takes_a_classifier_searches_and_pickles(agreement: ModuleType, tmp_path: Path) -> None:
    from openood.networks import ResNet18_32x32

    cifar10, other = folders(tmp_path)
    agreement.lay_out(tmp_path / "data", cifar10, other, train=34, per_set=5, seed=0)
    torch.manual_seed(0)
    net = ResNet18_32x32(num_classes=2)
    post = openood.postprocessor("knn:k=3", sweep={"k": [1, 5, 100]})
    run = openood.evaluator(net, "cifar10", post, data_root=tmp_path / "data", batch_size=8, num_workers=0)
    assert run.postprocessor.hyperparam_search_done
    assert run.postprocessor.get_hyperparam() in ([1], [5])
    table = run.eval_ood(progress=False)
    accuracy = (run.scores["id_preds"] == run.scores["id_labels"]).double().mean().item()
    assert table["ACC"].tolist() == pytest.approx([100 * accuracy] * 8)
    again = pickle.loads(pickle.dumps(run.postprocessor))
    assert np.array_equal(
        again.inference(net, run.dataloader_dict["id"]["test"], False)[1], run.scores["id"]["test"][1]
    )
    pickle.dumps(run.scores)


@needs_openood
def test_the_real_pipelines_know_the_names(agreement: ModuleType) -> None:
    register()
    from openood.pipelines import test_ood_pipeline
    from openood.utils import Config

    path = Path(config_root(), "postprocessors", "traj_ood_vim.yml")
    post = test_ood_pipeline.get_postprocessor(Config(str(path)))
    assert isinstance(post, Bridge)
    assert post.settings.scorer == "vim"
    assert type(test_ood_pipeline.get_postprocessor(Config(postprocessor={"name": "msp"}))).__name__ != "Bridge"
