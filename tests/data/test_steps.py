"""From an epoch to micro-batches: every row once, similar lengths, never too many tokens."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xmc.config import TrainConfig
from xmc.data.batches import BagStore, Dataset, TokenStore, epoch_batches, epoch_order
from xmc.data.steps import bucket_order, epoch_steps, micro_batches
from xmc.data.tokens import Padding
from xmc.types import SparseLabels, Tokens


def dataset(counts: list[int], padding: Padding | None = None) -> Dataset:
    """Rows of so many tokens; the tokens of row i are all i."""
    indptr = torch.tensor([0, *counts]).cumsum(0)
    ids = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts)).int()
    labels = SparseLabels.from_lists([[row % 3] for row in range(len(counts))], 3)
    return Dataset(TokenStore(indptr, ids, padding or Padding(0)), labels)


def lengths(num_rows: int) -> list[int]:
    generator = torch.Generator().manual_seed(8)
    return torch.randint(0, 31, (num_rows,), generator=generator).tolist()


@settings(deadline=None, max_examples=60, derandomize=True)
@given(
    st.integers(1, 90),
    st.integers(1, 9),
    st.integers(1, 4),
    st.integers(0, 5),
    st.sampled_from([0, 32, 100]),
    st.sampled_from([1, 8]),
)
def test_an_epoch_holds_every_row_once_and_no_pass_too_many_tokens(
    num_rows: int, batch_size: int, accumulation: int, pool: int, max_tokens: int, multiple: int
) -> None:
    data = dataset(lengths(num_rows), Padding(0, multiple))
    options = TrainConfig(
        batch_size=batch_size, accumulation=accumulation, length_pool=pool, max_tokens=max_tokens
    )
    steps = list(epoch_steps(data, options, epoch=1))
    sizes = [sum(len(chunk) for chunk in chunks) for chunks in steps]
    whole, rest = divmod(num_rows, batch_size * accumulation)
    assert sizes == [batch_size * accumulation] * whole + [rest] * (rest > 0)
    rows = torch.cat([chunk for chunks in steps for chunk in chunks])
    assert sorted(rows.tolist()) == list(range(num_rows))
    for chunks in steps:
        for chunk in chunks:
            inputs = data.batch(chunk).inputs
            assert isinstance(inputs, Tokens)
            assert inputs.ids.shape[1] % multiple == 0 or multiple == 1
            assert inputs.ids.numel() <= max_tokens if max_tokens else len(chunk) <= batch_size
    again = [[chunk.tolist() for chunk in chunks] for chunks in epoch_steps(data, options, 1)]
    assert again == [[chunk.tolist() for chunk in chunks] for chunks in steps]
    for start in (0, len(steps) // 2, len(steps)):  # an interrupted epoch goes on
        later = [[c.tolist() for c in chunks] for chunks in epoch_steps(data, options, 1, start)]
        assert later == again[start:]


def test_without_pool_the_steps_are_those_of_the_epoch_order() -> None:
    data, options = dataset(lengths(50)), TrainConfig(batch_size=4, accumulation=3, max_tokens=40)
    expected = epoch_batches(epoch_order(50, options.seed, 2), 12)
    for chunks, rows in zip(epoch_steps(data, options, 2), expected, strict=True):
        assert sorted(torch.cat(chunks).tolist()) == sorted(rows.tolist())


def test_bags_are_cut_in_their_order() -> None:
    indptr = torch.arange(11)
    store = BagStore(indptr, torch.arange(10, dtype=torch.int32), torch.ones(10), 10)
    data = Dataset(store, SparseLabels.from_lists([[0]] * 10, 1))
    options = TrainConfig(batch_size=2, accumulation=2)
    steps = list(epoch_steps(data, options, 3))
    assert [[len(chunk) for chunk in chunks] for chunks in steps] == [[2, 2], [2, 2], [2]]
    order = epoch_order(10, options.seed, 3)
    assert torch.equal(torch.cat([chunk for chunks in steps for chunk in chunks]), order)


def test_a_pool_pads_far_less_and_its_steps_come_in_random_order() -> None:
    data = dataset(lengths(400))

    def padded(pool: int, epoch: int = 0) -> list[int]:
        options = TrainConfig(batch_size=10, length_pool=pool)
        batches = [data.batch(rows).inputs for (rows,) in epoch_steps(data, options, epoch)]
        return [batch.ids.numel() for batch in batches if isinstance(batch, Tokens)]

    tokens = sum(lengths(400))
    assert sum(padded(0)) > 1.7 * tokens
    assert sum(padded(40)) < 1.1 * tokens
    assert sum(padded(40)) < sum(padded(5)) < sum(padded(0))
    widths = padded(40)
    assert widths != sorted(widths)
    assert widths != padded(40, epoch=1)


def test_buckets_by_hand() -> None:
    """Two pools of two slices and a tail: sorted within a pool, whole slices shuffled."""
    order = torch.tensor([5, 3, 8, 1, 0, 7, 2, 6, 4])
    widths = torch.tensor([9, 1, 9, 2, 4, 3, 4, 1, 0])
    made = bucket_order(order, widths, batch_size=2, pool=2, generator=torch.Generator())
    slices = [rows.tolist() for rows in made.split(2)]
    assert sorted(slices[:2]) == [[3, 1], [5, 8]]  # equal widths stay as they came
    assert sorted(slices[2:4]) == [[0, 2], [6, 7]]
    assert slices[4] == [4]
    short = bucket_order(order[:1], widths[:1], batch_size=2, pool=2, generator=torch.Generator())
    assert short.tolist() == [5]


def test_micro_batches_by_hand() -> None:
    rows, widths = torch.tensor([10, 11, 12, 13, 14]), torch.tensor([3, 8, 1, 3, 2])

    def cut(batch_size: int, max_tokens: int = 0) -> list[list[int]]:
        slices = micro_batches(rows, widths, batch_size=batch_size, max_tokens=max_tokens)
        return [chunk.tolist() for chunk in slices]

    assert cut(5) == [[10, 11, 12, 13, 14]]  # nothing to gain from sorting
    assert cut(2) == [[11, 10], [13, 14], [12]]
    assert cut(2, 9) == [[11], [10, 13, 14], [12]]  # 1 x 8, 3 x 3, 1 x 1
    assert cut(2, 40) == [[11, 10, 13, 14, 12]]
    with pytest.raises(ValueError, match=r"at most 7 tokens \(max_tokens\), got row 11 of 8"):
        cut(2, 7)


def test_padding_reaches_the_multiple_but_not_past_the_limit() -> None:
    counts = torch.tensor([0, 1, 7, 8, 9, 28, 29, 31])
    assert Padding(0).widths(counts).tolist() == [1, 1, 7, 8, 9, 28, 29, 31]
    assert Padding(0, 8).widths(counts).tolist() == [8, 8, 8, 8, 16, 32, 32, 32]
    assert Padding(0, 8, limit=30).widths(counts).tolist() == [8, 8, 8, 8, 16, 30, 30, 31]
    store = dataset([2, 0, 3, 1], Padding(9, 4)).features
    assert isinstance(store, TokenStore)
    tokens = store.rows(torch.tensor([2, 0]))
    assert tokens.ids.tolist() == [[2, 2, 2, 9], [0, 0, 9, 9]]
    assert tokens.mask.tolist() == [[1, 1, 1, 0], [1, 1, 0, 0]]
    assert store.view(torch.tensor([2, 1])).widths(torch.tensor([1, 0])).tolist() == [4, 4]
