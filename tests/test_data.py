"""The rooms common/data.py and common/longtail.py (and common/assets/make.py): counts, builders, subsets."""
import gzip
import multiprocessing
import os
import pickle
import re
import shutil
import struct
import time
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torchvision

from common.assets import make
from common.data import (ASSETS, BUILDERS, CUT, LISTED, MATLAB, SOURCES, cut_to_long_tail, find_unreadable,
                         fingerprint, image_side, leave_out_unreadable, load, long_tail_counts,
                         long_tail_indices, main, read_image, write_lists)
from common.flags import Parser
from tests.tiny import names_of, tiny_npz, tree

DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
UNEVEN = [120, 120, 120, 150, 120, 120, 120, 90, 120, 120]  # n_max is n / C = 120, not the 150 of class 3
SIZES = {"zebra": 1, "ant": 10, "bee": 2, "cat": 25}  # images of each class
PUT = {"cifar10_lt": ("cifar-10-python.tar.gz", "cifar-10-batches-py"),  # what must be in --data-dir
       "cifar100_lt": ("cifar-100-python.tar.gz", "cifar-100-python"),
       "fashion_mnist_lt": ("ubyte.gz", "FashionMNIST/raw"), **dict.fromkeys([*LISTED, *MATLAB], ()),
       **{name: (row[3],) for name, row in CUT.items() if name not in MATLAB}}
EMBEDDED = [0, 5, 4, 1, 9, 3, 7, 2, 8, 6]  # the embedded set's classes from head to tail
# candle.md, section 3: factor -> CIFAR-10-LT's counts, CIFAR-100-LT's images and its smallest class
CIFAR = {10: ([5000, 3871, 2997, 2320, 1796, 1391, 1077, 834, 645, 500], 19573, 50),
         50: ([5000, 3237, 2096, 1357, 878, 568, 368, 238, 154, 100], 12608, 10),
         100: ([5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50], 10847, 5),
         200: ([5000, 2775, 1540, 854, 474, 263, 146, 81, 45, 25], 9502, 2)}


def ldam_drw_indices(targets, counts, seed=0):
    """LDAM-DRW's gen_imbalanced_data written again: numpy's global generator, seeded once."""
    state, kept = np.random.get_state(), []
    np.random.seed(seed)
    for class_id, count in enumerate(counts):
        indices = np.where(np.asarray(targets) == class_id)[0]
        np.random.shuffle(indices)
        kept += indices[:count].tolist()
    np.random.set_state(state)
    return kept


def test_counts_are_the_published_ones_and_bad_ones_are_refused(tmp_path):
    for factor, published in CIFAR.items():
        hundred = long_tail_counts(100, 500, factor)
        assert (long_tail_counts(10, 5000, factor), sum(hundred), hundred[-1]) == published
    assert long_tail_counts(1, 7.9, 100) == [7]  # no division by C - 1 = 0
    assert long_tail_counts(4, 9, 1) == [9, 9, 9, 9]
    assert long_tail_counts(2, 10.5, 10) == [10, 1]  # a fractional n_max is floored at the end
    for classes, n_max in ((0, 100), (10, 0), (10, 0.5), (10, np.inf)):
        pytest.raises(ValueError, long_tail_counts, classes, n_max, 10)
    for name, factor in product(("cifar10_lt", "fashion_lt", "folder", "a.npz"), (0.99, -5, np.nan)):
        pytest.raises(ValueError, load, name, tmp_path / "no", imb_factor=factor).match("imbalance factor")
    assert not list(tmp_path.iterdir())  # nothing was read or written before


def test_a_cut_keeps_ldam_drw_s_images_or_all_of_a_small_class_and_names_the_largest_factor_it_can(capsys):
    targets = np.random.RandomState(3).permutation(np.repeat(np.arange(5), [9, 12, 9, 10, 11]))
    for counts in ([9, 6, 4, 2, 1], [2, 9, 1, 6, 4], [0, 3, 0, 0, 9]):
        np.random.seed(11)
        expected = np.random.rand()
        np.random.seed(11)
        assert long_tail_indices(targets, counts).tolist() == ldam_drw_indices(targets, counts, seed=0)
        assert long_tail_indices(targets.tolist(), counts, 5).tolist() == ldam_drw_indices(targets, counts, 5)
        assert np.random.rand() == expected  # numpy's global generator is left alone
    for counts in ([3, 2], [-1, 2], [1, 1, 1]):
        pytest.raises(ValueError, long_tail_indices, [0, 0, 1, 1], counts).match("class")

    targets = np.repeat([0, 1, 2], [60, 5, 40])
    assert np.bincount(targets[cut_to_long_tail(targets, 3, 4)]).tolist() == [60, 5, 30]  # not 15 of class 1
    assert capsys.readouterr().out.count("note:") == 1
    cut_to_long_tail(targets, 3, 60)
    assert capsys.readouterr().out == ""
    for sizes in ([10, 10, 10], [49, 30, 49], [7, 9, 8]):
        targets = np.repeat([0, 1, 2], sizes)
        why = str(pytest.raises(ValueError, cut_to_long_tail, targets, 3, 100).value)
        works = int(re.search(r"--imb-factor 100, with .*at most --imb-factor (\d+) works", why)[1])
        assert np.bincount(targets[cut_to_long_tail(targets, 3, works)], minlength=3).min() == 1
        pytest.raises(ValueError, cut_to_long_tail, targets, 3, works + 1)


def assert_statistics(data):
    """mean and std are of the training images as the nets see them."""
    seen = data.train.images / 255
    assert np.allclose((data.mean, data.std), (seen.mean((0, 1, 2)), seen.std((0, 1, 2))), rtol=0, atol=1e-9)


def write_cifar(folder, classes, sizes):
    """Files as cs.toronto.edu distributes them. Returns images [n, 32, 32, 3] and labels of both parts."""
    kind, key = getattr(torchvision.datasets, f"CIFAR{classes}"), "labels" if classes == 10 else "fine_labels"
    generator, base, parts = np.random.default_rng(1), folder / kind.base_folder, []
    base.mkdir(parents=True)
    names = {kind.meta["key"]: [f"class {i}" for i in range(classes)]}
    (base / kind.meta["filename"]).write_bytes(pickle.dumps(names))
    for files, some in ((kind.train_list, sizes), (kind.test_list, [3] * classes)):
        labels = generator.permutation(np.repeat(np.arange(classes), some))
        rows = generator.integers(0, 256, (len(labels), 3072), np.uint8)
        for (name, _), places in zip(files, np.array_split(np.arange(len(labels)), len(files))):
            (base / name).write_bytes(pickle.dumps({"data": rows[places], key: labels[places].tolist()}))
        parts.append((rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), labels))  # plane by plane
    return parts


def write_fashion_mnist(folder, train_sizes, test_size):
    """yann.lecun.com's four idx files with random images. Returns images and labels of both parts."""
    generator, parts = np.random.default_rng(2), []
    folder.mkdir(parents=True, exist_ok=True)
    for prefix, sizes in (("train", train_sizes), ("t10k", [test_size] * 10)):
        labels = generator.permutation(np.repeat(np.arange(10), sizes)).astype(np.uint8)
        parts.append((generator.integers(0, 256, (len(labels), 28, 28), np.uint8), labels))
        for kind, array in zip(("images", "labels"), parts[-1]):
            header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
            path = folder / f"{prefix}-{kind}-idx{array.ndim}-ubyte.gz"
            path.write_bytes(gzip.compress(header + array.tobytes(), 1))
    return parts


def framed(images):
    """Grey images [n, 28, 28] with two black pixels on each side, in three equal channels."""
    return np.stack([np.pad(images, ((0, 0), (2, 2), (2, 2)))] * 3, 3)


@pytest.mark.parametrize("name, sizes, flags, factor", [
    ("cifar10_lt", UNEVEN, {}, 100), ("cifar10_lt", UNEVEN, dict(imb_factor=10, seed=1), 10),
    ("cifar100_lt", [12] * 100, dict(imb_factor=10), 10), ("fashion_mnist_lt", [120] * 10, {}, 100)])
def test_the_torchvision_sets_keep_ldam_drws_images(name, sizes, flags, factor, tmp_path, monkeypatch):
    for module in ("cifar", "utils"):  # torchvision takes its files whatever their MD5 sums are
        monkeypatch.setattr(f"torchvision.datasets.{module}.check_integrity",
                            lambda path, md5=None: os.path.isfile(path))
    C, order = len(sizes), range(len(sizes))
    if name == "fashion_mnist_lt":
        parts, order = write_fashion_mnist(tmp_path / "FashionMNIST" / "raw", sizes, 3), EMBEDDED
        (images, labels), (test_images, test_labels) = ((framed(x), y) for x, y in parts)
    else:
        (images, labels), (test_images, test_labels) = write_cifar(tmp_path, C, sizes)
    data = load(name, tmp_path, **flags)
    assert data.class_counts[order].tolist() == long_tail_counts(C, sum(sizes) / C, factor)
    kept = ldam_drw_indices(labels, data.class_counts, flags.get("seed", 0))
    assert np.array_equal(data.train.images, images[kept])
    assert np.array_equal(data.train.targets, labels[kept])
    assert np.array_equal(data.test.images, test_images)  # the test split stays whole, in its order
    assert np.array_equal(data.test.targets, test_labels)
    assert data.val is None and data.image_size == 32
    if name == "fashion_mnist_lt":
        assert data.class_names[0] == "T-shirt/top"
        assert_statistics(data)
    else:
        assert data.class_names == [f"class {i}" for i in range(C)]
        assert (data.mean, data.std) == ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))  # LDAM-DRW's


def arrays_of(shape=(8, 8), seed=0):
    rng = np.random.RandomState(seed)
    return {"x_train": rng.randint(0, 256, (6, *shape), np.uint8), "y_train": np.array([0, 1, 2, 0, 1, 0]),
            "x_test": rng.randint(0, 256, (4, *shape), np.uint8), "y_test": np.array([2, 1, 0, 2])}


def test_an_npz_is_taken_as_it_is_grey_as_three_channels_and_cut_by_size_rank_if_a_factor_says_so(tmp_path):
    path, more = str(tmp_path / "a.npz"), arrays_of((8, 8, 3), seed=1)
    for arrays, names in ((arrays_of(), None), (arrays_of((8, 8, 3)), ["cat", "dog", "eel"])):
        if names:
            arrays |= dict(x_val=more["x_test"], y_val=more["y_test"].astype(np.uint8), class_names=names)
        np.savez_compressed(path, notes=np.array([{}], object), **arrays)  # a pickle, never read
        data = load(path)
        assert data.class_names == (names or ["0", "1", "2"]) and data.image_size == 8 == image_side(path)
        assert data.class_counts.tolist() == [3, 2, 1] and data.class_counts.dtype == np.int64
        assert (data.val is None) == (not names)
        for part in ("train", "val", "test") if names else ("train", "test"):
            split, images = getattr(data, part), arrays[f"x_{part}"]
            assert split.images.dtype == np.uint8 and split.targets.dtype == np.int64
            assert np.array_equal(split.images, images if names else np.stack([images] * 3, 3))
            assert np.array_equal(split.targets, arrays[f"y_{part}"])
        assert_statistics(data)
    rng = np.random.RandomState(0)
    labels = rng.permutation(np.repeat([0, 1, 2, 3], [20, 60, 40, 40]))  # not sorted by size; ties go by id
    images = rng.randint(0, 256, (160, 4, 4), np.uint8)
    np.savez(path, x_train=images, y_train=labels, x_test=images[:5], y_test=labels[:5])
    assert load(path).class_counts.tolist() == [20, 60, 40, 40]
    data, counts = load(path, imb_factor=27, seed=3), [2, 60, 20, 6]
    assert data.class_counts.tolist() == counts and len(data.test) == 5
    assert np.array_equal(data.train.images[..., 0], images[ldam_drw_indices(labels, counts, seed=3)])
    pytest.raises(ValueError, load, path, imb_factor=100).match("no training image")  # of the rarest class


X, Y, X_TEST, Y_TEST = arrays_of().values()
BAD_NPZ = {  # what the error says: the arrays that are other than they should be
    "x_": [dict(x_train=X.astype(np.float32)), dict(x_test=X_TEST.astype(np.int64)), dict(x_train=X[:, :5]),
           dict(x_test=X_TEST[:, :5, :5]), dict(x_train=X.reshape(6, -1)), dict(x_val=X_TEST),
           dict(x_train=np.zeros((6, 3, 8, 8), np.uint8)),  # channels first
           dict(x_train=None), dict(x_test=None), dict(x_train=X[:0], y_train=Y[:0])],
    "y_": [dict(y_train=Y.astype(float)), dict(y_train=Y[:5]), dict(y_train=None), dict(y_test=None)],
    "labels": [dict(y_train=Y - 1), dict(y_test=Y_TEST - 1), dict(y_test=Y_TEST + 1),
               dict(x_val=X_TEST, y_val=Y_TEST + 7), dict(class_names=["a", "b"]),
               dict(y_train=Y * 10**15)],  # more class names than memory holds
    "labels start at 1, .*: subtract 1 from every": [dict(y_train=Y + 1, y_test=Y_TEST + 1)],
    r"labels have gaps \(1 has no image\): number the 3 classes": [dict(y_train=Y * 2)],
    "class 3 .d. has no training image": [dict(class_names=list("abcd"))],
    "has one class alone": [dict(y_train=Y * 0, y_test=Y_TEST * 0)],
    "the same name": [dict(class_names=list("aba"))],
    "no images": [dict(x_test=X_TEST[:0], y_test=Y_TEST[:0])],
    "is not a readable .npz file .Object arrays cannot be loaded": [dict(y_train=Y.astype(object))]}  # code


def test_a_bad_or_damaged_npz_is_refused_by_name_and_the_latter_has_no_side_or_its_header_s(tmp_path):
    path, array = tmp_path / "a.npz", tmp_path / "array.npy"
    for words, changed in ((words, changed) for words, some in BAD_NPZ.items() for changed in some):
        arrays = {key: value for key, value in {**arrays_of(), **changed}.items() if value is not None}
        np.savez(path, **arrays)
        for factor in (None, 1):
            pytest.raises(ValueError, load, path, imb_factor=factor).match(f"{path}.*{words}")
    np.savez_compressed(path, **arrays_of())
    whole = path.read_bytes()
    start = whole.index(b"x_train.npy") + len("x_train.npy") + 20  # behind its name and zip64 field
    no_header = whole[:start] + b"\xff" * 4 + whole[start + 4:]  # no deflate block begins so
    flipped = whole[:start + 40] + bytes([whole[start + 40] ^ 255]) + whole[start + 41:]  # in the images
    np.save(array, np.zeros(3))  # numpy opens it, but it is one array, not an archive
    for damaged in (b"", b"not a zip", whole[:len(whole) // 2], no_header, flipped, array.read_bytes()):
        path.write_bytes(damaged)
        assert image_side(path) in (None, 8)
        pytest.raises(ValueError, load, path).match(str(path))
    np.savez(path, x_train=np.zeros(3))
    os.mkfifo(tmp_path / "pipe.npz")  # whose reader would wait
    assert [image_side(tmp_path / name) for name in ("a.npz", "missing.npz", "pipe.npz")] == [None] * 3
    pytest.raises(ValueError, load, tmp_path / "missing.npz").match("missing.npz")


def test_a_folder_gives_every_image_its_class_is_cut_from_its_largest_class_and_has_a_size(tmp_path, capsys):
    tree(tmp_path, {"zebra": 8, "ant": 3, "bee": 9}, ("train", "val", "test"), size=(20, 12))
    data = load("folder", tmp_path)
    assert data.class_names == ["ant", "bee", "zebra"] and data.class_counts.tolist() == [3, 9, 8]
    assert data.image_size == 20  # small images keep their size, by the longer side
    for part, size in (("train", 20), ("val", 6), ("test", 6)):
        split = getattr(data, part)
        assert len(split) == size and all(name.startswith(f"{data.class_names[c]}/") for name, c in zip(
            names_of(split, tmp_path / part), split.targets))
    shutil.rmtree(tmp_path / "val")
    cut = load("folder", tmp_path, imb_factor=9)
    assert cut.val is None and cut.class_counts.tolist() == [1, 9, 3]
    assert (cut.train.paths == data.train.paths[ldam_drw_indices(data.train.targets, [1, 9, 3])]).all()
    assert (cut.test.paths == data.test.paths).all()
    for side, shown in ((65, 224), (64, 64)):  # large images are shown at 224 pixels
        tree(tmp_path, {"ant": 3, "bee": 9, "zebra": 8}, size=(10, side))
        (tmp_path / "train" / "ant" / "0.png").write_bytes(b"junk")  # what --skip-bad-images is for
        assert load("folder", tmp_path).image_size == shown
        assert f"looked at is {side} pixels (median)" in capsys.readouterr().out
    for path in tmp_path.rglob("train/*/*.png"):
        path.write_bytes(b"junk")
    pytest.raises(ValueError, load, "folder", tmp_path).match("none of the image files in .* can be decoded")


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
    assert len(load("folder", root / "train", test_fraction=0.2).test) == 8  # class folders in --data-dir
    tree(tmp_path, SIZES)
    no_sense, bad = "--test-fraction is for images without a test split", (0, 1, -0.2, 7, np.nan)
    for name, flags, words in (
            ("folder", {}, "there is a folder .*test: leave out --test-fraction"), ("a.npz", {}, no_sense),
            ("fashion_lt", {}, no_sense), ("folder", {"test_list": "a.txt"}, no_sense),
            *(("folder", {"test_fraction": value}, "must lie between 0 and 1") for value in bad)):
        pytest.raises(ValueError, load, name, tmp_path, **{"test_fraction": 0.2, **flags}).match(words)


def test_written_lists_load_as_the_same_data_set_and_name_what_can_stand_in_them(tmp_path):
    root, run = tree(tmp_path / "a b", {**SIZES, "b\udcff é": 3, "deep/er": 2}, ("train",)), tmp_path / "run"
    data = load("folder", root, test_fraction=0.2)
    for given, taken in ((root, root), (None, root / "train")):
        written = train_list, test_list, data_dir = write_lists(data, run, given)
        assert written == (str(run / "train_list.txt"), str(run / "test_list.txt"), str(taken))
        listed = load("folder", data_dir, train_list=train_list, test_list=test_list)
        assert all((listed.split(part).paths == data.split(part).paths).all() for part in ("train", "test"))
        assert fingerprint(listed) == fingerprint(data) and listed.image_size == data.image_size
        split = load("folder", data_dir, train_list=train_list, test_fraction=0.5)
        assert np.bincount(split.test.targets, minlength=6).tolist() == [4, 0, 1, 10, 0, 0]
    root = tree(tmp_path / "set", {"a": 2, "b": 2})
    (root / "train" / "a" / "0.png").rename(root / "train" / "a" / "0\n.png")
    for data, words in ((load("folder", root), "0.n.png' cannot stand in a list"),
                        (load("fashion_lt"), "has no image files")):
        pytest.raises(ValueError, write_lists, data, run, root).match(words)


def test_a_fingerprint_sees_names_labels_pixels_and_files_but_not_where_they_lie(tmp_path, monkeypatch):
    root, flipped = tree(tmp_path / "a", {"ant": 3, "bee": 2}), X_TEST.copy()
    shutil.copytree(root, tmp_path / "deep" / "er" / "b")
    monkeypatch.chdir(tmp_path)
    same = {fingerprint(load("folder", folder)) for folder in (root, "a", "deep/er/b", "a/../a")}
    assert len(same) == 1 and re.fullmatch("[0-9a-f]{32,}", min(same))
    (root / "train" / "ant" / "0.png").rename(root / "train" / "ant" / "00.png")
    found = [*same, fingerprint(load("folder", root))]
    flipped[1, 2, 3] ^= 1
    for change in ({}, {"class_names": ["b", "a", "c"]}, {"x_test": flipped}, {"y_test": Y_TEST[::-1]},
                   {"y_train": Y[[1, 0, 2, 3, 4, 5]]}, {"x_val": X_TEST, "y_val": Y_TEST}):
        arrays = {**arrays_of(), "class_names": ["a", "b", "c"], **change}
        np.savez("x.npz", **arrays)
        np.savez_compressed("deep/y.npz", **arrays)
        found.append(fingerprint(load("x.npz")))
        assert found[-1] == fingerprint(load(tmp_path / "deep" / "y.npz"))
    assert len(set(found)) == len(found) == 8


def test_a_class_order_that_is_asked_for_counts_before_anything_is_drawn(tmp_path):
    drawn = np.load(tiny_npz(tmp_path / "tiny.npz"))
    for by_class in (False, True):  # images stored class by class lie otherwise in another order of classes
        found = []
        for new_order in (np.arange(5), np.array([3, 0, 4, 2, 1])):
            arrays = {"class_names": np.array(list("abcde"))[new_order]}
            for part in ("train", "test"):
                x, y = drawn[f"x_{part}"], new_order.argsort()[drawn[f"y_{part}"]]
                stored = y.argsort(kind="stable") if by_class else np.arange(len(y))
                arrays |= {f"x_{part}": x[stored], f"y_{part}": y[stored]}
            np.savez(tmp_path / "a.npz", **arrays)
            found.append(load(tmp_path / "a.npz", imb_factor=20, class_names=list("abcde")))
        first, second = found
        assert fingerprint(first) == fingerprint(second) and second.class_names == list("abcde")
    sizes, list_file = {"a": 4, "b": 6, "c": 5}, tmp_path / "list.txt"
    flags = dict(data_dir=tree(tmp_path, sizes, ("train",)), test_fraction=0.4)
    found = [load("folder", class_names=["c", "a", "b"], **flags)]
    for order in ("abc", "cab", "bca"):
        rows = [f"train/{c}/{i}.png {order.index(c)}\n" for c in order for i in range(sizes[c])]
        list_file.write_text("".join(rows))
        found.append(load("folder", train_list=list_file, class_names=["c", "a", "b"], **flags))
    assert len(set(map(fingerprint, found))) == 1 and found[0].class_counts.tolist() == [3, 2, 4]
    assert load("folder", class_names=["c", "a"], **flags).class_names == ["a", "b", "c"]


def test_unreadable_files_do_not_count_and_must_leave_an_image_of_each_class_and_split(tmp_path, capsys):
    root, embedded = tree(tmp_path / "a", {"a": 12, "b": 8, "c": 4}), load("fashion_lt")
    for i, path in enumerate(sorted(root.rglob("train/*/*.png"))):
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
    assert leave_out_unreadable(embedded) is embedded
    for emptied, words in (("test", "test split has no images"), ("train/b", "class 1 .b. has no training")):
        for path in (tree(tmp_path / emptied, {"a": 2, "b": 2}) / emptied).rglob("*.png"):
            path.write_bytes(b"junk")
        refused = pytest.raises(ValueError, leave_out_unreadable, load("folder", tmp_path / emptied))
        assert refused.match(f"{words}.*without its unreadable files; the first is")


def test_readable_files_are_looked_at_once_by_one_of_two_processes(tmp_path, monkeypatch, capsys):
    root, cache, read = tree(tmp_path / "set", {"a": 3, "b": 3}), tmp_path / "new" / "cache", tmp_path / "a"

    def slowly(path):
        with open(read, "a") as file:
            print(os.path.relpath(path, root), file=file)
        time.sleep(0.02)
        return read_image(path)

    def looked_at():
        read.write_text("")
        leave_out_unreadable(load("folder", root), cache=cache)
        return sorted(read.read_text().split())

    monkeypatch.setattr("common.data.read_image", slowly)
    (root / "train" / "a" / "0.png").write_bytes(b"junk")
    assert len(looked_at()) == 10
    assert looked_at() == ["train/a/0.png"]  # only what could not be read
    shutil.copy(root / "train" / "a" / "1.png", root / "train" / "a" / "0.png")
    (root / "test" / "b" / "1.png").write_bytes(b"damaged later")
    assert looked_at() == ["test/b/1.png", "train/a/0.png"]
    cache.write_bytes(cache.read_bytes()[:50])
    capsys.readouterr()
    assert len(looked_at()) == 10 and "is damaged" in capsys.readouterr().out
    assert os.listdir(cache.parent) == ["cache"]
    read.write_text("")
    with multiprocessing.get_context("fork").Pool(2) as pool:
        paths = load("folder", root).train.paths
        pool.starmap_async(find_unreadable, [(paths, 1, tmp_path / "cache")] * 2, chunksize=1).get(60)
    assert len(read.read_text().split()) == len(paths)


def test_a_recipe_is_chosen_by_what_can_be_read(tmp_path, monkeypatch):
    root, lists = tree(tmp_path / "set", {"a": 5, "b": 4}), ["--train-list", "list.txt"]
    (tmp_path / "list.txt").write_text("".join(f"train/a/{i}.png 0\n" for i in range(5)))
    for i in range(3):
        (root / "train" / "a" / f"{i}.png").write_bytes(b"junk")
    monkeypatch.chdir(tmp_path)
    flags = ["--dataset", "folder", "--data-dir", str(root), "--out", "run"]
    for more, n in (([], 9), (["--skip-bad-images"], 6), (lists, 5), ([*lists, "--skip-bad-images"], 2)):
        args = Parser("A method.", {"small": {"epochs": 1}}).parse_args([*flags, *more])
        assert args.recipe_why == f"{n} images of 20 pixels" and args.epochs == -(-2500 // n)
    assert (tmp_path / "run.readable.npy").exists()  # the run itself need not look again


@pytest.mark.parametrize("name", PUT)
def test_without_files_and_network_one_line_says_what_to_put_where(name, tmp_path, monkeypatch, capsys):
    assert set(SOURCES) == {*PUT} == {*BUILDERS} - {"fashion_lt", "folder"}
    for variable in ("http_proxy", "https_proxy"):  # a closed port refuses at once: no network, for urllib
        monkeypatch.setenv(variable, "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.setattr("common.builders.find_spec", lambda package: True)
    pytest.raises(SystemExit, main, [name, "--data-dir", str(tmp_path / "data")])
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.rstrip().endswith(f"{name} is had from {SOURCES[name]}")
    assert all(what in error for what in PUT[name])
    assert name in MATLAB or error.count("\n") == 1 and str(tmp_path / "data") in error
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_the_embedded_set_has_factor_100_black_borders_no_image_twice_and_a_small_file_with_its_source():
    data, images, head_to_tail = load("fashion_lt"), [], long_tail_counts(10, 1000, 100)
    with np.load(ASSETS / "fashion_lt.npz") as file:
        for part, sizes in (("train", head_to_tail), ("val", [100] * 10), ("test", [200] * 10)):
            assert np.bincount(data.split(part).targets)[EMBEDDED].tolist() == sizes
            assert np.array_equal(data.split(part).images, framed(file[f"x_{part}"]))
            images.append({image.tobytes() for image in data.split(part).images})
    assert len(set.union(*images)) == sum(map(len, images)) and len(images[0]) == len(data.train)
    assert data.class_names[6] == "Shirt" and data.num_classes == 10  # the ids are Fashion-MNIST's own
    assert data.image_size == 32 and (ASSETS / "fashion_lt.npz").stat().st_size < 3e6
    assert_statistics(data)
    assert all(source in (ASSETS / "NOTICE").read_text() for source in ("Zalando", "MIT"))


def content(arrays):
    return {key: (array.dtype, array.shape, hash(array.tobytes())) for key, array in arrays.items()}


@pytest.mark.skipif(not DEBIAN_FASHION_MNIST.is_dir(), reason="needs Debian's package dataset-fashion-mnist")
def test_make_rebuilds_the_embedded_set_array_for_array():
    with np.load(ASSETS / "fashion_lt.npz") as file:
        assert content(make.fashion_lt(DEBIAN_FASHION_MNIST)) == content(file)


def test_make_takes_the_images_behind_the_training_ones_to_validate_and_writes_what_it_took(tmp_path):
    counts = load("fashion_lt").class_counts  # of every class a few images more than needed
    (x, y), (x_test, y_test) = write_fashion_mnist(tmp_path, counts + 105, 203)
    train, both = ldam_drw_indices(y, counts), ldam_drw_indices(y, counts + 100)
    made, val = make.fashion_lt(tmp_path), [i for i in both if i not in train]
    for part, images, labels, kept in (("train", x, y, train), ("val", x, y, val),
                                       ("test", x_test, y_test, ldam_drw_indices(y_test, [200] * 10))):
        assert np.array_equal(made[f"x_{part}"], images[kept])
        assert np.array_equal(made[f"y_{part}"], labels[kept])
    make.main(["--source", str(tmp_path), "--out", str(tmp_path / "out.npz")])
    with np.load(tmp_path / "out.npz") as file:
        assert content(file) == content(made)
