"""Starting from the encoder of an earlier training: an xmc run or model folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PREFIX = "encoder.model."  # of the transformer among the weights of a model folder


def model_folder(source: str | Path) -> Path | None:
    """The model folder of xmc that `source` is or, as a run, holds; None if neither.

    Raises ValueError where its encoder is no transformer.
    """
    for folder in (Path(source), Path(source) / "model"):
        if (folder / "model.json").is_file():
            if not (folder / "encoder" / "config.json").is_file():
                raise ValueError(f"{folder}: expected the model of a transformer, got a bag's")
            return folder
    return None


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


def _load_weights(model: nn.Module, path: Path) -> None:
    try:
        with safe_open(path, framework="pt") as handle:
            names = [name for name in handle.keys() if name.startswith(_PREFIX)]  # noqa: SIM118
            tensors = {name.removeprefix(_PREFIX): handle.get_tensor(name) for name in names}
        model.load_state_dict(tensors)
    except FileNotFoundError:
        raise ValueError(f"{path}: missing") from None
    except (SafetensorError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: not the weights of this encoder: {reason}") from None
