"""What a long-tailed data set is: images per class, subsets, and `Images`, `ImageFiles`, `Dataset`.

A split is either `Images` (decoded, one uint8 array in memory) or `ImageFiles` (paths, decoded by the
loader's workers); both have `.targets`. Class ids are the data set's own and are not sorted by frequency.
"""
import contextlib
import hashlib
import os
from dataclasses import dataclass, replace

import numpy as np


# ---------------------------------------------------------------- counts and subsets

def long_tail_counts(num_classes, n_max, imb_factor):
    """Images per class, from the most frequent to the rarest: int(n_max * imb_factor ** (-i / (C - 1))).

    num_classes: C >= 1. n_max: images of the largest class, may be fractional. imb_factor: max/min, >= 1.
    Returns a list of C ints. Raises ValueError. The rule of Cui et al. (CVPR 2019) as LDAM-DRW writes it.
    """
    if num_classes < 1:
        raise ValueError(f"the number of classes must be at least 1, got {num_classes}")
    if not 1 <= imb_factor < float("inf"):
        raise ValueError(f"the imbalance factor is max/min and must be at least 1, got {imb_factor}")
    if not 1 <= n_max < float("inf"):
        raise ValueError(f"the largest class must hold at least one image, got {n_max}")
    if num_classes == 1:
        return [int(n_max)]
    return [int(n_max * imb_factor ** (-i / (num_classes - 1))) for i in range(num_classes)]


def long_tail_indices(targets, counts, seed=0):
    """The images that LDAM-DRW@2536330 and MiSLAS@0fc381e keep.

    targets: [n] class ids. counts: images to keep of class 0, 1, ... . seed: of one MT19937 stream.
    Classes are visited in id order; each one's index list is shuffled and its first counts[c] are kept.
    Returns the kept indices, class by class [sum(counts)]. Raises ValueError when a class has too few images.
    """
    targets = np.asarray(targets)
    generator = np.random.RandomState(seed)
    kept = []
    for class_id, count in enumerate(counts):
        indices = np.flatnonzero(targets == class_id)
        if not 0 <= count <= len(indices):
            raise ValueError(f"class {class_id} has {len(indices)} images, {count} were asked for")
        generator.shuffle(indices)
        kept.append(indices[:count])
    return np.concatenate(kept) if kept else np.zeros(0, np.int64)


def cut_to_long_tail(targets, num_classes, imb_factor, n_max=None, order=None, seed=0):
    """Indices of a long-tailed subset of `targets`.

    n_max: images of the largest class (None: what it has). order: class ids from head to tail (None: by
    size, ties by id). A class with fewer images than the rule asks for keeps what it has, and says so once.
    Raises ValueError where the rule leaves the rarest class nothing.
    """
    available = np.bincount(targets, minlength=num_classes)
    order = np.argsort(-available, kind="stable") if order is None else np.asarray(order)
    n_max = available.max() if n_max is None else n_max

    counts = np.zeros(num_classes, np.int64)
    counts[order] = long_tail_counts(num_classes, n_max, imb_factor)
    if counts.min() < 1:
        works = next(factor for factor in range(int(n_max), 0, -1)
                     if long_tail_counts(num_classes, n_max, factor)[-1] >= 1)
        raise ValueError(f"--imb-factor {imb_factor:g}, with {n_max:g} images in the largest class, leaves "
                         f"the rarest one no training image; at most --imb-factor {works} works")

    short = np.flatnonzero(counts > available)
    if len(short):
        note(f"{len(short)} classes have fewer images than the long-tailed rule asks for; they keep what "
             "they have")
    return long_tail_indices(targets, np.minimum(counts, available), seed)


def note(text):
    """Print a line about the data, once: under torchrun the first process says it."""
    if os.environ.get("RANK", "0") == "0":
        with contextlib.suppress(OSError):  # a screen that is gone ends no run
            print(f"note: {text}", flush=True)


# ---------------------------------------------------------------- splits

@dataclass
class Images:
    """A decoded split. images: uint8 [n, H, W, 3]; targets: int64 [n]."""
    images: np.ndarray
    targets: np.ndarray

    def __len__(self):
        return len(self.targets)

    def subset(self, indices):
        """The images at these indices."""
        return Images(self.images[indices], self.targets[indices])


@dataclass
class ImageFiles:
    """A split of image files. paths: bytes [n] in one flat array, which workers share; targets: int64 [n]."""
    paths: np.ndarray
    targets: np.ndarray

    def __len__(self):
        return len(self.targets)

    def subset(self, indices):
        """The image files at these indices."""
        return ImageFiles(self.paths[indices], self.targets[indices])


def image_files(paths, targets, root=""):
    """`ImageFiles` of paths (strings) that are relative to root."""
    return ImageFiles(np.array([os.fsencode(os.path.join(root, path)) for path in paths]),
                      np.asarray(targets, np.int64))


@dataclass(eq=False)
class Dataset:
    """A long-tailed data set.

    train, val (or None), test: `Images` or `ImageFiles`. class_names: C strings. mean, std: per channel, for
    pixels in [0, 1]. image_size: side in pixels that the nets see. color_jitter: how far brightness, contrast
    and saturation of image files vary in the standard augmentation (0: not at all). From these it has
    num_classes, and class_counts: int64 [C], training images per class. Raises ValueError for a class without
    a training image, or a label out of range.
    """
    name: str
    train: "Images | ImageFiles"
    val: "Images | ImageFiles | None"
    test: "Images | ImageFiles"
    class_names: list
    mean: tuple
    std: tuple
    image_size: int
    color_jitter: float = 0.0

    def __post_init__(self):
        self.class_names, self.num_classes = list(self.class_names), len(self.class_names)
        self.mean, self.std = tuple(self.mean), tuple(self.std)

        for part, split in (("train", self.train), ("val", self.val), ("test", self.test)):
            if split is None:
                continue
            split.targets = np.ascontiguousarray(split.targets, np.int64)
            if len(split) == 0:
                raise ValueError(f"{self.name}: the {part} split has no images")
            if split.targets.min() < 0 or split.targets.max() >= self.num_classes:
                raise ValueError(f"{self.name}: {part} labels must lie in 0..{self.num_classes - 1}, "
                                 f"found {split.targets.min()}..{split.targets.max()}")

        self.class_counts = np.bincount(self.train.targets, minlength=self.num_classes)
        empty = np.flatnonzero(self.class_counts == 0)
        if len(empty):
            raise ValueError(f"{self.name}: class {empty[0]} ({self.class_names[empty[0]]}) has no training "
                             f"image ({len(empty)} such classes)")

    def split(self, name):
        """train, val or test. Raises ValueError where the data set has none of that name."""
        if getattr(self, name) is None:
            raise ValueError(f"{self.name} has no validation images; leave out --evaluate-on val")
        return getattr(self, name)

    def subset(self, indices):
        """The same data set with the training images at these indices alone."""
        return self.with_splits(self.train.subset(indices), self.val, self.test)

    def with_splits(self, train, val, test):
        """The same data set with these splits."""
        return replace(self, train=train, val=val, test=test)

    def in_class_order(self, class_names):
        """The same data set with its classes in this order. Where these are not its own class names, or None,
        it stays as it is. Images that lie class by class do so afterwards, too."""
        if class_names == self.class_names or sorted(class_names or ()) != sorted(self.class_names):
            return self
        note(f"{self.name} has the same classes in another order; they are matched by name")
        place = {class_name: i for i, class_name in enumerate(class_names)}
        new_ids = np.array([place[class_name] for class_name in self.class_names])

        splits = []
        for split in (self.train, self.val, self.test):
            if split is not None:
                is_by_class = (np.diff(split.targets) >= 0).all()
                split = replace(split, targets=new_ids[split.targets])
                split = split.subset(split.targets.argsort(kind="stable")) if is_by_class else split
            splits.append(split)
        data = self.with_splits(*splits)
        data.class_names = list(class_names)
        return data


def balanced_subset(data, images_per_class):
    """A data set whose training split keeps the first `images_per_class` images of every class, in stored
    order (ImageNet-BAL: 160 of ImageNet). Raises ValueError where a class has fewer."""
    targets = data.train.targets
    short = np.flatnonzero(data.class_counts < images_per_class)
    if images_per_class < 1 or len(short):
        raise ValueError(f"cannot take {images_per_class} images of every class: " + (
            "at least 1 is needed" if images_per_class < 1 else
            f"class {data.class_names[short[0]]} has {data.class_counts[short[0]]}"))
    kept = np.sort(np.concatenate([np.flatnonzero(targets == c)[:images_per_class]
                                   for c in range(data.num_classes)]))
    return data.subset(kept)


def fingerprint(data):
    """A hexadecimal string that is the same for the same data set, wherever its files lie.

    It is of the class names, of each split's targets, and of the paths relative to the folder that all files
    have in common, or of decoded images: about 4 MB of them, evenly spread.
    """
    digest = hashlib.sha256(repr([str(name) for name in data.class_names]).encode())
    splits = [(part, getattr(data, part)) for part in ("train", "val", "test") if getattr(data, part)]
    paths = {part: list(map(os.path.abspath, split.paths.tolist())) for part, split in splits
             if isinstance(split, ImageFiles)}
    root = os.path.commonpath([os.path.dirname(path) for some in paths.values() for path in some] or [b"/"])
    start = len(root.rstrip(b"/")) + 1

    for part, split in splits:
        digest.update(f"{part} {len(split)}".encode())
        digest.update(split.targets.astype("<i8").tobytes())
        if part in paths:
            digest.update(b"\n".join(path[start:] for path in paths[part]))
        else:
            step = split.images.nbytes // 4_000_000 + 1
            digest.update(repr(split.images.shape).encode())
            digest.update(np.ascontiguousarray(split.images[::step]).tobytes())
    return digest.hexdigest()


# ---------------------------------------------------------------- pixels

def as_rgb(images, border=0):
    """uint8 [n, H, W] or [n, H, W, 3] -> [n, H + 2 border, W + 2 border, 3], the border black."""
    images = images[..., None] if images.ndim == 3 else images
    if border:
        images = np.pad(images, ((0, 0), (border, border), (border, border), (0, 0)))
    return images if images.shape[3] == 3 else np.repeat(images, 3, axis=3)


def channel_statistics(images):
    """Mean and standard deviation per channel of uint8 images [n, H, W, 3], as fractions of 255."""
    # Exact from histograms, made of 1000 images at a time: no larger copy of the whole set
    histograms = np.zeros((3, 256))
    for start in range(0, len(images), 1000):
        for c in range(3):
            histograms[c] += np.bincount(images[start:start + 1000, ..., c].ravel(), minlength=256)
    return moments(histograms)


def moments(histograms):
    """Mean and standard deviation of values k / 255 that occur histograms[c][k] times, for each channel c."""
    values = np.arange(256) / 255
    means = [float(h @ values / h.sum()) for h in histograms]
    stds = [float(np.sqrt(h @ (values - m) ** 2 / h.sum())) or 1.0 for h, m in zip(histograms, means)]
    return means, stds
