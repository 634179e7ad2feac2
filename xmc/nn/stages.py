"""A transformer encoder cut into stages that run one after the other, on different ranks.

An encoder with n layers has n + 2 units: 0 is the embeddings, i the i-th layer, n + 1 the pooling.
A stage is a range of units. It runs the forward function of the model itself, in which the parts
that other stages have are replaced by ones that do nothing, so that masks, rotary positions and
the like are made by the model's own code; every stage makes them again from the plain mask.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, cast

import torch.nn.functional as F
from torch import Tensor, nn

from xmc.nn.transformer import TransformerEncoder, arithmetic_in, misfit, pool
from xmc.types import Tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class _Family:
    """Where the parts of a kind of model lie in it."""

    layers: str
    first: tuple[str, ...] = ("embeddings",)  # before the layers
    last: tuple[str, ...] = ()  # after them; those that a model has
    tables: tuple[str, ...] = ()  # small embeddings that every layer reads: sent with the hidden


_BERT = _Family("encoder.layer", last=("pooler",))
_FAMILIES = {
    "bert": _BERT,
    "camembert": _BERT,
    "distilbert": _Family("transformer.layer"),
    "electra": _Family("encoder.layer", first=("embeddings", "embeddings_project")),
    "ernie": _BERT,
    "modernbert": _Family("layers", last=("final_norm",)),
    "mpnet": _Family(
        "encoder.layer", last=("pooler",), tables=("encoder.relative_attention_bias",)
    ),
    "nomic_bert": _Family("layers", last=("pooler",)),
    "roberta": _BERT,
    "xlm-roberta": _BERT,
}


class EncoderStage(nn.Module):
    """Some consecutive units of an encoder, made by `cut_encoder`.

    The first stage takes `Tokens`, or their ids and mask. Every stage but the last returns plain
    tensors, which are the arguments of the next: hidden states [B, T, D], the mask [B, T] int64,
    and for MPNet the table [buckets, heads] of its relative positions. Floating ones carry
    gradients back. The last stage returns representations [B, D] or, of a bare Hugging Face model,
    its last hidden states [B, T, D].

    Parameters are those of the whole encoder, not copies, under the names that they have in a
    `TransformerEncoder`: `model.encoder.layer.7.attention...`; those of the layer between encoder
    and head begin with `intermediate.`.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        is_first: bool,
        is_last: bool,
        tables: tuple[str, ...] = (),
        pooling: str | None = None,  # None: no pooling
        dropout: float = 0.0,
        autocast: str = "none",
        intermediate: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.dropout = nn.Dropout(dropout)
        self.intermediate = nn.Identity() if intermediate is None else intermediate
        self.is_first = is_first
        self.is_last = is_last
        self.pooling = pooling
        self.autocast = autocast
        self._tables = tables

    def forward(
        self,
        received: Tokens | Tensor,  # of the first stage Tokens or ids [B, T]; hidden states else
        mask: Tensor | None = None,  # [B, T]
        *tables: Tensor,
    ) -> Any:  # Tensor, or a tuple of them
        if isinstance(received, Tokens):
            mask, received = received.mask, received.ids
        if mask is None:
            raise ValueError("expected Tokens, or a tensor and a mask [B, T], got no mask")
        if self.is_first:
            hidden = self._from_tokens(received, mask)
        else:
            hidden = self._from_hidden(received, mask, tables)
        if not self.is_last:
            if self.is_first:  # a clone is no leaf, as the results of a stage should be
                weights = [cast(Tensor, self._module(name).weight) for name in self._tables]
                tables = tuple(weight.clone() for weight in weights)
            return hidden, mask, *tables
        if self.pooling is None:
            return hidden
        reps = self.dropout(pool(hidden, mask, self.pooling))
        return self.intermediate(reps)

    def extra_repr(self) -> str:
        return f"is_first={self.is_first}, is_last={self.is_last}, pooling={self.pooling}"

    def _from_tokens(self, ids: Tensor, mask: Tensor) -> Tensor:
        try:
            with arithmetic_in(self.autocast, ids.device):
                return self._hidden(self.model(input_ids=ids, attention_mask=mask))
        except IndexError as error:
            raise ValueError(misfit(self.model.config, Tokens(ids, mask))) from error

    def _from_hidden(self, hidden: Tensor, mask: Tensor, tables: tuple[Tensor, ...]) -> Tensor:
        if len(tables) != len(self._tables):
            raise ValueError(
                f"expected hidden states, a mask and {len(self._tables)} tables from the stage "
                f"before, got {len(tables)} tables"
            )
        received = [cast(_Table, self._module(name)) for name in self._tables]
        for module, table in zip(received, tables, strict=True):
            module.table = table
        try:
            with arithmetic_in(self.autocast, hidden.device):
                return self._hidden(self.model(inputs_embeds=hidden, attention_mask=mask))
        finally:
            for module in received:
                module.table = None

    def _module(self, name: str) -> nn.Module:
        return self.model.get_submodule(name)

    @staticmethod
    def _hidden(output: Any) -> Tensor:
        return output.last_hidden_state


def cut_encoder(
    encoder: TransformerEncoder | PreTrainedModel,
    cuts: Sequence[int],
    *,
    intermediate: nn.Module | None = None,  # what follows the pooling, such as XMCModel's
) -> list[EncoderStage]:
    """The encoder in `len(cuts) + 1` stages; stage s starts at unit `cuts[s - 1]`.

    What the stages compute one after the other is what the encoder does, bit for bit, and they
    share its parameters; a rank keeps its own stage and lets go of the rest. Adapters, frozen
    parameters, recomputation of layers and autocast stay as they are: put them in before. For cuts
    see `xmc.nn.balance.balanced_cuts`.

    Raises ValueError for a kind of model that is not known, one that is or will be compiled, a
    decoder, and cuts that leave a stage without units.
    """
    whole = encoder if isinstance(encoder, TransformerEncoder) else None
    model = whole.model if whole is not None else cast("PreTrainedModel", encoder)
    if intermediate is not None and whole is None:
        raise ValueError("expected a TransformerEncoder, which pools, before an intermediate layer")
    if (whole is not None and whole._to_compile) or model._compiled_call_impl is not None:
        raise ValueError("expected an encoder that is not compiled: cut it, then compile stages")
    family = _family(model)
    total = num_units(encoder)
    bounds = [0, *cuts, total]
    if any(stop <= start for start, stop in pairwise(bounds)):
        raise ValueError(
            f"expected increasing cuts between 1 and {total - 1} for an encoder of {total} "
            f"units (embeddings, layers, pooling), got {bounds[1:-1]}"
        )
    stages = []
    for start, stop in pairwise(bounds):
        is_last = stop == total
        pools = is_last and whole is not None
        stage = EncoderStage(
            _part(model, family, start, stop, is_last=is_last),
            is_first=start == 0,
            is_last=is_last,
            tables=family.tables,
            pooling=whole.pooling if whole is not None and pools else None,
            dropout=whole.dropout.p if whole is not None and pools else 0.0,
            autocast=whole.autocast if whole is not None else "none",
            intermediate=intermediate if pools else None,
        )
        # Not `train`, which would set the parts of the encoder.
        stage.training = stage.dropout.training = encoder.training
        stages.append(stage)
    _check_complete(model, stages)
    return stages


def num_units(encoder: TransformerEncoder | PreTrainedModel) -> int:
    """Embeddings, layers and pooling: what `cut_encoder` can cut between."""
    model = encoder.model if isinstance(encoder, TransformerEncoder) else encoder
    return len(_layers(model, _family(model))) + 2


def stage_weights(stage: EncoderStage, whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of the tensors of a whole encoder those that the stage has, for its `load_state_dict`.

    Raises ValueError where one is missing.
    """
    names = list(stage.state_dict())
    if missing := [name for name in names if name not in whole]:
        raise ValueError(f"expected {missing[0]} among the weights of the encoder, got none")
    return {name: whole[name] for name in names}


def whole_weights(parts: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The `state_dict` of the encoder from those of all its stages.

    Of a bare Hugging Face model the names begin with `model.`. Raises ValueError where two stages
    have a tensor of one name.
    """
    whole: dict[str, Tensor] = {}
    for part in parts:
        if twice := whole.keys() & part.keys():
            raise ValueError(f"expected each tensor in one stage, got {min(twice)} in two")
        whole |= part
    return whole


class _Received(nn.Module):
    """Stands for the embeddings of a stage to which hidden states are sent."""

    def forward(
        self,
        input_ids: None = None,
        inputs_embeds: Tensor | None = None,
        *args: Any,
        **options: Any,
    ) -> Tensor | None:
        # DistilBERT passes positions, the others names.
        return inputs_embeds


class _Table(nn.Module):
    """Stands for an embedding whose weight is sent along."""

    table: Tensor | None = None

    def forward(self, index: Tensor) -> Tensor:
        assert self.table is not None
        return F.embedding(index, self.table)


def _family(model: nn.Module) -> _Family:
    config: Any = model.config
    family = _FAMILIES.get(config.model_type)
    if family is None:
        known = ", ".join(_FAMILIES)
        raise ValueError(f"expected a model of one of {known} to cut, got {config.model_type!r}")
    if getattr(config, "is_decoder", False):
        raise ValueError(f"expected an encoder to cut, got a {config.model_type} as a decoder")
    _layers(model, family)
    return family


def _layers(model: nn.Module, family: _Family) -> nn.ModuleList:
    try:
        layers = model.get_submodule(family.layers)
    except AttributeError:
        layers = None
    if not isinstance(layers, nn.ModuleList):
        raise ValueError(
            f"expected an encoder with a list of layers at {family.layers}, "
            f"got {type(model).__name__}"
        )
    return layers


def _part(model: nn.Module, family: _Family, start: int, stop: int, *, is_last: bool) -> nn.Module:
    """The model with units start to stop alone; shares them with it."""
    layers = nn.ModuleList()
    for number, layer in enumerate(_layers(model, family), 1):
        if start <= number < stop:
            layers.add_module(str(number - 1), layer)  # by its name in the whole
    replaced: dict[str, nn.Module] = {family.layers: layers}
    if start > 0:
        replaced |= {name: nn.Identity() for name in family.first[1:]}
        replaced |= {name: _Table() for name in family.tables}
        replaced[family.first[0]] = _Received()
    if not is_last:
        replaced |= {name: nn.Identity() for name in family.last}
    for name, module in replaced.items():
        model = _with(model, name, module)
    return model


def _with(module: nn.Module, name: str, replacement: nn.Module) -> nn.Module:
    """A copy of the module that shares all of it but has another one, if any, at `name`."""
    head, _, rest = name.partition(".")
    if (inner := module._modules.get(head)) is None:
        return module
    # Copies of nn.Module share the dictionaries of their parts.
    copied = copy.copy(module)
    copied._modules = copied._modules.copy()
    copied._parameters = copied._parameters.copy()
    copied._buffers = copied._buffers.copy()
    copied._modules[head] = _with(inner, rest, replacement) if rest else replacement
    return copied


def _check_complete(model: nn.Module, stages: Sequence[nn.Module]) -> None:
    """Every parameter is in one stage: a model may have been changed by hand."""
    held = [id(parameter) for stage in stages for parameter in stage.model.parameters()]  # type: ignore[union-attr]
    for name, parameter in model.named_parameters():
        if held.count(id(parameter)) != 1:
            raise ValueError(
                f"expected {name} in one stage, got it in {held.count(id(parameter))}: not a "
                f"plain {type(model).__name__}"
            )
