"""Every kernel once on small odd shapes: what `scripts/gpu_check` runs under compute-sanitizer."""

from __future__ import annotations

import itertools

import pytest
import torch

from xmc_kernels import float8
from xmc_kernels._reference import classifier as reference_step
from xmc_kernels._reference import fan_in as reference
from xmc_kernels._reference import similarity as reference_similarity
from xmc_kernels._reference import topk as reference_topk
from xmc_kernels.layer import Layer
from xmc_kernels.pairs import Pairs
from xmc_kernels.update import ClassifierState, UpdateRule, make_state

LAYERS = [
    # slots, labels that share an index row, dtype of the weights
    (7, 1, torch.bfloat16),
    (70, 5, torch.float32),
    (7, 1, float8.DTYPE),
    (70, 5, float8.DTYPE),
    ((3, 8), 1, torch.bfloat16),
    ((5, 32), 5, torch.float16),
    ((3, 8), 1, float8.DTYPE),
    (None, 1, torch.bfloat16),
]


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [13, 141])
@pytest.mark.parametrize(("slots", "group", "dtype"), LAYERS, ids=str)
def test_every_kernel_stays_in_its_tensors(
    slots, group, dtype, rows, problem, patterned, device, monkeypatch
) -> None:
    from xmc_kernels._triton import classifier, densify, fan_in, tiles, topk

    # Chunks of labels, the last of them short.
    monkeypatch.setattr(densify, "dense_labels", lambda x, num_labels: min(num_labels, 33))
    monkeypatch.setattr(tiles, "SCRATCH_BYTES", 0)
    monkeypatch.setattr(tiles, "SCORE_BYTES", 4 * rows * 32)
    pattern = slots if isinstance(slots, tuple) else None
    if pattern is None:
        p = problem(rows, 96, 85, slots or 96, group)
    else:
        p, _ = patterned(rows, 96, 85, pattern, group)
    x = p.x.to(device, torch.bfloat16)
    index = None if slots is None else p.index.to(device)
    bias = p.bias.to(device)
    batch = [t.to(device) for t in (p.indptr, p.indices)]

    def layer() -> Layer:
        weight = p.weight.to(device, copy=True)
        if dtype != float8.DTYPE:
            return Layer(weight.to(dtype), index, bias.clone(), pattern)
        scale = float8.row_scale(weight)
        return Layer(float8.quantize(weight, scale), index, bias.clone(), pattern, scale)

    def moments(state: ClassifierState) -> tuple[torch.Tensor, ...]:
        """As numbers."""
        pairs = ((state.weight_m, state.weight_m_scale), (state.weight_v, state.weight_v_scale))
        return tuple(m if s is None else float8.dequantize(m, s) for m, s in pairs)

    def close(ours: torch.Tensor, expected: torch.Tensor, rtol: float = 0.0) -> None:
        """An eighth is a step between float8 codes: sums that differ may draw the other."""
        error = 0.02 * expected.abs().max().float().item()
        torch.testing.assert_close(ours.float(), expected.float(), rtol=rtol, atol=error)

    grad = torch.randn(rows, 85).to(device, torch.bfloat16)
    by_layer = [] if slots is None else ["walk"] if pattern is None else ["walk", "blocks"]
    for name in by_layer:
        close(fan_in.fan_in_linear(x, layer(), by=name), reference.fan_in_linear(x, layer()))
        expected = reference.fan_in_linear_backward(grad, x, layer())
        for deterministic in (False, True):
            ours = fan_in.fan_in_linear_backward(grad, x, layer(), deterministic, by=name)
            close(ours[0], expected[0])
            close(ours[1], expected[1])
    close(
        topk.fan_in_topk(x, layer(), 5, None, 0)[0],
        reference_topk.fan_in_topk(x, layer(), 5, None, 0)[0],
    )
    for name, moment_dtype in itertools.product((*by_layer, "densify"), ("float32", "float8")):
        rule = UpdateRule("adamw", betas=(0.5, 0.5), weight_decay=0.1, moment_dtype=moment_dtype)
        results = []
        for run, options in (
            (reference_step.classifier_step, {}),
            (classifier.classifier_step, {"by": name, "deterministic": name == "blocks"}),
        ):
            own = layer()
            state = make_state(own.weight, own.bias, rule)
            numbers = ("bce", rule, 0.01, 1, 1 / rows, True, 0)
            value, d_x = run(x, own, *batch, state, *numbers, **options)
            results.append((value, d_x, own.bias, *moments(state)))
        for ours, expected in zip(results[1], results[0], strict=True):
            close(ours, expected, rtol=0.15 if moment_dtype == "float8" else 0.0)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(13, 21, 5), (141, 333, 70)], ids=str)
def test_losses_of_similarities_stay_in_their_tensors(shape, dtype, device, monkeypatch) -> None:
    from xmc_kernels._triton import similarity, tiles

    # Parts of one tile each way.
    monkeypatch.setattr(similarity, "_PART_ROWS", 1)
    monkeypatch.setattr(tiles, "SCRATCH_BYTES", 0)
    rows, keys, dim = shape
    g = torch.Generator().manual_seed(rows)
    q, k = (torch.randn(n, dim, generator=g).to(device, dtype) for n in (rows, keys))
    positive = torch.rand(rows, keys, generator=g) < 0.05
    indptr = torch.zeros(rows + 1, dtype=torch.int64)
    indptr[1:] = positive.sum(1).cumsum(0)
    ids = (torch.randint(5, (n,), generator=g) for n in (rows, keys))
    tensors = (indptr, positive.nonzero()[:, 1].int(), *ids)
    pairs = Pairs(*(t.to(device) for t in tensors))
    target = torch.rand(pairs.num_pairs, generator=g).to(device)
    weight = torch.rand(rows, generator=g).to(device)
    scale, bias = torch.tensor(2.0, device=device), torch.tensor(-1.0, device=device)
    results = []
    for module in (similarity, reference_similarity):
        numbers = (q, k, scale, bias, pairs, weight, True, True)
        results.append(list(module.sigmoid_loss(*numbers)))
        for columns, decoupled in ((None, False), (target, False), (target, True)):
            numbers = (q, k, scale, pairs, target, columns, decoupled, True, True)
            results[-1] += module.softmax_loss(*numbers)
    for ours, expected in zip(*results, strict=True):
        error = 0.02 * expected.abs().max().float().item()
        torch.testing.assert_close(ours.float(), expected.float(), rtol=0, atol=error)
