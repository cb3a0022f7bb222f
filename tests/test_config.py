"""Settings: what is refused and how, overrides, YAML, the identity of a run, old names, and plug-ins."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from inflora.config import (
    ADAPTERS,
    CLASSIFIERS,
    METHODS,
    AlignedSettings,
    ConfigError,
    FirstTaskSettings,
    NoAdapterSettings,
    OptimSettings,
    RunConfig,
    config_hash,
    dump_config,
    load_config,
    method_of,
    override,
    parse_assignments,
    parse_config,
    settings_of_method,
)
from inflora.config.listing import all_settings, lines_of_settings
from inflora.presets import PRESETS
from sweeps import digits

ALIGNED = RunConfig(classifier=AlignedSettings())
"""A run with more settings than the default one: every file of ``replay`` has its place in it."""

CHOICES = {"adapter": ADAPTERS, "classifier": CLASSIFIERS}
GROUPS = ("data", "backbone", "adapter", "classifier", "optim", "replay")

positive = st.floats(min_value=1e-9, max_value=1e6)
shares = st.floats(min_value=0, max_value=1, exclude_min=True)
scales = st.floats(min_value=1e-6, max_value=1)
bounds = st.tuples(scales, scales).map(lambda pair: tuple(sorted(pair)))
energies = st.tuples(shares, shares).map(sorted).map(lambda pair: {"energy": pair[0], "energy_end": pair[1]})
trained = {"adapt_tasks": st.none() | st.integers(1, 99), "features": st.sampled_from(["adapted", "both"])}
ranks = st.fixed_dictionaries(
    {"rank": st.integers(1, 999), "blocks": st.none() | st.integers(1, 99)}, optional=trained | {"merge": shares}
)
adapters = st.one_of(
    st.builds(lambda rank, energy: {"name": "inflora"} | rank | energy, ranks, energies),
    st.builds(lambda name, rank: {"name": name} | rank, st.sampled_from(["lora", "olora", "sdlora"]), ranks),
    st.fixed_dictionaries({"name": st.sampled_from(["l2p", "dualprompt", "codaprompt"])}, optional=trained),
    st.just("none"),
)
parts = st.none() | st.floats(min_value=0, max_value=1)
drift = {"drift": parts}
classifiers = st.one_of(
    st.just("linear"),
    st.fixed_dictionaries({"name": st.just("aligned"), "lr": positive, "temperature": st.none() | scales} | drift),
    st.fixed_dictionaries({"name": st.sampled_from(["ncm", "ranpac"])} | drift),
    st.fixed_dictionaries({"name": st.sampled_from(["lda", "qda"]), "shrinkage": parts} | drift),
)
configs = st.fixed_dictionaries(
    {
        "data": st.fixed_dictionaries(
            {
                "augment": st.just("none")
                | st.fixed_dictionaries({"scale": bounds, "ratio": bounds, "flip": st.booleans()}),
                "root": st.none() | st.just("/some/where"),
                "order_seed": st.none() | st.integers(0, 9999),
                "mean": st.floats(-1, 1),
            }
        ),
        "backbone": st.fixed_dictionaries(
            {
                "options": st.dictionaries(
                    st.text(min_size=1, max_size=8), st.integers() | st.booleans() | st.text(max_size=8), max_size=3
                )
            }
        ),
        "adapter": adapters,
        "classifier": classifiers,
        "replay": st.fixed_dictionaries({"heads": st.none() | st.just("heads.safetensors")}),
        "optim": st.fixed_dictionaries(
            {"lr": positive, "head_lr": st.none() | positive, "first_task": st.just({}) | st.just({"epochs": 3})}
        ),
        "provenance": st.dictionaries(st.text(max_size=8), st.text(max_size=8) | st.none(), max_size=2),
    }
).map(parse_config)

known_names = st.sampled_from(["data", "adapter", "optim", "method", "name", "rank", "augment", "scale", "options"])
junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(known_names | st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


def leaves(settings: dict, prefix: str = "") -> dict[str, object]:
    """Dotted path -> value of every setting, one by one."""
    flat: dict[str, object] = {}
    for name, value in settings.items():
        nested = isinstance(value, dict) and prefix + name not in ("backbone.options", "provenance")
        flat |= leaves(value, f"{prefix}{name}.") if nested else {prefix + name: value}
    return flat


@pytest.mark.parametrize(
    ("settings", "unknown", "known"),
    [
        ({"adaptor": {}}, "adaptor", (*GROUPS, "seed", "device")),
        ({"data": {"task": 5}}, "data.task", ("tasks", "order_seed", "validation")),
        ({"data": {"augment": {"flp": True}}}, "data.augment.flp", ("scale", "ratio", "flip")),
        ({"backbone": {"weight": "x"}}, "backbone.weight", ("name", "weights", "options")),
        ({"adapter": {"name": "inflora", "rnk": 1}}, "adapter.rnk", ("rank", "energy", "memory")),
        ({"adapter": {"name": "none", "rank": 1}}, "adapter.rank", ("name",)),
        ({"classifier": {"name": "aligned", "epoch": 1}}, "classifier.epoch", ("epochs", "lr", "temperature")),
        ({"replay": {"order": "x"}}, "replay.order", ("orders", "heads", "draws")),
        ({"optim": {"first_task": {"learning_rate": 1}}}, "optim.first_task.learning_rate", ("lr", "epochs")),
    ],
)
def test_an_unknown_setting_is_refused_and_the_known_ones_are_listed(settings, unknown, known):
    with pytest.raises(ConfigError, match=f"unknown setting {unknown}; known here: ") as error:
        parse_config(settings)
    listed = str(error.value).split("known here: ")[1].split("; ")[0].split(", ")
    assert set(known) <= set(listed)


@pytest.mark.parametrize(("group", "known"), [("adapter", ADAPTERS), ("classifier", CLASSIFIERS)])
def test_an_unknown_name_is_refused_and_a_missing_one_asked_for_with_the_known_ones(group, known):
    listed = re.escape(", ".join(known))
    for written in ("ewc", {"name": "ewc"}):
        with pytest.raises(ConfigError, match=rf"^unknown {group}\.name 'ewc'; known: {listed}$"):
            parse_config({group: written})
    with pytest.raises(ConfigError, match=rf"^{group}\.name is missing; known: {listed}$"):
        parse_config({group: {"lr": 5}})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"classifier": "aligned", "data": {"joint": True}}, "classifier aligned needs several tasks"),
        ({"replay": {"draws": "d.safetensors"}}, "replay.draws are for classifier aligned, got classifier linear"),
    ],
)
def test_choices_that_do_not_go_together_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message) as error:
        parse_config(settings)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("adapter.energy", 0),
        ("adapter.energy", 1.2),
        ("adapter.energy_end", 0.5),
        ("adapter.rank", 0),
        ("adapter.rank", 2.5),
        ("classifier.views", True),
        ("classifier.views", 2.0),
        ("adapter.total_tasks", 0),
        ("adapter.memory", "both"),
        ("optim.lr", 0),
        ("optim.lr", float("inf")),
        ("optim.lr", float("nan")),
        ("optim.epochs", 0),
        ("optim.name", "adamw"),
        ("optim.schedule", "linear"),
        ("optim.schedule", "step"),
        ("optim.milestones", [3]),
        ("optim.milestones", [0]),
        ("optim.decay", 0),
        ("optim.head_init", "unifrom"),
        ("replay.orders", "a\0b"),
        ("adapter.targets", []),
        ("adapter.targets", ["k", "k"]),
        ("adapter.targets", ["mlp"]),
        ("classifier.epochs", 0),
        ("classifier.temperature", 0),
        ("classifier.samples", 0),
        ("optim.first_task.lr", -1),
        ("data.validation", 0),
        ("data.validation", 1),
        ("data.augment", "some"),
        ("data.augment.scale", [0.5, 1.5]),
        ("data.augment.ratio", [2, 1]),
        ("data.mean", float("nan")),
        ("data.std", 0),
        ("data.joint", 1),
        ("data.tasks", 0),
        ("data.tasks", []),
        ("data.tasks", [5, 0]),
        ("data.scenario", "task"),
        ("data.eval_resize", 0),
        ("data.mean", [0.5, 0.5]),
        ("data.std", [1, 1, 0]),
        ("seed", -1),
        ("seed", 2**63),
        ("seed", True),
        ("seed", 1.0),
        ("data.tasks", True),
        ("data.tasks", [5, True]),
        ("data.order_seed", 10**30),
        ("data.order", 1993),
        ("data.order", "pycil-1993 "),
        ("data.split_seed", 2**64),
        ("data.eval_resize", 2**63),
        ("data.dataset", "x" * 5000),
        ("data.root", "a\0b"),
        ("data.std", 1e-320),
        ("data.mean", 1e308),
        ("data.augment.scale", [1e-320, 1]),
        ("data.augment.flip", 1),
        ("backbone.name", "\ud800"),
        ("backbone.weights", "a\0b"),
        ("adapter.rank", 10**9),
        ("classifier.samples", 10**9),
        ("optim.batch_size", 10**30),
        ("optim.epochs", 10**30),
        ("optim.lr", 1e308),
        ("optim.lr", 1e-320),
        ("optim.weight_decay", 1e308),
        ("optim.first_task.weight_decay", 1e308),
        ("provenance", {"changed": 5}),
        ("provenance", {"changed": [{"a": 1}]}),
        ("provenance", {"changed": ["a", 1]}),
        ("provenance", 5),
        ("seed", "one"),
        ("device", "tpu"),
    ],
)
def test_a_value_outside_its_range_is_refused_by_the_name_of_its_setting(path, value):
    with pytest.raises(ConfigError) as error:
        override(ALIGNED, {path: value})
    assert path.split(".")[0] in str(error.value)
    assert path.split(".")[-1] in str(error.value)


@pytest.mark.parametrize("order", ["", "1993", "pycil-", "pycil--1", "icarl-1993", "pycil-4294967296", "pycil-1\n"])
def test_an_order_that_is_not_known_is_refused_with_those_that_are(order):
    line = refusal_of(override, RunConfig(), {"data.order": order})
    assert line.startswith("data.order: must be pycil-<seed> with a seed from 0 to 4294967295, as pycil-1993, got ")


def test_two_class_orders_at_once_are_refused():
    line = refusal_of(override, RunConfig(), {"data.order": "pycil-1993", "data.order_seed": 1993})
    assert line == "data: order and order_seed are two orders, got pycil-1993 and 1993; set one"


@given(settings=st.dictionaries(st.sampled_from([*GROUPS, "seed", "device", "provenance"]) | st.text(), junk))
def test_whatever_is_given_becomes_a_config_or_a_message_of_one_line(settings):
    message = "none"
    try:
        parse_config(settings)
    except ConfigError as error:
        message = str(error)
    assert len(message.splitlines()) == 1


def test_a_config_cannot_be_changed():
    with pytest.raises(ValidationError):
        RunConfig().seed = 1


def test_a_dotted_override_changes_that_setting_and_nothing_else():
    before = RunConfig()
    after = override(before, {"adapter.rank": 8, "optim.first_task.epochs": 3})
    assert after == parse_config({"adapter": {"name": "inflora", "rank": 8}, "optim": {"first_task": {"epochs": 3}}})
    assert before == RunConfig()


def test_a_whole_group_can_be_overridden():
    assert override(RunConfig(), {"adapter": {"name": "none"}}).adapter == NoAdapterSettings()
    assert override(RunConfig(), {"data.augment": "none"}).data.augment == "none"


@pytest.mark.parametrize(
    ("group", "name"), [(group, name) for group, known in CHOICES.items() for name in known], ids="=".join
)
def test_a_bare_name_stands_for_an_adapter_or_a_classifier_with_its_own_defaults(group, name):
    """Wherever it is written, and whatever was chosen before it."""
    (chosen,) = {getattr(parse_config({group: written}), group) for written in (name, {"name": name})}
    assert chosen == CHOICES[group][name]()
    for before in (RunConfig(), override(ALIGNED, {"adapter": "l2p"})):
        for path in (group, f"{group}.name"):
            if getattr(before, group).name != name:
                assert getattr(override(before, {path: name}), group) == chosen


@pytest.mark.parametrize("choice", ["classifier", "classifier.name"])
def test_a_choice_and_its_settings_may_be_given_in_any_order(choice):
    changes = {"classifier.epochs": 3, choice: "aligned", "classifier.lr": 0.1}
    for before in (RunConfig(), override(ALIGNED, {"classifier.samples": 3})):
        after = override(before, changes)
        assert (after.classifier.epochs, after.classifier.lr) == (3, 0.1)
        assert after == override(before, dict(reversed(changes.items())))


def test_choosing_what_is_chosen_already_keeps_its_settings():
    changed = override(RunConfig(), {"adapter.rank": 3})
    assert override(changed, {"adapter.name": "inflora"}) == changed


@given(config=configs)
def test_every_setting_has_a_dotted_name_that_overrides_it(config):
    for path, value in leaves(config.model_dump()).items():
        assert override(config, {path: value}) == config


@pytest.mark.parametrize("path", ["rank", "adapter.rnk", "adapter.rank.low", "adaptor.rank", "data..tasks", ".", ""])
def test_an_unknown_dotted_name_is_refused_in_one_line(path):
    with pytest.raises(ConfigError, match="unknown setting") as error:
        override(RunConfig(), {path: 1})
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a=5e-4", 5e-4),
        ("a=1E3", 1000.0),
        ("a=8", 8),
        ("a=0.95", 0.95),
        ("a=null", None),
        ("a=none", "none"),
        ("a=true", True),
        ("a=[0.5, 1]", [0.5, 1]),
        ("a={name: none}", {"name": "none"}),
        ("a=b=c", "b=c"),
    ],
)
def test_a_value_on_the_command_line_is_read_as_what_it_looks_like(text, value):
    (read,) = parse_assignments([text]).values()
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize("text", ["adapter.rank", "=3", "", "a=[1"])
def test_what_is_no_assignment_is_refused(text):
    with pytest.raises(ConfigError):
        parse_assignments([text])


@given(config=configs)
def test_yaml_gives_back_an_equal_config_of_the_same_identity(config, tmp_path_factory):
    file = tmp_path_factory.getbasetemp() / "config.yaml"
    file.write_text(dump_config(config))
    assert load_config(file) == config
    assert config_hash(load_config(file)) == config_hash(config)


@pytest.mark.parametrize("content", [b"- a\n", b"[]", b"a: [", b"\xff\xfe\x00", b"just text", b"0"])
def test_a_file_that_is_no_mapping_is_refused_by_its_name(content, tmp_path):
    file = tmp_path / "broken.yaml"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=r"broken\.yaml") as error:
        load_config(file)
    assert len(str(error.value).splitlines()) == 1


def test_a_missing_file_is_refused_by_its_name(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot read the config .*nowhere\.yaml"):
        load_config(tmp_path / "nowhere.yaml")
    with pytest.raises(ConfigError, match="cannot read the config"):
        load_config(tmp_path)


def test_a_number_may_be_written_as_people_write_it(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("optim: {lr: 5e-4, head_lr: 1E-2}")
    assert (load_config(file).optim.lr, load_config(file).optim.head_lr) == (5e-4, 1e-2)


def test_an_empty_file_is_the_default_run(tmp_path):
    file = tmp_path / "empty.yaml"
    file.write_text("# everything as it is\n")
    assert load_config(file) == RunConfig()


@pytest.mark.parametrize(
    "change",
    [{"data.root": Path("/x")}, {"device": "cpu"}, {"provenance": {"run": "1"}}, {"backbone.weights": Path("/w")}],
    ids=str,
)
def test_paths_device_and_provenance_are_no_part_of_a_runs_identity(change):
    assert config_hash(override(RunConfig(), change)) == config_hash(RunConfig())


CHANGES = {
    "data.dataset": "other",
    "data.tasks": 2,
    "data.joint": True,
    "data.scenario": "domain",
    "data.eval_resize": 256,
    "data.order_seed": 3,
    "data.order": "pycil-3",
    "data.validation": 0.2,
    "data.split_seed": 1,
    "data.train_on": "train+validation",
    "data.augment.scale": (0.5, 1.0),
    "data.augment.ratio": (1.0, 1.0),
    "data.augment.flip": False,
    "data.mean": 0.5,
    "data.std": 0.5,
    "backbone.name": "other",
    "backbone.pretrained": False,
    "backbone.options": {"depth": 2},
    "adapter.name": "lora",
    "adapter.rank": 3,
    "adapter.energy": 0.9,
    "adapter.energy_end": 0.99,
    "adapter.total_tasks": 9,
    "adapter.memory": "gpm",
    "adapter.energy_of": "inputs",
    "adapter.balance": 1.0,
    "adapter.blocks": 1,
    "adapter.targets": ("q", "v"),
    "adapter.adapt_tasks": 1,
    "adapter.features": "both",
    "adapter.merge": 0.5,
    "adapter.first_merge": 0.5,
    "adapter.train_A": True,
    "classifier.name": "ncm",
    "classifier.epochs": 3,
    "classifier.lr": 0.1,
    "classifier.weight_decay": 0.1,
    "classifier.samples": 3,
    "classifier.temperature": 0.1,
    "classifier.steps": 3,
    "classifier.drift": 0.1,
    "classifier.views": 2,
    "replay.orders": Path("orders.safetensors"),
    "replay.heads": Path("heads.safetensors"),
    "replay.draws": Path("draws.safetensors"),
    "optim.name": "sgd",
    "optim.lr": 0.1,
    "optim.head_lr": 0.1,
    "optim.head_init": "zero",
    "optim.epochs": 3,
    "optim.batch_size": 3,
    "optim.weight_decay": 0.1,
    "optim.schedule": "constant",
    "optim.milestones": None,
    "optim.decay": 0.5,
    "optim.first_task.lr": 0.1,
    "optim.first_task.epochs": 3,
    "optim.first_task.weight_decay": 0.1,
    "seed": 1,
    "precision": "bf16",
    "compile": True,
}


@pytest.mark.parametrize("path", sorted(CHANGES))
def test_every_other_setting_is_part_of_a_runs_identity(path):
    together = {"optim.milestones": {"optim.schedule": "step", "optim.milestones": [2]}}
    before = RunConfig() if path == "data.joint" else ALIGNED  # what is joint has nothing to align
    assert config_hash(override(before, together.get(path, {path: CHANGES[path]}))) != config_hash(before)


@pytest.mark.parametrize("path", ["replay.orders", "replay.heads", "replay.draws"])
def test_a_given_file_counts_by_its_content_wherever_it_lies(path, tmp_path):
    here, there = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    here.write_bytes(b"one")
    there.write_bytes(b"one")
    first = config_hash(override(ALIGNED, {path: here}))
    assert config_hash(override(ALIGNED, {path: there})) == first
    assert first != config_hash(ALIGNED)
    here.write_bytes(b"another")
    assert config_hash(override(ALIGNED, {path: here})) != first


def test_the_hash_of_settings_stays_from_version_to_version():
    """A state is resumed and a study's trials are compared by it."""
    assert config_hash(RunConfig()) == "73a7d09b508ea453"
    assert config_hash(PRESETS["imagenet-r-10-ca"].config) == "77bf71b2cb1c3de1"


def test_no_setting_is_forgotten_in_the_two_lists_above():
    elsewhere = {"data.root", "device", "provenance", "backbone.weights"}
    assert set(leaves(ALIGNED.model_dump())) == set(CHANGES) | elsewhere


def test_the_first_task_takes_its_own_values_and_the_others_the_common_ones():
    optim = OptimSettings(lr=0.1, epochs=5, first_task=FirstTaskSettings(lr=0.2))
    assert (optim.of_task(0).lr, optim.of_task(0).epochs) == (0.2, 5)
    assert optim.of_task(1) == optim


def test_a_name_that_is_no_text_is_unknown_as_others_are():
    with pytest.raises(ConfigError, match=r"^unknown classifier.name '\?'; known: linear"):
        override(RunConfig(), {"classifier": "\ud800"})


def test_long_names_and_values_are_cut_and_many_mistakes_are_counted():
    for settings in ({"x" * 5000: 1}, {"seed": "x" * 5000}, {f"k{i}": 1 for i in range(5000)}, {"\x1b[31m\n": 1}):
        with pytest.raises(ConfigError) as error:
            parse_config(settings)
        assert len(str(error.value)) < 1000
        assert str(error.value).isprintable()


# The list of all settings.


def test_the_list_names_every_setting_with_what_it_does():
    listed = {setting.path: setting for setting in all_settings()}
    assert set(leaves(ALIGNED.model_dump())) <= set(listed)
    assert {"adapter.penalty", "adapter.pool", "adapter.orthogonality"} <= set(listed)
    assert [path for path, setting in listed.items() if not setting.description] == []


COMMON, LOW_RANK = ("adapt_tasks", "features"), ("blocks", "targets", "merge", "first_merge")
"""Settings of every adapter that is trained, and of those that change weights."""


def test_the_list_of_one_adapter_or_classifier_has_its_settings_and_no_others():
    expected = {
        "olora": {f"adapter.{name}" for name in (*COMMON, *LOW_RANK, "rank", "penalty")},
        "l2p": {f"adapter.{name}" for name in (*COMMON, "pool", "length", "top", "pull", "prompt_lr", "key_lr")},
        "aligned": {
            f"classifier.{name}"
            for name in ("epochs", "steps", "lr", "weight_decay", "samples", "temperature", "drift", "views")
        },
        "qda": {"classifier.pooling", "classifier.shrinkage", "classifier.drift", "classifier.views"},
        "ncm": {"classifier.drift", "classifier.views"},
        "linear": {"classifier.name"},
    }
    assert {name: {setting.path for setting in all_settings(name)} for name in expected} == expected
    assert any(line.startswith("adapter.penalty") and "0 to 1e+06" in line for line in lines_of_settings("olora"))
    with pytest.raises(ConfigError, match=r"unknown adapter or classifier 'nix'; known: none, .*ncm"):
        all_settings("nix")


def test_a_root_in_somebody_s_home_is_found_there(monkeypatch):
    monkeypatch.setenv("HOME", "/home/you")
    assert override(RunConfig(), {"data.root": "~/stores"}).data.root == "/home/you/stores"
    with pytest.raises(ConfigError, match=r"data\.root: names nobody's home folder, got '~nobody-of-that-name/x'"):
        override(RunConfig(), {"data.root": "~nobody-of-that-name/x"})


# Names of the published methods, and names of before.


def test_every_published_method_is_a_run_that_is_known_by_its_name():
    for name in METHODS:
        assert method_of(override(RunConfig(), settings_of_method(name))) == name
    with pytest.raises(ConfigError, match=r"^unknown method 'ewc'; known: inflora, inflora-ca, sequential, "):
        settings_of_method("ewc")


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"adapter": "lora", "classifier": "ncm"}, "lora-ncm"),
        ({"adapter": "inflora", "data.joint": True}, "joint-inflora-linear"),
        ({"adapter": "inflora", "adapter.rank": 3}, "inflora"),
    ],
)
def test_another_pair_is_known_by_both_of_its_names(settings, name):
    assert method_of(override(RunConfig(), settings)) == name


OF_ADAPTERS = ["rank", "blocks", "targets", "energy", "energy_end", "total_tasks", "memory", "energy_of", "penalty"]
OF_ADAPTERS += ["pool", "length", "top", "pull", "general_blocks", "general_length", "expert_blocks", "expert_length"]
OF_ADAPTERS += ["components", "orthogonality"]
OLD_NAMES = {f"method.{name}": f"adapter.{name}" for name in OF_ADAPTERS} | {
    f"method.classifier_alignment.{name}": f"classifier.{name}"
    for name in ("epochs", "lr", "weight_decay", "samples", "temperature")
}
OLD_FILES = {
    "data.order": "replay.orders",
    "optim.head_init": "replay.heads",
    "method.classifier_alignment.draws": "replay.draws",
}
OLD_METHODS = {
    "inflora": "adapter=inflora classifier=linear",
    "sequential": "adapter=lora classifier=linear",
    "frozen": "adapter=none classifier=linear",
    "ncm": "adapter=none classifier=ncm",
    "joint": "adapter=lora classifier=linear data.joint=true",
    **{name: f"adapter={name} classifier=linear" for name in ("olora", "sdlora", "l2p", "dualprompt", "codaprompt")},
}


def nested(path: str, value: object) -> dict:
    """A setting as a config file has it."""
    for name in reversed(path.split(".")):
        value = {name: value}
    return value


def refusal_of(ask, *given) -> str:
    with pytest.raises(ConfigError) as error:
        ask(*given)
    (line,) = str(error.value).splitlines()
    return line


@pytest.mark.parametrize(("old", "new"), (OLD_NAMES | OLD_FILES).items())
def test_an_old_name_is_refused_with_the_new_one_which_is_a_setting(old, new):
    value = "file.safetensors" if old in OLD_FILES else 1
    lines = {refusal_of(parse_config, nested(old, value)), refusal_of(override, RunConfig(), {old: value})}
    aligned = " of classifier.name=aligned" if new.startswith("classifier.") else ""
    assert lines == {f"old names of settings: {old} is now {new}{aligned}"}
    assert new in {setting.path for setting in all_settings()}


@pytest.mark.parametrize(("old", "new"), OLD_METHODS.items())
def test_an_old_method_is_refused_with_the_settings_that_make_it(old, new):
    lines = {refusal_of(parse_config, {"method": written}) for written in (old, {"name": old})}
    lines |= {refusal_of(override, RunConfig(), {path: old}) for path in ("method", "method.name")}
    assert lines == {f"old names of settings: method{name} is now {new}" for name in ("", ".name")}
    assert isinstance(override(RunConfig(), parse_assignments(new.split())), RunConfig)


def test_a_whole_config_of_the_old_form_is_refused_in_one_line():
    alignment = dict.fromkeys(["epochs", "lr", "weight_decay", "samples", "temperature", "draws"]) | {"epochs": 5}
    method = {"name": "inflora", **dict.fromkeys(OF_ADAPTERS[:8]), "classifier_alignment": alignment}
    line = refusal_of(parse_config, {"data": {"tasks": 5, "order": "orders.safetensors"}, "method": method, "seed": 0})
    assert line.startswith("old names of settings: data.order is now replay.orders; method.name is now adapter=inflora")
    assert "adapter=inflora classifier=aligned" in line and line.endswith("; and 8 more")
    idle = refusal_of(parse_config, {"method": {"name": "inflora", "classifier_alignment": {"epochs": 0, "lr": 0.01}}})
    assert idle == "old names of settings: method.name is now adapter=inflora classifier=linear"


@pytest.mark.parametrize(("old", "new"), OLD_NAMES.items())
def test_a_sweep_over_an_old_name_is_refused_with_the_new_one(old, new):
    sweep = digits.inflora.model_copy(update={"space": {old: digits.rank}, "first": ()})
    assert f"{old} is now {new}" in refusal_of(sweep.extreme_configs)


# Plug-ins.

SETTINGS_OF_COSINE = """
from typing import ClassVar, Literal
from pydantic import Field
from inflora.config import Alternative

class CosineSettings(Alternative):
    '''Cosines of features and weights.'''
    name: Literal["cosine"] = "cosine"
    built_by: ClassVar = "cosine:Cosine"
    scale: float = Field(default=16.0, ge=1, le=100, description="what the cosines are multiplied by")
"""
COSINE = """
import torch
from torch.nn.functional import cosine_similarity, cross_entropy
from inflora.classifiers.linear import LinearHeads

class Cosine(LinearHeads):
    def forward(self, features_BD):
        return self.settings.scale * cosine_similarity(features_BD[:, None], self.joined()[0][None], dim=2)

    def loss(self, features_BD, labels_B, task):
        return cross_entropy(self(features_BD)[:, task.first_label :], labels_B - task.first_label)

    def as_linear(self):
        return None
"""


def installed(folder: Path, group: str, point: str, **modules: str) -> None:
    """Lay out a package with an entry point as an installer would."""
    about = folder / "theirs-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(f"[{group}]\n{point}\n")
    for name, content in modules.items():
        (folder / f"{name}.py").write_text(content)


def python(folder: Path, script: str) -> subprocess.CompletedProcess[str]:
    """A script run where what lies in ``folder`` is installed."""
    path = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    command, environment = [sys.executable, "-c", script], os.environ | {"PYTHONPATH": path}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def inflora(*arguments: str) -> str:
    """The command, as a line of a script."""
    return f"from inflora.cli import app; app({list(arguments)})"


@pytest.mark.e2e
def test_another_packages_classifier_is_listed_chosen_trained_and_loaded_like_our_own(tiny, digits, tmp_path):
    point = "cosine = cosine_settings:CosineSettings"
    installed(tmp_path, "inflora.classifiers", point, cosine_settings=SETTINGS_OF_COSINE, cosine=COSINE)
    listed = python(tmp_path, inflora("settings", "cosine"))
    assert (listed.returncode, listed.stderr) == (0, "")
    assert re.search(r"^classifier\.scale +16\.0 +number from 1 to 100; what the cosines", listed.stdout, re.MULTILINE)
    (tmp_path / "run.yaml").write_text(dump_config(override(tiny, {"data.tasks": 2})))
    refused = python(tmp_path, inflora("train", "run.yaml", "classifier=cosine", "classifier.scale=0"))
    assert refused.stderr == "error: classifier.scale: must be greater than or equal to 1, got 0\n"
    train = inflora("train", "run.yaml", "classifier=cosine", "classifier.scale=8", "--out", "run")
    ask = "import inflora, torch; print(inflora.load('run')(torch.ones(1, 1, 32, 32)).abs().max().item())"
    trained = python(tmp_path, f"try: {train}\nfinally: {ask}")  # the command exits
    assert (trained.returncode, trained.stderr) == (0, ""), trained.stdout
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["classifier"] == {
        "name": "cosine",
        "scale": 8,
    }
    assert 0 < float(trained.stdout.splitlines()[-1]) <= 8


UNUSABLE = {
    "theirs:Missing": "",
    "nowhere:Settings": "",
    "theirs:Number": "Number = 5",
    "theirs:Nameless": "class Nameless(Alternative): name: str = 'nameless'",
    "theirs:Taken": "class Taken(Alternative): name: Literal['inflora'] = 'inflora'",
}


@pytest.mark.parametrize("value", UNUSABLE)
def test_a_plug_in_that_cannot_be_used_stops_no_other_run(value, tmp_path):
    imports = "from typing import Literal; from inflora.config import Alternative\n"
    installed(tmp_path, "inflora.adapters", f"theirs = {value}", theirs=imports + UNUSABLE[value])
    listed = python(tmp_path, inflora("settings", "inflora"))
    assert (listed.returncode, "adapter.energy_of" in listed.stdout) == (0, True), listed.stderr
    assert f"inflora.adapters theirs ({value}) cannot be used: " in listed.stderr
