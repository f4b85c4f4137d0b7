"""The room common/data.py (and common/assets/make.py): counts, subsets, builders, the embedded set."""
import gzip
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
import torchvision
from PIL import Image

from common import data as room
from common.assets import make
from common.data import (ASSETS, BUILDERS, CUT, LISTED, MATLAB, SOURCES, cut_to_long_tail,
                         fingerprint, image_side, leave_out_unreadable, load, long_tail_counts,
                         long_tail_indices, main, write_lists)
from common.flags import Parser
from tests.tiny import names_of, tiny_npz, tree

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


# ---------------------------------------------------------------- counts and subsets

# candle.md, section 3: factor -> CIFAR-10-LT's counts, CIFAR-100-LT's images and its smallest class
CIFAR = {10: ([5000, 3871, 2997, 2320, 1796, 1391, 1077, 834, 645, 500], 19573, 50),
         50: ([5000, 3237, 2096, 1357, 878, 568, 368, 238, 154, 100], 12608, 10),
         100: ([5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50], 10847, 5),
         200: ([5000, 2775, 1540, 854, 474, 263, 146, 81, 45, 25], 9502, 2)}


@pytest.mark.parametrize("factor", CIFAR)
def test_cifar_counts_are_the_published_ones(factor):
    hundred = long_tail_counts(100, 500, factor)
    assert (long_tail_counts(10, 5000, factor), sum(hundred), hundred[-1]) == CIFAR[factor]


def test_counts_at_the_edges():
    assert long_tail_counts(1, 7.9, 100) == [7]  # no division by C - 1 = 0
    assert long_tail_counts(4, 9, 1) == [9, 9, 9, 9]
    assert long_tail_counts(2, 10.5, 10) == [10, 1]  # a fractional n_max is floored at the end


@pytest.mark.parametrize("num_classes, n_max, factor", [
    (10, 100, 0.99), (10, 100, -5), (10, 100, float("nan")), (0, 100, 10), (10, 0, 10), (10, 0.5, 10),
    (10, float("inf"), 10)])
def test_bad_counts_are_refused(num_classes, n_max, factor):
    with pytest.raises(ValueError):
        long_tail_counts(num_classes, n_max, factor)


@pytest.mark.parametrize("counts", [[9, 6, 4, 2, 1], [2, 9, 1, 6, 4], [0, 3, 0, 0, 9]])
def test_indices_are_those_of_ldam_drw_and_leave_numpys_global_generator_alone(counts):
    targets = np.random.RandomState(3).permutation(np.repeat(np.arange(5), [9, 12, 9, 10, 11]))
    np.random.seed(11)
    expected = np.random.rand()

    np.random.seed(11)
    assert long_tail_indices(targets, counts).tolist() == ldam_drw_indices(targets, counts, seed=0)
    assert long_tail_indices(targets.tolist(), counts, 5).tolist() == ldam_drw_indices(targets, counts, 5)
    assert np.random.rand() == expected


@pytest.mark.parametrize("counts", [[3, 2], [-1, 2], [1, 1, 1]])
def test_a_count_that_the_class_does_not_have_is_refused(counts):
    with pytest.raises(ValueError, match="class"):
        long_tail_indices([0, 0, 1, 1], counts)


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

EMBEDDED = [0, 5, 4, 1, 9, 3, 7, 2, 8, 6]  # the embedded set's classes from head to tail


def assert_statistics(data):
    """mean and std are of the training images as the nets see them."""
    pixels = data.train.images / 255
    assert np.allclose(data.mean, pixels.mean((0, 1, 2)), rtol=0, atol=1e-9)
    assert np.allclose(data.std, pixels.std((0, 1, 2)), rtol=0, atol=1e-9)


@pytest.fixture
def any_sum(monkeypatch):
    """torchvision takes its files whatever their MD5 sums are."""
    for module in ("cifar", "utils"):
        monkeypatch.setattr(f"torchvision.datasets.{module}.check_integrity",
                            lambda path, md5=None: os.path.isfile(path))


def write_cifar(folder, classes, sizes):
    """Files as cs.toronto.edu distributes them. Returns images [n, 32, 32, 3] and labels of both parts."""
    kind, key = getattr(torchvision.datasets, f"CIFAR{classes}"), "labels" if classes == 10 else "fine_labels"
    generator, base = np.random.default_rng(1), folder / kind.base_folder
    base.mkdir(parents=True)
    names = {kind.meta["key"]: [f"class {i}" for i in range(classes)]}
    (base / kind.meta["filename"]).write_bytes(pickle.dumps(names))

    parts = []
    for files, some in ((kind.train_list, sizes), (kind.test_list, [3] * classes)):
        labels = generator.permutation(np.repeat(np.arange(classes), some))
        rows = generator.integers(0, 256, (len(labels), 3072), np.uint8)
        for (name, _), places in zip(files, np.array_split(np.arange(len(labels)), len(files))):
            batch = {"data": rows[places], key: labels[places].tolist()}
            (base / name).write_bytes(pickle.dumps(batch))
        parts.append((rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), labels))  # plane by plane
    return parts


def write_fashion_mnist(folder, train_sizes, test_size):
    """The four files of Fashion-MNIST as yann.lecun.com's idx, with random images. Returns images and labels
    of both parts."""
    generator, parts = np.random.default_rng(2), []
    folder.mkdir(parents=True, exist_ok=True)
    for prefix, sizes in (("train", train_sizes), ("t10k", [test_size] * 10)):
        labels = generator.permutation(np.repeat(np.arange(10), sizes)).astype(np.uint8)
        images = np.zeros((len(labels), 28, 28), np.uint8)
        images[:, 13:16] = generator.integers(0, 256, (len(labels), 3, 28))  # blank elsewhere: small files
        for kind, array in (("images", images), ("labels", labels)):
            header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
            (folder / f"{prefix}-{kind}-idx{array.ndim}-ubyte.gz").write_bytes(
                gzip.compress(header + array.tobytes(), 1))
        parts.append((images, labels))
    return parts


def framed(images):
    """Grey images [n, 28, 28] with two black pixels on each side, in three equal channels."""
    return np.stack([np.pad(images, ((0, 0), (2, 2), (2, 2)))] * 3, 3)


UNEVEN = [120, 120, 120, 150, 120, 120, 120, 90, 120, 120]  # n_max is n / C = 120, not the 150 of class 3


@pytest.mark.parametrize("name, sizes, flags, factor", [
    ("cifar10_lt", UNEVEN, {}, 100), ("cifar10_lt", UNEVEN, dict(imb_factor=10, seed=1), 10),
    ("cifar100_lt", [12] * 100, dict(imb_factor=10), 10), ("fashion_mnist_lt", [120] * 10, {}, 100)])
def test_the_torchvision_sets_keep_ldam_drws_images(name, sizes, flags, factor, tmp_path, any_sum):
    if name == "fashion_mnist_lt":  # in the order of the embedded set
        parts, order = write_fashion_mnist(tmp_path / "FashionMNIST" / "raw", sizes, 3), EMBEDDED
        parts = [(framed(images), labels) for images, labels in parts]
    else:
        parts, order = write_cifar(tmp_path, len(sizes), sizes), range(len(sizes))
    (images, labels), (test_images, test_labels) = parts

    data, counts = load(name, tmp_path, **flags), np.zeros(len(sizes), int)
    counts[order] = long_tail_counts(len(sizes), sum(sizes) / len(sizes), factor)
    kept = ldam_drw_indices(labels, counts, flags.get("seed", 0))
    assert data.class_counts.tolist() == counts.tolist()
    assert np.array_equal(data.train.targets, labels[kept])
    assert np.array_equal(data.train.images, images[kept])
    assert np.array_equal(data.test.images, test_images)  # the test split stays whole, in its order
    assert np.array_equal(data.test.targets, test_labels)
    assert data.val is None and data.image_size == 32

    if name == "fashion_mnist_lt":
        assert data.class_names[0] == "T-shirt/top"
        assert_statistics(data)
    else:
        assert data.class_names == [f"class {i}" for i in range(len(sizes))]
        assert (data.mean, data.std) == ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))  # LDAM-DRW's


# ---------------------------------------------------------------- npz

def arrays_of(shape=(8, 8), seed=0):
    rng = np.random.RandomState(seed)
    return {"x_train": rng.randint(0, 256, (6, *shape), np.uint8), "y_train": np.array([0, 1, 2, 0, 1, 0]),
            "x_test": rng.randint(0, 256, (4, *shape), np.uint8), "y_test": np.array([2, 1, 0, 2])}


@pytest.mark.parametrize("shape, names", [((8, 8), []), ((8, 8, 3), ["cat", "dog", "eel"])])
def test_an_npz_is_taken_as_it_is_grey_as_three_equal_channels(shape, names, tmp_path):
    arrays, more = arrays_of(shape), arrays_of(shape, seed=1)
    if names:
        arrays |= dict(x_val=more["x_test"], y_val=more["y_test"].astype(np.uint8), class_names=names)
    np.savez_compressed(tmp_path / "a.npz", notes=np.array([{}], object), **arrays)  # a pickle, never read
    data = load(tmp_path / "a.npz")
    assert data.class_names == (names or ["0", "1", "2"])
    assert data.image_size == 8 == image_side(tmp_path / "a.npz")
    assert data.class_counts.tolist() == [3, 2, 1] and data.class_counts.dtype == np.int64
    assert (data.val is None) == (not names)

    for part in ("train", "val", "test")[::1 if names else 2]:
        split, images = getattr(data, part), arrays[f"x_{part}"]
        assert split.images.dtype == np.uint8 and split.targets.dtype == np.int64
        assert np.array_equal(split.images, images if names else np.stack([images] * 3, 3))
        assert np.array_equal(split.targets, arrays[f"y_{part}"])
    assert_statistics(data)


def test_an_npz_is_cut_by_size_rank_only_when_a_factor_is_given(tmp_path):
    rng, path = np.random.RandomState(0), str(tmp_path / "a.npz")
    labels = rng.permutation(np.repeat([0, 1, 2, 3], [20, 60, 40, 40]))  # not sorted by size; ties go by id
    images = rng.randint(0, 256, (160, 4, 4), np.uint8)
    np.savez(path, x_train=images, y_train=labels, x_test=images[:5], y_test=labels[:5])
    assert load(path).class_counts.tolist() == [20, 60, 40, 40]

    data = load(path, imb_factor=27, seed=3)
    assert data.class_counts.tolist() == [2, 60, 20, 6] and len(data.test) == 5
    kept = ldam_drw_indices(labels, [2, 60, 20, 6], seed=3)
    assert np.array_equal(data.train.images[..., 0], images[kept])
    with pytest.raises(ValueError, match="no training image"):  # 60 / 100 leaves the rarest class nothing
        load(path, imb_factor=100)


BAD_NPZ = {  # fault: the arrays that are other than they should be
    "float images": lambda a: dict(x_train=a["x_train"].astype(np.float32)),
    "int64 test images": lambda a: dict(x_test=a["x_test"].astype(np.int64)),
    "flat images": lambda a: dict(x_train=a["x_train"].reshape(6, -1)),
    "channels first": lambda a: dict(x_train=np.zeros((6, 3, 8, 8), np.uint8)),
    "not square": lambda a: dict(x_train=a["x_train"][:, :5]),
    "test images of another size": lambda a: dict(x_test=a["x_test"][:, :5, :5]),
    "float labels": lambda a: dict(y_train=a["y_train"].astype(float)),
    "labels of another length": lambda a: dict(y_train=a["y_train"][:5]),
    "negative label": lambda a: dict(y_train=a["y_train"] - 1),
    "negative test label": lambda a: dict(y_test=a["y_test"] - 1),
    "absurd label": lambda a: dict(y_train=a["y_train"] * 10**15),  # more class names than memory holds
    "labels from 1": lambda a: dict(y_train=a["y_train"] + 1, y_test=a["y_test"] + 1),
    "test label out of range": lambda a: dict(y_test=a["y_test"] + 1),
    "label beyond class_names": lambda a: dict(class_names=["a", "b"]),
    "class without a training image": lambda a: dict(y_train=a["y_train"] * 2),
    "class name without a training image": lambda a: dict(class_names=["a", "b", "c", "d"]),
    "one class": lambda a: dict(y_train=a["y_train"] * 0, y_test=a["y_test"] * 0),
    "two classes of one name": lambda a: dict(class_names=["a", "b", "a"]),
    "x_val without y_val": lambda a: dict(x_val=a["x_test"]),
    "val label out of range": lambda a: dict(x_val=a["x_test"], y_val=a["y_test"] + 7),
    "no training images": lambda a: dict(x_train=a["x_train"][:0], y_train=a["y_train"][:0]),
    "no test images": lambda a: dict(x_test=a["x_test"][:0], y_test=a["y_test"][:0]),
    "pickled labels": lambda a: dict(y_train=a["y_train"].astype(object)),
    **{f"no {key}": (lambda a, key=key: {key: None}) for key in arrays_of()},
}
ADVICE = {"pickled labels": "is not a readable .npz file .Object arrays cannot be loaded",  # may be code
          "labels from 1": "labels start at 1, .*: subtract 1 from every",
          "class without a training image": r"labels have gaps \(1 has no image\): number the 3 classes"}


@pytest.mark.parametrize("factor", [None, 1])
@pytest.mark.parametrize("fault", BAD_NPZ)
def test_a_bad_npz_is_refused_by_name(tmp_path, fault, factor):
    path, arrays = tmp_path / "bad.npz", arrays_of()
    arrays |= BAD_NPZ[fault](arrays)
    np.savez(path, **{key: value for key, value in arrays.items() if value is not None})
    with pytest.raises(ValueError, match=f"{re.escape(str(path))}.*{ADVICE.get(fault, '')}"):
        load(path, imb_factor=factor)


def test_a_damaged_npz_is_refused_by_name_and_has_no_side_or_its_header_s(tmp_path):
    path = tmp_path / "a.npz"
    np.savez_compressed(path, **arrays_of())
    whole, array = path.read_bytes(), tmp_path / "array.npy"
    start = whole.index(b"x_train.npy") + len("x_train.npy") + 20  # behind its name and zip64 field
    no_header = whole[:start] + b"\xff" * 4 + whole[start + 4:]  # no deflate block begins so
    flipped = whole[:start + 40] + bytes([whole[start + 40] ^ 255]) + whole[start + 41:]  # in the images
    np.save(array, np.zeros(3))  # numpy opens it, but it is one array, not an archive

    for damaged in (b"", b"not a zip", whole[:len(whole) // 2], no_header, flipped, array.read_bytes()):
        path.write_bytes(damaged)
        assert image_side(path) in (None, 8)
        with pytest.raises(ValueError, match=re.escape(str(path))):
            load(path)
    path.write_bytes(no_header)
    np.savez(path, x_train=np.zeros(3))
    os.mkfifo(tmp_path / "pipe.npz")  # whose reader would wait
    for name in ("a.npz", "missing.npz", "pipe.npz"):
        assert image_side(tmp_path / name) is None
    with pytest.raises(ValueError, match="missing.npz"):
        load(tmp_path / "missing.npz")


# ---------------------------------------------------------------- folder

def test_a_folder_gives_every_image_its_class(tmp_path):
    tree(tmp_path, {"zebra": 2, "ant": 5, "bee": 3}, ("train", "val", "test"), size=(20, 12))
    data = load("folder", tmp_path)
    assert data.class_names == ["ant", "bee", "zebra"]
    assert data.class_counts.tolist() == [5, 3, 2]  # as it is: no cut without a factor
    assert (len(data.train), len(data.val), len(data.test)) == (10, 6, 6)
    for part in ("train", "val", "test"):
        split = getattr(data, part)
        for path, target in zip(names_of(split, tmp_path / part), split.targets):
            assert path.startswith(f"{data.class_names[target]}/")
    assert data.image_size == 20  # small images keep their size, by the longer side
    shutil.rmtree(tmp_path / "val")
    assert load("folder", tmp_path).val is None


def test_a_folder_is_cut_with_its_largest_class_as_n_max(tmp_path):
    tree(tmp_path, {"a": 3, "b": 9, "c": 8})
    whole, cut = load("folder", tmp_path), load("folder", tmp_path, imb_factor=9)
    assert cut.class_counts.tolist() == [1, 9, 3]
    kept = ldam_drw_indices(whole.train.targets, [1, 9, 3])
    assert (cut.train.paths == whole.train.paths[kept]).all()
    assert (cut.test.paths == whole.test.paths).all()


@pytest.mark.parametrize("side, shown", [(65, 224), (64, 64)])
def test_large_images_are_shown_at_224_pixels_and_their_side_is_said(side, shown, tmp_path, capsys):
    tree(tmp_path, {"a": 1, "b": 1}, size=(10, side))
    assert load("folder", tmp_path).image_size == shown
    assert f"looked at is {side} pixels (median)" in capsys.readouterr().out


def test_a_folder_whose_first_image_is_damaged_is_no_traceback(tmp_path):
    tree(tmp_path, {"a": 3, "b": 3})
    (tmp_path / "train" / "a" / "0.png").write_bytes(b"junk")
    assert load("folder", tmp_path).image_size == 20  # what --skip-bad-images is for
    for path in tmp_path.rglob("train/*/*.png"):
        path.write_bytes(b"junk")
    with pytest.raises(ValueError, match="none of the image files in .* can be decoded"):
        load("folder", tmp_path)


# ---------------------------------------------------------------- a test split of one's own, lists of it

SIZES = {"zebra": 1, "ant": 10, "bee": 2, "cat": 25}


def test_a_fraction_of_each_class_is_set_aside_for_testing(tmp_path, capsys):
    root = tree(tmp_path, SIZES, ("train",))
    data = load("folder", root, test_fraction=0.2)
    assert data.class_names == ["ant", "bee", "cat", "zebra"]
    assert np.bincount(data.test.targets, minlength=4).tolist() == [2, 1, 5, 0]  # never all of a class
    assert data.class_counts.tolist() == [8, 1, 20, 1]
    assert "8 of 38 images are set aside for testing (0.2 of each class, drawn by --subset-seed 0); 1 " \
        "classes have a single image" in capsys.readouterr().out

    train, test = names_of(data.train, root), names_of(data.test, root)
    assert not set(train) & set(test) and len(set(train + test)) == 38
    assert names_of(load("folder", root, test_fraction=0.2).test, root) == test
    assert names_of(load("folder", root, test_fraction=0.2, seed=1).test, root) != test
    # the classes' folders may lie in --data-dir itself
    assert len(load("folder", root / "train", test_fraction=0.2).test) == 8


def test_a_fraction_is_refused_where_it_has_no_sense(tmp_path):
    tree(tmp_path, SIZES)
    faults = [("folder", {}, "there is a folder .*test: leave out --test-fraction"),
              *((name, {}, "--test-fraction is for images without") for name in ("fashion_lt", "a.npz")),
              ("folder", {"test_list": "a.txt"}, "--test-fraction is for images without a test split"),
              *(("folder", {"test_fraction": fraction}, "--test-fraction must lie between 0 and 1")
                for fraction in (0, 1, -0.2, 7, float("nan")))]
    for name, flags, words in faults:
        with pytest.raises(ValueError, match=words):
            load(name, tmp_path, **{"test_fraction": 0.2, **flags})


@pytest.mark.parametrize("data_dir", ["given", None])
def test_written_lists_load_as_the_same_data_set(tmp_path, data_dir):
    root = tree(tmp_path / "set of mine", {**SIZES, "b\udcff é": 3, "deep/er": 2}, ("train",))
    data = load("folder", root, test_fraction=0.2)
    written = write_lists(data, tmp_path / "run", root if data_dir else None)
    assert written == (str(tmp_path / "run" / "train_list.txt"), str(tmp_path / "run" / "test_list.txt"),
                       str(root if data_dir else root / "train"))

    train_list, test_list, data_dir = written
    listed = load("folder", data_dir, train_list=train_list, test_list=test_list)
    for ours, theirs in ((data.train, listed.train), (data.test, listed.test)):
        assert (ours.paths == theirs.paths).all() and (ours.targets == theirs.targets).all()
    assert listed.class_names == data.class_names and listed.image_size == data.image_size
    assert fingerprint(listed) == fingerprint(data)
    split = load("folder", data_dir, train_list=train_list, test_fraction=0.5)
    assert np.bincount(split.test.targets, minlength=6).tolist() == [4, 0, 1, 10, 0, 0]


def test_names_that_cannot_stand_in_a_list_are_refused(tmp_path):
    root = tree(tmp_path / "set", {"a": 2, "b": 2})
    (root / "train" / "a" / "0.png").rename(root / "train" / "a" / "0\n.png")
    with pytest.raises(ValueError, match="0.n.png' cannot stand in a list"):
        write_lists(load("folder", root), tmp_path / "run", root)
    with pytest.raises(ValueError, match="has no image files"):
        write_lists(load("fashion_lt"), tmp_path / "run")


# ---------------------------------------------------------------- the same data or not

def test_a_fingerprint_is_of_what_is_in_a_data_set_not_of_where_it_lies(tmp_path, monkeypatch):
    tree(tmp_path / "a", {"ant": 3, "bee": 2})
    shutil.copytree(tmp_path / "a", tmp_path / "deep" / "er" / "b")
    monkeypatch.chdir(tmp_path)
    found = {fingerprint(load("folder", root)) for root in (tmp_path / "a", "a", "deep/er/b", "a/../a")}
    assert len(found) == 1 and re.fullmatch("[0-9a-f]{32,}", found.pop())
    np.savez("x.npz", **arrays_of())
    np.savez_compressed("deep/y.npz", **arrays_of())
    assert fingerprint(load("x.npz")) == fingerprint(load(tmp_path / "deep" / "y.npz"))


def test_a_fingerprint_sees_names_labels_pixels_and_files(tmp_path):
    arrays = {**arrays_of(), "class_names": ["a", "b", "c"]}
    flipped = arrays["x_test"].copy()
    flipped[1, 2, 3] ^= 1
    changes = [{}, {"class_names": ["b", "a", "c"]}, {"x_test": flipped}, {"y_test": arrays["y_test"][::-1]},
               {"y_train": arrays["y_train"][[1, 0, 2, 3, 4, 5]]},
               {"x_val": arrays["x_test"], "y_val": arrays["y_test"]}]
    found = []
    for change in changes:
        np.savez(tmp_path / "a.npz", **{**arrays, **change})
        found.append(fingerprint(load(tmp_path / "a.npz")))

    root = tree(tmp_path / "tree", {"ant": 3, "bee": 2})
    found.append(fingerprint(load("folder", root)))
    (root / "train" / "ant" / "0.png").rename(root / "train" / "ant" / "00.png")
    found.append(fingerprint(load("folder", root)))
    assert len(set(found)) == len(found) == 8


def test_a_class_order_that_is_asked_for_counts_before_anything_is_drawn(tmp_path):
    names, order = np.array(list("abcde")), np.array([3, 0, 4, 2, 1])
    drawn = np.load(tiny_npz(tmp_path / "tiny.npz"))
    for by_class in (False, True):  # images stored class by class lie otherwise in another order of classes
        found = []
        for new_order in (np.arange(5), order):
            arrays = {"class_names": names[new_order]}
            for part in ("train", "test"):
                x, y = drawn[f"x_{part}"], new_order.argsort()[drawn[f"y_{part}"]]
                stored = y.argsort(kind="stable") if by_class else np.arange(len(y))
                arrays |= {f"x_{part}": x[stored], f"y_{part}": y[stored]}
            np.savez(tmp_path / "a.npz", **arrays)
            found.append(load(tmp_path / "a.npz", imb_factor=20, class_names=list("abcde")))
        first, second = found
        assert fingerprint(first) == fingerprint(second) and second.class_names == list("abcde")
        assert (first.mean, first.std) == (second.mean, second.std)


def test_so_does_that_of_a_folder_and_of_lists(tmp_path):
    sizes = {"a": 4, "b": 6, "c": 5}
    flags = dict(data_dir=tree(tmp_path, sizes, ("train",)), test_fraction=0.4)
    found = [load("folder", class_names=["c", "a", "b"], **flags)]
    for order in ("abc", "cab", "bca"):
        (tmp_path / "list.txt").write_text("".join(
            f"train/{name}/{i}.png {order.index(name)}\n" for name in order for i in range(sizes[name])))
        found.append(load("folder", train_list=tmp_path / "list.txt", class_names=["c", "a", "b"], **flags))
    assert len(set(map(fingerprint, found))) == 1 and found[0].class_counts.tolist() == [3, 2, 4]
    assert load("folder", class_names=["c", "a"], **flags).class_names == ["a", "b", "c"]


# ---------------------------------------------------------------- files that cannot be read

def test_unreadable_files_do_not_count(tmp_path, capsys):
    tree(tmp_path, {"a": 12, "b": 8, "c": 4})
    for i, path in enumerate(sorted((tmp_path / "train").rglob("*.png"))):
        if i % 2:  # the same number of each class
            path.write_bytes(path.read_bytes()[:40] if i % 4 == 1 else b"")
    (tmp_path / "test" / "a" / "0.png").write_bytes(b"junk")

    whole = load("folder", tmp_path)
    data = leave_out_unreadable(whole, workers=2)
    assert whole.class_counts.tolist() == [12, 8, 4] and data.class_counts.tolist() == [6, 4, 2]
    assert len(data.test) == 5 and data.class_names == whole.class_names
    shown = capsys.readouterr().out
    assert "13 unreadable image files are left out" in shown and shown.count("train: cannot decode ") == 12
    assert f"test: cannot decode {tmp_path}/test/a/0.png: " in shown
    assert leave_out_unreadable(data) is data and "left out" not in capsys.readouterr().out
    embedded = load("fashion_lt")
    assert leave_out_unreadable(embedded) is embedded


@pytest.mark.parametrize("emptied, message", [("train/b", r"class 1 \(b\) has no training image"),
                                              ("test", "the test split has no images")])
def test_a_class_or_split_of_which_nothing_is_left_is_one_line(tmp_path, emptied, message):
    root = tree(tmp_path, {"a": 2, "b": 2})
    for path in (root / emptied).rglob("*.png"):
        path.write_bytes(b"junk")
    with pytest.raises(ValueError, match=f"{message}.*without its unreadable files; the first is"):
        leave_out_unreadable(load("folder", root))


def test_readable_files_are_looked_at_once(tmp_path, monkeypatch, capsys):
    root, cache, read = tree(tmp_path / "set", {"a": 3, "b": 3}), tmp_path / "runs" / "readable", []
    real = room.read_image
    monkeypatch.setattr(room, "read_image", lambda path: read.append(path) or real(path))

    def looked_at():
        read.clear()
        leave_out_unreadable(load("folder", root), cache=cache)
        return sorted(os.path.relpath(path, root) for path in read)

    (root / "train" / "a" / "0.png").write_bytes(b"junk")
    assert len(looked_at()) == 10
    assert looked_at() == ["train/a/0.png"]  # only what could not be read
    shutil.copy(root / "train" / "a" / "1.png", root / "train" / "a" / "0.png")
    (root / "test" / "b" / "1.png").write_bytes(b"damaged later")
    assert looked_at() == ["test/b/1.png", "train/a/0.png"]

    cache.write_bytes(cache.read_bytes()[:50])
    capsys.readouterr()
    assert len(looked_at()) == 10 and "is damaged" in capsys.readouterr().out
    assert [path.name for path in cache.parent.iterdir()] == ["readable"]


def test_of_two_processes_one_looks_at_the_files_while_the_other_waits(tmp_path, monkeypatch):
    paths = load("folder", tree(tmp_path / "set", {"a": 4, "b": 3})).train.paths

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


def test_a_recipe_is_chosen_by_what_can_be_read(tmp_path, monkeypatch):
    root = tree(tmp_path / "set", {"a": 5, "b": 4})
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


# ---------------------------------------------------------------- load

PUT = {"cifar10_lt": ("cifar-10-python.tar.gz", "cifar-10-batches-py"),
       "cifar100_lt": ("cifar-100-python.tar.gz", "cifar-100-python"),
       "fashion_mnist_lt": ("ubyte.gz", "FashionMNIST/raw"), **dict.fromkeys([*LISTED, *MATLAB], ()),
       **{name: (row[3],) for name, row in CUT.items() if name not in MATLAB}}


@pytest.mark.parametrize("name", PUT)
def test_without_files_and_network_one_line_says_what_to_put_where(name, tmp_path, monkeypatch, capsys):
    assert set(SOURCES) == {*PUT} == {*BUILDERS} - {"fashion_lt", "folder"}
    for variable in ("http_proxy", "https_proxy"):  # a closed port refuses at once: no network, for urllib
        monkeypatch.setenv(variable, "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.setattr("common.builders.find_spec", lambda package: True)
    with pytest.raises(SystemExit):
        main([name, "--data-dir", str(tmp_path / "data")])

    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.rstrip().endswith(f"{name} is had from {SOURCES[name]}")
    assert all(what in error for what in PUT[name])
    if name not in MATLAB:
        assert error.count("\n") == 1 and str(tmp_path / "data") in error
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize("factor", [0.5, -1, float("nan")])
@pytest.mark.parametrize("name", ["cifar10_lt", "fashion_lt", "folder", "a.npz"])
def test_a_factor_below_1_is_refused_before_anything_is_read(name, factor, tmp_path):
    with pytest.raises(ValueError, match="imbalance factor"):
        load(name, tmp_path / "nowhere", imb_factor=factor)
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- the embedded set

def test_the_embedded_set_has_factor_100_and_two_black_pixels_around_each_image():
    data = load("fashion_lt")
    assert data.class_counts[EMBEDDED].tolist() == long_tail_counts(10, 1000, 100)
    assert np.bincount(data.val.targets).tolist() == [100] * 10
    assert np.bincount(data.test.targets).tolist() == [200] * 10
    assert data.class_names[6] == "Shirt" and data.num_classes == 10  # the ids are Fashion-MNIST's own

    with np.load(ASSETS / "fashion_lt.npz") as file:
        for part in ("train", "val", "test"):
            assert np.array_equal(getattr(data, part).images, framed(file[f"x_{part}"]))
    assert data.image_size == 32
    assert_statistics(data)


def test_no_embedded_training_image_is_tested_or_validated_on():
    data = load("fashion_lt")
    seen, *others = ({image.tobytes() for image in getattr(data, part).images}
                     for part in ("train", "val", "test"))
    assert len(seen) == len(data.train)
    assert not seen & others[0] and not seen & others[1] and not others[0] & others[1]


def test_the_embedded_file_is_small_and_names_its_source():
    assert (ASSETS / "fashion_lt.npz").stat().st_size < 3e6
    notice = (ASSETS / "NOTICE").read_text()
    assert "Zalando" in notice and "MIT" in notice


def assert_same_arrays(found, expected):
    assert sorted(found) == sorted(expected)
    for key in expected:
        assert found[key].dtype == expected[key].dtype and np.array_equal(found[key], expected[key]), key


@pytest.mark.skipif(not DEBIAN_FASHION_MNIST.is_dir(), reason="needs Debian's package dataset-fashion-mnist")
def test_make_rebuilds_the_embedded_set_array_for_array():
    with np.load(ASSETS / "fashion_lt.npz") as file:
        assert_same_arrays(make.fashion_lt(DEBIAN_FASHION_MNIST), dict(file))


def test_make_takes_train_and_val_apart_and_writes_what_it_took(tmp_path):
    # a few more images than are needed of every class, so that which ones are taken shows
    counts = np.zeros(10, int)
    counts[EMBEDDED] = long_tail_counts(10, 1000, 100)
    (images, labels), (test_images, test_labels) = write_fashion_mnist(tmp_path, counts + 105, 203)
    made = make.fashion_lt(tmp_path)
    for part, x, y, sizes in (("train", images, labels, counts),
                              ("test", test_images, test_labels, [200] * 10)):
        kept = ldam_drw_indices(y, sizes)
        assert np.array_equal(made[f"x_{part}"], x[kept]) and np.array_equal(made[f"y_{part}"], y[kept])

    assert np.bincount(made["y_val"]).tolist() == [100] * 10
    label_of = {image.tobytes(): label for image, label in zip(images, labels)}
    training = {image.tobytes() for image in made["x_train"]}
    validating = [image.tobytes() for image in made["x_val"]]
    assert len({*validating, *training}) == len(made["x_val"]) + len(made["x_train"])
    assert [label_of[image] for image in validating] == made["y_val"].tolist()

    make.main(["--source", str(tmp_path), "--out", str(tmp_path / "out.npz")])
    with np.load(tmp_path / "out.npz") as file:
        assert_same_arrays(dict(file), made)
