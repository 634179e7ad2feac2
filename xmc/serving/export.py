"""From a trained model to a folder for prediction: small, checked, opened at once."""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors.torch import save_file

from xmc.config import to_dict
from xmc.data.label_file import write_label_file
from xmc.files import new_folder, write_file, write_json
from xmc.model import XMCModel, compress_model_, load_model, save_inputs
from xmc.model_files import EXPORTED, checksum
from xmc.nn.compressed import Storage, WeightDtype
from xmc.nn.lora import merged_weights
from xmc.runs import model_folder


@dataclass(frozen=True)
class Exported:
    """What an export took."""

    folder: Path
    storage: Storage
    bytes: dict[str, int]
    """By part: classifier, encoder, labels, features."""

    @property
    def total(self) -> int:
        return sum(self.bytes.values())


def export(
    model: XMCModel | str | Path,
    out: str | Path,
    *,
    weight_dtype: WeightDtype = "int8",
    packed: bool = True,
) -> Exported:
    """Write a model for prediction, which `Predictor`, `evaluate` and `predict` open like a run.

    Args:
        model: a run folder, a model folder, or a model in memory, which stays as it is.
        out: folder to make; must not exist or be empty.
        weight_dtype: of the classifier's weights and the table of a bag encoder: float32, bfloat16,
            int8 or int4, the latter two with a float32 scale per label and feature. Dense layers of
            the classifier take bfloat16 at least, transformers stay as they are.
        packed: indices of ceil(log2 D) bits instead of 16; prediction unpacks them as it goes.

    The folder is a model folder of version 2: `model.json` with a checksum of every tensor, which
    are verified when it is opened, `weights.safetensors`, `labels.safetensors` (read lazily),
    `features` and, of a transformer, `encoder`. It cannot be trained or exported again.

    Raises ModelError for a folder that holds no model, FileExistsError for `out`, ValueError for a
    dual encoder, a model that is exported already, or one of which this process has only a part.
    """
    out, storage = Path(out), Storage(weight_dtype, packed)
    if isinstance(model, XMCModel):
        if model.world.size > 1:
            raise ValueError("expected a model of one process to export, got a part: load the run")
        small = copy.deepcopy(model)
    else:
        small = load_model(model_folder(Path(model)))
    if small.storage is not None:
        raise ValueError(f"expected a model as it was trained, got an exported one ({model})")
    compress_model_(small, storage)
    assert small.storage is not None
    tensors = {name: tensor.contiguous() for name, tensor in merged_weights(small).items()}
    record = {
        "version": EXPORTED,
        "num_labels": len(small.labels),
        "num_features": small.features.num_features,
        "config": to_dict(small.config),
        "storage": asdict(small.storage),
        "checksums": {name: checksum(tensor) for name, tensor in tensors.items()},
    }
    with new_folder(out) as folder:
        save_inputs(small, folder)
        write_file(folder / "labels.safetensors", lambda path: write_label_file(small.labels, path))
        write_file(folder / "weights.safetensors", lambda path: save_file(tensors, path))
        write_json(folder / "model.json", record)
        files = {
            "labels": (folder / "labels.safetensors").stat().st_size,
            "features": sum(f.stat().st_size for f in (folder / "features").rglob("*")),
        }
    sizes = {
        part: sum(t.numel() * t.itemsize for name, t in tensors.items() if name.startswith(part))
        for part in ("head.", "encoder.", "intermediate.")
    }
    classifier = {"classifier": sizes["head."]}
    encoder = {"encoder": sizes["encoder."] + sizes["intermediate."]}
    return Exported(out, small.storage, classifier | encoder | files)
