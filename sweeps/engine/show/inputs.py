"""The images of a run, as MLflow lists a run's datasets: which, how many, in how many tasks."""

import hashlib
import json
from typing import TYPE_CHECKING, Literal

from mlflow.entities import Dataset, DatasetInput, InputTag
from pydantic import BaseModel, ConfigDict

from inflora.config import RunConfig
from inflora.errors import without_password

if TYPE_CHECKING:  # torch comes with it, which the process that talks to MLflow does without
    from inflora.data.stream import Stream

_COLUMNS = {"image": "binary", "label": "long", "domain": "long"}
"""A store's, in MLflow's words; the sizes of images are left out."""


class DataInput(BaseModel):
    """The part of a dataset that runs learn from, or that they are judged on.

    ``split_hash`` is empty where the division into training and validation images makes no difference.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    dataset: str
    context: Literal["training", "validation", "test"]
    address: str
    images: int
    classes: int
    tasks: int
    dataset_hash: str
    split_hash: str = ""

    @property
    def digest(self) -> str:
        """Identity of all that is said here, wherever the store lies.

        MLflow keeps one profile for a name and digest, so whatever the profile says is part of it.
        """
        known = self.model_dump(exclude={"address"})
        return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:16]

    def entity(self) -> DatasetInput:
        """The same as MLflow takes it."""
        profile = self.model_dump(exclude={"dataset", "context", "address"}, exclude_defaults=True)
        columns = [{"name": name, "type": kind, "required": True} for name, kind in _COLUMNS.items()]
        scheme, is_uri, _ = self.address.partition("://")
        dataset = Dataset(
            name=self.dataset,
            digest=self.digest,
            source_type=scheme if is_uri else "local",
            source=json.dumps({"uri": self.address}),
            schema=json.dumps({"mlflow_colspec": columns}),
            profile=json.dumps(profile),
        )
        return DatasetInput(dataset, [InputTag("mlflow.data.context", self.context)])


def data_inputs(stream: "Stream", config: RunConfig, evaluate_on: Literal["validation", "test"]) -> list[DataInput]:
    """The images that a run trains on, and those it is evaluated on.

    ``stream`` is the config's ``search_stream``: of test images the manifest says enough.
    """
    from inflora.data import store_address

    settings, splits = config.data, stream.manifest.splits
    whole = settings.train_on != "train"
    trained = splits["train"].images if whole else sum(len(task.train_rows) for task in stream.tasks)
    is_test = evaluate_on == "test"
    judged = splits["test"].images if is_test else sum(len(task.eval_rows) for task in stream.tasks)
    common = DataInput(
        dataset=settings.dataset,
        context="training",
        address=without_password(store_address(settings.dataset, settings.root)),
        images=trained,
        classes=len(stream.manifest.classes),
        tasks=len(stream.tasks),
        dataset_hash=stream.manifest.content_hash,
        split_hash="" if whole else stream.split_hash,
    )
    split_hash = "" if is_test else stream.split_hash
    return [common, common.model_copy(update={"context": evaluate_on, "images": judged, "split_hash": split_hash})]
