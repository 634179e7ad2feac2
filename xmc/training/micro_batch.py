"""Micro-batch processing: the gradient of a batch in the memory of a part of it.

Source: Piao et al., "Enabling Large Batch Size Training for DNN Models Beyond the Memory Limit"
(MBP, arXiv 2110.12484). A batch of B rows is cut into micro-batches of n_k rows, whose losses count
by their share: `sum_k (n_k / B) L_k` is the loss of the batch, and its gradient that of the batch.
Faults of the published code that tests here watch for: it divides by the number of micro-batches,
which is wrong for a ragged last one; its two-device path drops half of the batch; the size is the
user's guess.

What a batch of one pass would do otherwise: BatchNorm (see `xmc.training.batch_norm`), and dropout,
whose masks are drawn micro-batch by micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xmc.training.batch_norm import exact_batch_norm_step, warn_of_batch_norm
from xmc.training.batch_size_search import AutoSize
from xmc.training.byte_meter import Peak, is_out_of_memory, measured
from xmc.training.chunks import call, cut, num_rows, rows_between, tensors
from xmc.training.gradient_sync import synchronized, synchronizers
from xmc.training.prefetch import AheadCopies, Copies, make_copies, stream
from xmc.training.undo import Undo

Size = int | Sequence[int] | AutoSize


@dataclass(frozen=True)
class MicroStep:
    """What a step over micro-batches did."""

    loss: Tensor  # [], detached: the mean over the whole batch
    sizes: tuple[int, ...]
    """Rows of each micro-batch. Given as `size`, they make the same step again."""


def micro_batches(batch: Any, size: int) -> Sequence[Any]:
    """Consecutive slices of at most `size` rows of any structure (`xmc.training.chunks`), in order.

    Tensors are views; each slice is made when it is asked for. Raises ValueError for a batch
    without rows or a size below 1.
    """
    return cut(batch, size)


def micro_step(
    model: nn.Module | Callable[..., Any],
    batch: Any,  # B rows
    loss: Callable[..., Tensor],  # (output, targets) -> [], the mean over the rows it is given
    *,
    size: Size,
    targets: Any = None,  # B rows
    weights: Tensor | None = None,  # [B]
    modules: Sequence[nn.Module] = (),
    device: torch.device | str | None = None,
    scaler: torch.amp.GradScaler | None = None,
    exact_batch_norm: bool = False,
) -> MicroStep:
    """Add the gradient of `loss(model(batch), targets)` to `.grad`, micro-batch by micro-batch.

    The same gradient as in one pass, to rounding, whatever the sizes. The optimizer is the
    caller's. A tuple is given to the model as its arguments, a mapping as its keywords.

    With an `AutoSize` a micro-batch that runs out of memory is done again in smaller parts: its
    random numbers, its part of the gradient and its update of running statistics are undone, those
    of the micro-batches before stay, so that no row is lost or counted twice and the result is that
    of a step with the returned sizes. For that the gradient so far lies beside that of the present
    micro-batch: twice the memory of gradients. The failed work must not change anything else, such
    as a counter of the caller's.

    Args:
        size: rows of a micro-batch; or of each, adding up to B; or an `AutoSize`.
        targets: what the loss reads beside the output, cut like the batch; by default the batch.
        weights: what each row counts in the loss, where `loss` is a mean weighted by them: with the
            number of tokens of each row, `sum_k (tokens_k / tokens) L_k`. Micro-batches that count
            nothing are left out.
        modules: what `model` trains, where it is a function: for the recovery of an `AutoSize`,
            BatchNorm, and the synchronisation of gradients, once a step. A loss that is a module is
            known.
        device: where to compute; micro-batches are copied there, on CUDA the next one while the
            present one is computed. By default they stay where the batch is.
        scaler: of float16; the gradient is that of `scaler.scale(loss)`.
        exact_batch_norm: normalise by the statistics of the whole batch, gradient included, at the
            price of 2 N + 1 passes for N BatchNorms in training. Needs sizes in numbers.

    Raises:
        ValueError: no rows, unequal numbers of rows, bad sizes or weights, a loss that is no
            number, or an `AutoSize` with what cannot be undone.
        torch.OutOfMemoryError, MemoryLimitError: with a note, where one row does not fit.
    """
    both = (batch, targets)
    rows = num_rows(both)
    work = _Work(model, loss, _ends(weights, rows), scaler)
    trained = [part for part in [model, loss, *modules] if isinstance(part, nn.Module)]
    where = _device(device, both, trained)
    copies = make_copies(device)
    if isinstance(size, AutoSize):
        if exact_batch_norm:
            raise ValueError("expected sizes in numbers with exact_batch_norm, got an AutoSize")
        step = _automatic(work, both, rows, size, trained, where, copies)
        warn_of_batch_norm(trained, step.sizes)
        return step
    sizes = _sizes(size, rows)
    slices = [part for part in _slices(sizes) if work.share(part) > 0]
    wrappers = synchronizers(trained)
    if exact_batch_norm:
        if wrappers:
            raise ValueError(
                "expected a model of one process with exact_batch_norm, "
                f"got {type(wrappers[0]).__name__}: the rows of other ranks are not seen"
            )
        losses = [partial(_loss_of, work, both, part, copies) for part in slices]
        total = exact_batch_norm_step(trained, losses, devices=_drawing(where), scale=work.scale)
        return MicroStep(total, sizes)
    warn_of_batch_norm(trained, sizes)
    values = []
    parts = stream((part.of(both) for part in slices), copies)
    for position, (part, data) in enumerate(zip(slices, parts, strict=True), start=1):
        with synchronized(wrappers, wrappers if position == len(slices) else []):
            values.append(work.run(data, part))
    return MicroStep(_total(values), sizes)


@dataclass(frozen=True)
class _Slice:
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def of(self, both: Any) -> Any:
        return rows_between(both, self.start, self.stop)


@dataclass(frozen=True)
class _Work:
    """What is done with each micro-batch."""

    model: Callable[..., Any]
    loss_function: Callable[..., Tensor]
    ends: Tensor  # [B + 1] float64: weight of the rows before each
    scaler: torch.amp.GradScaler | None

    def share(self, part: _Slice) -> float:
        """n_k / B, or the share of the weights."""
        return float((self.ends[part.stop] - self.ends[part.start]) / self.ends[-1])

    def scale(self, loss: Tensor) -> Tensor:
        return loss if self.scaler is None else self.scaler.scale(loss)

    def loss(self, data: Any, part: _Slice) -> Tensor:
        """The share of a micro-batch in the loss of the batch, with its graph."""
        batch, targets = data
        value = self.loss_function(call(self.model, batch), batch if targets is None else targets)
        if not isinstance(value, Tensor) or value.dim():
            got = f"shape {list(value.shape)}" if isinstance(value, Tensor) else type(value)
            raise ValueError(f"expected the loss to be one number, the mean over rows, got {got}")
        return value * self.share(part)

    def run(self, data: Any, part: _Slice) -> Tensor:
        """Forward and backward; the share of the loss, detached."""
        value = self.loss(data, part)
        self.scale(value).backward()
        return value.detach()


def _automatic(
    work: _Work,
    both: Any,
    rows: int,
    sizes: AutoSize,
    trained: list[nn.Module],
    where: torch.device,
    copies: Copies,
) -> MicroStep:
    """Micro-batches as large as memory allows, the failed ones done again in parts."""
    if synchronizers(trained):
        raise ValueError(
            "expected sizes in numbers for a model that synchronises gradients, got an AutoSize: "
            "a rank out of memory would do another number of passes than the others"
        )
    if not trained:
        raise ValueError("expected modules to say what an AutoSize is to undo, got a function")
    limit = sizes.limit_on(where)
    leaves = [t for _, t in tensors(both) if t.requires_grad and t.is_leaf]
    undo = Undo(trained, _drawing(where), leaves)
    shape = tuple((tuple(t.shape[1:]), t.dtype) for _, t in tensors(both))
    ahead = AheadCopies(lambda start, stop: rows_between(both, start, stop), rows, copies)
    done: list[int] = []
    values = []
    start = 0
    while start < rows:
        part = _Slice(start, start + sizes.propose(rows - start, shape))
        if work.share(part) > 0:
            known = sizes.settled(len(part), shape)
            allowed = None if known else max(1, limit - undo.gradient_bytes())
            try:
                result = _attempt(work, ahead, part, undo, where, allowed)
            except (MemoryError, RuntimeError) as error:
                if is_out_of_memory(error):
                    error.add_note(f"a micro-batch of one row does not fit into {limit:,} bytes")
                raise
            if result is None:
                sizes.ran_out(len(part), shape)
                continue
            value, peak = result
            values.append(value)
            if not known:
                # The gradient so far lies beside that of each micro-batch but the first.
                sizes.succeeded(len(part), peak + undo.gradient_bytes(), shape)
        done.append(len(part))
        start = part.stop
    return MicroStep(_total(values), tuple(done))


def _attempt(
    work: _Work,
    ahead: AheadCopies,
    part: _Slice,
    undo: Undo,
    device: torch.device,
    limit: int | None,  # None: not measured
) -> tuple[Tensor, int] | None:
    """A micro-batch's share of the loss and the bytes it took; None, undone, if out of memory."""
    meter = nullcontext(Peak()) if limit is None else measured(device, limit)
    try:
        with undo.attempt(), meter as peak:
            value = work.run(ahead.take(part.start, part.stop), part)
        return value, peak.bytes
    except (MemoryError, RuntimeError) as error:
        if len(part) == 1 or not is_out_of_memory(error):
            raise
    # Only here, past the error and the frames it holds, is the failed work's memory free.
    ahead.drop()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return None


def _slices(sizes: Sequence[int]) -> list[_Slice]:
    stops = list(accumulate(sizes))
    return [_Slice(stop - size, stop) for size, stop in zip(sizes, stops, strict=True)]


def _sizes(size: int | Sequence[int], rows: int) -> tuple[int, ...]:
    """Rows of each micro-batch."""
    if isinstance(size, int):
        if size < 1:
            raise ValueError(f"expected micro-batches of at least 1 row, got {size}")
        return (*[size] * (rows // size), *([rows % size] if rows % size else []))
    if min(size, default=0) < 1 or sum(size) != rows:
        raise ValueError(
            f"expected sizes of at least 1 that add up to {rows} rows, got {list(size)}"
        )
    return tuple(size)


def _ends(weights: Tensor | None, rows: int) -> Tensor:  # [B + 1] float64
    """Weight of the rows before each, and of all."""
    if weights is None:
        return torch.arange(rows + 1, dtype=torch.float64)
    if list(weights.shape) != [rows]:
        raise ValueError(f"expected weights of shape [{rows}], got {list(weights.shape)}")
    wide = weights.detach().to("cpu", torch.float64)
    if not bool(((wide >= 0) & (wide < torch.inf)).all()) or not bool(wide.sum() > 0):
        raise ValueError(
            "expected finite weights of at least 0, one of them above, got "
            f"{wide.min().item()} to {wide.max().item()}"
        )
    return F.pad(wide.cumsum(0), (1, 0))


def _device(
    device: torch.device | str | None, both: Any, trained: Sequence[nn.Module]
) -> torch.device:
    """As told, or where the model is, or where the batch is."""
    if device is not None:
        return torch.device(device)
    found: list[Tensor] = [p for module in trained for p in module.parameters()]
    found += [tensor for _, tensor in tensors(both)]
    return found[0].device if found else torch.device("cpu")


def _drawing(device: torch.device) -> list[torch.device]:
    """The devices whose random numbers a forward pass may draw."""
    return list(dict.fromkeys([torch.device("cpu"), device]))


def _loss_of(work: _Work, both: Any, part: _Slice, copies: Copies) -> Tensor:
    return work.loss(copies.take(copies.start(part.of(both))), part)


def _total(values: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(values)).sum()
