"""Where stages are cut: exact against all partitions; what a unit costs."""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from xmc.nn.balance import balanced_cuts, measured_costs, parameter_costs
from xmc.nn.layers import freeze_
from xmc.nn.transformer import TransformerEncoder
from xmc.types import Tokens


def stages_of(costs: list[int], cuts: tuple[int, ...] | list[int]) -> list[int]:
    return [sum(costs[start:stop]) for start, stop in pairwise([0, *cuts, len(costs)])]


@given(st.lists(st.integers(0, 20), min_size=1, max_size=9), st.data())
def test_the_largest_stage_is_the_smallest_that_any_cuts_give(
    costs: list[int], data: st.DataObject
) -> None:
    num_stages = data.draw(st.integers(1, len(costs)))
    cuts = balanced_cuts(costs, num_stages)
    assert len(cuts) == num_stages - 1
    stages = stages_of(costs, cuts)
    every = [stages_of(costs, c) for c in combinations(range(1, len(costs)), num_stages - 1)]
    assert stages in every
    assert (max(stages), sum(c * c for c in stages)) == min(
        (max(other), sum(c * c for c in other)) for other in every
    )


@pytest.mark.parametrize(
    ("costs", "num_stages", "message"),
    [
        ([1, 2], 3, "expected 1 to 2 stages for as many units, got 3"),
        ([1, 2], 0, "expected 1 to 2 stages for as many units, got 0"),
        ([1, -2.5], 1, "expected finite costs of at least 0, got -2.5"),
        ([1, float("nan")], 1, "expected finite costs of at least 0, got nan"),
    ],
)
def test_bad_costs_are_errors(costs: list[float], num_stages: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        balanced_cuts(costs, num_stages)


@pytest.fixture
def encoder() -> TransformerEncoder:
    config = transformers.BertConfig(
        vocab_size=30,
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=12,
    )
    return TransformerEncoder(transformers.BertModel(config))


def test_parameters_of_units_add_up_to_those_of_the_model(encoder: TransformerEncoder) -> None:
    layer = 4 * (16 * 16 + 16) + 2 * 16 * 24 + 24 + 16 + 2 * 2 * 16
    embeddings = (30 + 12 + 2) * 16 + 2 * 16
    assert parameter_costs(encoder) == [embeddings, layer, layer, layer, 16 * 16 + 16]
    assert sum(parameter_costs(encoder)) == sum(p.numel() for p in encoder.parameters())


def test_measuring_changes_nothing_and_finds_the_layer_that_takes_long(
    encoder: TransformerEncoder,
) -> None:
    freeze_(encoder.model, 1)
    slow = encoder.model.encoder.layer[1]
    slow.output.dense.register_forward_hook(_work)
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    tokens = Tokens(torch.randint(0, 30, (4, 8)), torch.ones(4, 8, dtype=torch.int64))
    costs = measured_costs(encoder, tokens, repeats=3)
    assert len(costs) == 5
    assert max(range(5), key=costs.__getitem__) == 2
    assert all(parameter.grad is None for parameter in encoder.parameters())
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(tensor, before[name])
    with pytest.raises(ValueError, match="expected at least 1 repeat, got 0"):
        measured_costs(encoder, tokens, repeats=0)


def _work(*_: object) -> None:
    x = torch.ones(400, 400)
    for _repeat in range(20):
        x = x @ x / 400
