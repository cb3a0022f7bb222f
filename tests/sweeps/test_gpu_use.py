"""How much of its GPU a trial uses, told with a card that is none: PyTorch finds no other here."""

import json
import sys
import threading
import time

import pytest
import torch

from inflora.config import override
from sweeps.engine.ledger.ledger import Ledger
from sweeps.engine.run.gpu_use import CudaGpu, GpuMeter, gpu_of
from sweeps.engine.run.trial import learn
from sweeps.engine.show.report import cost_figures
from tests.waiting import until

from .conftest import report
from .test_trial import MemorySession, settings_of, without_times


class Card:
    """A card of 24 GB that is as busy as it is told, and of which a task holds as much as it is told."""

    memory_gb = 24.0

    def __init__(self, busy=(), peaks_gb=()):
        self._busy, self._peaks = iter(busy), iter(peaks_gb)
        self.asked = 0

    def busy(self):
        self.asked += 1
        return next(self._busy, None)

    def take_peak_gb(self):
        return next(self._peaks)


def test_a_tasks_metrics_are_the_mean_of_its_samples_and_its_own_peak():
    card = Card([10.0, 50.0, 90.0], [6.0, 12.0])
    with GpuMeter(card, every_s=0.001) as meter:
        until(lambda: card.asked == 4)
        assert meter.take() == {"gpu/utilisation": 50.0, "gpu/memory_gb": 6.0, "gpu/memory_share": 0.25}
        assert meter.take() == {"gpu/memory_gb": 12.0, "gpu/memory_share": 0.5}, "the next task has no samples yet"


def test_where_nothing_tells_how_busy_a_card_is_it_is_asked_once_and_the_rest_is_told():
    card = Card(busy=[], peaks_gb=[6.0])
    with GpuMeter(card, every_s=0.001) as meter:
        until(lambda: card.asked)
        time.sleep(0.05)
        assert meter.take() == {"gpu/memory_gb": 6.0, "gpu/memory_share": 0.25}
    assert card.asked == 1


@pytest.mark.parametrize("error", [None, KeyboardInterrupt])
def test_nothing_looks_at_the_card_when_the_trial_has_ended(error):
    card, before = Card([1.0] * 10**6), set(threading.enumerate())
    try:
        with GpuMeter(card, every_s=0.001):
            (looks,) = set(threading.enumerate()) - before
            if error:
                raise error
    except KeyboardInterrupt:
        pass
    until(lambda: not looks.is_alive())


def test_without_the_library_that_tells_it_or_without_a_driver_a_card_is_as_busy_as_nobody_knows(monkeypatch):
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: type("P", (), {"total_memory": 2**30}))
    monkeypatch.setattr("torch.cuda._HAS_PYNVML", False)
    monkeypatch.setattr("torch.cuda._PYNVML_ERR", ImportError("No module named 'pynvml'"), raising=False)
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(ModuleNotFoundError):
        torch.cuda.utilization(torch.device("cuda", 0))
    assert CudaGpu(torch.device("cuda", 0)).busy() is None


def test_the_cpu_is_no_card_and_nothing_is_measured_on_it(tiny_sweep):
    assert gpu_of(torch.device("cpu")) is None
    before = set(threading.enumerate())
    with GpuMeter(None) as meter:
        assert (meter.take(), set(threading.enumerate()) - before) == ({}, set())


def test_every_report_of_a_task_learnt_here_tells_of_the_card_and_changes_nothing_else(tiny_sweep):
    config = override(tiny_sweep.base, {"data.tasks": 2})
    plain, measured = MemorySession(), MemorySession()
    learn(settings_of(config), plain)
    learn(settings_of(config), measured, Card([40.0] * 10**6, [1.0, 2.0]))
    assert [each.metrics["gpu/memory_gb"] for each in measured.reports] == [1.0, 2.0]
    assert not any(name.startswith("gpu/") for each in plain.reports for name in each.metrics)
    told = [without_times(each) for each in measured.reports]
    for each in told:
        each["metrics"] = {name: value for name, value in each["metrics"].items() if not name.startswith("gpu/")}
    assert told == [without_times(each) for each in plain.reports]
    resumed = MemorySession(plain.state)
    learn(settings_of(config, tasks_done=1), resumed, Card(peaks_gb=[]))
    assert len(resumed.reports) == 1, "of a task learnt by an earlier worker this one's card knows nothing"


def test_the_report_draws_the_use_of_the_card_where_it_is_known(tiny_sweep, tmp_path):
    ledger = Ledger(tiny_sweep, tmp_path)
    known, unknown = ledger.propose().number, ledger.propose().number
    for number, used in ((known, {"gpu/utilisation": 73.0, "gpu/memory_gb": 5.5}), (unknown, {})):
        told = report(1, 0.9)
        ledger.report(number, told.model_copy(update={"metrics": told.metrics | used}))
    figures = [json.loads(figure.to_json()) for figure in cost_figures(tiny_sweep, ledger.records())]
    drawn = {figure["layout"]["title"]["text"]: figure["data"] for figure in figures[1:]}
    assert [(name[:3], [line["name"] for line in lines]) for name, lines in drawn.items()] == [
        ("GPU", [f"trial {known}"]),
        ("GPU", [f"trial {known}"]),
    ]
    assert not list(cost_figures(tiny_sweep, [ledger.record_of(unknown)]))[1:]
