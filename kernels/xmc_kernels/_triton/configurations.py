"""The launches of real training and prediction, on meta tensors: what `aot.py` compiles."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from xmc_kernels import float8
from xmc_kernels._reference.fan_in import gradient_like
from xmc_kernels._triton import blocks, classifier, densify, fan_in, topk
from xmc_kernels._triton.float8 import quantize_launch
from xmc_kernels._triton.launch import Launch, cdiv
from xmc_kernels._triton.layers import label_range
from xmc_kernels._triton.losses import Objective
from xmc_kernels._triton.moments import make_room, moment_arguments
from xmc_kernels._triton.positives import Positives
from xmc_kernels._triton.similarity_pairs import dots_launch, pair_grad_launch
from xmc_kernels._triton.similarity_products import products_launch, stores_bfloat16
from xmc_kernels._triton.similarity_scores import (
    Part,
    Weights,
    gradient_launch,
    statistics_launch,
)
from xmc_kernels._triton.tiles import ProductTiles, product_tiles
from xmc_kernels._triton.update import constants, keys
from xmc_kernels.layer import Layer
from xmc_kernels.packing import packed_bytes
from xmc_kernels.update import RULES, ClassifierState, UpdateRule, make_state

_FEATURES = 768
_LABELS = 1_024_000
_PATTERNS = ((4, 8), (2, 16), (4, 32))
_DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "f8": torch.bfloat16,  # of x: weights are float8
}


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


@functools.cache
def configurations() -> tuple[tuple[str, Launch], ...]:
    """(name, launch), names distinct; `G16 bf16 B128 F64` are group, dtype, rows and fan-in."""
    return (*_layers(), *_steps(), *_densified(), *_blocks(), *_topk(), *_similarity())


def _layer(group: int, name: str, fan_in: int, pattern: tuple[int, int] | None = None) -> Layer:
    dtype = _DTYPES[name]
    indices = torch.int32 if dtype == torch.float32 else torch.uint16
    index = _empty(_LABELS // group, fan_in, dtype=indices)
    if pattern is not None:
        fan_in = pattern[0] * _FEATURES // pattern[1]
        index = _empty(_LABELS // group, packed_bytes(fan_in, pattern), dtype=torch.uint8)
    weight, bias = _empty(_LABELS, fan_in, dtype=dtype), _empty(_LABELS, dtype=dtype)
    if name == "f8":
        return Layer(weight.to(float8.DTYPE), index, bias, pattern, _empty(_LABELS))
    return Layer(weight, index, bias, pattern)


def _title(layer: Layer, dtype: str, rows: int) -> str:
    pattern = "" if layer.pattern is None else " {}:{}".format(*layer.pattern)
    return f"G{layer.group} {dtype} B{rows} F{layer.fan_in}{pattern}"


def _layers() -> Iterator[tuple[str, Launch]]:
    for group, name, pattern in (
        *((group, name, None) for group in (1, 16, 64) for name in ("bf16", "fp32")),
        *((1, "bf16", pattern) for pattern in _PATTERNS),
        *((16, name, (4, 32)) for name in ("bf16", "fp32")),
        *((group, "f8", pattern) for group in (1, 16) for pattern in (None, (4, 32))),
    ):
        dtype, rows = _DTYPES[name], 128
        layer = _layer(group, name, 64, pattern)
        title = _title(layer, name, rows)
        x_t, out = _empty(_FEATURES, rows, dtype=dtype), _empty(rows, _LABELS, dtype=dtype)
        yield f"forward {title}", fan_in.forward_launch(x_t, layer, out, rows)
        for form, d_x_t in (
            ("atomic", _empty(_FEATURES, rows)),
            ("deterministic", _empty(64, _FEATURES, rows)),
        ):
            tensors = (out, x_t, layer, d_x_t, gradient_like(layer.weight))
            yield f"backward {form} {title}", fan_in.backward_launch(*tensors, rows)


def _steps() -> Iterator[tuple[str, Launch]]:
    pairs = Positives(_empty(641, dtype=torch.int32), _empty(641, dtype=torch.int32))
    plain = (
        ("bf16", "bce", "sgd", "atomic", 128, 64, None),
        ("bf16", "bce", "adamw", "atomic", 128, 64, None),
        ("bf16", "bce", "adamw", "atomic", 512, 128, None),
        ("bf16", "squared_hinge", "momentum", "deterministic", 128, 32, None),
        ("bf16", "bce", "", "atomic", 128, 64, None),
        ("fp16", "bce", "adamw", "atomic", 128, 128, None),
        ("fp32", "bce", "adagrad", "atomic", 64, 32, None),
        ("fp32", "bce", "adamw", "deterministic", 512, 128, None),
        ("bf16", "bce", "adamw", "deterministic", 512, 64, None),
        ("f8", "bce", "sgd", "atomic", 128, 64, None),
        ("f8", "bce", "adamw", "atomic", 128, 64, None),
        ("f8", "bce", "adamw", "deterministic", 512, 64, None),
        ("f8", "bce", "adamw", "atomic", 128, 128, None),
        ("f8", "squared_hinge", "momentum", "deterministic", 512, 32, None),
    )
    patterned = (
        *(("bf16", "bce", "adamw", "atomic", 128, 0, pattern) for pattern in _PATTERNS),
        ("bf16", "bce", "adamw", "deterministic", 512, 0, (4, 8)),
        ("fp32", "squared_hinge", "sgd", "atomic", 64, 0, (2, 16)),
        ("f8", "bce", "adamw", "atomic", 128, 0, (4, 32)),
    )
    for group, (dtype, loss, kind, form, rows, width, pattern) in (
        *itertools.product((1, 16, 64), plain),
        *itertools.product((1, 16), patterned),
    ):
        layer = _layer(group, dtype, width, pattern)
        x_t = _empty(_FEATURES, rows, dtype=_DTYPES[dtype])
        d_x_t = _empty(*((64,) if form == "deterministic" else ()), _FEATURES, rows)
        for name, objective in _objectives(loss, _LABELS):
            if objective.smoothing and group != (64 if pattern is None else 16):
                continue  # those need most registers
            for rule, state, rule_name in _rules(kind, layer):
                title = f"{name} {rule_name} {form} {_title(layer, dtype, rows)}"
                numbers = (objective, rule, 0.1, 1, 0, 0.01, kind != "", 0, rows)
                launch, _ = classifier.step_launch(x_t, layer, pairs, d_x_t, state, *numbers)
                yield f"step {title}", launch


def _objectives(loss: str, num_labels: int) -> Iterator[tuple[str, Objective]]:
    """A loss as it is, and of smoothed and weighted positives."""
    yield loss, Objective(loss)
    yield f"{loss} weighted", Objective(loss, 0.1, _empty(num_labels))


def _rules(kind: str, layer: Layer) -> Iterator[tuple[UpdateRule, ClassifierState, str]]:
    """A rule with its state and name, and with float8 moments where it has them."""
    yield *_rule(kind, layer), kind or "accumulate"
    if kind in ("adamw", "momentum"):
        rule = replace(_rule(kind, layer)[0], moment_dtype="float8")
        yield rule, make_state(layer.weight, layer.bias, rule), f"{kind} m8"


def _rule(kind: str, layer: Layer) -> tuple[UpdateRule, ClassifierState]:
    """An empty kind is an accumulating step."""
    assert kind in ("", *RULES)
    rule = UpdateRule(kind or "sgd")  # type: ignore[arg-type]
    if kind:
        return rule, make_state(layer.weight, layer.bias, rule)
    weight, bias = layer.weight.float(), None if layer.bias is None else layer.bias.float()
    return rule, ClassifierState(grad_weight=weight, grad_bias=bias)


def _densified() -> Iterator[tuple[str, Launch]]:
    rows, labels, fan_in = 128, 8192, 64
    dtype = torch.bfloat16
    dense = _empty(labels, _FEATURES, dtype=dtype)
    for name, pattern in (
        *(("bf16", pattern) for pattern in (None, *_PATTERNS)),
        *(("f8", pattern) for pattern in (None, (4, 8))),
    ):
        layer = _layer(1, name, fan_in, pattern)
        title = _title(layer, name, rows)
        yield f"scatter {title}", densify.scatter_launch(layer, 8192, 16384, dense)
    scores, target = _empty(rows, labels), _empty(rows, labels, dtype=torch.uint8)
    bias, parts = _empty(labels, dtype=dtype), _empty(labels)
    for loss in ("bce", "squared_hinge"):
        tensors = (scores, bias, target, scores.to(dtype), _empty(labels, 1), parts)
        for name, objective in _objectives(loss, labels):
            launch = densify.gradient_launch(*tensors, objective, 0.01)
            yield f"gradient {name} bf16 B128", launch
    for name, kind, pattern in (
        *(("bf16", kind, None) for kind in RULES),
        ("bf16", "adamw", (4, 8)),
        ("f8", "adamw", None),
    ):
        layer = _layer(1, name, fan_in, pattern)
        part = label_range(layer, 0, labels)
        wide, d_dense = densify.wide_rows(part, 0, labels), _empty(labels, _FEATURES)
        for rule, state, rule_name in _rules(kind, part):
            memory = (part.weight, state.weight_m, state.weight_v, None)
            numbers = (8192, rule, constants(rule, 0.1, 1), 12345, 0.0, True, part.scale, wide)
            narrow = moment_arguments(state, make_room(state, labels, part.fan_in), keys(7, 1))
            launch = densify.update_launch(d_dense, layer, memory, *numbers, narrow)
            yield f"update {rule_name} {_title(layer, name, rows)}", launch
        if wide is not None and layer.scale is not None:
            codes = layer.weight.view(torch.uint8)
            for what, vanish in (("", True), (" roots", False)):
                launch = quantize_launch(wide, codes, layer.scale, 8192, 12345, vanish=vanish)
                yield f"quantize{what} {_title(layer, name, rows)}", launch


def _blocks() -> Iterator[tuple[str, Launch]]:
    start, stop = 65536, 131072
    pairs = Positives(_empty(641, dtype=torch.int32), _empty(641, dtype=torch.int32))
    for name, rows, pattern, group, loss, kind, form in (
        ("bf16", 128, (4, 8), 1, "bce", "sgd", "atomic"),
        ("bf16", 128, (4, 8), 16, "bce", "adamw", "deterministic"),
        ("bf16", 512, (2, 16), 1, "squared_hinge", "adamw", "atomic"),
        ("bf16", 32, (2, 4), 1, "bce", "momentum", "atomic"),
        ("bf16", 128, (4, 32), 1, "bce", "", "deterministic"),
        ("bf16", 128, (3, 8), 1, "bce", "adagrad", "atomic"),
        ("bf16", 128, (16, 32), 1, "bce", "adamw", "atomic"),
        ("fp16", 128, (4, 8), 1, "bce", "adamw", "atomic"),
        ("fp32", 64, (4, 8), 1, "bce", "adamw", "atomic"),
        ("fp32", 512, (4, 32), 16, "squared_hinge", "adagrad", "deterministic"),
        ("f8", 128, (4, 8), 1, "bce", "sgd", "atomic"),
        ("f8", 512, (4, 32), 16, "bce", "adamw", "deterministic"),
    ):
        dtype = _DTYPES[name]
        layer = _layer(group, name, 0, pattern)
        x_t, out = _empty(_FEATURES, rows, dtype=dtype), _empty(rows, _LABELS, dtype=dtype)
        title = _title(layer, name, rows)
        yield f"blocks forward {title}", blocks.forward_launch(x_t, layer, out, rows)
        d_weight = gradient_like(layer.weight)
        yield f"blocks d_weight {title}", blocks.weight_launch(out, x_t, layer, d_weight, rows)
        common = (rows, start, stop)
        grad = _empty(rows, stop - start, dtype=torch.float32 if name.startswith("fp") else dtype)
        sums, units = (_empty(4, stop - start), _empty(4096)), _empty(1024, dtype=torch.int64)
        for written, objective in _objectives(loss, _LABELS):
            values = (*common, pairs, units, *sums, objective, 0.01)
            yield f"blocks {written} {title}", blocks.forward_launch(x_t, layer, grad, *values)
        d_x_t = _empty(*((64,) if form == "deterministic" else ()), _FEATURES, rows)
        yield f"blocks d_x {form} {title}", blocks.input_launch(grad, x_t, layer, d_x_t, *common)
        wide = densify.wide_rows(layer, start, stop)
        for rule, state, rule_name in _rules(kind, layer):
            room = make_room(state, stop - start, layer.fan_in)
            numbers = (state, rule, constants(rule, 0.1, 1), keys(7, 1), kind != "", wide, room)
            launch = blocks.weight_launch(*(grad, x_t, layer, None, *common, *numbers))
            yield f"blocks {rule_name} {title}", launch


def _topk() -> Iterator[tuple[str, Launch]]:
    for k in (8, 128):
        scores, best = _empty(128, 65536), _empty(128, 64, k, dtype=torch.int64)
        yield f"topk K{k} B128", topk.topk_launch(scores, best, 65536)


def _similarity() -> Iterator[tuple[str, Launch]]:
    """Parts of a large batch, and batches that one part has, down to the smallest tiles."""
    for name, rows, num_keys, features in (
        ("bf16", 4096, 8192, 768),
        ("fp16", 4096, 8192, 768),
        ("fp32", 4096, 4096, 768),
        ("bf16", 100, 300, 16),
        ("fp32", 100, 300, 16),
    ):
        yield from _similarity_of(name, rows, num_keys, features)


def _similarity_of(
    name: str, rows: int, num_keys: int, features: int
) -> Iterator[tuple[str, Launch]]:
    dtype, nnz = _DTYPES[name], 10_000
    q, k = _empty(rows, features, dtype=dtype), _empty(num_keys, features, dtype=dtype)
    stored = torch.bfloat16 if stores_bfloat16(q) else torch.float32
    of_rows, of_keys, of_pairs, number = (_empty(*n) for n in ((rows,), (num_keys,), (nnz,), ()))
    indptr, indices = _empty(rows + 1, dtype=torch.int64), _empty(nnz, dtype=torch.int32)
    size = f"{name} B{rows} D{features}"

    def tiles(kernel: str) -> ProductTiles:
        wide = (stored if kernel == "products" else dtype) == torch.float32
        return product_tiles(kernel, wide, q.device, rows, num_keys, features)

    scores = tiles("statistics")
    blocks_of = (cdiv(rows, scores.m), cdiv(num_keys, scores.n))
    grad = _empty(128 * cdiv(rows, 128), 128 * cdiv(num_keys, 128), dtype=stored)
    sums = _empty(4096, 3, dtype=torch.float64)
    for what, symmetric, with_ids, without_pairs in (
        ("rows", False, False, False),
        ("symmetric", True, False, False),
        ("symmetric ids", True, True, False),
        ("symmetric decoupled", True, True, True),
    ):
        ids = (_empty(rows, dtype=torch.int64), _empty(num_keys, dtype=torch.int64))
        part = Part(q, k, number, indptr, indices, num_keys, *(ids if with_ids else (None, None)))
        column_lse = _empty(blocks_of[0], num_keys) if symmetric else None
        lse = (_empty(blocks_of[1], rows), column_lse, of_pairs)
        launch = statistics_launch(part, scores, without_pairs, *lse)
        yield f"similarity {what} statistics {size}", launch
        columns = (of_keys, of_keys) if symmetric else (None, None)
        weights = Weights(of_rows, of_rows, *columns)
        launch = gradient_launch(part, tiles("gradient"), without_pairs, weights, grad, sums)
        yield f"similarity {what} gradient {size}", launch
        if without_pairs or not symmetric:
            logistic = Weights(of_rows, bias=number)
            for form, out in (("gradient", grad), ("loss", None)):
                launch = gradient_launch(part, tiles("sigmoid"), True, logistic, out, sums)
                yield f"similarity sigmoid {what} {form} {size}", launch
    d_q, d_k = _empty(1, rows, features), _empty(1, num_keys, features)
    for what, want_q, want_k in (("both", 1, 1), ("queries", 1, 0), ("keys", 0, 1)):
        wanted_q, wanted_k = d_q if want_q else None, d_k if want_k else None
        launch = products_launch(grad, q, k, wanted_q, wanted_k, tiles("products"))
        yield f"similarity products {what} {size}", launch
    queries = _empty(nnz, dtype=torch.int64)
    yield f"similarity pairs {size}", dots_launch(q, k, queries, indices, of_pairs)
    put = (of_pairs, queries, indices, number, grad, slice(0, nnz), 0, slice(0, num_keys))
    yield f"similarity pairs gradient {size}", pair_grad_launch(*put)
