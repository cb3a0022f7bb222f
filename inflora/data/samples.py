"""Tiny archives of generated images in the exact form of each dataset's distribution: for smoke runs and tests.

The images of a class share a colour and a direction of stripes, so there is something to learn.
"""

import gzip
import io
import json
import pickle
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from inflora.data.domainnet import DOMAINS


def striped(label: int, classes: int, size: tuple[int, int], random: np.random.Generator) -> np.ndarray:
    """One image (H, W, 3) uint8 of a class: stripes in its colour and direction, at a random phase, with noise."""
    y, x = np.mgrid[: size[0], : size[1]] / max(size)
    angle, phase = np.pi * label / classes, random.uniform(0, 2 * np.pi)
    wave = 0.5 + 0.5 * np.sin(12 * (x * np.cos(angle) + y * np.sin(angle)) + phase)
    colour = 0.5 + 0.5 * np.cos(2 * np.pi * (label / classes + np.array([0, 1 / 3, 2 / 3])))
    noisy = wave[..., None] * colour + random.normal(0, 0.05, (*size, 3))
    return (255 * noisy.clip(0, 1)).astype(np.uint8)


def encoded(label: int, classes: int, random: np.random.Generator, form: str = "JPEG") -> bytes:
    """The same as a file, of a random size."""
    size = (int(random.integers(40, 80)), int(random.integers(40, 80)))
    buffer = io.BytesIO()
    Image.fromarray(striped(label, classes, size, random)).save(buffer, form)
    return buffer.getvalue()


def cifar100(folder: Path, classes: int, per_class: int) -> Path:
    """``cifar-100-python.tar.gz``: pickled dicts with channel-first rows."""
    random = np.random.default_rng(0)
    names = [f"class_{label}".encode() for label in range(classes)]
    members = {"meta": pickle.dumps({b"fine_label_names": names, b"coarse_label_names": [b"all"]}, protocol=2)}
    for split in ("train", "test"):
        labels = [label for label in range(classes) for _ in range(per_class)]
        images = np.stack([striped(label, classes, (32, 32), random) for label in labels])
        batch = {
            b"filenames": [f"{split}_{row}.png".encode() for row in range(len(labels))],
            b"batch_label": split.encode(),
            b"fine_labels": labels,
            b"coarse_labels": [0] * len(labels),
            b"data": images.transpose(0, 3, 1, 2).reshape(len(labels), -1),
        }
        members[split] = pickle.dumps(batch, protocol=2)
    path = folder / "cifar-100-python.tar.gz"
    path.write_bytes(gzip.compress(_tar({f"cifar-100-python/{name}": data for name, data in members.items()})))
    return path


def cifar100_parquet(folder: Path, classes: int, per_class: int) -> Path:
    """A folder with ``train-*.parquet`` and ``test-*.parquet``: PNG files in a struct column."""
    random = np.random.default_rng(0)
    names = [f"class_{label}" for label in range(classes)]
    features = {"info": {"features": {"fine_label": {"names": names, "_type": "ClassLabel"}}}}
    for split in ("train", "test"):
        labels = [label for label in range(classes) for _ in range(per_class)]
        images = []
        for label in labels:
            buffer = io.BytesIO()
            Image.fromarray(striped(label, classes, (32, 32), random)).save(buffer, "PNG")
            images.append({"bytes": buffer.getvalue(), "path": None})
        columns = {"img": images, "fine_label": labels, "coarse_label": [0] * len(labels)}
        table = pa.table(columns).replace_schema_metadata({"huggingface": json.dumps(features)})
        pq.write_table(table, folder / f"{split}-00000-of-00001.parquet")
    return folder


def imagenet_r(folder: Path, classes: int, per_class: int) -> Path:
    """``imagenet-r.tar``: WordNet-id folders of JPEGs and a README with their names."""
    return _wordnet_tar(folder / "imagenet-r.tar", classes, per_class)


def imagenet_a(folder: Path, classes: int, per_class: int) -> Path:
    """``imagenet-a.tar``, laid out as ImageNet-R."""
    return _wordnet_tar(folder / "imagenet-a.tar", classes, per_class)


def domainnet(folder: Path, classes: int, per_class: int) -> Path:
    """A folder with a zip and two list files for each of the six domains."""
    random = np.random.default_rng(0)
    for domain in DOMAINS:
        lines: dict[str, list[str]] = {"train": [], "test": []}
        with zipfile.ZipFile(folder / f"{domain}.zip", "w") as archive:
            for label in range(classes):
                for number in range(2 * per_class):
                    name = f"{domain}/kind_{label}/{domain}_{label:03}_{number:06}.jpg"
                    archive.writestr(name, encoded(label, classes, random))
                    lines["train" if number < per_class else "test"].append(f"{name} {label}\n")
        for split, content in lines.items():
            (folder / f"{domain}_{split}.txt").write_text("".join(content))
    return folder


def cub200(folder: Path, classes: int, per_class: int) -> Path:
    """``CUB_200_2011.tgz``: images in class folders, and lists that number images and classes from 1."""
    random = np.random.default_rng(0)
    files: dict[str, bytes] = {}
    kinds = [f"{label + 1:03}.Bird_{label}" for label in range(classes)]
    rows = [(label, number) for label in range(classes) for number in range(2 * per_class)]
    paths = [f"{kinds[label]}/Bird_{label}_{number:04}.jpg" for label, number in rows]
    lists = {
        "classes.txt": [f"{label + 1} {kind}" for label, kind in enumerate(kinds)],
        "images.txt": [f"{index + 1} {path}" for index, path in enumerate(paths)],
        "image_class_labels.txt": [f"{index + 1} {label + 1}" for index, (label, _) in enumerate(rows)],
        "train_test_split.txt": [f"{index + 1} {int(number < per_class)}" for index, (_, number) in enumerate(rows)],
    }
    for (label, _), path in zip(rows, paths, strict=True):
        files[f"CUB_200_2011/images/{path}"] = encoded(label, classes, random)
    for name, lines in lists.items():
        files[f"CUB_200_2011/{name}"] = "".join(f"{line}\n" for line in lines).encode()
    archive = folder / "CUB_200_2011.tgz"
    archive.write_bytes(gzip.compress(_tar(files)))
    return archive


def image_folder(folder: Path, classes: int, per_class: int) -> Path:
    """A folder with ``train/<class>/*.png`` and ``test/<class>/*.png``."""
    random = np.random.default_rng(0)
    for split in ("train", "test"):
        for label in range(classes):
            kind = folder / split / f"kind_{label}"
            kind.mkdir(parents=True)
            for number in range(per_class):
                (kind / f"{number}.png").write_bytes(encoded(label, classes, random, "PNG"))
    return folder


SAMPLES: dict[str, Callable[[Path, int, int], Path]] = {
    "cifar100": cifar100,
    "imagenet_r": imagenet_r,
    "imagenet_a": imagenet_a,
    "domainnet": domainnet,
    "cub200": cub200,
    "image_folder": image_folder,
}
"""Dataset -> what writes ``(folder, classes, images per class)`` in its form; the result is its ``--source``."""


def _wordnet_tar(path: Path, classes: int, per_class: int) -> Path:
    random = np.random.default_rng(0)
    files = {}
    for label in range(classes):
        # A fifth of the images become test images.
        for number in range(per_class + max(1, per_class // 4)):
            files[f"{path.stem}/n{label:08}/kind_{number}.jpg"] = encoded(label, classes, random)
    words = "".join(f"n{label:08} kind {label}\n" for label in range(classes))
    path.write_bytes(_tar({f"{path.stem}/README.txt": words.encode(), **files}))
    return path


def _tar(files: Mapping[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()
