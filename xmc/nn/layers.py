"""The layers of a transformer: freeze the lowest, train them more slowly, or keep less of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def layers_of(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The layers of a Hugging Face model, first to last, and their name in it.

    Raises ValueError where it has no list of `config.num_hidden_layers` modules: ALBERT's layers,
    for one, share their weights.
    """
    count = model.config.num_hidden_layers  # type: ignore[union-attr]
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return name, module
    raise ValueError(
        f"expected a model with a list of its {count} layers, got {type(model).__name__} without"
    )


def parameter_depths(model: nn.Module) -> dict[str, int]:
    """Depth of every parameter: 0 embeddings, i the i-th layer, that of the last for what follows.

    Parameters that a model registers before its layers are embeddings.
    """
    prefix, layers = layers_of(model)
    depths, reached = {}, 0
    for name, _ in model.named_parameters():
        if name.startswith(f"{prefix}."):
            depths[name] = int(name[len(prefix) + 1 :].split(".", 1)[0]) + 1
            reached = len(layers)
        else:
            depths[name] = reached
    return depths


def freeze_(model: nn.Module, num_layers: int) -> None:
    """Stop training the embeddings and the first `num_layers` layers; -1 leaves all as it is.

    Dropout inside them goes on. Raises ValueError for more layers than there are.
    """
    if num_layers < 0:
        return
    _, layers = layers_of(model)
    if num_layers > len(layers):
        raise ValueError(
            f"encoder.freeze_layers: expected at most the {len(layers)} layers of the model, "
            f"got {num_layers}"
        )
    depths = parameter_depths(model)
    for name, parameter in model.named_parameters():
        if depths[name] <= num_layers:
            parameter.requires_grad_(False)


def recompute_layers_(model: nn.Module) -> None:
    """In training keep the inputs of each layer alone; backward runs its forward pass again.

    The second pass draws the dropout of the first. Raises ValueError where there are no layers.
    """
    _, layers = layers_of(model)
    for layer in layers:
        layer.forward = partial(_recomputed, layer, layer.forward)


def _recomputed(layer: nn.Module, forward: Callable[..., Any], *inputs: Any, **options: Any) -> Any:
    if not (layer.training and torch.is_grad_enabled()):
        return forward(*inputs, **options)
    # Not the reentrant kind: it needs inputs with gradients, which frozen embeddings do not give.
    return checkpoint(forward, *inputs, use_reentrant=False, **options)
