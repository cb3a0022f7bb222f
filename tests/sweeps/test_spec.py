"""A sweep says what is searched in the names and on the scales that everything else uses."""

import math

import optuna
import pytest
from pydantic import ValidationError

from inflora.config import ConfigError
from sweeps.engine.ledger.ledger import Ledger
from sweeps.engine.ledger.study import load_study
from sweeps.engine.space.domains import Choice, Integer, NearOne, Real
from sweeps.engine.space.spec import Resources, Sweep

from .conftest import PAPER


def test_near_one_spends_its_resolution_near_one():
    domain = NearOne(low=0.9, high=0.999)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    scale = domain.transformed()
    drawn = [domain.inverse_transform(scale.suggest(study.ask(), "adapter.energy")) for _ in range(300)]
    assert all(0.9 <= value <= 0.999 for value in drawn)
    above_099 = sum(value > 0.99 for value in drawn) / len(drawn)
    assert 0.4 < above_099 < 0.6  # half of the log range, a tenth of the plain one


def test_the_study_has_the_settings_own_names_and_values(tiny_sweep, tmp_path):
    ledger = Ledger(tiny_sweep, tmp_path)
    proposals = [ledger.propose() for _ in range(3)]
    assert proposals[0].settings == PAPER
    assert [trial.params for trial in load_study(tiny_sweep, tmp_path).trials] == [each.settings for each in proposals]


def test_a_choice_is_one_of_its_options():
    domain = Choice(options=("gpm", "dualgpm"))
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    assert {domain.suggest(study.ask(), "adapter.memory") for _ in range(20)} == {"gpm", "dualgpm"}


@pytest.mark.parametrize(
    "change",
    [
        {"base": {"data": {"order_seed": 1993}}},
        {"base": {"seed": 1}},
        {"space": {"optim.lr": Real(low=1e-4, high=1e-2)}},
    ],
    ids=["another class order", "another seed", "another space"],
)
def test_whatever_changes_what_numbers_mean_gets_a_study_of_its_own(tiny_sweep, change):
    settings = tiny_sweep.model_dump() | {"first": ()}
    if "base" in change:
        changed = settings["base"] | {
            k: (settings["base"][k] | v if isinstance(v, dict) else v) for k, v in change["base"].items()
        }
        other = Sweep.model_validate(settings | {"base": changed})
    else:
        other = Sweep.model_validate(settings | change)
    assert other.study_name != tiny_sweep.study_name


def test_more_trials_and_another_executor_go_on_with_the_same_study(tiny_sweep):
    other = tiny_sweep.model_copy(update={"trials": 99, "executor": "inline"})
    assert other.study_name == tiny_sweep.study_name


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"first": ({"adapter.rank": 4},)}, "each of first must set exactly"),
        ({"executor": "inline", "resources": Resources(workers=2)}, "inline runs one worker"),
        ({"name": "../elsewhere"}, "name"),
        ({"space": {}}, "space"),
        ({"trails": 3}, "trails"),
        ({"objective": "acc/fnal"}, "objective"),
        ({"resources": {"workers": 2, "gpus_per_worker": 0.5}}, "a fraction of a GPU is for one worker"),
    ],
)
def test_a_sweep_that_cannot_run_is_refused_when_it_is_written(tiny_sweep, change, rule):
    with pytest.raises(ValidationError, match=rule):
        Sweep.model_validate(tiny_sweep.model_dump() | change)


@pytest.mark.parametrize(
    ("space", "rule"),
    [
        ({"adapter.rnk": Integer(low=1, high=2)}, "unknown setting adapter.rnk; known here: name, .*rank"),
        ({"adapter.energy": Real(low=0.5, high=1.5)}, "adapter.energy.*1.5"),
        ({"optim.lr": Real(low=1e-2, high=1e-4)}, "low must not exceed high"),
        ({"optim.weight_decay": Real(low=0, high=1, log=True)}, "the space cannot be sampled"),
        (
            {"data.train_on": Choice(options=("train", "train+validation"))},
            "are searched, data and seeds are fixed",
        ),
        ({"seed": Integer(low=0, high=9)}, "are searched, data and seeds are fixed"),
    ],
)
def test_a_space_with_settings_no_run_accepts_is_refused_before_any_trial(tiny_sweep, space, rule):
    sweep = Sweep.model_validate(tiny_sweep.model_dump() | {"space": space, "first": ()})
    with pytest.raises(ConfigError, match=rule):
        sweep.extreme_configs()


def test_a_first_trial_outside_its_space_is_refused(tiny_sweep):
    first = (PAPER | {"adapter.rank": 999},)
    with pytest.raises(ConfigError, match=r"first adapter\.rank=999 is outside its space"):
        Sweep.model_validate(tiny_sweep.model_dump() | {"first": first}).extreme_configs()


def test_a_trial_has_no_harder_settings_than_the_corners_that_are_checked_before(tiny_sweep):
    ranks = {config.adapter.rank for config in tiny_sweep.extreme_configs()}
    assert {1, 16, PAPER["adapter.rank"]} <= ranks


def test_trials_cannot_be_told_to_train_on_what_they_are_judged_by(tiny_sweep):
    base = tiny_sweep.base.model_dump()
    base["data"]["train_on"] = "train+validation"
    with pytest.raises(ValidationError, match="train_on must be train"):
        Sweep.model_validate(tiny_sweep.model_dump() | {"base": base})


def test_a_sweep_survives_json(tiny_sweep):
    assert Sweep.model_validate_json(tiny_sweep.model_dump_json()) == tiny_sweep
    assert math.isclose(tiny_sweep.space["adapter.energy"].high, 0.999)
