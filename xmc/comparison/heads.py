"""What is compared: the recipe with one head after another, everything else alike."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from xmc.config import Config, ConfigError, load_recipe, to_dict
from xmc.nn.warm_start import model_folder
from xmc.training.memory_classifier import make_classifier

_RIGL = ("rewire.method=rigl", "head.bag_fan_in=0")  # features of bags cannot be rewired
_OWN = {
    "dense": (),
    "bottleneck": (),
    "static": ("rewire.method=static",),
    "set": ("rewire.method=set", "head.bag_fan_in=0"),
    "rigl": _RIGL,
    "grouped": (*_RIGL, "head.group_size=16", "head.order=cluster"),
    "grouped-random": (*_RIGL, "head.group_size=16", "head.order=random"),
    "pattern": _RIGL,
}
HEADS = tuple(_OWN)
_PLAIN = ("head.group_size=1", "head.pattern=", "head.order=none")
_DENSE = (
    "head.kind=dense",
    "rewire.method=static",
    "head.dense_share=0.0",
    "head.bag_fan_in=0",
    *_PLAIN,
)
_SPARSE = ("head.kind=sparse", *_PLAIN)

# What decides the steps, the validation rows and the features: one for all heads.
_SAME = (
    *("features", "train.epochs", "train.batch_size", "train.accumulation", "train.validation"),
    *("train.patience", "train.seed", "train.label_texts"),
)
_LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+-]*")
_BLOCKS = (16, 32, 8, 4)  # m of a pattern n:m, the one tried first in front
_ENCODER_BYTES = 12  # of a weight that the encoder's AdamW trains: float32 with two moments


@dataclass(frozen=True)
class Variant:
    """One line of the comparison."""

    label: str
    """What the user calls it: the head, or the NAME of `NAME=HEAD`."""
    head: str
    """One of `HEADS`."""
    fan_in: int
    """F; 0 for dense. Of a bottleneck, that of the sparse head whose bytes it takes."""
    overrides: tuple[str, ...]
    """All settings over the recipe, but the seed."""
    config: Config
    classifier_bytes: int
    """Weights, indices, biases and optimizer state of all above the encoder's representation: the
    head, and the intermediate layer where there is one. Of a head that reads bags its local index
    too, where a vocabulary is taken to be as large as the recipe allows."""

    @property
    def name(self) -> str:
        return _name(self.label, self.fan_in)

    def with_seed(self, seed: int) -> Config:
        train = dataclasses.replace(self.config.train, seed=seed)
        return dataclasses.replace(self.config, train=train)


def make_variants(
    recipe: str | Path,
    heads: Sequence[str],
    num_labels: int,
    *,
    fan_ins: Sequence[int] = (),
    settings: Sequence[str] = (),
    head_settings: Sequence[str] = (),
) -> list[Variant]:
    """The heads in the order given, each sparse one (and its bottleneck) at each fan-in.

    Args:
        recipe: path of a TOML file or name of a shipped recipe.
        heads: dense (bfloat16 where the recipe says float8); bottleneck: a dense head behind an
            intermediate layer, as large as the sparse one of the same fan-in; static, set, rigl: a
            sparse head of that kind of rewiring, where static alone keeps head.bag_fan_in;
            grouped, grouped-random: rigl, where 16 labels of a cluster, or any 16, share their
            inputs; pattern: rigl within an n:m pattern. As NAME=HEAD, a head goes by a name of its
            own, and may stand there more than once.
        fan_ins: default: that of the recipe.
        settings: `section.key=value` over the recipe, for every head.
        head_settings: `HEAD:section.key=value`, over all other settings of that head; HEAD is its
            name, if it has one, or the name of one variant, such as rigl-64.

    Raises ConfigError on an unknown head, a setting that does not fit, and settings of one head
    that would give it other rows or steps than the others.
    """
    kinds = _kinds_by_label(heads)
    fan_ins = list(dict.fromkeys(fan_ins)) or [load_recipe(recipe, settings).head.fan_in]
    base = load_recipe(recipe, [*settings, f"head.fan_in={fan_ins[0]}"])
    if base.train.patience:
        raise ConfigError(
            "train.patience: heads are compared after equal steps, "
            f"expected 0 (no early stopping), got {base.train.patience}"
        )
    dim = representation_width(base)
    pairs = [
        (label, fan_in)
        for label, head in kinds.items()
        for fan_in in (fan_ins if head != "dense" else [0])
    ]
    extra = _by_target(head_settings, [_name(*pair) for pair in pairs], list(kinds))
    variants = []
    for label, fan_in in pairs:
        own = _own_settings(base, kinds[label], fan_in, dim=dim, num_labels=num_labels)
        overrides = (*settings, *own, *extra.get(label, ()), *extra.get(_name(label, fan_in), ()))
        config = load_recipe(recipe, overrides)
        _check_same(base, config, label)
        size = classifier_bytes(config, dim, num_labels)
        variants.append(Variant(label, kinds[label], fan_in, overrides, config, size))
    return variants


def classifier_bytes(config: Config, dim: int, num_labels: int) -> int:
    """Bytes of head and intermediate layer in training, over representations of `dim` numbers."""
    width = config.encoder.intermediate
    features = config.features
    hashed = features.vocabulary == "hashing"
    most = 2**features.hash_bits if hashed else features.max_features
    head = make_classifier(config, width or dim, num_labels, most)
    return head.trained + _ENCODER_BYTES * width * (dim + 1)


def bottleneck_width(config: Config, dim: int, num_labels: int, size: int) -> int:
    """The most outputs P of an intermediate layer for which it and a dense head take `size` bytes.

    With w bytes for a weight of the classifier, s for its optimizer state and b for a label's bias
    with its state: `L (P (w + s) + b) + 12 P (D + 1) <= size`, the last term being the layer itself
    with AdamW's moments. Against a sparse head of float32 weights with AdamW and 16-bit indices,
    `size = L (14 F + b)`, that is P = 14/12 F for very many labels.

    Raises ConfigError where not even one output fits.
    """
    head = dataclasses.replace(
        config.head,
        kind="dense",
        pattern="",
        group_size=1,
        order="none",
        dense_share=0.0,
        bag_fan_in=0,
        weight_dtype="float32" if config.head.weight_dtype == "float32" else "bfloat16",
    )
    rewire = dataclasses.replace(config.rewire, method="static")

    def total(width: int) -> int:
        encoder = dataclasses.replace(config.encoder, intermediate=width, activation="none")
        dense = dataclasses.replace(config, encoder=encoder, head=head, rewire=rewire)
        return classifier_bytes(dense, dim, num_labels)

    one = total(1)
    if size < one:
        raise ConfigError(
            f"bottleneck: expected a sparse head of at least {one:,} bytes (a bottleneck of one "
            f"output), got {size:,}"
        )
    return 1 + (size - one) // (total(2) - one)


def representation_width(config: Config) -> int:
    """D of the encoder; of a transformer, its folder or hub name is asked."""
    options = config.encoder
    if options.kind == "bag":
        return options.dim
    from transformers import AutoConfig

    folder = model_folder(options.model)
    source = options.model if folder is None else str(folder / "encoder")
    try:
        return int(AutoConfig.from_pretrained(source).hidden_size)
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"encoder.model: no transformer at {source}: {reason}") from None


def fitting_pattern(fan_in: int, width: int) -> str:
    """The pattern "n:m" that reads `fan_in` of `width` features, m = 16 where that fits.

    Raises ConfigError that names the nearest fan-ins where none fits.
    """
    known: dict[int, str] = {}
    for m in reversed(_BLOCKS):
        if width % m == 0:
            known |= {n * width // m: f"{n}:{m}" for n in range(1, m)}
    if fan_in not in known:
        nearest = sorted(sorted(known, key=lambda other: abs(other - fan_in))[:3])
        raise ConfigError(
            f"pattern: expected a fan-in that is n of every 4, 8, 16 or 32 of {width} features "
            f"({', '.join(map(str, nearest)) or 'there is none'}), got {fan_in}"
        )
    return known[fan_in]


def _own_settings(
    base: Config, head: str, fan_in: int, *, dim: int, num_labels: int
) -> tuple[str, ...]:
    """What makes the recipe one with this head."""
    dense: tuple[str, ...] = _DENSE
    if base.head.weight_dtype == "float8":  # for sparse weights only
        dense = (*dense, "head.weight_dtype=bfloat16")
    if head == "dense":
        return dense
    if head == "bottleneck":
        sparse = dataclasses.replace(
            base.head, kind="sparse", fan_in=fan_in, group_size=1, pattern="", order="none"
        )
        size = classifier_bytes(dataclasses.replace(base, head=sparse), dim, num_labels)
        width = bottleneck_width(base, dim, num_labels, size)
        return (*dense, f"encoder.intermediate={width}", "encoder.activation=none")
    own = (*_SPARSE, f"head.fan_in={fan_in}", *_OWN[head])
    if head == "pattern":
        width = base.encoder.intermediate or dim
        return (*own, f"head.pattern={fitting_pattern(fan_in, width)}")
    return own


def _kinds_by_label(heads: Sequence[str]) -> dict[str, str]:
    """Of heads given as HEAD or NAME=HEAD: the head by its name."""
    kinds: dict[str, str] = {}
    for text in heads:
        label, equals, head = text.partition("=")
        head = head if equals else label
        if head not in HEADS:
            raise ConfigError(f'expected heads of {", ".join(HEADS)}, got "{head}"')
        if not _LABEL.fullmatch(label):  # it becomes a folder's name
            raise ConfigError(
                f'expected a name of letters, digits, "-", "+" and "." before "={head}", '
                f'got "{label}"'
            )
        if label in kinds:
            raise ConfigError(
                f'expected each head once, or under another name, got "{label}" twice'
            )
        kinds[label] = head
    if not kinds:
        raise ConfigError("expected one head or more, got none")
    return kinds


def _by_target(
    settings: Iterable[str], names: Sequence[str], labels: Sequence[str]
) -> dict[str, list[str]]:
    """Settings of `HEAD:section.key=value` by head or name of a variant."""
    targets = list(dict.fromkeys((*labels, *names)))
    found: dict[str, list[str]] = {}
    for text in settings:
        target, colon, setting = text.partition(":")
        if not colon or "=" in target:
            raise ConfigError(f"--head-set {text}: expected HEAD:section.key=value")
        if target not in targets:
            raise ConfigError(
                f"--head-set {text}: expected one of the heads compared "
                f'({", ".join(targets)}), got "{target}"'
            )
        found.setdefault(target, []).append(setting)
    return found


def _check_same(base: Config, config: Config, label: str) -> None:
    """Equal rows, equal steps, features that are built once."""
    ours, others = to_dict(config), to_dict(base)
    for name in _SAME:
        section, _, key = name.partition(".")
        mine, theirs = ours[section], others[section]
        for option in [key] if key else theirs:
            if mine.get(option) != theirs.get(option):
                raise ConfigError(
                    f"{section}.{option}: expected the same for all heads, got "
                    f"{mine.get(option)!r} for {label} and {theirs.get(option)!r} for the others"
                )


def _name(label: str, fan_in: int) -> str:
    return f"{label}-{fan_in}" if fan_in else label
