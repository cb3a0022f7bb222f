"""Names of streams as PyCIL and PILOT write them: ``B0-Inc10``, ``B50-Inc10``.

B: the classes of the first task, 0 where it has as many as every other; Inc: the classes of each further task.
"""

import re
from collections.abc import Sequence

from inflora.config.base import ConfigError

_NAME = re.compile(r"B([0-9]{1,5})-Inc([0-9]{1,5})", re.ASCII)


def is_stream_name(text: str) -> bool:
    """True of a name that some number of classes can have."""
    found = _NAME.fullmatch(text)
    return found is not None and int(found[2]) > 0


def sizes_named(name: str, classes: int, dataset: str) -> tuple[int, ...]:
    """The number of classes of every task of the stream ``name`` of so many ``classes``.

    Raises:
        ConfigError: The classes after the first task are no multiple of Inc. The field's tools put the rest into a
            last, smaller task without a word, so that two streams bear one name.
    """
    found = _NAME.fullmatch(name)
    assert found is not None
    first, increment = int(found[1]), int(found[2])
    left = classes - first
    if left < 0 or left % increment:
        divisors = ", ".join(str(n) for n in range(1, left + 1) if left % n == 0)
        fits = f"Inc must divide {left} ({divisors})" if left > 0 else f"B must be at most {classes}"
        raise ConfigError(
            f"data.tasks={name} does not divide the {classes} classes of {dataset}: {fits}; "
            "for a smaller last task list the numbers of classes"
        )
    return (*([first] if first else []), *[increment] * (left // increment))


def stream_name(sizes: Sequence[int]) -> str:
    """The name of a stream of tasks of these numbers of classes; the numbers themselves where it has none."""
    first, *others = sizes
    if len(set(others)) > 1:
        return ",".join(map(str, sizes))
    increment = others[0] if others else first
    return f"B{0 if first == increment else first}-Inc{increment}"
