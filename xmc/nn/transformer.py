"""The transformer encoder: from tokens to a representation of D numbers."""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from xmc.nn.compiler import missing_compiler
from xmc.nn.layers import recompute_layers_
from xmc.nn.warm_start import encoder_half, model_folder, read_encoder
from xmc.types import Tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class CompileWarning(UserWarning):
    """A model that was to be compiled runs uncompiled."""


class TransformerEncoder(nn.Module):
    """Pooled last hidden states of a Hugging Face model, with dropout.

    `model` is the folder of a saved model, a run or model folder of xmc, a name on the Hugging Face
    hub, or a model object (which is used as it is, not copied). Of an encoder-decoder the encoder
    is used. A pooler that the model brings along is not used and therefore frozen. Weights are kept
    in float32; `autocast` runs the model's arithmetic in bfloat16 or float16 and pools in float32
    (train float16 with a scaled loss: `torch.amp.GradScaler`). `checkpointing` keeps only the
    inputs of the layers for the backward pass, which computes the rest again: about a third more
    time. `compile` hands the model to torch.compile at its first batch, in place; where no compiler
    is installed it says so in one CompileWarning and goes on without.

    Raises ValueError where the model cannot be had, a batch does not fit it, or `checkpointing`
    finds no layers in it.
    """

    def __init__(
        self,
        model: str | PreTrainedModel,
        *,
        pooling: Literal["mean", "cls"] = "mean",
        dropout: float = 0.0,
        autocast: Literal["none", "bfloat16", "float16"] = "none",
        checkpointing: bool = False,
        compile: bool = False,
    ) -> None:
        super().__init__()
        if pooling not in ("mean", "cls"):
            raise ValueError(f'expected pooling "mean" or "cls", got {pooling!r}')
        if autocast not in _DTYPES:
            names = ", ".join(f'"{name}"' for name in _DTYPES)
            raise ValueError(f"expected autocast {names}, got {autocast!r}")
        whole = _load(model) if isinstance(model, str) else model
        self.config = whole.config
        self.model = encoder_half(whole)
        pooler = getattr(self.model, "pooler", None)
        if isinstance(pooler, nn.Module):
            pooler.requires_grad_(False)
        self.pooling = pooling
        self.autocast = autocast
        self.dropout = nn.Dropout(dropout)
        if checkpointing:
            recompute_layers_(self.model)
        self._to_compile = compile

    @classmethod
    def from_config(
        cls,
        folder: str,
        *,
        pooling: Literal["mean", "cls"] = "mean",
        dropout: float = 0.0,
        autocast: Literal["none", "bfloat16", "float16"] = "none",
    ) -> TransformerEncoder:
        """An encoder of the shape that `save_config` wrote, with random weights."""
        from transformers import AutoConfig, AutoModel

        if not (Path(folder) / "config.json").is_file():
            raise ValueError(f"{folder}: expected the folder of a model with a config.json")
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        model = AutoModel.from_config(config, dtype=torch.float32)
        return cls(model, pooling=pooling, dropout=dropout, autocast=autocast)

    def save_config(self, folder: str | Path) -> None:
        """Write the model's config.json, from which `from_config` builds the same shape."""
        self.config.save_pretrained(folder)

    @property
    def out_features(self) -> int:
        return int(self.config.hidden_size)

    def forward(self, tokens: Tokens) -> Tensor:  # [B, D]
        if self._to_compile:
            self._to_compile = False
            _compile(self.model, tokens.ids.device)
        try:
            with arithmetic_in(self.autocast, tokens.ids.device):
                output = self.model(input_ids=tokens.ids, attention_mask=tokens.mask)
        except IndexError as error:
            raise ValueError(misfit(self.config, tokens)) from error
        return self.dropout(pool(output.last_hidden_state, tokens.mask, self.pooling))

    def extra_repr(self) -> str:
        return f"pooling={self.pooling}, autocast={self.autocast}"


_DTYPES = {"none": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


def arithmetic_in(autocast: str, device: torch.device) -> AbstractContextManager[Any]:
    """Inside, the arithmetic of models is in that dtype; "none" leaves it as it is."""
    dtype = _DTYPES[autocast]
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)


def pool(
    hidden: Tensor,  # [B, T, D]
    mask: Tensor,  # [B, T]
    pooling: str,
) -> Tensor:  # [B, D], at least float32
    """The mean over real tokens (zeros where there are none), or the first real token."""
    hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    if pooling == "cls":
        first = mask.argmax(1)  # not always 0: some tokenizers pad on the left
        return hidden[torch.arange(hidden.shape[0], device=hidden.device), first]
    real = mask.bool().unsqueeze(2)
    total = hidden.masked_fill(~real, 0).sum(1)
    return total / mask.sum(1, keepdim=True).clamp(min=1)


def misfit(config: Any, tokens: Tokens) -> str:
    """What is wrong with tokens for which a model has no row in some table."""
    return (
        f"expected token ids below {config.vocab_size} and at most "
        f"{getattr(config, 'max_position_embeddings', 'any number of')} positions, "
        f"got ids up to {int(tokens.ids.max())} and {tokens.ids.shape[1]} positions"
    )


def _compile(model: nn.Module, device: torch.device) -> None:
    if reason := missing_compiler(device):
        warnings.warn(
            f"encoder.compile: {reason}; training goes on uncompiled", CompileWarning, stacklevel=4
        )
        return
    model.compile(dynamic=True)  # batches differ in rows and length


def _load(source: str) -> PreTrainedModel:
    """A pretrained model from a folder or, where there is none, from the hub or its cache."""
    from transformers import AutoModel

    if (trained := model_folder(source)) is not None:
        return read_encoder(trained)
    if Path(source).is_dir():
        tried = "a folder, but no model could be read from it"
    else:
        tried = "no such folder, and no model of that name could be had from the hub or its cache"
        if source.startswith((".", "/", "~")) or source.count("/") > 1:
            raise ValueError(f"{source}: no such folder, and not a name on the hub")
    try:
        return AutoModel.from_pretrained(source, dtype=torch.float32)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{source}: {tried}: {reason}") from error
