"""How a gradient becomes a weight, in registers: `update.py`'s rules and `rounding.py`'s noise."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from xmc_kernels import rounding
from xmc_kernels._triton.float8 import store_rows
from xmc_kernels._triton.moments import load_moment, store_moment
from xmc_kernels._triton.noise import noise
from xmc_kernels.update import UpdateRule


@triton.jit
def stochastic_round(value, key, rows, columns):
    """float32 as bfloat16; rows and columns are int32 and broadcast to value's shape."""
    bits = value.to(tl.uint32, bitcast=True)
    raised = (bits + (noise(key, rows, columns) >> 16)) & 0xFFFF0000
    finite = (bits & 0x7F800000) != 0x7F800000
    return tl.where(finite, raised.to(tl.float32, bitcast=True), value).to(tl.bfloat16)


@triton.jit
def apply(
    param,
    out,  # pointers to where the new value goes: to where param comes from, or to float32
    scale_ptr,  # of float8 parameters, whose whole rows these must be; None for all others
    memory,  # pointers of m, v and accumulated gradient, each may be None
    narrow,  # of float8 moments: scales of m and v, room for m and v, their rounding keys
    place,  # offsets, those in the moments' room, mask; rows, their mask; columns
    grad,  # float32
    key,
    decay,
    lr,
    averages,  # momentum, beta1, 1 - beta1, beta2, 1 - beta2
    scales,  # eps, 1 / (1 - beta1^step), 1 / sqrt(1 - beta2^step)
    RULE: tl.constexpr,
    UPDATE: tl.constexpr,
):
    """Update param, whose memory is at the offsets, or add grad to what is kept.

    A tile smaller than the program is held by several threads: the barrier keeps one of them from
    loading what another has already stored.
    """
    m_ptr, v_ptr, kept_ptr = memory
    offs, _, mask, rows, mask_rows, columns = place
    momentum, beta1, one_minus_beta1, beta2, one_minus_beta2 = averages
    eps, mean_scale, root_scale = scales
    m_scale_ptr, v_scale_ptr, m_room_ptr, v_room_ptr, mean_key, root_key = narrow
    if kept_ptr is not None:
        grad += tl.load(kept_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    if UPDATE:
        new = param.to(tl.float32)
        if RULE == "adamw":
            m = load_moment(m_ptr, m_scale_ptr, place)
            v = load_moment(v_ptr, v_scale_ptr, place)
            if v_scale_ptr is not None:
                v = v * v
            tl.debug_barrier()
            m = beta1 * m + one_minus_beta1 * grad
            v = beta2 * v + one_minus_beta2 * (grad * grad)
            store_moment(m, m_ptr, m_scale_ptr, m_room_ptr, place, mean_key, True)
            root = tl.sqrt(v)
            second = v if v_scale_ptr is None else root
            store_moment(second, v_ptr, v_scale_ptr, v_room_ptr, place, root_key, False)
            new = new * (1.0 - lr * decay)
            new -= lr * mean_scale * m / (root * root_scale + eps)
        else:
            grad += decay * new
            if RULE == "momentum":
                m = load_moment(m_ptr, m_scale_ptr, place)
                tl.debug_barrier()
                grad += momentum * m
                store_moment(grad, m_ptr, m_scale_ptr, m_room_ptr, place, mean_key, True)
            elif RULE == "adagrad":
                v = tl.load(v_ptr + offs, mask=mask, other=0.0)
                tl.debug_barrier()
                v += grad * grad
                tl.store(v_ptr + offs, v, mask=mask)
                grad = grad / (tl.sqrt(v) + eps)
            else:
                tl.debug_barrier()
            new -= lr * grad
        if scale_ptr is not None:
            store_rows(out, scale_ptr, new, mask, rows, mask_rows, columns, key, True)
        elif out.dtype.element_ty == tl.bfloat16:
            tl.store(out, stochastic_round(new, key, rows, columns), mask=mask)
        else:
            tl.store(out, new, mask=mask)
    else:
        tl.debug_barrier()
        tl.store(kept_ptr + offs, grad, mask=mask)


def constants(rule: UpdateRule, lr: float, step: int) -> dict[str, float]:
    """The numbers `apply` takes, differences taken in float64 before rounding."""
    beta1, beta2 = rule.betas
    return {
        "lr": float(lr),
        "momentum": float(rule.momentum),
        "beta1": float(beta1),
        "one_minus_beta1": 1.0 - beta1,
        "beta2": float(beta2),
        "one_minus_beta2": 1.0 - beta2,
        "eps": float(rule.eps),
        "mean_scale": 1.0 / (1 - beta1**step),
        "root_scale": (1 - beta2**step) ** -0.5,
    }


def keys(seed: int, step: int, row_offset: int = 0) -> dict[str, int]:
    """The rounding keys of weights, biases and float8 moments."""
    streams = {
        "weight_key": rounding.WEIGHT,
        "bias_key": rounding.BIAS,
        "mean_key": rounding.MEAN,
        "root_key": rounding.ROOT,
    }
    return {
        name: rounding.stream_key(seed, step, stream, row_offset)
        for name, stream in streams.items()
    }


@triton.jit
def _round_kernel(value_ptr, out_ptr, key, num_columns, size, BLOCK: tl.constexpr):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < size
    value = tl.load(value_ptr + offs, mask=mask, other=0.0)
    rows, columns = (offs // num_columns).to(tl.int32), (offs % num_columns).to(tl.int32)
    tl.store(out_ptr + offs, stochastic_round(value, key, rows, columns), mask=mask)


def round_to_bfloat16(value: Tensor, key: int) -> Tensor:
    """`rounding.stochastic_round` of a float32 matrix [R, C], to compare the two."""
    out = torch.empty(value.shape, dtype=torch.bfloat16, device=value.device)
    grid = (triton.cdiv(value.numel(), 1024),)
    _round_kernel[grid](value, out, key, value.shape[1], value.numel(), BLOCK=1024)
    return out
