"""Trainings in micro-batches: equal to those in one pass, within the memory the user states."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import BertConfig, BertModel

from xmc.config import Config, ConfigError, from_dict
from xmc.data.batches import Dataset, TokenStore
from xmc.data.tokens import Padding, TextTokenizer
from xmc.heads.classifier import ClassifierHead
from xmc.memory import peak_memory_bytes, resident_bytes
from xmc.model import XMCModel, build_model
from xmc.nn.encoder import BagEncoder
from xmc.nn.transformer import TransformerEncoder
from xmc.training import passes as passes_module
from xmc.training.byte_meter import AllocationMeter, MemoryLimitError
from xmc.training.encoder_optimizer import coalesce_gradient_
from xmc.training.log import RunLog
from xmc.training.passes import FittingPasses, rounded_width
from xmc.training.run import prepare_data
from xmc.training.trainer import Trainer
from xmc.types import Bag, Batch, SparseLabels, Tokens


def config(**sections: dict[str, Any]) -> Config:
    values: dict[str, dict[str, Any]] = {
        "features": {"min_df": 1},
        "encoder": {"dim": 24, "dropout": 0.0},
        "head": {"fan_in": 6},
        "encoder_optimizer": {"lr": 0.001},
        "classifier_optimizer": {"lr": 0.001},
        "train": {"epochs": 2, "batch_size": 128, "warmup_steps": 3, "checkpoint_every": 2},
    }
    for name, options in sections.items():
        values[name] = {**values.get(name, {}), **options}
    return from_dict(values, source="test")


@pytest.fixture
def no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let limits be those of the passes alone: that of a test's process is nobody's business."""
    monkeypatch.setattr(passes_module, "resident_bytes", lambda: 0)
    monkeypatch.setattr(passes_module, "_CPU_SHARE", 1.0)
    monkeypatch.setattr(passes_module, "_CPU_SHARE_OF_ONE", 1.0)
    monkeypatch.setattr(Trainer, "untouched_bytes", lambda self: 0)
    monkeypatch.setattr(Trainer, "several_bytes", lambda self, rows: 0)


def assert_alike(run: Path, other: Path, runs: ModuleType) -> None:
    """Losses of all logged steps and the weights at the end, to rounding."""
    losses = [[event["loss"] for event in runs.events(r, "step")] for r in (run, other)]
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=1e-5, atol=0)
    one, two = (load_file(r / "model" / "weights.safetensors") for r in (run, other))
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=3e-5, msg=name)


@pytest.mark.parametrize("auxiliary", ["none", "clusters"])
def test_micro_batches_train_what_the_batch_trains(
    runs: ModuleType, tiny_data: Path, tmp_path: Path, auxiliary: str
) -> None:
    """At 7, 32 and 128 rows of 128; 360 rows leave a last step of 104."""
    options = {"auxiliary": {"kind": auxiliary, "max_labels": 8}}
    train = {"epochs": 2, "batch_size": 128, "warmup_steps": 3, "select_by": "P@1"}
    whole = runs.train(config(**options, train=train), tiny_data, tmp_path / "whole")
    for size in (7, 32, 128):
        parts = config(**options, train={**train, "micro_batch": size})
        assert_alike(runs.train(parts, tiny_data, tmp_path / str(size)), whole, runs)


@pytest.mark.usefixtures("no_process")
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_memory_limit_picks_passes_that_train_the_same(
    runs: ModuleType, tiny_data: Path, tmp_path: Path, accumulation: int
) -> None:
    train = {"batch_size": 128 // accumulation, "accumulation": accumulation}
    whole = runs.train(config(train=train), tiny_data, tmp_path / "whole")
    limited = {**train, "memory_limit": "70kB"}
    run = runs.train(config(train=limited), tiny_data, tmp_path / "limited")
    assert_alike(run, whole, runs)
    (event,) = runs.events(run, "passes")
    assert event["step"] == 1
    assert 8 < event["rows"] < 128


@pytest.mark.usefixtures("no_process")
def test_every_pass_stays_below_the_limit(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted in real steps; and trials leave nothing behind, not even in random numbers."""
    options = config(train={"memory_limit": "70kB"}, encoder={"dropout": 0.3})
    trainer = make_trainer(options, tiny_data, tmp_path)
    original, peaks, sizes = trainer._pass, [], []

    def counted(batch: Batch, heads: Any, **kwargs: Any) -> float:
        if heads[0][1] == 0:  # a trial
            return original(batch, heads, **kwargs)
        with AllocationMeter() as meter:
            loss = original(batch, heads, **kwargs)
        peaks.append(meter.peak)
        sizes.append(len(batch))
        return loss

    monkeypatch.setattr(trainer, "_pass", counted)
    rows = next(trainer.steps(0, 0))
    random = torch.get_rng_state()
    assert trainer._passes is not None
    cut = trainer._passes.cut(torch.cat(rows))
    assert torch.equal(torch.get_rng_state(), random)
    assert all(p.grad is None for p in trainer.model.parameters())
    head = trainer.model.head
    assert isinstance(head, ClassifierHead)
    assert head.moments.grad_weight is None
    assert head.steps == 0
    before = {name: value.clone() for name, value in trainer.model.weights().items()}
    assert all(torch.equal(before[name], v) for name, v in trainer.model.weights().items())
    trainer._optimizer_step(cut, num_rows=128, measure=True)
    assert sizes == [len(part) for part in cut]
    assert sum(sizes) == 128
    assert 0.5 * 70_000 < max(peaks) <= 70_000


def make_trainer(options: Config, data: Path, folder: Path) -> Trainer:
    features, train_set, validation = prepare_data(options, data, folder / "cache")
    torch.manual_seed(1)
    order = torch.arange(30)
    model = build_model(options, features, [str(n) for n in range(30)], order=order).train()
    return Trainer(model, options, train_set, validation)


@pytest.mark.usefixtures("no_process")
@pytest.mark.parametrize("call", [3, 9, 14])  # in a trial; in steps
def test_interrupted_and_resumed_equals_uninterrupted(
    runs: ModuleType, tiny_data: Path, tmp_path: Path, call: int
) -> None:
    """Sizes are in the checkpoint: there is no second search that might find others."""
    options = config(
        train={"memory_limit": "70kB"},
        encoder={"dropout": 0.3},
        rewire={"method": "rigl", "interval": 2, "end": 0.9},
        auxiliary={"kind": "clusters", "max_labels": 8},
    )
    whole = runs.train(options, tiny_data, tmp_path / "whole")
    start = partial(runs.train, options, tiny_data, tmp_path / "parts")
    runs.assert_same_run(whole, runs.stop_and_resume(start, [call]))


@pytest.mark.usefixtures("no_process")
def test_a_step_that_runs_out_of_memory_begins_again(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same bits as a training whose passes had that size from the start."""
    options = {"encoder": {"dropout": 0.3}, "head": {"order": "frequency", "dense_share": 0.1}}
    limited = config(**options, train={"memory_limit": "1GB"})
    trainer = make_trainer(limited, tiny_data, tmp_path)
    plain = config(**options, train={"micro_batch": 32})
    truth = make_trainer(plain, tiny_data, tmp_path)
    original, failures = trainer._pass, []

    def failing(batch: Batch, heads: Any, **kwargs: Any) -> float:
        loss = original(batch, heads, **kwargs)
        if heads[0][1] and len(batch) > 32 and not kwargs["update"]:
            failures.append(len(batch))
            raise torch.OutOfMemoryError("fake, after gradients of encoder and head")
        return loss

    monkeypatch.setattr(trainer, "_pass", failing)
    assert trainer._passes is not None
    trainer._passes.cut(torch.arange(10))
    assert trainer._passes._sizes is not None
    trainer._passes._sizes.ran_out(128, 0)  # so that a step has two passes
    trainer._passes._whole[128] = False
    for step in range(2):
        random = torch.get_rng_state()
        work = next(truth.steps(0, step))
        expected = truth._optimizer_step(work, num_rows=128, measure=True)
        torch.set_rng_state(random)
        cut, found = trainer._fitting_step(trainer._passes, work, measure=True)
        assert [len(part) for part in cut] == [32, 32, 32, 32]
        assert found == expected
    assert failures == [64]
    for (name, one), other in zip(
        trainer.model.weights().items(), truth.model.weights().values(), strict=True
    ):
        assert torch.equal(one, other), name


@pytest.mark.usefixtures("no_process")
def test_what_cannot_be_taken_back_is_said(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the classifier's own step there is no beginning again; nor after other errors."""
    trainer = make_trainer(config(train={"memory_limit": "1GB"}), tiny_data, tmp_path)
    original = trainer._pass
    error: BaseException = torch.OutOfMemoryError("fake")

    def failing(batch: Batch, heads: Any, **kwargs: Any) -> float:
        loss = original(batch, heads, **kwargs)
        if heads[0][1]:
            raise error
        return loss

    monkeypatch.setattr(trainer, "_pass", failing)
    assert trainer._passes is not None
    work = next(trainer.steps(0, 0))
    with pytest.raises(torch.OutOfMemoryError, match="fake") as caught:
        trainer._fitting_step(trainer._passes, work, measure=False)
    assert caught.value.__notes__ == ["give the training a lower train.memory_limit"]
    error = RuntimeError("something else")
    with pytest.raises(RuntimeError, match="something else"):
        trainer._fitting_step(trainer._passes, work, measure=False)


def token_set(widths: list[int]) -> Dataset:
    """Rows of so many tokens, of one label each."""
    indptr = torch.tensor([0, *widths]).cumsum(0)
    store = TokenStore(indptr, torch.ones(int(indptr[-1]), dtype=torch.int32), Padding(0))
    return Dataset(store, SparseLabels.from_lists([[0]] * len(widths), 1))


@pytest.mark.usefixtures("no_process")
def test_longer_texts_get_smaller_passes() -> None:
    """1000 bytes a token, 100 kB left of 130: every pass fits at the width it is padded to."""
    trials: list[tuple[int, int]] = []

    class Fake:
        def trial(self, batch: Batch) -> None:
            assert isinstance(batch.inputs, Tokens)
            trials.append((batch.inputs.ids.shape[1], len(batch)))
            torch.zeros(250, *batch.inputs.ids.shape)

        def untouched_bytes(self) -> int:
            return 10_000

        def several_bytes(self, rows: torch.Tensor) -> int:
            return 20_000

        def single_saving(self) -> int:
            return 0

    def make(widths: list[int], widest: int) -> FittingPasses:
        device = torch.device("cpu")
        return FittingPasses(
            token_set(widths), device, Fake(), limit=130_000, most=1000, widest=widest
        )

    message = "a pass over one row of 200 tokens takes more than the 100 kB that are left of 130 kB"
    with pytest.raises(ConfigError, match=message):
        make([200], 200).cut(torch.arange(1))
    trials.clear()
    generator = torch.Generator().manual_seed(4)
    widths = torch.randint(1, 41, (300,), generator=generator).tolist()
    passes = make(widths, 40)
    rows = torch.arange(300)
    cut = passes.cut(rows)
    assert torch.cat(cut).sort().values.equal(rows)
    for part in cut:
        widest = max(widths[row] for row in part)
        assert len(part) * widest <= 100
    assert len(cut[0]) == 2  # 40 tokens each, 90% of the limit
    assert max(len(part) for part in cut) > 15
    assert {width for width, _ in trials[1:]} <= {1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 40}
    measured = len(trials)
    again = passes.cut(rows)
    assert all(a.equal(b) for a, b in zip(cut, again, strict=True))
    assert len(trials) == measured  # nothing is measured twice
    found = dict(passes.news())
    assert found[40] == 2
    assert passes.news() == []


@pytest.mark.usefixtures("no_process")
def test_a_transformer_trains_the_same_within_a_limit(tmp_path: Path) -> None:
    """Texts of unequal length, checkpointing: two steps against one pass each."""
    torch.manual_seed(2)
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    shape |= {"vocab_size": 50, "intermediate_size": 32, "max_position_embeddings": 24}
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    bert = BertModel(BertConfig(**shape, **no_dropout))
    widths = torch.randint(2, 21, (64,))
    ends = F.pad(widths.cumsum(0), (1, 0))
    store = TokenStore(ends, torch.randint(0, 50, (int(ends[-1]),)).int(), Padding(0))
    labels = SparseLabels.from_lists([[n % 7] for n in range(64)], 7)

    def trained(train: dict[str, Any]) -> tuple[list[float], dict[str, torch.Tensor], Any]:
        encoder = TransformerEncoder(copy.deepcopy(bert), checkpointing=True)
        options = config(
            features={"kind": "tokens", "max_length": 20},
            encoder={"kind": "transformer", "model": "bert", "checkpointing": True},
            head={"fan_in": 6},
            train={"batch_size": 32, "schedule": "constant", "warmup_steps": 0, **train},
        )
        torch.manual_seed(3)
        head = ClassifierHead.from_config(16, 7, options.head, options.classifier_optimizer)
        tokenizer = TextTokenizer.__new__(TextTokenizer)  # no texts take part
        model = XMCModel(options, tokenizer, [], encoder, head)
        trainer = Trainer(model.train(), options, Dataset(store, labels), None)
        log = RunLog(tmp_path / f"{len(list(tmp_path.iterdir()))}.jsonl", 0)
        losses = [trainer.run_step(work, log, measure=False).loss for work in trainer.steps(0, 0)]
        log.close()
        return losses, model.weights(), trainer._passes

    losses, weights, _ = trained({})
    limited, found, passes = trained({"memory_limit": "250kB"})
    assert passes is not None
    sizes = passes.state()["sizes"]["searches"]
    assert all(search["chosen"] < 32 for _, search in sizes if search["chosen"] is not None)
    assert max(width for width, _ in sizes) == 20  # and not 24: as long as texts may be
    torch.testing.assert_close(limited, losses, rtol=1e-5, atol=0)
    for name in weights:
        torch.testing.assert_close(found[name], weights[name], rtol=1e-3, atol=3e-5, msg=name)


def test_widths_are_rounded_up_to_few() -> None:
    rounded = [rounded_width(width) for width in range(1, 20)]
    assert rounded == [1, 2, 3, 4, 6, 6, 8, 8, 12, 12, 12, 12, 16, 16, 16, 16, 24, 24, 24]


def test_the_process_counts(tiny_data: Path, tmp_path: Path) -> None:
    """What it holds, and the moments that it will hold, leave no room in 1 MB."""
    held = torch.ones(10_000_000)
    assert resident_bytes() > held.numel() * 4
    assert resident_bytes() <= peak_memory_bytes()
    trainer = make_trainer(config(train={"memory_limit": "1MB"}), tiny_data, tmp_path)
    trained = sum(p.numel() for p in trainer.model.body.parameters())
    head = trainer.model.head.training_state()
    assert trainer.untouched_bytes() == 8 * trained + sum(t.nbytes for t in head.values())
    touched = len(set(trainer.train_set.batch(torch.arange(9)).inputs.ids.tolist()))
    assert trainer.several_bytes(torch.arange(9)) == 3 * touched * 24 * 4
    assert trainer.single_saving() == 30 * (6 + 1) * 4
    assert trainer._passes is not None
    message = "libraries take .* before any pass, got 1.0 MB"
    with pytest.raises(ConfigError, match=message):
        trainer._passes.cut(torch.arange(10))


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"train": {"memory_limit": "auto", "device": "cpu"}}, '"auto" asks a GPU; on a CPU'),
        ({"train": {"memory_limit": "0GB"}}, "expected a size such as 24GB"),
    ],
)
def test_limits_that_cannot_be_kept_are_refused(
    tiny_data: Path, tmp_path: Path, sections: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        make_trainer(config(**sections), tiny_data, tmp_path)


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ({"memory_limit": "lots"}, 'a size such as 2GB or 512MiB, got "lots"'),
        ({"memory_limit": "2"}, 'a size such as 2GB or 512MiB, got "2"'),
        ({"memory_limit": "2GB", "micro_batch": 4}, "one of micro_batch and memory_limit: each"),
    ],
)
def test_options_are_checked(train: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(train=train)
    assert config(train={"memory_limit": "1.5 GiB"}).train.memory_limit == "1.5 GiB"


def test_a_trial_that_fails_leaves_nothing(tiny_data: Path, tmp_path: Path) -> None:
    trainer = make_trainer(config(encoder={"dropout": 0.3}), tiny_data, tmp_path)
    batch = trainer.train_set.batch(torch.arange(64))
    random = torch.get_rng_state()
    with pytest.raises(MemoryLimitError), AllocationMeter(15_000):
        trainer.trial(batch)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(p.grad is None for p in trainer.model.parameters())
    assert trainer.model.head.moments.grad_weight is None  # type: ignore[union-attr]


@pytest.mark.usefixtures("no_process")
def test_bags_that_fit_in_one_pass_are_not_cut(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though several passes, whose gradients are added up, would be refused."""
    monkeypatch.setattr(Trainer, "several_bytes", lambda self, rows: 10**9)
    trainer = make_trainer(config(train={"memory_limit": "1MB"}), tiny_data, tmp_path)
    assert trainer._passes is not None
    for rows in (torch.arange(128), torch.arange(30)):
        (part,) = trainer._passes.cut(rows)
        assert part.equal(rows)
    assert trainer._passes.news() == [(0, 30)]
    tight = make_trainer(config(train={"memory_limit": "40kB"}), tiny_data, tmp_path)
    assert tight._passes is not None
    message = "a step over 128 rows takes more than 40 kB in one pass, and .*: lower train.batch_s"
    with pytest.raises(ConfigError, match=message):
        tight._passes.cut(torch.arange(128))


def test_a_tables_gradient_over_passes_holds_each_row_once() -> None:
    model = BagEncoder(10, 4)
    bags = [
        Bag(torch.tensor(ids), torch.tensor([0, len(ids)]), torch.rand(len(ids)))
        for ids in ([3, 7], [1, 3, 9], [7])
    ]
    for bag in bags:
        model(bag).sum().backward()
        coalesce_gradient_(model)
        assert model.table.weight.grad is not None
        assert model.table.weight.grad.is_coalesced()
    found = model.table.weight.grad
    assert found._indices().tolist() == [[1, 3, 7, 9]]
    model.zero_grad(set_to_none=True)
    sum(model(bag).sum() for bag in bags).backward()  # type: ignore[union-attr]
    torch.testing.assert_close(found.to_dense(), model.table.weight.grad.to_dense())
