"""digits: the 1,797 real 8 x 8 scans of handwritten digits that scikit-learn ships (UCI, test part), 10 classes."""

from pathlib import Path

import numpy as np

from inflora.data.source import Arrays, Options, Source


def read(source: Path, options: Options, scratch: Path) -> Source:
    """A stratified quarter, drawn once for everyone, is the test split; nothing but scikit-learn is read."""
    # Only whoever prepares the store waits for scikit-learn's import.
    import sklearn
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    scans = load_digits()
    pixels = np.rint(scans.images * (255 / 16)).astype(np.uint8)[..., None]
    train, test = train_test_split(np.arange(len(pixels)), test_size=0.25, random_state=0, stratify=scans.target)
    return Source(
        origin=f"sklearn.datasets.load_digits {sklearn.__version__}",
        classes=tuple(str(digit) for digit in range(10)),
        splits={"train": Arrays(pixels[train], scans.target[train]), "test": Arrays(pixels[test], scans.target[test])},
    )
