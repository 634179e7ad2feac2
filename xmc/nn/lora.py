"""Low-rank adapters (arXiv 2106.09685): `W x + alpha / rank * B A x`, where only A and B train."""

from __future__ import annotations

from torch import Tensor, nn

_ADAPTER = "default"  # peft's name for the only adapter


def add_lora_(model: nn.Module, *, rank: int, alpha: float) -> None:
    """Put adapters on every linear layer of a Hugging Face model, and freeze all else, in place.

    B starts at zero, so that the model computes what it did. A is drawn from torch's global
    generator. Raises ImportError without peft.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise ImportError(
            'encoder.lora_rank: adapters need peft: pip install "xmc-toolkit[lora]"'
        ) from None
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]
        target_modules="all-linear",
        exclude_modules=r".*\bpooler\b.*",  # not used by our encoder
    )
    inject_adapter_in_model(config, model)


def merged_weights(module: nn.Module) -> dict[str, Tensor]:
    """The `state_dict` that `module` would have if adapters were added to the weights they adapt.

    Shares storage with the module except for adapted weights, `W + alpha / rank * B A`. Needs no
    peft, nor does what loads them.
    """
    deltas = {
        name: layer.get_delta_weight(_ADAPTER).detach()
        for name, layer in module.named_modules()
        if hasattr(layer, "base_layer") and hasattr(layer, "get_delta_weight")
    }
    weights: dict[str, Tensor] = {}
    for key, tensor in module.state_dict().items():
        if key.partition(".lora_")[0] in deltas:
            continue
        layer, adapted, field = key.partition(".base_layer.")
        if not (adapted and layer in deltas):
            weights[key] = tensor
        else:
            plain = tensor + deltas[layer] if field == "weight" else tensor
            weights[f"{layer}.{field}"] = plain
    return weights
