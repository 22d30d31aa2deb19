"""A model is a fixed function while traj_ood uses it, and its owner finds everything as it was."""

from __future__ import annotations

import contextlib
import copy
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

import traj_ood
from traj_ood import CallableAutoencoder, Detector, NeighborIndex, ScorerSet, TrajOODError, iterate
from traj_ood.autoencoders import SurrogateAutoencoder, SurrogateNetwork
from traj_ood.backbones import CallableBackbone, Features
from traj_ood.data.preprocessing import Normalised
from traj_ood.dynamics.device import set_tf32, standard_settings
from traj_ood.dynamics.fixed_function import FixedFunction, KnownWeights
from traj_ood.dynamics.jacobian import spectral_radii
from traj_ood.training.surrogate import SurrogateRecipe, fit_surrogate

SHAPE = (1, 8, 8)


class Net(nn.Module):
    """With everything that training mode changes."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.down = nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.BatchNorm1d(6), nn.Dropout(0.3), nn.Tanh())
            self.up = nn.Linear(6, 64)

    def encode(self, images: Tensor) -> Tensor:
        return self.down(images)

    def decode(self, latents: Tensor) -> Tensor:
        return self.up(latents).view(-1, *SHAPE)


def wrapped(net: nn.Module, **options: Any) -> CallableAutoencoder:
    return CallableAutoencoder.from_module(net, SHAPE, **options)


def by_hand(net: nn.Module, images: Tensor) -> Tensor:
    """The formula of Net.encode in float64, from its weights."""
    linear, norm = net.down[1].double(), net.down[2].double()  # type: ignore[index]
    hidden = images.double().flatten(1) @ linear.weight.T + linear.bias
    scaled = (hidden - norm.running_mean) / (norm.running_var + norm.eps).sqrt() * norm.weight + norm.bias
    return scaled.tanh().detach()


def flags(net: nn.Module) -> list[bool]:
    return [part.training for part in net.modules()]


# ---------------------------------------------------------------------------------------------- the caller's settings


def settings() -> tuple[Any, ...]:
    return (
        torch.get_default_dtype(),
        torch.empty(0).device,  # torch 2.4 does not tell it once it was set to None
        torch.is_autocast_enabled("cpu"),
        torch.get_float32_matmul_precision(),
        torch.backends.cudnn.allow_tf32,
        torch.is_grad_enabled(),
    )


def test_standard_settings_and_back() -> None:
    began = settings()
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            before = settings()
            with contextlib.suppress(KeyError), standard_settings(), standard_settings():
                assert settings()[:4] == (torch.float32, torch.device("cpu"), False, "highest")
                assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
                raise KeyError
            assert settings() == before
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
        torch.set_float32_matmul_precision("highest")
    assert settings() == began


def test_the_packages_own_tf32_outlives_the_callers_setting() -> None:
    kept = torch.backends.cudnn.allow_tf32
    set_tf32(True)
    try:
        torch.set_float32_matmul_precision("highest")
        with standard_settings():
            assert torch.get_float32_matmul_precision() == "high"
        assert torch.get_float32_matmul_precision() == "highest"
    finally:
        set_tf32(False)
        set_tf32_of_cudnn(kept)


def set_tf32_of_cudnn(allowed: bool) -> None:
    torch.backends.cudnn.allow_tf32 = allowed
    for operation in (getattr(torch.backends.cudnn, name, None) for name in ("conv", "rnn")):
        if operation is not None:
            operation.fp32_precision = "tf32" if allowed else "ieee"


@pytest.mark.parametrize("surroundings", ["train", "autocast", "float64", "precision"])
def test_nothing_around_a_call_reaches_the_model(surroundings: str) -> None:
    net = Net()
    net.down[2].running_mean.fill_(0.3)  # type: ignore[index, union-attr, operator]
    images = tiny.images(9)
    model = wrapped(net)
    detector = Detector.fit(model, Normalised(images), "field", max_steps=3)
    scores, latents = detector.score(Normalised(images)), model.encode(images)
    ends = iterate(model.self_map, latents, max_steps=3).final
    net.train()
    net.up.eval()  # an owner's own choice
    before = flags(net)
    if surroundings == "float64":
        torch.set_default_dtype(torch.float64)
    if surroundings == "precision":
        torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16, enabled=surroundings == "autocast"):
            assert torch.equal(detector.score(Normalised(images)), scores)
            found = model.encode(images)
            assert torch.equal(found, latents)
            assert torch.equal(iterate(model.self_map, latents, max_steps=3).final, ends)
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_float32_matmul_precision("highest")
    assert flags(net) == before
    torch.testing.assert_close(found.double(), by_hand(net, images), rtol=1e-5, atol=1e-6)
    assert float(net.down[2].running_mean[0]) == pytest.approx(0.3)  # type: ignore[index]


def test_training_goes_on_after_a_score() -> None:
    net = Net().train()
    model = wrapped(net)
    model.encode(tiny.images(3))
    assert net.training
    assert all(p.requires_grad for p in net.parameters())
    before = net.down[2].num_batches_tracked.clone()  # type: ignore[index]
    net.decode(net.encode(tiny.images(4))).square().mean().backward()
    assert net.up.weight.grad is not None
    assert int(net.down[2].num_batches_tracked) == int(before) + 1  # type: ignore[index]


def test_flags_come_back_after_an_error_and_with_shared_parts() -> None:
    net = Net().train()

    class Fails(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = net

        def encode(self, images: Tensor) -> Tensor:
            assert not net.training
            raise KeyError("mine")

        decode = encode

    whole, part = wrapped(Fails()), wrapped(net)
    with pytest.raises(TrajOODError, match=r"Fails: encode of images .* failed: KeyError: 'mine'"):
        whole.encode(tiny.images(2))
    assert all(flags(whole.module))
    outer, inner = whole.fixed(), part.fixed()
    outer.__enter__()
    inner.__enter__()
    outer.__exit__(None, None, None)
    assert not any(flags(net))  # still in use by the other
    inner.__exit__(None, None, None)
    assert all(flags(net))


def test_radii_are_those_of_evaluation_mode() -> None:
    net = Net().train()
    model = wrapped(net)
    start = model.encode(tiny.images(2))
    found = spectral_radii(model.self_map, start).values
    net.eval()
    expected = [
        torch.linalg.eigvals(torch.func.jacrev(lambda z: model.self_map(z[None])[0])(z)).abs().max().item()
        for z in start.clone()
    ]
    assert found.tolist() == pytest.approx(expected, rel=0.05)


# ---------------------------------------------------------------------------------------------- what is none


class Loses(Net):
    def encode(self, images: Tensor) -> Tensor:
        return super().encode(images)[:-1]


class LosesInDecode(Net):
    def decode(self, latents: Tensor) -> Tensor:
        return super().decode(latents)[1:]


class Samples(Net):
    def encode(self, images: Tensor) -> Tensor:
        latents = super().encode(images)
        return latents + 1e-4 * torch.randn_like(latents)


class SamplesInDecode(Net):
    def decode(self, latents: Tensor) -> Tensor:
        return nn.functional.dropout(super().decode(latents), 0.5, training=True)


class Counts(Net):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(1))
        self.register_buffer("unknown", torch.full((1,), torch.nan))

    def encode(self, images: Tensor) -> Tensor:
        self.calls += 1
        return super().encode(images)


class Squeezes(Net):
    def encode(self, images: Tensor) -> Tensor:
        return super().encode(images).squeeze()


class SqueezesInDecode(Net):
    def decode(self, latents: Tensor) -> Tensor:
        return super().decode(latents.squeeze())


class CountsRows(Net):
    def encode(self, images: Tensor) -> Tensor:
        return super().encode(images) * (1 + len(images) / 1000)


class WholeNumbers(Net):
    def encode(self, images: Tensor) -> Tensor:
        return (100 * super().encode(images)).long()


class LooksAround(Net):
    def encode(self, images: Tensor) -> Tensor:
        return super().encode(images / images.amax())


class Turns(Net):
    def encode(self, images: Tensor) -> Tensor:
        return super().encode(images).flip(0)


class SkipConnection(Net):
    def encode(self, images: Tensor) -> Tensor:
        self.skip = images
        return super().encode(images)

    def decode(self, latents: Tensor) -> Tensor:
        return super().decode(latents) + self.skip


class Pair(Net):
    def encode(self, images: Tensor) -> Any:
        return {"z": super().encode(images)}


@pytest.mark.parametrize(
    ("net", "text"),
    [
        (Loses, r"Loses: encode: expected 2 rows for 2 rows, got shape \(1, 6\): return one row per input"),
        (LosesInDecode, r"LosesInDecode: decode: expected 48 rows for 48 rows, got shape \(47, 1, 8, 8\)"),
        (Samples, r"Samples: encode draws random numbers: two calls .* differ by .*: return the mean"),
        (SamplesInDecode, r"SamplesInDecode: encode\(decode\(z\)\) draws random numbers"),
        (SkipConnection, r"SkipConnection: decode remembers the images .*; skip connections.*U-Net.*: remove them"),
        (LooksAround, r"LooksAround: encode depends on batch-mates: .*BatchNorm with track_running_stats"),
        (Turns, r"Turns: encode depends on batch-mates"),
        (lambda: Net().half(), r"Net: expected float32 or float64 weights, got float16: convert the model with .float"),
        (lambda: Net().bfloat16(), r"expected float32 or float64 weights, got bfloat16"),
        (Pair, r"Pair: encode: expected one tensor, got dict"),
        (Counts, r"Counts: a call changes the buffer 'calls' of its network: .*: leave counters and statistics"),
        (Squeezes, r"Squeezes: encode: expected shape \(1, 6\) for a single row, got \(6,\): keep the axis of rows"),
        (CountsRows, r"CountsRows: encode depends on the number of rows: its outputs for an image alone"),
        (WholeNumbers, r"WholeNumbers: encode: expected float32 or float64, got int64"),
    ],
)
def test_refused_by_name_at_fit(net: Callable[[], nn.Module], text: str) -> None:
    with pytest.raises(TrajOODError, match=text):
        Detector.fit(wrapped(net()), Normalised(tiny.images(8)), "field")


def test_batch_statistics_are_found_although_the_module_is_in_evaluation_mode() -> None:
    net = Net()
    net.down[2] = nn.BatchNorm1d(6, track_running_stats=False)
    with pytest.raises(TrajOODError, match="Net: encode depends on batch-mates"):
        wrapped(net).encode(tiny.images(3))


def test_rows_that_change_between_chunks_and_halves() -> None:
    calls: list[int] = []
    is_tried = False

    def encode(images: Tensor) -> Tensor:
        calls.append(len(images))
        return images.flatten(1)[:, : 3 if is_tried and len(calls) == 2 else 2]

    model = CallableAutoencoder(encode, lambda z: z[:, :1, None, None].expand(-1, *SHAPE), SHAPE, chunk=1)
    model.encode(tiny.images(1))
    is_tried = True
    calls.clear()
    with pytest.raises(
        TrajOODError,
        match=r"custom: encode: expected the same shape, type and device for every chunk, got float32 \(2,\)",
    ):
        model.encode(tiny.images(2))
    short = CallableAutoencoder(lambda x: x.flatten(1).half(), lambda z: z.float().view(-1, *SHAPE), SHAPE)
    with pytest.raises(TrajOODError, match="custom: encode: expected float32 or float64, got float16"):
        short.encode(tiny.images(2))


class Reuses(Net):
    """Returns the same buffer every time, as recorded CUDA graphs do, and centres each batch."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[int, Tensor] = {}

    def encode(self, images: Tensor) -> Tensor:
        latents = super().encode(images)
        found = self.found.setdefault(len(latents), torch.empty_like(latents))
        return found.copy_(latents - latents.mean(dim=0))


def test_batch_mates_are_found_behind_a_buffer_that_is_returned_every_time() -> None:
    with pytest.raises(TrajOODError, match="Reuses: encode depends on batch-mates"):
        wrapped(Reuses()).encode(tiny.images(3))


class Scales(Net):
    """Begins with operations in place that change their input again in every call."""

    def encode(self, images: Tensor) -> Tensor:
        return super().encode(images.mul_(2).sub_(1))

    def decode(self, latents: Tensor) -> Tensor:
        return super().decode(latents.mul_(0.5))


def test_a_trial_gives_every_call_its_own_input() -> None:
    images = tiny.images(3)
    model = wrapped(Scales())
    expected = by_hand(Net().eval(), 2 * images - 1)
    torch.testing.assert_close(model.encode(images).double(), expected, rtol=1e-5, atol=1e-6)
    assert model.ladder


def test_a_detector_is_fitted_with_the_chunk_that_it_scores_with() -> None:
    """The trial of a network that rounds a row by its place reduces the chunk before the training trajectories."""

    class Moves(Net):
        def encode(self, images: Tensor) -> Tensor:
            calls.append(len(images))
            places = torch.arange(len(images))[:, None] if len(images) > 24 else torch.zeros(1, 1)
            return super().encode(images) * (1 + 1e-6 * places)

    calls: list[int] = []
    model = wrapped(Moves(), chunk=30)
    Detector.fit(model, Normalised(tiny.images(60)), "field")
    assert (model.chunk, calls.count(30)) == (24, 2)  # the two calls of the trial


def test_a_backbone_is_held_to_the_same() -> None:
    linear = nn.Linear(64, 3)

    def backbone(forward: Callable[[Tensor], Tensor]) -> CallableBackbone:
        return CallableBackbone(lambda x: Features(forward(x.flatten(1)), None), SHAPE, 3, module=linear)

    linear.train()
    images = tiny.images(5)
    torch.testing.assert_close(backbone(linear).extract(images).features, linear(images.flatten(1)))
    assert linear.training
    assert linear.weight.requires_grad
    with pytest.raises(TrajOODError, match="custom draws random numbers"):
        backbone(lambda x: linear(x) + torch.rand(1)).extract(images)
    with pytest.raises(TrajOODError, match="custom depends on batch-mates"):
        backbone(lambda x: linear(x - x.mean())).extract(images)


def test_a_network_of_one_batch_size_is_tried_on_that() -> None:
    class Fixed(Net):
        def encode(self, images: Tensor) -> Tensor:
            return super().encode(images.reshape(4, *SHAPE))

    assert wrapped(Fixed(), chunk=4).encode(tiny.images(6)).shape == (6, 6)


def test_float64_stays_float64() -> None:
    net = Net().double()
    model = wrapped(net)
    images = tiny.images(5)
    latents = model.encode(images)
    assert latents.dtype == model.decode(latents).dtype == torch.float64
    torch.testing.assert_close(latents, by_hand(net, images), rtol=1e-13, atol=1e-13)
    assert issubclass(CallableAutoencoder, FixedFunction)


# ---------------------------------------------------------------------------------------------- weights since the fit


def plus_one(net: Net) -> None:
    with torch.no_grad():
        net.up.bias += 1


def past_the_counters(net: Net) -> None:
    net.up.weight.data[5] *= 2


def replaced(net: Net) -> None:
    net.up.bias = nn.Parameter(net.up.bias.detach() + 1)


def batch_statistics(net: Net) -> None:
    net.train()
    net.encode(tiny.images(4))
    net.eval()


def other_checkpoint(net: Net) -> None:
    net.load_state_dict({key: value + 1 for key, value in net.state_dict().items()})


@pytest.mark.parametrize("change", [plus_one, past_the_counters, replaced, batch_statistics, other_checkpoint])
def test_weights_that_changed_since_the_fit_are_noticed(change: Callable[[Net], None]) -> None:
    net, images = Net(), tiny.images(8).sigmoid()
    detector = Detector.fit(wrapped(net), images, "field")
    module = detector.as_module()
    kept = {key: value.clone() for key, value in net.state_dict().items()}
    scores = detector.score(images)
    change(net)
    for use in (lambda: detector.score(images), lambda: detector.judge(images[:1]), lambda: module(images)):
        with pytest.raises(
            TrajOODError, match=r"Net: its weights or batch statistics have changed since .*: fit again"
        ):
            use()
    net.load_state_dict(kept)  # equal weights are the same weights
    assert torch.equal(detector.score(images), scores)
    net.up.bias.data = net.up.bias.data.clone()  # moved, as to another device
    assert torch.equal(detector.score(images), scores)


def test_a_backbones_weights_and_a_loaded_detectors_count_too(tmp_path: Path) -> None:
    linear = nn.Linear(64, 8)
    backbone = CallableBackbone(lambda x: Features(linear(x.flatten(1)), None), SHAPE, 8, module=linear)
    model = SurrogateAutoencoder(backbone, SurrogateNetwork(8, [8], 4))
    images = tiny.images(8).sigmoid()
    Detector.fit(model, images, "knn:k=1").save(tmp_path / "d")
    detector = Detector.load(tmp_path / "d", autoencoder=model)
    detector.score(images[:2])
    linear.weight.data *= 2
    with pytest.raises(TrajOODError, match="have changed since the scorer was fitted"):
        detector.score(images[:2])


# ---------------------------------------------------------------------------------------------- modules of one's own


class Parts(nn.Module):
    def __init__(self, net: Net) -> None:
        super().__init__()
        self.encoder, self.decoder = net.down, nn.Sequential(net.up, nn.Unflatten(1, SHAPE))


class Posterior:
    """As diffusers' DiagonalGaussianDistribution."""

    def __init__(self, mean: Tensor) -> None:
        self.mean = mean

    def mode(self) -> Tensor:
        return self.mean

    def sample(self) -> Tensor:
        return self.mean + torch.randn_like(self.mean)


class Returns(Net):
    """An encoder and a decoder that return ``make(tensor)``."""

    def __init__(self, make: Callable[[Tensor], Any], made: Callable[[Tensor], Any] | None = None) -> None:
        super().__init__()
        self.make, self.made = make, made or make

    def encode(self, images: Tensor) -> Any:
        return self.make(super().encode(images))

    def decode(self, latents: Tensor) -> Any:
        return self.made(super().decode(latents))


@pytest.mark.parametrize(
    "module",
    [
        lambda: Parts(Net()),
        lambda: torch.compile(Net(), backend="eager"),
        lambda: torch.compile(Parts(Net()), backend="eager"),
        lambda: Returns(lambda z: SimpleNamespace(latent_dist=Posterior(z)), lambda x: SimpleNamespace(sample=x)),
        lambda: Returns(lambda z: (Posterior(z),), lambda x: (x,)),
        lambda: Returns(lambda z: SimpleNamespace(latents=z), lambda x: SimpleNamespace(sample=x)),
        lambda: Returns(lambda z: BaseModelOutput(last_hidden_state=z), lambda x: SimpleNamespace(sample=x)),
        lambda: Returns(lambda z: torch.distributions.Normal(z, 1.0), lambda x: x),
    ],
)
def test_what_modules_look_like(module: Callable[[], nn.Module]) -> None:
    images = tiny.images(5)
    model = CallableAutoencoder.from_module(module(), list(SHAPE))  # a shape as JSON has it
    assert model.input_shape == SHAPE
    latents = model.encode(images)
    torch.testing.assert_close(latents.double(), by_hand(Net(), images), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model.decode(latents), Net().decode(latents.clone()))


def test_what_only_the_author_knows_is_refused_with_the_wrapper_to_write() -> None:
    net = Returns(lambda z: (z, z - 4), lambda x: x)
    with pytest.raises(TrajOODError, match=r"Returns: encode: expected one tensor, got tuple of 2") as caught:
        wrapped(net).encode(tiny.images(2))
    code = str(caught.value).split("wrap it:\n")[1]
    assert len(code.splitlines()) == 5
    names: dict[str, Any] = {"torch": torch, "traj_ood": traj_ood, "net": net}
    exec(code.replace("(3, 32, 32)", str(SHAPE)), names)
    found = names["model"].encode(tiny.images(2))
    torch.testing.assert_close(found.double(), by_hand(Net(), tiny.images(2)), rtol=1e-5, atol=1e-6)
    with pytest.raises(TrajOODError, match=r"Linear: expected methods encode and decode, .* none of them: wrap it"):
        wrapped(nn.Linear(2, 2))
    for shape in ((8, 8), (1, 8.5, 8), (0, 8, 8)):
        with pytest.raises(TrajOODError, match=r"input_shape: expected \(C, H, W\), three positive numbers, got"):
            CallableAutoencoder.from_module(Net(), shape)  # type: ignore[arg-type]


def test_the_module_behind_functions_is_found() -> None:
    net, images = Net().train(), tiny.images(3)
    parts = Parts(net)
    expected = wrapped(net)
    for encode, decode in (
        (net.encode, net.decode),
        (lambda x: net.encode(x), lambda z: net.decode(z)),
        (partial(Net.encode, net), partial(Net.decode, net)),
    ):
        model = CallableAutoencoder(encode, decode, SHAPE)
        assert model.module is net
        assert model.fingerprint() == expected.fingerprint()
        torch.testing.assert_close(model.encode(images).double(), by_hand(Net(), images), rtol=1e-5, atol=1e-6)
    two = CallableAutoencoder(parts.encoder, parts.decoder, SHAPE)
    assert {id(m) for m in two.module.children()} == {id(parts.encoder), id(parts.decoder)}
    assert net.training
    assert not list(tiny.toy().module.parameters())


def test_a_copy_uses_its_own_network_or_is_refused() -> None:
    images = tiny.images(3)
    model = wrapped(Net())
    twin, before = copy.deepcopy(model), model.encode(images)
    with torch.no_grad():
        twin.module.down[1].weight.zero_()  # type: ignore[index,union-attr,operator]
    assert torch.equal(model.encode(images), before)
    assert not torch.equal(twin.encode(images), before)
    net = Net()
    model = CallableAutoencoder(lambda x: net.encode(x), lambda z: net.decode(z), SHAPE)
    with pytest.raises(TrajOODError, match="custom: cannot be copied or pickled, because its functions would use the"):
        copy.deepcopy(model)
    backbone = CallableBackbone(lambda x: net.encode(x), SHAPE, 8, module=net)
    with pytest.raises(TrajOODError, match="copy the network, and make a CallableBackbone of the copy"):
        copy.deepcopy(backbone)
    assert copy.deepcopy(CallableBackbone(net.encode, SHAPE, 8, module=net)).module is not net


NET = Net()


def encode_of_this_module(images: Tensor) -> Tensor:
    return NET.encode(images)


def decode_of_this_module(latents: Tensor) -> Tensor:
    return NET.decode(latents)


def test_an_unpickled_model_uses_its_own_network_or_is_refused() -> None:
    images = tiny.images(3)
    model = wrapped(Net())
    twin = pickle.loads(pickle.dumps(model))
    torch.testing.assert_close(twin.encode(images), model.encode(images))
    assert twin.module is not model.module
    written = pickle.dumps(CallableAutoencoder(encode_of_this_module, decode_of_this_module, SHAPE))
    with pytest.raises(TrajOODError, match="custom: cannot be copied or pickled"):
        pickle.loads(written)


def test_compiled_parts_have_the_fingerprint_of_plain_ones() -> None:
    plain, compiled = Parts(Net()), Parts(Net())
    compiled.encoder = torch.compile(compiled.encoder, backend="eager")  # type: ignore[assignment]
    assert wrapped(plain).fingerprint() == wrapped(compiled).fingerprint()


# ---------------------------------------------------------------------------------------------- training still trains


def test_a_surrogate_trains_the_same_inside_autocast_and_without_gradients() -> None:
    backbone = CallableBackbone(lambda x: Features(x.flatten(1)[:, :8], None), SHAPE, 8, module=nn.Module())
    recipe = SurrogateRecipe(steps=8, check_every=4, batch_size=16)
    features = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    expected = fit_surrogate(backbone, features, recipe, quiet=True).network.state_dict()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            found = fit_surrogate(backbone, features, recipe, quiet=True).network.state_dict()
    finally:
        torch.set_default_dtype(torch.float32)
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value)


class Smooth(Net):
    """In float64, f(z) = tanh(…) of a linear map: all of it can be written down."""

    def __init__(self) -> None:
        super().__init__()
        self.double()


def test_float64_from_end_to_end(tmp_path: Path) -> None:
    """What float32 anywhere on the way would round at 1e-8 agrees to 1e-12 with plain float64."""
    train, images = (tiny.images(count, seed=count).sigmoid().double() for count in (30, 5))
    model = wrapped(Smooth())
    first, second = (by_hand(Smooth(), x.float().double()) for x in (train, images))
    step = by_hand(Smooth(), Smooth().decode(second))
    near = (nn.functional.normalize(second)[:, None] - nn.functional.normalize(first)).norm(dim=2).kthvalue(2).values
    expected = {"knn:k=2:view=tokens": near, "first-residual": (step - second).norm(dim=1)}
    for spec, right in expected.items():
        detector = Detector.fit(model, train, spec)
        scores = detector.score(images)
        torch.testing.assert_close(scores, right, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(detector.as_module()(images.float()), scores, rtol=1e-11, atol=1e-11)
        detector.save(tmp_path / "d")
        assert torch.equal(Detector.load(tmp_path / "d", autoencoder=model).score(images), scores)


def test_an_index_of_float64_points_is_exact_in_float64() -> None:
    draws = torch.Generator().manual_seed(0)
    heads = torch.randn(6, 5, generator=draws, dtype=torch.float64)
    points = heads.repeat(20, 1) + 1e-11 * torch.randn(120, 5, generator=draws, dtype=torch.float64)
    queries = points[:9] + 1e-11 * torch.randn(9, 5, generator=draws, dtype=torch.float64)
    differences = (queries[:, None] - points).norm(dim=2)
    for backend in ("torch", "auto"):
        index = NeighborIndex(points, backend=backend)  # type: ignore[arg-type]
        torch.testing.assert_close(index.nearest(queries).distances[:, 0], differences.amin(dim=1), rtol=1e-6, atol=0)
        found = index.search(queries, 3).distances
        torch.testing.assert_close(found, differences.topk(3, largest=False).values, rtol=1e-6, atol=0)


@pytest.mark.parametrize("rows", [12, 5])
def test_operations_in_place_reach_no_tensor_of_ours_or_the_callers(rows: int) -> None:
    """A decoder that begins with ``ReLU(inplace=True)`` says what the same one without it says."""

    def model(inplace: bool) -> CallableAutoencoder:
        torch.manual_seed(0)
        down = nn.Sequential(nn.LeakyReLU(0.1, inplace=inplace), nn.Flatten(), nn.Linear(64, 6))
        up = nn.Sequential(nn.ReLU(inplace=inplace), nn.Linear(6, 64), nn.Unflatten(1, (1, 8, 8)))
        parts = nn.ModuleList([down, up])
        return CallableAutoencoder(down, up, (1, 8, 8), module=parts, chunk=6, name="in place")

    train, new = tiny.images(24, seed=1), tiny.images(rows, seed=2)
    given = new.clone()
    specs = ["field", "mahalanobis", "reconstruction", "trajectory"]
    found, expected = (
        ScorerSet(model(inplace), specs, max_steps=4).fit(Normalised(train.clone())).score(Normalised(new)).scores
        for inplace in (True, False)
    )
    for label, values in expected.items():
        torch.testing.assert_close(found[label], values, rtol=1e-9, atol=0, msg=label)
    assert torch.equal(new, given)


@pytest.mark.parametrize(
    ("shape", "swapped", "error"),
    [((3, 8, 8), False, "expected input"), ((1, 8, 8), True, "failed: RuntimeError: ")],
    ids=["other channels", "swapped"],
)
def test_functions_that_do_not_fit_are_named(shape: tuple[int, int, int], swapped: bool, error: str) -> None:
    torch.manual_seed(0)
    halves = (
        nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten()),
        nn.Sequential(nn.Linear(72, 64), nn.Unflatten(1, (1, 8, 8))),
    )
    encode, decode = reversed(halves) if swapped else halves
    model = CallableAutoencoder(encode, decode, shape, name="own")
    told = f"own: encode of images \\(.*{error}.*: correct the function, or give .* input_shape \\(C, H, W\\) that fit"
    with pytest.raises(TrajOODError, match=told):
        model.encode(torch.rand(3, *shape))


def test_weights_on_a_device_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here meta, in place of CUDA, which has no values to hash."""
    monkeypatch.setattr(KnownWeights, "_hash", lambda self: [])
    model = tiny.conv()
    model.module.to("meta")
    KnownWeights(model)
