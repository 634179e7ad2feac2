"""BagEncoder against sums in float64, forward and gradients."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from xmc.nn.encoder import BagEncoder
from xmc.nn.lazy import coalesced
from xmc.types import Bag


def make_bag(lengths: list[int], num_features: int) -> Bag:
    """Random bags of the given sizes, ids distinct within a row and shared between rows."""
    rows = [torch.randperm(num_features)[:length] for length in lengths]
    rows.append(torch.zeros(0, dtype=torch.int64))
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    return Bag(torch.cat(rows), offsets, torch.randn(int(offsets[-1])))


def dense_bag(bag: Bag, num_features: int) -> Tensor:
    """[B, num_features] float64."""
    dense = torch.zeros(len(bag), num_features, dtype=torch.float64)
    for row in range(len(bag)):
        for entry in range(int(bag.offsets[row]), int(bag.offsets[row + 1])):
            dense[row, int(bag.ids[entry])] += bag.weights[entry].double()
    return dense


def make_encoder(num_features: int, dim: int, dropout: float = 0.0) -> BagEncoder:
    """With vectors and bias of order one, so that ReLU cuts about half."""
    encoder = BagEncoder(num_features, dim, dropout)
    torch.nn.init.normal_(encoder.table.weight)
    torch.nn.init.normal_(encoder.bias)
    return encoder


CASES = [
    (50, 32, [8] * 16),
    (50, 33, [3, 0, 20, 1]),
    (7, 5, [7, 0, 0]),
    (1, 1, [1]),
    (9, 4, []),
    (9, 4, [0, 0]),
]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize(("num_features", "dim", "lengths"), CASES)
def test_forward_and_gradients(
    num_features: int, dim: int, lengths: list[int], dtype: torch.dtype, tolerance: float
) -> None:
    encoder, bag = make_encoder(num_features, dim).to(dtype), make_bag(lengths, num_features)
    table = encoder.table.weight.detach().double().requires_grad_()
    bias = encoder.bias.detach().double().requires_grad_()
    expected = (dense_bag(bag, num_features) @ table + bias).relu()

    reps = encoder(bag)
    assert reps.shape == (len(lengths), encoder.out_features)
    torch.testing.assert_close(reps.double(), expected, rtol=tolerance, atol=tolerance)

    d_reps = torch.randn(reps.shape, dtype=dtype)
    reps.backward(d_reps)
    expected.backward(d_reps.double())
    torch.testing.assert_close(
        encoder.bias.grad.double(), bias.grad, rtol=tolerance, atol=tolerance
    )
    grad = encoder.table.weight.grad
    assert grad.is_sparse
    torch.testing.assert_close(grad.to_dense().double(), table.grad, rtol=tolerance, atol=tolerance)


def test_gradient_holds_each_row_of_the_batch_once() -> None:
    encoder, bag = make_encoder(100, 8), make_bag([30, 30, 30], 100)
    encoder(bag).sum().backward()
    grad = encoder.table.weight.grad
    assert grad._indices()[0].tolist() == sorted(set(bag.ids.tolist()))
    values = grad._values()
    assert coalesced(grad).values().data_ptr() == values.data_ptr()


def test_gradients_of_two_passes_add_up() -> None:
    encoder = make_encoder(20, 6)
    bags = [make_bag([5, 0, 9], 20), make_bag([2, 20], 20)]
    expected = torch.zeros(20, 6)
    for bag in bags:
        encoder.zero_grad()
        encoder(bag).sum().backward()
        expected += encoder.table.weight.grad.to_dense()
    encoder.zero_grad()
    for bag in bags:
        encoder(bag).sum().backward()
    grad = coalesced(encoder.table.weight.grad)
    torch.testing.assert_close(grad.to_dense(), expected)
    assert grad.indices()[0].tolist() == list(range(20))


def test_an_empty_bag_gives_the_bias() -> None:
    encoder = make_encoder(6, 40)
    assert torch.equal(encoder(make_bag([0], 6))[0], encoder.bias.detach().relu())


def test_dropout_only_in_training() -> None:
    encoder, bag = make_encoder(30, 200, dropout=0.25), make_bag([10] * 20, 30)
    exact = encoder.eval()(bag)
    assert torch.equal(encoder(bag), exact)
    dropped = encoder.train()(bag)
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], exact[kept] / 0.75)
    share = float((~kept & (exact > 0)).sum() / (exact > 0).sum())
    assert abs(share - 0.25) < 0.05


def test_copies_and_states_are_equal() -> None:
    encoder, bag = make_encoder(12, 5), make_bag([4, 6], 12)
    other = BagEncoder(12, 5)
    other.load_state_dict(encoder.state_dict())
    assert list(encoder.state_dict()) == ["bias", "table.weight"]
    assert torch.equal(other(bag), encoder(bag))
    assert torch.equal(copy.deepcopy(encoder)(bag), encoder(bag))
    with torch.inference_mode():
        assert torch.equal(encoder(bag), other(bag))


def test_an_id_beyond_the_table_is_an_error() -> None:
    encoder = make_encoder(12, 5)
    bag = Bag(torch.tensor([3, 12]), torch.tensor([0, 2]), torch.ones(2))
    with pytest.raises((IndexError, RuntimeError), match="12"):
        encoder(bag)


@pytest.mark.parametrize(("num_features", "dim"), [(0, 4), (4, 0)])
def test_refuses_empty_sizes(num_features: int, dim: int) -> None:
    message = f"expected num_features and dim of at least 1, got {num_features} and {dim}"
    with pytest.raises(ValueError, match=message):
        BagEncoder(num_features, dim)
