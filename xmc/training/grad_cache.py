"""A contrastive step over any batch in the memory of a chunk: the gradient cache.

A loss over all pairs of a batch needs all representations at once, but not the graphs behind them:
given the gradient of every representation, chunks of the batch go through the encoder and back one
at a time. Source: Gao, Zhang, Han, Callan, Scaling Deep Contrastive Learning Batch Size under
Memory Limited Setup, arXiv 2101.06983, sections 3.2 to 3.4; its section 5 is
`xmc.training.deep_distance`. `xmc.training.grad_check` tells whether an encoder can be run again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from xmc.training.autocast import without_autocast
from xmc.training.chunks import Chunk
from xmc.training.encoding import Encoder, Encoding, Getter
from xmc.training.gradient_sync import check_same_passes, synchronized
from xmc.training.kept_graphs import Job, forward

R = TypeVar("R")


def cached_step(
    encoders: Encoder | Sequence[Encoder],
    inputs: Any,
    loss: Callable[..., R],
    *,
    chunk: Chunk | Sequence[Chunk],
    kept: int | None = None,
    keep_bytes: int = 0,
    rep: Getter | Sequence[Getter] = None,
    loss_args: Sequence[Any] = (),
    loss_kwargs: Mapping[str, Any] | None = None,
    scaler: torch.amp.GradScaler | None = None,
    synchronize: bool = True,
    modules: Iterable[nn.Module] = (),
) -> R:
    """`loss(*[encode(x) for encode, x in zip(encoders, inputs)]).backward()` in chunks of `x`.

    Adds to the `.grad` of the encoders' parameters and of what the loss reads (a temperature), and
    returns what `loss` returned, detached: the loss, or a tuple that begins with it. Three passes:
    every chunk through its encoder without a graph; the loss of all representations and its
    gradient in them; every chunk again, with the random numbers and buffers of its first time and
    with a graph, and that gradient back through it. Costs one forward pass more than a plain step,
    but for the last chunk, and holds the representations, their gradients and one chunk's graph.

    `encoders` is one or several; the same one may be given again for other inputs. Inputs have any
    structure that `xmc.training.chunks` can cut: a tensor, `Bag` or `Tokens` is given to the
    encoder as it is, a tuple or list of tensors as `encode(*x)`, a mapping as `encode(**x)`.
    Encoders may have different numbers of rows. `chunk` is a number of rows or a `TokenBudget`, one
    for all or one for each encoder. `rep` gets the representations [B, ...] from what an encoder
    returns: a function, the name of a field, or a position; also one for each.

    The last `kept` chunks, or as many as save at most `keep_bytes` for their backward pass, keep
    their graph and are spared the second forward pass; without either the last one does, whose
    graph waits through the loss (`kept=0`: none does). `scaler` scales the loss, once. Autocast
    around the call holds for forward passes and loss, not for backward passes.

    The result is that of one backward pass over the same chunks, to rounding, dropout included, and
    random numbers after the step go on as after that pass. Of a forward pass that is not cut it
    differs where one row's result depends on another: BatchNorm normalises by chunk (its running
    statistics take in each chunk once), and dropout draws chunk by chunk.

    DistributedDataParallel and FSDP around or inside an encoder synchronise once a step, in the
    last backward pass, whatever the numbers of chunks; an outer `no_sync` stays in force. FSDP 2
    cannot be asked for its setting: say `synchronize=False` to accumulate over several steps. It
    gathers parameters in every pass, so that all ranks need as many chunks. A loss of the rows of
    all ranks (`xmc.losses`, with a `world`) is one exchange between the passes.
    Encoders that are no modules are searched for modules in what they refer to; name those that
    cannot be found so in `modules`.

    Raises ValueError for inputs without rows or with different numbers of rows, chunks of no rows,
    an encoder that changes its inputs or gives another number of representations, numbers of
    chunks that FSDP 2 cannot have, a loss that is not one number; TypeError where representations
    are no tensor.
    """
    if (kept or 0) < 0 or keep_bytes < 0 or (kept and keep_bytes):
        raise ValueError(
            f"expected kept or keep_bytes of at least 0, got kept={kept}, keep_bytes={keep_bytes}"
        )
    encodings = make_encodings(encoders, inputs, chunk=chunk, rep=rep, modules=modules)
    wrappers = dict.fromkeys(wrapper for encoding in encodings for wrapper in encoding.wrappers)
    if len(wrappers) > 1 and (kept or keep_bytes):
        # Ranks with different numbers of chunks would set up their wrappers in different orders.
        raise ValueError(
            f"expected no kept graphs with {len(wrappers)} modules that synchronise gradients, "
            f"got kept={kept}, keep_bytes={keep_bytes}"
        )
    if kept is None:
        kept = 0 if keep_bytes or len(wrappers) > 1 else 1
    jobs = [(which, index) for which, e in enumerate(encodings) for index in range(len(e))]
    check_same_passes({w: sum(len(e) for e in encodings if w in e.wrappers) for w in wrappers})
    graphs = forward(encodings, jobs, kept=kept, keep_bytes=keep_bytes)
    made = [encoding.take_representations() for encoding in encodings]
    reps = [leaf for leaf, _ in made]
    with torch.enable_grad():
        result = loss(*reps, *loss_args, **(loss_kwargs or {}))
        value = loss_of(result)
        with without_autocast(rep.device for rep in reps):
            (value if scaler is None else scaler.scale(value)).backward()
    torch.clear_autocast_cache()
    d_reps = [None if leaf.grad is None else leaf.grad.split(rows) for leaf, rows in made]
    replays = [*graphs, *sorted(set(jobs) - set(graphs))]  # kept graphs first: they free memory
    _replay(encodings, replays, d_reps, synchronize=synchronize)
    return _detached(result)


def make_encodings(
    encoders: Encoder | Sequence[Encoder],
    inputs: Any,
    *,
    chunk: Chunk | Sequence[Chunk],
    rep: Getter | Sequence[Getter],
    modules: Iterable[nn.Module],
) -> list[Encoding]:
    """One for each encoder with its inputs; ValueError where their numbers differ."""
    if not isinstance(encoders, list | tuple | nn.ModuleList):
        encoders, inputs = [cast(Encoder, encoders)], [inputs]
    number = len(encoders)
    if number == 0:
        raise ValueError("expected at least one encoder, got none")
    if not isinstance(inputs, list | tuple) or len(inputs) != number:
        got = len(inputs) if isinstance(inputs, list | tuple) else type(inputs).__name__
        raise ValueError(f"expected a list of inputs for {number} encoders, got {got}")
    return [
        Encoding(encode, x, chunk=size, rep=getter, modules=modules, name=f"encoder {position}")
        for position, (encode, x, size, getter) in enumerate(
            zip(
                encoders,
                inputs,
                _for_each("chunk", chunk, number),
                _for_each("rep", rep, number),
                strict=True,
            )
        )
    ]


def _for_each(option: str, value: Any, number: int) -> list[Any]:
    values = list(value) if isinstance(value, list | tuple) else [value] * number
    if len(values) != number:
        raise ValueError(f"expected one {option} for each of {number} encoders, got {len(values)}")
    return values


def _replay(
    encodings: list[Encoding],
    jobs: list[Job],
    d_reps: list[tuple[Tensor, ...] | None],
    *,
    synchronize: bool,
) -> None:
    """Backward passes of all chunks in the order given; of each wrapper the last synchronises."""
    jobs = [job for job in jobs if d_reps[job[0]] is not None]
    last = {wrapper: job for job in jobs for wrapper in encodings[job[0]].wrappers}
    with ExitStack() as stack:
        for encoding in encodings:
            stack.enter_context(encoding.recorder.preserved())
        for job in jobs:
            encoding, d_rep = encodings[job[0]], d_reps[job[0]]
            assert d_rep is not None
            now = [w for w in encoding.wrappers if synchronize and last[w] == job]
            with synchronized(encoding.wrappers, now):
                encoding.backward(job[1], d_rep[job[1]])
    torch.clear_autocast_cache()


def loss_of(result: Any) -> Tensor:
    value = result[0] if isinstance(result, tuple) and result else result
    if not isinstance(value, Tensor) or value.numel() != 1:
        got = f"shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"expected a loss of one number, got {got}")
    if not value.requires_grad:
        raise ValueError("expected a loss with a gradient, got one that is computed without")
    return value


def _detached(result: R) -> R:
    if isinstance(result, tuple):
        parts = [part.detach() if isinstance(part, Tensor) else part for part in result]
        return cast(R, tuple(parts))
    return cast(R, cast(Tensor, result).detach())
