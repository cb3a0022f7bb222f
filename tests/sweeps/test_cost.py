"""The price of a sweep's machines: what they declare, what it is split into, and that nothing of it is forgotten."""

import math
from pathlib import Path

import pytest
import ray
import yaml
from hypothesis import given
from hypothesis import strategies as st
from ray._private.label_utils import validate_node_label_syntax

from inflora.config import ConfigError
from sweeps.engine.ledger.bill import Bill, Machine, bill_from, price_of, share
from sweeps.engine.ledger.ledger import Ledger
from sweeps.engine.ledger.study import load_study
from sweeps.engine.run import watch
from sweeps.engine.run.cluster import Cluster
from sweeps.engine.run.dry_run import Forecast, dry_run, expected_cost
from sweeps.engine.run.machines import Rate, rate, taken
from sweeps.engine.run.runner import run_sweep
from sweeps.engine.run.watch import CostWatch
from sweeps.engine.show.status import status_lines, study_lines
from sweeps.engine.space.spec import Resources

from .conftest import learn_all, report, sqlite

CLUSTER = Path(__file__).parents[2] / "cluster"
HEAD, FULL, HALF, EMPTY = Machine(0.5, 0.0), Machine(1.5, 1.0), Machine(1.5, 0.5), Machine(1.5, 0.0)


def test_what_trials_take_is_theirs_in_equal_parts_and_the_rest_is_idle():
    bill = Bill().after(2.0, [HEAD, FULL, HALF, EMPTY], at_work={3, 7})
    assert bill.unfinished == {3: 2.25, 7: 2.25}
    assert bill.idle == 2 * (0.5 + 0.75 + 1.5)
    assert (bill.training, bill.lost) == (0, 0)


def test_a_report_pays_for_training_and_a_lost_try_is_lost():
    bill = Bill(unfinished={3: 1.0, 7: 2.0}).paid(3).wasted(7)
    assert bill == Bill(training=1.0, lost=2.0)
    assert bill.paid(3).wasted(7) == bill, "nothing is counted twice"


def test_machines_that_are_taken_while_no_trial_is_at_work_are_idle():
    assert Bill().after(1.0, [FULL], at_work=()) == Bill(idle=1.5)


STEP = st.one_of(
    st.tuples(st.just("time"), st.floats(0, 10), st.sets(st.integers(0, 3))),
    st.tuples(st.sampled_from(["paid", "wasted"]), st.integers(0, 3)),
    st.tuples(st.just("interrupted")),
)


@given(st.lists(STEP))
def test_every_hour_of_every_machine_is_counted_once_whatever_happens(steps):
    bill, expected = Bill(), 0.0
    for name, *rest in steps:
        if name == "time":
            bill = bill.after(rest[0], [HEAD, HALF, FULL], rest[1])
            expected += rest[0] * (0.5 + 1.5 + 1.5)
        else:
            bill = getattr(bill, name)(*rest)
    assert math.isclose(bill.total, expected, abs_tol=1e-9)
    assert bill_from(bill.kept()) == bill


def test_where_nothing_has_a_price_nothing_is_said(tiny_sweep):
    assert Bill().line == ""
    assert not any("cost" in line for line in status_lines(tiny_sweep, [], None, 1.0, 0, bill=Bill()))
    assert Bill(5.0, 0.5, 2.0, {1: 1.0}).line == "cost 8.50: 6.00 training, 0.50 lost, 2.00 idle"


@pytest.mark.parametrize(("text", "price"), [("1.21", 1.21), ("0", 0.0), ("4", 4.0)])
def test_a_machine_declares_its_price_by_a_label(text, price):
    assert price_of({"price-per-hour": text, "ray.io/node-id": "ab"}) == price
    assert price_of({}) == 0.0


@pytest.mark.parametrize("text", ["", "cheap", "-1", "nan", "inf", "1e9"])
def test_a_label_that_is_no_price_is_refused_in_one_line(text):
    with pytest.raises(ConfigError, match=r"^label price-per-hour must be a number from 0 to 1e\+06, got "):
        price_of({"price-per-hour": text})


def test_a_share_is_one_of_what_is_there():
    assert [share(*each) for each in [(1, 4), (4, 4), (8, 4), (1, 0), (-1e-9, 4)]] == [0.25, 1, 1, 0, 0]


def node(name, price, **resources):
    labels = {} if price is None else {"price-per-hour": str(price)}
    return {"NodeID": name, "Alive": True, "Labels": labels, "Resources": resources}


def test_of_a_machine_with_gpus_these_are_what_is_taken():
    one = node("a", 1.2, CPU=8.0, GPU=4.0)
    assert taken("GPU", one, {"CPU": 0.0, "GPU": 3.0}) == 0.25
    assert taken("CPU", one, {"CPU": 2.0}) == 0.75
    assert taken("GPU", one, {"CPU": 8.0}) == 1.0, "what is all taken Ray leaves out"
    assert taken("GPU", node("head", 0.4, CPU=8.0), {"CPU": 1.0}) == 0.0


def test_what_is_expected_is_the_trials_share_and_the_machines_beside_them():
    nodes = [node("head", 0.4), node("gone", 9.0, GPU=1.0) | {"Alive": False}, node("gpu", 1.2, CPU=8.0, GPU=2.0)]
    prices = rate(Resources(workers=2, gpus_per_worker=1), nodes, "gpu")
    assert prices == pytest.approx(Rate(trial=1.2, others=0.4))
    assert expected_cost(Forecast(trial_s=1800, hours=5, gpu_hours=0), 10, prices) == pytest.approx(10 * 0.6 + 5 * 0.4)
    assert rate(Resources(), [node("a", None, CPU=4.0)], "a") == Rate(0.0, 0.0)


@pytest.fixture
def ledger(tiny_sweep, tmp_path) -> Ledger:
    return Ledger(tiny_sweep.model_copy(update={"early_stopping": "none", "trials": 9}), tmp_path)


def at_work(ledger):
    number = ledger.propose().number
    ledger.note_log(number, "192.0.2.1:/log")
    return number


def test_a_task_that_is_reported_is_training_and_one_that_is_learnt_twice_or_never_told_is_lost(ledger):
    number = at_work(ledger)
    ledger.spend(1.0, [FULL])
    ledger.report(number, report(1, 0.9))
    assert ledger.bill == Bill(training=1.5)
    ledger.spend(1.0, [FULL])
    ledger.report(number, report(1, 0.9))
    assert ledger.bill == Bill(training=1.5, lost=1.5)
    ledger.spend(1.0, [FULL])
    ledger.fail(number, "ActorDiedError: gone")
    assert ledger.bill == Bill(training=1.5, lost=3.0)
    ledger.spend(1.0, [FULL])
    assert ledger.bill == Bill(training=1.5, lost=3.0, idle=1.5), "it is not at work before its log is"


def test_a_worker_that_begins_anew_within_a_try_has_lost_what_the_one_before_had_not_told(ledger):
    number = at_work(ledger)
    ledger.spend(1.0, [FULL])
    ledger.note_log(number, "192.0.2.2:/log")
    ledger.spend(1.0, [FULL])
    ledger.report(number, report(1, 0.9))
    assert ledger.bill == Bill(training=1.5, lost=1.5)


def test_the_cost_goes_on_over_starts_and_what_a_killed_driver_left_unfinished_is_lost(ledger, tmp_path, monkeypatch):
    monkeypatch.setattr("sweeps.engine.ledger.ledger._WRITE_HOURS_EVERY", 0.0)
    first, second = at_work(ledger), at_work(ledger)
    ledger.spend(1.0, [FULL, FULL, HEAD])
    ledger.report(first, report(1, 0.9))
    ledger.spend(1.0, [FULL, FULL, HEAD])
    again = Ledger(ledger.sweep, tmp_path)
    assert again.bill == Bill(training=1.5, lost=4.5, idle=1.0)
    assert {again.propose().number, again.propose().number} == {first, second}
    again.spend(1.0, [FULL])
    assert again.bill.idle == 2.5


def test_who_reads_the_study_is_told_the_cost(ledger, tmp_path):
    number = at_work(ledger)
    ledger.spend(1.0, [FULL, HEAD])
    learn_all(ledger, number, [0.9] * 5)
    lines = study_lines(ledger.sweep, load_study(ledger.sweep, tmp_path), ledger.records(), None, driven=False)
    assert "cost 2.00: 1.50 training, 0.00 lost, 0.50 idle" in lines


@pytest.mark.parametrize("damage", [{"idle": -1.0}, {"lost": math.nan}, {"unfinished": {"x": 1.0}}, {"gold": 1.0}, "x"])
def test_a_bill_that_no_driver_has_written_is_refused(ledger, tmp_path, damage):
    ledger.study.set_user_attr("bill", damage)
    with pytest.raises(ConfigError, match="cannot read the study"):
        load_study(ledger.sweep, tmp_path)


def test_a_label_that_is_no_price_is_said_once_and_stops_no_trial(ledger, monkeypatch):
    def refuse(resources):
        raise ConfigError("label price-per-hour must be a number, got 'cheap'")

    monkeypatch.setattr(watch, "priced_machines", refuse)
    said = []
    watched = CostWatch(ledger, said.append)
    for _ in range(3):
        watched.look([])
    assert said == ["costs are not counted: label price-per-hour must be a number, got 'cheap'"]
    assert ledger.bill == Bill()


@pytest.mark.cluster
def test_a_cluster_whose_machines_have_prices_is_told_what_it_will_cost_and_what_it_has(
    nodes, tiny_sweep, tmp_path, monkeypatch
):
    monkeypatch.setattr(watch.Watch, "every_s", 0.2)
    address = nodes(1, {"num_cpus": 2, "labels": {"price-per-hour": "3600"}})
    sweep = tiny_sweep.model_copy(update={"trials": 2, "executor": "inline", "early_stopping": "none"})
    said = []
    dry_run(sweep, tmp_path / "dry", sqlite(tmp_path), cluster=Cluster(address), say=said.append)
    assert any(line.startswith("estimate: a cost of ") for line in said)
    ray.init(address=address, log_to_driver=False)
    run_sweep(sweep, tmp_path / "sweep", sqlite(tmp_path), cluster=Cluster(address), say=print)
    study = load_study(sweep, tmp_path / "sweep")
    (line,) = (each for each in study_lines(sweep, study, [], None, driven=False) if each.startswith("cost "))
    bill = bill_from(study.user_attrs["bill"]["value"])
    assert bill.training > 0 and bill.idle > 0
    # One of two CPUs is taken: at least half of the price is for idling.
    assert bill.training + bill.lost <= bill.idle + 1e-9, line


def test_every_kind_of_machine_of_the_cluster_on_aws_declares_its_price():
    kinds = yaml.safe_load((CLUSTER / "gpu.yaml").read_text())["available_node_types"]
    assert all(price_of(kind["labels"]) > 0 for kind in kinds.values())
    for kind in kinds.values():
        validate_node_label_syntax(kind["labels"])
