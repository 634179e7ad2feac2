"""Heads as settings over a recipe, their bytes, and what is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from transformers import BertConfig

from xmc.comparison.heads import (
    HEADS,
    Variant,
    bottleneck_width,
    classifier_bytes,
    fitting_pattern,
    make_variants,
    representation_width,
)
from xmc.config import (
    Config,
    ConfigError,
    EncoderConfig,
    FeatureConfig,
    HeadConfig,
    OptimizerConfig,
)

L = 1000


def variants(*heads: str, fan_ins: tuple[int, ...] = (), **options: list[str]) -> list[Variant]:
    return make_variants("quickstart", heads, L, fan_ins=fan_ins, **options)


def test_each_head_changes_what_it_is_named_for_and_nothing_else() -> None:
    found = {variant.head: variant for variant in variants(*HEADS)}
    plain = found["static"].config
    assert plain.head == HeadConfig(fan_in=64)
    assert plain.rewire.method == "static"
    own = {
        "dense": {"head": {"kind": "dense"}},
        "set": {"rewire": {"method": "set"}},
        "rigl": {"rewire": {"method": "rigl"}},
        "grouped": {"rewire": {"method": "rigl"}, "head": {"group_size": 16, "order": "cluster"}},
        "grouped-random": {
            "rewire": {"method": "rigl"},
            "head": {"group_size": 16, "order": "random"},
        },
        "pattern": {"rewire": {"method": "rigl"}, "head": {"pattern": "2:16"}},
    }
    for head, sections in own.items():
        expected = plain
        for section, options in sections.items():
            changed = dataclasses.replace(getattr(expected, section), **options)
            expected = dataclasses.replace(expected, **{section: changed})
        assert found[head].config == expected, head
    bottleneck = found["bottleneck"].config
    assert (bottleneck.head.kind, bottleneck.encoder.activation) == ("dense", "none")
    assert bottleneck.encoder.intermediate > 0


def test_sparse_heads_and_bottlenecks_come_at_every_fan_in() -> None:
    names = [variant.name for variant in variants("dense", "bottleneck", "set", fan_ins=(32, 64))]
    assert names == ["dense", "bottleneck-32", "bottleneck-64", "set-32", "set-64"]
    assert [v.config.head.fan_in for v in variants("set", fan_ins=(32, 64))] == [32, 64]


@pytest.mark.parametrize(
    "settings",
    [
        ["head.dense_share=0.1", "head.order=frequency"],
        ["head.group_size=16", "head.order=cluster", "rewire.method=rigl"],
        ["head.pattern=2:16", "head.weight_dtype=float8"],
        ["head.bag_fan_in=16"],
        ["head.kind=dense", "encoder.intermediate=1024", "encoder.activation=relu"],
    ],
)
def test_any_recipe_can_be_compared(settings: list[str]) -> None:
    """What its own head needs is taken back where another head has no use for it."""
    found = {variant.head: variant for variant in variants(*HEADS, settings=settings)}
    dense, static = found["dense"].config.head, found["static"].config.head
    assert (dense.kind, dense.dense_share, dense.pattern) == ("dense", 0.0, "")
    assert (static.kind, static.group_size, static.pattern) == ("sparse", 1, "")
    assert dense.bag_fan_in == found["rigl"].config.head.bag_fan_in == 0
    assert found["bottleneck"].classifier_bytes <= found["static"].classifier_bytes
    assert found["static"].classifier_bytes < found["dense"].classifier_bytes
    if "head.weight_dtype=float8" in settings:
        assert (dense.weight_dtype, static.weight_dtype) == ("bfloat16", "float8")


def test_settings_of_a_head_go_over_those_of_all() -> None:
    dense, narrow, wide = variants(
        "dense",
        "rigl",
        fan_ins=(32, 64),
        settings=["classifier_optimizer.lr=0.5", "rewire.fraction=0.2"],
        head_settings=[
            "dense:classifier_optimizer.lr=0.002",
            "rigl:rewire.fraction=0.1",
            "rigl-64:rewire.interval=7",
        ],
    )
    rates = [variant.config.classifier_optimizer.lr for variant in (dense, narrow, wide)]
    assert rates == [0.002, 0.5, 0.5]
    assert [v.config.rewire.fraction for v in (dense, narrow, wide)] == [0.2, 0.1, 0.1]
    assert [v.config.rewire.interval for v in (narrow, wide)] == [300, 7]
    assert wide.with_seed(7).train.seed == 7


def test_a_named_head_stands_beside_its_kind_with_settings_of_its_own() -> None:
    found = {
        variant.name: variant
        for variant in variants(
            "static",
            "low=static",
            "wide=dense",
            fan_ins=(32, 64),
            head_settings=["low:encoder.dropout=0.1", "low-64:rewire.interval=7"],
        )
    }
    assert list(found) == ["static-32", "static-64", "low-32", "low-64", "wide"]
    assert [found[name].head for name in ("low-32", "wide")] == ["static", "dense"]
    plain, low = found["static-64"].config, found["low-64"].config
    assert plain.encoder.dropout != low.encoder.dropout == 0.1
    assert (found["low-32"].config.rewire.interval, low.rewire.interval) == (300, 7)
    assert found["low-64"].classifier_bytes == found["static-64"].classifier_bytes


OPTIMIZERS = {"sgd": 0, "momentum": 4, "adamw": 8, "adagrad": 4}  # bytes of state a weight


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("num_labels", [50, 4271, 1_000_000])
def test_a_bottleneck_is_as_large_as_fits_in_the_bytes_of_the_sparse_head(
    kind: str, num_labels: int
) -> None:
    """By the formula of the docstring, written out for 32-bit weights and 16-bit indices."""
    config = Config(classifier_optimizer=OptimizerConfig(kind=kind))  # type: ignore[arg-type]
    dim, fan_in, state = config.encoder.dim, config.head.fan_in, OPTIMIZERS[kind]
    weight, bias = 4 + state, 4 + state
    size = num_labels * (fan_in * (weight + 2) + bias)
    assert classifier_bytes(config, dim, num_labels) == size
    width = bottleneck_width(config, dim, num_labels, size)

    def total(outputs: int) -> int:
        return num_labels * (outputs * weight + bias) + 12 * outputs * (dim + 1)

    assert total(width) <= size < total(width + 1)
    encoder = dataclasses.replace(config.encoder, intermediate=width)
    head = dataclasses.replace(config.head, kind="dense")
    narrow = dataclasses.replace(config, encoder=encoder, head=head)
    assert classifier_bytes(narrow, dim, num_labels) == total(width)
    if num_labels == 1_000_000:  # 14/12 of the fan-in with AdamW, 1.5 without any state
        assert width == pytest.approx(fan_in * (weight + 2) / weight, rel=0.02)


@pytest.mark.parametrize(
    ("features", "index"),
    [
        ({"max_features": 65_536 - 512}, 2),
        ({"max_features": 65_537 - 512}, 4),
        ({"vocabulary": "hashing", "hash_bits": 10}, 2),
        ({"vocabulary": "hashing", "hash_bits": 16}, 4),
    ],
)
def test_features_of_bags_are_counted_for_the_largest_vocabulary(
    features: dict[str, Any], index: int
) -> None:
    config = Config(
        features=FeatureConfig(**features),
        head=HeadConfig(fan_in=64, bag_fan_in=16),
        classifier_optimizer=OptimizerConfig(kind="sgd"),
    )
    size = classifier_bytes(config, 512, L)
    assert size == L * (80 * (4 + index + 4) + 4)  # with the index that points into a batch
    width = bottleneck_width(config, 512, L, size)
    assert L * (4 * width + 4) + 12 * width * 513 <= size


def test_a_bottleneck_that_cannot_be_small_enough_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"bottleneck: expected .* at least [\d,]+ bytes .* 2$"):
        bottleneck_width(Config(), 512, 3, 2)


@pytest.mark.parametrize(
    ("fan_in", "width", "pattern"),
    [(64, 512, "2:16"), (32, 512, "1:16"), (16, 512, "1:32"), (96, 768, "2:16"), (2, 8, "2:8")],
)
def test_a_pattern_makes_the_fan_in(fan_in: int, width: int, pattern: str) -> None:
    n, m = map(int, pattern.split(":"))
    assert n * width == fan_in * m
    assert fitting_pattern(fan_in, width) == pattern


def test_a_fan_in_that_is_no_pattern_names_those_that_are() -> None:
    with pytest.raises(ConfigError, match=r"of 768 features \(48, 72, 96\), got 64"):
        fitting_pattern(64, 768)
    with pytest.raises(ConfigError, match=r"of 7 features \(there is none\), got 3"):
        fitting_pattern(3, 7)


@pytest.mark.parametrize(
    ("heads", "options", "message"),
    [
        (("dense", "sett"), {}, r'expected heads of dense, .*, pattern, got "sett"'),
        (("set", "set"), {}, 'each head once, or under another name, got "set" twice'),
        (("set", "set=rigl"), {}, 'got "set" twice'),
        (("../x=set",), {}, r'name of letters, .* before "=set", got "../x"'),
        ((), {}, "one head or more, got none"),
        (("set",), {"head_settings": ["rewire.fraction=0.1"]}, "HEAD:section.key=value"),
        (
            ("dense", "set"),
            {"head_settings": ["rigl:rewire.fraction=0.1"]},
            r'heads compared \(dense, set, set-64\), got "rigl"',
        ),
        (("set",), {"settings": ["train.patience=2"]}, r"train.patience: .* expected 0 .* got 2"),
        (
            ("set",),
            {"head_settings": ["set:train.epochs=9"]},
            r"train.epochs: expected the same for all heads, got 9 for set and 6 for the others",
        ),
        (
            ("set",),
            {"head_settings": ["set:features.ngrams=1"]},
            r"features.ngrams: expected the same for all heads, got 1 for set and 2",
        ),
        (("set",), {"head_settings": ["set:rewire.share=1"]}, r"rewire.share: unknown key"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    heads: tuple[str, ...], options: dict[str, list[str]], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        variants(*heads, **options)


def test_the_width_of_a_transformer_is_read_from_its_folder(tmp_path: Path) -> None:
    BertConfig(hidden_size=48, num_attention_heads=2).save_pretrained(tmp_path)
    features = FeatureConfig(kind="tokens")
    encoder = EncoderConfig(kind="transformer", model=str(tmp_path))
    assert representation_width(Config(features=features, encoder=encoder)) == 48
    missing = dataclasses.replace(encoder, model=str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match=r"encoder.model: no transformer at .*nowhere"):
        representation_width(Config(features=features, encoder=missing))
