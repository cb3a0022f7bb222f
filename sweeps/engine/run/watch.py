"""Watches over a sweep's machines and trials while Tune runs them, between Tune's steps."""

import contextlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import grpc
import ray

from inflora.config import ConfigError
from inflora.errors import one_line
from inflora.storage import SharedFolder
from sweeps.engine.ledger.bill import Machine
from sweeps.engine.ledger.failures import alike
from sweeps.engine.ledger.ledger import Ledger
from sweeps.engine.ledger.records import TrialRecord, Waiting, now_ms, sick_nodes
from sweeps.engine.run.actors import remove_groups_of_dead_actors, waiting_for_room, waiting_groups
from sweeps.engine.run.cluster import DRIVER, has_drivers, may_grow
from sweeps.engine.run.machines import priced_machines
from sweeps.engine.run.nodes import Answer, Likeness, ask, new_mark, other_nodes, problem_of
from sweeps.engine.run.waiting import autoscaler_problem, needs_of
from sweeps.engine.show.progress import Callback

WAITS_AFTER_S = 10.0
"""A trial that has so long no room waits for a machine, and not for another trial to hand its own on."""
ASK_AGAIN_S = 60.0
"""The time after which a machine that is left out is asked again, and after which no answer is expected any more."""
SILENT_TASKS, SILENT_S, SILENT_FIRST_S = 10, 900.0, 3600.0
"""The longest silence of a trial: so many times the longest task so far, but at least so long; so long before any."""


class Watch(Callback):
    """Looks now and then, however often Tune steps."""

    every_s = 5.0
    _next_look = 0.0

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        if time.monotonic() >= self._next_look:
            self._next_look = time.monotonic() + self.every_s
            # The cluster's head is busy: another time. What a callback raises would end Tune.
            with contextlib.suppress(grpc.RpcError, ray.exceptions.RayError):
                self.look(trials)

    def look(self, trials: Sequence[Any]) -> None:
        """Look at Tune's ``trials``, or at what they run on; wait for nothing."""
        raise NotImplementedError


class StrandedError(RuntimeError):
    """A trial waits for a machine that will not come: Tune has placed it once and for all, and has to begin anew."""


class _Question(NamedTuple):
    """What a machine has been asked: the file that it must see, and when."""

    answer: Answer
    mark: str
    since: float


class NodeWatch(Watch):
    """Asks every machine, also one that comes later, whether it can run trials; knows which are left out.

    One that is left out is asked again: its shared folder may be mounted later than Ray starts.
    """

    def __init__(self, ledger: Ledger, place: SharedFolder, likeness: Likeness, say: Callable[[str], None]) -> None:
        self.ledger, self.place, self.likeness, self.say = ledger, place, likeness, say
        self._refused: dict[str, str] = {}
        self._ask_at: dict[str, float] = {}
        self._open: dict[str, _Question] = {}
        self._marks: set[str] = set()
        self._said: set[str] = set()

    def look(self, trials: Sequence[Any]) -> None:
        """Ask the machines that are new or left out, and hear those that have answered; none is waited for."""
        nodes, now = other_nodes(), time.monotonic()
        with contextlib.suppress(OSError):  # the shared place is away: another time
            self._ask(nodes, now)
            self._hear(nodes)
            self._delete_marks(now)
        for node_id, reason in self._left_out().items():
            if node_id in nodes and node_id not in self._said:
                self._said.add(node_id)
                self.say(f"node {nodes[node_id]} is left out: {one_line(reason, 400)}")
        self._require_room(trials)

    def _ask(self, nodes: Mapping[str, str], now: float) -> None:
        due = [node_id for node_id in nodes if node_id not in self._open and now >= self._ask_at.get(node_id, now)]
        if due:
            mark = new_mark(self.place)
            self._marks.add(mark)
            for node_id in due:
                self._open[node_id] = _Question(ask(node_id, self.place.address, mark, self.likeness), mark, now)

    def _hear(self, nodes: Mapping[str, str]) -> None:
        for node_id, question in list(self._open.items()):
            if not ray.wait([question.answer], timeout=0)[0]:
                continue
            del self._open[node_id]
            problem = problem_of(node_id, question.answer, 1.0)
            self._ask_at[node_id] = question.since + ASK_AGAIN_S if problem else math.inf
            if problem:
                self._refused[node_id] = problem
            elif self._refused.pop(node_id, ""):
                self._said.discard(node_id)
                self.say(f"node {nodes.get(node_id, node_id)} is left out no more")

    def _delete_marks(self, now: float) -> None:
        """Delete the files that no machine looks for, or for so long that it may never answer."""
        wanted = {question.mark for question in self._open.values() if now - question.since < ASK_AGAIN_S}
        for mark in self._marks - wanted:
            with contextlib.suppress(FileNotFoundError):
                self.place.delete(mark)
            self._marks.remove(mark)

    def _left_out(self) -> dict[str, str]:
        return sick_nodes(self.ledger.records()) | self._refused

    def to_avoid(self, record: TrialRecord) -> set[str]:
        """The IDs of the nodes on which a trial must not be placed; none where nothing else is, or will be, there."""
        avoided, alive = self._left_out().keys() | record.failed_on, self._alive()
        return set(avoided & alive) if alive - avoided or may_grow() else set()

    def _alive(self) -> set[str]:
        by = DRIVER if self.ledger.sweep.executor == "train" and has_drivers() else "CPU"
        return {node["NodeID"] for node in ray.nodes() if node["Alive"] and node["Resources"].get(by)}

    def _require_room(self, trials: Sequence[Any]) -> None:
        """Raise StrandedError if nothing runs, and a trial waits to be placed elsewhere than on all machines left."""
        waiting = [trial for trial in trials if trial.status == "PENDING" and trial.config.get("avoid")]
        if not waiting or any(trial.status == "RUNNING" for trial in trials) or may_grow():
            return
        alive = self._alive()
        stranded = [trial.config["number"] for trial in waiting if alive and alive <= set(trial.config["avoid"])]
        if stranded:
            raise StrandedError(f"trial {stranded[0]} waits for a machine other than those that are left")


class Watchdog(Watch):
    """Frees what dead trials hold, and starts a trial again that is silent for much longer than a task takes.

    A trial tells of its tasks, and of the epochs of long ones.
    """

    every_s = 1.0  # what a stopped trial holds, the next one waits for

    def __init__(self, ledger: Ledger, say: Callable[[str], None]) -> None:
        self.ledger, self.say = ledger, say
        self._heard: dict[str, float] = {}

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict, **info: Any) -> None:
        self._heard[trial.trial_id] = time.monotonic()

    def look(self, trials: Sequence[Any]) -> None:
        """Remove what dead trials have asked for, and wake those that are silent."""
        remove_groups_of_dead_actors()
        self._wake([trial for trial in trials if trial.status == "RUNNING"])

    def _wake(self, running: Sequence[Any]) -> None:
        now = time.monotonic()
        actors = {trial.trial_id: trial.temporary_state.ray_actor for trial in running}
        waiting = waiting_for_room([actor for actor in actors.values() if actor is not None])
        # One that waits for room has nothing to say, and all its time yet when it has got it.
        self._heard = {key: now if actor in waiting else self._heard.get(key, now) for key, actor in actors.items()}
        patience = longest_silence(self.ledger.records())
        for trial in running:
            if now - self._heard[trial.trial_id] <= patience:
                continue
            self._heard[trial.trial_id] = now
            number, minutes = trial.config["number"], patience / 60
            self.say(f"trial {number:3d} has said nothing for {minutes:.0f} minutes and is started again")
            if (actor := actors[trial.trial_id]) is not None:
                ray.kill(actor)


class WaitWatch(Watch):
    """Says for what trials wait: when they begin to, when it is for another reason, and when none does any more."""

    def __init__(self, ledger: Ledger, say: Callable[[str], None]) -> None:
        self.ledger, self.say = ledger, say
        self._since: dict[bytes, int] = {}

    def look(self, trials: Sequence[Any]) -> None:
        """Note which groups have waited for long, and what the autoscaler says."""
        groups = waiting_groups()
        now = now_ms()
        self._since = {each.placement_group_id: self._since.get(each.placement_group_id, now) for each in groups}
        late = [each for each in groups if now - self._since[each.placement_group_id] >= 1000 * WAITS_AFTER_S]
        if not late:
            self._tell(None)
            return
        since = min(self._since[each.placement_group_id] for each in late)
        self._tell(Waiting(len(late), needs_of(late), since, autoscaler_problem()))

    def _tell(self, now: Waiting | None) -> None:
        before = self.ledger.waiting
        self.ledger.note_waiting(now)
        if now is None and before is not None:
            self.say("no trial waits for room any more")
        elif now is not None and not (before and before.needs == now.needs and alike([before.problem, now.problem])):
            self.say(one_line(now.line, 500))


class CostWatch(Watch):
    """Writes down what the machines cost that declare a price, as long as trials run."""

    def __init__(self, ledger: Ledger, say: Callable[[str], None]) -> None:
        self.ledger, self.say = ledger, say
        self._looked = time.monotonic()
        self._problem = ""

    def look(self, trials: Sequence[Any]) -> None:
        """Add what the time since the last look has cost, at the prices of now."""
        machines = self._machines()
        now = time.monotonic()
        self.ledger.spend((now - self._looked) / 3600, machines)
        self._looked = now

    def _machines(self) -> list[Machine]:
        """None where one declares what is no price, which is said once."""
        try:
            return priced_machines(self.ledger.sweep.resources)
        except ConfigError as error:
            if self._problem != str(error):
                self._problem = str(error)
                self.say(f"costs are not counted: {error}")
            return []


def longest_silence(records: Sequence[TrialRecord]) -> float:
    """The seconds after which a trial that says nothing has stopped working."""
    longest = max((report.seconds for record in records for report in record.reports), default=None)
    return SILENT_FIRST_S if longest is None else max(SILENT_S, SILENT_TASKS * longest)
