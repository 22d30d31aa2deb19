"""Exported detectors: the module, the graph in two runtimes, what a file says of itself, what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, Literal

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from torch import Tensor

from traj_ood import Detector, TrajOODError
from traj_ood.autoencoders import Autoencoder, CallableAutoencoder, SurrogateAutoencoder, SurrogateNetwork
from traj_ood.backbones import CallableBackbone, Features
from traj_ood.data.preprocessing import Normalised, Preprocessing
from traj_ood.export import (
    ALLOWED,
    as_module,
    export_detector,
    open_file,
    relative_difference,
)
from traj_ood.graph import reference
from traj_ood.graph.dense_index import DenseIndex
from traj_ood.scorers import SCORERS, Evidence, FeatureScorer, Needs, Scorer, default_suite, register
from traj_ood.scorers.scorer_set import ScorerSet

REFUSED = {"isolation-forest", "steps", "scoped", "reconstruction:masked=true"}


def surrogate(seed: int = 0) -> SurrogateAutoencoder:
    """A classifier of (1, 8, 8) images with 12 features, and a surrogate of them."""
    torch.manual_seed(seed)
    body, head = (
        torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 12), torch.nn.Tanh()),
        torch.nn.Linear(12, 5),
    )
    backbone = CallableBackbone(
        lambda x: Features(body(x), head(body(x))),
        (1, 8, 8),
        12,
        classes=5,
        module=torch.nn.ModuleList([body, head]),
        head=(head.weight.detach(), head.bias.detach()),
    )
    return SurrogateAutoencoder(backbone, SurrogateNetwork(12, hidden=[16], bottleneck=6))


MODELS: dict[str, Any] = {"vit": tiny.vit, "conv": tiny.conv, "surrogate": surrogate}


def fitted(model: Autoencoder, scorer: str, **settings: Any) -> Any:
    """What of a detector is exported; :class:`Detector` itself takes longer to make."""
    scorers = ScorerSet(model, [scorer], **({"max_steps": 8} | settings))
    scorers.fit(Normalised(tiny.images(24, model.input_shape)), labels=torch.arange(24) % 3)
    return SimpleNamespace(autoencoder=model, scorers=scorers, calibration=None)


@pytest.fixture
def own_scorers() -> Iterator[None]:
    """Scorers that the test registers are forgotten after it."""
    before = dict(SCORERS)
    yield
    SCORERS.clear()
    SCORERS.update(before)


def exploding(factor: float) -> CallableAutoencoder:
    return CallableAutoencoder(lambda x: x.flatten(1), lambda z: (factor * z).reshape(-1, 1, 2, 2), (1, 2, 2))


def photographs(model: Autoencoder, count: int = 7) -> tuple[Tensor, Normalised]:
    """Crops of a real photograph as pixels (B, C, H, W) in [0, 1] and in the model's units, independently made."""
    path = Path(pytest.importorskip("skimage").__file__).parent / "data" / "astronaut.png"
    channels, height, width = model.input_shape
    with Image.open(path) as file:
        whole = file.convert("L" if channels == 1 else "RGB").copy()
    crops = [whole.crop((50 * i, 40 * i, 50 * i + 90, 40 * i + 90)) for i in range(count)]
    pixels = [np.asarray(c.resize((width, height), Image.Resampling.BILINEAR), dtype=np.float32) / 255 for c in crops]
    stacked = torch.from_numpy(np.stack(pixels)).reshape(count, height, width, channels).permute(0, 3, 1, 2)
    return stacked.contiguous(), Normalised(torch.stack([model.transform(c) for c in crops]))


def in_python(detector: Any, steps: int, units: Normalised) -> Tensor:
    (scores,) = reference(detector.scorers, steps).score(units).scores.values()
    return scores


# ---------------------------------------------------------------------- the module


@pytest.mark.parametrize("name", [pytest.param("vit", marks=pytest.mark.slow), "conv", "surrogate"])
def test_the_module_says_what_the_detector_says_for_every_scorer_of_the_suite(name: str) -> None:
    model = MODELS[name]()
    pixels, units = photographs(model)
    suite = [*default_suite(model), "mahalanobis:classes=true", "early-path:steps=1+4", "path-energy:horizon=none"]
    for scorer in suite:
        if scorer.split(":view")[0] in REFUSED:
            continue
        detector = fitted(model, scorer)
        whole_path = detector.scorers.needs.steps > detector.scorers.max_steps
        module = as_module(detector, 5 if whole_path else None)
        got = module(torch.cat([pixels, pixels[:5]]))[:7]  # 12 rows: see traj_ood.dynamics.iterate.rows_per_call
        assert got.dtype == torch.float64, scorer
        assert got.shape == (7,), scorer
        assert relative_difference(got, in_python(detector, module.steps, units)) < 2e-5, scorer


def test_a_sample_that_settles_or_leaves_the_finite_numbers_ends_there_as_in_the_engine() -> None:
    model = tiny.toy()
    detector = fitted(model, "trajectory:horizon=30", max_steps=40)
    pixels = torch.tensor([[0.9, 0.1, 0.2, 0.7], [1.0, 1.0, 1.0, 1.0], [0.0, 0.3, 0.0, 0.0]]).view(3, 1, 2, 2)
    path = detector.scorers.score(pixels).evidence.path()
    assert path.converged.tolist() == [True, True, True]
    assert int(path.steps.max()) < 30  # so that the module's later steps must be masked
    torch.testing.assert_close(as_module(detector)(pixels), in_python(detector, 30, pixels), rtol=1e-12, atol=0)

    for factor, at_once in ((1e6, False), (1e30, True)):
        detector = fitted(exploding(factor), "path-energy")
        expected = in_python(detector, 8, pixels)
        assert expected.isnan().tolist() == [at_once] * 3  # no step at all, or those before the numbers end
        torch.testing.assert_close(as_module(detector)(pixels), expected.nan_to_num(torch.inf), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    "scorer",
    ["field", "early-path:steps=1+4", "early-trajectory:reference=features:steps=0+4", "alignment:target=mean"],
)
def test_a_sample_that_becomes_infinite_has_no_later_points_as_in_the_engine(scorer: str) -> None:
    def decode(z: Tensor) -> Tensor:  # f(z) = 1.3 z up to a length of 1.7, beyond which nothing is finite
        return torch.where(z.norm(dim=1, keepdim=True) > 1.7, torch.inf, 1.3 * z).reshape(-1, 1, 2, 2)

    model = CallableAutoencoder(lambda x: x.flatten(1), decode, (1, 2, 2))
    scorers = ScorerSet(model, [scorer], max_steps=8)
    scorers.fit(Normalised(0.3 * tiny.images(24, (1, 2, 2)).sigmoid()))
    pixels = torch.tensor([0.2, 0.6, 0.9]).view(3, 1, 1, 1) + torch.eye(2).view(1, 1, 2, 2) / 20
    detector = SimpleNamespace(autoencoder=model, scorers=scorers, calibration=None)
    module = as_module(detector)
    expected = in_python(detector, module.steps, Normalised(pixels))
    assert expected.isfinite().tolist() == [True, "4" not in scorer, False]  # the second one's z3 is infinite
    torch.testing.assert_close(module(pixels), expected.nan_to_num(torch.inf), rtol=1e-9, atol=0)


def test_the_callers_default_type_changes_no_module() -> None:
    model = exploding(0.9)
    detector, pixels = fitted(model, "field"), tiny.images(5, (1, 2, 2)).sigmoid()
    expected = as_module(detector)(pixels)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(as_module(detector)(pixels), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_what_is_no_image_has_no_score_and_does_not_touch_its_batch_mates() -> None:
    detector = fitted(tiny.conv(), "knn")
    module = as_module(detector)
    pixels, _ = photographs(detector.autoencoder)
    spoilt = pixels.clone()
    spoilt[1, 0, 3, 3] = torch.nan
    spoilt[2] = 255 * pixels[2]
    spoilt[3, 0, 0, 0] = -0.01
    scores = module(spoilt)
    assert scores.isnan().tolist() == [False, True, True, True, False, False, False]
    assert torch.equal(scores[[0, 4, 5, 6]], module(pixels)[[0, 4, 5, 6]])
    for wrong in (pixels[0, 0], (255 * pixels).long(), pixels[:, :, :4]):
        with pytest.raises(
            TrajOODError, match=r"conv: expected float32 pixels in \[0, 1\] of shape \(B, 1, 8, 8\), got"
        ):
            module(wrong)


def test_the_module_is_one_for_a_pipeline() -> None:
    detector = fitted(tiny.vit(), "trajectory:horizon=2")
    module = as_module(detector)
    pixels, _ = photographs(detector.autoencoder)
    scores = module(pixels)
    assert not scores.requires_grad
    assert not module.train().training
    assert not any(part.training for part in module.modules())
    state = module.state_dict()
    assert any(torch.equal(t, detector.scorers.dictionary.usable().flatten(1)) for t in state.values())
    assert torch.equal(as_module(fitted(tiny.vit(), "trajectory:horizon=2")).to("cpu")(pixels), scores)
    statistics = as_module(fitted(tiny.vit(), "mahalanobis")).half().statistics.all()
    assert {t.dtype for t in statistics.values()} == {torch.float64}
    assert as_module(fitted(tiny.conv(), "field"), 7).steps == 1  # it reads no more
    for scorer in ("trajectory:horizon=2", "knn", "reconstruction"):
        nothing = as_module(fitted(tiny.conv(), scorer))(torch.empty(0, 1, 8, 8))
        assert (nothing.shape, nothing.dtype) == ((0,), torch.float64)


def test_neighbours_are_exact_next_to_a_point_far_from_the_origin() -> None:
    draw = torch.Generator().manual_seed(0)
    points = 400 / 16 * torch.randn(50, 256, generator=draw)
    queries = points[:8] + 1e-3 / 16 * torch.randn(8, 256, generator=draw)
    true = (queries[:, None].double() - points.double()).norm(dim=2)
    index = DenseIndex(points)
    found = index.nearest(queries)
    assert found.indices[:, 0].tolist() == list(range(8))
    torch.testing.assert_close(found.distances[:, 0], true.min(dim=1).values, rtol=1e-12, atol=0)
    torch.testing.assert_close(index.search(queries, 50).distances, true.sort(dim=1).values, rtol=1e-9, atol=0)


# ---------------------------------------------------------------------- the two files


def onnx_scores(path: Path, pixels: Tensor) -> Tensor:
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs traj_ood[export]")
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert [(i.name, i.type, i.shape[1:]) for i in session.get_inputs()] == [
        ("images", "tensor(float)", list(pixels.shape[1:]))
    ]
    assert isinstance(session.get_inputs()[0].shape[0], str)  # any number of images
    return torch.from_numpy(session.run(["scores"], {"images": pixels.numpy()})[0])


def counted_rows(model: Any, monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """The numbers of rows with which the encoder is called from now on, outside of tracing."""
    rows: set[int] = set()
    encode = model.encode_batch

    def counted(images: Tensor) -> Tensor:
        if type(images.shape[0]) is int:
            rows.add(images.shape[0])
        return encode(images)

    monkeypatch.setattr(model, "encode_batch", counted)
    return rows


def torch_scores(path: Path, pixels: Tensor) -> Tensor:
    with open(path, "rb") as file:
        return torch.export.load(file).module()(pixels)


@pytest.mark.parametrize(
    ("form", "name", "scorer", "steps"),
    [
        ("onnx", "vit", "trajectory", 3),  # a loop over f, whose network has constants of its own
        pytest.param("torch", "conv", "field", None, marks=pytest.mark.slow),
        pytest.param("onnx", "surrogate", "vim", None, marks=pytest.mark.slow),
        pytest.param("torch", "surrogate", "signature:horizon=3", None, marks=pytest.mark.slow),
        pytest.param("onnx", "conv", "early-path:steps=1+3", None, marks=pytest.mark.slow),
    ],
)
def test_a_runtime_agrees_with_the_detector(
    form: Any, name: str, scorer: str, steps: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if form == "onnx":
        pytest.importorskip("onnxscript", reason="needs traj_ood[export]")
        if torch.__version__ < "2.6":
            pytest.skip("ONNX needs torch 2.6")
    model = MODELS[name]()
    detector = fitted(model, scorer)
    pixels, units = photographs(model)
    path = tmp_path / "detector"
    rows = counted_rows(model, monkeypatch)
    made = export_detector(detector, path, form, steps=steps, images=units)
    if name != "surrogate":  # compared in whole chunks, timed as Detector.score calls the model
        assert {model.chunk, 1} <= rows
    assert made.size == path.stat().st_size
    assert [p.name for p in tmp_path.iterdir()] == ["detector"]  # one file
    expected = in_python(detector, made.metadata["steps"], units)
    run = onnx_scores if form == "onnx" else torch_scores
    for count in (7, 1, 2):
        got = run(path, pixels[:count])
        assert got.dtype == torch.float64
        torch.testing.assert_close(got, expected[:count], rtol=ALLOWED, atol=0)
    assert made.agreement.images == 7
    assert made.agreement.difference <= ALLOWED
    assert min(*made.agreement.one, *made.agreement.many) > 0
    assert run(path, torch.cat([pixels[:1], 255 * pixels[:1]])).isnan().tolist() == [False, True]
    assert open_file(form, path)[1] == json.loads(json.dumps(made.metadata))
    assert made.metadata["scorer"]["fitted"] == scorer


def test_a_path_of_its_own_length_is_exported_at_the_steps_asked_for() -> None:
    detector = fitted(tiny.conv(), "trajectory", max_steps=20)
    pixels, units = photographs(detector.autoencoder)
    other = ScorerSet(detector.autoencoder, ["trajectory:horizon=4"], max_steps=20)
    other.fit(Normalised(tiny.images(24, detector.autoencoder.input_shape)))
    module = as_module(detector, 4)
    assert module.scorer.label == "trajectory:horizon=4"
    expected = other.score(units).scores["trajectory:horizon=4"]
    torch.testing.assert_close(module(pixels), expected, rtol=1e-4, atol=1e-6)


def test_a_scorer_of_ones_own_has_another_form_in_a_graph(own_scorers: None, tmp_path: Path) -> None:
    @register
    @dataclass
    class Power(FeatureScorer):
        name: ClassVar[str] = "power"
        summary: ClassVar[str] = "for a test"
        exponent: int | None = None

        def learn(self, train: Evidence) -> dict[str, Tensor]:
            return {"exponent": torch.tensor(3)}

        def score(self, evidence: Evidence) -> Tensor:
            exponent = int(self.state["exponent"]) if self.exponent is None else self.exponent
            return self.features(evidence).cpu().double().abs().amax(dim=1) ** exponent

        def graph_form(self, steps: int) -> Scorer:
            return Power(self.view, int(self.state["exponent"])).with_state({})

    detector = fitted(tiny.conv(), "power")
    pixels, units = photographs(detector.autoencoder)
    made = export_detector(detector, tmp_path / "x", "torch", images=units)
    expected = detector.scorers.score(units).scores["power"]
    torch.testing.assert_close(torch_scores(tmp_path / "x", pixels), expected, rtol=ALLOWED, atol=0)
    assert made.metadata["scorer"]["label"] == "power:exponent=3"
    assert made.metadata["scorer"]["is_fitted"] is True


def test_disagreement_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "detector.pt2"
    path.write_bytes(b"earlier")
    monkeypatch.setattr("traj_ood.export.file.ALLOWED", -1.0)
    detector = fitted(tiny.conv(), "first-residual")
    with pytest.raises(TrajOODError, match="so nothing was written: this score amplifies rounding"):
        export_detector(detector, path, "torch", images=photographs(detector.autoencoder)[1])
    assert path.read_bytes() == b"earlier"
    assert [p.name for p in tmp_path.iterdir()] == ["detector.pt2"]


def test_the_threshold_is_in_the_file_where_it_is_one_of_this_score() -> None:
    from traj_ood.export import describe

    model = tiny.conv()
    detector = Detector.fit(model, Normalised(tiny.images(30, model.input_shape)), "field")
    assert describe(detector, detector.as_module())["calibration"] is None
    detector.calibrate(Normalised(tiny.images(40, model.input_shape, seed=9)), tpr=0.9)
    known = describe(detector, detector.as_module())["calibration"]
    assert known["threshold"] == detector.calibration.threshold
    assert known["images"] == 40
    assert known["quantiles"][0] == float(detector.calibration.scores[0])
    assert known["quantiles"][-1] == float(detector.calibration.scores[-1])
    shorter = SimpleNamespace(**{**vars(fitted(model, "early-path:steps=1+4")), "calibration": detector.calibration})
    assert describe(shorter, as_module(shorter))["calibration"] is not None
    assert describe(shorter, as_module(shorter, 2))["calibration"] is None
    own_length = SimpleNamespace(**{**vars(fitted(model, "trajectory")), "calibration": detector.calibration})
    assert describe(own_length, as_module(own_length, 8))["calibration"] is None


# ---------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("scorer", "steps", "message"),
    [
        ("isolation-forest", None, "scorer isolation-forest cannot be exported: its trees are descended until"),
        ("steps", 4, "scorer steps cannot be exported: it counts the steps until convergence"),
        ("reconstruction:masked=true", None, "cannot be exported: it encodes each image under four masks"),
        ("trajectory", None, "scorer trajectory iterates until convergence, .* give one, such as --steps 16"),
        ("trajectory:horizon=4", 0, "expected at least 1 step, got 0"),
    ],
)
def test_refusals_say_why(scorer: str, steps: int | None, message: str) -> None:
    detector = fitted(tiny.vit(), scorer)
    detector.scorers.max_steps = 10**7
    with pytest.raises(TrajOODError, match=message) as caught:
        as_module(detector, steps)
    assert "\n" not in str(caught.value)


def test_a_scorer_of_ones_own_says_why_it_cannot_be_exported(own_scorers: None) -> None:
    @register
    @dataclass
    class Sorted(FeatureScorer):
        name: ClassVar[str] = "sorted"
        summary: ClassVar[str] = "for a test"
        graph_obstacle: ClassVar[str] = "it sorts until nothing moves"
        asks: Literal["nothing", "divergence", "masked"] = "nothing"

        def needs(self) -> Needs:
            masked: frozenset[Any] = frozenset({"masked"} if self.asks == "masked" else ())
            return super().needs() | Needs(divergence=self.asks == "divergence", reconstruction=masked)

        def score(self, evidence: Evidence) -> Tensor:
            return self.features(evidence).double().amax(dim=1)

        def graph_form(self, steps: int) -> Any:
            return "a graph"

    for options, reason in (
        ("", "it sorts until nothing moves"),
        (":asks=divergence", "it evaluates f at points next to the path"),
        (":asks=masked", "it encodes each image under four masks"),
    ):
        with pytest.raises(TrajOODError, match=f"export: scorer sorted{options} cannot be exported: {reason}"):
            as_module(fitted(tiny.vit(), f"sorted{options}"))
    Sorted.graph_obstacle = ""
    with pytest.raises(TrajOODError, match=r"expected graph_form\(\) to return a fitted scorer, got 'a graph'"):
        as_module(fitted(tiny.vit(), "sorted"))


def test_a_set_of_several_scorers_or_an_unfitted_one_is_no_detector(tmp_path: Path) -> None:
    model = tiny.conv()
    several = SimpleNamespace(autoencoder=model, scorers=ScorerSet(model, ["knn", "field"]), calibration=None)
    with pytest.raises(TrajOODError, match="expected a detector with one scorer, got knn, field"):
        as_module(several)
    empty = SimpleNamespace(autoencoder=model, scorers=ScorerSet(model, ["trajectory:horizon=2"]), calibration=None)
    with pytest.raises(TrajOODError, match="not fitted: call fit"):
        as_module(empty)
    with pytest.raises(TrajOODError, match=r"unknown export format 'onx': did you mean 'onnx'\?"):
        export_detector(several, tmp_path / "x", "onx")  # type: ignore[arg-type]


def test_the_ending_of_another_format_is_refused(tmp_path: Path) -> None:
    detector = fitted(tiny.conv(), "first-residual")
    for name, form, text in (
        (
            "x.pt",
            "onnx",
            r"x\.pt: expected a name that ends in \.onnx for format onnx, got \.pt, .*: name it x\.onnx, or",
        ),
        ("x.ONNX", "torch", r"got \.ONNX, the ending of format onnx: name it x\.pt2, or choose --format onnx"),
    ):
        with pytest.raises(TrajOODError, match=text):
            export_detector(detector, tmp_path / name, form)  # type: ignore[arg-type]
    assert not any(tmp_path.iterdir())


def test_images_to_compare_on_are_pixels(tmp_path: Path) -> None:
    detector = fitted(tiny.conv(), "first-residual")
    with pytest.raises(TrajOODError, match=r"expected float pixels in \[0, 1\], got values from 0 to 255"):
        export_detector(detector, tmp_path / "x", "torch", images=torch.linspace(0, 255, 128).reshape(2, 1, 8, 8))
    assert not list(tmp_path.iterdir())


def test_missing_libraries_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    detector = fitted(tiny.conv(), "first-residual")
    with pytest.raises(TrajOODError, match=r"needs onnx and onnxscript, .* pip install 'traj_ood\[export\]'"):
        export_detector(detector, tmp_path / "x", "onnx", images=photographs(detector.autoencoder)[1])
    assert not list(tmp_path.iterdir())


def test_an_older_torch_holds_few_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("traj_ood.export.formats.can_scan", lambda: False)
    detector = fitted(tiny.conv(), "path-energy:horizon=none", max_steps=50)
    images = photographs(detector.autoencoder)[1]
    with pytest.raises(TrajOODError, match=r"at most 32 steps with torch .*, got 40: use fewer, or torch >= 2\.9"):
        export_detector(detector, tmp_path / "x", "torch", steps=40, images=images)
    assert export_detector(detector, tmp_path / "x", "torch", steps=2, images=images).metadata["steps"] == 2


def test_a_network_that_looks_at_its_data_is_refused(tmp_path: Path) -> None:
    def encode(images: Tensor) -> Tensor:
        return images.flatten(1) if float(images.sum()) > 0 else -images.flatten(1)

    model = CallableAutoencoder(encode, lambda z: 0.5 * z.reshape(-1, 1, 2, 2), (1, 2, 2), name="mine")
    with pytest.raises(TrajOODError, match="scorer first-residual cannot be recorded as a graph of any batch size"):
        export_detector(fitted(model, "first-residual"), tmp_path / "x", "torch", images=torch.rand(2, 1, 2, 2))


# ---------------------------------------------------------------------- preprocessing


def test_uint8_pixels_and_one_image_are_taken_as_well() -> None:
    module = as_module(fitted(tiny.conv(), "knn"))
    pixels = torch.randint(0, 256, (5, 1, 8, 8), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    scores = module(pixels.float() / 255)
    torch.testing.assert_close(module(pixels), scores, rtol=1e-12, atol=0)
    torch.testing.assert_close(module(pixels.double() / 255), scores, rtol=1e-6, atol=0)
    torch.testing.assert_close(module(pixels[3]), scores[3:4], rtol=1e-5, atol=1e-6)


def test_a_file_says_how_pictures_become_its_pixels(tmp_path: Path) -> None:
    model = CallableAutoencoder(
        lambda x: x.flatten(1),
        lambda z: 0.5 * z.reshape(-1, 3, 32, 32),
        (3, 32, 32),
        preprocessing=Preprocessing(
            (3, 32, 32), (127.5,) * 3, (51.0,) * 3, "crop", "bicubic", short_side=36, offset="floor", rescale=1.0
        ),
    )
    pixels, _ = photographs(model)
    found = export_detector(fitted(model, "first-residual"), tmp_path / "x", "torch", images=pixels).metadata
    said = found["preprocessing"]
    assert {k: said[k] for k in ("mode", "resize", "filter", "short_side", "offset")} == {
        "mode": "RGB",
        "resize": "crop",
        "filter": "bicubic",
        "short_side": 36,
        "offset": "floor",
    }
    np.testing.assert_allclose([*said["mean"], *said["std"]], [0.5] * 3 + [0.2] * 3, rtol=1e-12)


def test_a_transform_of_ones_own_code_cannot_be_taken_over() -> None:
    shape = (1, 2, 2)
    model = CallableAutoencoder(
        lambda x: x.flatten(1), lambda z: 0.5 * z.reshape(-1, *shape), shape, transform=lambda i: torch.zeros(shape)
    )
    with pytest.raises(TrajOODError, match=r"got a transform in user code: make custom with preprocessing="):
        as_module(fitted(model, "first-residual"))


def test_relative_difference() -> None:
    expected = torch.tensor([1.0, 10.0, 1e-9, torch.inf], dtype=torch.float64)
    got = torch.tensor([1.0, 10.1, 2e-9, torch.inf], dtype=torch.float64)
    assert relative_difference(got, expected) == pytest.approx(0.01)  # 1e-9 is not held to nine digits
    assert relative_difference(expected[:3], expected[[0, 1, 3]]) == float("inf")
    assert relative_difference(torch.tensor([torch.nan]), torch.tensor([1.0])) == float("inf")


# ---------------------------------------------------------------------- the command


@pytest.mark.slow
def test_the_command_prints_the_check_the_size_and_the_latency(tmp_path: Path) -> None:
    from click.testing import CliRunner

    from traj_ood.cli import main

    model = tiny.conv()
    for scorer in ("field", "isolation-forest", "trajectory"):
        detector = Detector.fit(model, Normalised(tiny.images(30, model.input_shape)), scorer)
        detector.calibrate(Normalised(tiny.images(40, model.input_shape, seed=9))).save(
            tmp_path / ("path" if scorer == "trajectory" else scorer)
        )
    tiny.write_images(tmp_path / "images", 3, seed=0)
    out = tmp_path / "field.pt2"
    command = ["export", str(tmp_path / "field"), "--format", "torch", "--out", str(out), "--images"]
    done = CliRunner().invoke(main, [*command, str(tmp_path / "images")])
    assert done.exit_code == 0, done.output
    assert (
        "field on conv, 1 evaluation(s) of f: images (B, 1, 8, 8) float32 in [0, 1] -> scores (B,) float64"
        in done.output
    )
    assert "Agrees with the detector on 3 images: largest relative difference" in done.output
    assert "ms for one image" in done.output
    assert f"Written to {out}, {out.stat().st_size / 1e6:.1f} MB" in done.output
    inside = tmp_path / "field" / "field.pt2"
    done = CliRunner().invoke(main, [*command[:5], str(inside), "--images", str(tmp_path / "images")])
    assert (done.exit_code, inside.exists()) == (2, False)
    assert f"expected a place outside of any detector, but {tmp_path / 'field'} is one" in done.stderr
    done = CliRunner().invoke(main, [*command, str(tmp_path / "images")])
    assert (done.exit_code, done.stdout) == (2, "")
    assert f"{out}: exists already; choose another --out, or replace it with --overwrite" in done.stderr
    assert CliRunner().invoke(main, [*command, str(tmp_path / "images"), "--overwrite"]).exit_code == 0
    path = ["export", str(tmp_path / "path"), "--format", "torch", "--out", str(tmp_path / "path.pt2"), "--steps"]
    done = CliRunner().invoke(main, [*path, "2", "--images", str(tmp_path / "images")])
    assert done.exit_code == 0, done.output
    said = "Agrees with trajectory:horizon=2 in Python, which is not the detector's own trajectory, on 3 images"
    assert said in done.output
    done = CliRunner().invoke(main, [*path[:-2], str(tmp_path / "more.pt2"), "--steps", "501"])
    assert "export: expected at most 500 steps, the detector's own limit, got 501" in done.stderr
    done = CliRunner().invoke(main, ["export", str(tmp_path / "isolation-forest"), "--format", "torch", "--out", "x"])
    assert done.exit_code == 2
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("traj-ood: error: export: scorer isolation-forest cannot be exported")
