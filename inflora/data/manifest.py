"""``manifest.json``: what must be in a store."""

import hashlib
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError, model_validator

from inflora.data.errors import DataError
from inflora.data.files import read_file

Split = Literal["train", "test"]
Form = Literal["raw", "encoded", "decoded"]
"""The form in which a store keeps images.

raw: uint8 arrays, all of one size, one shard per split: mapped as one tensor, nothing is decoded (CIFAR, digits).
encoded: the dataset's own JPEG or PNG files: small, exact, decoded at every use.
decoded: uint8 arrays with a bounded shorter side: decoded once, several times larger on disk, faster to read.
"""
FORMAT = 3
"""3: image files are stored upright (EXIF) and 16 bits as 8; the manifest knows its own hash."""
_STILL_READ: dict[int, tuple[Form, ...]] = {2: ("raw",)}
"""Older formats, and the forms in which they hold what this one would."""


class _Written(BaseModel):
    """A part of the manifest; JSON of exactly these types."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Shard(_Written):
    """One file of a split."""

    file: Annotated[str, Field(pattern=r"^[a-z]+-[0-9]{5,9}\.arrow$")]
    images: PositiveInt
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class SplitManifest(_Written):
    """The content of one split."""

    per_class: list[NonNegativeInt]
    shards: Annotated[list[Shard], Field(min_length=1)]

    @property
    def images(self) -> int:
        """The number of images of the split."""
        return sum(shard.images for shard in self.shards)

    @property
    def content_hash(self) -> str:
        """Identity of the split's images and labels."""
        return hashlib.sha256("".join(shard.sha256 for shard in self.shards).encode()).hexdigest()[:16]


class Manifest(_Written):
    """The content of a store; written last, so a folder without it is not a store."""

    format: int = FORMAT
    dataset: str
    source: str
    classes: Annotated[list[str], Field(min_length=1)]
    domains: list[str]
    # Those of the test images, where these are others: no domain that is learnt is tested on images of its own.
    test_domains: Annotated[list[str], Field(exclude_if=lambda names: not names)] = []
    form: Form
    channels: PositiveInt
    whole: bool = False  # as many classes and images as the dataset officially has
    splits: dict[Split, SplitManifest]
    sha256: str = ""  # of all the rest; format 2 had none

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> Self:
        if self.splits.keys() != {"train", "test"}:
            raise ValueError("it must have a train and a test split")
        for split, held in self.splits.items():
            if len(held.per_class) != len(self.classes) or sum(held.per_class) != held.images:
                raise ValueError(f"the numbers of {split} images by class, of classes and in shards do not agree")
            if self.form == "raw" and len(held.shards) > 1:
                raise ValueError(f"the {split} images of a raw store must be in one shard")
        if self.form != "raw" and self.channels != 3:
            raise ValueError("image files have 3 channels")
        if self.format == FORMAT and self.sha256 not in ("", self._own_hash()):
            raise ValueError("its text is not what was written")
        return self

    def domains_of(self, split: Split) -> list[str]:
        """The names of the domains that the images of a split are of."""
        return self.test_domains or self.domains if split == "test" else self.domains

    def _own_hash(self) -> str:
        return hashlib.sha256(self.model_dump_json(exclude={"sha256"}).encode()).hexdigest()

    def sealed(self) -> Self:
        """The same with its own hash, by which a changed text is told."""
        return self.model_copy(update={"sha256": self._own_hash()})

    @property
    def content_hash(self) -> str:
        """Identity of the images and labels, whatever the store is called and wherever it lies."""
        splits = [self.splits[split].content_hash for split in sorted(self.splits)]
        return hashlib.sha256("".join(splits).encode()).hexdigest()[:16]


class _Format(BaseModel):
    """The one field that every version's manifest has."""

    format: int
    form: Form | None = None


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a store.

    Raises:
        DataError: No store is there, or one that this version cannot read.
    """
    path = folder / "manifest.json"
    if not path.exists():
        raise DataError(f"no dataset store in {folder}: it has no {path.name}")
    return parse_manifest(read_file(path), folder)


def parse_manifest(content: bytes, store: Path | str) -> Manifest:
    """The manifest of ``store`` from its text.

    Raises:
        DataError: It is none, or one that this version cannot read.
    """
    try:
        head = _Format.model_validate_json(content)
        if head.format != FORMAT and head.form not in _STILL_READ.get(head.format, ()):
            raise DataError(
                f"{store} has store format {head.format}, expected {FORMAT}; remove it and prepare it again"
            )
        return Manifest.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        message = first["msg"].removeprefix("Value error, ")
        reason = f"{place}: {message}" if place else message
        raise damaged(store, f"manifest.json: {reason}") from None


def damaged(store: Path | str, reason: str) -> DataError:
    """The error for a store that does not hold what it should."""
    return DataError(f"the store {store} is damaged: {reason}; remove it and prepare it again")
