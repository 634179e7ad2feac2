"""The check of an encoder: exact where the gradient cache is, an error where it cannot be."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xmc.nn.encoder import BagEncoder
from xmc.training.deep_distance import pair_scores
from xmc.training.grad_check import Difference, Report, check_equivalence
from xmc.types import Bag

D = 5


def tower(*extra: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(D, 9), *extra, nn.Tanh(), nn.Dropout(0.3), nn.Linear(9, D))


def contrast(q: Tensor, k: Tensor, scale: Tensor | float = 3.0) -> Tensor:
    return F.cross_entropy(scale * q @ k.T, torch.arange(len(q)))


def test_each_parameter_is_compared_once_and_nothing_is_changed() -> None:
    encoder, head, scale = tower(nn.BatchNorm1d(9)), nn.Linear(D, D), nn.Parameter(torch.ones(()))
    inputs = [torch.randn(8, D), torch.randn(8, D)]
    encoder[0].weight.grad = torch.ones(9, D)
    before, random_before = copy.deepcopy(encoder.state_dict()), torch.get_rng_state()
    report = check_equivalence(
        [encoder, encoder],
        inputs,
        lambda q, k: contrast(head(q), k, scale),
        chunk=3,
    )
    assert {p.name for p in report.parameters} == {
        *(f"encoder 0: {name}" for name, _ in encoder.named_parameters()),
        "loss: weight",
        "loss: bias",
        "loss: scale",
    }
    assert report.loss == 0
    assert report.largest_relative < 1e-6
    assert torch.equal(torch.get_rng_state(), random_before)
    for name, value in encoder.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert torch.equal(encoder[0].weight.grad, torch.ones(9, D))
    assert encoder[0].bias.grad is None and head.weight.grad is None and scale.grad is None


def test_a_loss_whose_gradient_depends_on_the_pass_shows() -> None:
    """The second call of a loss is another one: the report names the parameters and the size."""
    encoder = nn.Linear(D, D).double()
    calls: list[int] = []

    def loss(q: Tensor) -> Tensor:
        calls.append(1)
        return q.square().sum() * (1 if len(calls) == 1 else 1.5)

    report = check_equivalence(encoder, torch.randn(6, D).double(), loss, chunk=4)
    assert [p.relative for p in report.parameters] == pytest.approx([0.5, 0.5])
    assert report.largest_absolute == max(p.absolute for p in report.parameters) > 0
    assert report.loss > 0


def test_undivided_shows_what_batch_norm_makes_of_chunks() -> None:
    plain, normed = tower().eval(), tower(nn.BatchNorm1d(9))
    normed[3].p = 0.0
    x = torch.randn(8, D)
    for encoder, low, high in ((plain, 0.0, 1e-5), (normed, 1e-2, 10.0)):
        options: dict[str, Any] = {"chunk": 4, "undivided": True}
        report = check_equivalence([encoder, encoder], [x, x + 1], contrast, **options)
        assert low <= report.largest_relative <= high


def test_sparse_gradients_and_distances_are_compared() -> None:
    encoder, network = BagEncoder(30, D, 0.2), nn.Sequential(nn.Linear(2 * D, 4), nn.Dropout(0.2))
    last = nn.Linear(4, 1)

    def distance(q: Tensor, k: Tensor) -> Tensor:
        pairs = [q[:, None].expand(-1, len(k), -1), k[None].expand(len(q), -1, -1)]
        return last(network(torch.cat(pairs, 2)).tanh())[..., 0]

    def loss(q: Tensor, k: Tensor) -> Tensor:
        scores = pair_scores(distance, q, k, tile=3, modules=[network, last])
        return F.cross_entropy(scores, torch.arange(len(q)))

    bag = Bag(torch.randint(30, (14,)), torch.arange(8) * 2, torch.rand(14))
    report = check_equivalence(
        [encoder, encoder], [bag, bag], loss, chunk=3, modules=[network, last]
    )
    assert len(report.parameters) == 6
    assert report.largest_relative < 1e-5
    assert report.largest_absolute > 0


def test_a_report_reads_as_a_table() -> None:
    differences = tuple(Difference(f"p{i}", 10.0**-i, 10.0 ** -(i + 1)) for i in range(12))
    lines = str(Report(0.5, differences)).splitlines()
    assert lines[0] == (
        "loss differs by 5.0e-01, gradients by at most 1.0e+00 (1.0e-01 of the parameter's largest)"
    )
    assert lines[2] == "  1.0e-01  1.0e-02  p1"
    assert lines[-1] == "  and 2 parameters that differ less"
    assert Report(0.0, ()).largest_absolute == 0.0


class Jitter(nn.Module):
    """Adds a number that torch's generators know nothing of."""

    def forward(self, x: Tensor) -> Tensor:
        return x + random.random()


class Counter(nn.Module):
    """Keeps a state outside its buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * self.calls


@pytest.mark.parametrize("culprit", [Jitter, Counter])
def test_an_encoder_that_cannot_be_replayed_is_an_error(culprit: type[nn.Module]) -> None:
    random.seed(3)
    encoder, bad = tower(), nn.Sequential(nn.Linear(D, D), culprit())
    message = (
        "expected encoder 1 to give the same representations when its state is restored, but rows "
        "0 to 2 differ by .*: does it draw random numbers outside torch"
    )
    with pytest.raises(ValueError, match=message):
        check_equivalence([encoder, bad], [torch.randn(7, D), torch.randn(7, D)], contrast, chunk=3)


def test_an_encoder_that_changes_its_input_behind_autograds_back_is_an_error() -> None:
    inputs, layer = {"x": torch.randn(4, D)}, nn.Linear(D, D)

    def encode(x: Tensor) -> Tensor:
        rep = layer(x)
        x.data[:, 0] = 7.0  # what a NumPy view does, too: no version is counted
        return rep * 0

    with pytest.raises(ValueError, match="leave their inputs as they are, but one changed x"):
        check_equivalence(encode, inputs, lambda q: q.sum(), chunk=3)


def test_nothing_to_compare_is_an_error() -> None:
    with pytest.raises(ValueError, match="expected parameters to compare, found none: modules="):
        check_equivalence(lambda x: x, torch.randn(4, D), lambda q: q.sum(), chunk=3)
