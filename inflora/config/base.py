"""Common ground of all groups of settings: how they are checked, and the bounds of their numbers.

Bounds are those of the machine, wide enough for every use: a generator takes 63 bits of a seed, float32 knows neither
1e308 nor 1e-320, and a batch of more images than there are in any dataset is a slip of the finger.
"""

from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from inflora.errors import UserError


class ConfigError(UserError):
    """A setting that a user can mend: the message is one line with the rule, the value and what is allowed."""


class Settings(BaseModel):
    """Base of every group of settings: immutable, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


T = TypeVar("T", str, Path)


def _nameable(text: T) -> T:
    """Text that a file or a record can bear: no NUL, which ends a path, and nothing that UTF-8 cannot write."""
    if "\0" in str(text) or any("\ud800" <= letter <= "\udfff" for letter in str(text)):
        raise ValueError("must be text without NUL and unpaired surrogates")
    return text


def _of_file_length(path: Path) -> Path:
    if len(str(path)) > 4096:
        raise ValueError("must be a path of at most 4096 characters")
    return path


Text = Annotated[str, Field(max_length=4096), AfterValidator(_nameable)]
Name = Annotated[str, Field(max_length=255), AfterValidator(_nameable)]
"""Of a dataset or a model: it may become a folder's name."""
File = Annotated[Path, AfterValidator(_nameable), AfterValidator(_of_file_length)]

# Strict: true is no 1, 2.0 and "2" are no 2. Whole numbers are numbers.
Flag = Annotated[bool, Field(strict=True)]
Whole = Annotated[int, Field(strict=True)]
Number = Annotated[float, Field(strict=True)]

Count = Annotated[Whole, Field(ge=1, le=100_000)]
"""Of tasks, classes, trials: the largest datasets have some ten thousand classes."""
Epochs = Annotated[Whole, Field(ge=1, le=100_000)]
Width = Annotated[Whole, Field(ge=1, le=16_384)]
"""Of a layer, an adapter, an image's side: the widest transformers have some thousands."""
Depth = Annotated[Whole, Field(ge=1, le=1_000)]
Images = Annotated[Whole, Field(ge=1, le=2**20)]
"""Of a batch: more than the training images of any dataset here."""
Seed = Annotated[Whole, Field(ge=0, lt=2**63)]
"""Of PyTorch's generators; every database takes it."""
ShortSeed = Annotated[Whole, Field(ge=0, lt=2**32)]
"""Of NumPy's older generators, which samplers draw from."""

Rate = Annotated[Number, Field(ge=1e-30, le=1e30)]
"""Of learning: float32, which has nothing beyond 1e-38 and 1e38, still multiplies with it."""
Weight = Annotated[Number, Field(ge=0, le=1e6)]
"""Of a term of a loss, or of a decay."""
Share = Annotated[Number, Field(gt=0, le=1)]
Part = Annotated[Number, Field(ge=0, le=1)]
"""A share that may be nothing."""
Scale = Annotated[Number, Field(ge=1e-6, le=1e6)]
"""Of a division or a stretch."""
