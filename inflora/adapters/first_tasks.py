"""Adapting during the first tasks only, as in first-session adaptation (APER, arXiv 2303.07338; RanPAC)."""

from collections.abc import Collection, Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from inflora.adapters.base import Adapter
from inflora.layout import Layout
from inflora.model import ContinualModel
from inflora.task_data import TaskData


class FirstTasks(Adapter[Any]):
    """Another adapter during the first ``tasks``; what it has learnt stays as it is from then on."""

    def __init__(self, adapter: Adapter[Any], tasks: int) -> None:
        super().__init__(adapter.settings)
        self.adapter, self.tasks, self._now = adapter, tasks, False
        self.passes = adapter.passes

    def adapts(self, task: int) -> bool:
        return task < self.tasks and self.adapter.adapts(task)

    def prepare(self, model: ContinualModel) -> None:
        self.adapter.prepare(model)

    def begin_task(self, model: ContinualModel, data: TaskData) -> None:
        self._now = data.task.index < self.tasks
        if self._now:
            self.adapter.begin_task(model, data)
        else:
            for parameter in self.adapter.task_parameters(model):
                parameter.requires_grad_(False)

    def task_parameters(self, model: ContinualModel) -> list[nn.Parameter]:
        return self.adapter.task_parameters(model) if self._now else []

    def own_rates(self, model: ContinualModel) -> dict[nn.Parameter, float]:
        return self.adapter.own_rates(model) if self._now else {}

    def penalties(self, model: ContinualModel) -> Iterable[Tensor]:
        return self.adapter.penalties(model) if self._now else ()

    def end_task(self, model: ContinualModel, data: TaskData) -> dict[str, Tensor]:
        return self.adapter.end_task(model, data) if self._now else {}

    def diagnostics(self) -> dict[str, float]:
        return self.adapter.diagnostics() if self._now else {}

    def state(self) -> dict[str, Tensor]:
        return self.adapter.state()

    def load_state(self, state: dict[str, Tensor]) -> None:
        self.adapter.load_state(state)

    def model_layout(self, model: ContinualModel, sizes: Sequence[int]) -> Layout:
        return self.adapter.model_layout(model, sizes[: self.tasks])

    def state_layout(self, model: ContinualModel, sizes: Sequence[int], names: Collection[str]) -> Layout:
        return self.adapter.state_layout(model, sizes[: self.tasks], names)
