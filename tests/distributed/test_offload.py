"""OffloadedAdamW against torch.optim.AdamW and a float64 oracle, overflow, state, memory."""

from __future__ import annotations

import copy
import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from transformers import BertConfig, BertModel

from xmc.config import Config, ConfigError, from_dict
from xmc.distributed import offload, offload_step
from xmc.distributed.offload import OffloadedAdamW
from xmc.nn.transformer import TransformerEncoder
from xmc.training.byte_meter import AllocationMeter
from xmc.training.encoder_optimizer import make_encoder_optimizer

SHAPES = [(7, 5), (64,), (3, 4, 5), (1,), (), (40, 9), (0, 3)]
OPTIONS: dict[str, Any] = {"lr": 0.05, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}


@pytest.fixture(params=["in place", "staged"])
def staged(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Both ways of a step: on host memory itself, and through buffers as on a GPU."""
    if request.param == "staged":
        stage_(monkeypatch)
    return bool(request.param == "staged")


def stage_(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (offload, offload_step):
        monkeypatch.setattr(module, "is_staged", lambda device: True)


def make(dtype: torch.dtype = torch.float32, seed: int = 0) -> list[nn.Parameter]:
    draw = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=draw).to(dtype)) for shape in SHAPES]


def gradient_(parameters: list[nn.Parameter], step: int, size: float = 1.0) -> None:
    """Random gradients; at each step another parameter has none."""
    draw = torch.Generator().manual_seed(1000 + step)
    for number, parameter in enumerate(parameters):
        grad = size * torch.randn(parameter.shape, generator=draw)
        absent = number == step % (2 * len(parameters)) or not parameter.requires_grad
        parameter.grad = None if absent else grad.to(parameter.dtype)


def grouped(parameters: list[nn.Parameter]) -> list[dict[str, Any]]:
    return [
        {"params": parameters[::2]},
        {"params": parameters[1::2], "weight_decay": 0.0, "lr": 0.01, "betas": (0.7, 0.9)},
    ]


def values(parameters: list[nn.Parameter]) -> list[Tensor]:
    return [p.detach().clone() for p in parameters]


def snapshot(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return copy.deepcopy(optimizer.state_dict())


def assert_same_state(first: dict[str, Any], second: dict[str, Any]) -> None:
    assert first["state"].keys() == second["state"].keys()
    for slot, state in first["state"].items():
        assert state.keys() == second["state"][slot].keys()
        for name, value in state.items():
            assert value.dtype == second["state"][slot][name].dtype
            assert torch.equal(value, second["state"][slot][name]), (slot, name)


@pytest.mark.parametrize("bucket_size", [16, 100, 2**22])
@pytest.mark.parametrize("clip", ["none", "inside", "outside"])
def test_equals_adamw_over_a_schedule(staged: bool, bucket_size: int, clip: str) -> None:
    ours, theirs = make(), make()
    for parameters in (ours, theirs):
        parameters[2].requires_grad_(False)
    max_norm = 5.0 if clip == "inside" else 0.0
    optimizer = OffloadedAdamW(grouped(ours), **OPTIONS, max_norm=max_norm, bucket_size=bucket_size)
    adamw = torch.optim.AdamW(grouped(theirs), **OPTIONS, foreach=False)
    schedules = [
        torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=100) for o in (optimizer, adamw)
    ]
    clipped = 0
    for step in range(100):
        size = 0.05 + (step % 3) / 3
        for parameters in (ours, theirs):
            gradient_(parameters, step, size)
        norm = float(nn.utils.get_total_norm([p.grad for p in theirs if p.grad is not None]))
        if clip != "none":
            nn.utils.clip_grad_norm_(theirs, 5.0)
            clipped += norm > 5
        if clip == "outside":
            nn.utils.clip_grad_norm_(ours, 5.0)
        before = [None if p.grad is None else p.grad.clone() for p in ours]
        optimizer.step()
        adamw.step()
        for parameter, grad in zip(ours, before, strict=True):
            assert grad is None or torch.equal(parameter.grad, grad)  # type: ignore[arg-type]
        if clip == "inside":
            assert optimizer.last_norm == pytest.approx(norm, rel=1e-5)
        for schedule in schedules:
            schedule.step()
    assert clipped == 0 if clip == "none" else 20 < clipped < 80
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-6)
    assert torch.equal(ours[2], make()[2])
    counts = [float(state["step"]) for state in optimizer.state_dict()["state"].values()]
    assert counts == [float(state["step"]) for state in adamw.state_dict()["state"].values()]
    assert min(counts) < 100 or not counts


class Oracle:
    """Adam with decoupled decay (Loshchilov & Hutter, algorithm 2) in float64, for one array."""

    def __init__(self, start: Tensor) -> None:
        self.master = start.double().numpy().copy()
        self.m, self.v = np.zeros_like(self.master), np.zeros_like(self.master)
        self.t = 0

    def step(self, grad: Tensor, lr: float, options: dict[str, Any]) -> None:
        g = grad.double().numpy()
        (beta1, beta2), self.t = options["betas"], self.t + 1
        self.m = beta1 * self.m + (1 - beta1) * g
        self.v = beta2 * self.v + (1 - beta2) * g * g
        m_hat, v_hat = self.m / (1 - beta1**self.t), self.v / (1 - beta2**self.t)
        update = m_hat / (np.sqrt(v_hat) + options["eps"]) + options["weight_decay"] * self.master
        self.master = self.master - lr * update


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_masters_follow_the_oracle(staged: bool, dtype: torch.dtype) -> None:
    parameters = make(dtype)
    oracles = [Oracle(p.detach()) for p in parameters]
    optimizer = OffloadedAdamW(parameters, **OPTIONS, max_norm=6.0, bucket_size=48)
    for step in range(100):
        lr = optimizer.param_groups[0]["lr"] = 1e-3 * (1 - step / 100)
        gradient_(parameters, step, 0.2 + (step % 2) / 2)
        grads = [None if p.grad is None else p.grad.double() for p in parameters]
        norm = math.sqrt(sum(float(g.square().sum()) for g in grads if g is not None))
        factor = min(1.0, 6.0 / norm)
        for oracle, grad in zip(oracles, grads, strict=True):
            if grad is not None:
                oracle.step(grad * factor, lr, OPTIONS)
        optimizer.step()
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    for parameter, oracle in zip(parameters, oracles, strict=True):
        state = optimizer.state[parameter]
        master = state.get("master", parameter.detach())
        assert master.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        for found, expected in (
            (master, oracle.master),
            (state["exp_avg"], oracle.m),
            (state["exp_avg_sq"], oracle.v),
        ):
            np.testing.assert_allclose(found.double(), expected, rtol=tolerance, atol=tolerance)
        assert torch.equal(parameter.detach(), master.to(dtype))
    # The rate is far below a bfloat16's last place: without masters nothing would move.
    assert not torch.equal(parameters[0].detach(), make(dtype)[0].detach())


@settings(max_examples=30, deadline=None)
@given(
    bucket_size=st.integers(16, 300),
    sizes=st.lists(st.integers(0, 200), min_size=1, max_size=6),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    through_buffers=st.booleans(),
)
def test_any_bucket_size_gives_the_same_bits(
    bucket_size: int, sizes: list[int], dtype: torch.dtype, through_buffers: bool
) -> None:
    results = []
    with pytest.MonkeyPatch.context() as patch:
        for size, staged in ((2**22, False), (bucket_size, through_buffers)):
            if staged:
                stage_(patch)
            draw = torch.Generator().manual_seed(3)
            parameters = [nn.Parameter(torch.randn(n, generator=draw).to(dtype)) for n in sizes]
            optimizer = OffloadedAdamW(parameters, lr=0.1, bucket_size=size)
            for _ in range(3):
                for parameter in parameters:
                    parameter.grad = torch.randn(parameter.shape, generator=draw).to(dtype)
                optimizer.step()
            results.append((values(parameters), snapshot(optimizer)))
    (first, first_state), (second, second_state) = results
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)
    assert_same_state(first_state, second_state)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("at", [0, 5])
def test_an_overflow_changes_nothing_even_in_the_last_bucket(
    staged: bool, bad: float, at: int
) -> None:
    parameters, twins = make(torch.bfloat16), make(torch.bfloat16)
    optimizer, other = (OffloadedAdamW(p, **OPTIONS, bucket_size=16) for p in (parameters, twins))
    for step in range(4):
        for each in (parameters, twins):
            gradient_(each, 20 + step)
        if step in (0, 2):
            before, state = values(parameters), snapshot(optimizer)
            grad = parameters[at].grad
            assert grad is not None
            good = grad.clone()
            grad.view(-1)[-1] = bad
            if step == 0:
                with pytest.warns(UserWarning, match="not finite: OffloadedAdamW skips this step"):
                    optimizer.step()
                assert optimizer.state_dict()["state"] == {}
            else:
                optimizer.step()
            for parameter, old in zip(parameters, before, strict=True):
                assert torch.equal(parameter.detach(), old)
            assert_same_state(optimizer.state_dict(), state)
            grad.copy_(good)
        optimizer.step()
        other.step()
    assert optimizer.overflows == 2
    for parameter, twin in zip(parameters, twins, strict=True):
        assert torch.equal(parameter, twin)
    assert_same_state(optimizer.state_dict(), other.state_dict())


def test_large_finite_gradients_are_no_overflow() -> None:
    """Their squares overflow float32; Adam's step has the size of the rate."""
    parameter = nn.Parameter(torch.zeros(50))
    optimizer = OffloadedAdamW([parameter], lr=0.1, weight_decay=0.0, max_norm=1.0)
    parameter.grad = torch.full((50,), 1e30)
    optimizer.step()
    assert optimizer.overflows == 0
    assert optimizer.last_norm == pytest.approx(1e30 * math.sqrt(50))
    torch.testing.assert_close(parameter.detach(), torch.full((50,), -0.1))


@pytest.mark.parametrize("max_norm", [0.0, 3.0])
@pytest.mark.parametrize("unscaled_first", [False, True])
def test_a_grad_scaler_scales_and_skips(
    staged: bool, unscaled_first: bool, max_norm: float
) -> None:
    """float16 gradients by the scaler's own protocol, float32 ones also unscaled before."""
    dtype = torch.float32 if unscaled_first else torch.float16
    parameters, twins = make(dtype), make(dtype)
    optimizer = OffloadedAdamW(parameters, **OPTIONS, max_norm=max_norm, bucket_size=32)
    other = OffloadedAdamW(twins, **OPTIONS, max_norm=max_norm, bucket_size=32)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    for step in range(4):
        gradient_(parameters, 20 + step)
        gradient_(twins, 20 + step)
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad = scaler.scale(parameter.grad).to(dtype)  # type: ignore[union-attr]
        if step == 2:
            before, state = values(parameters), snapshot(optimizer)
            parameters[5].grad[-1, -1] = math.inf  # type: ignore[index]
        if unscaled_first:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        if step != 2:
            other.step()
            norm = other.last_norm if max_norm else math.nan  # the scaler has looked for overflow
            assert optimizer.last_norm == pytest.approx(norm, rel=1e-6, nan_ok=True)
            continue
        assert float(scaler.get_scale()) == 32.0
        for parameter, old in zip(parameters, before, strict=True):
            assert torch.equal(parameter.detach(), old)
        assert_same_state(optimizer.state_dict(), state)
        scaler.update(64.0)
    assert optimizer.overflows == 1
    assert not hasattr(optimizer, "found_inf")
    for parameter, twin in zip(parameters, twins, strict=True):
        torch.testing.assert_close(parameter, twin, rtol=1e-6, atol=1e-6)


def test_state_goes_to_adamw_and_back(staged: bool) -> None:
    ours, theirs = make(), make()
    optimizer = OffloadedAdamW(grouped(ours), **OPTIONS, bucket_size=64)
    adamw = torch.optim.AdamW(grouped(theirs), **OPTIONS)
    runs = [(ours, optimizer), (theirs, adamw)]
    step = 0

    def advance() -> None:
        nonlocal step
        for _ in range(4):
            for parameters, by in runs:
                gradient_(parameters, step)
                by.step()
            step += 1

    advance()
    # Each goes on with the state of the other.
    states = [snapshot(by) for _, by in runs]
    optimizer = OffloadedAdamW(grouped(ours), lr=9.0, bucket_size=32)
    adamw = torch.optim.AdamW(grouped(theirs), lr=9.0)
    optimizer.load_state_dict(states[1])
    adamw.load_state_dict(states[0])
    assert optimizer.param_groups[0]["lr"] == adamw.param_groups[0]["lr"] == OPTIONS["lr"]
    runs = [(ours, optimizer), (theirs, adamw)]
    advance()
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-6)
    for slot, state in optimizer.state_dict()["state"].items():
        assert state.keys() == {"step", "exp_avg", "exp_avg_sq"}
        for name, value in adamw.state_dict()["state"][slot].items():
            torch.testing.assert_close(state[name], value, rtol=1e-5, atol=1e-6)


def test_masters_kept_by_adamw_in_16_bits_are_made_anew() -> None:
    """AdamW casts all it loads to the parameters' dtype and never steps a master."""
    parameters = make(torch.bfloat16)
    optimizer = OffloadedAdamW(parameters, lr=1e-4)
    gradient_(parameters, 50)
    optimizer.step()
    adamw = torch.optim.AdamW(parameters, lr=0.1)
    adamw.load_state_dict(snapshot(optimizer))
    gradient_(parameters, 51)
    adamw.step()
    optimizer.load_state_dict(snapshot(adamw))
    assert "master" not in optimizer.state[parameters[0]]
    before = values(parameters)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step()
    for parameter, old in zip(parameters, before, strict=True):
        assert torch.equal(parameter.detach(), old)
        assert torch.equal(optimizer.state[parameter]["master"], old.float())
        assert optimizer.state[parameter]["exp_avg"].dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("way", ["torch.save", "safetensors", "deepcopy"])
def test_a_resumed_run_has_the_same_bits(
    staged: bool, dtype: torch.dtype, way: str, tmp_path: Path
) -> None:
    def advance(
        parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer, steps: range
    ) -> None:
        for step in steps:
            gradient_(parameters, step)
            optimizer.step()

    # The first steps lack one parameter each: slabs of the resumed run differ.
    whole = make(dtype)
    expected = OffloadedAdamW(grouped(whole), **OPTIONS, bucket_size=48)
    advance(whole, expected, range(9))
    parameters = make(dtype)
    optimizer = OffloadedAdamW(grouped(parameters), **OPTIONS, bucket_size=48)
    advance(parameters, optimizer, range(5))
    if way == "deepcopy":
        parameters, resumed = copy.deepcopy((parameters, optimizer))
        assert resumed.bucket_size == 48
    else:
        state = through_file(optimizer.state_dict(), way, tmp_path)
        parameters = [nn.Parameter(p.detach().clone()) for p in parameters]
        resumed = OffloadedAdamW(grouped(parameters), lr=3.0, bucket_size=48)
        resumed.load_state_dict(state)
        assert_same_state(resumed.state_dict(), optimizer.state_dict())
    advance(make(dtype), optimizer, range(1))  # of the old one, on its own parameters: no effect
    advance(parameters, resumed, range(5, 9))
    for parameter, other in zip(parameters, whole, strict=True):
        assert torch.equal(parameter, other)
    assert_same_state(resumed.state_dict(), expected.state_dict())


def through_file(state: dict[str, Any], way: str, folder: Path) -> dict[str, Any]:
    if way == "torch.save":
        buffer = io.BytesIO()
        torch.save(state, buffer)
        buffer.seek(0)
        loaded: dict[str, Any] = torch.load(buffer)
        return loaded
    # As xmc.training.loop does: a tensor per slot and name, views of one slab though they are.
    flat = {f"{s}.{n}": v for s, entry in state["state"].items() for n, v in entry.items()}
    save_file(flat, folder / "state.safetensors")
    slots: dict[int, dict[str, Any]] = {}
    for name, tensor in load_file(folder / "state.safetensors").items():
        slot, field = name.split(".")
        slots.setdefault(int(slot), {})[field] = tensor
    return {"state": slots, "param_groups": state["param_groups"]}


def test_weights_loaded_later_become_masters_when_told() -> None:
    (parameter,) = [nn.Parameter(torch.ones(5, dtype=torch.bfloat16))]
    optimizer = OffloadedAdamW([parameter], lr=0.0, weight_decay=0.0)
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    with torch.no_grad():
        parameter.fill_(3)
    optimizer.reload_masters()
    optimizer.step()
    assert parameter.detach().tolist() == [3] * 5
    with torch.no_grad():
        parameter.fill_(4)
    saved = snapshot(optimizer)
    optimizer.load_state_dict(saved)
    optimizer.reload_masters()  # before the state that was loaded has its place
    optimizer.step()
    assert parameter.detach().tolist() == [4] * 5
    assert saved["state"][0]["master"].tolist() == [3] * 5
    assert float(saved["state"][0]["step"]) == 2


def test_parameters_and_groups_may_come_late(staged: bool) -> None:
    ours, theirs = make(), make()
    optimizer = OffloadedAdamW(ours[:2], **OPTIONS, bucket_size=32)
    adamw = torch.optim.AdamW(theirs[:2], **OPTIONS)
    for parameters, by in ((ours, optimizer), (theirs, adamw)):
        parameters[0].requires_grad_(False)
        for step in range(20, 26):
            if step == 22:
                parameters[0].requires_grad_(True)
            if step == 24:
                by.add_param_group({"params": parameters[2:], "lr": 0.2})
            gradient_(parameters, step)
            by.step()
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-6)


def test_a_closure_is_called_and_an_empty_step_does_nothing() -> None:
    parameter = nn.Parameter(torch.ones(3))
    optimizer = OffloadedAdamW([parameter], lr=0.1)
    assert optimizer.step() is None
    assert not optimizer.state

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = parameter.square().sum()
        loss.backward()
        return loss.detach()

    losses = [float(optimizer.step(closure)) for _ in range(150)]
    assert losses[-1] < 1e-3 * losses[0]


@pytest.mark.parametrize(
    ("dtype", "state", "room"),
    [(torch.bfloat16, 12, 28), (torch.float16, 12, 28), (torch.float32, 8, 20)],
)
def test_memory_is_the_parameter_its_gradient_and_the_buffers(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, state: int, room: int
) -> None:
    parameters = [nn.Parameter(torch.randn(n).to(dtype)) for n in (50_000, 64, 999, 20_001)]
    frozen = nn.Parameter(torch.randn(1000).to(dtype), requires_grad=False)
    optimizer = OffloadedAdamW([*parameters, frozen], bucket_size=4000, max_norm=0.1)
    n = sum(p.numel() for p in parameters)
    host = state * (n + 9 + 15)  # two are rounded up to multiples of 16
    assert optimizer.host_bytes() == host
    own = 2 * dtype.itemsize * n + dtype.itemsize * 1000
    assert optimizer.device_bytes() == own + 4 * 4000  # a CPU casts a bucket's gradient, no more
    stage_(monkeypatch)
    assert optimizer.device_bytes() == own + room * 4000
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape).to(dtype)
    optimizer.step()
    views = [t for s in optimizer.state.values() for name, t in s.items() if name != "step"]
    storages = {view.untyped_storage().data_ptr(): view.untyped_storage() for view in views}
    assert sum(storage.nbytes() for storage in storages.values()) == host
    norms = 50_000 * 4 if dtype != torch.float32 else 0  # on a CPU, of the largest gradient
    with AllocationMeter() as meter:
        optimizer.step()
    assert meter.peak <= max(room * 4000, norms) + 4096
    assert meter.peak >= room * 4000


def test_state_travels_once_a_step_however_many_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    stage_(monkeypatch)
    parameter = nn.Parameter(torch.randn(100).bfloat16())
    optimizer = OffloadedAdamW([parameter], bucket_size=32)
    travelled: list[str] = []
    for name in ("fetch", "send_home"):
        original = getattr(offload_step.walk.__globals__["_Lanes"], name)

        def counted(*args: Any, _name: str = name, _original: Any = original) -> None:
            travelled.append(_name)
            _original(*args)

        monkeypatch.setattr(offload_step.walk.__globals__["_Lanes"], name, counted)
    for _ in range(5):
        (parameter.float() * torch.randn(100)).sum().backward()
    assert travelled == []
    optimizer.step()
    assert sorted(travelled) == ["fetch"] * 4 + ["send_home"] * 4
    assert travelled[:3] == ["fetch", "fetch", "send_home"]  # one bucket ahead


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "expected lr of at least 0, got -1.0"),
        ({"eps": -1.0}, "expected eps of at least 0"),
        ({"weight_decay": math.nan}, "expected weight_decay of at least 0, got nan"),
        ({"betas": (0.9, 1.0)}, r"expected betas in \[0, 1\), got \(0.9, 1.0\)"),
        ({"bucket_size": 15}, "expected bucket_size of at least 16, got 15"),
        ({"max_norm": -1.0}, "expected a finite max_norm of at least 0, got -1.0"),
    ],
)
def test_options_out_of_range_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OffloadedAdamW([nn.Parameter(torch.ones(2))], **options)


@pytest.mark.parametrize(
    ("parameter", "message"),
    [
        (torch.ones(2, dtype=torch.complex64), "floating-point parameters, got torch.complex64"),
        (torch.ones(2, 3).t(), r"contiguous parameters, got strides \(1, 3\) of shape \[3, 2\]"),
    ],
)
def test_parameters_that_do_not_fit_are_named(parameter: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OffloadedAdamW([nn.Parameter(parameter)])
    optimizer = OffloadedAdamW([nn.Parameter(torch.ones(1))])
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [nn.Parameter(parameter)]})
    assert len(optimizer.param_groups) == 1


def test_sparse_gradients_are_refused() -> None:
    table = nn.Embedding(5, 3, sparse=True)
    optimizer = OffloadedAdamW(table.parameters())
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match=r"a sparse one of a parameter \[5, 3\]: .*LazyAdamW"):
        optimizer.step()


def test_sharded_parameters_are_refused() -> None:
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    try:
        model = nn.Linear(3, 2)
        fully_shard(model)
        message = r"got a DTensor: FSDP2 offloads by fully_shard\(offload_policy="
        with pytest.raises(TypeError, match=message):
            OffloadedAdamW(model.parameters())
    finally:
        torch.distributed.destroy_process_group()


def recipe(**optimizer: Any) -> Config:
    sections = {
        "features": {"kind": "tokens"},
        "encoder": {"kind": "transformer", "model": "given"},
        "head": {"fan_in": 8},
        "encoder_optimizer": {"lr": 0.01, "weight_decay": 0.1, "layer_decay": 0.5, **optimizer},
    }
    return from_dict(sections, source="test")


def test_a_recipe_offloads_the_same_training() -> None:
    """Groups, rates and decays of the transformer's optimizer, to the bit."""
    shape = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 20}
    body = nn.Sequential(TransformerEncoder(BertModel(BertConfig(**shape, intermediate_size=9))))
    bodies = [body, copy.deepcopy(body)]
    first, second = (
        make_encoder_optimizer(each, recipe(offload=offload))
        for each, offload in zip(bodies, (False, True), strict=True)
    )
    assert isinstance(second, OffloadedAdamW)
    assert not isinstance(first, OffloadedAdamW)
    for step in range(3):
        for each, optimizer in zip(bodies, (first, second), strict=True):
            gradient_(list(each.parameters()), step)
            optimizer.step()
    for one, other in zip(bodies[0].parameters(), bodies[1].parameters(), strict=True):
        assert torch.equal(one, other)
    saved = [optimizer.state_dict() for optimizer in (first, second)]
    assert_same_state(*saved)
    assert saved[0]["param_groups"] == saved[1]["param_groups"]


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"encoder_optimizer": {"offload": True}},
            "encoder_optimizer.offload: expected false, as only a transformer's moments can be",
        ),
        (
            {"classifier_optimizer": {"offload": True}},
            "classifier_optimizer.offload: expected false, as only a transformer's moments can be",
        ),
        ({"encoder_optimizer": {"offload": "yes"}}, "encoder_optimizer.offload: .*got 'yes'"),
    ],
)
def test_only_a_transformer_is_offloaded(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_dict(sections, source="test")


def test_state_that_does_not_fit_is_refused_and_changes_nothing() -> None:
    parameter = nn.Parameter(torch.ones(3))
    optimizer = OffloadedAdamW([parameter])
    parameter.grad = torch.ones(3)
    optimizer.step()
    before = snapshot(optimizer)
    amsgrad = torch.optim.AdamW([parameter], amsgrad=True)
    other = nn.Parameter(torch.ones(4))
    other.grad = torch.ones(4)
    longer = torch.optim.AdamW([other])
    longer.step()
    sgd = copy.deepcopy(before)
    sgd["state"][0] = {"momentum_buffer": torch.ones(3)}
    for state, message in (
        (amsgrad.state_dict(), "expected the state of an AdamW without amsgrad"),
        (longer.state_dict(), r"expected exp_avg of shape \[3\], got \[4\]"),
        (sgd, "expected a state with step, exp_avg, exp_avg_sq, got momentum_buffer"),
        ({"state": {}, "param_groups": []}, "different number of parameter groups"),
    ):
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict(state)
    assert_same_state(optimizer.state_dict(), before)
