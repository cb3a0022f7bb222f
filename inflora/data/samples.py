"""Tiny archives of generated images in the exact form of each dataset's distribution: for smoke runs and tests.

The images of a class share a colour and a direction of stripes, so there is something to learn.
"""

import gzip
import io
import json
import pickle
import tarfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from inflora.data import core50 as core50_source
from inflora.data import office_home as office_home_source
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


def cars(folder: Path, classes: int, per_class: int) -> Path:
    """A folder with the archives of images and of the devkit, and the labelled annotations of the test images."""
    from scipy.io import savemat

    random = np.random.default_rng(0)
    rows = [(label, f"{number + 1:05}.jpg") for number, label in enumerate(_labels(classes, per_class))]
    devkit: dict[str, bytes] = {}
    for split in ("train", "test"):
        images = {f"cars_{split}/{image}": encoded(label, classes, random) for label, image in rows}
        (folder / f"cars_{split}.tgz").write_bytes(gzip.compress(_tar(images)))
        corners = dict.fromkeys(("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2"), 1)
        listed = [{**corners, "class": label + 1, "fname": image} for label, image in rows]
        kinds = [(name, object) for name in listed[0]]
        struct = np.array([[tuple(row.values()) for row in listed]], dtype=kinds)
        buffer = io.BytesIO()
        savemat(buffer, {"annotations": struct}, do_compression=True)
        devkit[f"devkit/cars_{split}_annos.mat"] = buffer.getvalue()
    (folder / "cars_test_annos_withlabels.mat").write_bytes(devkit.pop("devkit/cars_test_annos.mat"))
    buffer = io.BytesIO()
    names = np.array([[f"Maker Model {label}" for label in range(classes)]], dtype=object)
    savemat(buffer, {"class_names": names}, do_compression=True)
    devkit["devkit/cars_meta.mat"] = buffer.getvalue()
    (folder / "car_devkit.tgz").write_bytes(gzip.compress(_tar(devkit)))
    return folder


def objectnet(folder: Path, classes: int, per_class: int) -> Path:
    """A zip of image folders."""
    return _split_zip(folder / "objectnet.zip", "objectnet", [f"kind_{n}" for n in range(classes)], per_class)


def omnibenchmark(folder: Path, classes: int, per_class: int) -> Path:
    """A zip of image folders that are called by numbers."""
    names = [str(number) for number in range(classes)]
    return _split_zip(folder / "omnibenchmark.zip", "omnibenchmark", names, per_class)


def vtab(folder: Path, classes: int, per_class: int) -> Path:
    """A zip of image folders that are called by numbers from 10."""
    names = [str(10 + number) for number in range(classes)]
    return _split_zip(folder / "vtab-cil.zip", "vtab-cil/vtab", names, per_class)


def office_home(folder: Path, classes: int, per_class: int) -> Path:
    """``OfficeHomeDataset_10072016.zip``: class folders in domain folders; a fifth of the images become test images."""
    random = np.random.default_rng(0)
    path = folder / "OfficeHomeDataset_10072016.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for domain in office_home_source.DOMAINS:
            for number, label in enumerate(_labels(classes, per_class + max(1, per_class // 4))):
                name = f"{path.stem}/{domain}/Kind_{label}/{number:05}.jpg"
                archive.writestr(name, encoded(label, classes, random))
    return path


def core50(folder: Path, classes: int, per_class: int) -> Path:
    """``core50_128x128.zip``: frames of objects in sessions."""
    random = np.random.default_rng(0)
    path = folder / "core50_128x128.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for session in (*core50_source.SESSIONS, *core50_source.TEST_SESSIONS):
            for number, label in enumerate(_labels(classes, per_class)):
                frame = f"C_{int(session[1:]):02}_{label + 1:02}_{number:03}.png"
                name = f"{path.stem}/{session}/o{label + 1}/{frame}"
                archive.writestr(name, encoded(label, classes, random, "PNG"))
    return path


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
    "cars": cars,
    "objectnet": objectnet,
    "omnibenchmark": omnibenchmark,
    "vtab": vtab,
    "office_home": office_home,
    "core50": core50,
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


def _split_zip(path: Path, top: str, names: Sequence[str], per_class: int) -> Path:
    random = np.random.default_rng(0)
    with zipfile.ZipFile(path, "w") as archive:
        for split in ("train", "test"):
            for number, label in enumerate(_labels(len(names), per_class)):
                content = encoded(label, len(names), random)
                archive.writestr(f"{top}/{split}/{names[label]}/{number}.jpg", content)
    return path


def _labels(classes: int, per_class: int) -> list[int]:
    """Labels of images, one class after the other, over and over."""
    return [label for _ in range(per_class) for label in range(classes)]


def _tar(files: Mapping[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()
