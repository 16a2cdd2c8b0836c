"""Defaults < YAML < overrides, and an error for whatever is misspelt."""

import pytest
import yaml

from blspkd.training.config import LossesSection, TrainConfig
from blspkd.training.config_file import as_dict, load_config
from blspkd.training.report import table
from blspkd.training.schedule import check_schedule, weights_at
from blspkd.training.windows import LossSection


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(
        "optim: {learning_rate: 1e-3, batch_size: 8}\n"
        "losses: {token: 1, input_kl: {weight: 0.5, start: 0.25}}\n"
    )
    return file


def test_overrides_lie_over_the_file_and_the_file_over_the_defaults(path):
    config = load_config(
        path, ["optim.batch_size=16", "data.eval.human=h.jsonl", "model.plora=null"]
    )
    assert config.name == "mine"
    assert config.optim.learning_rate == 1e-3  # YAML 1.1 reads 1e-3 as a string
    assert config.optim.batch_size == 16
    assert config.optim.warmup_steps == TrainConfig().optim.warmup_steps
    assert config.data.eval == {"human": "h.jsonl"}
    assert config.model.plora is None
    assert config.losses.token == LossSection(1.0)
    assert config.losses.input_kl == LossSection(0.5, start=0.25)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.learning_rat=1", r"unknown configuration key 'optim.learning_rat'.*learning_rate"),
        ("optin.batch_size=1", r"unknown configuration key 'optin'.*optim"),
        ("optim.batch_size=big", "optim.batch_size: expected int, got 'big'"),
        ("optim.bf16=1", "optim.bf16: expected bool"),
        ("optim.schedule=step", "expected one of cosine, linear, constant"),
        ("losses.token.start=1.5", "0 <= start < stop <= 1"),
        ("losses.token.weight=-1", "weight must be >= 0"),
        ("losses.temperature=0", "losses: temperature: expected more than 0, got 0"),
        ("optim.learning_rate=.nan", "optim: learning_rate: expected at least 0, got nan"),
        ("optim.batch_size=0", "optim: batch_size: expected at least 1, got 0"),
        ("optim.max_steps=0", "optim: max_steps: expected at least 1, got 0"),
        ("model.token_scale=0", "model: token_scale: expected more than 0, got 0"),
        ("data.limit=0", "data: limit: expected at least 1, got 0"),
        ("log_steps=0", "^log_steps: expected at least 1, got 0"),
        ("model=5", "model: expected a mapping"),
        ("optim.average_with_start=0.5", r"^optim.average_with_start takes the weights of"),
        ("batch", "expected key=value"),
    ],
)
def test_what_is_wrong_is_named(path, override, message):
    with pytest.raises(ValueError, match=message):
        load_config(path, [override])


def test_broken_and_missing_files(tmp_path):
    with pytest.raises(ValueError, match="cannot read the configuration"):
        load_config(tmp_path / "none.yaml")
    (tmp_path / "broken.yaml").write_text("a: [")
    with pytest.raises(ValueError, match="not valid YAML"):
        load_config(tmp_path / "broken.yaml")


def test_a_file_lies_over_its_base_and_that_over_its_own(path):
    variants = path.parent / "variants"
    variants.mkdir()
    (variants / "second.yaml").write_text(
        "base: ../mine.yaml\nname: two\noptim: {batch_size: 4}\nlosses: {token: 0}\n"
    )
    third = variants / "third.yaml"
    third.write_text("base: second.yaml\nlosses: {input_kl: {weight: 2}}\ndata: {eval: {a: b}}\n")
    config = load_config(third, ["optim.batch_size=2"])
    assert config.name == "third"  # a name is a run's folder: two recipes never share one
    assert (config.optim.learning_rate, config.optim.batch_size) == (1e-3, 2)
    assert config.losses.token == LossSection(0.0)
    assert config.losses.input_kl == LossSection(2.0, start=0.25)
    assert config.data.eval == {"a": "b"}
    assert load_config(variants / "second.yaml").name == "two"
    assert load_config(path).data.eval == {}


def test_a_base_that_is_none_is_named(path):
    other = path.parent / "other.yaml"

    def refused(text, message):
        other.write_text(text)
        with pytest.raises(ValueError, match=message):
            load_config(other)

    refused("base: 5", r"other\.yaml: base must be the path of another file, got 5")
    refused("base: nowhere.yaml", r"nowhere\.yaml \(the base of .*other\.yaml\): No such file")
    refused("base: other.yaml", r"other\.yaml: its base other\.yaml is based on it")
    path.write_text("base: other.yaml")
    refused("base: mine.yaml", r"mine\.yaml: its base other\.yaml is based on it")


def test_the_resolved_configuration_reads_back(path, tmp_path):
    config = load_config(path)
    again = tmp_path / "again.yaml"
    again.write_text(yaml.safe_dump(as_dict(config)))
    assert load_config(again) == config


def test_a_loss_counts_in_its_window_alone():
    losses = LossesSection(token=LossSection(2.0, stop=0.5), input_kl=LossSection(1.0, start=0.5))
    early, late = weights_at(losses, 0.49), weights_at(losses, 0.5)
    assert (early.token, early.input_kl) == (2.0, 0.0)
    assert (late.token, late.input_kl) == (0.0, 1.0)


def test_a_run_that_for_a_while_asks_for_nothing_is_refused():
    off = LossSection()
    losses = LossesSection(
        token=LossSection(1.0, stop=0.5), input_kl=off, response_kl=off, quantity=off
    )
    with pytest.raises(ValueError, match="none is active from 50% of the run on"):
        check_schedule(TrainConfig(losses=losses))


def test_the_table_has_a_block_for_each_set():
    text = table(
        {"a/input_kl": 2.0, "a/length_exact": 0.0},
        {
            "a/clips": 3,
            "a/input_kl": 1.0,
            "a/length_exact": 0.5,
            "b/clips": 2,
            "b/same_answer": 1.0,
        },
    )
    assert text.splitlines() == [
        "held out: a, 3 clips                    before     after",
        "  input kl                               2.000     1.000",
        "  length exact                            0.0%     50.0%",
        "",
        "held out: b, 2 clips                    before     after",
        "  same answer                                     100.0%",
    ]
