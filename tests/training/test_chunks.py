"""Cutting inputs: every row in exactly one chunk, in order, as a view, whatever the structure."""

from __future__ import annotations

from collections import UserDict
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from xmc.training.chunks import Chunks, TokenBudget, call, cut, num_rows, tensors, with_tensors
from xmc.types import Bag, Tokens


@dataclass(frozen=True)
class Row:
    x: Tensor
    name: str = "r"


def nested(rows: int) -> dict[str, Any]:
    """Row r of every part holds the number r."""
    x = torch.arange(rows)
    return {
        "plain": x,
        "deep": [(x[:, None] * torch.ones(1, 2), None), UserDict({"inner": x})],
        "texts": [str(row) for row in range(rows)],
        "array": np.arange(rows),
        "object": Row(x),
        "bag": Bag(x, torch.arange(rows + 1), x.float()),
        "flag": True,
        "scale": torch.tensor(3.0),
        "weight": nn.Parameter(torch.ones(5, 5)),
        "module": nn.Identity(),
    }


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 20), chunk=st.integers(1, 25))
def test_every_row_is_in_one_chunk_and_in_order(rows: int, chunk: int) -> None:
    inputs = nested(rows)
    assert num_rows(inputs) == rows
    parts = list(cut(inputs, chunk))
    assert [num_rows(part) for part in parts[:-1]] == [chunk] * (len(parts) - 1)
    truth = list(range(rows))
    for get in (
        lambda part: part["plain"].tolist(),
        lambda part: part["deep"][0][0][:, 1].tolist(),
        lambda part: part["deep"][1]["inner"].tolist(),
        lambda part: [int(text) for text in part["texts"]],
        lambda part: part["array"].tolist(),
        lambda part: part["object"].x.tolist(),
        lambda part: part["bag"].ids.tolist(),
    ):
        assert [number for part in parts for number in get(part)] == truth
    for part in parts:
        assert part["deep"][0][1] is None and isinstance(part["deep"][1], UserDict)
        assert part["object"].name == "r" and part["flag"] is True
        for whole in ("scale", "weight", "module"):
            assert part[whole] is inputs[whole]
        assert part["plain"].untyped_storage().data_ptr() == inputs["plain"].data_ptr()


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=20),
    budget=st.integers(1, 40),
    mapped=st.booleans(),
)
def test_token_budgets_hold_with_padding_and_lose_no_token(
    lengths: list[int], budget: int, mapped: bool
) -> None:
    mask = (torch.arange(9) < torch.tensor(lengths)[:, None]).long()
    ids = torch.arange(mask.numel()).view_as(mask) * mask
    inputs = {"input_ids": ids, "attention_mask": mask} if mapped else Tokens(ids, mask)
    parts = [
        Tokens(part["input_ids"], part["attention_mask"]) if mapped else part
        for part in cut(inputs, TokenBudget(budget))
    ]
    row = 0
    for part in parts:
        rows, width = part.ids.shape
        assert rows == 1 or rows * width <= budget
        assert width == max(1, *lengths[row : row + rows])
        assert torch.equal(part.ids, ids[row : row + rows, :width])
        assert torch.equal(part.mask, mask[row : row + rows, :width])
        row += rows
    assert row == len(lengths)
    # No chunk could have taken the first row of the next.
    for part, after in pairwise(parts):
        first = int(after.mask[0].sum())
        assert (len(part) + 1) * max(part.ids.shape[1], first) > budget


def test_a_budget_of_a_bag_counts_entries() -> None:
    bag = Bag(torch.arange(10), torch.tensor([0, 3, 5, 9, 10]), torch.ones(10))
    parts = cut(bag, TokenBudget(5))
    assert [part.ids.tolist() for part in parts] == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
    assert [part.offsets.tolist() for part in parts] == [[0, 3, 5], [0, 4, 5]]


def test_calls_spread_tuples_lists_of_tensors_and_mappings() -> None:
    def seen(*args: Any, **kwargs: Any) -> Any:
        return args, kwargs

    x, row = torch.ones(2), Row(torch.ones(2))
    assert call(seen, x) == ((x,), {})
    assert call(seen, (x, None)) == ((x, None), {})
    assert call(seen, [x, None]) == ((x, None), {})
    assert call(seen, {"a": x}) == ((), {"a": x})
    assert call(seen, UserDict(a=x)) == ((), {"a": x})
    assert call(seen, ["text"]) == ((["text"],), {})
    assert call(seen, row) == ((row,), {})


def test_tensors_have_paths_and_can_be_replaced() -> None:
    inputs = nested(3)
    names = [name for name, _ in tensors(inputs)]
    assert names == [
        "plain",
        "deep.0.0",
        "deep.1.inner",
        "object.x",
        "bag.ids",
        "bag.offsets",
        "bag.weights",
        "scale",
        "weight",
    ]
    doubled = with_tensors(inputs, lambda tensor: tensor * 2)
    assert doubled["deep"][1]["inner"].tolist() == [0, 2, 4]
    assert doubled["weight"] is inputs["weight"]
    assert inputs["plain"].tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("inputs", "chunk", "error", "message"),
    [
        (torch.ones(3), 0, ValueError, "expected a chunk of at least 1 row, got 0"),
        (torch.ones(3), 2.0, TypeError, "a number of rows or a TokenBudget, got 2.0"),
        (torch.ones(3), True, TypeError, "a number of rows or a TokenBudget, got True"),
        (torch.ones(0), 2, ValueError, "expected inputs of at least one row, got none"),
        ([], 2, ValueError, "expected inputs of at least one row, got none"),
        (Chunks([]), 2, ValueError, "expected inputs of at least one row, got none"),
        ({"flag": True}, 2, ValueError, "expected inputs of at least one row, got none"),
        (
            {"ids": torch.ones(3), "more": {"mask": torch.ones(2)}},
            2,
            ValueError,
            "the same number of rows, got 3 in ids and 2 in more.mask",
        ),
        (
            {"ids": (Chunks([torch.ones(3)]), None)},
            2,
            TypeError,
            "expected Chunks as the whole inputs of an encoder, got them in ids.0",
        ),
        (
            torch.ones(3),
            TokenBudget(4),
            TypeError,
            "expected Tokens, a Bag or a mapping with an attention_mask .* got Tensor",
        ),
    ],
)
def test_errors(inputs: Any, chunk: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        cut(inputs, chunk)


def test_a_budget_of_no_token_is_an_error() -> None:
    with pytest.raises(ValueError, match="expected a budget of at least 1 token, got 0"):
        TokenBudget(0)
