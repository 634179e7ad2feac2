"""The gradient cache gives the gradient of one backward pass over the same chunks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from xmc.losses import info_nce
from xmc.training.grad_cache import cached_step

D = 6


class Tower(nn.Module):
    """Rows to representations, with dropout."""

    def __init__(self, *extra: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(D, 16), *extra, nn.Tanh(), nn.Dropout(0.4))
        self.out = nn.Linear(16, D)

    def forward(self, x: Tensor) -> Tensor:
        rep: Tensor = self.out(self.layers(x))
        return rep


def contrast(q: Tensor, k: Tensor, scale: Tensor | float = 3.0) -> Tensor:
    """The plain loss, with further keys as negatives."""
    scores = scale * F.normalize(q) @ F.normalize(k).T
    return F.cross_entropy(scores, torch.arange(len(q)))


def gradients(*modules: nn.Module) -> dict[str, Tensor]:
    named = ((f"{i}.{n}", p) for i, m in enumerate(modules) for n, p in m.named_parameters())
    return {name: p.grad for name, p in named if p.grad is not None}


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Differences as a share of the parameter's largest element."""
    assert got.keys() == expected.keys()
    assert expected
    for name, truth in expected.items():
        assert float((got[name] - truth).abs().max()) <= tolerance * float(truth.abs().max()), name


def plain_step(encoders: list[Any], inputs: list[Tensor], loss: Any, *, size: int) -> Tensor:
    """One backward pass through the graphs of all chunks."""
    reps = [
        torch.cat([f(part) for part in x.split(size)])
        for f, x in zip(encoders, inputs, strict=True)
    ]
    value: Tensor = loss(*reps)
    value.backward()
    return value.detach()


@pytest.mark.parametrize("kept", [0, 1, None, 2, 4, 6, 100])
def test_a_tied_encoder_with_kept_graphs_has_the_gradient_of_one_pass(kept: int | None) -> None:
    """6 chunks of both inputs; a kept one is spared its second pass, the last by default."""
    encoder, inputs = Tower().double(), [torch.randn(7, D).double(), torch.randn(8, D).double()]
    twin = copy.deepcopy(encoder)
    calls = count_calls(encoder)
    torch.manual_seed(1)
    expected = plain_step([twin, twin], inputs, contrast, size=3)
    torch.manual_seed(1)
    loss = cached_step([encoder, encoder], inputs, contrast, chunk=3, kept=kept)
    assert len(calls) == 12 - (1 if kept is None else min(kept, 6))
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    assert_same(gradients(encoder), gradients(twin), 1e-12)


def count_calls(encoder: nn.Module) -> list[int]:
    calls: list[int] = []
    encoder.register_forward_pre_hook(lambda _, args: calls.append(len(args[0])))
    return calls


def test_gradients_add_up_over_steps_and_whole_batches() -> None:
    """A chunk larger than the batch, and the gradient that was there before."""
    encoder, x = Tower(), torch.randn(5, D)
    twin = copy.deepcopy(encoder)
    for _ in range(2):
        torch.manual_seed(1)
        plain_step([twin, twin], [x, x + 1], contrast, size=9)
        torch.manual_seed(1)
        cached_step([encoder, encoder], [x, x + 1], contrast, chunk=9)
    assert_same(gradients(encoder), gradients(twin), 1e-6)


def test_without_dropout_the_gradient_is_that_of_the_uncut_batch() -> None:
    f, g = Tower().double().eval(), Tower().double().eval()
    inputs = [torch.randn(9, D).double(), torch.randn(9, D).double()]
    twins = copy.deepcopy([f, g])
    contrast(*(twin(x) for twin, x in zip(twins, inputs, strict=True))).backward()
    cached_step([f, g], inputs, contrast, chunk=[2, 5])
    assert_same(gradients(f, g), gradients(*twins), 1e-12)


def test_one_encoder_needs_no_lists() -> None:
    encoder, x = Tower(), torch.randn(6, D)
    twin = copy.deepcopy(encoder)
    target = torch.randn(6, D)
    torch.manual_seed(1)
    plain_step([twin], [x], lambda q: (q @ q.T - target @ target.T).square().mean(), size=4)
    torch.manual_seed(1)
    cached_step(encoder, x, lambda q: (q @ q.T - target @ target.T).square().mean(), chunk=4)
    assert_same(gradients(encoder), gradients(twin), 1e-6)


def test_the_loss_has_parameters_arguments_and_metrics() -> None:
    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.log_scale = nn.Parameter(torch.tensor(1.5))

        def forward(self, q: Tensor, k: Tensor, factor: float, *, name: str) -> Any:
            value = factor * contrast(q, k, self.log_scale.exp())
            return value, {name: q.detach().norm()}

    loss, encoder = Loss(), Tower()
    inputs = [torch.randn(5, D), torch.randn(5, D)]
    twin, true_loss = copy.deepcopy(encoder), copy.deepcopy(loss)
    torch.manual_seed(1)
    expected = plain_step(
        [twin, twin], inputs, lambda q, k: true_loss(q, k, 0.5, name="norm")[0], size=2
    )
    torch.manual_seed(1)
    value, metrics = cached_step(
        [encoder, encoder],
        inputs,
        loss,
        chunk=2,
        loss_args=[0.5],
        loss_kwargs={"name": "norm"},
    )
    torch.testing.assert_close(value, expected)
    assert float(metrics["norm"]) > 0
    assert_same(gradients(encoder, loss), gradients(twin, true_loss), 1e-6)


def test_the_tiled_loss_works_on_cached_gradients() -> None:
    encoder, scale = Tower(), nn.Parameter(torch.tensor(4.0))
    inputs = [torch.randn(9, D), torch.randn(12, D)]
    twin, true_scale = copy.deepcopy(encoder), nn.Parameter(scale.detach().clone())
    torch.manual_seed(1)
    expected = plain_step(
        [twin, twin],
        inputs,
        lambda q, k: contrast(F.normalize(q), F.normalize(k), true_scale),
        size=4,
    )
    torch.manual_seed(1)
    loss = cached_step(
        [encoder, encoder],
        inputs,
        lambda q, k: info_nce(F.normalize(q), F.normalize(k), scale=scale),
        chunk=4,
    )
    torch.testing.assert_close(loss, expected)
    assert scale.grad is not None
    torch.testing.assert_close(scale.grad, true_scale.grad)
    assert_same(gradients(encoder), gradients(twin), 1e-5)


@pytest.mark.parametrize("kept", [0, 2])
def test_batch_norm_takes_every_chunk_in_once(kept: int) -> None:
    encoder = Tower(nn.BatchNorm1d(16)).double()
    inputs = [torch.randn(8, D).double(), torch.randn(10, D).double() + 2]
    twin = copy.deepcopy(encoder)
    buffer = encoder.layers[1].running_mean
    for _ in range(2):
        torch.manual_seed(1)
        plain_step([twin, twin], inputs, contrast, size=4)
        torch.manual_seed(1)
        cached_step([encoder, encoder], inputs, contrast, chunk=4, kept=kept)
    assert encoder.layers[1].running_mean is buffer
    assert int(encoder.layers[1].num_batches_tracked) == 2 * 5
    for name, expected in twin.named_buffers():
        assert torch.equal(encoder.get_buffer(name), expected), name
    assert_same(gradients(encoder), gradients(twin), 1e-12)


def test_a_spectral_norm_is_replayed_from_the_vectors_of_its_chunk() -> None:
    """Its power iteration moves two buffers in every forward pass, and the weight reads them."""
    encoder = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(D, D)), nn.Tanh())
    encoder.double()
    inputs = [torch.randn(8, D).double(), torch.randn(8, D).double()]
    twin = copy.deepcopy(encoder)
    plain_step([twin, twin], inputs, contrast, size=2)
    cached_step([encoder, encoder], inputs, contrast, chunk=2)
    for name, expected in twin.named_buffers():
        assert torch.equal(encoder.get_buffer(name), expected), name
    assert_same(gradients(encoder), gradients(twin), 1e-12)


@pytest.mark.parametrize("kept", [0, 2])
def test_autocast_holds_for_forward_passes_only(kept: int) -> None:
    encoder = Tower()
    inputs = [torch.randn(7, D), torch.randn(7, D)]
    twin = copy.deepcopy(encoder)
    torch.manual_seed(1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        reps = [torch.cat([twin(part) for part in x.split(3)]) for x in inputs]
        expected = contrast(*reps)
    assert reps[0].dtype == torch.bfloat16
    expected.backward()
    torch.manual_seed(1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = cached_step([encoder, encoder], inputs, contrast, chunk=3, kept=kept)
    assert torch.equal(loss, expected.detach())
    # Both sum gradients of chunks in bfloat16 or float32, in different orders.
    assert_same(gradients(encoder), gradients(twin), 2e-2)


def test_a_scaler_scales_once_and_overflow_skips_the_step() -> None:
    encoder, temperature = Tower(), nn.Parameter(torch.tensor(2.0))
    inputs = [torch.randn(7, D), torch.randn(7, D)]
    twin = copy.deepcopy(encoder)
    torch.manual_seed(1)
    expected = plain_step([twin, twin], inputs, partial(contrast, scale=2.0), size=3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    optimizer = torch.optim.SGD([*encoder.parameters(), temperature], lr=0.1)
    torch.manual_seed(1)
    step = partial(cached_step, [encoder, encoder], inputs, chunk=3, scaler=scaler)
    loss = step(partial(contrast, scale=temperature))
    torch.testing.assert_close(loss, expected)
    scaled = {name: grad / 2**10 for name, grad in gradients(encoder).items()}
    assert_same(scaled, gradients(twin), 1e-6)
    scaler.unscale_(optimizer)
    assert_same(gradients(encoder), gradients(twin), 1e-6)
    scaler.step(optimizer)
    scaler.update()
    before = copy.deepcopy(encoder.state_dict())
    step(lambda q, k: contrast(q, k) * torch.inf)
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**9
    assert all(torch.equal(before[name], value) for name, value in encoder.state_dict().items())


def test_frozen_encoders_are_run_once_and_get_no_gradient() -> None:
    frozen, encoder = Tower().eval().requires_grad_(False), Tower().eval()
    inputs = [torch.randn(7, D), torch.randn(7, D)]
    twin = copy.deepcopy(encoder)
    calls = count_calls(frozen)
    plain_step([frozen, twin], inputs, contrast, size=3)
    del calls[:]

    def loss(q: Tensor, k: Tensor) -> Tensor:
        assert not q.requires_grad
        return contrast(q, k)

    cached_step([frozen, encoder], inputs, loss, chunk=3)
    assert calls == [3, 3, 1]
    assert gradients(frozen) == {}
    assert_same(gradients(encoder), gradients(twin), 1e-6)


def test_inputs_that_want_a_gradient_get_it() -> None:
    frozen = Tower().eval().requires_grad_(False)
    x, k = torch.randn(7, D, requires_grad=True), torch.randn(7, D)
    contrast(frozen(x), k).backward()
    expected, x.grad = x.grad, None
    cached_step([frozen, nn.Identity()], [x, k], contrast, chunk=3)
    torch.testing.assert_close(x.grad, expected)


def test_an_encoder_that_the_loss_leaves_out_is_not_replayed() -> None:
    f, g = Tower(), Tower()
    calls = count_calls(g)
    cached_step([f, g], [torch.randn(4, D)] * 2, lambda q, k: contrast(q, q), chunk=2)
    assert calls == [2, 2]
    assert gradients(g) == {}
    assert gradients(f)


def test_functions_are_encoders_and_their_modules_are_found() -> None:
    """BatchNorm counts once also where the module hides in a function."""
    model = Tower(nn.BatchNorm1d(16)).double()
    x = torch.randn(8, D).double()

    class Owner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = copy.deepcopy(model)

        def encode(self, x: Tensor) -> Tensor:
            return F.normalize(self.model(x))

    class Trainer:
        def __init__(self) -> None:
            self.model = copy.deepcopy(model)
            self.encoder = lambda x: F.normalize(self.model(x))

        def encode(self, x: Tensor) -> Tensor:
            return F.normalize(self.model(x))

    owner, twin, held = Owner(), copy.deepcopy(model), [copy.deepcopy(model)]
    trainers = Trainer(), Trainer()
    torch.manual_seed(1)
    plain_step([lambda x: F.normalize(twin(x))], [x], lambda q: contrast(q, q), size=4)
    own = model
    for encoder, used in (
        (lambda x: F.normalize(own(x)), model),
        (owner.encode, owner.model),
        (trainers[0].encode, trainers[0].model),
        (trainers[1].encoder, trainers[1].model),
        (partial(lambda m, x: F.normalize(m(x)), held[0]), held[0]),
    ):
        torch.manual_seed(1)
        cached_step(encoder, x, lambda q: contrast(q, q), chunk=4)
        assert torch.equal(used.layers[1].running_mean, twin.layers[1].running_mean)
        assert_same(gradients(used), gradients(twin), 1e-12)
    hidden = {"model": copy.deepcopy(twin)}
    cached_step(
        lambda x: hidden["model"](x),
        x,
        lambda q: contrast(q, q),
        chunk=4,
        modules=[hidden["model"]],
    )
    assert int(hidden["model"].layers[1].num_batches_tracked) == 4


@settings(max_examples=25, deadline=None)
@given(
    rows=st.tuples(st.integers(1, 9), st.integers(9, 12)),
    chunk=st.integers(1, 13),
    kept=st.integers(0, 5),
    tied=st.booleans(),
)
def test_any_sizes_are_exact(rows: tuple[int, int], chunk: int, kept: int, tied: bool) -> None:
    f = Tower().double()
    g = f if tied else Tower().double()
    twins = copy.deepcopy([f, g])
    inputs = [torch.randn(n, D).double() for n in rows]
    torch.manual_seed(1)
    plain_step(twins, inputs, contrast, size=chunk)
    torch.manual_seed(1)
    cached_step([f, g], inputs, contrast, chunk=chunk, kept=kept)
    assert_same(gradients(f, g), gradients(*twins), 1e-12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"chunk": 0}, "expected a chunk of at least 1 row, got 0"),
        ({"chunk": [2]}, "expected one chunk for each of 2 encoders, got 1"),
        ({"rep": [None] * 3}, "expected one rep for each of 2 encoders, got 3"),
        ({"kept": -1}, "expected kept or keep_bytes of at least 0, got kept=-1, keep_bytes=0"),
        ({"kept": 1, "keep_bytes": 9}, "expected kept or keep_bytes .* kept=1, keep_bytes=9"),
        ({"encoders": []}, "expected at least one encoder, got none"),
        ({"inputs": [torch.ones(4, D)]}, "expected a list of inputs for 2 encoders, got 1"),
        ({"inputs": torch.ones(2, D)}, "expected a list of inputs for 2 encoders, got Tensor"),
        (
            {"inputs": [torch.ones(0, D), torch.ones(4, D)]},
            "expected inputs of at least one row, got none",
        ),
        (
            {"inputs": [(torch.ones(4, D), torch.ones(3, D)), torch.ones(4, D)]},
            "expected inputs of the same number of rows, got 4 in 0 and 3 in 1",
        ),
        (
            {"inputs": [torch.ones(4, D, requires_grad=True) * 2, torch.ones(4, D)]},
            "expected inputs of encoder 0 that are leaves or need no gradient",
        ),
        ({"loss": lambda q, k: q.sum(1)}, r"expected a loss of one number, got shape \[4\]"),
        ({"loss": lambda q, k: 1.0}, "expected a loss of one number, got float"),
        ({"loss": lambda q, k: q.detach().sum()}, "expected a loss with a gradient"),
    ],
)
def test_errors_of_arguments(arguments: dict[str, Any], message: str) -> None:
    encoder = Tower()
    given = {
        "encoders": [encoder, encoder],
        "inputs": [torch.ones(4, D), torch.ones(4, D)],
        "loss": contrast,
        "chunk": 2,
        **arguments,
    }
    with pytest.raises(ValueError, match=message):
        cached_step(**given)


@pytest.mark.parametrize(
    ("encode", "error", "message"),
    [
        (
            lambda x: x.mul_(2),
            ValueError,
            "expected encoder 1 to leave its inputs as they are, since they are read again, "
            "but it changed its input in place",
        ),
        (
            lambda x: x.sum(0, keepdim=True),
            ValueError,
            r"expected encoder 1 to give 2 representations for 2 rows, got shape \[1, 6\]",
        ),
        (lambda x: (x, x), TypeError, "expected a tensor of representations .* got tuple: rep="),
        (
            lambda x: x[:, : 2 + int(x[0, 0])],
            ValueError,
            r"of one shape and dtype from all chunks of encoder 1, got \[3\] .* and \[5\] .*32",
        ),
    ],
)
def test_errors_of_encoders(
    encode: Callable[[Tensor], Any], error: type[Exception], message: str
) -> None:
    numbers = torch.tensor([1.0, 1, 3, 3])[:, None].expand(4, D).clone()
    with pytest.raises(error, match=message):
        cached_step([Tower(), encode], [torch.ones(4, D), numbers], contrast, chunk=2)


def test_a_failed_step_leaves_buffers_and_random_numbers_in_place() -> None:
    encoder = Tower(nn.BatchNorm1d(16))
    buffer, calls = encoder.layers[1].running_mean, count_calls(encoder)

    def fail(module: nn.Module, args: Any) -> None:
        if len(calls) == 4:
            raise KeyError("second pass")

    encoder.register_forward_pre_hook(fail)
    with pytest.raises(KeyError, match="second pass"):
        cached_step(encoder, torch.randn(4, D), lambda q: contrast(q, q), chunk=2, kept=0)
    assert encoder.layers[1].running_mean is buffer


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_on_a_gpu_its_random_numbers_are_replayed(dtype: torch.dtype) -> None:
    encoder = Tower(nn.BatchNorm1d(16)).cuda()
    inputs = [torch.randn(8, D).cuda(), torch.randn(10, D).cuda()]
    twin = copy.deepcopy(encoder)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**6, enabled=dtype == torch.float16)

    def loss(q: Tensor, k: Tensor) -> Tensor:
        scores = 3 * F.normalize(q.float()) @ F.normalize(k.float()).T
        return F.cross_entropy(scores, torch.arange(len(q), device=q.device))

    torch.manual_seed(1)
    with torch.autocast("cuda", dtype=dtype, enabled=dtype != torch.float32):
        reps = [torch.cat([twin(part) for part in x.split(4)]) for x in inputs]
        expected = loss(*reps)
    scaler.scale(expected).backward()
    after = torch.rand(2, device="cuda")
    torch.manual_seed(1)
    with torch.autocast("cuda", dtype=dtype, enabled=dtype != torch.float32):
        got = cached_step([encoder, encoder], inputs, loss, chunk=4, scaler=scaler)
    assert torch.equal(torch.rand(2, device="cuda"), after)
    torch.testing.assert_close(got, expected.detach())
    assert_same(gradients(encoder), gradients(twin), 1e-5 if dtype == torch.float32 else 2e-2)
    for name, buffer in twin.named_buffers():
        torch.testing.assert_close(encoder.get_buffer(name), buffer)
