"""A builder for each data set, and the numbers that are published of it.

A builder takes the data set's name, --data-dir, the imbalance factor (None: the papers') and the subset's
seed, and returns a `Dataset`.
"""
import importlib
import math
import os
import statistics
import zipfile
from functools import partial
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common.files import (MissingFile, check_lists, class_folders, composed, image_names, numbering_advice,
                          read_list, scan, side_of)
from common.longtail import (Dataset, Images, as_rgb, channel_statistics, cut_to_long_tail, image_files,
                             long_tail_indices, note)

ASSETS = Path(__file__).parent / "assets"
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
INAT_MEAN, INAT_STD = (0.466, 0.471, 0.380), (0.195, 0.194, 0.192)  # classifier-balancing@f162ade, iNat18
# LDAM-DRW@2536330 and MiSLAS@0fc381e normalise both CIFAR sets with these
CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
# Head to tail. Look-alikes (T-shirt 0 and shirt 6, coat 4 and pullover 2, sandal 5 and sneaker 7) stand at
# opposite ends; in the order of the ids the three tail classes would be the three easiest.
FASHION_ORDER = (0, 5, 4, 1, 9, 3, 7, 2, 8, 6)


class Own(NamedTuple):
    """What a user says of image files of their own, or of the order of classes.

    train_list, test_list: list files (`read_list`) in place of the data set's own, paths relative to
    data_dir. test_fraction: of the images of each class, drawn by seed, for a folder without test/, or a
    train_list without test_list. class_names: the order of the classes, where an .npz, a folder or lists have
    just these in another one; it counts before anything is drawn.
    """
    train_list: str = None
    test_list: str = None
    test_fraction: float = None
    class_names: list = None


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
        raise MissingFile(f"{class_name} is not in {data_dir} and could not be downloaded "
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
    train = Images(as_rgb(images[kept], border=2), targets[kept])
    test = Images(as_rgb(test_images, border=2), test_targets)
    return Dataset(name, train, None, test, class_names, *channel_statistics(train.images), 32)


ARRAYS = ("x_train", "y_train", "x_val", "y_val", "x_test", "y_test", "class_names")


def build_npz(name, path, imb_factor, seed, own=Own(), border=0):
    """Any .npz of x_train y_train x_test y_test [x_val y_val class_names]; cut when a factor is given."""
    if not Path(path).is_file():
        raise MissingFile(f"no such file: {path}")
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files if key in ARRAYS}  # others can be large
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
        if not 0 < images.shape[1] == images.shape[2] == arrays["x_train"].shape[1]:
            raise ValueError(f"{path}: x_{part} must hold square images of the size of x_train, "
                             f"they are {images.shape[1]} x {images.shape[2]}")
        splits[part] = Images(as_rgb(images, border), targets.astype(np.int64))

    train = splits["train"]
    if len(train) == 0:
        raise ValueError(f"{path}: x_train has no images")

    labels = np.unique(train.targets)
    if labels[0] > 0 or "class_names" not in arrays and labels[-1] >= len(labels):
        raise ValueError(f"{path}: {numbering_advice(labels)}")
    names = list(map(composed, arrays["class_names"].astype(str).tolist())) if "class_names" in arrays else \
        [str(i) for i in range(train.targets.max() + 1)]
    if len(set(names)) < len(names):
        raise ValueError(f"{path}: two classes in class_names have the same name")

    unknown = (0.0,) * 3, (1.0,) * 3  # mean and deviation, before the cut
    data = Dataset(name, train, splits.get("val"), splits["test"], names, *unknown, train.images.shape[1])
    data = data.in_class_order(own.class_names)
    if imb_factor is not None:
        data = data.subset(cut_to_long_tail(data.train.targets, len(names), imb_factor, seed=seed))
    data.mean, data.std = map(tuple, channel_statistics(data.train.images))
    return data


def _fashion_lt(name, data_dir, imb_factor, seed):
    _refuse_factor(name, imb_factor)
    return build_npz(name, ASSETS / "fashion_lt.npz", None, seed, border=2)  # 28 -> 32 pixels


# ---------------------------------------------------------------- builders: image files

def _scanned(folder, class_names):
    """`ImageFiles` of FOLDER/CLASS/*.jpg; says what else lies there."""
    paths, targets, left_out = scan(folder, class_names)
    counted = []
    for what, files in left_out.items():
        if files:  # the first few by name
            names = [os.path.relpath(path, folder) for path in files[:5]]
            counted.append(f"{what}: {len(files)} ({', '.join(names)}{', ...' if files[5:] else ''})")
    if counted:
        note(f"{folder} holds more than is read: {'; '.join(counted)}")
    return image_files(paths, targets)


def build_folder(name, data_dir, imb_factor, seed, own=Own()):
    """DIR/train/CLASS/*.jpg, DIR/test/CLASS/*.jpg, and DIR/val/CLASS/*.jpg where there is one. With
    own.test_fraction, where there is no DIR/test, they may lie in DIR/CLASS, too."""
    root, test = Path(data_dir), None
    training = root / "train" if own.test_fraction is None else _training_folder(root)
    class_names = sorted({composed(name) for name in class_folders(
        training, f"{root}/{{train,test}}/CLASS/*.jpg; for {root}/CLASS/*.jpg give --test-fraction 0.2")})
    train = _scanned(training, class_names)

    if own.test_fraction is None:
        if not (root / "test").is_dir():
            raise MissingFile(f"no such folder: {root / 'test'} (--test-fraction 0.2 sets images of each "
                              "class aside)")
        test = _scanned(root / "test", class_names)
    elif (root / "test").is_dir():
        raise ValueError(f"there is a folder {root / 'test'}: leave out --test-fraction")

    val = _scanned(root / "val", class_names) if (root / "val").is_dir() and training != root else None
    data = Dataset(name, train, val, test, class_names, IMAGENET_MEAN, IMAGENET_STD,
                   _size_shown(name, data_dir)).in_class_order(own.class_names)
    if own.test_fraction:
        data = _set_aside(data, own.test_fraction, seed)
    return data if imb_factor is None else data.subset(
        cut_to_long_tail(data.train.targets, len(class_names), imb_factor, seed=seed))


def _training_folder(root):
    return root / "train" if (root / "train").is_dir() else root


def _set_aside(data, fraction, seed):
    """A data set without test images, with them: that fraction of each class's training images, at least one
    of them, never all."""
    files, sizes = data.train, data.class_counts
    taken = np.minimum(np.maximum(np.rint(fraction * sizes).astype(int), 1), np.maximum(sizes - 1, 0))
    testing = np.sort(long_tail_indices(files.targets, taken, seed))
    single = (sizes == 1).sum()
    note(f"{len(testing)} of {len(files)} images are set aside for testing ({fraction:g} of each class, "
         f"drawn by --subset-seed {seed})"
         + (f"; {single} classes have a single image, for training" if single else ""))
    train = files.subset(np.setdiff1d(np.arange(len(files)), testing))
    return data.with_splits(train, data.val, files.subset(testing))


def image_side(name, data_dir="data", train_list=None):
    """Side in pixels of a data set's images, without reading them all: 224 for the papers' sets of image
    files, an .npz by its header, a folder or a list by the median of the longer sides of 3 images of each
    class (of 100 classes). None where there is nothing to look at (then `load` says what is missing)."""
    if name in LISTED or name in CUT:
        return 224
    if str(name).endswith(".npz"):
        shape = _npz_shape(name)
        return shape and shape[1]
    if name != "folder":
        return None

    sides = []
    try:
        for files in _files_by_class(data_dir, train_list):
            sides += islice(filter(None, map(side_of, files)), 3)
    except (OSError, ValueError):
        return None
    return statistics.median_low(sides) if sides else None


def count_images(name, data_dir="data", train_list=None):
    """Training images of an .npz, a folder or a list, without reading them, before --imb-factor cuts them.
    None for the papers' sets, and where there is nothing to look at."""
    try:
        if str(name).endswith(".npz"):
            return _npz_shape(name)[0]
        return len(training_files(data_dir, train_list)) if train_list or name == "folder" else None
    except (OSError, ValueError, TypeError):
        return None


def training_files(data_dir, train_list=None):
    """Paths of all training images of a folder or a list. Raises ValueError, OSError."""
    if train_list:
        return [os.path.join(data_dir, name) for name in read_list(train_list).names]
    root = _training_folder(Path(data_dir))
    return [path for c in class_folders(root) for path in image_names(root / c)[0]]


def _files_by_class(data_dir, train_list):
    """Paths of the training images of at most 100 classes, evenly spread, a class at a time."""
    if train_list:
        listing = read_list(train_list)
        classes = np.unique(listing.targets)
    else:
        root = _training_folder(Path(data_dir))
        classes = class_folders(root)
    for c in classes[::math.ceil(len(classes) / 100)]:
        if train_list:
            yield (os.path.join(data_dir, listing.names[i]) for i in np.flatnonzero(listing.targets == c))
        else:
            yield image_names(root / c)[0]


def _npz_shape(path):
    """Of an .npz file's training images, by its header; None where that cannot be read."""
    if not Path(path).is_file():  # a pipe would keep its reader waiting
        return None
    try:
        with zipfile.ZipFile(path) as archive, archive.open("x_train.npy") as member:
            version = np.lib.format.read_magic(member)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else \
                np.lib.format.read_array_header_2_0
            shape = read(member)[0]
            return shape if len(shape) > 2 else None
    except Exception:  # zipfile, zlib and numpy each raise their own for a damaged file; `load` says so
        return None


def _size_shown(name, data_dir, train_list=None):
    """Side in pixels at which a user's own images are shown: their own up to 64 pixels, else 224."""
    side = image_side(name, data_dir, train_list)
    if side is None:
        raise ValueError(f"none of the image files in {train_list or data_dir} can be decoded")
    note(f"the longer side of the images looked at is {side} pixels (median)")
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


def build_listed(name, data_dir, imb_factor, seed, own=Own()):
    """DIR/ImageNet_LT_train.txt, ..., paths in them relative to DIR; iNaturalist's also train2018.json, ...
    own: a user's lists instead, for any data set of image files."""
    _refuse_factor(name, imb_factor)
    train_list, test_list, test_fraction, _ = own
    if name not in LISTED and not (train_list and (test_list or test_fraction)):
        raise ValueError(f"{name} has no list files of its own: give both --train-list and --test-list (or "
                         "--test-fraction)")
    root, (prefix, tested) = Path(data_dir), LISTED.get(name, ("", ""))

    def listing(part):
        path, official = root / f"{prefix}_{part}.txt", root / f"{part}20{name[4:]}.json"  # train2018.json
        return read_list(official if official.is_file() and not path.is_file() else path)

    train = read_list(train_list) if train_list else listing("train")
    test = None if test_fraction else read_list(test_list) if test_list else listing(tested)
    # no val for a training list of one's own, which may hold the val list's images
    has_val = tested == "test" and not train_list and (root / f"{prefix}_val.txt").is_file()
    val = listing("val") if has_val else None

    C = check_lists(train, [part for part in (val, test) if part], root,
                    None if train_list else PUBLISHED[name]["classes"])
    class_names = list(map(composed, train.class_names or _folder_names(train, C)))
    if len(class_names) != C:
        raise ValueError(f"{train.file} has {C} classes, but names for {len(class_names)}")
    if len(set(class_names)) < C:
        raise ValueError(f"{train.file}: two classes have the same name")

    train, val, test = (part and image_files(part.names, part.targets, root) for part in (train, val, test))
    size = _size_shown(name, data_dir, train_list) if name == "folder" else 224
    data = Dataset(name, train, val, test, class_names, *_statistics(name), size, _color_jitter(name))
    data = data.in_class_order(own.class_names)
    return _set_aside(data, test_fraction, seed) if test_fraction else data


def _folder_names(listing, num_classes):
    """The folder of each class's images, without the first of several, which is the split's. Numbers where
    that does not tell the classes apart."""
    folders = [path.split("/")[:-1] for path in listing.names]
    pairs = {(target, composed("/".join(folder[1:] or folder)))
             for target, folder in zip(listing.targets.tolist(), folders)}
    names = [name for _, name in sorted(pairs)]
    return names if "" not in names and len(set(names)) == len(names) == num_classes else \
        [str(i) for i in range(num_classes)]


# CANDLE's small data sets: readers of what their archives hold. Each takes the root and what must be there,
# and returns train, val (or None), test (`ImageFiles`) and the class names.

def _torchvision_files(root, what, class_name, training, download=True):
    """One of torchvision's data sets; the splits named in `training` together are the training images."""
    def files(*splits):
        parts = [_torchvision(class_name, root, what, split=split, download=download) for split in splits]
        pairs = [pair for part in parts for pair in (  # StanfordCars has the pairs themselves
            part._samples if hasattr(part, "_samples") else zip(part._image_files, part._labels))]
        images = image_files(*zip(*pairs))
        # torchvision knows Flowers102's names since 0.22
        return images, getattr(parts[0], "classes", None) or [str(i) for i in range(images.targets.max() + 1)]

    (train, class_names), (test, _) = files(*training), files("test")
    return train, None, test, class_names


def _caltech101(root, what):
    """The archive has no split: 30 random images of a class are for training, as is usual, the others for
    testing. Which ones is fixed, whatever --subset-seed says."""
    folder = root / "caltech101" / "101_ObjectCategories"
    class_names = class_folders(folder, what)
    files = _scanned(folder, class_names)
    sizes = np.bincount(files.targets, minlength=len(class_names))
    training = np.sort(long_tail_indices(files.targets, np.minimum(sizes, 30), seed=0))
    testing = np.setdiff1d(np.arange(len(files)), training)
    return files.subset(training), None, files.subset(testing), class_names


def _cub200(root, what):
    folder = root / "CUB_200_2011"

    def column(name):
        """What stands behind the ids 1, 2, ... in a file."""
        if not (folder / name).is_file():
            raise MissingFile(f"no such file: {folder / name} (looked for {what})")
        rows = [line.split(maxsplit=1) for line in (folder / name).read_text().splitlines()]
        for number, row in enumerate(rows, 1):
            if len(row) != 2 or row[0] != str(number):
                raise ValueError(f"{folder / name}, line {number}: must be `{number} VALUE`")
        return [value for _, value in rows]

    names, labels, is_training = map(column, ("images.txt", "image_class_labels.txt", "train_test_split.txt"))
    if not len(names) == len(labels) == len(is_training):
        raise ValueError(f"images.txt, image_class_labels.txt and train_test_split.txt in {folder} differ in "
                         "their number of lines")
    files = image_files(names, np.array(labels, np.int64) - 1, folder / "images")
    training = np.array(is_training) == "1"
    return files.subset(training), None, files.subset(~training), column("classes.txt")


def _stanford_dogs(root, what):
    folder, splits = root / "stanford_dogs", []
    for list_file in (folder / "train_list.mat", folder / "test_list.mat"):
        if not list_file.is_file():
            raise MissingFile(f"no such file: {list_file} (looked for {what})")
        # scipy is not required, hence no import statement; `_cut` has looked whether it is there
        content = importlib.import_module("scipy.io").loadmat(list_file, squeeze_me=True)
        names, targets = content["file_list"].tolist(), content["labels"].astype(np.int64) - 1
        splits.append(image_files(names, targets, folder / "Images"))
    breed_of = dict(zip(targets.tolist(), (os.path.dirname(name) for name in names)))  # n02085620-Chihuahua
    return splits[0], None, splits[1], [breed_of[i].split("-", 1)[-1] for i in sorted(breed_of)]


def _fruits360(root, what):
    folder = root / "fruits-360-original-size"
    class_names = class_folders(folder / "Training", what)
    train, test = (_scanned(folder / part, class_names) for part in ("Training", "Test"))
    val = _scanned(folder / "Validation", class_names) if (folder / "Validation").is_dir() else None
    return train, val, test, class_names


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
            raise MissingFile(f"no such folder: {folder} ({name} needs {what} in {data_dir})")
    C, order = whole.num_classes, range(whole.num_classes)
    if n_max is None:
        n_max, order = np.sort(whole.class_counts)[-2:][0], None
    return whole.subset(cut_to_long_tail(whole.train.targets, C, factor, n_max, order, seed))


BUILDERS = {"fashion_lt": _fashion_lt, "cifar10_lt": _cifar, "cifar100_lt": _cifar,
            "fashion_mnist_lt": _fashion_mnist, **dict.fromkeys(LISTED, build_listed),
            **dict.fromkeys(CUT, _cut), "folder": build_folder}

# Where each data set is had
OLTR = "the lists from https://github.com/zhmiao/OpenLongTailRecognition-OLTR"
SOURCES = {
    "cifar10_lt": "https://www.cs.toronto.edu/~kriz/cifar.html",
    "cifar100_lt": "https://www.cs.toronto.edu/~kriz/cifar.html",
    "fashion_mnist_lt": "https://github.com/zalandoresearch/fashion-mnist",
    "imagenet_lt": f"https://image-net.org (ILSVRC2012), {OLTR}",
    "places_lt": f"http://places2.csail.mit.edu/download.html (Places365-Standard), {OLTR}",
    "inat18": "https://github.com/visipedia/inat_comp/tree/master/2018",
    "inat17": "https://github.com/visipedia/inat_comp/tree/master/2017",
    "caltech101_lt": "https://data.caltech.edu/records/mzrjq-6wc02",
    "cub200_lt": "https://data.caltech.edu/records/65de6-vp158",
    "stanford_dogs_lt": "http://vision.stanford.edu/aditya86/ImageNetDogs",
    "stanford_cars_lt": "https://github.com/pytorch/vision/issues/7545 (the original page is gone)",
    "fgvc_aircraft_lt": "https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft",
    "dtd_lt": "https://www.robots.ox.ac.uk/~vgg/data/dtd",
    "flowers102_lt": "https://www.robots.ox.ac.uk/~vgg/data/flowers/102",
    "fruits360_lt": "https://www.kaggle.com/datasets/moltean/fruits (fruits-360-original-size)",
}


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
