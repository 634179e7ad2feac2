import dataclasses
import re

import pytest

from xmc.config import (
    Config,
    ConfigError,
    EncoderConfig,
    FeatureConfig,
    HeadConfig,
    OptimizerConfig,
    from_dict,
    load_recipe,
    shipped_recipes,
    to_dict,
)

DUAL = "[train]\nobjective = 'contrastive'\n"
TOKENS = "[features]\nkind = 'tokens'\n[encoder]\nkind = 'transformer'\nmodel = 'tiny'\n"


@pytest.fixture
def load(tmp_path):
    """Writes a recipe and loads it."""

    def load(text, *overrides):
        path = tmp_path / "recipe.toml"
        path.write_text(text, "utf-8")
        return load_recipe(path, overrides)

    return load


def test_an_empty_recipe_is_the_defaults(load):
    assert load("") == Config()


def test_values_land_in_their_fields_and_the_rest_stays(load):
    config = load(
        """
        [features]
        ngrams = 2
        [head]
        fan_in = 16
        loss = "squared_hinge"
        [classifier_optimizer]
        lr = 1
        betas = [0.8, 0.99]
        """
    )
    assert config.features == FeatureConfig(ngrams=2)
    assert config.head == HeadConfig(fan_in=16, loss="squared_hinge")
    assert config.classifier_optimizer.lr == 1.0
    assert config.classifier_optimizer.betas == (0.8, 0.99)
    assert config.train == Config().train


def test_a_transformer_recipe_is_accepted(load):
    config = load('[features]\nkind = "tokens"\n[encoder]\nkind = "transformer"\nmodel = "tiny"\n')
    assert config.encoder == EncoderConfig(kind="transformer", model="tiny")


def test_a_config_survives_the_way_through_json():
    config = Config(
        head=HeadConfig(kind="dense", fan_in=8),
        classifier_optimizer=OptimizerConfig(kind="sgd", lr=0.1, betas=(0.5, 0.25)),
    )
    plain = to_dict(config)
    assert plain["classifier_optimizer"]["betas"] == [0.5, 0.25]
    assert from_dict(plain, source="run") == config


def test_a_config_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().head.fan_in = 3


@pytest.mark.parametrize("name", shipped_recipes())
def test_every_shipped_recipe_loads_by_name(name):
    assert load_recipe(name).train.epochs >= 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "[head]\nfanin = 3",
            "head.fanin: unknown key (known: kind, fan_in, group_size, pattern, weight_dtype, "
            "loss, bag_fan_in, bag_scale, bag_init, bias_init, order, dense_share, dense_lr_scale, "
            "label_smoothing, positive_weight, propensity, propensity_a, propensity_b); "
            "did you mean fan_in?",
        ),
        (
            "[heads]\nfan_in = 3",
            "heads: unknown key (known: features, encoder, head, rewire, auxiliary, "
            "contrastive, negatives, encoder_optimizer, classifier_optimizer, train); "
            "did you mean head?",
        ),
        ("lr = 3", "lr: unknown key (known: features, "),
        ("head = 3", "head: input should be an object, got 3"),
        ("[head]\nfan_in = '3'", "head.fan_in: input should be a valid integer, got '3'"),
        ("[head]\nfan_in = 3.0", "head.fan_in: input should be a valid integer, got 3.0"),
        ("[head]\nfan_in = true", "head.fan_in: input should be a valid integer, got True"),
        ("[encoder]\nmodel = 3", "encoder.model: input should be a valid string, got 3"),
        ("[encoder_optimizer]\nlr = true", "encoder_optimizer.lr: input should be a valid number"),
        ("[encoder_optimizer]\nlr = '1'", "lr: input should be a valid number, got '1'"),
        ("[head]\nkind = 'x'", "head.kind: input should be 'sparse' or 'dense', got 'x'"),
        ("[features]\nngrams = 3", "features.ngrams: input should be 1 or 2, got 3"),
        ("[head]\nfan_in = 0", "head.fan_in: input should be greater than 0, got 0"),
        ("[encoder]\ndropout = 1.0", "encoder.dropout: input should be less than 1, got 1.0"),
        ("[encoder]\ndropout = -0.1", "encoder.dropout: input should be greater than or equal"),
        ("[encoder]\ndropout = nan", "encoder.dropout: input should be less than 1, got nan"),
        ("[rewire]\nend = 1.5", "rewire.end: input should be less than or equal to 1, got 1.5"),
        ("[features]\nhash_bits = 27", "features.hash_bits: input should be less than or equal"),
        ("[encoder_optimizer]\nlr = inf", "encoder_optimizer.lr: input should be a finite number"),
        (
            "[encoder_optimizer]\neps = inf",
            "encoder_optimizer.eps: input should be a finite number",
        ),
        ("[encoder_optimizer]\neps = 0.0", "encoder_optimizer.eps: input should be greater than 0"),
        ("[encoder_optimizer]\nbetas = [0.9]", "encoder_optimizer.betas.1: field required"),
        ("[encoder_optimizer]\nbetas = [0.9, 1.0]", "betas.1: input should be less than 1, got 1"),
        ("[encoder_optimizer]\nbetas = 3", "betas: input should be a valid array, got 3"),
        (
            "[train]\nseed = 2020-01-01",
            "train.seed: expected a number, string, list or table, got datetime.date(2020, 1, 1)",
        ),
        (
            "[encoder_optimizer]\nbetas = [2020-01-01, 1]",
            "encoder_optimizer.betas: expected a number, string, list or table, got datetime.date",
        ),
        ("[head]\nfan_in = 600", "head.fan_in: expected at most encoder.dim = 512, got 600"),
        (
            "[encoder]\nkind = 'transformer'",
            "encoder.model: a transformer encoder needs a folder or hub name",
        ),
        (
            "[encoder]\nkind = 'transformer'\nmodel = 'tiny'",
            'features.kind: a transformer encoder reads "tokens", got "bag"',
        ),
        ("[features]\nkind = 'tokens'", 'features.kind: a bag encoder reads "bag", got "tokens"'),
        (
            "[encoder_optimizer]\nkind = 'sgd'",
            'encoder_optimizer.kind: the encoder is trained by "adamw", got "sgd"',
        ),
        (
            "[contrastive]\nchunk = 8",
            'contrastive: these options need train.objective = "contrastive", got "classification"',
        ),
        ("[train]\nselect_by = 'R@10'", 'train.select_by: "R@10" needs train.objective = "contr'),
        (
            "[train]\nlabel_embeddings = 'run'",
            "train.label_embeddings: expected labels to be clustered by them",
        ),
        (DUAL + "[head]\nfan_in = 32", "head.fan_in: a dual encoder has no classifier, got 32"),
        (DUAL + "accumulation = 2", "train.accumulation: a dual encoder's batch is one step"),
        (DUAL + "label_texts = true", "train.label_texts: a dual encoder reads label texts as"),
        (
            DUAL + "[contrastive]\ntemperature = 0.001",
            "contrastive.temperature: expected at least min_temperature = 0.01, got 0.001",
        ),
        (
            DUAL + "[negatives]\nper_document = 30",
            "negatives: expected per_document of at most pool = 20, got 30",
        ),
        (
            DUAL + "length_pool = 2\n" + TOKENS,
            "train.length_pool: the documents of a batch are each other's negatives",
        ),
        (
            DUAL + TOKENS + "autocast = 'float16'",
            'encoder.autocast: a dual encoder takes "bfloat16" or "none"',
        ),
        ("[head\n", "not a TOML file: Expected ']' at the end of a table declaration (at line 1"),
        ("[head]\nfan_in = 1\nfan_in = 2", "not a TOML file: Cannot overwrite a value"),
    ],
)
def test_a_bad_recipe_is_one_line_with_file_key_rule_and_value(load, text, message):
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        load(text)
    assert re.match(r"\S+recipe\.toml: ", str(caught.value))
    assert "\n" not in str(caught.value)


def test_a_dense_head_may_keep_a_fan_in_above_the_dimension(load):
    assert load("[head]\nkind = 'dense'\nfan_in = 600").head.fan_in == 600


def test_bytes_that_are_no_text_are_refused(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"recipe\.toml: not a TOML file: 'utf-8' codec"):
        load_recipe(path)


@pytest.mark.parametrize("recipe", ["nosuch", "nosuch.toml", "quickstart.toml", "."])
def test_an_unknown_recipe_lists_the_shipped_ones(recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="no such recipe file, nor a shipped recipe") as caught:
        load_recipe(recipe)
    assert "quickstart" in str(caught.value).partition("shipped recipe")[2]


@pytest.mark.parametrize(
    ("override", "section", "key", "value"),
    [
        ("head.fan_in=8", "head", "fan_in", 8),
        ("head.fan_in = 8 ", "head", "fan_in", 8),
        ("head.kind=dense", "head", "kind", "dense"),
        ('head.kind="dense"', "head", "kind", "dense"),
        ("encoder_optimizer.lr=3e-4", "encoder_optimizer", "lr", 3e-4),
        ("encoder_optimizer.betas=[0.5, 0.75]", "encoder_optimizer", "betas", (0.5, 0.75)),
        ("encoder.model=/a/b=c d", "encoder", "model", "/a/b=c d"),
    ],
)
def test_overrides_replace_values_of_the_recipe(load, override, section, key, value):
    text = "[head]\nfan_in = 4\n[encoder]\nmodel = 'x'\n[encoder_optimizer]\nlr = 1.0\n"
    before, after = load(text), load(text, override)
    assert getattr(getattr(after, section), key) == value
    changed = dataclasses.replace(getattr(before, section), **{key: value})
    assert after == dataclasses.replace(before, **{section: changed})


def test_the_last_of_two_overrides_wins(load):
    assert load("", "head.fan_in=8", "head.fan_in=9").head.fan_in == 9


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("head.fan_in", "--set head.fan_in: expected section.key=value"),
        ("head.=3", "--set head.=3: expected section.key=value"),
        ("=3", "--set =3: expected section.key=value"),
        ("encoder.dim.x=8", "--set encoder.dim.x=8: dim is not a section"),
        ("head.fanin=8", "recipe.toml with --set: head.fanin: unknown key (known: kind, fan_in"),
        ("a.b.c=8", "recipe.toml with --set: a: unknown key (known: features, encoder"),
        ("head.fan_in=abc", "head.fan_in: input should be a valid integer, got 'abc'"),
        ("head.fan_in=", "head.fan_in: input should be a valid integer, got ''"),
        ("head=8", "head: input should be an object, got 8"),
        (
            "train.epochs=1\nseed=3",
            r"train.epochs: input should be a valid integer, got '1\nseed=3",
        ),
    ],
)
def test_a_bad_override_is_named(load, override, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        load("[encoder]\ndim = 64", override)
