"""bag_sum against a loop in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from xmc_kernels._reference import bag_sum as reference
from xmc_kernels.bag_sum import bag_sum


def truth(x: Tensor, ids: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
    out = torch.zeros(len(offsets) - 1, x.shape[1], dtype=torch.float64)
    for bag in range(len(offsets) - 1):
        for entry in range(int(offsets[bag]), int(offsets[bag + 1])):
            out[bag] += weights[entry].double() * x[ids[entry]].double()
    return out


def example(
    num_rows: int, dim: int, num_bags: int, longest: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Bags of 0 to `longest` entries, ids repeated within a bag included."""
    counts = torch.randint(0, longest + 1, (num_bags,))
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    ids = torch.randint(num_rows, (int(offsets[-1]),))
    x = torch.randn(num_rows, dim, dtype=dtype)
    return x, ids, offsets, torch.randn(len(ids), dtype=dtype)


SHAPES = [(16, 32, 64, 8), (7, 33, 65, 3), (1, 1, 5, 2), (5, 17, 0, 3), (9, 16, 2000, 2)]


@pytest.mark.parametrize("shape", SHAPES)
def test_sums_the_rows_of_each_bag(shape: tuple[int, int, int, int]) -> None:
    arguments = example(*shape)
    torch.testing.assert_close(
        bag_sum(*arguments).double(), truth(*arguments), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_reference_is_the_definition(shape: tuple[int, int, int, int]) -> None:
    arguments = example(*shape, dtype=torch.float64)
    expected = truth(*arguments)
    torch.testing.assert_close(reference.bag_sum(*arguments), expected)
    torch.testing.assert_close(bag_sum(*arguments), expected)


def test_is_the_same_for_any_number_of_threads() -> None:
    arguments = example(20, 24, 3000, 5)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(bag_sum(*arguments))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_reads_strided_rows() -> None:
    x, ids, offsets, weights = example(6, 10, 9, 4)
    torch.testing.assert_close(
        bag_sum(x[:, ::2], ids, offsets, weights), bag_sum(x, ids, offsets, weights)[:, ::2]
    )


def test_opcheck() -> None:
    torch.library.opcheck(torch.ops.xmc.bag_sum.default, example(6, 10, 9, 4))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(3)}, ValueError, r"expected x \[N, D\], got \[3\]"),
        ({"ids": torch.tensor([0, 1, 3])}, ValueError, r"expected ids in \[0, 3\), got 0 to 3"),
        ({"ids": torch.tensor([0, -1, 2])}, ValueError, r"expected ids in \[0, 3\), got -1 to 2"),
        ({"ids": torch.tensor([0, 1, 2]).int()}, TypeError, "got torch.int32 and torch.int64"),
        ({"offsets": torch.tensor([0, 2])}, ValueError, r"from 0 to 3 \(the number of ids\)"),
        ({"offsets": torch.tensor([0, 2, 1, 3])}, ValueError, "never fall"),
        ({"offsets": torch.zeros(0, dtype=torch.int64)}, ValueError, r"offsets \[U\+1\]"),
        ({"weights": torch.ones(2)}, ValueError, r"\[3\] to match x and ids"),
        ({"weights": torch.ones(3).double()}, ValueError, "got torch.float64"),
    ],
)
def test_refuses_what_does_not_fit(
    change: dict[str, Tensor], error: type[Exception], message: str
) -> None:
    good = {
        "x": torch.zeros(3, 4),
        "ids": torch.tensor([0, 1, 2]),
        "offsets": torch.tensor([0, 2, 3]),
        "weights": torch.ones(3),
    }
    bag_sum(**good)
    with pytest.raises(error, match=message):
        bag_sum(**(good | change))
