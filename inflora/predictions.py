"""A model's answers about images, written as lines, JSON or CSV."""

import csv
import io
import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from inflora.data.errors import DataError
from inflora.data.images import SUFFIXES
from inflora.data.source import is_image
from inflora.errors import one_line


class Prediction(NamedTuple):
    """One image's most probable classes, the best first; none where ``error`` says why it could not be read.

    ``doubt`` is said of an image that is as bright as a training image's negative.
    """

    file: Path
    classes: tuple[tuple[str, float], ...] = ()
    error: str = ""
    doubt: str = ""


def images_in(paths: Iterable[Path]) -> list[Path]:
    """The files among ``paths``, and of every folder all images below it, sorted.

    Raises:
        DataError: A folder has none.
    """
    files = []
    for path in paths:
        found = _below(path) if path.is_dir() else [path]
        if not found:
            raise DataError(f"{path} holds no images ({', '.join(SUFFIXES)})")
        files += found
    return files


def _below(folder: Path) -> list[Path]:
    return sorted(Path(parent, name) for parent, _, names in os.walk(folder) for name in names if is_image(name))


def as_line(said: Prediction) -> str:
    """File, and classes with their probabilities, between tabs; names as a terminal may show them."""
    return "\t".join((_shown(said.file), *(f"{_shown(name)} {chance:.4f}" for name, chance in said.classes)))


def _shown(name: object) -> str:
    """A name as it is where it can be printed, with the blanks that are in it."""
    return text if (text := str(name)).isprintable() else one_line(text)


def as_json(said: Prediction) -> str:
    """One object: "file", and "classes" or "error"."""
    if said.error:
        return json.dumps({"file": str(said.file), "error": said.error})
    classes = [{"class": name, "probability": chance} for name, chance in said.classes]
    return json.dumps({"file": str(said.file), "classes": classes})


def as_csv(said: Prediction) -> str:
    """A row for each class: file, class, probability."""
    written = io.StringIO()
    rows = csv.writer(written, lineterminator="\n")
    rows.writerows((said.file, name, f"{chance:.6f}") for name, chance in said.classes)
    return written.getvalue().removesuffix("\n")


def print_predictions(predictions: Iterable[Prediction], form: str, *, inverted: bool) -> bool:
    """Print every answer in the ``form`` "text", "json" or "csv", and what is wrong on stderr; whether all were read.

    One line at the end warns of images that look like negatives.
    """
    shown = {"text": as_line, "json": as_json, "csv": as_csv}[form]
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files may be of any bytes
    doubts: list[Prediction] = []
    asked = failed = 0
    if form == "csv":
        print("file,class,probability")
    for said in predictions:
        asked += 1
        if said.error:
            failed += 1
            print(f"error: {said.error}", file=sys.stderr)
        if said.doubt:
            doubts.append(said)
        if said.classes or form == "json":
            print(shown(said), flush=True)
    if doubts:
        first, advice = doubts[0], "leave out --invert" if inverted else "try --invert"
        print(
            f"warning: {len(doubts)} of {asked} images look like negatives of the training images "
            f"({_shown(first.file)}: {first.doubt}); {advice}",
            file=sys.stderr,
        )
    return not failed
