"""What a plan says of memory is what a training takes, and what it proposes fits."""

from __future__ import annotations

import dataclasses
import functools
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from xmc.config import Config, ConfigError, from_dict
from xmc.heads.bag import BagClassifierHead
from xmc.heads.classifier import ClassifierHead
from xmc.nn.bag_reps import join_bag
from xmc.training.memory_classifier import read_bags, read_columns
from xmc.training.memory_component import megabytes
from xmc.training.memory_encoder import activation_bytes
from xmc.training.memory_model import (
    make_sizes,
    on_device,
    prediction_components,
    total,
    training_phases,
)
from xmc.training.plan_changes import with_settings
from xmc.training.plan_report import render, to_dict
from xmc.training.planner import device_memory, make_plan, parse_memory, plan_recipe
from xmc.training.step_rate import transformer_operations
from xmc.training.workload import Workload, data_workload, given_workload
from xmc.types import Bag, SparseLabels

_SCRIPT = Path(__file__).parents[2] / "scripts" / "bench" / "planned_memory.py"
_SPARSE = ("encoder.dim=256", "head.fan_in=32")
_HALF = ("encoder.dim=256", "head.fan_in=64", "head.weight_dtype=bfloat16")
_HALF = (*_HALF, "classifier_optimizer.kind=sgd")
_BAGS = (*_SPARSE, "head.bag_fan_in=32")
_DENSE = ("encoder.dim=512", "head.kind=dense")


@functools.cache
def measured(num_labels: int, settings: tuple[str, ...]) -> dict[str, Any]:
    """Predicted and measured peak of a process that trains on synthetic data."""
    arguments = ["--labels", str(num_labels), *(f"--set={setting}" for setting in settings)]
    done = subprocess.run(
        [sys.executable, str(_SCRIPT), *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    record: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return record


def compile_kernels(settings: tuple[str, ...]) -> None:
    """Compile what is not compiled yet, which takes memory of its own."""
    measured(500, settings)  # a size that no test compares: `measured` runs each only once


def growth(small: dict[str, Any], large: dict[str, Any]) -> tuple[int, int]:
    """Predicted and measured bytes that the large training takes beyond the small one."""
    predicted, seen = "predicted_bytes_above_torch", "measured_bytes_above_torch"
    return large[predicted] - small[predicted], large[seen] - small[seen]


@pytest.mark.parametrize(
    ("num_labels", "settings"), [(300_000, _SPARSE), (600_000, _HALF), (300_000, _BAGS)]
)
def test_the_peak_is_predicted_within_a_tenth(num_labels: int, settings: tuple[str, ...]) -> None:
    """Peak resident set above `import torch`, with validation and checkpoint."""
    compile_kernels(settings)
    large = measured(num_labels, settings)
    assert abs(large["error"]) < 0.1, large


def test_the_peak_of_a_dense_head_is_predicted_within_a_tenth() -> None:
    """Of the reference, which works in tiles of labels."""
    compile_kernels(_SPARSE)
    small, large = measured(1_000, _SPARSE), measured(40_000, _DENSE)
    assert abs(large["error"]) < 0.1, large
    predicted, seen = growth(small, large)
    assert abs(predicted / seen - 1) < 0.1, (small, large)


def config_of(**sections: dict[str, Any]) -> Config:
    sections.setdefault("features", {"vocabulary": "hashing", "hash_bits": 10})
    sections.setdefault("encoder", {"dim": 64})
    sections["head"] = {"fan_in": 16, **sections.get("head", {})}
    return from_dict(sections, source="test")


def workload_of(num_labels: int = 1000, **sizes: Any) -> Workload:
    options = {"num_features": 1024, "num_rows": 500, "num_positives": 1500}
    return Workload(num_labels=num_labels, **{**options, **sizes})


def bytes_of(parts: list, name: str) -> int:
    return sum(part.bytes for part in parts if part.name == name)


@pytest.mark.parametrize(
    ("head", "optimizer", "a_label"),
    [
        ({}, "adamw", 16 * (4 + 2) + 4 + 8 * 17),
        ({}, "sgd", 16 * (4 + 2) + 4),
        ({"weight_dtype": "bfloat16"}, "momentum", 16 * (2 + 2) + 4 + 4 * 17),
        ({"group_size": 8}, "sgd", 16 * 4 + 16 * 2 / 8 + 4),
        ({"pattern": "4:16"}, "sgd", 16 * 4 + 8 + 4),  # 16 slots of 4 bits
        ({"weight_dtype": "float8"}, "sgd", 16 * 3 + 4 + 4),
        ({"kind": "dense"}, "adagrad", 2 * 65 * 4),
    ],
)
def test_a_label_takes_the_bytes_of_its_numbers(
    head: dict[str, Any], optimizer: str, a_label: float
) -> None:
    config = config_of(head=head, classifier_optimizer={"kind": optimizer})
    plan = make_plan(config, workload_of())
    assert plan.bytes_per_label == a_label
    assert plan.classifier == 1000 * a_label
    weights = 1000 * 65 * 4
    moments = {"sgd": 0, "momentum": 1, "adamw": 2, "adagrad": 1}[optimizer]
    assert plan.dense["fused"] == weights * (1 + moments)
    assert plan.dense["plain"] == weights * (2 + moments) + 3 * 4 * 128 * 1000


@pytest.mark.parametrize(("kind", "moments"), [("adamw", 2), ("momentum", 1)])
def test_moments_of_8_bits_are_counted(kind: str, moments: int) -> None:
    """A byte a weight, a scale and a bias's float32 a label; the step runs in tiles of labels."""
    options = {"kind": kind, "moments": "float8"}
    plan = make_plan(config_of(classifier_optimizer=options), workload_of())
    assert plan.bytes_per_label == 16 * (4 + 2) + 4 + moments * (16 + 4 + 4)
    assert plan.dense["fused"] == 1000 * (65 * 4 + moments * (64 + 4 + 4))
    assert plan.dense["plain"] == 1000 * 65 * 4 * (2 + moments) + 3 * 4 * 128 * 1000
    sizes = make_sizes(config_of(classifier_optimizer=options), workload_of())
    step = training_phases(sizes)["training step"]
    (part,) = (part for part in step if part.name == "classifier moments")
    assert part.why == f"{moments} float8 numbers a weight"
    once = training_phases(make_sizes(config_of(), workload_of()))["training step"]
    assert bytes_of(step, "classifier step") > bytes_of(once, "classifier step")


def test_frequent_labels_with_dense_rows_are_counted() -> None:
    """10% of 1,000 labels read all 64 features; an order takes 4 bytes a label, twice."""
    config = config_of(head={"order": "frequency", "dense_share": 0.1})
    plan = make_plan(config, workload_of())
    numbers = 100 * 64 + 900 * 16
    assert plan.classifier == 4 * numbers + 2 * 900 * 16 + 3 * 4 * 1000 + 8 * numbers + 8 * 1000


def bag_config(**sections: dict[str, Any]) -> Config:
    sections["head"] = {"bag_fan_in": 8, **sections.get("head", {})}
    return config_of(**sections)


@pytest.mark.parametrize(
    ("num_features", "width", "head"),
    [(1024, 2, {}), (2**16 - 64, 2, {}), (2**16, 4, {}), (2**16, 4, {"weight_dtype": "bfloat16"})],
)
def test_labels_that_read_bags_are_counted_as_they_are_built(
    num_features: int, width: int, head: dict[str, Any]
) -> None:
    """D = 64: indices take four bytes from 65,537 inputs on."""
    config, workload = bag_config(head=head), workload_of(300, num_features=num_features)
    sizes = make_sizes(config, workload)
    built = BagClassifierHead.from_options(
        *(64, num_features, 300, config.head, config.classifier_optimizer)
    )
    bag = Bag(torch.arange(12) % 5, torch.arange(5) * 3, torch.ones(12))
    joined = join_bag(torch.randn(4, 64), bag, 1.0, least=24)
    labels = SparseLabels.from_lists([[1], [2], [3], [4]], 300)
    built.loss_and_grad(joined, labels)
    held = [*built.state_dict().values(), *built.training_state().values()]
    assert built._local is not None
    expected = sum(t.numel() * t.element_size() for t in [*held, built._local])
    assert built.index is not None and built.index.element_size() == width
    assert make_plan(config, workload).classifier == sizes.classifier.trained == expected
    step = training_phases(sizes)["training step"]
    assert bytes_of(step, "local index") == built._local.nbytes == 300 * 24 * 4
    # 16-bit indices by way of a 32-bit copy; the columns of all inputs.
    copied = 300 * 24 * 4 if width == 2 else 0
    assert bytes_of(step, "index translation") == copied + 4 * (64 + num_features)
    # The five features that occur, and a column of zeros: 4 rows of 1.25 features.
    few = dataclasses.replace(workload, row_entries=1.25)
    assert read_columns(sizes.classifier, few, 4) == joined.values.shape[1] == 64 + 5 + 1
    (part,) = (p for p in read_bags(sizes.classifier, few, 4) if p.name == "joined bags")
    assert part.bytes == 2 * joined.values.nbytes


def test_columns_of_bags_are_those_of_a_pass_of_its_rows() -> None:
    """At most V of them; a plain head has none."""
    config, workload = bag_config(), workload_of(row_entries=3)
    phases = training_phases(make_sizes(config, workload))
    columns = 64 + 3 * 128 + 1
    assert bytes_of(phases["training step"], "joined bags") == 8 * 128 * columns
    many = training_phases(make_sizes(config, workload_of(row_entries=100)))
    assert bytes_of(many["training step"], "joined bags") == 8 * 128 * (64 + 1024 + 1)
    larger, plain = (many["training step"], training_phases(make_sizes(config_of(), workload)))
    assert bytes_of(larger, "classifier step") > bytes_of(
        phases["training step"], "classifier step"
    )
    assert bytes_of(plain["training step"], "joined bags") == 0
    assert phases.keys() - plain.keys() == {"drawing inputs", "choosing features"}
    # Features of labels, and those they replace: nothing is trained yet.
    names = {part.name for part in phases["choosing features"]}
    assert "chosen features" in names and not names & {"classifier moments", "local index"}
    prediction = prediction_components(make_sizes(config, workload))
    assert bytes_of(prediction, "local index") == 1000 * 24 * 4


def test_an_accumulated_step_holds_one_gradient() -> None:
    sizes = make_sizes(config_of(train={"accumulation": 2}), workload_of())
    step = training_phases(sizes)["training step"]
    head = ClassifierHead.from_config(64, 1000, sizes.config.head)
    assert head.layer.bias is not None
    numbers = head.layer.weight.numel() + head.layer.bias.numel()
    assert bytes_of(step, "classifier gradient") == 4 * numbers
    once = training_phases(make_sizes(config_of(), workload_of()))["training step"]
    assert bytes_of(once, "classifier gradient") == 0


def test_tables_data_and_auxiliary_head_are_counted() -> None:
    config = config_of(auxiliary={"kind": "clusters"}, encoder={"dim": 64, "intermediate": 32})
    workload = workload_of(
        num_positives=50_000, validation_rows=100, splits_rows=True, label_chars=20
    )
    phases = training_phases(make_sizes(config, workload))
    step = phases["training step"]
    encoder = 1024 * 64 + 64 + 32 * 65
    assert bytes_of(step, "encoder weights") == 4 * encoder
    assert bytes_of(step, "encoder moments") == 8 * encoder
    # 16 clusters of at most 100 labels read the 64 numbers before the intermediate layer.
    assert bytes_of(step, "auxiliary head") == 3 * 4 * 16 * 65 + 12 * 1000
    assert bytes_of(step, "labels of the rows") == 8 * 601 + 4 * 60_000 + 8 * 600
    assert bytes_of(step, "label names") == 2 * 1000 * 77
    assert bytes_of(phases["reading data"], "reading labels") == 16 * 500 + 28 * 50_000 + 8 * 1000
    assert bytes_of(phases["clustering labels"], "label features") > 0


def test_the_peak_is_that_of_the_largest_phase() -> None:
    # Enough labels a row that copying them takes more than the model.
    workload = workload_of(num_positives=10**8, splits_rows=True)
    plan = make_plan(config_of(), workload, memory=10**12)
    assert plan.peak_phase == "reading data"
    assert plan.peak == max(total(parts) for parts in plan.phases.values())
    assert plan.peak_above_torch == plan.peak - bytes_of(
        plan.phases["reading data"], "Python and torch"
    )
    rewired = make_plan(config_of(rewire={"method": "rigl"}), workload_of())
    assert "rewiring" in rewired.phases and "rewiring" not in plan.phases


def token_config(bert_shape: Path, **encoder: Any) -> Config:
    return from_dict(
        {
            "features": {"kind": "tokens", "max_length": 32},
            "encoder": {"kind": "transformer", "model": str(bert_shape), **encoder},
            "head": {"fan_in": 16},
            "train": {"batch_size": 8},
        },
        source="test",
    )


def saved_bytes(config: Config, rows: int) -> int:
    """Bytes of all that autograd keeps of a forward pass, weights left out."""
    from xmc.nn.transformer import TransformerEncoder
    from xmc.types import Tokens

    options = config.encoder
    model = TransformerEncoder.from_config(options.model).model
    encoder = TransformerEncoder(
        model, autocast=options.autocast, checkpointing=options.checkpointing
    )
    own = {parameter.untyped_storage().data_ptr() for parameter in encoder.parameters()}
    kept: dict[int, Any] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage  # held, so that no address is used twice
        return tensor

    ids = torch.randint(5, 90, (rows, config.features.max_length))
    mask = torch.ones_like(ids)
    mask[0, 20:] = 0
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        encoder.train()(Tokens(ids, mask))
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("autocast", ["none", "bfloat16"])
def test_activations_are_what_autograd_keeps(bert_shape: Path, autocast: str) -> None:
    config = token_config(bert_shape, autocast=autocast)
    sizes = make_sizes(config, workload_of(num_features=100))
    predicted = activation_bytes(sizes.encoder, config, 8, cuda=False)
    assert predicted == pytest.approx(saved_bytes(config, 8), rel=0.1)


def test_checkpointing_keeps_the_layers_inputs(bert_shape: Path) -> None:
    config = token_config(bert_shape, checkpointing=True)
    sizes = make_sizes(config, workload_of(num_features=100))
    with_all = make_sizes(token_config(bert_shape), workload_of(num_features=100))
    tokens = 8 * 32
    # A layer that is computed again exists beside what autograd keeps in the forward pass.
    recomputed = activation_bytes(with_all.encoder, with_all.config, 8, cuda=False) / 3
    predicted = activation_bytes(sizes.encoder, config, 8, cuda=False)
    kept = saved_bytes(config, 8)
    assert kept < predicted < kept + 1.2 * recomputed
    assert predicted >= 3 * 4 * tokens * 64


def test_a_transformer_is_counted_by_its_config(bert_shape: Path) -> None:
    from transformers import AutoConfig, AutoModel

    model = AutoModel.from_config(AutoConfig.from_pretrained(bert_shape))
    everything = sum(p.numel() for p in model.parameters())
    pooler = sum(p.numel() for p in model.pooler.parameters())
    sizes = make_sizes(token_config(bert_shape), workload_of(num_features=100))
    assert sizes.encoder.weights == everything
    assert sizes.encoder.trained == everything - pooler
    frozen = make_sizes(token_config(bert_shape, freeze_layers=3), workload_of(num_features=100))
    assert frozen.encoder.trained == 0
    # 2 a weight and token forward, 4 backward: torch's own count of the products.
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        hidden = model(input_ids=torch.full((4, 32), 7)).last_hidden_state
        hidden.sum().backward()
    counted = transformer_operations(
        dataclasses.replace(sizes, workload=workload_of(row_entries=32)), 4
    )
    assert counted == pytest.approx(counter.get_total_flops(), rel=0.1)


def test_on_a_gpu_only_the_card_decides(bert_shape: Path) -> None:
    sizes = make_sizes(token_config(bert_shape), workload_of(10**6, num_features=100), "cuda")
    phases = training_phases(sizes)
    for parts in phases.values():
        names = {part.name for part in on_device(parts, "cuda")}
        assert not names & {"label names", "libraries", "labels of the rows", "checkpoint"}
    assert bytes_of(phases["checkpoint"], "checkpoint") >= sizes.classifier.stored
    plan = make_plan(sizes.config, sizes.workload, device="cuda", memory=10**9, measure=True)
    assert plan.time is None
    assert "not measured on a GPU" in text_of(plan)


def test_prediction_holds_no_moments() -> None:
    sizes = make_sizes(config_of(), workload_of())
    parts = prediction_components(sizes)
    assert bytes_of(parts, "classifier weights") == 64 * 1000
    assert not [part for part in parts if "moments" in part.name or part.name == "gradient"]


def test_changes_lower_the_peak_until_it_fits() -> None:
    config = config_of(encoder={"dim": 512}, head={"fan_in": 256})
    workload = workload_of(10**6)
    plan = make_plan(config, workload, memory=1_500_000_000)
    assert plan.fits is False
    peaks = [plan.peak, *(change.peak for change in plan.changes)]
    assert peaks == sorted(peaks, reverse=True)
    assert peaks[-1] <= 1_500_000_000 < peaks[-2]
    # Each peak is that of the recipe with the settings made, read as the command reads them.
    for change in plan.changes:
        values = dict(setting.split("=") for setting in change.settings)
        numbers = {key: int(v) if v.isdigit() else v for key, v in values.items()}
        config = with_settings(config, numbers)
        assert make_plan(config, workload, memory=1).peak == change.peak
    assert make_plan(config, workload, memory=1_500_000_000).fits


def test_what_costs_nothing_is_proposed_first(bert_shape: Path) -> None:
    workload = workload_of(num_features=100)
    config = with_settings(token_config(bert_shape), {"train.batch_size": 4096})
    plan = make_plan(config, workload, memory=make_plan(config, workload).peak - 1)
    assert plan.changes[0].settings == ("encoder.checkpointing=true",)
    assert len(plan.changes) == 1


def test_no_change_helps_where_nothing_fits() -> None:
    plan = make_plan(config_of(), workload_of(), memory=10**6)
    assert plan.fits is False
    assert "no setting that is tried makes it fit" in text_of(plan)


def test_room_is_the_largest_that_fits() -> None:
    config, workload = config_of(encoder={"dim": 512}), workload_of(10**6)
    memory = make_plan(config, workload, memory=10**12).peak + 500_000_000
    plan = make_plan(config, workload, memory=memory)
    assert plan.fits and not plan.changes
    fan_in = plan.room["head.fan_in"]
    assert fan_in > 16
    assert make_plan(with_settings(config, {"head.fan_in": fan_in}), workload).peak <= memory
    assert make_plan(with_settings(config, {"head.fan_in": 2 * fan_in}), workload).peak > memory


@pytest.mark.parametrize(
    ("num_rows", "accumulation", "most"),
    [(10**6, 1, 4096), (1000, 1, 512), (1000, 4, 128), (3, 1, None)],  # from 64 rows a pass
)
def test_a_larger_batch_stays_below_4096_rows_and_those_of_the_data(
    num_rows: int, accumulation: int, most: int | None
) -> None:
    config = config_of(train={"batch_size": 64, "accumulation": accumulation})
    plan = make_plan(config, workload_of(num_rows=num_rows), memory=10**15)
    assert plan.room.get("train.batch_size") == most


def peak_changes(config: Config, workload: Workload, **where: Any) -> list[str]:
    """Settings proposed where nothing would ever fit."""
    plan = make_plan(config, workload, memory=1, **where)
    return [setting for change in plan.changes for setting in change.settings]


def test_passes_are_joined_up_to_4096_rows_and_those_of_the_data() -> None:
    """One pass saves the gradient that is kept between passes."""
    head = {"fan_in": 64}
    for num_rows, accumulation, joined in ((10**6, 32, True), (10**6, 128, False), (500, 8, False)):
        train = {"batch_size": 64, "accumulation": accumulation}
        workload = workload_of(300_000, num_rows=num_rows)
        found = peak_changes(config_of(head=head, train=train), workload)
        assert ("train.accumulation=1" in found) == joined, (num_rows, accumulation, found)


def test_a_batch_far_too_large_is_cut_at_once() -> None:
    """Passes beyond 4096 rows, or beyond the data, are not halved one by one."""
    for num_rows, expected in ((10**6, 4096), (500, 256)):
        config = config_of(encoder={"dim": 512}, train={"batch_size": 2**16})
        first = peak_changes(config, workload_of(num_rows=num_rows))[:2]
        assert first == [f"train.batch_size={expected}", f"train.accumulation={2**16 // expected}"]


@pytest.mark.parametrize("kind", ["adamw", "momentum"])
def test_float8_moments_are_proposed_where_they_keep_the_kernels(kind: str) -> None:
    """Before sgd, which saves more and changes the training; on a CPU for dense heads only."""
    optimizer, workload = {"kind": kind}, workload_of(10**6)
    float8, sgd = "classifier_optimizer.moments=float8", "classifier_optimizer.kind=sgd"
    sparse = config_of(head={"fan_in": 64}, classifier_optimizer=optimizer)
    on_gpu = peak_changes(sparse, workload, device="cuda")
    assert on_gpu.index(float8) < on_gpu.index(sgd)
    on_cpu = peak_changes(sparse, workload)
    assert sgd in on_cpu and float8 not in on_cpu
    dense = config_of(head={"kind": "dense"}, classifier_optimizer=optimizer)
    on_cpu = peak_changes(dense, workload)
    assert on_cpu.index(float8) < on_cpu.index(sgd)


def test_what_labels_that_read_bags_cannot_have_is_not_proposed() -> None:
    """Groups of labels, for one; fewer features of both kinds may be."""
    config = bag_config(head={"fan_in": 64, "bag_fan_in": 32}, encoder={"dim": 256})
    found = peak_changes(config, workload_of(10**6))
    assert "head.bag_fan_in=16" in found and "head.fan_in=32" in found
    assert not [setting for setting in found if "group_size" in setting]
    plan = make_plan(config, workload_of(), memory=10**12, measure=True)
    assert "fan-in 64 and 32 features of the bag" in text_of(plan)
    assert plan.time is not None and plan.time.step > 0
    with pytest.raises(ValueError, match="expected at most the 20 features, got 32"):
        make_plan(config, workload_of(num_features=20))


def test_sgd_is_proposed_in_place_of_float8_moments_too() -> None:
    optimizer = {"kind": "adamw", "moments": "float8"}
    config = config_of(head={"fan_in": 64}, classifier_optimizer=optimizer)
    found = peak_changes(config, workload_of(10**6), device="cuda")
    at = found.index("classifier_optimizer.kind=sgd")
    assert found[at - 1] == "classifier_optimizer.moments=float32"


def text_of(plan: Any) -> str:
    console = Console(file=io.StringIO(), width=200)
    console.print(render(plan))
    out = console.file.getvalue()  # type: ignore[attr-defined]
    return " ".join(out.split())


def test_report_and_json_say_the_same() -> None:
    plan = make_plan(config_of(), workload_of(), memory=10**12, measure=True)
    values = json.loads(json.dumps(to_dict(plan)))
    text = text_of(plan)
    assert values["peak_bytes"] == sum(c["bytes"] for c in values["training"][plan.peak_phase])
    assert f"fits: peak {megabytes(values['peak_bytes'])} of 1,000.00 GB" in text
    for part in values["training"][plan.peak_phase]:
        assert f"{part['name']} " in text
    assert values["steps_per_epoch"] == 4  # 500 rows, 128 a step
    assert values["seconds_per_epoch"] == pytest.approx(4 * values["seconds_per_step"])
    assert values["seconds_per_step"] > 0
    unmeasured = make_plan(config_of(), workload_of())
    assert to_dict(unmeasured)["seconds_per_step"] is None
    assert "time: not measured" in text_of(unmeasured)


def test_measuring_leaves_the_random_state_alone() -> None:
    state = torch.get_rng_state()
    make_plan(config_of(), workload_of(), measure=True)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_published_shape_of_amazon_3m(tmp_path: Path) -> None:
    """2,812,281 labels on bert-base, bfloat16 weights by SGD: far below 4 GiB for the classifier.

    F = 128 with an index row a label; F = 64 with groups of 16.
    """
    from transformers import BertConfig

    BertConfig().save_pretrained(tmp_path)
    config = from_dict(
        {
            "features": {"kind": "tokens"},
            "encoder": {"kind": "transformer", "model": str(tmp_path)},
            "head": {"fan_in": 128, "weight_dtype": "bfloat16"},
            "classifier_optimizer": {"kind": "sgd"},
        },
        source="test",
    )
    workload = Workload(2_812_281, 30_522, 1_717_899, 36 * 1_717_899)
    plan = make_plan(config, workload, device="cuda", memory=24 * 10**9)
    assert plan.classifier == 2_812_281 * (128 * 4 + 4)
    assert plan.classifier < 4 * 2**30
    grouped = with_settings(config, {"head.group_size": 16, "head.fan_in": 64})
    rows = -(-2_812_281 // 16)
    # Padded to whole groups; the order and its inverse take 8 bytes a label.
    expected = rows * 16 * (64 * 2 + 4) + rows * 64 * 2 + 8 * 2_812_281
    assert make_plan(grouped, workload, device="cuda").classifier == expected


def test_sizes_from_a_data_folder(tiny_data: Path, tmp_path: Path) -> None:
    config = from_dict(
        {"features": {"min_df": 1}, "train": {"validation": 0.1}, "head": {"fan_in": 8}},
        source="test",
    )
    workload = data_workload(config, tiny_data, tmp_path)
    assert (workload.num_labels, workload.num_rows, workload.validation_rows) == (30, 360, 40)
    assert workload.splits_rows
    assert 360 <= workload.num_positives <= 720  # one or two a row
    assert 7 <= workload.row_entries <= 8
    assert workload.label_chars == pytest.approx((10 * 7 + 20 * 8) / 30)
    plan = plan_recipe(config, data=tiny_data, cache=tmp_path, device="cpu")
    assert plan.workload == workload
    assert plan.memory == device_memory("cpu")


def test_sizes_from_numbers() -> None:
    config = config_of(train={"validation": 0.2})
    workload = given_workload(
        config, num_labels=50, num_features=None, num_rows=1000, positives_per_row=2.5
    )
    assert workload.num_features == 1024  # 2^hash_bits
    assert (workload.num_rows, workload.validation_rows, workload.num_positives) == (800, 200, 2000)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": "folder", "num_labels": 5}, "expected --data or --labels, got both"),
        ({"data": "folder", "num_rows": 5}, "expected --data or --rows, got both"),
        ({}, "expected --data DIR or --labels L, got neither"),
        ({"num_rows": 5}, "expected --data DIR or --labels L, got neither"),
        ({"num_labels": 5, "memory": "24"}, 'expected a size such as 24GB or 16GiB, got "24"'),
        ({"num_labels": 5, "memory": "0GB"}, 'expected a size such as 24GB or 16GiB, got "0GB"'),
        ({"num_labels": 5, "device": "tpu"}, '--device: expected auto, cpu or cuda, got "tpu"'),
    ],
)
def test_contradictions_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_recipe(config_of(), **options)


def test_what_cannot_be_counted_is_named(bert_shape: Path) -> None:
    with pytest.raises(ConfigError, match="nope: no such recipe file, nor a shipped recipe"):
        plan_recipe("nope", num_labels=5)
    tfidf = config_of(features={"vocabulary": "tfidf"})
    with pytest.raises(ConfigError, match="--features: a tf-idf vocabulary has as many features"):
        plan_recipe(tfidf, num_labels=5)
    hub = from_dict(
        {
            "features": {"kind": "tokens"},
            "encoder": {"kind": "transformer", "model": "bert-base-uncased"},
        },
        source="test",
    )
    with pytest.raises(ConfigError, match=r"fetches nothing, got bert-base-uncased: give a folder"):
        plan_recipe(hub, num_labels=5)
    with pytest.raises(ValueError, match="expected num_labels of at least 1, got 0"):
        workload_of(0)
    with pytest.raises(ValueError, match="expected row_entries of at least 0, got -1"):
        workload_of(row_entries=-1)
    with pytest.raises(ValueError, match="expected fan-in 8 for 2 of every 16 of 64 features"):
        make_plan(config_of(head={"pattern": "2:16"}), workload_of())


def test_memory_is_read_in_both_kinds_of_units() -> None:
    assert parse_memory("24GB") == 24 * 10**9
    assert parse_memory("1.5 GiB") == 3 * 2**29
    assert parse_memory("500mb") == 5 * 10**8
    assert megabytes(1_234_000_000) == "1.23 GB"
    assert megabytes(12) == "12 B"


def test_the_command_answers_with_its_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from xmc.cli import main

    def run(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["xmc", "plan", "quickstart", *arguments])
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 0
        return code, capsys.readouterr().out

    sizes = ("--labels", "5000", "--features", "1000", "--no-measure", "--device", "cpu")
    code, out = run(*sizes, "--memory", "8GB", "--json")
    assert code == 0
    assert json.loads(out)["fits"] is True
    code, out = run(*sizes, "--memory", "500MB")
    assert code == 3
    assert "does not fit" in out
    code, _ = run("--rows", "5")
    assert code == 2
