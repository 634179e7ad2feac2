"""BatchNorm over micro-batches as over the whole batch: statistics, gradient, running averages.

In one pass BatchNorm l normalises by s_l = (mean, variance) over all rows, which depends on the
parameters and on every s_j before it. Micro-batches that take their own statistics compute another
function, which MBP (arXiv 2110.12484) accepts. Exact is, at 2 N + 1 passes for N BatchNorms:

1. N forward passes without graph: with s_1 .. s_(l-1) known, the l-th collects s_l.
2. One pass forward and backward in which the s_l are constants of their own: the direct gradient of
   the parameters, and d_l = dL/ds_l.
3. For l = N .. 1 a pass as far as l: the gradient of `<d_l, s_l>`, in the parameters and added to
   the d_j of the BatchNorms before it. After the first, d_1 .. d_N were complete.

All passes of a micro-batch replay its random numbers. Never is more than one micro-batch in memory.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from xmc.training.replay import random_states, set_random_states_

Micro = Callable[[], Tensor]  # the weighted loss of one micro-batch, with its graph


class BatchNormWarning(UserWarning):
    """Micro-batches compute something else than the batch would."""


def active_batch_norms(modules: Iterable[nn.Module]) -> dict[_BatchNorm, str]:
    """The BatchNorms that normalise by the rows they are given, with their names."""
    found: dict[_BatchNorm, str] = {}
    for module in modules:
        for name, part in module.named_modules():
            if isinstance(part, _BatchNorm) and (part.training or part.running_mean is None):
                found.setdefault(part, name or type(part).__name__)
    return found


def warn_of_batch_norm(modules: Iterable[nn.Module], sizes: Sequence[int]) -> None:
    """Say what differs, where there are several micro-batches and a BatchNorm in training."""
    names = list(active_batch_norms(modules).values()) if len(sizes) > 1 else []
    if names:
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        warnings.warn(
            f"BatchNorm {names[0]}{more} normalises by the {max(sizes)} rows of a micro-batch, "
            f"not by the {sum(sizes)} of the batch, and moves its running statistics {len(sizes)} "
            "times: the result depends on the micro-batches (exact_batch_norm=True takes the "
            "statistics of the whole batch)",
            BatchNormWarning,
            stacklevel=3,
        )


def exact_batch_norm_step(
    modules: Iterable[nn.Module],
    losses: Sequence[Micro],
    *,
    devices: Iterable[torch.device],
    scale: Callable[[Tensor], Tensor] = lambda loss: loss,
) -> Tensor:
    """Add the gradient of `sum(scale(loss()) for loss in losses)` to `.grad`; the sum, detached.

    `modules` hold the BatchNorms. Their running statistics move once, by the whole batch, and the
    random numbers end up as after one pass over all micro-batches. `devices` are those of random
    numbers.

    Raises ValueError where a BatchNorm has one value a channel, and where it is called again in a
    backward pass (activation checkpointing).
    """
    norms = _Norms(active_batch_norms(modules))
    devices = list(devices)
    random: list[Any] = []
    with norms.taken_over():
        with torch.no_grad():
            for loss in losses:  # in full, so that every micro-batch draws its own numbers
                random.append(random_states(devices))
                norms.run(loss, collect=0)
            end = random_states(devices)
            norms.close()
            while norms.calls > len(norms.statistics):
                for loss, state in zip(losses, random, strict=True):
                    set_random_states_(state)
                    norms.run(loss, collect=len(norms.statistics), stop=True)
                norms.close()
        total = None
        for loss, state in zip(losses, random, strict=True):
            set_random_states_(state)
            value = norms.run(loss)
            assert value is not None
            scale(value).backward()
            total = value.detach() if total is None else total + value.detach()
        for position in reversed(range(norms.calls)):
            for loss, state in zip(losses, random, strict=True):
                set_random_states_(state)
                if not norms.backward_through(position, loss):
                    break
        set_random_states_(end)
    norms.update_running()
    assert total is not None
    return total


class _Reached(Exception):  # noqa: N818 - control flow, not an error
    """The forward pass came to the BatchNorm that was asked for."""


class _Statistics:
    """Mean and variance per channel over all micro-batches, merged one after another.

    Merging: Chan, Golub and LeVeque, "Algorithms for Computing the Sample Variance" (1983).
    """

    def __init__(self, norm: _BatchNorm) -> None:
        self.norm = norm
        self.count = 0  # values a channel
        self.mean = torch.zeros(0)  # [C]
        self.variance = torch.zeros(0)  # [C], biased

    def add(self, x: Tensor) -> None:  # [B, C, ...]
        rows = _channels_last(x)
        mean, variance = rows.mean(0), rows.var(0, correction=0)
        count = self.count + len(rows)
        if self.count:
            new = len(rows) / count
            step = mean - self.mean
            variance = (1 - new) * self.variance + new * variance + new * (1 - new) * step**2
            mean = self.mean + new * step
        self.count, self.mean, self.variance = count, mean, variance

    def close(self) -> None:
        """From here on constants of their own, whose gradient is collected."""
        if self.count == 1:
            raise ValueError("expected more than one value a channel for BatchNorm, got 1")
        self.mean.requires_grad_()
        self.variance.requires_grad_()


class _Norms:
    """Stands in for the BatchNorms of a model, counted by their calls in a forward pass."""

    def __init__(self, norms: dict[_BatchNorm, str]) -> None:
        self._norms = norms
        self.statistics: list[_Statistics] = []  # of the first calls, those that are known
        self.calls = 0  # BatchNorms that a forward pass goes through
        self._open: _Statistics | None = None
        self._call = 0
        self._collect: int | None = None
        self._stop = False
        self._reached: Tensor | None = None

    @contextmanager
    def taken_over(self) -> Iterator[None]:
        """Inside, the modules normalise by `statistics`."""
        before = {norm: norm.__dict__.get("forward") for norm in self._norms}
        for norm in self._norms:
            norm.forward = partial(self._forward, norm)  # type: ignore[method-assign]
        try:
            yield
        finally:
            for norm, forward in before.items():
                del norm.forward
                if forward is not None:
                    norm.forward = forward  # type: ignore[method-assign]

    def run(self, loss: Micro, *, collect: int | None = None, stop: bool = False) -> Tensor | None:
        """A micro-batch forward; call number `collect` adds to its statistics, or ends it too."""
        self._call, self._collect, self._stop = 0, collect, stop
        try:
            value = loss()
        except _Reached:
            return None
        self.calls = self._call
        return value

    def close(self) -> None:
        """The statistics being collected are complete."""
        if self._open is not None:
            self._open.close()
            self.statistics.append(self._open)
            self._open = None

    def backward_through(self, position: int, loss: Micro) -> bool:
        """Add the gradient through the statistics of one call; False where none goes through."""
        statistics = self.statistics[position]
        d_mean, d_variance = statistics.mean.grad, statistics.variance.grad
        if d_mean is None or d_variance is None:
            return False
        self._reached = None
        self.run(loss, collect=position, stop=True)
        x, self._reached = self._reached, None
        if x is None or not x.requires_grad:
            return False
        rows = _channels_last(x)
        # The variance's derivative in the mean is 0, so that the mean may be a constant in it.
        centred = rows - statistics.mean.detach()
        pulled = (rows.sum(0) * d_mean).sum() + (centred.square().sum(0) * d_variance).sum()
        (pulled / statistics.count).backward()
        return True

    @torch.no_grad()
    def update_running(self) -> None:
        """Move the running statistics once, as one pass over the whole batch would."""
        for statistics in self.statistics:
            norm = statistics.norm
            if not norm.training or norm.running_mean is None or norm.running_var is None:
                continue
            assert norm.num_batches_tracked is not None
            norm.num_batches_tracked += 1
            share = norm.momentum
            if share is None:
                share = 1 / float(norm.num_batches_tracked)
            unbiased = statistics.variance * (statistics.count / (statistics.count - 1))
            norm.running_mean.lerp_(statistics.mean.to(norm.running_mean.dtype), share)
            norm.running_var.lerp_(unbiased.to(norm.running_var.dtype), share)

    def _forward(self, norm: _BatchNorm, x: Tensor) -> Tensor:
        norm._check_input_dim(x)
        position, self._call = self._call, self._call + 1
        if position == self._collect:
            self._note(norm, position, x)
        if position < len(self.statistics):
            statistics = self.statistics[position]
            if statistics.norm is not norm:
                raise ValueError("expected every micro-batch to call its BatchNorms in one order")
            return _normalised(x, norm, statistics.mean, statistics.variance)
        if len(self.statistics) == self.calls > 0:
            raise ValueError(
                "expected exact_batch_norm to see every BatchNorm once a forward pass, got another "
                "call: it does not go together with activation checkpointing"
            )
        rows = _channels_last(x)  # the first pass: only its random numbers are of use
        return _normalised(x, norm, rows.mean(0), rows.var(0, correction=0))

    def _note(self, norm: _BatchNorm, position: int, x: Tensor) -> None:
        if position < len(self.statistics):
            self._reached = x
        else:
            self._open = self._open or _Statistics(norm)
            self._open.add(x)
        if self._stop:
            raise _Reached


def _normalised(x: Tensor, norm: _BatchNorm, mean: Tensor, variance: Tensor) -> Tensor:
    shape = [1, -1] + [1] * (x.dim() - 2)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    y = (wide - mean.view(shape)) * torch.rsqrt(variance + norm.eps).view(shape)
    if norm.weight is not None:
        y = y * norm.weight.view(shape)
    if norm.bias is not None:
        y = y + norm.bias.view(shape)
    return y.to(x.dtype)


def _channels_last(x: Tensor) -> Tensor:  # [B, C, ...] -> [values, C]
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return wide.flatten(1).view(len(x), x.shape[1], -1).transpose(1, 2).flatten(0, 1)
