"""The launches of real training and prediction, on meta tensors: what `aot.py` compiles."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from xmc_kernels._triton import classifier, densify, fan_in, topk
from xmc_kernels._triton.launch import Launch
from xmc_kernels._triton.positives import Positives
from xmc_kernels._triton.update import constants
from xmc_kernels.update import RULES, ClassifierState, UpdateRule, make_state

_FEATURES = 768
_LABELS = 1_024_000
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


@functools.cache
def configurations() -> tuple[tuple[str, Launch], ...]:
    """(name, launch), names distinct; `G16 bf16 B128 F64` are group, dtype, rows and fan-in."""
    return (*_layers(), *_steps(), *_densified(), *_topk())


def _layer(group: int, dtype: torch.dtype, fan_in: int) -> tuple[Tensor, Tensor, Tensor]:
    indices = torch.int32 if dtype == torch.float32 else torch.uint16
    return (
        _empty(_LABELS, fan_in, dtype=dtype),
        _empty(_LABELS // group, fan_in, dtype=indices),
        _empty(_LABELS, dtype=dtype),
    )


def _layers() -> Iterator[tuple[str, Launch]]:
    for group in (1, 16, 64):
        for name in ("bf16", "fp32"):
            dtype = _DTYPES[name]
            rows, width = 128, 64
            weight, index, bias = _layer(group, dtype, width)
            title = f"G{group} {name} B{rows} F{width}"
            x_t, out = _empty(_FEATURES, rows, dtype=dtype), _empty(rows, _LABELS, dtype=dtype)
            yield (
                f"forward {title}",
                fan_in.forward_launch(x_t, weight, index, bias, out, rows),
            )
            for form, d_x_t in (
                ("atomic", _empty(_FEATURES, rows)),
                ("deterministic", _empty(64, _FEATURES, rows)),
            ):
                tensors = (out, x_t, weight, index, d_x_t, torch.empty_like(weight))
                yield f"backward {form} {title}", fan_in.backward_launch(*tensors, rows)


def _steps() -> Iterator[tuple[str, Launch]]:
    pairs = Positives(_empty(641, dtype=torch.int32), _empty(641, dtype=torch.int32))
    for group in (1, 16, 64):
        for dtype, loss, rule, form, rows, width, update in (
            ("bf16", "bce", "sgd", "atomic", 128, 64, True),
            ("bf16", "bce", "adamw", "atomic", 512, 128, True),
            ("bf16", "squared_hinge", "momentum", "deterministic", 128, 32, True),
            ("bf16", "bce", "sgd", "atomic", 128, 64, False),
            ("fp16", "bce", "adamw", "atomic", 128, 128, True),
            ("fp32", "bce", "adagrad", "atomic", 64, 32, True),
            ("fp32", "bce", "adamw", "deterministic", 512, 128, True),
        ):
            assert rule in RULES
            weight, index, bias = _layer(group, _DTYPES[dtype], width)
            x_t = _empty(_FEATURES, rows, dtype=_DTYPES[dtype])
            d_x_t = _empty(*((64,) if form == "deterministic" else ()), _FEATURES, rows)
            rule_ = UpdateRule(rule)  # type: ignore[arg-type]
            state = make_state(weight, bias, rule_)
            if not update:
                state = ClassifierState(grad_weight=weight.float(), grad_bias=bias.float())
            launch, _ = classifier.step_launch(
                x_t,
                weight,
                index,
                bias,
                pairs,
                d_x_t,
                state,
                loss,
                rule_,
                *(0.1, 1, 0, 0.01),
                update,
                rows,
            )
            what = rule if update else "accumulate"
            yield f"step {loss} {what} {form} G{group} {dtype} B{rows} F{width}", launch


def _densified() -> Iterator[tuple[str, Launch]]:
    rows, labels, fan_in = 128, 8192, 64
    dtype = torch.bfloat16
    _, index, _ = _layer(1, dtype, fan_in)
    weight, dense = _empty(labels, fan_in, dtype=dtype), _empty(labels, _FEATURES, dtype=dtype)
    yield "scatter G1 bf16 F64", densify.scatter_launch(weight, index, 8192, 1, dense)
    scores, target = _empty(rows, labels), _empty(rows, labels, dtype=torch.uint8)
    bias, parts = _empty(labels, dtype=dtype), _empty(labels)
    for loss in ("bce", "squared_hinge"):
        tensors = (scores, bias, target, scores.to(dtype), _empty(labels, 1), parts)
        yield f"gradient {loss} bf16 B128", densify.gradient_launch(*tensors, loss, 0.01)
    for kind in RULES:
        rule = UpdateRule(kind)  # type: ignore[arg-type]
        state = make_state(weight, None, rule)
        memory = (weight, state.weight_m, state.weight_v, None)
        numbers = constants(rule, 0.1, 1)
        launch = densify.update_launch(
            *(_empty(labels, _FEATURES), index, memory, 8192, 1, rule, numbers, 12345, 0.0, True)
        )
        yield f"update {kind} G1 bf16 F64", launch


def _topk() -> Iterator[tuple[str, Launch]]:
    for k in (8, 128):
        scores, best = _empty(128, 65536), _empty(128, 64, k, dtype=torch.int64)
        yield f"topk K{k} B128", topk.topk_launch(scores, best, 65536)
