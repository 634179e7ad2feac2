"""AdamW that touches only the rows of a table which the batch touched."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from xmc.distributed.data_parallel import own_part
from xmc_kernels.lazy_adamw import lazy_adamw_


class LazyAdamW(torch.optim.Optimizer):
    """`torch.optim.AdamW`, lazy on parameters whose gradient is sparse.

    Of a sparse gradient only the stored rows are updated: moments and decay of the others stand
    still until a batch touches them again, so the cost of a step does not grow with the table.
    The bias correction counts the steps of the parameter, not those of a row. With a gradient
    that touches every row at every step, and for dense gradients, it equals AdamW. Of a parameter
    that ranks share (FSDP) each has the moments of its part.

    Raises ValueError for hyper-parameters out of range and for a sparse gradient that is not
    sparse in its rows alone.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)
        for group in self.param_groups:
            _check_options(group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; returns what `closure`, if given, returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            dense = []
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self._state(parameter)
                if parameter.grad.is_sparse:
                    _step_rows(parameter, parameter.grad, state, group)
                else:
                    dense.append((own_part(parameter), own_part(parameter.grad), state))
            _step_dense(dense, group)
        return loss

    def _state(self, parameter: Tensor) -> dict[str, Tensor]:
        """Step and moments of a parameter, under the names that torch.optim.AdamW uses."""
        state: dict[str, Tensor] = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), device=parameter.device)
            state["exp_avg"] = torch.zeros_like(own_part(parameter))
            state["exp_avg_sq"] = torch.zeros_like(own_part(parameter))
        return state


def coalesced(grad: Tensor) -> Tensor:
    """`grad.coalesce()` of a gradient sparse in its rows, without a copy where it is sorted.

    Autograd forgets that a sparse gradient was coalesced when it stores it in `.grad`; looking at
    the row ids is far cheaper than sorting and copying the rows.
    """
    if grad.is_coalesced():
        return grad
    rows = grad._indices()
    if rows.shape[0] == 1 and bool((rows[0, 1:] > rows[0, :-1]).all()):
        return grad._coalesced_(True)
    return grad.coalesce()


def _step_rows(
    parameter: Tensor, grad: Tensor, state: dict[str, Tensor], group: dict[str, Any]
) -> None:
    if grad.sparse_dim() != 1:
        raise ValueError(
            "expected a sparse gradient with one sparse dimension, the rows, "
            f"got {grad.sparse_dim()} of {grad.dim()}"
        )
    grad = coalesced(grad)
    state["step"] += 1
    lazy_adamw_(
        parameter.flatten(1),
        state["exp_avg"].flatten(1),
        state["exp_avg_sq"].flatten(1),
        grad.indices()[0],
        grad.values().flatten(1),
        lr=float(group["lr"]),
        betas=group["betas"],
        eps=group["eps"],
        weight_decay=group["weight_decay"],
        step=int(state["step"]),
    )


def _step_dense(
    dense: list[tuple[Tensor, Tensor, dict[str, Tensor]]], group: dict[str, Any]
) -> None:
    # One fused kernel over all parameters of a device; devices without one take torch's default.
    for fused in (True, False):
        chosen = [d for d in dense if (d[0].device.type in ("cpu", "cuda")) == fused]
        if not chosen:
            continue
        adamw(
            [parameter for parameter, _, _ in chosen],
            [grad for _, grad, _ in chosen],
            [state["exp_avg"] for _, _, state in chosen],
            [state["exp_avg_sq"] for _, _, state in chosen],
            [],
            [state["step"] for _, _, state in chosen],
            fused=fused,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=float(group["lr"]),
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def _check_options(group: dict[str, Any]) -> None:
    for name in ("lr", "eps", "weight_decay"):
        if not group[name] >= 0:
            raise ValueError(f"expected {name} of at least 0, got {group[name]}")
    if not all(0 <= beta < 1 for beta in group["betas"]):
        raise ValueError(f"expected betas in [0, 1), got {group['betas']}")
