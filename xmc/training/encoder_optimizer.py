"""What trains the body of a model, all below its heads: groups of rates, loss scale, clipping."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from xmc.config import Config
from xmc.distributed.collectives import World, sum_
from xmc.distributed.data_parallel import own_part, own_rows
from xmc.distributed.offload import OffloadedAdamW
from xmc.nn.layers import parameter_depths
from xmc.nn.lazy import LazyAdamW, coalesced
from xmc.nn.transformer import TransformerEncoder


def make_encoder_optimizer(body: nn.Module, config: Config) -> torch.optim.Optimizer:
    """AdamW with lazy rows for embedding tables; biases and norms are not decayed.

    With `encoder_optimizer.offload` its state is in host memory, and no gradient may be sparse.
    Every group has an `lr_scale`, its share of the learning rate; that of the first is 1.
    """
    options = config.encoder_optimizer
    scales = _lr_scales(body, options.layer_decay)
    trained = [p for p in body.parameters() if p.requires_grad]
    groups = []
    for scale in sorted({1.0, *scales.values()}, reverse=True):
        chosen = [p for p in trained if scales.get(p, 1.0) == scale]
        matrices, vectors = [p for p in chosen if p.dim() > 1], [p for p in chosen if p.dim() <= 1]
        for params, decay in ((matrices, options.weight_decay), (vectors, 0.0)):
            groups.append({"params": params, "weight_decay": decay, "lr_scale": scale})
    optimizer = OffloadedAdamW if options.offload else LazyAdamW
    return optimizer(groups, lr=options.lr, betas=options.betas, eps=options.eps)


def _lr_scales(body: nn.Module, layer_decay: float) -> dict[Tensor, float]:
    """`layer_decay ** (layers above)` for the parameters of transformers; empty where it is 1."""
    scales: dict[Tensor, float] = {}
    if layer_decay == 1:
        return scales
    for module in body.modules():
        if isinstance(module, TransformerEncoder):
            depths = parameter_depths(module.model)
            top = max(depths.values())
            for name, parameter in module.model.named_parameters():
                scales[parameter] = layer_decay ** (top - depths[name])
    return scales


def make_scaler(
    config: Config, optimizer: torch.optim.Optimizer, device: torch.device
) -> torch.amp.GradScaler:
    """The loss scale of a float16 encoder; for any other it does nothing.

    It scales what heads hand down, `d_reps`, so that small gradients survive float16. A head's own
    gradient is made in float32 from its scores and never meets the scale: where the encoder's
    gradient overflows, the encoder's step is skipped and the head's, taken already, stands.
    """
    trains = any(group["params"] for group in optimizer.param_groups)
    enabled = trains and config.encoder.autocast == "float16"
    return torch.amp.GradScaler(device.type, enabled=enabled)


@torch.no_grad()
def coalesce_gradient_(module: nn.Module) -> None:
    """Hold each row of sparse gradients once: autograd adds up passes by listing their rows."""
    for parameter in module.parameters():
        if parameter.grad is not None and parameter.grad.is_sparse:
            parameter.grad = coalesced(parameter.grad)


@torch.no_grad()
def clip_gradient_(module: nn.Module, max_norm: float, world: World = World.alone()) -> float:
    """Scale the gradients so that their joint norm is at most `max_norm` (0: only measure).

    Sparse gradients count by their values; returns the norm before clipping. Of gradients that
    ranks share (FSDP) each scales its part; sends one number.
    """
    values: list[Tensor] = []
    parts: list[Tensor] = []  # of gradients that ranks share
    for parameter in module.parameters():
        grad = parameter.grad
        if grad is None:
            continue
        if grad.is_sparse:
            parameter.grad = grad = coalesced(grad)
            grad = grad.values()
        (values if own_rows(grad) is None else parts).append(own_part(grad))
    if not values and not parts:
        return 0.0
    norms = [value.float().norm() for value in values]
    if parts:
        squares = torch.stack([part.float().square().sum() for part in parts]).sum()
        norms.append(sum_(squares, world).sqrt())
    norm = float(torch.stack(norms).norm())
    if max_norm and norm > max_norm:
        for value in (*values, *parts):
            value.mul_(max_norm / norm)
    return norm
