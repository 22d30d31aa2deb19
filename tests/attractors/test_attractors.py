"""AttractorDictionary: what it collects, whether it can be trusted, and what it refuses to load."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import save
from torch import Tensor

from traj_ood.attractors import AttractorDictionary, NearestAttractor
from traj_ood.dynamics.iterate import iterate
from traj_ood.dynamics.trajectory import Status
from traj_ood.errors import TrajOODError


def make(points: Tensor, statuses: list[int] | None = None, **changes: Any) -> AttractorDictionary:
    count = len(points)
    fields: dict[str, Any] = {
        "points": points,
        "residuals": torch.linspace(1e-8, 9e-6, count, dtype=torch.float64),
        "steps": torch.arange(2, count + 2),
        "statuses": torch.tensor(statuses or [0] * count),
        "displacements": torch.linspace(0.1, 0.9, count, dtype=torch.float64),
        "ids": tuple(f"train/{i}.png" for i in range(count)),
        "provenance": {"model": "abc", "tol": 1e-5},
    }
    return AttractorDictionary(**{**fields, **changes})


def corners(dimension: int = 4) -> Tensor:
    """The 2^d sign patterns: cosines between two of them are at most 1 − 2/d."""
    return torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * dimension)


def test_from_trajectory_on_an_analytic_map() -> None:
    start = torch.tensor([[4.0, 3.0], [0.0, 2.0], [float("inf"), 0.0]])
    ones = torch.tensor([1.0, 0.0])

    def f(z: Tensor) -> Tensor:  # to (1, 0), halving the distance
        return ones + 0.5 * (z - ones)

    path = iterate(f, start, tol=1e-4, chunk=2)
    built = AttractorDictionary.from_trajectory(start, path, ("a", "b", "c"), {"tol": 1e-4})
    assert len(built) == 3
    assert built.statuses.tolist() == [0, 0, 2]
    assert torch.equal(built.steps, path.steps)
    assert torch.equal(built.points[:2], path.final[:2])
    for b, origin in enumerate([(4.0, 3.0), (0.0, 2.0)]):
        n = int(path.steps[b])
        z0 = torch.tensor(origin, dtype=torch.float64)
        reach = float((z0 - ones).norm())
        # z_n = a + (z0 − a)/2^n; the last residual is ‖z_n − z_{n−1}‖² = (reach/2^n)²
        assert float(built.residuals[b]) == pytest.approx((reach / 2**n) ** 2, rel=1e-3)
        assert float(built.displacements[b]) == pytest.approx(reach * (1 - 0.5**n) / float(z0.norm()), rel=1e-5)
    assert built.residuals[2].isnan()
    assert dict(built.provenance) == {"tol": 1e-4}


def test_from_trajectory_refuses_other_lengths() -> None:
    start = torch.ones(2, 2)
    path = iterate(lambda z: 0.5 * z, start)
    with pytest.raises(TrajOODError, match="got 2 trajectories, 2 starts and 1 ids"):
        AttractorDictionary.from_trajectory(start, path, ("a",))
    with pytest.raises(TrajOODError, match="got 2 trajectories, 3 starts and 2 ids"):
        AttractorDictionary.from_trajectory(torch.ones(3, 2), path, ("a", "b"))


def test_concatenate_equals_one_batch() -> None:
    start = torch.empty(10, 4).uniform_(-1, 1, generator=torch.Generator().manual_seed(0))
    model = tiny.toy()
    ids = tuple("abcdefghij")

    def explored(rows: slice) -> AttractorDictionary:
        path = iterate(model.self_map, start[rows], chunk=model.chunk)
        return AttractorDictionary.from_trajectory(start[rows], path, ids[rows], {"p": 1})

    whole = explored(slice(0, 10))
    joined = AttractorDictionary.concatenate([explored(slice(0, 3)), explored(slice(3, 10))])
    assert joined.ids == whole.ids
    for name, tensor in whole.tensors().items():
        torch.testing.assert_close(joined.tensors()[name], tensor, rtol=1e-5, atol=1e-6, msg=name)


def test_distinct_merges_by_cosine() -> None:
    directions = torch.tensor([[1.0, 0.0], [2.0, 0.0], [1.0, 0.1], [1.0, 0.2], [0.0, 1.0], [-1.0, 0.0]])
    built = make(directions)
    # cos((1,0), (1,.1)) = .995, cos((1,0), (1,.2)) = .981, cos((1,.1), (1,.2)) = .996 but (1,.1) leads nothing
    assert built.distinct().tolist() == [0, 3, 4, 5]
    assert built.distinct(cosine=0.999).tolist() == [0, 2, 3, 4, 5]
    assert built.distinct(cosine=-0.5).tolist() == [0, 5]
    many = torch.randn(50, 64, generator=torch.Generator().manual_seed(0))
    assert make(torch.cat([many, many, 2 * many])).distinct(cosine=1.0).tolist() == list(range(50))
    assert make(corners()).distinct().tolist() == list(range(16))
    assert make(directions[:, None]).distinct().tolist() == [0, 3, 4, 5]  # token latents are flattened


def test_healthy_dictionary() -> None:
    health = make(corners()).health()
    assert health.healthy
    assert health.warnings == ()
    assert (health.count, health.converged, health.non_finite, health.distinct) == (16, 1.0, 0.0, 16)
    quantiles = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95], dtype=torch.float64)
    expected = torch.quantile(torch.arange(2, 18).double(), quantiles).tolist()
    assert health.steps_quantiles == pytest.approx(tuple(expected))
    assert health.residual_quantiles[2] == pytest.approx((1e-8 + 9e-6) / 2)
    assert health.displacement_quantiles[2] == pytest.approx(0.5)
    assert json.loads(json.dumps(health.as_dict()))["distinct"] == 16


@pytest.mark.parametrize(("limit", "healthy"), [(1, True), (2, False), (16, False)])
def test_under_90_percent_converged_is_unhealthy(limit: int, healthy: bool) -> None:
    health = make(corners(), [Status.STEP_LIMIT] * limit + [Status.CONVERGED] * (16 - limit)).health()
    assert health.healthy is healthy
    share = f"{(16 - limit) / 16:.1%}"
    expected = f"only {share} of 16 training trajectories converged (healthy: at least 90 %)"
    assert health.warnings == (() if healthy else (expected,))


def test_exactly_90_percent_is_healthy() -> None:
    assert make(corners()[:10], [1] + [0] * 9).health().healthy


def test_under_10_distinct_is_unhealthy() -> None:
    health = make(corners()[:9].repeat(3, 1)).health()
    assert not health.healthy
    assert health.warnings == ("only 9 distinct attractors (healthy: at least 10)",)
    assert make(corners()[:10].repeat(3, 1)).health().healthy


def test_non_finite_end_points_are_left_out() -> None:
    points = corners()
    points[3] = float("inf")
    built = make(points, [0, 0, 0, 2] + [0] * 12, residuals=torch.full((16,), torch.nan, dtype=torch.float64))
    assert torch.equal(built.usable(), torch.cat([points[:3], points[4:]]))
    health = built.health()
    assert health.non_finite == 1 / 16
    assert health.converged == 15 / 16
    assert health.distinct == 15
    assert health.residual_quantiles == ()
    assert len(built.index(tiny.toy())) == 15


def test_no_usable_end_point() -> None:
    built = make(corners(), [2] * 16)
    with pytest.raises(TrajOODError, match="every training trajectory became NaN or infinite"):
        built.usable()
    health = built.health()
    assert not health.healthy
    assert (health.distinct, health.non_finite) == (0, 1.0)
    assert len(health.warnings) == 2


def test_index_and_observer_measure_the_view() -> None:
    model = tiny.vit()
    points = torch.randn(5, 5, 16, generator=torch.Generator().manual_seed(0))
    latents = points + torch.linspace(0.1, 0.5, 5)[:, None, None]
    built = make(points)
    offset = torch.linspace(0.1, 0.5, 5, dtype=torch.float64)
    for view, tokens in (("tokens", 5), ("cls", 1), ("mean", 1)):
        observer = NearestAttractor(model, built.index(model, view), view)  # type: ignore[arg-type]
        assert observer.name == f"distance/{view}"
        measured = observer.observe(torch.zeros(5), torch.arange(5), latents)
        torch.testing.assert_close(measured, offset * (tokens * 16) ** 0.5, rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------------------------------------- files


def test_save_and_load(tmp_path: Path) -> None:
    points = torch.randn(6, 3, 4, generator=torch.Generator().manual_seed(0))
    points[1] = float("nan")
    built = make(points, [0, 2, 1, 0, 0, 0])
    path = tmp_path / "new" / "attractors.safetensors"
    built.save(str(path))
    loaded = AttractorDictionary.load(str(path))
    assert loaded.ids == built.ids
    assert dict(loaded.provenance) == dict(built.provenance)
    for name, tensor in built.tensors().items():
        assert loaded.tensors()[name].dtype == tensor.dtype
        torch.testing.assert_close(loaded.tensors()[name], tensor, rtol=0, atol=0, equal_nan=True)
    assert loaded.health() == built.health()
    assert [p.name for p in path.parent.iterdir()] == ["attractors.safetensors"]


def test_a_dictionary_without_end_points_can_be_read(tmp_path: Path) -> None:
    built = make(torch.full((4, 3), torch.nan), [Status.NON_FINITE] * 4)
    built.save(tmp_path / "attractors.safetensors")
    assert AttractorDictionary.load(tmp_path / "attractors.safetensors").health() == built.health()


def header_of(built: AttractorDictionary, **changes: str) -> dict[str, str]:
    return {"schema": "traj_ood.attractors/1", "ids": json.dumps(built.ids), "provenance": "{}"} | changes


def test_unreadable_files(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    with pytest.raises(TrajOODError, match=r"a\.safetensors: not a readable attractor dictionary"):
        AttractorDictionary.load(path)
    for content in (b"", b"rubbish", b"\xff" * 100):
        path.write_bytes(content)
        with pytest.raises(TrajOODError, match=r"a\.safetensors: not a readable attractor dictionary"):
            AttractorDictionary.load(path)
    make(corners()).save(path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(TrajOODError, match=r"a\.safetensors: not a readable attractor dictionary"):
        AttractorDictionary.load(path)


@pytest.mark.parametrize("schema", ["traj_ood.attractors/2", None])
def test_another_schema(tmp_path: Path, schema: str | None) -> None:
    path, built = tmp_path / "a.safetensors", make(corners())
    header = {k: v for k, v in header_of(built).items() if k != "schema"} | ({"schema": schema} if schema else {})
    path.write_bytes(save(built.tensors(), metadata=header))
    with pytest.raises(TrajOODError, match=rf"a\.safetensors: expected schema traj_ood.attractors/1, got {schema}"):
        AttractorDictionary.load(path)


def test_missing_and_unknown_tensors(tmp_path: Path) -> None:
    path, built = tmp_path / "a.safetensors", make(corners())
    tensors = built.tensors()
    for wrong in ({k: v for k, v in tensors.items() if k != "steps"}, tensors | {"more": torch.zeros(16)}):
        path.write_bytes(save(wrong, metadata=header_of(built)))
        with pytest.raises(TrajOODError, match=r"a\.safetensors: not a readable attractor dictionary"):
            AttractorDictionary.load(path)


def test_inconsistent_lengths(tmp_path: Path) -> None:
    path, built = tmp_path / "a.safetensors", make(corners())
    path.write_bytes(save(built.tensors() | {"steps": torch.arange(5)}, metadata=header_of(built)))
    with pytest.raises(TrajOODError, match=r"damaged attractor dictionary: its parts have lengths \[5, 16\]"):
        AttractorDictionary.load(path)
    path.write_bytes(save(built.tensors(), metadata=header_of(replace(built, ids=("a",)))))
    with pytest.raises(TrajOODError, match=r"damaged attractor dictionary: its parts have lengths \[1, 16\]"):
        AttractorDictionary.load(path)


def test_non_finite_points_marked_finite(tmp_path: Path) -> None:
    points = corners()
    points[0, 0] = float("nan")
    make(points).save(tmp_path / "a.safetensors")
    with pytest.raises(TrajOODError, match="damaged attractor dictionary: non-finite points that are marked finite"):
        AttractorDictionary.load(tmp_path / "a.safetensors")
