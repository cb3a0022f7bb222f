"""Forward transfer, where there is such a thing: domains arrive, and the next one shows classes that are known."""

from collections.abc import Mapping, Sequence

from inflora.data.loader import InputFormat
from inflora.data.stream import Stream
from inflora.metrics import forward_transfer
from inflora.model import ContinualModel
from inflora.training import evaluate


def transfer(
    model: ContinualModel,
    stream: Stream,
    tasks_done: int,
    input_format: InputFormat,
    before: Sequence[Mapping[str, float]],
) -> dict[str, float]:
    """``acc/ahead``: the accuracy on the next task's evaluation images, not learnt yet; ``fwt`` after the last task.

    ``before`` is what was known after each earlier task. Nothing where classes arrive, no output of which means a class
    before it is learnt, and where no domain has evaluation images of its own.
    """
    classes = len(set(stream.class_of.tolist()))
    if len(stream.class_of) == classes or stream.shared_test:
        return {}
    if tasks_done < len(stream.tasks):
        ((ahead),) = evaluate(model, stream, [stream.tasks[tasks_done]], input_format)
        return {"acc/ahead": ahead.correct / ahead.images}
    known = [numbers["acc/ahead"] for numbers in before if "acc/ahead" in numbers]
    return {"fwt": forward_transfer(known, classes)} if len(known) == len(before) else {}
