"""What a long-tailed data set is: counts, subsets, and a builder for each data set.

`load(name)` returns a `Dataset` with `.train`, `.val` (or None) and `.test`. A split is either `Images`
(decoded, one uint8 array in memory) or `ImageFiles` (paths, decoded by the loader's workers); both have
`.targets`. Class ids are the data set's own and are not sorted by frequency.
"""
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ASSETS = Path(__file__).parent / "assets"
IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".webp")
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
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


@dataclass
class ImageFiles:
    """A split of image files. paths: bytes [n] in one flat array, which workers share; targets: int64 [n]."""
    paths: np.ndarray
    targets: np.ndarray

    def __len__(self):
        return len(self.targets)


class Dataset:
    """A long-tailed data set.

    train, val (or None), test: `Images` or `ImageFiles`. class_counts: int64 [C], training images per class.
    class_names: C strings. mean, std: per channel, for pixels in [0, 1]. image_size: side in pixels that the
    nets see. Raises ValueError for a class without a training image, or a label out of range.
    """

    def __init__(self, name, train, val, test, class_names, mean, std, image_size):
        self.name, self.train, self.val, self.test = name, train, val, test
        self.class_names, self.num_classes = list(class_names), len(class_names)
        self.mean, self.std, self.image_size = tuple(mean), tuple(std), image_size
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
    values = np.arange(256) / 255
    means = [float(h @ values / h.sum()) for h in histograms]
    stds = [float(np.sqrt(h @ (values - m) ** 2 / h.sum())) or 1.0 for h, m in zip(histograms, means)]
    return means, stds


# ---------------------------------------------------------------- builders, one per data set

def _refuse_factor(name, imb_factor):
    if imb_factor is not None:
        raise ValueError(f"--imb-factor does not apply to {name}: it is a fixed list of images")


def _torchvision_set(class_name, data_dir, what, train):
    """The images (numpy) and targets of one of torchvision's small data sets; downloads what is missing."""
    import torchvision
    try:
        part = getattr(torchvision.datasets, class_name)(str(data_dir), train=train, download=True)
    except Exception as reason:  # torchvision raises URLError, RuntimeError, ... for one and the same cause
        raise ValueError(f"{class_name} is not in {data_dir} and could not be downloaded "
                         f"({' '.join(str(reason).split())[:100]}); put {what} there") from reason
    return np.asarray(part.data), np.asarray(part.targets), part.classes


def _cifar(name, data_dir, imb_factor, seed):
    class_name, what = {
        "cifar10_lt": ("CIFAR10", "cifar-10-python.tar.gz (or its folder cifar-10-batches-py)"),
        "cifar100_lt": ("CIFAR100", "cifar-100-python.tar.gz (or its folder cifar-100-python)")}[name]
    factor = 100 if imb_factor is None else imb_factor
    long_tail_counts(1, 1, factor)  # a bad factor is refused before anything is downloaded
    images, targets, class_names = _torchvision_set(class_name, data_dir, what, train=True)
    test_images, test_targets, _ = _torchvision_set(class_name, data_dir, what, train=False)
    C = len(class_names)  # n_max = n / C and the classes in id order, as LDAM-DRW has it
    kept = cut_to_long_tail(targets, C, factor, n_max=len(targets) / C, order=range(C), seed=seed)
    return Dataset(name, Images(images[kept], targets[kept]), None, Images(test_images, test_targets),
                   class_names, CIFAR_MEAN, CIFAR_STD, 32)


def _fashion_mnist(name, data_dir, imb_factor, seed):
    factor = 100 if imb_factor is None else imb_factor
    long_tail_counts(1, 1, factor)
    what = "the four *-ubyte.gz files in a folder FashionMNIST/raw"
    images, targets, class_names = _torchvision_set("FashionMNIST", data_dir, what, train=True)
    test_images, test_targets, _ = _torchvision_set("FashionMNIST", data_dir, what, train=False)
    kept = cut_to_long_tail(targets, 10, factor, len(targets) / 10, FASHION_ORDER, seed)
    train = _as_rgb(images[kept], border=2)
    test = Images(_as_rgb(test_images, border=2), test_targets)
    train = Images(train, targets[kept])
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
        train = Images(train.images[kept], train.targets[kept])
    return Dataset(name, train, splits.get("val"), splits["test"], names,
                   *_channel_statistics(train.images), train.images.shape[1])


def _fashion_lt(name, data_dir, imb_factor, seed):
    _refuse_factor(name, imb_factor)
    return _npz(name, ASSETS / "fashion_lt.npz", None, seed, border=2)  # 28 -> 32 pixels


def _folder(name, data_dir, imb_factor, seed):
    """DIR/train/CLASS/*.jpg, DIR/test/CLASS/*.jpg, and DIR/val/CLASS/*.jpg where there is one."""
    root = Path(data_dir)
    for part in ("train", "test"):
        if not (root / part).is_dir():
            raise ValueError(f"no such folder: {root / part} (looked for {root}/{{train,test}}/CLASS/*.jpg)")
    class_names = sorted(entry.name for entry in os.scandir(root / "train") if entry.is_dir())
    if not class_names:
        raise ValueError(f"no class folders in {root / 'train'}")
    ids = {class_name: i for i, class_name in enumerate(class_names)}
    splits = {}
    for part in ("train", "val", "test"):
        if not (root / part).is_dir():
            continue
        paths, targets = [], []
        for class_folder in sorted(entry for entry in (root / part).iterdir() if entry.is_dir()):
            if class_folder.name not in ids:
                raise ValueError(f"{class_folder} is a class that {root / 'train'} does not have")
            files = sorted(f for f in class_folder.iterdir() if f.suffix.lower() in IMAGE_ENDINGS)
            paths += [os.fsencode(f) for f in files]
            targets += [ids[class_folder.name]] * len(files)
        if not paths:
            raise ValueError(f"no image files in {root / part}")
        splits[part] = ImageFiles(np.array(paths), np.array(targets, np.int64))
    train = splits["train"]
    if imb_factor is not None:
        kept = cut_to_long_tail(train.targets, len(class_names), imb_factor, seed=seed)
        train = ImageFiles(train.paths[kept], train.targets[kept])
    size = image_side("folder", data_dir)
    if size is None:
        raise ValueError(f"none of the image files in {root / 'train'} can be decoded")
    return Dataset(name, train, splits.get("val"), splits["test"], class_names, IMAGENET_MEAN, IMAGENET_STD,
                   size if size <= 64 else 224)


BUILDERS = {"fashion_lt": _fashion_lt, "cifar10_lt": _cifar, "cifar100_lt": _cifar,
            "fashion_mnist_lt": _fashion_mnist, "folder": _folder}


def load(name, data_dir="data", imb_factor=None, seed=0):
    """Build a long-tailed data set.

    name: a key of `BUILDERS`, or the path of an .npz file. data_dir: where the files are or are downloaded to
    (for "folder": the folder itself). imb_factor: max/min images per class, >= 1; None is 100 for the sets
    that are cut from a balanced one, and no cut for an .npz or a folder. seed: which images are kept.
    Returns a `Dataset`. Raises ValueError, saying what was wrong and what to do.
    """
    if imb_factor is not None:
        long_tail_counts(1, 1, imb_factor)
    if str(name).endswith(".npz"):
        return _npz(str(name), name, imb_factor, seed)
    if name not in BUILDERS:
        raise ValueError(f"unknown data set {name!r}; known: {', '.join(BUILDERS)}, or a FILE.npz")
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
    if isinstance(data.train, Images):
        train = Images(data.train.images[kept], targets[kept])
    else:
        train = ImageFiles(data.train.paths[kept], targets[kept])
    return Dataset(data.name, train, data.val, data.test, data.class_names, data.mean, data.std,
                   data.image_size)


def image_side(name, data_dir="data"):
    """Side in pixels of a user's own images, without reading them all: an .npz by its header, a folder by its
    first readable image. None where there is nothing to look at (then `load` says what is missing)."""
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
    if name == "folder" and (Path(data_dir) / "train").is_dir():
        for class_folder in sorted((Path(data_dir) / "train").iterdir()):
            for path in sorted(class_folder.iterdir()) if class_folder.is_dir() else []:
                if path.suffix.lower() in IMAGE_ENDINGS:
                    from PIL import Image
                    try:
                        with Image.open(path) as image:
                            return max(image.size)
                    except (OSError, SyntaxError, ValueError):  # the loader's business; the next one will do
                        continue
    return None
