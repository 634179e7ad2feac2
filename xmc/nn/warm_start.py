"""Starting from the encoder of an earlier training: an xmc run or model folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from xmc.nn.encoder import BagEncoder

_PREFIX = "encoder.model."  # of the transformer among the weights of a model folder


def model_folder(source: str | Path) -> Path | None:
    """The model folder of xmc that `source` is or, as a run, holds; None if neither.

    Raises ValueError where its encoder is no transformer.
    """
    folder = _find(source)
    if folder is not None and not _is_transformer(folder):
        raise ValueError(f"{folder}: expected the model of a transformer, got a bag's")
    return folder


def bag_model_folder(source: str | Path) -> Path:
    """The model folder of a bag encoder that `source` is or, as a run, holds.

    Raises ValueError where there is none.
    """
    folder = _find(source)
    if folder is None:
        raise ValueError(f"{source}: expected a run or model of xmc to start a bag encoder from")
    if _is_transformer(folder):
        raise ValueError(f"{folder}: expected the model of a bag encoder, got a transformer's")
    return folder


def tokenizer_source(source: str | Path) -> str:
    """Where the tokenizer of a transformer lies: in `source`, or with the features of a model."""
    folder = model_folder(source)
    return str(source) if folder is None else str(folder / "features")


def encoder_half(whole: PreTrainedModel) -> PreTrainedModel:
    """The encoder of an encoder-decoder, any other model as it is."""
    return whole.get_encoder() if whole.config.is_encoder_decoder else whole


def read_encoder(folder: Path) -> PreTrainedModel:
    """The transformer of a model folder, with its weights in float32.

    Raises ValueError where the weights are missing or do not fit.
    """
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.from_pretrained(folder / "encoder", local_files_only=True)
    whole = AutoModel.from_config(config, dtype=torch.float32)
    _load_weights(encoder_half(whole), folder / "weights.safetensors")
    return whole


@torch.no_grad()
def read_bag_encoder_(encoder: BagEncoder, source: str | Path) -> None:
    """Give a bag encoder the weights of the one in a run or model folder.

    Its features have to be the same, which the caller sees to. Raises ValueError where the weights
    are missing or of other sizes.
    """
    path = bag_model_folder(source) / "weights.safetensors"
    given = _read(path, "encoder.")
    own = encoder.state_dict()
    for name, tensor in own.items():
        found = given.get(name)
        if found is None or found.shape != tensor.shape:
            got = "none" if found is None else str(list(found.shape))
            raise ValueError(
                f"{path}: expected encoder.{name} of shape {list(tensor.shape)} "
                f"(encoder.dim, features), got {got}"
            )
        tensor.copy_(found)


def _find(source: str | Path) -> Path | None:
    folders = (Path(source), Path(source) / "model")
    return next((folder for folder in folders if (folder / "model.json").is_file()), None)


def _is_transformer(folder: Path) -> bool:
    return (folder / "encoder" / "config.json").is_file()


def _load_weights(model: nn.Module, path: Path) -> None:
    try:
        model.load_state_dict(_read(path, _PREFIX))
    except RuntimeError as error:
        raise ValueError(_not_weights(path, error)) from None


def _read(path: Path, prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix`, by the rest of the name."""
    try:
        with safe_open(path, framework="pt") as handle:
            names = [name for name in handle.keys() if name.startswith(prefix)]  # noqa: SIM118
            return {name.removeprefix(prefix): handle.get_tensor(name) for name in names}
    except FileNotFoundError:
        raise ValueError(f"{path}: missing") from None
    except SafetensorError as error:
        raise ValueError(_not_weights(path, error)) from None


def _not_weights(path: Path, error: Exception) -> str:
    return f"{path}: not the weights of this encoder: {' '.join(str(error).split())}"
