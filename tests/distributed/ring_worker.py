"""What each rank does in test_ring.py and test_ring_losses.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from xmc.distributed.collectives import World
from xmc.distributed.ring import Gather, Ring
from xmc.losses import InfoNCE, SigmoidLoss, info_nce, sigmoid_loss

LOSSES: dict[str, Callable[..., Tensor]] = {"info_nce": info_nce, "sigmoid": sigmoid_loss}


def visits(counts: list[int], tensors: list[list[Tensor]]) -> dict[str, Any]:
    """Both walks with a sum, a merge of one's own and no addends; what each visit saw."""
    world = World.current()
    results: dict[str, Any] = {}
    for kind in (Ring, Gather):
        walk, mine, seen = kind(counts, world), [t[world.rank] for t in tensors], []

        def visit(which: slice, given: list[Tensor], seen: list[Any] = seen) -> Tensor:
            seen.append((which.start, which.stop, [t.clone() for t in given]))
            return given[0].double() * (world.rank + 1)

        results[kind.__name__] = {
            "sum": walk.visit(mine, visit),
            "max": walk.visit(mine, visit, torch.maximum),
            "none": walk.visit(mine, lambda which, given: None),
            "seen": seen,
        }
    return results


def order(counts: list[int]) -> list[str]:
    """What a walk round the ring begins and does, in turn."""
    world, events = World.current(), []
    start = dist.batch_isend_irecv

    def starting(operations: list[dist.P2POp]) -> list[dist.Work]:
        events.append(f"send {operations[0].tensor.dtype}")
        return start(operations)

    def visit(which: slice, given: list[Tensor]) -> Tensor:
        events.append("visit")
        return given[0].double()

    dist.batch_isend_irecv = starting
    try:
        Ring(counts, world).visit([torch.ones(counts[world.rank])], visit)
    finally:
        dist.batch_isend_irecv = start
    return events


def losses(cases: list[dict[str, Any]]) -> list[Any]:
    """The value and gradients of each case with this rank's arguments; or the error's text."""
    world = World.current()
    return [_result(case, world) for case in cases]


def _result(case: dict[str, Any], world: World) -> Any:
    own = dict(case["ranks"][world.rank])
    leaves = {n: own.pop(n).clone() for n in ("q", "k", "scale", "bias") if n in own}
    for name, leaf in leaves.items():
        leaf.requires_grad_(name in case.get("wanted", leaves))
    loss = LOSSES[case["loss"]]
    q, k = leaves.pop("q"), leaves.pop("k")
    try:
        value = loss(q, k, **leaves, **own, world=world, **case["options"])
    except (ValueError, RuntimeError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    if value.requires_grad:
        (case.get("upstream", 1.0) * value).backward()
    both = {"q": q, "k": k, **leaves}
    return {"loss": value.detach(), **{name: leaf.grad for name, leaf in both.items()}}


def twice(q: list[Tensor], k: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Backward through one graph two times."""
    world = World.current()
    x = q[world.rank].clone().requires_grad_()
    loss = info_nce(x, k[world.rank], scale=3.0, symmetric=True, world=world, exchange="ring")
    loss.backward(retain_graph=True)
    assert x.grad is not None
    first, x.grad = x.grad, None
    loss.backward()
    assert x.grad is not None
    return first, x.grad


def modules(q: list[Tensor], k: list[Tensor]) -> list[Any]:
    """Both modules, their parameters' gradients added up over ranks."""
    world = World.current()
    results = []
    for module in (InfoNCE(14.0, learnable=True, symmetric=True), SigmoidLoss(5.0, -3.0)):
        module.double()
        loss = module(q[world.rank], k[world.rank], world=world)
        loss.backward()
        for parameter in module.parameters():
            dist.all_reduce(parameter.grad)
        results.append((loss.detach(), [parameter.grad for parameter in module.parameters()]))
    return results


def averaged(x: list[Tensor], y: list[Tensor]) -> list[Tensor | None]:
    """The gradients of an encoder that DistributedDataParallel averages, as the losses advise."""
    world = World.current()
    torch.manual_seed(3)
    encoder = nn.Linear(x[0].shape[1], 6).double()
    wrapped = nn.parallel.DistributedDataParallel(encoder)
    both = wrapped(torch.cat([x[world.rank], y[world.rank]]))
    q, k = both.split([len(x[world.rank]), len(y[world.rank])])
    loss = info_nce(q, k, scale=2.0, symmetric=True, world=world)
    (world.size * loss).backward()
    return [parameter.grad for parameter in encoder.parameters()]


@contextmanager
def counted() -> Iterator[list[int]]:
    """Bytes of each batch of sends that this rank starts."""
    sent: list[int] = []
    start = dist.batch_isend_irecv

    def counting(operations: list[dist.P2POp]) -> list[dist.Work]:
        sent.append(sum(o.tensor.nbytes for o in operations if o.op is dist.isend))
        return start(operations)

    dist.batch_isend_irecv = counting
    try:
        yield sent
    finally:
        dist.batch_isend_irecv = start


def ring_bytes(rows: int, dim: int, cases: list[dict[str, Any]]) -> list[int]:
    """What a step sends round the ring."""
    world, results = World.current(), []
    for options in cases:
        q, k = (torch.randn(rows, dim, requires_grad=True) for _ in range(2))
        with counted() as sent:
            info_nce(q, k, scale=2.0, world=world, exchange="ring", **options).backward()
        results.append(sum(sent))
    return results


class _Largest(TorchDispatchMode):
    """Remembers how many numbers the largest tensor has that any operation returns."""

    largest = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: Any = (), options: Any = None
    ) -> Any:
        out = function(*arguments, **(options or {}))
        sizes = [t.numel() for t in tree_leaves(out) if isinstance(t, Tensor)]
        self.largest = max([self.largest, *sizes])
        return out


def largest(rows: int, dim: int) -> dict[str, int]:
    """The numbers of the largest tensor of a step, by each way."""
    world, results = World.current(), {}
    for exchange in ("ring", "gather"):
        q, k = (torch.randn(rows, dim, requires_grad=True) for _ in range(2))
        with _Largest() as mode:
            loss = info_nce(q, k, scale=2.0, symmetric=True, world=world, exchange=exchange)
            loss.backward()
        results[exchange] = mode.largest
    return results
