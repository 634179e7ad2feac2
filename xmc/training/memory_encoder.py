"""Memory of the encoder: its weights and moments, and what one pass keeps for the backward.

Activations of a transformer: Korthikanti et al., "Reducing Activation Recomputation in Large
Transformer Models" (arXiv 2205.05198), section 4.1: 34 bytes a token and hidden unit and 5 bytes an
attention weight, in 16 bits and on a GPU. The CPU's numbers were read off the tensors that autograd
saves there, where masks of dropout are float32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from xmc.config import Config, ConfigError
from xmc.nn.encoder import BagEncoder
from xmc.nn.layers import freeze_, layers_of
from xmc.nn.lora import add_lora_
from xmc.nn.transformer import TransformerEncoder
from xmc.training.memory_component import MIB, Component
from xmc.training.scale_ranks import ALONE, Ranks
from xmc.training.workload import Workload

_MAPPED = 32 * MIB  # glibc's largest threshold of mapped blocks
_HOLES = 60 * 10**6


@dataclass(frozen=True)
class Transformer:
    """The numbers of a transformer's config.json that its activations depend on."""

    hidden: int  # H
    inner: int  # I, of the feed-forward layers
    heads: int
    layers: int
    attention_dropout: float
    layer_weights: int  # of the largest layer
    other_weights: int  # outside layers: embeddings, pooler


@dataclass(frozen=True)
class Encoder:
    """Numbers of weights of an encoder, and of the layer between it and the classifier."""

    out_features: int  # D, what the auxiliary head reads
    head_features: int  # what the classifier reads: D, or P behind an intermediate layer
    weights: int  # all
    trained: int  # those with moments and, but for a table, a dense gradient
    table: int  # of these, rows x D of a bag's table, whose gradient is sparse
    between: int  # of these, in the layer between encoder and head
    transformer: Transformer | None


def make_encoder(config: Config, workload: Workload) -> Encoder:
    """Count an encoder of the recipe on the meta device.

    Raises ConfigError where a transformer is no folder with a config.json: nothing is fetched.
    """
    options = config.encoder
    transformer = None
    if options.kind == "transformer" and not (Path(options.model) / "config.json").is_file():
        raise ConfigError(
            f"encoder.model: a plan counts by the config.json of a folder and fetches nothing, got "
            f"{options.model}: give a folder with --set encoder.model=FOLDER"
        )
    encoder: BagEncoder | TransformerEncoder
    with torch.device("meta"):
        if options.kind == "bag":
            encoder = BagEncoder(workload.num_features, options.dim)
        else:
            encoder = TransformerEncoder.from_config(options.model)
            transformer = _transformer(encoder)
            if options.lora_rank:
                add_lora_(encoder.model, rank=options.lora_rank, alpha=options.lora_alpha)
            freeze_(encoder.model, options.freeze_layers)
    dim, between = encoder.out_features, 0
    if options.intermediate:
        between = options.intermediate * (dim + 1)
    parameters = list(encoder.parameters())
    return Encoder(
        out_features=dim,
        head_features=options.intermediate or dim,
        weights=sum(p.numel() for p in parameters) + between,
        trained=sum(p.numel() for p in parameters if p.requires_grad) + between,
        table=workload.num_features * dim if options.kind == "bag" else 0,
        between=between,
        transformer=transformer,
    )


def passes_of(config: Config) -> tuple[int, int]:
    """The most rows of an encoder pass, and the passes of a step when its rows are long."""
    options = config.train
    step_rows = options.batch_size * options.accumulation
    if not options.max_tokens:
        rows = min(options.batch_size, options.micro_batch or options.batch_size)
        return rows, math.ceil(step_rows / rows)
    rows = max(1, min(options.max_tokens // config.features.max_length, step_rows))
    return rows, math.ceil(step_rows / rows)


def encoder_weights(encoder: Encoder, ranks: Ranks = ALONE) -> list[Component]:
    what = "a transformer" if encoder.transformer else "V x D"
    if not ranks.divides(encoder.transformer):
        return [Component("encoder weights", 4 * encoder.weights, f"{what}, float32")]
    own = ranks.share(encoder.weights - encoder.between) + encoder.between
    return [Component("encoder weights", 4 * own, f"{what}, float32, divided over ranks")]


def encoder_moments(encoder: Encoder, ranks: Ranks = ALONE) -> list[Component]:
    lazy = "; rows that no batch has touched take none yet" if encoder.table else ""
    own = encoder.trained
    if ranks.divides(encoder.transformer):
        own = ranks.share(encoder.trained - encoder.between) + encoder.between
    return [Component("encoder moments", 8 * own, f"AdamW, two numbers each{lazy}")]


def encoder_replica(encoder: Encoder, ranks: Ranks) -> list[Component]:
    """What DDP keeps for good, or FSDP gathers while the encoder runs; nothing for one rank.

    DDP's gradients are views of buckets that stay allocated. FSDP has a layer gathered and the next
    one on its way, and the weights outside layers from the first to the last of a pass. Of a BERT
    of 6 layers, H = 384, 2 ranks took 65 MB more by DDP than alone and 53 MB less by FSDP, where
    this says 91 and 73 (one process alone 995 MB; torch 2.13.0, gloo, 2026-11-22).
    """
    shape = encoder.transformer
    if shape is None or ranks.size == 1:
        return []
    if ranks.divides(shape):
        size = 4 * (shape.other_weights + 2 * shape.layer_weights)
        return [Component("gathered layers", size, "two layers at a time, and embeddings")]
    size = 4 * (encoder.trained - encoder.between)
    return [Component("gradient buckets", size, "of DDP, float32: they stay allocated")]


def encoder_pass(
    encoder: Encoder, config: Config, workload: Workload, ranks: Ranks = ALONE, *, cuda: bool
) -> list[Component]:
    """Activations and gradients while a step is taken, and the representations.

    Of a rank's rows; what `encoder_replica` counts is not in it.
    """
    whole, passes = passes_of(config)
    rows = ranks.share(whole)
    width = encoder.out_features + encoder.head_features
    reps = [Component("representations", 4 * 4 * rows * width, "[B, D] and their gradients")]
    dense_gradient = 4 * (encoder.trained - encoder.table)
    if encoder.table:
        touched = _touched(encoder, workload, whole)  # every rank has the gradient of all rows
        copies = 1 if passes == 1 else 2 * passes  # rows of each pass, and joined with the others
        size = dense_gradient + 4 * encoder.out_features * touched * copies
        return [*reps, Component("encoder gradient", size, "rows of the table that a step touches")]
    if ranks.divides(encoder.transformer):
        # Summed in the last pass of a step: whole until then.
        dense_gradient = ranks.share(dense_gradient) + (dense_gradient if passes > 1 else 0)
    elif ranks.size > 1:
        dense_gradient = 4 * encoder.between
    activations = activation_bytes(encoder, config, rows, cuda=cuda)
    if not cuda:
        reps.append(fragments(encoder, config, rows, activations))
    if passes == 1:
        # Activations go as gradients come.
        size = max(activations, dense_gradient)
        return [*reps, Component("encoder pass", size, "activations, then gradients: the larger")]
    return [
        *reps,
        Component("encoder activations", activations, f"{rows} rows of the longest texts"),
        Component("encoder gradient", dense_gradient, f"float32, added up over {passes} passes"),
    ]


def _touched(encoder: Encoder, workload: Workload, rows: int) -> int:
    return min(encoder.table // encoder.out_features, round(rows * workload.row_entries))


def fragments(encoder: Encoder, config: Config, rows: int, activations: int) -> Component:
    """Holes of the C library's heap: gradients and moments settle where activations were freed.

    Measured on transformers of 6 and 12 layers, H = 384: a fit within 40 MB in one plain pass. With
    smaller activations beside gradients, as much as gradients and moments take. Blocks from 32 MiB
    on are mapped and leave no holes.
    """
    shape, (_, passes) = encoder.transformer, passes_of(config)
    block = 4 * rows * config.features.max_length * (shape.hidden if shape else 0)
    if block >= _MAPPED:
        size = 0
    elif passes > 1 or config.encoder.checkpointing:
        size = 12 * encoder.trained
    else:
        size = min(activations, round(0.4 * activations) + _HOLES)
    return Component("fragments", size, "holes of the heap, in the C library's hands")


def activation_bytes(
    encoder: Encoder,
    config: Config,
    rows: int,
    *,
    cuda: bool,
    checkpointing: bool | None = None,
) -> int:
    """What a pass over rows of `max_length` tokens keeps for the backward.

    With gradient checkpointing (by default as the recipe says) a layer keeps its input, and one
    layer at a time is computed again.
    """
    shape = encoder.transformer
    if shape is None:
        return 0
    if checkpointing is None:
        checkpointing = config.encoder.checkpointing
    half = config.encoder.autocast != "none"
    layer = layer_bytes_per_token(shape, config.features.max_length, half=half, cuda=cuda)
    tokens = rows * config.features.max_length
    embedding = 12 * shape.hidden  # layer norm's input, dropout, its mask
    size = tokens * embedding
    if checkpointing:
        size += tokens * (shape.layers * 4 * shape.hidden + layer)
    else:
        size += tokens * shape.layers * layer
    return size + (2 * (encoder.weights - encoder.table) if half else 0)  # casts of the weights


def layer_bytes_per_token(shape: Transformer, length: int, *, half: bool, cuda: bool) -> int:
    """Bytes that a layer keeps of each token for the backward, with dropout."""
    H, inner = shape.hidden, shape.inner
    if cuda:
        # Fused attention keeps a number a head; masks take a byte.
        return (22 * H + 4 * inner if half else 34 * H + 8 * inner) + 4 * shape.heads + 16
    # Attention weights, their dropout and its mask exist where there is dropout.
    attention = 12 * shape.heads * length if shape.attention_dropout else 4 * shape.heads
    return (34 * H + 4 * inner if half else 40 * H + 8 * inner) + attention + 16


def evaluation_pass(encoder: Encoder, config: Config, rows: int) -> Component:
    """Without a backward only one layer's activations exist."""
    shape = encoder.transformer
    if shape is None:
        size = 3 * 4 * rows * (encoder.out_features + encoder.head_features)
        return Component("encoder, no gradient", size, f"[B, D] of {rows} rows")
    numbers = 6 * shape.hidden + 2 * shape.inner
    size = 4 * rows * config.features.max_length * numbers
    return Component("encoder, no gradient", size, f"one layer's activations of {rows} rows")


def _transformer(encoder: TransformerEncoder) -> Transformer:
    """Sizes from a Hugging Face config, under the names its families use."""
    config: Any = encoder.config

    def first(*names: str) -> Any:
        found = [getattr(config, name, None) for name in names]
        return next((value for value in found if value is not None), None)

    hidden = int(config.hidden_size)
    weights = sum(p.numel() for p in encoder.parameters())
    layers = _layer_weights(encoder)
    return Transformer(
        hidden=hidden,
        inner=int(first("intermediate_size", "hidden_dim", "ffn_dim", "d_ff") or 4 * hidden),
        heads=int(first("num_attention_heads", "num_heads") or 1),
        layers=int(first("num_hidden_layers", "num_layers") or 1),
        attention_dropout=float(first("attention_probs_dropout_prob", "attention_dropout") or 0.0),
        layer_weights=max(layers),
        other_weights=weights - sum(layers),
    )


def _layer_weights(encoder: TransformerEncoder) -> list[int]:
    """Numbers of weights by layer; of a model without a list of layers, as one."""
    try:
        _, layers = layers_of(encoder.model)
    except ValueError:
        return [sum(p.numel() for p in encoder.parameters())]
    return [sum(p.numel() for p in layer.parameters()) for layer in layers]
