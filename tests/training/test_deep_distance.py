"""Scores of all pairs by tiles: equal to the materialised ones, forward and all gradients."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from xmc.training.deep_distance import max_sim, pair_scores, pair_tokens
from xmc.training.grad_cache import cached_step
from xmc.types import Tokens

D = 4


class Network(nn.Module):
    """[m, n] scores of concatenated pairs, with dropout."""

    def __init__(self, dropout: float = 0.3) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(2 * D, 7), nn.Linear(7, 1)
        self.dropout = nn.Dropout(dropout)

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        q, k = q[:, None].expand(-1, len(k), -1), k[None].expand(len(q), -1, -1)
        hidden = self.dropout(self.first(torch.cat([q, k], 2)).tanh())
        scores: Tensor = self.last(hidden)[..., 0]
        return scores


def leaves(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def criterion(scores: Tensor) -> Tensor:
    return F.cross_entropy(scores, torch.arange(len(scores)))


def in_tiles(distance: Any, q: Tensor, k: Tensor, m: int, n: int) -> Tensor:
    """The same tiles with one graph over all of them."""
    return torch.cat([torch.cat([distance(a, b) for b in k.split(n)], 1) for a in q.split(m)])


def assert_same_gradients(got: list[Any], expected: list[Any]) -> None:
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("tile", [3, (2, 5), (50, 1), 50])
def test_a_trained_distance_has_the_materialised_gradient(tile: int | tuple[int, int]) -> None:
    """Dropout included; random numbers go on as after one pass over the tiles."""
    network = Network().double()
    twin = copy.deepcopy(network)
    q, k = leaves((7, D), (8, D))
    q2, k2 = (x.detach().clone().requires_grad_() for x in (q, k))
    torch.manual_seed(1)
    scores = pair_scores(network, q, k, tile=tile)
    criterion(scores).backward()
    after = torch.rand(2)
    m, n = (tile, tile) if isinstance(tile, int) else tile
    torch.manual_seed(1)
    expected = in_tiles(twin, q2, k2, m, n)
    criterion(expected).backward()
    assert torch.equal(torch.rand(2), after)
    assert torch.equal(scores, expected)
    assert_same_gradients([q, k, *network.parameters()], [q2, k2, *twin.parameters()])


def test_three_passes_with_encoders_and_distance() -> None:
    f, g, network = (nn.Linear(D, D).double(), nn.Linear(D, D).double(), Network(0.0).double())
    twins = copy.deepcopy([f, g, network])
    x, y = torch.randn(7, D).double(), torch.randn(9, D).double()
    cached_step(
        [f, g],
        [x, y],
        lambda q, k: criterion(pair_scores(network, q, k, tile=(3, 4))),
        chunk=2,
    )
    criterion(twins[2](twins[0](x), twins[1](y))).backward()
    for module, twin in zip([f, g, network], twins, strict=True):
        assert_same_gradients(list(module.parameters()), list(twin.parameters()))


def test_only_one_tile_of_pairs_is_there_at_a_time() -> None:
    network = Network(0.0).double()
    sizes: list[int] = []
    network.first.register_forward_hook(lambda *seen: sizes.append(seen[2].numel()))
    q, k = leaves((30, D), (40, D))
    criterion(pair_scores(network, q, k, tile=(4, 5))).backward()
    assert max(sizes) == 4 * 5 * 7
    assert len(sizes) == 2 * 8 * 8


def max_sim_by_hand(q: Tensor, q_mask: Tensor, k: Tensor, k_mask: Tensor) -> Tensor:
    rows = []
    for i in range(len(q)):
        row = []
        for j in range(len(k)):
            total = (q[i].sum() + k[j].sum()) * 0
            for t in q_mask[i].nonzero()[:, 0]:
                similar = [q[i, t] @ k[j, s] for s in k_mask[j].nonzero()[:, 0]]
                total = total + (torch.stack(similar).max() if similar else 0)
            row.append(total)
        rows.append(torch.stack(row))
    return torch.stack(rows)


def test_late_interaction_is_its_definition_with_masked_tokens() -> None:
    q, k = leaves((5, 3, D), (6, 4, D))
    q_mask = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0], [0, 1, 1], [0, 0, 0]])
    k_mask = (torch.arange(4) < torch.tensor([4, 1, 3, 0, 2, 4])[:, None]).long()
    weight = torch.randn(5, 6).double()
    scores = pair_scores(max_sim, (q, q_mask), (k, k_mask), tile=(2, 4))
    (scores * weight).sum().backward()
    q2, k2 = (x.detach().clone().requires_grad_() for x in (q, k))
    expected = max_sim_by_hand(q2, q_mask, k2, k_mask)
    (expected * weight).sum().backward()
    torch.testing.assert_close(scores, expected)
    assert_same_gradients([q, k], [q2, k2])


def test_late_interaction_trains_token_encoders_in_a_cached_step() -> None:
    encoder = nn.Linear(D, D).double()
    twin = copy.deepcopy(encoder)
    x, y = torch.randn(6, 3, D).double(), torch.randn(6, 4, D).double()
    masks = torch.ones(6, 3), torch.ones(6, 4)
    masks[0][2, 1:], masks[1][4, 2:] = 0, 0
    cached_step(
        [encoder, encoder],
        [x, y],
        lambda q, k: criterion(pair_scores(max_sim, (q, masks[0]), (k, masks[1]), tile=4)),
        chunk=2,
    )
    criterion(max_sim_by_hand(twin(x), masks[0], twin(y), masks[1])).backward()
    assert_same_gradients(list(encoder.parameters()), list(twin.parameters()))


def texts(*lengths: int) -> Tokens:
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return Tokens(torch.randint(3, 20, mask.shape) * mask, mask)


def test_pairs_of_tokens_are_the_texts_one_behind_the_other() -> None:
    q, k = texts(2, 4, 1), texts(3, 1)
    pairs = pair_tokens(q, k)
    assert pairs.ids.shape == (6, 7)
    for i in range(3):
        for j in range(2):
            row = 2 * i + j
            joined = [*q.ids[i][q.mask[i] > 0].tolist(), *k.ids[j][k.mask[j] > 0].tolist()]
            assert pairs.mask[row].tolist() == [1] * len(joined) + [0] * (7 - len(joined))
            assert pairs.ids[row, : len(joined)].tolist() == joined
            assert pairs.ids[row, len(joined) :].sum() == 0


def test_a_cross_encoder_is_a_distance_of_texts() -> None:
    shape = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    bert = BertModel(BertConfig(**shape, vocab_size=20, intermediate_size=8)).double().eval()
    head = nn.Linear(8, 1).double()

    def score(q: Tokens, k: Tokens) -> Tensor:
        pairs = pair_tokens(q, k)
        hidden = bert(input_ids=pairs.ids, attention_mask=pairs.mask).last_hidden_state
        return head(hidden[:, 0]).view(len(q), len(k))

    modules = nn.ModuleList([bert, head])
    q, k = texts(2, 4, 1, 3, 2), texts(3, 1, 5, 2, 2)
    expected = score(q, k)
    criterion(expected).backward()
    truth = {name: p.grad for name, p in modules.named_parameters()}
    modules.zero_grad()
    scores = pair_scores(score, q, k, tile=2)
    criterion(scores).backward()
    torch.testing.assert_close(scores, expected)
    for name, parameter in modules.named_parameters():
        torch.testing.assert_close(parameter.grad, truth[name], rtol=1e-10, atol=1e-14)


def test_a_scale_among_the_inputs_gets_the_gradient_of_all_tiles() -> None:
    q, k = leaves((5, D), (6, D))
    scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)

    def scaled(q: tuple[Tensor, Tensor], k: Tensor) -> Tensor:
        return q[1] * q[0] @ k.T

    criterion(pair_scores(scaled, (q, scale), k, tile=2)).backward()
    got = [q.grad, k.grad, scale.grad]
    for x in (q, k, scale):
        x.grad = None
    criterion(scale * q @ k.T).backward()
    for a, x in zip(got, (q, k, scale), strict=True):
        torch.testing.assert_close(a, x.grad)


def test_without_anything_to_train_there_is_no_graph() -> None:
    q, k = torch.randn(4, 2, D), torch.randn(5, 2, D)
    mask = torch.ones(5, 2)
    assert not pair_scores(max_sim, (q, mask[:4]), (k, mask), tile=2).requires_grad
    assert not pair_scores(Network().requires_grad_(False), q[:, 0], k[:, 0], tile=2).requires_grad


def test_errors() -> None:
    q, k = leaves((4, D), (5, D))
    with pytest.raises(ValueError, match="expected tiles of at least 1 row, got 2 x 0"):
        pair_scores(max_sim, q, k, tile=(2, 0))
    with pytest.raises(ValueError, match=r"expected scores \[3, 2\] of a tile .* got shape \[3\]"):
        pair_scores(lambda q, k: q.sum(1), q, k, tile=(3, 2))
    with pytest.raises(ValueError, match=r"expected scores \[3, 2\] of a tile .* got float"):
        pair_scores(lambda q, k: 1.0, q, k, tile=(3, 2))  # type: ignore[arg-type,return-value]
    with pytest.raises(ValueError, match="expected inputs of at least one row, got none"):
        pair_scores(lambda q, k: q @ k.T, q[:0], k, tile=2)
    scores = pair_scores(lambda q, k: q @ k.T, q, k, tile=2)
    with pytest.raises(RuntimeError, match=r"without inputs= for scores of pairs"):
        torch.autograd.grad(scores.sum(), [q])
