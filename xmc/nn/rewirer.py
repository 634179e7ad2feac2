"""Rewiring of a layer in anybody's model, beside any torch optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from xmc.config import RewireConfig
from xmc.nn.fan_in import FixedFanInLinear
from xmc.nn.regrow import group_score
from xmc.nn.rewire import RewireReport, rewire_
from xmc.nn.rewire_schedule import is_due, prune_amount, rewire_progress
from xmc.nn.slot_age import SlotAges


class Rewirer:
    """Evolves the pattern of one `FixedFanInLinear` while its model trains.

    ```python
    rewirer = Rewirer(layer, optimizer, RewireConfig(method="rigl"), total_steps=10_000)
    for batch in batches:
        loss(model(batch)).backward()   # or several micro-batches
        optimizer.step()
        rewirer.step()
        optimizer.zero_grad()
    ```

    State of the optimizer that has the weight's shape moves with the slots; other state is left
    alone. Give each layer of a model its own `seed`.

    RigL keeps the layer's inputs and the gradient of its outputs, [B, D] and [B, L] of every pass,
    from backward to `step`, on the steps after which a rewiring is due and on no others. Where
    several processes train copies of the layer, `reduce` sums a gradient tile over them in place
    (`torch.distributed.all_reduce`), so that all choose alike; it is called once per tile.

    Raises ValueError where the optimizer does not hold the layer's weight.
    """

    def __init__(
        self,
        layer: FixedFanInLinear,
        optimizer: torch.optim.Optimizer,
        config: RewireConfig,
        *,
        total_steps: int,
        seed: int = 0,
        reduce: Callable[[Tensor], object] | None = None,
    ) -> None:
        if not any(p is layer.weight for group in optimizer.param_groups for p in group["params"]):
            raise ValueError("expected an optimizer that holds layer.weight, got one without it")
        if total_steps < 1:
            raise ValueError(f"expected total_steps of at least 1, got {total_steps}")
        self.layer = layer
        self.optimizer = optimizer
        self.config = config
        self.total_steps = total_steps
        self.seed = seed
        self.steps = 0  # optimizer steps taken
        self.ages = SlotAges(layer.index.shape[0], layer.fan_in, device=layer.index.device)
        self._reduce = reduce
        self._passes: list[tuple[Tensor, Tensor]] = []  # x [B, D] and gradient [B, L]
        self._hook: Any = None
        self._watch()

    @property
    def next_is_due(self) -> bool:
        """Whether the coming `step` will rewire."""
        return is_due(self.config, self.steps + 1, self.total_steps)

    @torch.no_grad()
    def step(self) -> RewireReport | None:
        """Count an optimizer step, and rewire if it is time: call it after `optimizer.step()`.

        Raises RuntimeError where RigL saw no backward pass through the layer since the last step.
        """
        report = self._rewire(self.steps + 1) if self.next_is_due else None
        self.steps += 1
        self._watch()
        return report

    def close(self) -> None:
        """Stop watching the layer."""
        self._passes = []  # a new one: a late backward of an old pass goes nowhere
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def state_dict(self) -> dict[str, Any]:
        """What an exact resume needs, besides layer and optimizer; taken between two steps."""
        counters = {name: getattr(self, name) for name in ("steps", "total_steps", "seed")}
        return counters | {name: tensor.clone() for name, tensor in self.ages.tensors().items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict()`. Raises ValueError unless it is of the same kind of run."""
        for name in ("total_steps", "seed"):
            if state[name] != getattr(self, name):
                raise ValueError(
                    f"expected a state with {name} = {getattr(self, name)}, got {state[name]}"
                )
        for name, tensor in self.ages.tensors().items():
            if state[name].shape != tensor.shape:
                raise ValueError(
                    f"expected {name} of shape {list(tensor.shape)} for this layer, "
                    f"got {list(state[name].shape)}"
                )
            tensor.copy_(state[name])
        self.steps = state["steps"]
        self._watch()

    def _rewire(self, step: int) -> RewireReport:
        if self.config.method == "rigl" and not self._passes:
            raise RuntimeError(
                f"expected a backward pass through the layer before step {step}, at which RigL "
                "rewires by its gradient, got none"
            )
        layer, config = self.layer, self.config
        state = self.optimizer.state.get(layer.weight, {})
        shape = layer.weight.shape
        return rewire_(
            layer.weight,
            layer.index,
            layer.in_features,
            pattern=layer.pattern,
            prune=config.prune,
            amount=prune_amount(config, rewire_progress(config, step, self.total_steps)),
            seed=self.seed,
            step=step,
            growth=self._growth if config.method == "rigl" else None,
            init=config.init,
            moments=[m for m in state.values() if isinstance(m, Tensor) and m.shape == shape],
            keep_moments=config.moments == "keep",
            ages=self.ages,
        )

    def _watch(self) -> None:
        """Look at the layer's passes until the coming step, if RigL will need them."""
        self.close()
        if self.config.method == "rigl" and self.next_is_due:
            self._hook = self.layer.register_forward_hook(self._keep, with_kwargs=True)

    def _keep(
        self, layer: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: Tensor
    ) -> None:
        if not output.requires_grad:
            return
        x = (args[0] if args else kwargs["x"]).detach().reshape(-1, self.layer.in_features)
        passes = self._passes

        def keep(gradient: Tensor) -> None:
            passes.append((x, gradient.detach().reshape(len(x), -1)))

        output.register_hook(keep)

    def _growth(self, start: int, stop: int) -> Tensor:
        group_size = self.layer.group_size
        first, last = start * group_size, stop * group_size
        dtype = torch.promote_types(self.layer.weight.dtype, torch.float32)
        total = self.layer.weight.new_zeros(last - first, self.layer.in_features, dtype=dtype)
        for x, gradient in self._passes:
            total.addmm_(gradient[:, first:last].T.to(dtype), x.to(dtype))
        if self._reduce is not None:
            self._reduce(total)
        return group_score(total, group_size)
