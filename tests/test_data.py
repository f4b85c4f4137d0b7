"""The room common/data.py (and common/assets/make.py): counts, subsets, every builder, the embedded set."""
import gzip
import hashlib
import multiprocessing
import os
import pickle
import re
import shutil
import struct
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.assets import make
from common.data import (ASSETS, BUILDERS, CUT, FASHION_ORDER, LISTED, MATLAB, SOURCES, Dataset, Images,
                         cut_to_long_tail, fingerprint, image_side, leave_out_unreadable, load,
                         long_tail_counts, long_tail_indices, main, write_lists)
from common.flags import Parser
from tests.tiny import tiny_npz

DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")


def ldam_drw_indices(targets, counts, seed=0):
    """LDAM-DRW's gen_imbalanced_data written again: numpy's global generator, seeded once."""
    state = np.random.get_state()
    np.random.seed(seed)
    kept = []
    for class_id in range(len(counts)):
        indices = np.where(np.asarray(targets) == class_id)[0]
        np.random.shuffle(indices)
        kept += indices[:counts[class_id]].tolist()
    np.random.set_state(state)
    return kept


def md5_of(path):
    return hashlib.md5(path.read_bytes()).hexdigest()


# ---------------------------------------------------------------- counts and subsets

# candle.md, section 3: what the builders of LDAM-DRW and MiSLAS give
TOTALS = {10: (20431, 19573), 20: (17023, 15907), 50: (13996, 12608), 100: (12406, 10847), 200: (11203, 9502)}
CIFAR10_COUNTS = {10: [5000, 3871, 2997, 2320, 1796, 1391, 1077, 834, 645, 500],
                  50: [5000, 3237, 2096, 1357, 878, 568, 368, 238, 154, 100],
                  100: [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50],
                  200: [5000, 2775, 1540, 854, 474, 263, 146, 81, 45, 25]}
CIFAR100_SMALLEST = {10: 50, 50: 10, 100: 5, 200: 2}


@pytest.mark.parametrize("factor", TOTALS)
def test_cifar_totals_are_the_published_ones(factor):
    assert sum(long_tail_counts(10, 5000, factor)) == TOTALS[factor][0]
    assert sum(long_tail_counts(100, 500, factor)) == TOTALS[factor][1]


@pytest.mark.parametrize("factor", CIFAR10_COUNTS)
def test_cifar_counts_are_the_published_ones(factor):
    assert long_tail_counts(10, 5000, factor) == CIFAR10_COUNTS[factor]
    assert long_tail_counts(100, 500, factor)[-1] == CIFAR100_SMALLEST[factor]


def test_counts_at_the_edges():
    assert long_tail_counts(1, 7.9, 100) == [7]  # no division by C - 1 = 0
    assert long_tail_counts(4, 9, 1) == [9, 9, 9, 9]
    assert long_tail_counts(2, 10.5, 10) == [10, 1]  # a fractional n_max is floored at the end: 10.5 and 1.05
    assert all(type(count) is int for count in long_tail_counts(3, 20, 10))


@pytest.mark.parametrize("num_classes, n_max, factor", [
    (10, 100, 0.99), (10, 100, -5), (10, 100, 0), (10, 100, float("nan")), (0, 100, 10), (-1, 100, 10),
    (10, 0, 10), (10, -3, 10), (10, 0.5, 10), (10, float("nan"), 10), (10, float("inf"), 10)])
def test_bad_counts_are_refused(num_classes, n_max, factor):
    with pytest.raises(ValueError):
        long_tail_counts(num_classes, n_max, factor)


@pytest.mark.parametrize("counts", [[9, 6, 4, 2, 1], [2, 9, 1, 6, 4], [0, 3, 0, 0, 9]])
@pytest.mark.parametrize("seed", [0, 5])
def test_indices_are_those_of_ldam_drw(counts, seed):
    targets = np.random.RandomState(3).permutation(np.repeat(np.arange(5), [9, 12, 9, 10, 11]))
    expected = ldam_drw_indices(targets, counts, seed)
    assert long_tail_indices(targets, counts, seed).tolist() == expected
    assert long_tail_indices(targets.tolist(), counts, seed).tolist() == expected


def test_indices_default_to_seed_0_and_leave_numpys_global_generator_alone():
    targets = np.arange(60) % 3
    np.random.seed(11)
    expected = np.random.rand()
    np.random.seed(11)
    kept = long_tail_indices(targets, [9, 3, 1])
    assert np.random.rand() == expected
    assert kept.tolist() == ldam_drw_indices(targets, [9, 3, 1], seed=0)


@pytest.mark.parametrize("counts", [[3, 2], [-1, 2], [1, 1, 1]])
def test_a_count_that_the_class_does_not_have_is_refused(counts):
    with pytest.raises(ValueError, match="class"):
        long_tail_indices([0, 0, 1, 1], counts)


def test_a_cut_gives_the_counts_to_the_classes_by_size_and_ties_by_id():
    targets = np.repeat([0, 1, 2, 3], [20, 60, 40, 40])
    kept = cut_to_long_tail(targets, 4, 27)
    counts = np.bincount(targets[kept])
    rule = long_tail_counts(4, 60, 27)
    assert counts.tolist() == [rule[3], rule[0], rule[1], rule[2]]
    assert kept.tolist() == ldam_drw_indices(targets, counts)


def test_a_class_with_too_few_images_keeps_all_and_is_reported_once(capsys):
    targets = np.repeat([0, 1, 2], [60, 5, 40])
    kept = cut_to_long_tail(targets, 3, 4)
    assert np.bincount(targets[kept]).tolist() == [60, 5, 30]  # the rule asks class 1 for 15
    assert capsys.readouterr().out.count("note:") == 1
    cut_to_long_tail(targets, 3, 60)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("sizes", [[10, 10, 10], [49, 30, 49], [7, 9, 8]])
def test_a_factor_that_empties_a_class_is_named_with_the_largest_that_works(sizes):
    targets = np.repeat([0, 1, 2], sizes)
    with pytest.raises(ValueError, match="--imb-factor 100, with") as caught:
        cut_to_long_tail(targets, 3, 100)
    works = int(re.search(r"at most --imb-factor (\d+) works", str(caught.value))[1])
    assert np.bincount(targets[cut_to_long_tail(targets, 3, works)], minlength=3).min() == 1
    with pytest.raises(ValueError):
        cut_to_long_tail(targets, 3, works + 1)


# ---------------------------------------------------------------- CIFAR and Fashion-MNIST on disk

def write_cifar(folder, classes, per_class, monkeypatch, seed=1):
    """Files as cs.toronto.edu distributes them. Returns images [n, 32, 32, 3] and labels of both parts.

    torchvision compares each file with an MD5 sum; those of these files take the place of the real ones.
    """
    import torchvision
    cls = torchvision.datasets.CIFAR10 if classes == 10 else torchvision.datasets.CIFAR100
    rng = np.random.RandomState(seed)
    base = folder / cls.base_folder
    base.mkdir(parents=True)
    key, names = ("labels", cls.meta["key"]) if classes == 10 else ("fine_labels", cls.meta["key"])

    def write(list_name, sizes):
        labels = rng.permutation(np.repeat(np.arange(classes), sizes))
        rows = rng.randint(0, 256, (len(labels), 3072), np.uint8)
        sums = []
        files = [name for name, _ in getattr(cls, list_name)]
        for name, some in zip(files, np.array_split(np.arange(len(labels)), len(files))):
            (base / name).write_bytes(pickle.dumps({"data": rows[some], key: labels[some].tolist()}, 2))
            sums.append([name, md5_of(base / name)])
        monkeypatch.setattr(cls, list_name, sums)
        # A row is the red plane, the green one, the blue one, each row by row
        images = np.stack([rows[:, 1024 * c:1024 * (c + 1)].reshape(-1, 32, 32) for c in range(3)], axis=3)
        return images, labels

    train, test = write("train_list", per_class), write("test_list", 3)
    meta = base / cls.meta["filename"]
    meta.write_bytes(pickle.dumps({names: [f"class {i}" for i in range(classes)]}, 2))
    monkeypatch.setattr(cls, "meta", {**cls.meta, "md5": md5_of(meta)})
    return train, test


def test_cifar10_lt_keeps_ldam_drws_images_at_factor_100(tmp_path, monkeypatch):
    # 1200 images, not quite balanced: n_max is n / C = 120, not the 150 of class 3
    sizes = [120, 120, 120, 150, 120, 120, 120, 90, 120, 120]
    (images, labels), (test_images, test_labels) = write_cifar(tmp_path, 10, sizes, monkeypatch)
    data = load("cifar10_lt", tmp_path)
    counts = long_tail_counts(10, 120, 100)
    kept = ldam_drw_indices(labels, counts)
    assert data.class_counts.tolist() == counts
    assert data.train.targets.tolist() == labels[kept].tolist()
    assert np.array_equal(data.train.images, images[kept])
    assert np.array_equal(data.test.images, test_images)  # the test split stays whole, in its order
    assert np.array_equal(data.test.targets, test_labels)
    assert data.val is None and data.image_size == 32 and data.num_classes == 10
    assert data.class_names == [f"class {i}" for i in range(10)]
    # LDAM-DRW's transforms.Normalize
    assert data.mean == (0.4914, 0.4822, 0.4465) and data.std == (0.2023, 0.1994, 0.2010)
    other = load("cifar10_lt", tmp_path, imb_factor=10, seed=1)
    kept = ldam_drw_indices(labels, long_tail_counts(10, 120, 10), seed=1)
    assert np.array_equal(other.train.images, images[kept])


def test_cifar100_lt_uses_the_fine_labels_and_the_factor_given(tmp_path, monkeypatch):
    (images, labels), (test_images, test_labels) = write_cifar(tmp_path, 100, [12] * 100, monkeypatch)
    data = load("cifar100_lt", tmp_path, imb_factor=10)
    kept = ldam_drw_indices(labels, long_tail_counts(100, 12, 10))
    assert np.array_equal(data.train.images, images[kept])
    assert data.class_counts.tolist() == long_tail_counts(100, 12, 10)
    assert np.array_equal(data.test.images, test_images) and np.array_equal(data.test.targets, test_labels)
    assert data.mean == (0.4914, 0.4822, 0.4465) and data.std == (0.2023, 0.1994, 0.2010)


def idx_gz(path, array):
    """An array as yann.lecun.com's idx: two zero bytes, 8 for uint8, the rank, the sizes in big endian."""
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    path.write_bytes(gzip.compress(header + array.astype(np.uint8).tobytes(), 1))


def write_fashion_mnist(folder, train_sizes, test_sizes, seed=2):
    """The four files of Fashion-MNIST with random images. Returns images and labels of both parts."""
    rng = np.random.RandomState(seed)
    folder.mkdir(parents=True, exist_ok=True)
    parts = []
    for prefix, sizes in (("train", train_sizes), ("t10k", test_sizes)):
        labels = rng.permutation(np.repeat(np.arange(10), sizes))
        images = np.zeros((len(labels), 28, 28), np.uint8)
        # Random where it matters, blank elsewhere: small files, and the first pixels tell every image apart
        images[:, 13:16] = rng.randint(0, 256, (len(labels), 3, 28), np.uint8)
        idx_gz(folder / f"{prefix}-images-idx3-ubyte.gz", images)
        idx_gz(folder / f"{prefix}-labels-idx1-ubyte.gz", labels)
        parts.append((images, labels))
    return parts


def test_fashion_mnist_lt_is_cut_in_the_embedded_sets_order(tmp_path, monkeypatch):
    import torchvision
    raw = tmp_path / "FashionMNIST" / "raw"
    (images, labels), (test_images, test_labels) = write_fashion_mnist(raw, [120] * 10, [3] * 10)
    monkeypatch.setattr(torchvision.datasets.FashionMNIST, "resources", [
        (name, md5_of(raw / name)) for name, _ in torchvision.datasets.FashionMNIST.resources])
    data = load("fashion_mnist_lt", tmp_path)
    counts = np.zeros(10, int)
    counts[[0, 5, 4, 1, 9, 3, 7, 2, 8, 6]] = long_tail_counts(10, 120, 100)
    kept = ldam_drw_indices(labels, counts)
    assert data.class_counts.tolist() == counts.tolist()
    assert np.array_equal(data.train.targets, labels[kept])
    for channel in range(3):
        assert np.array_equal(data.train.images[:, 2:30, 2:30, channel], images[kept])
        assert np.array_equal(data.test.images[:, 2:30, 2:30, channel], test_images)
    assert np.array_equal(data.test.targets, test_labels)
    assert data.train.images.shape[1:] == data.test.images.shape[1:] == (32, 32, 3)
    assert data.class_names[0] == "T-shirt/top" and data.image_size == 32
    pixels = data.train.images / 255  # the statistics are of the training images as the nets see them
    assert np.allclose(data.mean, pixels.mean((0, 1, 2)), rtol=0, atol=1e-9)
    assert np.allclose(data.std, pixels.std((0, 1, 2)), rtol=0, atol=1e-9)


OFFLINE = {"cifar10_lt": ("cifar-10-python.tar.gz", "cifar-10-batches-py"),
           "cifar100_lt": ("cifar-100-python.tar.gz", "cifar-100-python"),
           "fashion_mnist_lt": ("ubyte.gz", "FashionMNIST/raw")}


# ---------------------------------------------------------------- npz

def arrays_of(shape=(8, 8), seed=0):
    rng = np.random.RandomState(seed)
    return {"x_train": rng.randint(0, 256, (6, *shape), np.uint8), "y_train": np.array([0, 1, 2, 0, 1, 0]),
            "x_test": rng.randint(0, 256, (4, *shape), np.uint8), "y_test": np.array([2, 1, 0, 2])}


def test_a_grey_npz_becomes_three_equal_channels(tmp_path):
    arrays = arrays_of()
    np.savez(tmp_path / "a.npz", **arrays)
    data = load(str(tmp_path / "a.npz"))
    assert data.val is None and data.num_classes == 3 and data.image_size == 8
    assert data.class_names == ["0", "1", "2"]
    assert data.class_counts.tolist() == [3, 2, 1] and data.class_counts.dtype == np.int64
    for part in ("train", "test"):
        split = getattr(data, part)
        assert split.images.dtype == np.uint8 and split.targets.dtype == np.int64
        assert split.images.shape == (*arrays[f"x_{part}"].shape, 3)
        assert all(np.array_equal(split.images[..., c], arrays[f"x_{part}"]) for c in range(3))
        assert np.array_equal(split.targets, arrays[f"y_{part}"])


def test_a_colour_npz_with_val_and_class_names_is_taken_as_it_is(tmp_path):
    arrays = arrays_of((8, 8, 3))
    extra = arrays_of((8, 8, 3), seed=1)
    arrays.update(x_val=extra["x_test"], y_val=extra["y_test"].astype(np.uint8),
                  class_names=np.array(["cat", "dog", "eel"]))
    np.savez_compressed(tmp_path / "a.npz", **arrays)
    data = load(tmp_path / "a.npz")
    for part in ("train", "val", "test"):
        assert np.array_equal(getattr(data, part).images, arrays[f"x_{part}"])
        assert np.array_equal(getattr(data, part).targets, arrays[f"y_{part}"])
    assert data.class_names == ["cat", "dog", "eel"]
    pixels = arrays["x_train"] / 255
    assert np.allclose(data.mean, pixels.mean((0, 1, 2))) and np.allclose(data.std, pixels.std((0, 1, 2)))


def test_an_npz_is_cut_by_size_rank_only_when_a_factor_is_given(tmp_path):
    rng = np.random.RandomState(0)
    labels = rng.permutation(np.repeat([0, 1, 2], [20, 60, 40]))  # ids are not sorted by size
    images = rng.randint(0, 256, (120, 4, 4), np.uint8)
    np.savez(tmp_path / "a.npz", x_train=images, y_train=labels, x_test=images[:5], y_test=labels[:5])
    path = str(tmp_path / "a.npz")
    assert load(path).class_counts.tolist() == [20, 60, 40]
    data = load(path, imb_factor=4, seed=3)
    assert data.class_counts.tolist() == [15, 60, 30]
    kept = ldam_drw_indices(labels, [15, 60, 30], seed=3)
    assert np.array_equal(data.train.images[..., 0], images[kept])
    assert len(data.test) == 5
    with pytest.raises(ValueError, match="no training image"):  # 60 / 100 leaves the rarest class nothing
        load(path, imb_factor=100)


def change(**replaced):
    return lambda arrays: {**arrays, **{key: new(arrays) for key, new in replaced.items()}}


BAD_NPZ = {
    "float images": change(x_train=lambda a: a["x_train"].astype(np.float32)),
    "int64 test images": change(x_test=lambda a: a["x_test"].astype(np.int64)),
    "flat images": change(x_train=lambda a: a["x_train"].reshape(6, -1)),
    "four channels": change(x_train=lambda a: np.zeros((6, 8, 8, 4), np.uint8)),
    "channels first": change(x_train=lambda a: np.zeros((6, 3, 8, 8), np.uint8)),
    "not square": change(x_train=lambda a: a["x_train"][:, :5]),
    "test images of another size": change(x_test=lambda a: a["x_test"][:, :5, :5]),
    "float labels": change(y_train=lambda a: a["y_train"].astype(np.float64)),
    "text labels": change(y_train=lambda a: a["y_train"].astype(str)),
    "labels of another length": change(y_train=lambda a: a["y_train"][:5]),
    "one-hot labels": change(y_train=lambda a: np.eye(3, dtype=np.int64)[a["y_train"]]),
    "negative label": change(y_train=lambda a: a["y_train"] - 1),
    "negative labels only": change(y_train=lambda a: a["y_train"] - 9),
    "negative test label": change(y_test=lambda a: a["y_test"] - 1),
    "absurd label": change(y_train=lambda a: a["y_train"] * 10 ** 15),  # more class names than memory holds
    "test label out of range": change(y_test=lambda a: a["y_test"] + 1),
    "label beyond class_names": change(class_names=lambda a: np.array(["a", "b"])),
    "class without a training image": change(y_train=lambda a: np.array([0, 3, 2, 0, 3, 0])),
    "class name without a training image": change(class_names=lambda a: np.array(["a", "b", "c", "d"])),
    "x_val without y_val": change(x_val=lambda a: a["x_test"]),
    "y_val without x_val": change(y_val=lambda a: a["y_test"]),
    "val label out of range": change(x_val=lambda a: a["x_test"], y_val=lambda a: a["y_test"] + 7),
    "no training images": change(x_train=lambda a: a["x_train"][:0], y_train=lambda a: a["y_train"][:0]),
    "no test images": change(x_test=lambda a: a["x_test"][:0], y_test=lambda a: a["y_test"][:0]),
    "pickled labels": change(y_train=lambda a: a["y_train"].astype(object)),
    **{f"no {key}": (lambda a, key=key: {k: v for k, v in a.items() if k != key}) for key in arrays_of()},
}


@pytest.mark.parametrize("factor", [None, 1])
@pytest.mark.parametrize("fault", BAD_NPZ)
def test_a_bad_npz_is_refused_by_name(tmp_path, fault, factor):
    path = tmp_path / "bad.npz"
    np.savez(path, **BAD_NPZ[fault](arrays_of()))
    with pytest.raises(ValueError, match=re.escape(str(path))):
        load(str(path), imb_factor=factor)


def test_a_damaged_npz_is_refused_by_name(tmp_path):
    good, bad = tmp_path / "good.npz", tmp_path / "bad.npz"
    np.savez_compressed(good, **arrays_of())
    whole = good.read_bytes()
    flipped = bytearray(whole)
    flipped[whole.index(b"x_train.npy") + 60] ^= 255  # inside the compressed image data
    for damaged in (b"", b"not a zip", whole[:len(whole) // 2], bytes(flipped)):
        bad.write_bytes(damaged)
        with pytest.raises(ValueError, match=re.escape(str(bad))):
            load(str(bad))
    np.save(tmp_path / "array.npy", np.zeros(3))
    (tmp_path / "array.npy").rename(bad)  # numpy opens it, but it is one array, not an archive
    with pytest.raises(ValueError, match=re.escape(str(bad))):
        load(str(bad))
    with pytest.raises(ValueError, match="missing.npz"):
        load(str(tmp_path / "missing.npz"))


# ---------------------------------------------------------------- folder

def write_tree(root, sizes, parts=("train", "test"), side=(20, 12)):
    """PNG files root/PART/CLASS/i.png, their red value the class and green value the number."""
    for part in parts:
        for class_id, (class_name, size) in enumerate(sizes.items()):
            folder = root / part / class_name
            folder.mkdir(parents=True)
            for i in range(size if part == "train" else 2):
                Image.new("RGB", side, (class_id, i, 0)).save(folder / f"{i}.png")
    return root


def names_of(split):
    return [os.fsdecode(path) for path in split.paths]


def test_a_folder_gives_every_image_its_class(tmp_path):
    write_tree(tmp_path, {"zebra": 2, "ant": 5, "bee": 3}, ("train", "val", "test"))
    (tmp_path / "train" / "ant" / "notes.txt").write_text("not an image")
    (tmp_path / "train" / "ant" / "4.png").rename(tmp_path / "train" / "ant" / "4.PNG")
    data = load("folder", tmp_path)
    assert data.class_names == ["ant", "bee", "zebra"]
    assert data.class_counts.tolist() == [5, 3, 2]  # as it is: no cut without a factor
    assert (len(data.train), len(data.val), len(data.test)) == (10, 6, 6)
    for part in ("train", "val", "test"):
        split = getattr(data, part)
        for path, target in zip(names_of(split), split.targets):
            assert path.startswith(str(tmp_path / part / data.class_names[target]))
    assert sorted(names_of(data.train)) == sorted(str(f) for f in (tmp_path / "train").rglob("*.[pP]*"))
    assert data.image_size == 20  # small images keep their size, by the longer side
    assert load("folder", write_tree(tmp_path / "b", {"a": 1, "b": 1})).val is None


def test_a_folder_is_cut_with_its_largest_class_as_n_max(tmp_path):
    write_tree(tmp_path, {"a": 3, "b": 9, "c": 8})
    whole, cut = load("folder", tmp_path), load("folder", tmp_path, imb_factor=9)
    assert cut.class_counts.tolist() == [1, 9, 3]
    kept = ldam_drw_indices(whole.train.targets, [1, 9, 3])
    assert names_of(cut.train) == [names_of(whole.train)[i] for i in kept]
    assert names_of(cut.test) == names_of(whole.test)


def test_large_images_are_shown_at_224_pixels_and_it_is_said(tmp_path, capsys):
    for name, side, shown in (("a", 65, 224), ("b", 64, 64)):
        root = write_tree(tmp_path / name, {"a": 1, "b": 1}, side=(10, side))
        assert load("folder", root).image_size == shown
        assert f"looked at is {side} (median): they are shown at {shown} pixels" in capsys.readouterr().out


def test_bad_folders_are_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / "nowhere"))):
        load("folder", tmp_path / "nowhere")
    write_tree(tmp_path / "no_test", {"a": 1}, ("train",))
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / "no_test" / "test"))):
        load("folder", tmp_path / "no_test")
    root = write_tree(tmp_path / "unknown", {"a": 1})
    (root / "test" / "stranger").mkdir()
    with pytest.raises(ValueError, match="stranger"):
        load("folder", root)
    root = write_tree(tmp_path / "empty_class", {"a": 1})
    (root / "train" / "hollow").mkdir()
    with pytest.raises(ValueError, match="hollow"):
        load("folder", root)
    (tmp_path / "empty" / "train").mkdir(parents=True)
    (tmp_path / "empty" / "test").mkdir()
    with pytest.raises(ValueError, match="class folders"):
        load("folder", tmp_path / "empty")


def test_a_folder_whose_first_image_is_damaged_is_no_traceback(tmp_path):
    # What --skip-bad-images is for; the size must then come from another image, or the error be a ValueError
    root = write_tree(tmp_path, {"a": 3, "b": 3})
    (root / "train" / "a" / "0.png").write_bytes(b"junk")
    assert load("folder", root).image_size == 20
    for path in root.rglob("train/*/*.png"):
        path.write_bytes(b"junk")
    with pytest.raises(ValueError, match="none of the image files in .* can be decoded"):
        load("folder", root)


# ---------------------------------------------------------------- a test split of one's own, lists of it

SIZES = {"zebra": 1, "ant": 10, "bee": 2, "cat": 25}


def test_a_fraction_of_each_class_is_set_aside_for_testing(tmp_path, capsys):
    root = write_tree(tmp_path, SIZES, ("train",))
    data = load("folder", root, test_fraction=0.2)
    assert data.class_names == ["ant", "bee", "cat", "zebra"]
    assert np.bincount(data.test.targets, minlength=4).tolist() == [2, 1, 5, 0]  # never all of a class
    assert data.class_counts.tolist() == [8, 1, 20, 1]
    assert "8 of 38 images are set aside for testing (0.2 of each class, drawn by --subset-seed 0); 1 " \
        "classes have a single image" in capsys.readouterr().out
    train, test = names_of(data.train), names_of(data.test)
    assert not set(train) & set(test) and len(set(train + test)) == 38
    assert names_of(load("folder", root, test_fraction=0.2).test) == test
    assert names_of(load("folder", root, test_fraction=0.2, seed=1).test) != test
    (root / "train").rename(root / "other")  # the classes' folders may lie in --data-dir itself
    assert len(load("folder", root / "other", test_fraction=0.2).test) == 8


def test_a_fraction_is_refused_where_it_has_no_sense(tmp_path):
    root = write_tree(tmp_path, SIZES)
    with pytest.raises(ValueError, match="there is a folder .*test: leave out --test-fraction"):
        load("folder", root, test_fraction=0.2)
    shutil.rmtree(root / "test")
    with pytest.raises(ValueError, match=r"no such folder: .*test \(--test-fraction 0.2 sets"):
        load("folder", root)
    for fraction in (0, 1, -0.2, 7, float("nan")):
        with pytest.raises(ValueError, match="--test-fraction must lie between 0 and 1"):
            load("folder", root, test_fraction=fraction)
    for name, lists in (("fashion_lt", {}), ("imagenet_lt", {}), ("a.npz", {}),
                        ("folder", {"test_list": "a.txt"})):
        with pytest.raises(ValueError, match="--test-fraction is for images without a test split"):
            load(name, root, test_fraction=0.2, **lists)


@pytest.mark.parametrize("data_dir", ["given", None])
def test_written_lists_load_as_the_same_data_set(tmp_path, data_dir):
    root = write_tree(tmp_path / "set of mine", {**SIZES, "b\udcff é": 3, "deep/er": 2}, ("train",))
    data = load("folder", root, test_fraction=0.2)
    written = write_lists(data, tmp_path / "run", root if data_dir else None)
    assert written == (str(tmp_path / "run" / "train_list.txt"), str(tmp_path / "run" / "test_list.txt"),
                       str(root if data_dir else root / "train"))
    train_list, test_list, data_dir = written
    listed = load("folder", data_dir, train_list=train_list, test_list=test_list)
    for part in ("train", "test"):
        ours, theirs = getattr(data, part), getattr(listed, part)
        assert names_of(ours) == names_of(theirs) and ours.targets.tolist() == theirs.targets.tolist()
    assert listed.class_names == data.class_names and listed.image_size == data.image_size
    assert fingerprint(listed) == fingerprint(data)
    split = load("folder", data_dir, train_list=train_list, test_fraction=0.5)
    assert np.bincount(split.test.targets, minlength=6).tolist() == [4, 0, 1, 10, 0, 0]


def test_names_that_cannot_stand_in_a_list_are_refused(tmp_path):
    root = write_tree(tmp_path / "set", {"a": 2, "b": 2})
    (root / "train" / "a" / "0.png").rename(root / "train" / "a" / "0\n.png")
    with pytest.raises(ValueError, match="0.n.png' cannot stand in a list"):
        write_lists(load("folder", root), tmp_path / "run", root)
    with pytest.raises(ValueError, match="has no image files"):
        write_lists(load("fashion_lt"), tmp_path / "run")


# ---------------------------------------------------------------- the same data or not

def test_a_fingerprint_is_of_what_is_in_a_data_set_not_of_where_it_lies(tmp_path, monkeypatch):
    write_tree(tmp_path / "a", {"ant": 3, "bee": 2})
    shutil.copytree(tmp_path / "a", tmp_path / "deep" / "er" / "b")
    monkeypatch.chdir(tmp_path)
    found = {fingerprint(load("folder", root)) for root in (tmp_path / "a", "a", "deep/er/b", "a/../a")}
    assert len(found) == 1 and re.fullmatch("[0-9a-f]{32,}", found.pop())
    arrays = arrays_of()
    np.savez(tmp_path / "x.npz", **arrays)
    np.savez_compressed(tmp_path / "deep" / "y.npz", **arrays)
    assert fingerprint(load("x.npz")) == fingerprint(load(tmp_path / "deep" / "y.npz"))


def test_a_fingerprint_sees_names_labels_pixels_and_files(tmp_path):
    arrays = {**arrays_of(), "class_names": np.array(["a", "b", "c"])}
    flipped = arrays["x_test"].copy()
    flipped[1, 2, 3] ^= 1
    variants = [arrays, {**arrays, "class_names": np.array(["b", "a", "c"])}, {**arrays, "x_test": flipped},
                {**arrays, "y_train": arrays["y_train"][[1, 0, 2, 3, 4, 5]]},
                {**arrays, "y_test": arrays["y_test"][::-1][[1, 0, 2, 3]]},
                {**arrays, "x_val": arrays["x_test"], "y_val": arrays["y_test"]}]
    found = []
    for i, variant in enumerate(variants):
        np.savez(tmp_path / f"{i}.npz", **variant)
        found.append(fingerprint(load(tmp_path / f"{i}.npz")))
    root = write_tree(tmp_path / "tree", {"ant": 3, "bee": 2})
    found.append(fingerprint(load("folder", root)))
    (root / "train" / "ant" / "0.png").rename(root / "train" / "ant" / "00.png")
    found.append(fingerprint(load("folder", root)))
    assert len(set(found)) == len(found)


def test_a_class_order_that_is_asked_for_counts_before_anything_is_drawn(tmp_path):
    tiny_arrays = np.load(tiny_npz(tmp_path / "tiny.npz"))
    names, order = np.array(list("abcde")), np.array([3, 0, 4, 2, 1])
    for by_class in (False, True):  # images stored class by class lie otherwise in another order of classes
        for new_order in (np.arange(5), order):
            arrays = {"class_names": names[new_order]}
            for part in ("train", "test"):
                x, y = tiny_arrays[f"x_{part}"], new_order.argsort()[tiny_arrays[f"y_{part}"]]
                stored = y.argsort(kind="stable") if by_class else np.arange(len(y))
                arrays |= {f"x_{part}": x[stored], f"y_{part}": y[stored]}
            np.savez(tmp_path / f"{new_order[0]}.npz", **arrays)
        first, second = (load(str(tmp_path / f"{i}.npz"), imb_factor=20, class_names=list("abcde"))
                         for i in (0, 3))
        assert fingerprint(first) == fingerprint(second) and second.class_names == list("abcde")
        assert (first.mean, first.std) == (second.mean, second.std)
    root = write_tree(tmp_path / "set", {"a": 4, "b": 6, "c": 5}, parts=("train",))
    lines = {name: [f"train/{name}/{i}.png" for i in range(size)] for name, size in zip("abc", (4, 6, 5))}
    found = [load("folder", root, test_fraction=0.4, class_names=["c", "a", "b"])]
    for new_order in ("abc", "cab", "bca"):
        (tmp_path / "list.txt").write_text("".join(
            f"{path} {new_order.index(name)}\n" for name in new_order for path in lines[name]))
        found.append(load("folder", root, train_list=tmp_path / "list.txt", test_fraction=0.4,
                          class_names=["c", "a", "b"]))
    assert len(set(map(fingerprint, found))) == 1 and found[0].class_counts.tolist() == [3, 2, 4]
    assert load("folder", root, test_fraction=0.4, class_names=["c", "a"]).class_names == ["a", "b", "c"]


# ---------------------------------------------------------------- files that cannot be read

def test_unreadable_files_do_not_count(tmp_path, capsys):
    sizes = {"a": 6, "b": 4, "c": 2}
    root = write_tree(tmp_path, {name: 2 * size for name, size in sizes.items()})
    for i, path in enumerate(sorted((root / "train").rglob("*.png"))):
        if i % 2:  # the same number of each class
            path.write_bytes(path.read_bytes()[:40] if i % 4 == 1 else b"")
    (root / "test" / "a" / "0.png").write_bytes(b"junk")
    whole = load("folder", root)
    data = leave_out_unreadable(whole, workers=2)
    assert whole.class_counts.tolist() == [12, 8, 4] and data.class_counts.tolist() == [6, 4, 2]
    assert len(data.test) == 5 and data.class_names == whole.class_names
    shown = capsys.readouterr().out
    assert "13 unreadable image files are left out" in shown and shown.count("train: cannot decode ") == 12
    assert f"test: cannot decode {root}/test/a/0.png: " in shown
    assert leave_out_unreadable(data) is data and "left out" not in capsys.readouterr().out
    embedded = load("fashion_lt")
    assert leave_out_unreadable(embedded) is embedded


@pytest.mark.parametrize("emptied, message", [("train/b", r"class 1 \(b\) has no training image"),
                                              ("test", "the test split has no images")])
def test_a_class_or_split_of_which_nothing_is_left_is_one_line(tmp_path, emptied, message):
    root = write_tree(tmp_path, {"a": 2, "b": 2})
    for path in (root / emptied).rglob("*.png"):
        path.write_bytes(b"junk")
    with pytest.raises(ValueError, match=f"{message}.*without its unreadable files; the first is"):
        leave_out_unreadable(load("folder", root))


def test_readable_files_are_looked_at_once(tmp_path, monkeypatch, capsys):
    from common import data as room
    root, cache, read = write_tree(tmp_path / "set", {"a": 3, "b": 3}), tmp_path / "runs" / "readable", []
    real = room.read_image
    monkeypatch.setattr(room, "read_image", lambda path: read.append(path) or real(path))
    (root / "train" / "a" / "0.png").write_bytes(b"junk")
    looked_at = lambda: (read.clear(), leave_out_unreadable(load("folder", root), cache=cache), sorted(
        os.path.relpath(path, root) for path in read))[2]
    assert len(looked_at()) == 10
    assert looked_at() == ["train/a/0.png"]  # only what could not be read
    shutil.copy(root / "train" / "a" / "1.png", root / "train" / "a" / "0.png")
    (root / "test" / "b" / "1.png").write_bytes(b"damaged later")
    assert looked_at() == ["test/b/1.png", "train/a/0.png"]
    cache.write_bytes(cache.read_bytes()[:50])
    capsys.readouterr()
    assert len(looked_at()) == 10 and "is damaged" in capsys.readouterr().out
    assert [path.name for path in cache.parent.iterdir()] == ["readable"]


def test_a_recipe_is_chosen_by_what_can_be_read(tmp_path, monkeypatch):
    root = write_tree(tmp_path / "set", {"a": 5, "b": 4})
    (tmp_path / "list.txt").write_text("".join(f"train/a/{i}.png 0\n" for i in range(5)))
    for i in range(3):
        (root / "train" / "a" / f"{i}.png").write_bytes(b"junk")
    monkeypatch.chdir(tmp_path)
    flags = ["--dataset", "folder", "--data-dir", str(root), "--out", "run"]
    for more, n in (([], 9), (["--skip-bad-images"], 6), (["--train-list", "list.txt"], 5),
                    (["--train-list", "list.txt", "--skip-bad-images"], 2)):
        args = Parser("A method.", {"small": {"epochs": 1}}).parse_args([*flags, *more])
        assert args.recipe_why == f"{n} images of 20 pixels" and args.epochs == -(-2500 // n)
    assert (tmp_path / "run.readable.npy").exists()  # the run itself need not look again


def test_of_two_processes_one_looks_at_the_files_while_the_other_waits(tmp_path, monkeypatch):
    from common import data as room
    paths = load("folder", write_tree(tmp_path / "set", {"a": 4, "b": 3})).train.paths

    def slowly(path):
        with open(tmp_path / "read", "a") as file:
            file.write("x")
        time.sleep(0.02)
        return Image.new("RGB", (4, 4))
    monkeypatch.setattr(room, "read_image", slowly)
    context = multiprocessing.get_context("fork")
    both = [context.Process(target=room.find_unreadable, args=(paths, 1, tmp_path / "cache")) for _ in "ab"]
    for process in both:
        process.start()
    for process in both:
        process.join()
    assert (tmp_path / "read").read_text() == "x" * 7


# ---------------------------------------------------------------- load and image_side

def test_an_unknown_data_set_is_told_the_known_ones():
    with pytest.raises(ValueError, match="mnist_of_mars") as caught:
        load("mnist_of_mars")
    assert all(name in str(caught.value) for name in BUILDERS)
    assert {"fashion_lt", "cifar10_lt", "cifar100_lt", "fashion_mnist_lt", "folder"} <= set(BUILDERS)


@pytest.mark.parametrize("name", [*OFFLINE, *LISTED, *CUT])
def test_without_files_and_network_one_line_says_what_to_put_where(name, tmp_path, monkeypatch, capsys):
    for variable in ("http_proxy", "https_proxy"):  # a closed port refuses at once: no network, for urllib
        monkeypatch.setenv(variable, "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.setattr("common.builders.find_spec", lambda package: True)
    start, folder = time.monotonic(), tmp_path / "data"
    with pytest.raises(SystemExit):
        main([name, "--data-dir", str(folder)])
    error = capsys.readouterr().err
    assert time.monotonic() - start < 30
    assert error.startswith("error: ") and error.rstrip().endswith(f"{name} is had from {SOURCES[name]}")
    assert set(SOURCES) == {*BUILDERS} - {"fashion_lt", "folder"}
    if name not in MATLAB:
        assert error.count("\n") == 1 and str(folder) in error
    words = OFFLINE.get(name, [CUT[name][3]] if name in CUT and name not in MATLAB else [])
    assert all(what in error for what in words)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize("factor", [0.5, -1, float("nan")])
@pytest.mark.parametrize("name", ["cifar10_lt", "cifar100_lt", "fashion_mnist_lt", "fashion_lt", "folder",
                                  "a.npz"])
def test_a_factor_below_1_is_refused_before_anything_is_read(name, factor, tmp_path):
    with pytest.raises(ValueError, match="imbalance factor"):
        load(name, tmp_path / "nowhere", imb_factor=factor)
    assert not list(tmp_path.iterdir())


def test_the_embedded_set_takes_no_factor():
    with pytest.raises(ValueError, match="fashion_lt"):
        load("fashion_lt", imb_factor=100)


@pytest.mark.parametrize("part", ["train", "val", "test"])
def test_a_data_set_refuses_labels_out_of_range_and_empty_splits(part):
    def split(targets):
        return Images(np.zeros((len(targets), 4, 4, 3), np.uint8), np.array(targets, np.int64))
    for bad in ([0, 2], [0, -1], []):
        splits = {"train": split([0, 1]), "val": split([1]), "test": split([0]), part: split(bad)}
        with pytest.raises(ValueError, match=part):
            Dataset("tiny", *splits.values(), ["a", "b"], (0, 0, 0), (1, 1, 1), 4)


def test_image_side_reads_an_npz_by_its_header(tmp_path):
    for shape, save in (((9, 9), np.savez), ((17, 17, 3), np.savez_compressed)):
        save(tmp_path / "a.npz", **arrays_of(shape))
        assert image_side(str(tmp_path / "a.npz")) == shape[0]
    (tmp_path / "b.npz").write_bytes(b"not a zip")
    np.savez(tmp_path / "c.npz", x_test=np.zeros((2, 5, 5), np.uint8))
    for nothing in ("b.npz", "c.npz", "missing.npz"):  # load will say what is wrong with them
        assert image_side(str(tmp_path / nothing)) is None


def test_image_side_leaves_a_damaged_npz_to_load(tmp_path):
    path = tmp_path / "a.npz"
    np.savez_compressed(path, **arrays_of())
    damaged = bytearray(path.read_bytes())
    start = damaged.index(b"x_train.npy") + len("x_train.npy") + 20  # behind its name and zip64 field
    damaged[start:start + 4] = b"\xff" * 4  # no deflate block begins so
    path.write_bytes(damaged)
    assert image_side(str(path)) is None
    with pytest.raises(ValueError, match=re.escape(str(path))):
        load(str(path))


def test_image_side_reads_a_folders_first_image(tmp_path):
    root = write_tree(tmp_path / "a", {"a": 1, "b": 1}, side=(30, 70))
    assert image_side("folder", root) == 70
    (root / "train" / "a" / "0.png").unlink()  # a class without images is passed over
    assert image_side("folder", root) == 70
    assert image_side("folder", tmp_path / "nowhere") is None
    assert image_side("cifar100_lt", root) is None


# ---------------------------------------------------------------- the embedded set

def test_the_embedded_set_has_the_counts_of_factor_100():
    data = load("fashion_lt")
    counts = long_tail_counts(10, 1000, 100)
    assert data.class_counts[[0, 5, 4, 1, 9, 3, 7, 2, 8, 6]].tolist() == counts
    assert counts[0] == 1000 and counts[-1] == 10
    assert np.bincount(data.val.targets).tolist() == [100] * 10
    assert np.bincount(data.test.targets).tolist() == [200] * 10
    assert data.class_names[6] == "Shirt" and data.num_classes == 10  # the ids are Fashion-MNIST's own


def test_the_embedded_images_are_32x32x3_with_two_black_pixels_on_each_side():
    data = load("fashion_lt")
    with np.load(ASSETS / "fashion_lt.npz") as file:
        for part in ("train", "val", "test"):
            images = getattr(data, part).images
            assert images.shape[1:] == (32, 32, 3) and images.dtype == np.uint8
            frame = images.copy()
            frame[:, 2:30, 2:30] = 0
            assert not frame.any()
            assert all(np.array_equal(images[:, 2:30, 2:30, c], file[f"x_{part}"]) for c in range(3))
    assert data.image_size == 32 and data.mean[0] == data.mean[1] == data.mean[2]
    assert np.isclose(data.mean[0], data.train.images.mean() / 255)
    assert np.isclose(data.std[0], data.train.images.std() / 255)


def test_no_embedded_training_image_is_tested_or_validated_on():
    data = load("fashion_lt")
    seen = {image.tobytes() for image in data.train.images}
    assert len(seen) == len(data.train)
    validated = {image.tobytes() for image in data.val.images}
    tested = {image.tobytes() for image in data.test.images}
    assert not seen & validated and not seen & tested and not validated & tested


def test_the_embedded_file_is_small_and_names_its_source():
    assert (ASSETS / "fashion_lt.npz").stat().st_size < 3e6
    notice = (ASSETS / "NOTICE").read_text()
    assert "Zalando" in notice and "MIT" in notice


def assert_same_arrays(found, expected):
    assert sorted(found) == sorted(expected)
    for key in expected:
        assert found[key].dtype == expected[key].dtype and np.array_equal(found[key], expected[key]), key


def test_make_rebuilds_the_embedded_set_array_for_array():
    if not DEBIAN_FASHION_MNIST.is_dir():
        pytest.skip(f"needs Fashion-MNIST in {DEBIAN_FASHION_MNIST} (Debian: dataset-fashion-mnist)")
    with np.load(ASSETS / "fashion_lt.npz") as file:
        assert_same_arrays(make.fashion_lt(DEBIAN_FASHION_MNIST), dict(file))


def test_make_takes_train_and_val_apart_and_writes_what_it_took(tmp_path):
    # A few more images than are needed of every class, so that which ones are taken shows
    counts = np.zeros(10, int)
    counts[list(FASHION_ORDER)] = long_tail_counts(10, 1000, 100)
    (images, labels), (test_images, test_labels) = write_fashion_mnist(tmp_path, counts + 105, [203] * 10)
    made = make.fashion_lt(tmp_path)
    assert np.bincount(made["y_train"]).tolist() == counts.tolist()
    assert np.bincount(made["y_val"]).tolist() == [100] * 10
    assert np.bincount(made["y_test"]).tolist() == [200] * 10
    kept = ldam_drw_indices(labels, counts)
    assert np.array_equal(made["x_train"], images[kept]) and np.array_equal(made["y_train"], labels[kept])
    label_of = {image.tobytes(): label for image, label in zip(images, labels)}
    taken = [(image.tobytes(), label) for part in ("train", "val")
             for image, label in zip(made[f"x_{part}"], made[f"y_{part}"])]
    assert len({image for image, _ in taken}) == len(taken)  # nothing twice, so no training image validates
    assert all(label_of[image] == label for image, label in taken)
    kept = ldam_drw_indices(test_labels, [200] * 10)
    assert np.array_equal(made["x_test"], test_images[kept])
    assert np.array_equal(made["y_test"], test_labels[kept])
    make.main(["--source", str(tmp_path), "--out", str(tmp_path / "out.npz")])
    with np.load(tmp_path / "out.npz") as file:
        assert_same_arrays(dict(file), made)
