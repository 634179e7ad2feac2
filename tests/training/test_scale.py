"""A plan for N ranks: shares of the classifier, bytes of collectives, times, and what is said."""

from __future__ import annotations

import dataclasses
import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from xmc.config import Config, ConfigError, from_dict
from xmc.distributed.collectives import World
from xmc.heads.arranged import ArrangedHead
from xmc.heads.bag import BagClassifierHead
from xmc.heads.classifier import ClassifierHead
from xmc.training.memory_model import make_sizes, total, training_phases
from xmc.training.plan_report import to_dict as plan_to_dict
from xmc.training.planner import make_plan, plan_recipe
from xmc.training.scale_command import plan_ranks
from xmc.training.scale_network import Network, parse_bandwidth, parse_latency, parse_ranks
from xmc.training.scale_plan import plan_scale
from xmc.training.scale_report import memory_parts, render, to_dict
from xmc.training.scale_time import Rates
from xmc.training.scale_traffic import messages
from xmc.training.step_rate import StepTime
from xmc.training.workload import Workload

_WHOLE = StepTime(encoder=1.0, classifier=4.0, steps_per_epoch=4)


def config_of(**sections: dict[str, Any]) -> Config:
    sections.setdefault("features", {"vocabulary": "hashing", "hash_bits": 10})
    sections.setdefault("encoder", {"dim": 64})
    sections["head"] = {"fan_in": 16, **sections.get("head", {})}
    return from_dict(sections, source="test")


def workload_of(num_labels: int = 1000, **sizes: Any) -> Workload:
    options = {"num_features": 1024, "num_rows": 500, "num_positives": 1500}
    return Workload(num_labels=num_labels, **{**options, **sizes})


def token_config(bert_shape: Path, *, checkpointing: bool = False, **train: Any) -> Config:
    return from_dict(
        {
            "features": {"kind": "tokens", "max_length": 32},
            "encoder": {
                "kind": "transformer",
                "model": str(bert_shape),
                "checkpointing": checkpointing,
            },
            "head": {"fan_in": 16},
            "train": {"batch_size": 8, **train},
        },
        source="test",
    )


def bytes_of(parts: list[Any], name: str) -> int:
    return sum(part.bytes for part in parts if part.name == name)


def held(head: Any, *more: torch.Tensor) -> int:
    tensors = [*head.state_dict().values(), *head.training_state().values(), *more]
    return sum(t.numel() * t.element_size() for t in tensors)


def test_the_use_case_of_the_design() -> None:
    """100M labels, 64 bfloat16 weights and 16-bit indices each: 25.6 GB, 3.2 GB on each of 8."""
    head = {"fan_in": 64, "weight_dtype": "bfloat16"}
    config = config_of(head=head, classifier_optimizer={"kind": "sgd"}, encoder={"dim": 768})
    plan = make_plan(config, workload_of(10**8), device="cuda", memory=4 * 10**9)
    eight = plan_scale(plan, [1, 8]).ranks[1].phases["training step"]
    weights, indices = (bytes_of(eight, f"classifier {name}") for name in ("weights", "indices"))
    assert weights + indices == 3_200_000_000
    whole = plan.phases["training step"]
    assert bytes_of(whole, "classifier weights") == bytes_of(whole, "classifier indices")
    assert 2 * bytes_of(whole, "classifier weights") == 25_600_000_000
    # A bias each; with the context and NCCL's buffers no more than 4.5 GB of the card.
    assert bytes_of(eight, "classifier biases") == 4 * 10**8 // 8
    assert 3.25e9 < plan_scale(plan, [8]).ranks[0].peak < 4.5e9
    assert plan_scale(plan, [8]).smallest == 9


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_one_rank_is_the_plan_of_one_process(device: Any) -> None:
    config = config_of(auxiliary={"kind": "clusters"}, rewire={"method": "rigl"})
    plan = make_plan(config, workload_of(), device=device, memory=10**12)
    (alone,) = plan_scale(plan, [1]).ranks
    assert alone.phases == plan.phases
    assert (alone.peak, alone.peak_phase) == (plan.peak, plan.peak_phase)
    assert alone.messages == [] and alone.sent == 0 and alone.communication == 0
    assert to_dict(plan_scale(plan, [1]))["one_rank"] == plan_to_dict(plan)


@pytest.mark.parametrize(
    ("head", "num_labels"),
    [
        ({}, 1001),
        ({"group_size": 8}, 1000),
        ({"group_size": 8}, 1003),  # phantom rows
        ({"order": "frequency", "dense_share": 0.1}, 1001),
        ({"bag_fan_in": 8}, 1001),
        ({"kind": "dense"}, 1001),
        ({"weight_dtype": "float8"}, 1001),
    ],
)
@pytest.mark.parametrize("size", [2, 4, 7])
def test_a_rank_is_counted_as_its_head_is_built(
    head: dict[str, Any], num_labels: int, size: int
) -> None:
    """Rank 0's, whose share is the largest; orders are whole everywhere."""
    config = config_of(head=head)
    sizes = make_sizes(config, workload_of(num_labels), world_size=size)
    options = (config.head, config.classifier_optimizer)
    world = World(0, size)
    built: Any
    if config.head.bag_fan_in:
        built = BagClassifierHead.from_options(64, 1024, num_labels, *options, world=world)
        local = torch.empty(len(built.shard), 24, dtype=torch.int32)
        expected = held(built, local)
    elif num_labels == 1003 or config.head.dense_share:
        built = ArrangedHead.from_config(64, num_labels, *options, world=world)
        expected = held(built, torch.empty(num_labels, dtype=torch.int32))  # the row of each label
    else:
        built = ClassifierHead.from_config(64, num_labels, *options, world=world)
        expected = held(built)
    assert sizes.classifier.trained == expected
    last = (
        ClassifierHead.from_config(64, num_labels, *options, world=World(size - 1, size))
        if (head == {})
        else None
    )
    assert last is None or held(last) <= expected


def test_parts_of_all_ranks_are_the_whole() -> None:
    """Weights of 7 ranks together; what is not divided is on each."""
    config = config_of()
    whole = make_sizes(config, workload_of(1001)).classifier
    parts = [ClassifierHead.from_config(64, 1001, config.head, world=World(r, 7)) for r in range(7)]
    assert sum(part.layer.weight.nbytes for part in parts) == whole.weights
    assert make_sizes(config, workload_of(1001), world_size=7).classifier.weights == 143 * 64


def test_rows_of_a_step_are_gathered_and_encoded_in_parts() -> None:
    """B = 128 among 3 ranks: 43 rows each, 129 with padding."""
    config = config_of()
    one, three = (
        training_phases(make_sizes(config, workload_of(), world_size=n))["training step"]
        for n in (1, 3)
    )
    assert bytes_of(one, "gathered batch") == 0
    assert bytes_of(three, "gathered batch") == 2 * 4 * 129 * 64
    # gloo holds what it gathers or sums once more, beside the padded part.
    assert bytes_of(three, "buffers of collectives") == 4 * (129 + 43) * 64
    assert bytes_of(three, "representations") == 4 * 4 * 43 * 128
    # All 128 bags, and the gradient of their sums: a part, all parts, gloo's copy.
    bags = 12 * 128 * round(workload_of().row_entries) + 8 * 129
    assert bytes_of(three, "gathered bags") == 4 * 43 * 64 * 7 + bags
    gpu = training_phases(make_sizes(config, workload_of(), "cuda", world_size=3))
    assert bytes_of(gpu["training step"], "buffers of collectives") == 4 * 43 * 64
    assert bytes_of(gpu["validation"], "gathered top-k") == 12 * 512 * 5 * 3


def test_a_transformer_is_whole_or_divided(bert_shape: Path) -> None:
    from xmc.nn.transformer import TransformerEncoder

    encoder = TransformerEncoder.from_config(str(bert_shape))
    weights = sum(p.numel() for p in encoder.parameters())
    trained = sum(p.numel() for p in encoder.parameters() if p.requires_grad)  # no pooler
    layer = sum(p.numel() for p in encoder.model.encoder.layer[0].parameters())
    found = {}
    for kind in ("ddp", "fsdp"):
        config = token_config(bert_shape, data_parallel=kind)
        sizes = make_sizes(config, workload_of(num_features=100), world_size=4)
        found[kind] = training_phases(sizes)["training step"]
    assert bytes_of(found["ddp"], "encoder weights") == 4 * weights
    assert bytes_of(found["ddp"], "encoder moments") == 8 * trained
    assert bytes_of(found["ddp"], "gradient buckets") == 4 * trained
    assert bytes_of(found["fsdp"], "encoder weights") == weights
    assert bytes_of(found["fsdp"], "encoder moments") == 2 * trained
    assert bytes_of(found["fsdp"], "gathered layers") == 4 * (weights - 3 * layer + 2 * layer)
    assert bytes_of(found["fsdp"], "gradient buckets") == 0
    assert total(found["fsdp"]) < total(found["ddp"])
    sent = {
        kind: sum(
            message.bytes
            for message in messages(
                make_sizes(
                    token_config(bert_shape, data_parallel=kind),
                    workload_of(),
                    "cuda",
                    world_size=4,
                )
            )
            if message.name.startswith("encoder")
        )
        for kind in found
    }
    assert sent["ddp"] == 2 * 3 * trained
    # Gathered forward and backward, but embeddings and pooler only once; gradients summed.
    once = weights - 3 * layer
    assert sent["fsdp"] == 3 * (2 * weights - once + trained)


def test_clusters_are_divided_like_labels() -> None:
    """16 clusters, 4 on each rank, with two moments; which label is in which is known to all."""
    config = config_of(auxiliary={"kind": "clusters"}, head={"positive_weight": "propensity"})
    one, four = (make_sizes(config, workload_of(), world_size=n) for n in (1, 4))
    step = training_phases(four)["training step"]
    assert bytes_of(step, "auxiliary head") == 3 * 4 * 4 * 65 + 12 * 1000
    # Biases, and what a positive of each label counts.
    assert (one.classifier.rest, four.classifier.rest) == (8 * 1000, 8 * 250)


def test_traffic_does_not_grow_with_the_labels() -> None:
    small, large = (
        messages(make_sizes(config_of(), workload_of(labels), world_size=8))
        for labels in (10**3, 10**9)
    )
    assert small == large


def test_messages_are_those_of_a_ring() -> None:
    config = config_of(auxiliary={"kind": "clusters"}, rewire={"method": "rigl"})
    config_sizes = (config, workload_of(num_positives=5 * 500))
    for device, factor in (("cpu", 2), ("cuda", 1)):
        found = {
            (m.when, m.name): m for m in messages(make_sizes(*config_sizes, device, world_size=4))
        }
        gathered = found["step", "representations"]
        assert gathered.bytes == 3 * (32 * 64 * 4 + 8)
        assert gathered.turns == 3 + 3
        assert found["step", "positives"].bytes == 3 * (8 * 32 + 4 * 5 * 32)
        # gloo sums everything and leaves a part of it on each.
        summed = found["step", "gradient of representations"]
        assert summed.bytes == factor * 3 * 32 * 64 * 4 + 2 * 3 * 4 // 4
        assert summed.turns == factor * 3 + 2 * 3
        assert found["step", "gradient of bags"].bytes == 3 * 32 * 64 * 4
        assert found["validation batch", "top-k"].bytes == 3 * 512 * 5 * 12
        assert found["validation batch", "representations"].bytes == 3 * 128 * 64 * 4
        assert ("rewiring", "rows of the step") in found
        assert ("step", "auxiliary head") in found


def rates_of(**options: Any) -> Rates:
    fields = {
        "whole": _WHOLE,
        "rows": 128,
        "labels": 1000,
        "classifier": (0.5, 0.0, 1.5e-3, 2e-3 / 128),  # 0.5 + 1.5 + 2 seconds
        "encoder": (0.1, 0.6 / 128, 0.3 / 128),
    }
    return Rates(**{**fields, **options})


def test_steps_shrink_with_the_shares_and_wait_for_the_network() -> None:
    """Measured: 0.5 s fixed, 1.5 s by label, 2 s by label and row; encoder 0.1, 0.6 and 0.3 s."""
    plan = make_plan(config_of(), workload_of(), memory=10**12)
    network = Network(bandwidth=1e6, latency=1e-3)
    strong = plan_scale(plan, [1, 4], network=network, rates=rates_of())
    one, four = (ranks.time for ranks in strong.ranks)
    assert one is not None and four is not None
    assert (one.encoder, one.classifier, one.communication) == (1.0, 4.0, 0.0)
    # All 128 rows, gathered, meet a quarter of the labels.
    assert four.classifier == pytest.approx(0.5 + 3.5 / 4)
    assert four.encoder == pytest.approx(0.1 + 0.6 / 4 + 0.3)
    step = [m for m in strong.ranks[1].messages if m.when == "step"]
    expected = sum(m.bytes for m in step) / 1e6 + sum(m.turns for m in step) * 1e-3
    assert four.communication == pytest.approx(expected)
    assert strong.efficiency(strong.ranks[1]) == pytest.approx(5 / 4 / four.step)
    assert strong.efficiency(strong.ranks[0]) == 1


def test_weak_scaling_keeps_the_rows_of_a_rank() -> None:
    plan = make_plan(config_of(train={"accumulation": 2}), workload_of(), memory=10**12)
    weak = plan_scale(plan, [1, 4], scaling="weak", rates=rates_of())
    one, four = weak.ranks
    assert (one.rows, four.rows) == (256, 1024)
    assert four.time is not None and one.time is not None
    assert four.time.classifier == pytest.approx(0.5 + 1.5 / 4 + 2)
    assert four.time.encoder == pytest.approx(0.1 + 0.6 + 4 * 0.3)
    assert four.time.steps_per_epoch == 1 and one.time.steps_per_epoch == 2
    assert weak.efficiency(four) == pytest.approx(one.time.step / four.time.step)
    assert bytes_of(four.phases["training step"], "gathered batch") == 2 * 4 * 512 * 64


def test_measured_rates_give_back_what_was_measured() -> None:
    plan = make_plan(config_of(), workload_of(200), memory=10**12, measure=True)
    assert plan.time is not None
    state = torch.get_rng_state()
    scale = plan_scale(plan, [1, 2])
    assert torch.equal(torch.get_rng_state(), state)
    one, two = (ranks.time for ranks in scale.ranks)
    assert one is not None and two is not None
    assert (one.encoder, one.classifier) == (plan.time.encoder, plan.time.classifier)
    assert one.steps_per_epoch == plan.time.steps_per_epoch
    assert 0 < two.classifier <= one.classifier and 0 < two.encoder <= one.encoder


def test_a_last_group_that_is_not_full_is_measured_like_others() -> None:
    config = config_of(head={"group_size": 16}, train={"batch_size": 2})
    plan = make_plan(config, workload_of(100), measure=True)
    two = plan_scale(plan, [2]).ranks[0].time
    assert two is not None and two.classifier > 0


def test_the_smallest_number_of_ranks_fits_and_one_less_does_not() -> None:
    config = config_of(head={"fan_in": 64})
    plan = make_plan(config, workload_of(10**7, label_chars=0), device="cuda", memory=10**9)
    found = plan_scale(plan, [64])
    assert found.smallest is not None and 1 < found.smallest < 64
    both = plan_scale(plan, [found.smallest - 1, found.smallest]).ranks
    assert [found.fitting(ranks) for ranks in both] == [False, True]
    tight = make_plan(config, workload_of(10**7), device="cuda", memory=10**8)
    nothing = plan_scale(tight, [2])
    assert nothing.smallest is None and nothing.searched == 1000 and nothing.fits is False
    text = text_of(nothing)
    assert "no number of ranks up to 1,000 fits 100.0 MB each on 2 ranks it does not fit" in text
    assert "no setting that is tried makes it fit" in text
    few = make_plan(config, workload_of(10), device="cuda", memory=10**8)
    assert plan_scale(few, [2]).searched == 10


def test_what_to_change_is_tried_on_the_ranks_asked_for(bert_shape: Path) -> None:
    """A transformer in parts is proposed on several ranks only."""
    config, workload = (
        token_config(bert_shape, checkpointing=True, batch_size=1),
        workload_of(1000, num_features=100),
    )
    most = dataclasses.replace(make_plan(config, workload, device="cuda"), memory=10**12)
    limit = plan_scale(most, [4]).ranks[0].peak - 10**5
    scale = plan_scale(dataclasses.replace(most, memory=limit), [2, 4])
    assert scale.fits is False
    found = [setting for change in scale.changes for setting in change.settings]
    assert "train.data_parallel=fsdp" in found
    changed = plan_scale(
        make_plan(
            token_config(bert_shape, checkpointing=True, batch_size=1, data_parallel="fsdp"),
            workload,
            device="cuda",
            memory=limit,
        ),
        [4],
    )
    assert scale.changes[found.index("train.data_parallel=fsdp")].peak >= changed.ranks[0].peak
    assert f"change first: --set {found[0]}" in text_of(scale)
    assert to_dict(scale)["changes"][0]["set"] == list(scale.changes[0].settings)
    alone = make_plan(config, workload, device="cuda", memory=limit // 2)
    assert not [c for c in alone.changes if "train.data_parallel=fsdp" in c.settings]


def text_of(scale: Any) -> str:
    console = Console(file=io.StringIO(), width=200)
    console.print(render(scale))
    return " ".join(console.file.getvalue().split())  # type: ignore[attr-defined]


def test_report_and_json_say_the_same(tmp_path: Path) -> None:
    plan = make_plan(config_of(), workload_of(), memory=1_500_000_000)
    scale = plan_scale(plan, [1, 256], rates=rates_of())
    values = json.loads(json.dumps(to_dict(scale)))
    one, many = values["ranks"]
    assert one["peak_bytes"] == plan.peak
    assert many["peak_bytes"] == sum(c["bytes"] for c in many["training"][many["peak_phase"]])
    parts = memory_parts(scale.ranks[1])
    assert sum(parts.values()) == total(scale.ranks[1].device_part("training step"))
    assert set(parts) == {"classifier", "encoder", "gathered", "other"} and all(parts.values())
    step = [m for m in many["messages"] if m["when"] == "step"]
    assert many["sent_bytes_per_step"] == sum(m["sent_bytes"] for m in step)
    assert many["received_bytes_per_step"] == many["sent_bytes_per_step"]
    assert many["seconds_per_step"] == pytest.approx(
        many["encoder_seconds"] + many["classifier_seconds"] + many["communication_seconds"]
    )
    assert many["efficiency"] == scale.efficiency(scale.ranks[1])
    assert values["smallest_ranks_that_fit"] == 1
    text = text_of(scale)
    assert "the smallest number that fits 1.50 GB each: 1 rank" in text
    assert "from 256 ranks on, some have no row of a pass to encode" in text
    unmeasured = plan_scale(make_plan(config_of(), workload_of()), [2])
    assert to_dict(unmeasured)["ranks"][0]["seconds_per_step"] is None
    assert "time: not measured" in text_of(unmeasured)
    assert "a rank of 2 sends, and receives as much" in text_of(unmeasured)


def test_the_plot_has_both_panels(tmp_path: Path) -> None:
    plan = make_plan(config_of(), workload_of(), memory=10**9)
    path = tmp_path / "scale.svg"
    scale = plan_ranks(plan, "1..6", plot=path)
    assert scale is not None and [r.ranks for r in scale.ranks] == [1, 2, 4, 6]
    assert path.read_text().startswith("<?xml")
    assert plan_ranks(plan, None) is None


def test_the_command_answers_with_its_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from xmc.cli import main

    def run(*arguments: str) -> tuple[int, str, str]:
        sizes = ("--labels", "100000000", "--features", "1000", "--no-measure", "--device", "cuda")
        monkeypatch.setattr(sys, "argv", ["xmc", "plan", "quickstart", *sizes, *arguments])
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 0
        return code, *capsys.readouterr()

    code, out, _ = run("--ranks", "1,8,64", "--memory", "16GB", "--json", "--weak")
    values = json.loads(out)
    assert code == 0 and values["scaling"] == "weak"
    assert [ranks["fits"] for ranks in values["ranks"]] == [False, True, True]
    plot = tmp_path / "plan.png"
    network = ("--bandwidth", "100Gbit/s", "--latency", "1ms", "--plot", str(plot))
    code, out, _ = run("--ranks", "2,4", "--memory", "16GB", *network)
    assert code == 3 and "the smallest number that fits 16.00 GB each: 6 ranks" in out
    assert "network: 12.50 GB a second and rank, 1 ms a turn of the ring" in " ".join(out.split())
    assert plot.stat().st_size > 10_000
    code, _, errors = run("--ranks", "0")
    assert code == 2 and "xmc: --ranks: expected at least 1 rank, got 0" in errors


def test_options_are_read() -> None:
    assert parse_ranks("8") == (8,)
    assert parse_ranks("64,1, 8,8") == (1, 8, 64)
    assert parse_ranks("1..1000") == (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1000)
    assert parse_ranks("4..4") == (4,)
    assert parse_bandwidth("25GB/s") == 25e9
    assert parse_bandwidth("10 Gbit/s") == 1.25e9
    assert parse_bandwidth("1GiB/s") == 2**30
    assert parse_latency("20us") == pytest.approx(2e-5)
    assert parse_latency("0.5 ms") == pytest.approx(5e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ranks": "0"}, "--ranks: expected at least 1 rank, got 0"),
        ({"ranks": "1,-2"}, "--ranks: expected at least 1 rank, got -2"),
        ({"ranks": "eight"}, 'expected numbers such as "8", "1,8,64" or "1..1000", got "eight"'),
        ({"ranks": "8..2"}, r'--ranks: expected a range such as 1..1000, got "8..2"'),
        ({"ranks": "0..2"}, r'--ranks: expected a range such as 1..1000, got "0..2"'),
        ({"ranks": "1001"}, "expected at least one label for each of 1001 ranks, got 1000"),
        ({"ranks": "2", "bandwidth": "25"}, r'--bandwidth: .* such as 25GB/s .*, got "25"'),
        ({"ranks": "2", "bandwidth": "25GB"}, r"--bandwidth: expected a rate"),
        ({"ranks": "2", "bandwidth": "0GB/s"}, r"--bandwidth: expected a rate"),
        ({"ranks": "2", "latency": "20"}, '--latency: expected a time such as 20us .*, got "20"'),
        ({"ranks": "2", "plot": Path("a.txt")}, "--plot: expected a file .png, .pdf, .svg, got a"),
        ({"ranks": None, "weak": True}, "expected --ranks beside --weak, got none"),
        ({"ranks": None, "plot": Path("a.png")}, "expected --ranks beside --plot, got none"),
    ],
)
def test_what_cannot_be_planned_is_named(options: dict[str, Any], message: str) -> None:
    plan = make_plan(config_of(), workload_of())
    with pytest.raises(ValueError, match=message):
        plan_ranks(plan, **options)


def test_what_does_not_train_on_several_ranks_is_named() -> None:
    limited = make_plan(config_of(train={"memory_limit": "2GB"}), workload_of())
    assert plan_scale(limited, [1]).ranks[0].peak == limited.peak
    with pytest.raises(ConfigError, match=r"train.memory_limit: .* with --ranks, got .2GB"):
        plan_scale(limited, [2])
    grouped = make_plan(config_of(head={"group_size": 8}), workload_of(80))
    message = "--ranks: expected at least one group of 8 labels for each of 11 ranks, got 10"
    with pytest.raises(ConfigError, match=message):
        plan_scale(grouped, [11])
    with pytest.raises(ConfigError, match="expected --data DIR or --labels L, got neither"):
        plan_recipe(config_of(), num_rows=5)
