"""A trial that sleeps: its process has to import next to nothing, so that a small machine holds hundreds of them."""

import json
import time
from collections.abc import Callable
from typing import Any


def sleeper(tasks: int, seconds: float) -> Callable[[dict[str, Any]], None]:
    """Sleeps through its tasks, and says after each how long its last report had waited for an answer."""

    def trial(settings: dict[str, Any]) -> None:
        from ray import tune

        answer_s = 0.0
        for done in range(1, tasks + 1):
            time.sleep(seconds)
            accuracy = max(0.0, 1.0 - 0.03 * done - abs(settings["config"]["optim"]["lr"] - 1e-3) * 5)
            metrics = dict.fromkeys(("acc/seen", "acc/seen_macro", "acc/new", "acc/task_aware"), accuracy)
            if done == tasks:
                metrics |= {"acc/final": accuracy, "acc/avg_incremental": accuracy, "forgetting": 0.1, "bwt": -0.1}
            report = {
                "tasks_done": done,
                "tasks": tasks,
                "metrics": metrics | {"answer_s": answer_s},
                "accuracies": [accuracy] * done,
                "seconds": seconds,
                "time_ms": int(time.time() * 1000),
            }
            start = time.perf_counter()
            tune.report({**metrics, "tasks_done": done, "report": json.dumps(report)})
            answer_s = time.perf_counter() - start

    return trial
