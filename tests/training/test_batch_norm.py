"""BatchNorm over micro-batches: exactly that of the batch, or a warning."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from xmc.training.batch_norm import BatchNormWarning
from xmc.training.batch_size_search import AutoSize
from xmc.training.micro_batch import micro_step


def images() -> nn.Module:
    """Three BatchNorms, one on raw input, one without parameters, one after a residual sum."""

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.raw = nn.BatchNorm2d(2)
            self.first = nn.Conv2d(2, 4, 3, padding=1)
            self.norm = nn.BatchNorm2d(4, affine=False, momentum=None)
            self.second = nn.Conv2d(4, 4, 1)
            self.flat = nn.BatchNorm1d(4, momentum=0.3)
            self.last = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.first(self.raw(x))
            hidden = hidden + self.second(torch.tanh(self.norm(hidden)))
            return self.last(torch.tanh(self.flat(hidden.mean((2, 3)))))

    return Network().double()


def tower() -> nn.Module:
    """The same BatchNorm twice, with statistics of the batch even in evaluation."""
    norm = nn.BatchNorm1d(5, track_running_stats=False)
    return nn.Sequential(nn.Linear(5, 5), norm, nn.Tanh(), nn.Linear(5, 5), norm, nn.Linear(5, 3))


def frozen() -> nn.Module:
    """One BatchNorm in evaluation, and nothing trainable below the other."""
    model = nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5), nn.BatchNorm1d(5), nn.Linear(5, 3))
    model[0].requires_grad_(False)
    model[1].eval().requires_grad_(False)
    return model


def results(model: nn.Module) -> dict[str, Tensor]:
    """Gradients and buffers."""
    found = {f"buffer {name}": buffer.clone() for name, buffer in model.named_buffers()}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None
            found[name] = parameter.grad
    return found


@pytest.mark.parametrize("sizes", [[4, 4, 3], [1, 9, 1], [11]])
@pytest.mark.parametrize("make", [images, tower, frozen])
def test_statistics_gradient_and_running_averages_are_those_of_the_batch(
    make: Any, sizes: Sequence[int]
) -> None:
    torch.manual_seed(1)
    model = make().double()
    x = torch.randn(11, 2, 4, 3) if make is images else torch.randn(11, 5)
    x, y = 3 + x.double(), torch.randint(0, 3, (11,))
    other = copy.deepcopy(model)
    for _ in range(2):  # running averages move on from where they are
        expected = F.cross_entropy(model(x), y)
        expected.backward()
        step = micro_step(other, x, F.cross_entropy, targets=y, size=sizes, exact_batch_norm=True)
        torch.testing.assert_close(step.loss, expected.detach(), rtol=1e-12, atol=1e-12)
    truth, found = results(model), results(other)
    assert truth.keys() == found.keys()
    for name in truth:
        torch.testing.assert_close(found[name], truth[name], rtol=1e-11, atol=1e-11, msg=name)
    assert "forward" not in other.__dict__
    assert all("forward" not in module.__dict__ for module in other.modules())


def test_dropout_is_replayed_in_every_pass() -> None:
    """Masks of the micro-batches, drawn in order; random numbers go on after the last."""

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(
                nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 4), nn.BatchNorm1d(4)
            )

        def forward(self, x: Tensor, masks: Tensor | None = None) -> Tensor:
            masks = torch.rand(len(x), 5, dtype=x.dtype) if masks is None else masks
            return self.layers(x * (masks > 0.3))

    model = Network().double()
    x, y = torch.randn(9, 5).double(), torch.randint(0, 4, (9,))
    torch.manual_seed(5)
    masks = torch.cat([torch.rand(n, 5, dtype=x.dtype) for n in (4, 4, 1)])
    after = torch.rand(2)
    F.cross_entropy(model(x, masks), y).backward()
    truth = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    torch.manual_seed(5)
    micro_step(model, x, F.cross_entropy, targets=y, size=4, exact_batch_norm=True)
    assert torch.equal(torch.rand(2), after)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, truth[name], rtol=1e-11, atol=1e-11)


def test_half_precision_keeps_statistics_in_float32() -> None:
    model = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)).bfloat16()
    x, y = torch.randn(32, 5).bfloat16(), torch.randint(0, 3, (32,))
    wide = copy.deepcopy(model).float()
    F.cross_entropy(wide(x.float()), y).backward()
    micro_step(model, x, F.cross_entropy, targets=y, size=7, exact_batch_norm=True)
    for one, other in zip(model.parameters(), wide.parameters(), strict=True):
        assert one.grad is not None
        assert other.grad is not None
        torch.testing.assert_close(one.grad.float(), other.grad, rtol=0.05, atol=0.01)


def test_without_it_a_warning_says_what_differs() -> None:
    model = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.BatchNorm1d(6))
    x = torch.randn(9, 5)

    def loss(output: Tensor, x: Tensor) -> Tensor:
        return output.square().mean()

    message = (
        r"BatchNorm 1 and 1 more normalises by the 4 rows of a micro-batch, not by the 9 of the "
        r"batch, and moves its running statistics 3 times"
    )
    with pytest.warns(BatchNormWarning, match=message):
        micro_step(model, x, loss, size=[4, 3, 2])
    with pytest.warns(BatchNormWarning, match="not by the 9 of the batch"):
        micro_step(model, x, loss, size=AutoSize(10**6, most=3))
    micro_step(model, x, loss, size=9)  # one micro-batch is the batch: no warning
    micro_step(model.eval(), x, loss, size=4)


def test_a_failed_micro_batch_moves_no_running_statistics() -> None:
    model = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Linear(6, 1))
    other = copy.deepcopy(model)
    x = torch.randn(16, 5)

    def fail(module: nn.Module, args: Any, output: Tensor) -> None:
        if len(output) > 4:
            raise torch.OutOfMemoryError("fake")

    model[2].register_forward_hook(fail)

    def loss(output: Tensor, x: Tensor) -> Tensor:
        return output.square().mean()

    with pytest.warns(BatchNormWarning):
        step = micro_step(model, x, loss, size=AutoSize(10**6))
    assert step.sizes == (4, 4, 4, 4)
    with pytest.warns(BatchNormWarning):
        micro_step(other, x, loss, size=4)
    for name, buffer in other.named_buffers():
        assert torch.equal(dict(model.named_buffers())[name], buffer), name


def test_mistakes_are_named() -> None:
    norm = nn.BatchNorm1d(5)
    layers = nn.Sequential(nn.Linear(5, 5), norm)

    def recomputed(x: Tensor) -> Tensor:
        return checkpoint(layers, x, use_reentrant=False)

    def loss(output: Tensor, x: Tensor) -> Tensor:
        return output.square().mean()

    options: dict[str, Any] = {"size": 3, "modules": [layers], "exact_batch_norm": True}
    with pytest.raises(ValueError, match="does not go together with activation checkpointing"):
        micro_step(recomputed, torch.randn(6, 5), loss, **options)
    with pytest.raises(ValueError, match="more than one value a channel for BatchNorm, got 1"):
        micro_step(layers, torch.randn(1, 5), loss, **options)
    with pytest.raises(ValueError, match="expected 2D or 3D input"):
        micro_step(norm, torch.randn(6, 5, 2, 2), loss, **options)
    order = [nn.BatchNorm1d(5), nn.BatchNorm1d(5)]

    def either(x: Tensor) -> Tensor:
        first, second = order if len(x) == 3 else order[::-1]
        return second(first(x))

    options["modules"] = order
    with pytest.raises(ValueError, match="to call its BatchNorms in one order"):
        micro_step(either, torch.randn(5, 5), loss, **options)
