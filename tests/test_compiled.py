"""f through torch.compile: the same numbers, one shape, and f itself where the compiler fails."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from traj_ood.dynamics.compiled import CompiledMap
from traj_ood.dynamics.fixed_function import name_around
from traj_ood.dynamics.iterate import iterate


def halve(z: Tensor) -> Tensor:
    return torch.tanh(0.5 * z)


def test_one_shape_is_compiled_and_others_are_answered_by_f(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[tuple[int, ...]] = []

    def pretend(function: Any, **options: Any) -> Any:
        assert options == {"dynamic": False, "mode": "default"}

        def call(z: Tensor) -> Tensor:
            compiled.append(tuple(z.shape))
            return function(z)  # type: ignore[no-any-return]

        return call

    monkeypatch.setattr(torch, "compile", pretend)
    f, start = CompiledMap(halve), torch.linspace(-3, 3, 40)[:, None]
    path, plain = (iterate(g, start, chunk=8, max_steps=30) for g in (f, halve))
    assert torch.equal(path.steps, plain.steps)
    assert set(compiled) == {(8, 1)}
    torch.testing.assert_close(f(start[:3]), halve(start[:3]))
    assert set(compiled) == {(8, 1)}
    assert not f.fell_back


def test_where_the_compiler_fails_f_answers_with_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(function: Any, **options: Any) -> Any:
        def call(z: Tensor) -> Tensor:
            raise RuntimeError("no C++ compiler\nand a long story")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    f, z = CompiledMap(halve), torch.ones(2, 3)
    with pytest.warns(UserWarning, match=r"torch.compile failed, f runs uncompiled \(RuntimeError: no C\+\+ compiler"):
        assert torch.equal(f(z), halve(z))
    assert torch.equal(f(z), halve(z))  # and says so once
    assert f.fell_back.startswith("RuntimeError")


def test_a_fault_of_f_is_f_s_own() -> None:
    def faulty(z: Tensor) -> Tensor:
        raise ValueError("not today")

    with pytest.raises(ValueError, match="not today"):
        CompiledMap(faulty)(torch.ones(1, 1))


def test_the_model_behind_it_is_fixed_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.vit()
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    model.module.train()
    path = iterate(CompiledMap(model.self_map), model.encode(tiny.images(3)), chunk=model.chunk, max_steps=3)
    plain = iterate(model.self_map, model.encode(tiny.images(3)), chunk=model.chunk, max_steps=3)
    torch.testing.assert_close(path.final, plain.final, rtol=0, atol=0)
    assert model.module.training
    assert name_around(CompiledMap(model.self_map)).startswith(model.name)
