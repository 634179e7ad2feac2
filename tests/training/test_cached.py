"""Encoding functions that are replayed in backward: the gradient of a plain step, in any step."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xmc.training.cached import cached
from xmc.training.chunks import Chunks

D = 5


def tower() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(D, 9), nn.BatchNorm1d(9), nn.Tanh(), nn.Dropout(0.3), nn.Linear(9, D)
    ).double()


def contrast(q: Tensor, k: Tensor) -> Tensor:
    return F.cross_entropy(3 * q @ k.T, torch.arange(len(q)))


def chunks(encode: nn.Module, x: Tensor) -> Tensor:
    return torch.cat([encode(part) for part in x.split(4)])


def assert_same(got: nn.Module, expected: nn.Module, tolerance: float = 1e-12) -> None:
    for name, parameter in expected.named_parameters():
        grad = got.get_parameter(name).grad
        assert parameter.grad is not None and grad is not None, name
        largest = float(parameter.grad.abs().max())
        assert float((grad - parameter.grad).abs().max()) <= tolerance * max(largest, 1e-3), name
    for name, buffer in expected.named_buffers():
        assert torch.equal(got.get_buffer(name), buffer), name


def test_a_step_of_ones_own_has_the_gradient_of_one_pass() -> None:
    model, twin, head = tower(), tower(), nn.Linear(D, D).double()
    twin.load_state_dict(model.state_dict())
    twin_head = copy.deepcopy(head)
    q, k = torch.randn(10, D).double(), torch.randn(12, D).double()

    @cached(chunk=4)
    def encode(model: nn.Module, batch: dict[str, Tensor], *, double: bool) -> Tensor:
        """Docs stay."""
        return F.normalize(model(batch["x"])) * (2 if double else 1)

    assert encode.__doc__ == "Docs stay."
    torch.manual_seed(1)
    loss = contrast(
        head(encode(model, {"x": q}, double=True)), encode(model, {"x": k}, double=False)
    )
    loss.backward()
    after = torch.rand(2)
    torch.manual_seed(1)
    reps = [F.normalize(chunks(twin, x)) for x in (q, k)]
    expected = contrast(twin_head(2 * reps[0]), reps[1])
    expected.backward()
    assert torch.equal(torch.rand(2), after)
    torch.testing.assert_close(loss, expected)
    assert_same(model, twin)
    assert_same(head, twin_head)


def test_a_second_backward_pass_adds_the_same_gradient() -> None:
    model, x = tower(), torch.randn(8, D).double()
    twin = copy.deepcopy(model)
    torch.manual_seed(1)
    loss = cached(chunk=4)(model)(x).square().sum()
    loss.backward(retain_graph=True)
    loss.backward()
    torch.manual_seed(1)
    (2 * chunks(twin, x).square().sum()).backward()
    assert_same(model, twin)


def test_replays_use_the_autocast_of_the_forward_pass() -> None:
    model = nn.Sequential(nn.Linear(D, 9), nn.Tanh(), nn.Linear(9, D))
    twin, x = copy.deepcopy(model), torch.randn(8, D)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rep = cached(chunk=4)(model)(x)
        expected = chunks(twin, x)
    assert rep.dtype == torch.bfloat16
    assert torch.equal(rep, expected)
    rep.float().square().sum().backward()
    expected.float().square().sum().backward()
    assert_same(model, twin, 2e-2)


def test_without_gradients_it_only_runs_in_chunks() -> None:
    model, x = tower().eval(), torch.randn(9, D).double()
    encode = cached(chunk=4)(model)
    with torch.no_grad():
        rep = encode(x)
    assert not rep.requires_grad
    torch.testing.assert_close(rep, model(x))
    model.requires_grad_(False)
    assert not encode(x).requires_grad


def test_errors_are_those_of_a_cached_step() -> None:
    with pytest.raises(ValueError, match="expected a chunk of at least 1 row, got 0"):
        cached(chunk=0)(tower())(torch.ones(3, D))
    with pytest.raises(TypeError, match="expected a tensor of representations from the encoder"):
        cached(chunk=2)(lambda x: [x])(torch.ones(3, D))


def test_chunks_that_are_cut_already_go_in_one_by_one() -> None:
    model, twin = tower().eval(), tower().eval()
    twin.load_state_dict(model.state_dict())
    q, k = torch.randn(10, D).double(), torch.randn(12, D).double()
    seen = []

    def encode(*, x: Tensor) -> Tensor:
        seen.append(len(x))
        return model(x)

    parts = Chunks([{"x": part} for part in (*q.split(4), *k.split(6))])
    reps = cached(chunk=1)(encode)(parts)
    contrast(reps[:10], reps[10:]).backward()
    contrast(twin(q), twin(k)).backward()
    assert seen == [4, 4, 2, 6, 6] * 2
    assert_same(model, twin)
