"""Encoders: from bags of n-grams or tokens to a representation of D numbers."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from xmc.types import Bag, Tokens
from xmc_kernels.bag_sum import bag_sum

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class BagEncoder(nn.Module):
    """`dropout(relu(sum of weight * vector over the bag's features + bias))`.

    The gradient of the table is sparse: the rows of the features that the batch contains, sorted
    and distinct, each held once. Train it with `xmc.nn.lazy.LazyAdamW` and a step costs the same
    for any number of features. An empty bag gives `relu(bias)`.

    Raises IndexError or RuntimeError, as `F.embedding_bag`, for an id out of range.
    """

    def __init__(self, num_features: int, dim: int, dropout: float = 0.0) -> None:
        super().__init__()
        if num_features < 1 or dim < 1:
            raise ValueError(
                f"expected num_features and dim of at least 1, got {num_features} and {dim}"
            )
        # torch's module holds the table, because DistributedDataParallel knows from its type that
        # the gradient is sparse.
        self.table = nn.EmbeddingBag(
            num_features,
            dim,
            mode="sum",
            sparse=True,
            include_last_offset=True,
            _weight=torch.empty(num_features, dim),
        )
        self.bias = nn.Parameter(torch.empty(dim))
        self.dropout = nn.Dropout(dropout)
        self.reset_parameters()

    @property
    def num_features(self) -> int:
        return self.table.num_embeddings

    @property
    def out_features(self) -> int:
        return self.table.embedding_dim

    def reset_parameters(self) -> None:
        """Vectors N(0, _TABLE_STD^2), bias 0."""
        nn.init.normal_(self.table.weight, std=_TABLE_STD)
        nn.init.zeros_(self.bias)

    def forward(self, bag: Bag) -> Tensor:  # [B, D]
        weight = self.table.weight
        total = _BagSum.apply(weight, bag.ids, bag.offsets, bag.weights.to(weight.dtype))
        return self.dropout(F.relu(total + self.bias))

    def extra_repr(self) -> str:
        return f"num_features={self.num_features}, out_features={self.out_features}"


# On eurlex57k (tf-idf of unit norm, D = 512, encoder lr 5e-3), validation P@1 after 2 epochs: 87.4
# at 0.005, 87.1 at 0.02, 87.0 at 0.05, 86.9 at 0.1, 86.2 at 0.2, 78.5 at 1.
_TABLE_STD = 0.02


class _BagSum(torch.autograd.Function):
    """Weighted `F.embedding_bag` whose gradient of the table is its touched rows.

    torch's own backward holds one row per entry of the bags, repeated ids included; this one sums
    them through the transposed bag: feature u collects `weight * d_out[row]` from its rows.
    """

    @staticmethod
    def forward(ctx: Any, table: Tensor, ids: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(ids, offsets, weights)
        ctx.table_shape = table.shape
        # Detached: embedding_bag then skips what only its own backward would need.
        return F.embedding_bag(
            ids,
            table.detach(),
            offsets,
            mode="sum",
            per_sample_weights=weights,
            include_last_offset=True,
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, None, None, None]:
        ids, offsets, weights = ctx.saved_tensors
        in_order, order = torch.sort(ids, stable=True)
        features, counts = torch.unique_consecutive(in_order, return_counts=True)
        starts = F.pad(counts.cumsum(0), (1, 0))
        bags = torch.arange(len(offsets) - 1, device=ids.device)
        rows = torch.repeat_interleave(bags, offsets.diff())
        values = bag_sum(d_out.contiguous(), rows[order], starts, weights[order])
        d_table = torch.sparse_coo_tensor(
            features[None], values, ctx.table_shape, is_coalesced=True, check_invariants=False
        )
        return d_table, None, None, None


class TransformerEncoder(nn.Module):
    """Pooled last hidden states of a Hugging Face model, with dropout.

    `model` is the folder of a saved model, a name on the Hugging Face hub, or a model object
    (which is used as it is, not copied). Of an encoder-decoder the encoder is used. A pooler that
    the model brings along is not used and therefore frozen. Weights are kept in float32;
    `autocast="bfloat16"` runs the model's arithmetic in bfloat16 and pools in float32.

    Raises ValueError where the model cannot be had or a batch does not fit it.
    """

    def __init__(
        self,
        model: str | PreTrainedModel,
        *,
        pooling: Literal["mean", "cls"] = "mean",
        dropout: float = 0.0,
        autocast: Literal["none", "bfloat16"] = "none",
    ) -> None:
        super().__init__()
        if pooling not in ("mean", "cls"):
            raise ValueError(f'expected pooling "mean" or "cls", got {pooling!r}')
        if autocast not in ("none", "bfloat16"):
            raise ValueError(f'expected autocast "none" or "bfloat16", got {autocast!r}')
        whole = _load(model) if isinstance(model, str) else model
        self.config = whole.config
        self.model = whole.get_encoder() if whole.config.is_encoder_decoder else whole
        pooler = getattr(self.model, "pooler", None)
        if isinstance(pooler, nn.Module):
            pooler.requires_grad_(False)
        self.pooling = pooling
        self.autocast = autocast
        self.dropout = nn.Dropout(dropout)

    @classmethod
    def from_config(
        cls,
        folder: str,
        *,
        pooling: Literal["mean", "cls"] = "mean",
        dropout: float = 0.0,
        autocast: Literal["none", "bfloat16"] = "none",
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
        try:
            with self._precision(tokens.ids.device):
                output = self.model(input_ids=tokens.ids, attention_mask=tokens.mask)
        except IndexError as error:
            raise ValueError(self._misfit(tokens)) from error
        hidden = output.last_hidden_state  # [B, T, D]
        hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        return self.dropout(_pool(hidden, tokens.mask, self.pooling))

    def extra_repr(self) -> str:
        return f"pooling={self.pooling}, autocast={self.autocast}"

    def _precision(self, device: torch.device) -> AbstractContextManager[Any]:
        if self.autocast == "none":
            return nullcontext()
        return torch.autocast(device.type, dtype=torch.bfloat16)

    def _misfit(self, tokens: Tokens) -> str:
        config = self.config
        return (
            f"expected token ids below {config.vocab_size} and at most "
            f"{getattr(config, 'max_position_embeddings', 'any number of')} positions, "
            f"got ids up to {int(tokens.ids.max())} and {tokens.ids.shape[1]} positions"
        )


def _pool(hidden: Tensor, mask: Tensor, pooling: str) -> Tensor:
    """[B, T, D] to [B, D]: the mean over real tokens (zeros if none), or the first real token."""
    if pooling == "cls":
        first = mask.argmax(1)  # not always 0: some tokenizers pad on the left
        return hidden[torch.arange(hidden.shape[0], device=hidden.device), first]
    real = mask.bool().unsqueeze(2)
    total = hidden.masked_fill(~real, 0).sum(1)
    return total / mask.sum(1, keepdim=True).clamp(min=1)


def _load(source: str) -> PreTrainedModel:
    """A pretrained model from a folder or, where there is none, from the hub or its cache."""
    from transformers import AutoModel

    folder = Path(source)
    if folder.is_dir():
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
