"""What a long-tailed data set is: counts, subsets, and a builder for each data set.

`load(name)` returns a `Dataset` with `.train`, `.val` (or None) and `.test`. A split is either `Images`
(decoded, one uint8 array in memory) or `ImageFiles` (paths, decoded by the loader's workers); both have
`.targets`. Class ids are the data set's own and are not sorted by frequency.

    python -m common.data imagenet_lt --data-dir /data/imagenet

checks a data set before a night is burnt on it: files, counts, groups, mean and standard deviation.
"""
import argparse
import hashlib
import importlib
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

ASSETS = Path(__file__).parent / "assets"
IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".webp")
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
INAT_MEAN, INAT_STD = (0.466, 0.471, 0.380), (0.195, 0.194, 0.192)  # classifier-balancing@f162ade, iNat18
# LDAM-DRW@2536330 and MiSLAS@0fc381e normalise both CIFAR sets with these
CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
# Head to tail. Look-alikes (T-shirt 0 and shirt 6, coat 4 and pullover 2, sandal 5 and sneaker 7) stand at
# opposite ends; in the order of the ids the three tail classes would be the three easiest.
FASHION_ORDER = (0, 5, 4, 1, 9, 3, 7, 2, 8, 6)


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
    """
    available = np.bincount(targets, minlength=num_classes)
    order = np.argsort(-available, kind="stable") if order is None else np.asarray(order)
    counts = np.zeros(num_classes, np.int64)
    counts[order] = long_tail_counts(num_classes, available.max() if n_max is None else n_max, imb_factor)
    short = np.flatnonzero(counts > available)
    if len(short):
        print(f"note: {len(short)} classes have fewer images than the long-tailed rule asks for; "
              "they keep what they have", flush=True)
    return long_tail_indices(targets, np.minimum(counts, available), seed)


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


class Dataset:
    """A long-tailed data set.

    train, val (or None), test: `Images` or `ImageFiles`. class_counts: int64 [C], training images per class.
    class_names: C strings. mean, std: per channel, for pixels in [0, 1]. image_size: side in pixels that the
    nets see. color_jitter: how far brightness, contrast and saturation of image files vary in the standard
    augmentation (0: not at all). Raises ValueError for a class without a training image, or a label out of
    range.
    """

    def __init__(self, name, train, val, test, class_names, mean, std, image_size, color_jitter=0.0):
        self.name, self.train, self.val, self.test = name, train, val, test
        self.class_names, self.num_classes = list(class_names), len(class_names)
        self.mean, self.std, self.image_size = tuple(mean), tuple(std), image_size
        self.color_jitter = color_jitter
        for part, split in (("train", train), ("val", val), ("test", test)):
            if split is None:
                continue
            split.targets = np.ascontiguousarray(split.targets, np.int64)
            if len(split) == 0:
                raise ValueError(f"{name}: the {part} split has no images")
            if split.targets.min() < 0 or split.targets.max() >= self.num_classes:
                raise ValueError(f"{name}: {part} labels must lie in 0..{self.num_classes - 1}, "
                                 f"found {split.targets.min()}..{split.targets.max()}")
        self.class_counts = np.bincount(train.targets, minlength=self.num_classes)
        empty = np.flatnonzero(self.class_counts == 0)
        if len(empty):
            raise ValueError(f"{name}: class {empty[0]} ({self.class_names[empty[0]]}) has no training image "
                             f"({len(empty)} such classes)")

    def split(self, name):
        """train, val or test. Raises ValueError where the data set has none of that name."""
        if getattr(self, name) is None:
            raise ValueError(f"{self.name} has no validation images; leave out --evaluate-on val")
        return getattr(self, name)

    def subset(self, indices):
        """The same data set with the training images at these indices alone."""
        return Dataset(self.name, self.train.subset(indices), self.val, self.test, self.class_names,
                       self.mean, self.std, self.image_size, self.color_jitter)


def _as_rgb(images, border=0):
    """uint8 [n, H, W] or [n, H, W, 3] -> [n, H + 2 border, W + 2 border, 3], the border black."""
    images = images[..., None] if images.ndim == 3 else images
    if border:
        images = np.pad(images, ((0, 0), (border, border), (border, border), (0, 0)))
    return images if images.shape[3] == 3 else np.repeat(images, 3, axis=3)


def _channel_statistics(images):
    """Mean and standard deviation per channel of uint8 images [n, H, W, 3], as fractions of 255."""
    # Exact from histograms, made of 1000 images at a time: no larger copy of the whole set
    histograms = np.zeros((3, 256))
    for start in range(0, len(images), 1000):
        for c in range(3):
            histograms[c] += np.bincount(images[start:start + 1000, ..., c].ravel(), minlength=256)
    return _moments(histograms)


def _moments(histograms):
    """Mean and standard deviation of values k / 255 that occur histograms[c][k] times, for each channel c."""
    values = np.arange(256) / 255
    means = [float(h @ values / h.sum()) for h in histograms]
    stds = [float(np.sqrt(h @ (values - m) ** 2 / h.sum())) or 1.0 for h, m in zip(histograms, means)]
    return means, stds


# ---------------------------------------------------------------- image files and lists of them

def read_image(path):
    """The image in a file as a PIL image in RGB: grey, palette and CMYK files become RGB, too. Raises
    ValueError with the path and why it cannot be decoded."""
    from PIL import Image
    try:
        with Image.open(path) as file:
            return file.convert("RGB")
    except Exception as reason:  # PIL and its codecs raise nearly anything for a damaged file
        raise ValueError(f"{path}: {' '.join(str(reason).split()) or type(reason).__name__}") from reason


class Listing(NamedTuple):
    """What a list file says. file: its path; unit: "line" or what else it counts; names: paths of images
    relative to the data set's root; targets: int64 [n]; class_names: C strings, or None."""
    file: Path
    unit: str
    names: list
    targets: np.ndarray
    class_names: list = None

    def where(self, i):
        """Where image i (from 0) stands."""
        return f"{self.file}, {self.unit} {i + 1}"


def read_list(path):
    """Read a list file: lines `relative/path label` as OLTR and classifier-balancing have them, labels from
    0, maybe spaces in the path; or an official .json of iNaturalist 2017 or 2018, whose category ids are the
    labels. Returns a `Listing`. Raises ValueError with file and line."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no such list file: {path} (lines `relative/path label`; --train-list and "
                         "--test-list name other files)")
    if path.suffix == ".json":
        return _read_inat_json(path)
    names, targets = [], []
    for number, line in enumerate(path.read_bytes().rstrip().splitlines(), 1):
        words = line.strip().rsplit(maxsplit=1)
        if len(words) < 2 or not words[1].isdigit() or len(words[1]) > 18:
            raise ValueError(f"{path}, line {number}: must be `relative/path label`, with a label 0, 1, ..., "
                             f"it is {os.fsdecode(line[:80])!r}")
        names.append(os.fsdecode(words[0]))
        targets.append(int(words[1]))
    if not names:
        raise ValueError(f"{path} is empty; it must hold lines `relative/path label`")
    return Listing(path, "line", names, np.array(targets, np.int64))


def _read_inat_json(path):
    try:
        content = json.loads(path.read_bytes())
        file_of = {image["id"]: image["file_name"] for image in content["images"]}
        names = [file_of[annotation["image_id"]] for annotation in content["annotations"]]
        targets = [int(annotation["category_id"]) for annotation in content["annotations"]]
        name_of = {int(category["id"]): str(category["name"]) for category in content["categories"]}
    except (ValueError, KeyError, TypeError) as reason:
        raise ValueError(f"{path} is not an iNaturalist annotation file with images, annotations and "
                         f"categories ({type(reason).__name__}: {str(reason)[:80]})") from reason
    if not names or min(targets) < 0 or sorted(name_of) != list(range(len(name_of))):
        raise ValueError(f"{path} has no annotations, or its category ids are not 0..C-1")
    return Listing(path, "annotation", names, np.array(targets, np.int64),
                   [name_of[i] for i in range(len(name_of))])


def check_lists(train, others, root, num_classes=None):
    """Refuse `Listing`s that cannot be one data set: a label out of range, a class without a training image,
    an image in two splits, a folder that is not there. num_classes: C (None: as many as the training list
    has). Returns C. Raises ValueError with file and line."""
    C, last = num_classes, int(train.targets.argmax())
    if C is None:
        C = int(train.targets[last]) + 1
        if C > len(train.names):  # some class has no image; do not count up to a label of 10^15
            raise ValueError(f"{train.where(last)}: label {C - 1} among only {len(train.names)} images: "
                             "class ids must be 0..C-1, each with an image")
    for listing in (train, *others):
        for i in np.flatnonzero(listing.targets >= C)[:1]:
            raise ValueError(f"{listing.where(i)}: label {listing.targets[i]} is out of range, there are "
                             f"classes 0..{C - 1} in {'the data set' if num_classes else train.file}")
    lacking = np.bincount(train.targets, minlength=C) == 0
    for listing in others:
        for i in np.flatnonzero(lacking[listing.targets])[:1]:
            raise ValueError(f"{listing.where(i)}: class {listing.targets[i]} has no image in the training "
                             f"list {train.file}")
    if lacking.any():
        raise ValueError(f"{train.file}: class {lacking.argmax()} of 0..{C - 1} has no image "
                         f"({lacking.sum()} such classes)")
    seen = {}  # name: (listing, its place there)
    for listing in (train, *others):
        for i, name in enumerate(listing.names):
            first, place = seen.setdefault(name, (listing, i))
            if first is not listing:
                raise ValueError(f"{listing.where(i)}: {name} is in another split too "
                                 f"({first.where(place)}); is this the right list?")
        folder = Path(root, listing.names[0]).parent
        if not folder.is_dir():
            raise ValueError(f"no such folder: {folder} ({listing.where(0)} names {listing.names[0]})")
    return C


def _files(paths, targets, root=""):
    """`ImageFiles` of paths (strings) that are relative to root."""
    return ImageFiles(np.array([os.fsencode(os.path.join(root, path)) for path in paths]),
                      np.asarray(targets, np.int64))


def _scan(folder, class_names):
    """`ImageFiles` FOLDER/CLASS/*.jpg, class by class in the names' order. Raises ValueError."""
    ids = {class_name: i for i, class_name in enumerate(class_names)}
    paths, targets = [], []
    for class_name in _class_folders(folder):
        if class_name not in ids:
            raise ValueError(f"{folder}/{class_name} is a class that the training images do not have")
        files = sorted(f for f in Path(folder, class_name).iterdir() if f.suffix.lower() in IMAGE_ENDINGS)
        paths += files
        targets += [ids[class_name]] * len(files)
    if not paths:
        raise ValueError(f"no image files in {folder}")
    return _files(paths, targets)


def _class_folders(folder, what="class folders"):
    """Names of the folders in a folder, sorted. what: what must be there. Raises ValueError."""
    if not Path(folder).is_dir():
        raise ValueError(f"no such folder: {folder} (looked for {what})")
    names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    if not names:
        raise ValueError(f"no class folders in {folder}")
    return names


# ---------------------------------------------------------------- builders: decoded images

def _refuse_factor(name, imb_factor):
    if imb_factor is not None:
        raise ValueError(f"--imb-factor does not apply to {name}: it is a fixed list of images")


def _torchvision(class_name, data_dir, what, **part):
    """A split of one of torchvision's data sets; it downloads what is missing."""
    import torchvision
    try:
        return getattr(torchvision.datasets, class_name)(str(data_dir), **{"download": True, **part})
    except Exception as reason:  # torchvision raises URLError, RuntimeError, ... for one and the same cause
        raise ValueError(f"{class_name} is not in {data_dir} and could not be downloaded "
                         f"({' '.join(str(reason).split())[:100]}); put {what} there") from reason


def _torchvision_set(class_name, data_dir, what, train):
    """The images (numpy) and targets of one of torchvision's small data sets."""
    part = _torchvision(class_name, data_dir, what, train=train)
    return np.asarray(part.data), np.asarray(part.targets), part.classes


def _cifar(name, data_dir, imb_factor, seed):
    class_name, what = {
        "cifar10_lt": ("CIFAR10", "cifar-10-python.tar.gz (or its folder cifar-10-batches-py)"),
        "cifar100_lt": ("CIFAR100", "cifar-100-python.tar.gz (or its folder cifar-100-python)")}[name]
    factor = 100 if imb_factor is None else imb_factor
    images, targets, class_names = _torchvision_set(class_name, data_dir, what, train=True)
    test_images, test_targets, _ = _torchvision_set(class_name, data_dir, what, train=False)
    C = len(class_names)  # n_max = n / C and the classes in id order, as LDAM-DRW has it
    kept = cut_to_long_tail(targets, C, factor, n_max=len(targets) / C, order=range(C), seed=seed)
    return Dataset(name, Images(images[kept], targets[kept]), None, Images(test_images, test_targets),
                   class_names, CIFAR_MEAN, CIFAR_STD, 32)


def _fashion_mnist(name, data_dir, imb_factor, seed):
    factor = 100 if imb_factor is None else imb_factor
    what = "the four *-ubyte.gz files in a folder FashionMNIST/raw"
    images, targets, class_names = _torchvision_set("FashionMNIST", data_dir, what, train=True)
    test_images, test_targets, _ = _torchvision_set("FashionMNIST", data_dir, what, train=False)
    kept = cut_to_long_tail(targets, 10, factor, len(targets) / 10, FASHION_ORDER, seed)
    train = Images(_as_rgb(images[kept], border=2), targets[kept])
    test = Images(_as_rgb(test_images, border=2), test_targets)
    return Dataset(name, train, None, test, class_names, *_channel_statistics(train.images), 32)


def _npz(name, path, imb_factor, seed, border=0):
    """Any .npz of x_train y_train x_test y_test [x_val y_val class_names]; cut when a factor is given."""
    if not Path(path).is_file():
        raise ValueError(f"no such file: {path}")
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
    except Exception as reason:  # zipfile, zlib and numpy each raise their own for a damaged file
        why = " ".join(str(reason).split())[:100]
        raise ValueError(f"{path} is not a readable .npz file ({why})") from reason
    missing = [key for key in ("x_train", "y_train", "x_test", "y_test") if key not in arrays]
    if missing or ("x_val" in arrays) != ("y_val" in arrays):
        raise ValueError(f"{path} lacks {', '.join(missing) or 'one of x_val and y_val'}: it must hold "
                         "x_train y_train x_test y_test [x_val y_val class_names]")
    splits = {}
    for part in ("train", "val", "test"):
        if f"x_{part}" not in arrays:
            continue
        images, targets = arrays[f"x_{part}"], arrays[f"y_{part}"]
        if images.dtype != np.uint8 or not (images.ndim == 3 or images.ndim == 4 and images.shape[3] == 3):
            raise ValueError(f"{path}: x_{part} must be uint8 [n, H, W] or [n, H, W, 3], "
                             f"it is {images.dtype} {list(images.shape)}")
        if targets.dtype.kind not in "iu" or targets.shape != images.shape[:1]:
            raise ValueError(f"{path}: y_{part} must be integers [{len(images)}], "
                             f"it is {targets.dtype} {list(targets.shape)}")
        if images.shape[1] != images.shape[2] or images.shape[1:3] != arrays["x_train"].shape[1:3]:
            raise ValueError(f"{path}: x_{part} must hold square images of the size of x_train, "
                             f"they are {images.shape[1]} x {images.shape[2]}")
        splits[part] = Images(_as_rgb(images, border), targets.astype(np.int64))
    train = splits["train"]
    if len(train) == 0:
        raise ValueError(f"{path}: x_train has no images")
    if train.targets.max() >= len(train) and "class_names" not in arrays:  # or a class would have no image
        raise ValueError(f"{path}: y_train holds {train.targets.max()} among only {len(train)} images: class "
                         "ids must be 0..C-1, each with an image")
    names = arrays["class_names"].astype(str).tolist() if "class_names" in arrays else \
        [str(i) for i in range(train.targets.max() + 1)]
    if imb_factor is not None:
        if train.targets.min() < 0 or train.targets.max() >= len(names):
            raise ValueError(f"{path}: y_train must lie in 0..{len(names) - 1}")
        kept = cut_to_long_tail(train.targets, len(names), imb_factor, seed=seed)
        train = train.subset(kept)
    return Dataset(name, train, splits.get("val"), splits["test"], names,
                   *_channel_statistics(train.images), train.images.shape[1])


def _fashion_lt(name, data_dir, imb_factor, seed):
    _refuse_factor(name, imb_factor)
    return _npz(name, ASSETS / "fashion_lt.npz", None, seed, border=2)  # 28 -> 32 pixels


# ---------------------------------------------------------------- builders: image files

def _folder(name, data_dir, imb_factor, seed):
    """DIR/train/CLASS/*.jpg, DIR/test/CLASS/*.jpg, and DIR/val/CLASS/*.jpg where there is one."""
    root = Path(data_dir)
    class_names = _class_folders(root / "train", f"{root}/{{train,test}}/CLASS/*.jpg")
    train, test = (_scan(root / part, class_names) for part in ("train", "test"))
    val = _scan(root / "val", class_names) if (root / "val").is_dir() else None
    whole = Dataset(name, train, val, test, class_names, IMAGENET_MEAN, IMAGENET_STD,
                    _size_shown(train.paths, root / "train"))
    return whole if imb_factor is None else whole.subset(
        cut_to_long_tail(train.targets, len(class_names), imb_factor, seed=seed))


def _first_side(paths):
    """Longer side in pixels of the first of these files that is an image, None where there is none."""
    from PIL import Image
    for path in paths:
        try:
            with Image.open(path) as image:
                return max(image.size)
        except (OSError, SyntaxError, ValueError):  # the loader's business; the next one will do
            continue
    return None


def _size_shown(paths, where):
    """Side in pixels at which a user's own images are shown: their own up to 64 pixels, else 224."""
    side = _first_side(map(os.fsdecode, paths))
    if side is None:
        raise ValueError(f"none of the image files in {where} can be decoded")
    return side if side <= 64 else 224


def _statistics(name):
    return (INAT_MEAN, INAT_STD) if name.startswith("inat") else (IMAGENET_MEAN, IMAGENET_STD)


def _color_jitter(name):
    """.4 as in classifier-balancing@f162ade (ImageNet-LT, Places-LT) and CANDLE (the small sets); none for
    iNaturalist, nor for what is not a data set of a paper."""
    return 0.0 if name == "folder" or name.startswith("inat") else 0.4


# Fixed lists: data set -> what the names of its list files begin with, and the split that all test on
LISTED = {"imagenet_lt": ("ImageNet_LT", "test"), "places_lt": ("Places_LT", "test"),  # OLTR's files
          "inat18": ("iNaturalist18", "val"), "inat17": ("iNaturalist17", "val")}  # classifier-balancing's


def _listed(name, data_dir, imb_factor, seed, train_list=None, test_list=None):
    """DIR/ImageNet_LT_train.txt, ..., paths in them relative to DIR; iNaturalist's also train2018.json, ...

    train_list, test_list: a user's own files instead, for any data set of image files.
    """
    _refuse_factor(name, imb_factor)
    if name not in LISTED and not (train_list and test_list):
        raise ValueError(f"{name} has no list files of its own: give both --train-list and --test-list")
    root, (prefix, tested) = Path(data_dir), LISTED.get(name, ("", ""))

    def listing(part):
        path, official = root / f"{prefix}_{part}.txt", root / f"{part}20{name[4:]}.json"  # train2018.json
        return read_list(official if official.is_file() and not path.is_file() else path)

    train = read_list(train_list) if train_list else listing("train")
    test = read_list(test_list) if test_list else listing(tested)
    # no val for a training list of one's own, which may hold the val list's images
    has_val = tested == "test" and not train_list and (root / f"{prefix}_val.txt").is_file()
    val = listing("val") if has_val else None
    C = check_lists(train, [val, test] if has_val else [test], root,
                    None if train_list else PUBLISHED[name]["classes"])
    class_names = train.class_names
    if class_names is None:  # the images' folders, without the first one, which is the split's
        folder_of = {target: "/".join(path.split("/")[1:-1])
                     for path, target in zip(train.names, train.targets.tolist())}
        class_names = [folder_of[i] for i in range(C)]
        if "" in class_names or len(set(class_names)) < C:
            class_names = [str(i) for i in range(C)]
    train, val, test = (part and _files(part.names, part.targets, root) for part in (train, val, test))
    size = _size_shown(train.paths, data_dir) if name == "folder" else 224
    return Dataset(name, train, val, test, class_names, *_statistics(name), size, _color_jitter(name))


# CANDLE's small data sets: readers of what their archives hold. Each takes the root and what must be there,
# and returns train, val (or None), test (`ImageFiles`) and the class names.

def _torchvision_files(root, what, class_name, training, download=True):
    """One of torchvision's data sets; the splits named in `training` together are the training images."""
    def files(*splits):
        parts = [_torchvision(class_name, root, what, split=split, download=download) for split in splits]
        pairs = [pair for part in parts for pair in (  # StanfordCars has the pairs themselves
            part._samples if hasattr(part, "_samples") else zip(part._image_files, part._labels))]
        images = _files(*zip(*pairs))
        # torchvision knows Flowers102's names since 0.22
        return images, getattr(parts[0], "classes", None) or [str(i) for i in range(images.targets.max() + 1)]

    (train, class_names), (test, _) = files(*training), files("test")
    return train, None, test, class_names


def _caltech101(root, what):
    """The archive has no split: 30 random images of a class are for training, as is usual, the others for
    testing. Which ones is fixed, whatever --subset-seed says."""
    folder = root / "caltech101" / "101_ObjectCategories"
    class_names = _class_folders(folder, what)
    files = _scan(folder, class_names)
    sizes = np.bincount(files.targets, minlength=len(class_names))
    training = np.sort(long_tail_indices(files.targets, np.minimum(sizes, 30), seed=0))
    testing = np.setdiff1d(np.arange(len(files)), training)
    return files.subset(training), None, files.subset(testing), class_names


def _cub200(root, what):
    folder = root / "CUB_200_2011"

    def column(name):
        """What stands behind the ids 1, 2, ... in a file."""
        if not (folder / name).is_file():
            raise ValueError(f"no such file: {folder / name} (looked for {what})")
        rows = [line.split(maxsplit=1) for line in (folder / name).read_text().splitlines()]
        for number, row in enumerate(rows, 1):
            if len(row) != 2 or row[0] != str(number):
                raise ValueError(f"{folder / name}, line {number}: must be `{number} VALUE`")
        return [value for _, value in rows]

    names, labels, is_training = map(column, ("images.txt", "image_class_labels.txt", "train_test_split.txt"))
    if not len(names) == len(labels) == len(is_training):
        raise ValueError(f"images.txt, image_class_labels.txt and train_test_split.txt in {folder} differ in "
                         "their number of lines")
    files = _files(names, np.array(labels, np.int64) - 1, folder / "images")
    training = np.array(is_training) == "1"
    return files.subset(training), None, files.subset(~training), column("classes.txt")


def _stanford_dogs(root, what):
    folder, splits = root / "stanford_dogs", []
    for list_file in (folder / "train_list.mat", folder / "test_list.mat"):
        if not list_file.is_file():
            raise ValueError(f"no such file: {list_file} (looked for {what})")
        # scipy is not required, hence no import statement; `_cut` has looked whether it is there
        content = importlib.import_module("scipy.io").loadmat(list_file, squeeze_me=True)
        names, targets = content["file_list"].tolist(), content["labels"].astype(np.int64) - 1
        splits.append(_files(names, targets, folder / "Images"))
    breed_of = dict(zip(targets.tolist(), (os.path.dirname(name) for name in names)))  # n02085620-Chihuahua
    return splits[0], None, splits[1], [breed_of[i].split("-", 1)[-1] for i in sorted(breed_of)]


def _fruits360(root, what):
    folder = root / "fruits-360-original-size"
    class_names = _class_folders(folder / "Training", what)
    val = _scan(folder / "Validation", class_names) if (folder / "Validation").is_dir() else None
    return _scan(folder / "Training", class_names), val, _scan(folder / "Test", class_names), class_names


# Data set -> reader, imbalance factor, n_max, and what must be in --data-dir. n_max None: the second largest
# class's images, and the classes by size instead of by id (in the dogs' set all have 100).
CUT = {
    "caltech101_lt": (_caltech101, 10, 30, "caltech101/101_ObjectCategories/ of caltech-101.zip"),
    "cub200_lt": (_cub200, 10, 30, "CUB_200_2011/ of CUB_200_2011.tgz"),
    "stanford_dogs_lt": (_stanford_dogs, 10, 100, "stanford_dogs/ with Images/ of images.tar, and "
                         "train_list.mat and test_list.mat of lists.tar"),
    "stanford_cars_lt": (partial(_torchvision_files, class_name="StanfordCars", training=("train",),
                                 download=False), 10, None, "stanford_cars/ with devkit/, cars_train/, "
                         "cars_test/ and cars_test_annos_withlabels.mat"),
    "fgvc_aircraft_lt": (partial(_torchvision_files, class_name="FGVCAircraft", training=("trainval",)),
                         10, 6667 / 100, "fgvc-aircraft-2013b/ of fgvc-aircraft-2013b.tar.gz"),
    "dtd_lt": (partial(_torchvision_files, class_name="DTD", training=("train", "val")),
               10, 80, "dtd/dtd/ of dtd-r1.0.1.tar.gz"),
    "flowers102_lt": (partial(_torchvision_files, class_name="Flowers102", training=("train", "val")),
                      10, 20, "flowers-102/ with jpg/ of 102flowers.tgz, imagelabels.mat and setid.mat"),
    "fruits360_lt": (_fruits360, 100, None,
                     "fruits-360-original-size/ with Training/, Validation/ and Test/"),
}
MATLAB = ("stanford_dogs_lt", "stanford_cars_lt", "flowers102_lt")  # whose splits are MATLAB files


def _cut(name, data_dir, imb_factor, seed):
    reader, factor, n_max, what = CUT[name]
    factor = factor if imb_factor is None else imb_factor
    if name in MATLAB and find_spec("scipy") is None:
        raise ValueError(f"{name}: its split is a MATLAB file, which needs scipy to be read: pip install "
                         "scipy, or give lists of your own (--train-list, --test-list)")
    whole = Dataset(name, *reader(Path(data_dir), what), *_statistics(name), 224, _color_jitter(name))
    for split in (whole.train, whole.test):
        folder = Path(os.fsdecode(split.paths[0])).parent
        if not folder.is_dir():
            raise ValueError(f"no such folder: {folder} ({name} needs {what} in {data_dir})")
    C, order = whole.num_classes, range(whole.num_classes)
    if n_max is None:
        n_max, order = np.sort(whole.class_counts)[-2:][0], None
    return whole.subset(cut_to_long_tail(whole.train.targets, C, factor, n_max, order, seed))


# ---------------------------------------------------------------- load

BUILDERS = {"fashion_lt": _fashion_lt, "cifar10_lt": _cifar, "cifar100_lt": _cifar,
            "fashion_mnist_lt": _fashion_mnist, **dict.fromkeys(LISTED, _listed), **dict.fromkeys(CUT, _cut),
            "folder": _folder}


def load(name, data_dir="data", imb_factor=None, seed=0, train_list=None, test_list=None):
    """Build a long-tailed data set.

    name: a key of `BUILDERS`, or the path of an .npz file. data_dir: where the files are or are downloaded to
    (for "folder": the folder itself). imb_factor: max/min images per class, >= 1; None is the papers' for the
    sets that are cut from a balanced one (100; most of CANDLE's: 10), and no cut for an .npz or a folder.
    seed: which images are kept. train_list, test_list: list files (`read_list`) that take the place of the
    data set's own, paths relative to data_dir. Returns a `Dataset`. Raises ValueError, saying what was wrong
    and what to do.
    """
    if imb_factor is not None:
        long_tail_counts(1, 1, imb_factor)
    is_npz = str(name).endswith(".npz")
    if not is_npz and name not in BUILDERS:
        raise ValueError(f"unknown data set {name!r}; known: {', '.join(BUILDERS)}, or a FILE.npz")
    if train_list or test_list:
        if is_npz or name not in (*LISTED, *CUT, "folder"):
            raise ValueError(f"--train-list and --test-list name image files, which {name} does not have")
        return _listed(name, data_dir, imb_factor, seed, train_list, test_list)
    if is_npz:
        return _npz(str(name), name, imb_factor, seed)
    return BUILDERS[name](name, data_dir, imb_factor, seed)


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


def image_side(name, data_dir="data"):
    """Side in pixels of a data set's images, without reading them all: 224 for the papers' sets of image
    files, an .npz by its header, a folder by its first readable image. None where there is nothing to look at
    (then `load` says what is missing)."""
    if name in LISTED or name in CUT:
        return 224
    if str(name).endswith(".npz") and Path(name).is_file():
        import zipfile
        try:
            with zipfile.ZipFile(name) as archive, archive.open("x_train.npy") as member:
                version = np.lib.format.read_magic(member)
                read = np.lib.format.read_array_header_1_0 if version == (1, 0) else \
                    np.lib.format.read_array_header_2_0
                return int(read(member)[0][1])
        except Exception:  # zipfile, zlib and numpy each raise their own for a damaged file; `load` says so
            return None
    if name == "folder":
        root = Path(data_dir, "train") if Path(data_dir, "train").is_dir() else data_dir  # or own list files
        return _first_side(os.path.join(folder, file) for folder, _, files in os.walk(root)
                           for file in sorted(files) if file.lower().endswith(IMAGE_ENDINGS))
    return None


# ---------------------------------------------------------------- python -m common.data

# What is known of each data set as published: classes, images of each split, of the largest and the smallest
# class, classes in groups (many, medium, few), and, of the lists that OLTR and classifier-balancing hand out,
# the SHA-256 of all the counts (little-endian int64, in the order of the ids).
PUBLISHED = {
    "fashion_lt": dict(classes=10, train=2478, val=1000, test=2000, largest=1000, smallest=10,
                       groups=(5, 3, 2)),
    "cifar10_lt": dict(classes=10, train=12406, test=10000, largest=5000, smallest=50, groups=(8, 2, 0)),
    "cifar100_lt": dict(classes=100, train=10847, test=10000, largest=500, smallest=5, groups=(35, 35, 30)),
    "fashion_mnist_lt": dict(classes=10, train=14886, test=10000, largest=6000, smallest=60,
                             groups=(8, 2, 0)),
    "imagenet_lt": dict(classes=1000, train=115846, val=20000, test=50000, largest=1280, smallest=5,
                        groups=(385, 479, 136), counts="3d8c615a8d2def22"),
    "places_lt": dict(classes=365, train=62500, val=7300, test=36500, largest=4980, smallest=5,
                      groups=(131, 163, 71), counts="e0663b33a6ba6420"),
    "inat18": dict(classes=8142, train=437513, test=24426, largest=1000, smallest=2,
                   groups=(842, 4076, 3224), counts="3be97525765c81d1"),
    "inat17": dict(classes=5089, train=579184, test=95986),
    "caltech101_lt": dict(classes=102, train=1151, test=6084, largest=30, smallest=3, groups=(0, 18, 84)),
    "cub200_lt": dict(classes=200, train=2253, test=5794, largest=30, smallest=3, groups=(0, 36, 164)),
    "stanford_dogs_lt": dict(classes=120, train=4646, test=8580, largest=100, smallest=10,
                             groups=(0, 84, 36)),
    "stanford_cars_lt": dict(classes=196, test=8041),
    "fgvc_aircraft_lt": dict(classes=100, train=2564, test=3333, largest=66, smallest=6, groups=(0, 52, 48)),
    "dtd_lt": dict(classes=47, train=1457, test=1880, largest=80, smallest=8, groups=(0, 28, 19)),
    "flowers102_lt": dict(classes=102, train=753, test=6149, largest=20, smallest=2, groups=(0, 1, 101)),
    "fruits360_lt": dict(classes=24),
}


def facts(data):
    """What `PUBLISHED` holds, of this data set."""
    counts = data.class_counts
    return dict(classes=data.num_classes, train=len(data.train), val=len(data.val or ()), test=len(data.test),
                largest=int(counts.max()), smallest=int(counts.min()),
                groups=(int((counts > 100).sum()), int(((counts >= 20) & (counts <= 100)).sum()),
                        int((counts < 20).sum())),
                counts=hashlib.sha256(counts.astype("<i8").tobytes()).hexdigest()[:16])


def _look_at(paths, fast):
    """What is wrong with some image files, and the summed histograms [3, 256] of the others, each image's
    pixels counting 1 in all. fast: only see whether they are there."""
    wrong, histograms = [], np.zeros((3, 256))
    for path in map(os.fsdecode, paths):
        if not os.path.isfile(path):
            wrong.append(f"no such file: {path}")
        elif not fast:
            try:
                image = read_image(path)
                histograms += np.reshape(image.histogram(), (3, 256)) / (image.width * image.height)
            except ValueError as reason:
                wrong.append(f"cannot decode {reason}")
    return wrong, histograms


def check(data, published=None, fast=False, workers=1):
    """Look at every file of a data set, compare its numbers with the published ones, and print what it has.

    published: a row of `PUBLISHED` or None. fast: do not decode the files. workers: threads that decode
    (PIL's codecs run side by side). Returns a list of what is wrong, a line each.
    """
    found, wrong = facts(data), []
    print("{name}: {classes} classes, {train} training images ({largest}..{smallest} a class), {val} val, "
          "{test} test; {groups[0]} many, {groups[1]} medium, {groups[2]} few"
          .format(name=data.name, **found), flush=True)
    for key, value in (published or {}).items():
        if found[key] != value and not (key == "val" and not found["val"]):  # nobody needs the val list
            wrong.append(f"{key}: {found[key]}, published: {value}" if key != "counts" else
                         "the images per class are not the published ones, class by class")
    histograms = np.zeros((3, 256))
    for part in ("train", "val", "test"):
        split = getattr(data, part)
        if not isinstance(split, ImageFiles):
            continue
        paths, times = np.unique(split.paths, return_counts=True)
        wrong += [f"{part}: {os.fsdecode(path)} is there twice" for path in paths[times > 1]]
        chunks = [paths[i:i + 64] for i in range(0, len(paths), 64)]
        with ThreadPoolExecutor(max(workers, 1)) as pool, \
                tqdm(total=len(paths), desc=part, unit="file", disable=None) as bar:
            for chunk, (bad, some) in zip(chunks, pool.map(lambda chunk: _look_at(chunk, fast), chunks)):
                wrong += [f"{part}: {line}" for line in bad]
                histograms += some if part == "train" else 0
                bar.update(len(chunk))
    decoded = isinstance(data.train, Images)
    if decoded or histograms.any():
        moments = _channel_statistics(data.train.images) if decoded else _moments(histograms)
        shown = [" ".join(f"{value:.3f}" for value in values) for values in (*moments, data.mean, data.std)]
        print("mean {} and standard deviation {} of the training images; the nets see them minus {}, over {}"
              .format(*shown))
    return wrong


def main(argv=None):
    """The command. Returns its exit code: 0, 1 where something is wrong, 2 where there is no data set."""
    def fail(message):
        print(f"error: {' '.join(str(message).split())}", file=sys.stderr, flush=True)
        sys.exit(2)
    parser = argparse.ArgumentParser("python -m common.data", allow_abbrev=False,
                                     description="Check a data set: files, counts, groups, mean, deviation.")
    parser.error = fail
    parser.add_argument("name", help=f"{', '.join(BUILDERS)}, or FILE.npz")
    parser.add_argument("--data-dir", default="data", help="where the data set is")
    parser.add_argument("--imb-factor", type=float, help="largest class / smallest class, at least 1")
    parser.add_argument("--subset-seed", type=int, default=0, help="which images are kept")
    parser.add_argument("--train-list", help="list file of your own; paths relative to --data-dir")
    parser.add_argument("--test-list", help="list file of your own; paths relative to --data-dir")
    parser.add_argument("--fast", action="store_true", help="do not decode the files")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="threads that decode")
    args = parser.parse_args(argv)
    try:
        data = load(args.name, args.data_dir, args.imb_factor, args.subset_seed, args.train_list,
                    args.test_list)
    except (ValueError, ImportError) as reason:
        fail(reason)
    own = args.train_list or args.test_list or args.imb_factor is not None
    published = None if own else PUBLISHED.get(args.name)
    if published is None or "largest" not in published:
        print("note: there are no published images per class to compare with")
    wrong = check(data, published, args.fast, args.workers)
    if wrong:
        print(f"{len(wrong)} things are wrong" + (", the first ten:" if len(wrong) > 10 else ":"))
        print("\n".join(wrong[:10]))
        return 1
    print("every file is there" + (" (not decoded)" if args.fast else " and decodes"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
