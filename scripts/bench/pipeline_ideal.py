"""How long a pipeline's step takes where nothing but passes takes time: no messages, no overhead.

`seconds [P, M, 2]` are those of the forward and backward passes of each stage and micro-batch, of
at least two stages.
"""

from __future__ import annotations

import heapq
import itertools

import numpy as np

FORWARD, BACKWARD = 0, 1
Pass = tuple[int, int]  # forward or backward, micro-batch


def message_driven(seconds: np.ndarray, limit: int) -> float:
    """Each stage takes what arrived first; stage 0 lets one more in after each backward pass."""
    stages, micro_batches, _ = seconds.shape
    free = [0.0] * stages
    number = itertools.count()  # of what arrives at the same time, the one that was sent first
    messages = [(0.0, next(number), 0, FORWARD, i) for i in range(min(limit, micro_batches))]
    waiting = iter(range(len(messages), micro_batches))
    while messages:
        arrival, _, stage, kind, i = heapq.heappop(messages)
        free[stage] = max(free[stage], arrival) + seconds[stage, i, kind]
        if kind == FORWARD and stage == stages - 1:
            kind = BACKWARD
            free[stage] += seconds[stage, i, kind]
        if kind == BACKWARD and stage == 0:
            if (i := next(waiting, -1)) < 0:
                continue
            kind = FORWARD
            free[stage] += seconds[stage, i, kind]
        to = stage + 1 if kind == FORWARD else stage - 1
        sent = round(free[stage], 9)  # sums of the same numbers in another order are ties
        heapq.heappush(messages, (sent, next(number), to, kind, i))
    return max(free)


def scheduled(seconds: np.ndarray, orders: list[list[Pass]]) -> float:
    """Each stage makes its passes in its order, and waits for what the next of them needs."""
    stages = len(seconds)
    done: dict[tuple[int, Pass], float] = {}
    free = [0.0] * stages
    left = [iter(order) for order in orders]
    turns = [next(order, None) for order in left]
    while any(turn is not None for turn in turns):
        for stage, turn in enumerate(turns):
            if turn is None:
                continue
            kind, i = turn
            before = stage - 1 if kind == FORWARD else stage + 1
            is_given = not 0 <= before < stages
            if not is_given and (before, turn) not in done:
                continue
            arrival = 0.0 if is_given else done[before, turn]
            free[stage] = max(free[stage], arrival) + seconds[stage, i, kind]
            done[stage, turn] = free[stage]
            turns[stage] = next(left[stage], None)
    return max(free)


def gpipe(stages: int, micro_batches: int) -> list[list[Pass]]:
    """All forward passes, then all backward passes."""
    order = [(kind, i) for kind in (FORWARD, BACKWARD) for i in range(micro_batches)]
    return [order] * stages


def one_f_one_b(stages: int, micro_batches: int) -> list[list[Pass]]:
    """As many forward passes as stages are left, then backward and forward passes in turn."""
    orders = []
    for stage in range(stages):
        ahead = min(micro_batches, stages - stage)
        order = [(FORWARD, i) for i in range(ahead)]
        for i in range(micro_batches):
            order.append((BACKWARD, i))
            if i + ahead < micro_batches:
                order.append((FORWARD, i + ahead))
        orders.append(order)
    return orders
