"""Rebuild the embedded data set: python -m common.assets.make [--source DIR] [--out FILE]

fashion_lt.npz is cut from Fashion-MNIST (Zalando Research, MIT licence, see NOTICE): a long-tailed training
set at imbalance factor 100 (1000 images in the head class), 100 validation images a class from the rest of
the training set, and 200 test images a class. DIR holds the four original *-ubyte.gz files (Debian's package
dataset-fashion-mnist has them in /usr/share/datasets/fashion-mnist); without it torchvision downloads them.
The same files give the same arrays.
"""
import argparse
import gzip
from pathlib import Path

import numpy as np

from common.data import FASHION_ORDER, long_tail_counts, long_tail_indices

CLASS_NAMES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag",
               "Ankle boot")
FILES = {part: (f"{prefix}-images-idx3-ubyte.gz", f"{prefix}-labels-idx1-ubyte.gz")
         for part, prefix in (("train", "train"), ("test", "t10k"))}


def read_fashion_mnist(source, part):
    """uint8 images [n, 28, 28] and labels [n] of one part of Fashion-MNIST (idx files: 16 and 8 header
    bytes)."""
    images, labels = (gzip.decompress((Path(source) / name).read_bytes()) for name in FILES[part])
    return (np.frombuffer(images, np.uint8, offset=16).reshape(-1, 28, 28),
            np.frombuffer(labels, np.uint8, offset=8))


def fashion_lt(source):
    """The arrays of fashion_lt.npz, from the four files in `source`."""
    x, y = read_fashion_mnist(source, "train")
    x_test, y_test = read_fashion_mnist(source, "test")
    counts = np.zeros(10, np.int64)
    counts[list(FASHION_ORDER)] = long_tail_counts(10, 1000, 100)
    # One draw a class: its first images train, the 100 behind them validate
    drawn = np.split(long_tail_indices(y, counts + 100, seed=0), np.cumsum(counts + 100)[:-1])
    train = np.concatenate([indices[:count] for indices, count in zip(drawn, counts)])
    val = np.concatenate([indices[count:] for indices, count in zip(drawn, counts)])
    test = long_tail_indices(y_test, [200] * 10, seed=0)
    return {"x_train": x[train], "y_train": y[train], "x_val": x[val], "y_val": y[val],
            "x_test": x_test[test], "y_test": y_test[test], "class_names": np.array(CLASS_NAMES)}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--source", help="folder of the four *-ubyte.gz files; downloads them if left out")
    parser.add_argument("--out", default=str(Path(__file__).parent / "fashion_lt.npz"))
    args = parser.parse_args(argv)
    source = args.source
    if source is None:
        from torchvision.datasets import FashionMNIST
        FashionMNIST("data", download=True)
        source = "data/FashionMNIST/raw"
    np.savez_compressed(args.out, **fashion_lt(source))
    print(f"wrote {args.out}: {Path(args.out).stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
