"""The sigmoid loss against the whole matrix of similarities in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from xmc.losses import SigmoidLoss, sigmoid_loss
from xmc.types import SparseLabels


@pytest.mark.parametrize("scale", [1.0, 100.0])
@pytest.mark.parametrize("shape", [(1, 1, 1), (7, 9, 3), (65, 65, 17)], ids=str)
def test_equals_the_whole_matrix(shape, scale, contrastive_oracle) -> None:
    q, k = contrastive_oracle.features(*shape)
    positive = contrastive_oracle.diagonal(*shape[:2])
    ids = tuple(torch.arange(n) % 5 for n in shape[:2])
    masked = contrastive_oracle.masked_pairs(positive, *ids)
    weights = torch.rand(shape[0]).double() + 0.1
    tensors = (q, k, torch.tensor(scale), torch.tensor(-0.3 * scale))

    def truth(q: Tensor, k: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        return contrastive_oracle.sigmoid_loss(
            *(q, k, scale, bias, positive), masked=masked, weights=weights
        )

    want = contrastive_oracle.with_gradients(truth, tensors)
    for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 1e-4)):
        leaves = [t.detach().to(dtype).clone().requires_grad_() for t in tensors]
        q, k, number, bias = leaves
        loss = sigmoid_loss(
            q, k, scale=number, bias=bias, query_ids=ids[0], key_ids=ids[1], weights=weights
        )
        loss.backward()
        for got, expected in zip([loss, *(leaf.grad for leaf in leaves)], want, strict=True):
            top = expected.abs().max().item()
            assert (got.double() - expected).abs().max().item() <= tolerance * max(top, 0.1)


def test_gradients_pass_gradcheck_with_several_positives() -> None:
    q, k = (torch.randn(n, 3, dtype=torch.float64, requires_grad=True) for n in (4, 3))
    scale, bias = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (2.0, -1.0))
    positives = SparseLabels(
        torch.tensor([0, 2, 2, 3, 4]), torch.tensor([0, 2, 1, 1], dtype=torch.int32), 3
    )
    assert torch.autograd.gradcheck(
        lambda q, k, s, b: sigmoid_loss(q, k, scale=s, bias=b, positives=positives),
        (q, k, scale, bias),
    )


def test_module_has_the_scale_and_bias_of_the_paper() -> None:
    q, k = torch.nn.functional.normalize(torch.randn(2, 6, 8), dim=2)
    loss = SigmoidLoss()
    value = loss(q, k)
    torch.testing.assert_close(value, sigmoid_loss(q, k, scale=10.0, bias=-10.0))
    value.backward()
    for parameter in loss.parameters():
        assert parameter.grad is not None and parameter.grad.abs() > 0
    assert repr(loss) == "SigmoidLoss(scale=10, bias=-10)"
    with pytest.raises(ValueError, match=r"expected a scale above 0, got -1.0"):
        SigmoidLoss(scale=-1.0)


def test_errors_are_those_of_the_engine() -> None:
    x = torch.ones(3, 2)
    with pytest.raises(ValueError, match="expected a finite bias, got nan"):
        sigmoid_loss(x, x, scale=1.0, bias=torch.nan)
    with pytest.raises(ValueError, match="expected at least 3 keys for as many queries, got 2"):
        sigmoid_loss(x, x[:2], scale=1.0, bias=0.0)
