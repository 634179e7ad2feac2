"""From a recipe and a data folder to a run folder: what `xmc train` does.

The run folder holds `run.json` (recipe, data, versions), `log.jsonl`, `checkpoints/`, `model/` (the
best epoch) and, with an auxiliary objective, `clusters.safetensors`.
"""

from __future__ import annotations

import platform
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from xmc.config import Config, ConfigError, HeadConfig, load_recipe, to_dict
from xmc.data.batches import Dataset, load_dataset, train_validation_split
from xmc.data.features import Features, fit_features
from xmc.data.formats import has_split, read_labels
from xmc.data.label_features import label_features
from xmc.data.label_store import load_label_texts
from xmc.data.label_texts import with_label_texts
from xmc.distributed.collectives import World, agreed, agreed_tensor
from xmc.distributed.launch import join_ranks, local_device, lost_ranks, on_rank0, rank0_first
from xmc.evaluation.propensity import Propensity
from xmc.files import check_free, write_json
from xmc.heads.bag import BagClassifierHead
from xmc.heads.order import label_order
from xmc.model import XMCModel, build_model, load_model, save_model
from xmc.nn.clusters import Clusters
from xmc.runs import read_run
from xmc.training.auxiliary import make_auxiliary
from xmc.training.clusters import CLUSTERS_FILE, find_clusters, load_clusters
from xmc.training.dual_trainer import DualTrainer
from xmc.training.loop import TrainingLoop
from xmc.training.trainer import Trainer

_PACKAGES = ("xmc-toolkit", "torch", "numpy", "numba", "transformers")


@lost_ranks()
def train(
    recipe: str | Path | Config,
    *,
    data: str | Path,
    out: str | Path,
    overrides: Iterable[str] = (),
    resume: bool = False,
    cache: str | Path | None = None,
    show_progress: bool = True,
) -> XMCModel:
    """Train a recipe on a data folder and return the model of the best epoch.

    Every process that torchrun starts calls this alike, and they train together: each has a part of
    the classifier (in the model that is returned, too) and takes a share of every batch.

    Args:
        recipe: path of a TOML file, name of a shipped recipe, or a `Config`.
        data: canonical data folder (`trn`, optional `val`, `lbl`).
        out: run folder; must not exist or be empty, unless `resume`.
        overrides: `section.key=value` settings over the recipe.
        resume: go on from the newest checkpoint in `out`; recipe and data must be the same.
        cache: where encoded features are kept (default `~/.cache/xmc`).

    Raises:
        ConfigError, DataError, CheckpointError: bad recipe, data or checkpoint, in one line.
        FileExistsError: `out` holds something and `resume` is False.
        Interrupted: stopped by a signal; a checkpoint was written.
        RankError: another rank has ended or does not answer.
    """
    data, out = Path(data), Path(out)
    world = join_ranks()

    def checked_recipe() -> Config:
        config = recipe if isinstance(recipe, Config) else load_recipe(recipe, overrides)
        _check_ranks(config, world)
        return config

    config = rank0_first(checked_recipe, world)
    on_rank0(lambda: _check_same_run(out, config) if resume else _check_free(out), world)
    device = _device(config.train.device)
    features, train_set, validation_set = rank0_first(
        lambda: prepare_data(config, data, cache), world
    )
    labels = read_labels(data)
    setup = _Setup(config, data, features, labels, train_set, validation_set, device, cache, world)
    record = _record(config, data, train_set, validation_set) | {"ranks": world.size}
    if resume:
        on_rank0(lambda: _check_same_data(out, record), world)
    clusters = load_clusters(config, out) if resume else _found_clusters(setup)
    torch.manual_seed(config.train.seed)
    trainer: Trainer | DualTrainer
    if config.train.objective == "contrastive":
        trainer, more = _dual_trainer(setup)
    else:
        trainer, more = _classifier_trainer(setup, clusters)
    if not resume:
        on_rank0(lambda: _start_run(out, clusters), world)
        save_model(trainer.model, out / "model")
        on_rank0(lambda: write_json(out / "run.json", record | more), world)
    loop = TrainingLoop(trainer, config.train, out, show_progress=show_progress, world=world)
    loop.fit(resume=resume)
    del trainer, loop  # with model and moments, before the best epoch is loaded
    return load_model(out / "model", world=world)


@dataclass(frozen=True)
class _Setup:
    """What any training starts from."""

    config: Config
    data: Path
    features: Features
    labels: list[str]
    train_set: Dataset
    validation_set: Dataset | None
    device: torch.device
    cache: str | Path | None
    world: World


def _start_run(out: Path, clusters: Clusters | None) -> None:
    out.mkdir(parents=True, exist_ok=True)
    if clusters is not None:
        clusters.save(out / CLUSTERS_FILE)


def _found_clusters(setup: _Setup) -> Clusters | None:
    """Rank 0's, on every rank: k-means need not round alike on all machines."""
    world = setup.world
    found = on_rank0(lambda: find_clusters(setup.config, setup.train_set, setup.labels), world)
    if world.size == 1:
        return found
    both = None if found is None else torch.stack([found.assignment.long(), found.order])
    count = agreed(None if found is None else found.num_clusters, world)
    if count is None:
        return None
    assignment, order = agreed_tensor(both, world)
    return Clusters(assignment.int(), count, order)


def _classifier_trainer(setup: _Setup, clusters: Clusters | None) -> tuple[Trainer, dict[str, Any]]:
    """With a fresh model, and what the run's record says of its rows."""
    config, train_set = setup.config, setup.train_set
    rows = train_set  # what is trained on: its statistics are those of the documents alone
    if config.train.label_texts:
        rows = with_label_texts(train_set, setup.data, setup.features, cache=setup.cache)
    model = build_model(
        config,
        setup.features,
        setup.labels,
        label_shares=_label_shares(train_set),
        positive_weight=_positive_weight(config.head, train_set),
        order=label_order(
            train_set.label_frequencies(),
            config.head,
            clusters=clusters,
            seed=config.train.seed,
        ),
        world=setup.world,
    ).to(setup.device)
    if isinstance(model.head, BagClassifierHead):
        options = config.head
        words = label_features(train_set, max_terms=options.bag_fan_in)
        model.head.choose_features_(words, options.bag_init / options.bag_scale)
    width = model.encoder.out_features
    trainer = Trainer(
        model,
        config,
        rows,
        setup.validation_set,
        # Held by the trainer alone, which drops it at the cut-off.
        auxiliary=make_auxiliary(config, clusters, train_set, width, setup.device, setup.world),
    )
    return trainer, {"label_text_rows": len(rows) - len(train_set)}


def _dual_trainer(setup: _Setup) -> tuple[DualTrainer, dict[str, Any]]:
    """With a fresh model, and what the run's record says of its rows."""
    config = setup.config
    texts = rank0_first(
        lambda: load_label_texts(setup.data, setup.features, cache=setup.cache), setup.world
    )
    model = build_model(config, setup.features, setup.labels, world=setup.world).to(setup.device)
    trainer = DualTrainer(model, config, setup.train_set, setup.validation_set, texts)
    return trainer, {"label_texts": int(texts.known.sum()), "trained_rows": trainer.num_rows}


def prepare_data(
    config: Config, data: Path, cache: str | Path | None
) -> tuple[Any, Dataset, Dataset | None]:
    """Features fitted on the training split, the training set and the validation set."""
    features = fit_features(config.features, data, model=config.encoder.model, cache=cache)
    train_set = load_dataset(data, "trn", features, cache=cache)
    if has_split(data, "val"):
        return features, train_set, load_dataset(data, "val", features, cache=cache)
    share = config.train.validation
    if share == 0:
        return features, train_set, None
    rows, held_out = train_validation_split(len(train_set), share, config.train.seed)
    return features, train_set.subset(rows), train_set.subset(held_out)


def _label_shares(train_set: Dataset) -> torch.Tensor:
    """Smoothed share of rows with each label, [L]: never 0 nor 1."""
    counts = train_set.label_frequencies()
    return (counts + 0.5) / (len(train_set) + 1.0)


def _positive_weight(options: HeadConfig, train_set: Dataset) -> torch.Tensor | None:
    """What a positive of each label counts, [L]; None where all count one."""
    if options.positive_weight == "none":
        return None
    a, b = options.propensity_a or None, options.propensity_b or None
    return Propensity.from_labels(train_set.labels, options.propensity, a=a, b=b).inverse


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("train.device: cuda was asked for and torch sees none")
    return local_device(name)


def _check_ranks(config: Config, world: World) -> None:
    """Raise ConfigError for what several ranks cannot do yet."""
    if world.size == 1:
        return
    if config.train.memory_limit:
        raise ConfigError(
            "train.memory_limit: finds passes for one process yet, "
            f"got {world.size} ranks (torchrun); give train.micro_batch instead"
        )


def _record(
    config: Config, data: Path, train_set: Dataset, validation_set: Dataset | None
) -> dict[str, Any]:
    return {
        "version": 1,
        "data": str(data.resolve()),
        "data_key": train_set.key,
        "train_rows": len(train_set),
        "validation_rows": 0 if validation_set is None else len(validation_set),
        "config": to_dict(config),
        "packages": {name: version(name) for name in _PACKAGES},
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
    }


def _check_free(out: Path) -> None:
    try:
        check_free(out)
    except FileExistsError as error:
        raise FileExistsError(f"{error}; give another --out, or --resume to go on") from None


def _check_same_run(out: Path, config: Config) -> None:
    saved, wanted = read_run(out)["config"], to_dict(config)
    for section, options in wanted.items():
        for key, value in options.items():
            old = saved.get(section, {}).get(key)
            if old != value:
                raise ConfigError(
                    f"--resume: {section}.{key} was {old!r} in {out}, the recipe now says {value!r}"
                )


def _check_same_data(out: Path, record: dict[str, Any]) -> None:
    saved = read_run(out)
    if saved["data_key"] != record["data_key"]:
        raise ConfigError(
            f"--resume: {record['data']} does not hold the data that {out} was trained on"
        )
