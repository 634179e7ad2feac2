"""FixedFanIn and FixedFanInLinear against a dense layer in float64."""

from __future__ import annotations

import copy
import pickle
import shutil
from collections.abc import Callable

import numpy as np
import pytest
import scipy.sparse
import torch
from torch import Tensor, nn

from xmc.nn.fan_in import FixedFanIn, FixedFanInLinear
from xmc_kernels.checks import validate_index

# in_features, out_features, fan_in, group_size: round, odd in one, odd in all, and the edges.
SIZES = [(32, 64, 8, 1), (32, 65, 8, 1), (33, 77, 5, 7), (6, 1, 6, 1), (9, 12, 9, 4), (5, 4, 1, 2)]

INDUCTOR = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler"),
]


def dense_weight(layer: FixedFanInLinear) -> Tensor:
    """[L, D] float64, entry by entry."""
    weight = layer.weight.detach().double()
    dense = torch.zeros(layer.out_features, layer.in_features, dtype=torch.float64)
    for label in range(layer.out_features):
        for slot in range(layer.fan_in):
            column = int(layer.index[label // layer.group_size, slot])
            dense[label, column] += weight[label, slot]
    return dense


def with_bias(layer: FixedFanInLinear) -> FixedFanInLinear:
    """The layer with a bias that is not zero."""
    assert layer.bias is not None
    nn.init.normal_(layer.bias)
    return layer


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("leading", [(3,), (), (2, 3), (0,), (2, 0, 1)])
def test_equals_the_dense_layer_forward_and_backward(
    sizes: tuple[int, int, int, int], leading: tuple[int, ...]
) -> None:
    in_features, out_features, fan_in, group_size = sizes
    layer = with_bias(FixedFanInLinear(in_features, out_features, fan_in, group_size=group_size))
    assert layer.bias is not None
    dense = dense_weight(layer).requires_grad_()
    bias = layer.bias.detach().double().requires_grad_()
    x = torch.randn(*leading, in_features, requires_grad=True)
    x64 = x.detach().double().requires_grad_()

    out = layer(x)
    expected = x64 @ dense.t() + bias
    assert out.shape == expected.shape
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)

    d_out = torch.randn(out.shape)
    out.backward(d_out)
    expected.backward(d_out.double())
    at_index = dense.grad.gather(1, layer.matrix._label_inputs().long())
    for got, want in (
        (x.grad, x64.grad),
        (layer.weight.grad, at_index),
        (layer.bias.grad, bias.grad),
    ):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)


def test_without_bias() -> None:
    layer = FixedFanInLinear(10, 6, 3, bias=False)
    x = torch.randn(4, 10)
    assert layer.bias is None
    torch.testing.assert_close(layer(x).double(), x.double() @ dense_weight(layer).t())


def test_gradcheck_in_float64() -> None:
    layer = FixedFanInLinear(7, 6, 3, group_size=2, dtype=torch.float64)
    x = torch.randn(2, 5, 7, dtype=torch.float64, requires_grad=True)

    def function(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        parameters = {"weight": weight, "bias": bias}
        return torch.func.functional_call(layer, parameters, (x,))

    assert torch.autograd.gradcheck(function, (x, layer.weight, layer.bias))


@pytest.mark.parametrize("sizes", SIZES)
def test_starts_with_sorted_distinct_inputs_and_bounded_weights(
    sizes: tuple[int, int, int, int],
) -> None:
    in_features, out_features, fan_in, group_size = sizes
    layer = FixedFanInLinear(in_features, out_features, fan_in, group_size=group_size)
    assert layer.index.dtype == torch.uint16
    assert layer.index.shape == (out_features // group_size, fan_in)
    validate_index(layer.index, in_features)
    assert float(layer.weight.detach().abs().max()) <= fan_in**-0.5
    assert layer.bias is not None
    assert not bool(layer.bias.any())


def test_weights_start_uniform() -> None:
    layer = FixedFanInLinear(100, 4000, 25)
    scaled = layer.weight.detach().flatten().double() * 5  # U(-1, 1)
    assert abs(float(scaled.mean())) < 5 * (1 / 3 / 100_000) ** 0.5
    assert abs(float(scaled.var()) - 1 / 3) < 0.01


def test_more_than_65536_inputs_take_a_wider_index() -> None:
    layer = FixedFanInLinear(70_000, 50, 12)
    assert layer.index.dtype == torch.int32
    validate_index(layer.index, 70_000)
    assert int(layer.index.max()) > 65_536
    x = torch.randn(2, 70_000)
    expected = x.double() @ layer.to_dense().weight.double().t()
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-4, atol=1e-5)
    assert FixedFanInLinear(65_536, 2, 3).index.dtype == torch.uint16


def test_the_global_seed_decides_pattern_and_weights() -> None:
    def make(seed: int) -> FixedFanInLinear:
        torch.manual_seed(seed)
        return FixedFanInLinear(40, 30, 6)

    first, again, other = make(1), make(1), make(2)
    assert torch.equal(first.index, again.index)
    assert torch.equal(first.weight, again.weight)
    assert not torch.equal(first.index, other.index)
    assert not torch.equal(first.weight, other.weight)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((4, 10, 5, 1), "expected fan_in of at most in_features = 4, got 5"),
        ((0, 10, 5, 1), "expected in_features of at least 1, got 0"),
        ((4, -1, 2, 1), "expected out_features of at least 1, got -1"),
        ((4, 10, 0, 1), "expected fan_in of at least 1, got 0"),
        ((4, 10, 2, 0), "expected group_size of at least 1, got 0"),
        ((4, 10, 2, 3), "expected group_size to divide out_features = 10, got 3"),
    ],
)
def test_refuses_impossible_sizes(arguments: tuple[int, int, int, int], message: str) -> None:
    in_features, out_features, fan_in, group_size = arguments
    with pytest.raises(ValueError, match=message):
        FixedFanInLinear(in_features, out_features, fan_in, group_size=group_size)


def test_refuses_an_input_of_another_width() -> None:
    layer = FixedFanInLinear(4, 10, 2)
    with pytest.raises(ValueError, match=r"expected x of shape \[\.\.\., 4\], got \[3, 5\]"):
        layer(torch.zeros(3, 5))
    with pytest.raises(ValueError, match=r"expected x of shape \[\.\.\., 4\], got \[\]"):
        layer(torch.tensor(1.0))


def test_autocast_gives_the_dtype_of_a_linear_layer() -> None:
    layer, linear = with_bias(FixedFanInLinear(64, 48, 16)), nn.Linear(64, 48)
    x = torch.randn(5, 64, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, expected = layer(x), linear(x)
    assert out.dtype == expected.dtype == torch.bfloat16
    out.float().square().sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.dtype == x.grad.dtype == torch.float32
    # bfloat16 keeps 8 bits: x is rounded once, the output once, d_out and d_x once.
    dense, bias = dense_weight(layer), layer.bias.detach().double()
    rounded = x.detach().bfloat16().double() @ dense.t() + bias
    assert float((out.detach().double() - rounded).abs().max()) <= rounded.abs().max() * 2**-8
    d_x = 2 * (x.detach().double() @ dense.t() + bias) @ dense
    assert float((x.grad.double() - d_x).abs().max()) <= d_x.abs().max() * 0.02


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_casts_move_the_weights_and_leave_the_index(dtype: torch.dtype) -> None:
    layer = with_bias(FixedFanInLinear(30, 21, 4))
    index, expected = layer.index.clone(), dense_weight(layer)
    x = torch.randn(3, 30)
    layer.to(dtype)
    assert layer.weight.dtype == dtype
    assert torch.equal(layer.index, index)
    tolerance = 0.05 if dtype == torch.bfloat16 else 1e-5
    out = layer(x.to(dtype))
    assert out.dtype == dtype
    assert layer.bias is not None
    torch.testing.assert_close(
        out.double(),
        x.double() @ expected.t() + layer.bias.detach().double(),
        rtol=tolerance,
        atol=tolerance,
    )


def test_module_type_leaves_the_index() -> None:
    layer = FixedFanInLinear(30, 21, 4)
    index = layer.index.clone()
    nn.Sequential(layer).type(torch.float64)
    assert layer.weight.dtype == torch.float64
    assert torch.equal(layer.index, index)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_are_equal_and_independent(
    duplicate: Callable[[FixedFanInLinear], FixedFanInLinear],
) -> None:
    layer = FixedFanInLinear(30, 21, 4)
    x = torch.randn(3, 30)
    other = duplicate(layer)
    assert torch.equal(other(x), layer(x))
    before = layer(x)
    with torch.no_grad():
        other.weight.zero_()
        other.index.copy_(torch.arange(4).to(torch.uint16).expand(21, 4))
    assert torch.equal(layer(x), before)


def test_repr_names_the_sizes() -> None:
    assert repr(FixedFanInLinear(30, 21, 4, group_size=3, bias=False)) == (
        "FixedFanInLinear(in_features=30, out_features=21, fan_in=4, group_size=3, bias=False)"
    )


def test_meta_layers_are_filled_by_reset_parameters() -> None:
    layer = FixedFanInLinear(30, 21, 4, device="meta").to_empty(device="cpu")
    layer.reset_parameters()
    validate_index(layer.index, 30)
    x = torch.randn(3, 30)
    torch.testing.assert_close(layer(x).double(), x.double() @ dense_weight(layer).t())


class TestStateDict:
    def test_round_trip(self) -> None:
        layer = nn.Sequential(with_bias(FixedFanInLinear(30, 24, 4, group_size=2)))
        other = nn.Sequential(FixedFanInLinear(30, 24, 4, group_size=2))
        state = layer.state_dict()
        assert list(state) == ["0.weight", "0.bias", "0.index"]
        assert state["0.index"].dtype == torch.uint16
        assert str(other.load_state_dict(state)) == "<All keys matched successfully>"
        x = torch.randn(3, 30)
        assert torch.equal(other(x), layer(x))

    def test_shares_storage_with_the_layer(self) -> None:
        layer = FixedFanInLinear(30, 24, 4)
        layer.state_dict()["index"].copy_(torch.arange(4).to(torch.uint16).expand(24, 4))
        assert layer.index.tolist() == [[0, 1, 2, 3]] * 24

    def test_assign_takes_the_tensors(self) -> None:
        layer = FixedFanInLinear(30, 24, 4)
        other = FixedFanInLinear(30, 24, 4, device="meta")
        other.load_state_dict(layer.state_dict(), assign=True)
        x = torch.randn(3, 30)
        assert torch.equal(other(x), layer(x))
        assert other.weight.data_ptr() == layer.weight.data_ptr()

    @pytest.mark.parametrize("strict", [True, False])
    @pytest.mark.parametrize(
        ("index", "message"),
        [
            (torch.tensor([[0, 2], [1, 1]]), "0.index: .*sorted, distinct.* row 1 has not"),
            (torch.tensor([[0, 2], [1, 5]]), r"0.index: .*\[0, 5\), got 0 to 5"),
            (torch.tensor([[0, 2, 3], [1, 2, 4]]), r"shape \[2, 2\], got \[2, 3\]"),
        ],
    )
    def test_refuses_an_index_that_kernels_may_not_see(
        self, index: Tensor, message: str, strict: bool
    ) -> None:
        layer = nn.Sequential(FixedFanInLinear(5, 2, 2))
        before = layer[0].index.clone()
        state = layer.state_dict() | {"0.index": index.to(torch.uint16)}
        with pytest.raises(RuntimeError, match=message):
            layer.load_state_dict(state, strict=strict)
        assert torch.equal(layer[0].index, before)

    def test_refuses_an_index_of_another_dtype(self) -> None:
        layer = FixedFanInLinear(5, 2, 2)
        state = layer.state_dict() | {"index": torch.tensor([[0, 2], [1, 3]])}
        with pytest.raises(RuntimeError, match=r"expected index of uint16 or int32, got .*int64"):
            layer.load_state_dict(state)

    def test_names_a_missing_index_as_the_file_does(self) -> None:
        layer = FixedFanInLinear(5, 2, 2)
        state = layer.state_dict()
        del state["index"]
        with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "index"'):
            layer.load_state_dict(state)
        assert layer.load_state_dict(state, strict=False).missing_keys == ["index"]

    def test_refuses_weights_of_another_shape(self) -> None:
        with pytest.raises(RuntimeError, match="size mismatch for weight"):
            FixedFanInLinear(5, 4, 2).load_state_dict(FixedFanInLinear(5, 6, 2).state_dict())


@pytest.mark.parametrize("sizes", SIZES)
def test_dense_and_back(sizes: tuple[int, int, int, int]) -> None:
    in_features, out_features, fan_in, group_size = sizes
    layer = with_bias(FixedFanInLinear(in_features, out_features, fan_in, group_size=group_size))
    linear = layer.to_dense()
    assert torch.equal(linear.weight.double(), dense_weight(layer))
    assert torch.equal(linear.bias, layer.bias)
    again = FixedFanInLinear.from_dense(linear, fan_in, group_size=group_size)
    assert torch.equal(again.index, layer.index)
    assert torch.equal(again.weight, layer.weight)
    assert torch.equal(again.bias, layer.bias)


def test_from_dense_keeps_the_largest_weights() -> None:
    linear = nn.Linear(11, 8)
    layer = FixedFanInLinear.from_dense(linear, 4)
    for label in range(8):
        row = linear.weight[label].detach().abs()
        kept = set(layer.index[label].tolist())
        dropped = [float(row[d]) for d in range(11) if d not in kept]
        assert min(float(row[d]) for d in kept) >= max(dropped)
    assert torch.equal(dense_weight(layer) != 0, dense_weight(layer) == linear.weight.double())


def test_from_dense_scores_a_group_by_its_mean_and_breaks_ties_low() -> None:
    dense = torch.tensor([[9.0, 0, 1, 1, 4], [0, 1, -5, -6, 4]])  # means 4.5, 0.5, 3, 3.5, 4
    assert FixedFanIn.from_dense(dense, 3, group_size=2).index.tolist() == [[0, 3, 4]]
    tied = FixedFanIn.from_dense(torch.tensor([[1.0, -1, 1, 0]]), 2)
    assert tied.index.tolist() == [[0, 1]]
    assert tied.weight.tolist() == [[1, -1]]


def test_from_dense_does_not_follow_the_dense_layer() -> None:
    linear = nn.Linear(6, 4)
    layer = FixedFanInLinear.from_dense(linear, 6)
    before = layer.weight.clone()
    with torch.no_grad():
        linear.weight.zero_()
    assert torch.equal(layer.weight, before)
    assert layer.weight.requires_grad
    assert layer.weight.is_leaf


def test_no_bias_survives_conversion() -> None:
    layer = FixedFanInLinear(6, 4, 3, bias=False)
    linear = layer.to_dense()
    assert linear.bias is None
    assert FixedFanInLinear.from_dense(linear, 3).bias is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_csr_is_the_same_matrix(dtype: torch.dtype) -> None:
    layer = FixedFanInLinear(33, 14, 5, group_size=7, dtype=dtype)
    csr = layer.to_csr()
    assert isinstance(csr, scipy.sparse.csr_matrix)
    assert csr.shape == (14, 33)
    assert csr.nnz == 14 * 5
    assert csr.has_sorted_indices
    np.testing.assert_array_equal(csr.toarray(), dense_weight(layer).numpy())


def test_from_dense_refuses_what_is_no_matrix() -> None:
    with pytest.raises(ValueError, match=r"matrix \[L, D\], got torch.float32 \[3\]"):
        FixedFanIn.from_dense(torch.zeros(3), 1)
    with pytest.raises(ValueError, match="at most in_features = 3, got 4"):
        FixedFanIn.from_dense(torch.zeros(2, 3), 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(4)}, r"shape \[L, F\], got torch.float32 \[4\]"),
        (
            {"weight": torch.zeros(4, 2).int()},
            "a weight of floats, int8 or int4 .* got torch.int32",
        ),
        ({"weight": torch.zeros(6, 2)}, r"index of shape \[3, 2\] to match weight \[6, 2\]"),
        ({"group_size": 3}, "group_size to divide out_features = 4, got 3"),
        ({"in_features": 1}, "fan_in of at most in_features = 1, got 2"),
        ({"in_features": 3}, r"index values in \[0, 3\), got 0 to 3"),
        ({"index": torch.tensor([[1, 0], [2, 3]]).int()}, "row 0 has not"),
    ],
)
def test_validate_names_the_rule(change: dict[str, object], message: str) -> None:
    good = {
        "weight": torch.zeros(4, 2),
        "index": torch.tensor([[0, 1], [2, 3]], dtype=torch.int32).to(torch.uint16),
        "in_features": 4,
        "group_size": 2,
    }
    FixedFanIn(**good).validate()
    with pytest.raises(ValueError, match=message):
        FixedFanIn(**(good | change)).validate()


def test_from_fixed_fan_in_copies_and_checks() -> None:
    matrix = FixedFanInLinear(12, 8, 3, group_size=4).matrix
    bias = torch.randn(8)
    layer = FixedFanInLinear.from_fixed_fan_in(matrix, bias)
    assert torch.equal(layer.to_dense().weight, matrix.to_dense())
    assert torch.equal(layer.bias, bias)
    assert layer.weight.data_ptr() != matrix.weight.data_ptr()
    assert layer.group_size == 4
    with pytest.raises(ValueError, match=r"bias of shape \[8\] to match weight, got \[7\]"):
        FixedFanInLinear.from_fixed_fan_in(matrix, bias[:7])


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")  # of torch's own import
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=INDUCTOR)])
def test_compiles_without_a_graph_break(backend: str) -> None:
    layer = with_bias(FixedFanInLinear(16, 12, 4, group_size=3))
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), layer)
    x = torch.randn(2, 3, 8)
    expected = model(x)
    expected.square().sum().backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    torch._dynamo.reset()
    out = torch.compile(model, fullgraph=True, backend=backend)(x)
    out.square().sum().backward()
    torch.testing.assert_close(out, expected)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_compiles_under_autocast() -> None:
    layer = FixedFanInLinear(16, 12, 4)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, expected = compiled(x), layer(x)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, expected)


def test_trains_in_the_place_of_a_linear_layer() -> None:
    """Gradient descent on a pattern that holds the truth finds it."""
    truth = FixedFanInLinear(20, 10, 4)
    layer = copy.deepcopy(truth)
    nn.init.zeros_(layer.weight)
    x = torch.randn(256, 20)
    target = truth(x).detach()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    for _ in range(200):
        optimizer.zero_grad()
        loss = (layer(x) - target).square().sum(1).mean()
        loss.backward()
        optimizer.step()
    torch.testing.assert_close(layer.weight, truth.weight, rtol=1e-3, atol=1e-4)
