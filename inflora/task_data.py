"""One task's training images, as adapters and classifiers read them."""

from collections.abc import Iterator
from typing import NamedTuple

from inflora.config import OptimSettings
from inflora.data.loader import Batch, InputFormat, evaluation_batches, training_batches
from inflora.data.store import Images
from inflora.data.stream import Task
from inflora.draws import Draws


class TaskData(NamedTuple):
    """A task, its place in the stream, and passes over its training images in batches of the model's input."""

    task: Task
    total_tasks: int
    images: Images
    input_format: InputFormat
    optim: OptimSettings
    draws: Draws

    def augmented(self, purpose: str) -> Iterator[Batch]:
        """One shuffled, augmented pass; the same purpose gives the same pass, on any number of workers."""
        generator = self.draws.generator(self.task.index, purpose)
        rows = self.draws.order(self.task, purpose, generator)
        return training_batches(self.images, rows, self.input_format, self.optim.batch_size, generator)

    def view(self, number: int) -> Iterator[Batch]:
        """One augmented pass in stored order; the same number gives the same crops, on any number of workers."""
        generator = self.draws.generator(self.task.index, "view", number)
        return training_batches(self.images, self.task.train_rows, self.input_format, self.optim.batch_size, generator)

    def plain(self) -> Iterator[Batch]:
        """One pass in stored order, seen as evaluation images are."""
        return evaluation_batches(self.images, self.task.train_rows, self.input_format, self.optim.batch_size)
