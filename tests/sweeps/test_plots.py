"""Pictures of a run show what its metrics say."""

import pytest

from inflora.config import override
from inflora.continual import run
from sweeps.engine.show import plots


def metrics_of(config) -> list[dict[str, float]]:
    return [result.metrics for result in run(config)]


@pytest.fixture(scope="module")
def metrics(tiny, digits):
    return metrics_of(tiny)


def test_the_memory_of_every_block_is_drawn_over_the_tasks(metrics):
    size, kept, overlap = plots.memory(metrics).axes
    for axes, kind in ((size, "size"), (kept, "kept"), (overlap, "overlap")):
        drawn = {line.get_label(): list(line.get_ydata()) for line in axes.lines}
        assert drawn == {b: [known[f"memory/{b}/{kind}"] for known in metrics] for b in ("block0", "block1")}


def test_the_drift_of_every_old_task_is_written_into_its_cell(metrics):
    axes = plots.drift(metrics).axes[0]
    written = {(text.get_position()[::-1]): text.get_text() for text in axes.texts}
    assert written == {(i, j): f"{100 * metrics[i][f'drift/task{j}']:.0f}" for i in range(5) for j in range(i)}


def test_what_a_run_does_not_have_is_not_drawn(tiny, digits):
    joint = metrics_of(override(tiny, {"data.joint": True, "adapter": "lora"}))
    assert plots.memory(joint) is None
    assert plots.drift(joint) is None
