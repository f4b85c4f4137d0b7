"""The papers' data sets of image files: builders, list files, the checker."""
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common import builders, data as rooms
from common.data import (CUT, LISTED, MATLAB, PUBLISHED, ImageFiles, check, image_side, load,
                         long_tail_counts, long_tail_indices, main, read_image)
from common.evaluate import shot_groups

ROOT = Path(__file__).parent.parent
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def touch(root, paths):
    """Empty files: builders look at names alone."""
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()


def jpeg(path, seed=0, mode="RGB", size=(40, 30)):
    """A JPEG file of noise, its folder made. Returns its pixels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    channels = {"RGB": 3, "L": 1, "CMYK": 4}[mode]
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], channels), dtype=np.uint8)
    Image.frombytes(mode, size, pixels.tobytes()).save(path, quality=95)
    return pixels


def halve(path):
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])


def write_list(path, rows):
    path.write_text("".join(f"{name} {label}\n" for name, label in rows))


def paths_of(split, root):
    return [os.path.relpath(os.fsdecode(path), root) for path in split.paths]


# ---------------------------------------------------------------- list files

def write_listed(root, name):
    """The list files of imagenet_lt, places_lt or inat18 with all of their classes: one training image of a
    class, two of the last; the folders that the first lines name. Returns {split: rows}."""
    C = PUBLISHED[name]["classes"]
    if name == "imagenet_lt":
        folders = [f"n{1440764 + 11 * i:08d}" for i in range(C)]
        train, val, test = (lambda i: f"train/{folders[i]}/{folders[i]}_1.JPEG",
                            lambda i: f"train/{folders[i]}/{folders[i]}_762.JPEG",
                            lambda i: f"val/{folders[i]}/ILSVRC2012_val_{i:08d}.JPEG")
    elif name == "places_lt":
        folders = [f"place_{i}" for i in range(C)]
        train, val, test = (lambda i: f"train/{folders[i]}/00000004.jpg",
                            lambda i: f"train/{folders[i]}/00002049.jpg",
                            lambda i: f"val/{folders[i]}/Places365_val_{i:08d}.jpg")
    else:
        train, val, test = (lambda i: f"train_val2018/Plantae/{i}/a{i}.jpg", None,
                            lambda i: f"train_val2018/Plantae/{i}/b{i}.jpg")
    rows = {"train": [(train(i), i) for i in range(C)], "test": [(test(i), i) for i in range(C)][::-1]}
    rows["train"].append((train(C - 1).replace(".", "_2."), C - 1))
    if val:
        rows["val"] = [(val(i), i) for i in range(C)]
    prefix, tested = LISTED[name]
    for part in rows:
        write_list(root / f"{prefix}_{tested if part == 'test' else part}.txt", rows[part])
        (root / rows[part][0][0]).parent.mkdir(parents=True, exist_ok=True)
    return rows


@pytest.mark.parametrize("name, class_name, jitter", [
    ("imagenet_lt", "n01440775", 0.4), ("places_lt", "place_1", 0.4), ("inat18", "Plantae/1", 0.0)])
def test_listed_sets_have_their_lists_images_in_the_lists_order(tmp_path, name, class_name, jitter):
    rows = write_listed(tmp_path, name)
    data = load(name, tmp_path)
    for part in ("train", "val", "test"):
        split = getattr(data, part)
        if part not in rows:
            assert split is None
            continue
        assert paths_of(split, tmp_path) == [path for path, _ in rows[part]]
        assert split.targets.tolist() == [label for _, label in rows[part]]
    assert data.num_classes == PUBLISHED[name]["classes"] and data.class_counts[-1] == 2
    assert data.class_names[1] == class_name and data.image_size == 224 and data.color_jitter == jitter
    assert (data.mean, data.std) == (IMAGENET if name != "inat18" else
                                     ((0.466, 0.471, 0.380), (0.195, 0.194, 0.192)))
    assert image_side(name, tmp_path) == 224


def test_a_val_list_may_be_missing_a_train_list_may_not(tmp_path):
    write_listed(tmp_path, "places_lt")
    (tmp_path / "Places_LT_val.txt").unlink()
    assert load("places_lt", tmp_path).val is None
    (tmp_path / "Places_LT_train.txt").unlink()
    with pytest.raises(ValueError, match="no such list file: .*Places_LT_train.txt"):
        load("places_lt", tmp_path)


def inat_json(path, rows, names):
    """Rows (path, label) as iNaturalist's annotation file: images and annotations apart, in other orders."""
    ids = [1000 + 7 * i for i in range(len(rows))]
    path.write_text(json.dumps({
        "images": [{"id": i, "file_name": name} for i, (name, _) in zip(ids, rows)][::-1],
        "annotations": [{"id": i, "image_id": i, "category_id": label} for i, (_, label) in zip(ids, rows)],
        "categories": [{"id": i, "name": name} for i, name in enumerate(names)][::-1]}))


@pytest.mark.parametrize("name", ["inat18", "inat17"])
def test_inaturalist_from_the_official_json_is_the_lists_set(tmp_path, name):
    C = PUBLISHED[name]["classes"]
    folder = "train_val_images/Aves/Acanthis {} bird" if name == "inat17" else "train_val2018/Aves/{}"
    train = [(f"{folder.format(i)}/a b{i}.jpg", i) for i in range(C)]
    val = [(f"{folder.format(i)}/val {i}.jpg", i) for i in (3, 0, 5)]
    touch(tmp_path, [train[0][0], val[0][0]])
    inat_json(tmp_path / f"train20{name[4:]}.json", train, [f"name {i}" for i in range(C)])
    inat_json(tmp_path / f"val20{name[4:]}.json", val, [f"name {i}" for i in range(C)])
    official = load(name, tmp_path)
    write_list(tmp_path / f"{LISTED[name][0]}_train.txt", train)
    write_list(tmp_path / f"{LISTED[name][0]}_val.txt", val)
    listed = load(name, tmp_path)
    for part, rows in (("train", train), ("test", val)):
        for data in (official, listed):
            assert paths_of(getattr(data, part), tmp_path) == [path for path, _ in rows]
            assert getattr(data, part).targets.tolist() == [label for _, label in rows]
    assert official.class_names[17] == "name 17" and official.val is None
    assert listed.class_names[17] == folder.format(17).split("/", 1)[1]


def own_lists(root, train, test):
    """A user's own list files; every image is there. Returns --train-list and --test-list."""
    touch(root, [path for path, _ in [*train, *test]])
    write_list(root / "mine train.txt", train)
    write_list(root / "mine test.txt", test)
    return str(root / "mine train.txt"), str(root / "mine test.txt")


TRAIN = [("a b/one two.jpg", 0), ("a b/3.jpg", 0), ("c/  4.jpg", 1), ("d/5.jpg", 2)]
TEST = [("c/6 .jpg", 1), ("a b/7.jpg", 0)]


def test_lists_of_ones_own_take_spaces_and_any_line_ends(tmp_path):
    lists = own_lists(tmp_path, TRAIN, TEST)
    with open(lists[1], "wb") as file:
        file.write(b"c/6 .jpg\t1\r\n  a b/7.jpg   0\r\n\r\n\n")
    for name in ("imagenet_lt", "cub200_lt", "inat17"):
        data = load(name, tmp_path, train_list=lists[0], test_list=lists[1])
        assert paths_of(data.train, tmp_path) == [path for path, _ in TRAIN]
        assert paths_of(data.test, tmp_path) == ["c/6 .jpg", "a b/7.jpg"]
        assert data.train.targets.tolist() == [0, 0, 1, 2] and data.test.targets.tolist() == [1, 0]
        assert data.num_classes == 3 and data.val is None and data.class_names == ["a b", "c", "d"]
    assert load("inat17", tmp_path, train_list=lists[0], test_list=lists[1]).color_jitter == 0


def test_a_folder_takes_lists_of_ones_own_and_looks_at_their_images(tmp_path):
    lists = own_lists(tmp_path, TRAIN, TEST)
    with pytest.raises(ValueError, match="can be decoded"):
        load("folder", tmp_path, train_list=lists[0], test_list=lists[1])
    for path, _ in TRAIN + TEST:
        jpeg(tmp_path / path)
    data = load("folder", tmp_path, train_list=lists[0], test_list=lists[1])
    assert data.image_size == 40 == image_side("folder", tmp_path)  # the recipe is a small set's
    assert data.color_jitter == 0 and data.class_counts.tolist() == [2, 1, 1]


def test_one_list_of_ones_own_stands_beside_the_data_sets_other(tmp_path):
    rows = write_listed(tmp_path, "places_lt")
    write_list(tmp_path / "mine.txt", rows["test"][:5])
    data = load("places_lt", tmp_path, test_list=tmp_path / "mine.txt")
    assert len(data.test) == 5 and len(data.train) == 366 and len(data.val) == 365
    data = load("places_lt", tmp_path, train_list=tmp_path / "Places_LT_val.txt")
    assert data.val is None and len(data.train) == 365  # its val images are training images now
    for name in ("folder", "dtd_lt"):
        with pytest.raises(ValueError, match="give both --train-list and --test-list"):
            load(name, tmp_path, train_list=tmp_path / "mine.txt")
    for name in ("cifar10_lt", "a.npz"):
        with pytest.raises(ValueError, match="name image files"):
            load(name, tmp_path, train_list=tmp_path / "mine.txt")


def test_a_fixed_list_takes_no_factor(tmp_path):
    write_listed(tmp_path, "places_lt")
    with pytest.raises(ValueError, match="--imb-factor does not apply to places_lt"):
        load("places_lt", tmp_path, imb_factor=10)


# What is wrong -> training rows, test rows, what the error names
FAULTS = {
    "label beyond the data set": (TRAIN, [*TEST, ("c/8.jpg", 3)], "mine test.txt, line 3: label 3 is out of"),
    "huge label": ([*TRAIN, ("c/8.jpg", 10**15)], TEST, "mine train.txt, line 5: label 10{15} among only"),
    "class without training image": (
        [*TRAIN, ("d/8.jpg", 4)], [*TEST, ("d/9.jpg", 3)], "mine test.txt, line 3: class 3 has no image"),
    "class without any image": (
        [*TRAIN, ("d/8.jpg", 4)], TEST, "mine train.txt: class 3 of 0..4 has no image"),
    "training image in the test list": (
        TRAIN, [*TEST, TRAIN[2]], r"mine test.txt, line 3: c/  4.jpg is in another split too \(.*train.txt, "
        r"line 3\)"),
    "the same list twice": (TRAIN, TRAIN, "mine test.txt, line 1: .* is in another split too"),
    "no label": (TRAIN, [*TEST, ("c/8.jpg", "")], "mine test.txt, line 3: must be `relative/path label`"),
    "negative label": ([("c/8.jpg", -1), *TRAIN], TEST, "mine train.txt, line 1: must be .* 'c/8.jpg -1'"),
    "label before the path": (TRAIN, [(1, "c/8.jpg")], "mine test.txt, line 1: must be .* '1 c/8.jpg'"),
    "empty list": (TRAIN, [], "mine test.txt is empty"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_bad_lists_are_refused_with_file_and_line(tmp_path, fault):
    train, test, message = FAULTS[fault]
    lists = own_lists(tmp_path, TRAIN, TEST)
    write_list(Path(lists[0]), train)
    write_list(Path(lists[1]), test)
    with pytest.raises(ValueError, match=message):
        load("imagenet_lt", tmp_path, train_list=lists[0], test_list=lists[1])


def test_a_missing_folder_or_list_and_a_bad_json_are_refused_by_name(tmp_path):
    lists = own_lists(tmp_path, TRAIN, TEST)
    elsewhere = tmp_path / "elsewhere"
    with pytest.raises(ValueError, match=r"no such folder: .*elsewhere/a b \(.*mine train.txt, line 1 names"):
        load("places_lt", elsewhere, train_list=lists[0], test_list=lists[1])
    with pytest.raises(ValueError, match="no such list file: .*nothing.txt"):
        load("places_lt", tmp_path, train_list=tmp_path / "nothing.txt", test_list=lists[1])
    with pytest.raises(ValueError, match="no such list file: .*ImageNet_LT_train.txt"):
        load("imagenet_lt", elsewhere)
    write_listed(tmp_path, "inat18")
    (tmp_path / "iNaturalist18_train.txt").unlink()
    for content, message in (("{", "is not an iNaturalist"), ('{"images": []}', "is not an iNaturalist"),
                             ('{"images": [], "annotations": [], "categories": []}', "has no annotations")):
        (tmp_path / "train2018.json").write_text(content)
        with pytest.raises(ValueError, match=f"train2018.json {message}"):
            load("inat18", tmp_path)


def test_lists_beyond_the_published_classes_are_refused(tmp_path):
    rows = write_listed(tmp_path, "imagenet_lt")
    write_list(tmp_path / "ImageNet_LT_train.txt", [*rows["train"], ("train/x/y.JPEG", 1000)])
    with pytest.raises(ValueError, match="ImageNet_LT_train.txt, line 1002: label 1000 is out of range"):
        load("imagenet_lt", tmp_path)
    write_list(tmp_path / "ImageNet_LT_train.txt", rows["train"][:-2])
    (tmp_path / "ImageNet_LT_val.txt").unlink()
    with pytest.raises(ValueError, match="ImageNet_LT_test.txt, line 1: class 999 has no image in the "):
        load("imagenet_lt", tmp_path)


# ---------------------------------------------------------------- the small sets

def ldam_counts(sizes, factor, n_max, by_size):
    """Images that the rule keeps of classes of these sizes, the slow way."""
    order = sorted(range(len(sizes)), key=lambda c: -sizes[c]) if by_size else range(len(sizes))
    kept = dict(zip(order, long_tail_counts(len(sizes), n_max, factor)))
    return [min(kept[c], sizes[c]) for c in range(len(sizes))]


def assert_cut(name, root, train, test, class_names, factor, n_max, by_size=False, val=None):
    """load(name) keeps the rule's images of `train`, and all of the others; rows are (path, label)."""
    data = load(name, root)
    sizes = [sum(label == c for _, label in train) for c in range(len(class_names))]
    counts = ldam_counts(sizes, factor, n_max, by_size)
    assert data.class_counts.tolist() == counts and sum(counts) < len(train)
    kept = long_tail_indices([label for _, label in train], counts, seed=0)
    assert paths_of(data.train, root) == [train[i][0] for i in kept]
    assert data.train.targets.tolist() == [train[i][1] for i in kept]
    for split, rows in ((data.val, val), (data.test, test)):
        assert (split is None) == (rows is None)
        if rows:
            assert paths_of(split, root) == [path for path, _ in rows]
            assert split.targets.tolist() == [label for _, label in rows]
    assert data.class_names == class_names and data.image_size == 224 and data.color_jitter == 0.4
    assert (data.mean, data.std) == IMAGENET
    other = load(name, root, seed=1)
    assert other.class_counts.tolist() == counts and (other.train.paths != data.train.paths).any()
    assert (other.test.paths == data.test.paths).all()
    assert load(name, root, imb_factor=1).class_counts.tolist() == ldam_counts(sizes, 1, n_max, by_size)
    return data


def test_caltech101_lt_cuts_30_images_of_a_class_and_tests_on_the_others(tmp_path):
    names, sizes = ["BACKGROUND_Google", "Faces easy", "ant"], [40, 33, 31]
    folder = "caltech101/101_ObjectCategories"
    touch(tmp_path, [f"{folder}/{name}/image_{i:04d}.jpg" for name, size in zip(names, sizes)
                     for i in range(size)])
    data = load("caltech101_lt", tmp_path)
    assert data.class_names == names and data.class_counts.tolist() == [30, 9, 3]
    assert np.bincount(data.test.targets).tolist() == [10, 3, 1]
    whole = load("caltech101_lt", tmp_path, imb_factor=1)
    train, test = set(paths_of(whole.train, tmp_path)), set(paths_of(whole.test, tmp_path))
    assert len(train) == 90 and not train & test and len(train | test) == sum(sizes)
    assert set(paths_of(data.train, tmp_path)) <= train
    assert set(paths_of(load("caltech101_lt", tmp_path, seed=3).test, tmp_path)) == test


def write_cub(root):
    names = ["001.Black_footed_Albatross", "002.Laysan_Albatross", "003.Sooty_Albatross"]
    rows = [(f"{name}/{name[4:]}_{i}.jpg", c, i % 2) for c, name in enumerate(names) for i in range(62)]
    folder = root / "CUB_200_2011"
    touch(folder / "images", [path for path, _, _ in rows])
    for file, values in (("images.txt", [path for path, _, _ in rows]), ("classes.txt", names),
                         ("image_class_labels.txt", [label + 1 for _, label, _ in rows]),
                         ("train_test_split.txt", [train for _, _, train in rows])):
        (folder / file).write_text("".join(f"{i} {value}\n" for i, value in enumerate(values, 1)))
    return names, [[(f"CUB_200_2011/images/{path}", label) for path, label, train in rows if train == part]
                   for part in (1, 0)]


def test_cub200_lt_reads_its_four_files(tmp_path):
    names, (train, test) = write_cub(tmp_path)
    assert_cut("cub200_lt", tmp_path, train, test, names, 10, 30)
    labels = tmp_path / "CUB_200_2011" / "image_class_labels.txt"
    whole = labels.read_text()
    for text, message in ((whole.replace("\n7 1\n", "\n7\n"), "image_class_labels.txt, line 7: must be `7 "),
                          (whole.replace("\n7 1\n", "\n7 x\n"), "invalid literal"),
                          (whole[:-6], "differ in their number of lines"),
                          (whole.replace("\n7 1\n", "\n7 4\n"), r"labels must lie in 0..2, found 0..3")):
        labels.write_text(text)
        with pytest.raises(ValueError, match=message):
            load("cub200_lt", tmp_path)
    labels.unlink()
    with pytest.raises(ValueError, match="labels.txt .looked for CUB_200_2011/ of CUB_200_2011.tgz"):
        load("cub200_lt", tmp_path)


def test_fruits360_lt_takes_the_second_largest_class_and_sorts_by_size(tmp_path):
    names, sizes, rows = ["apple 6", "cabbage white 1", "pear 3"], [110, 120, 300], {}
    for part in ("Training", "Validation", "Test"):
        rows[part] = [(f"fruits-360-original-size/{part}/{name}/r0_{i:03d}.jpg", c)
                      for c, name in enumerate(names) for i in range(sizes[c] if part == "Training" else 2)]
        touch(tmp_path, [path for path, _ in rows[part]])
    data = assert_cut("fruits360_lt", tmp_path, rows["Training"], rows["Test"], names, 100, 120,
                      by_size=True, val=rows["Validation"])
    assert data.class_counts.tolist() == [1, 12, 120]
    with pytest.raises(ValueError, match="--imb-factor 1000, with 120 .* at most --imb-factor 120 works"):
        load("fruits360_lt", tmp_path, imb_factor=1000)
    (tmp_path / "fruits-360-original-size" / "Test").rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="no such folder: .*Test"):
        load("fruits360_lt", tmp_path)


def test_fgvc_aircraft_lt_cuts_trainval_by_variant(tmp_path):
    variants = ["707-320", "A 310", "Boeing 747"]
    rows = {part: [(f"{part}{i:06d}", i % 3) for i in range(n)]
            for part, n in (("trainval", 204), ("test", 6))}
    folder = tmp_path / "fgvc-aircraft-2013b" / "data"
    for part in rows:
        touch(folder / "images", [f"{image}.jpg" for image, _ in rows[part]])
        write_list(folder / f"images_variant_{part}.txt", [(image, variants[c]) for image, c in rows[part]])
    (folder / "variants.txt").write_text("\n".join(variants) + "\n")
    train, test = ([(f"fgvc-aircraft-2013b/data/images/{image}.jpg", c) for image, c in rows[part]]
                   for part in ("trainval", "test"))
    data = assert_cut("fgvc_aircraft_lt", tmp_path, train, test, variants, 10, 6667 / 100)
    assert data.class_counts[0] == 66


def test_dtd_lt_cuts_train1_and_val1(tmp_path):
    rows = {part: [(f"{name}/{name}_{part}{i:04d}.jpg", c) for c, name in enumerate(["banded", "woven"])
                   for i in range(45 if part != "test" else 3)] for part in ("train", "val", "test")}
    for part in rows:
        touch(tmp_path / "dtd" / "dtd" / "images", [path for path, _ in rows[part]])
        labels = tmp_path / "dtd" / "dtd" / "labels" / f"{part}1.txt"
        labels.parent.mkdir(exist_ok=True)
        labels.write_text("".join(f"{path}\n" for path, _ in rows[part]))
    train, test = ([(f"dtd/dtd/images/{path}", c) for path, c in some]
                   for some in (rows["train"] + rows["val"], rows["test"]))
    data = assert_cut("dtd_lt", tmp_path, train, test, ["banded", "woven"], 10, 80)
    assert data.class_counts.tolist() == [80, 8]


def mat(path, **content):
    path.parent.mkdir(parents=True, exist_ok=True)
    scipy_io = pytest.importorskip("scipy.io", reason="without scipy these data sets cannot be read at all")
    scipy_io.savemat(path, content)


def cells(values):
    """A MATLAB cell array [n, 1]."""
    array = np.empty((len(values), 1), object)
    array[:, 0] = values
    return array


def test_stanford_dogs_lt_reads_its_matlab_lists(tmp_path):
    breeds = ["n02085620-Chihuahua", "n02085782-Japanese_spaniel", "n02098105-soft-coated_wheaten_terrier"]
    rows = {part: [(f"{breed}/{breed[:9]}_{part}{i}.jpg", c) for c, breed in enumerate(breeds)
                   for i in range(n)] for part, n in (("train", 100), ("test", 3))}
    for part in rows:
        mat(tmp_path / "stanford_dogs" / f"{part}_list.mat",
            file_list=cells([path for path, _ in rows[part]]),
            labels=np.array([[c + 1.0] for _, c in rows[part]]))
        touch(tmp_path / "stanford_dogs" / "Images", [path for path, _ in rows[part]])
    train, test = ([(f"stanford_dogs/Images/{path}", c) for path, c in rows[part]] for part in rows)
    assert_cut("stanford_dogs_lt", tmp_path, train, test,
               ["Chihuahua", "Japanese_spaniel", "soft-coated_wheaten_terrier"], 10, 100, by_size=True)
    (tmp_path / "stanford_dogs" / "test_list.mat").unlink()
    with pytest.raises(ValueError, match="no such file: .*test_list.mat .looked for .* of lists.tar"):
        load("stanford_dogs_lt", tmp_path)


def test_stanford_cars_lt_reads_its_matlab_lists(tmp_path):
    names, sizes = ["Acura RL Sedan 2012", "Audi S4", "BMW M3 Coupe"], [30, 48, 60]
    folder = tmp_path / "stanford_cars"
    rows = {"train": [(f"{i:05d}.jpg", c) for i, c in enumerate(np.repeat(range(3), sizes).tolist())],
            "test": [(f"{i:05d}.jpg", i % 3) for i in range(7)]}
    for part, file in (("train", "devkit/cars_train_annos.mat"), ("test", "cars_test_annos_withlabels.mat")):
        touch(folder / f"cars_{part}", [path for path, _ in rows[part]])
        mat(folder / file, annotations=np.array([(c + 1, path) for path, c in rows[part]],
                                                [("class", object), ("fname", object)]))
    mat(folder / "devkit" / "cars_meta.mat", class_names=cells(names).T)
    train, test = ([(f"stanford_cars/cars_{part}/{path}", c) for path, c in rows[part]] for part in rows)
    data = assert_cut("stanford_cars_lt", tmp_path, train, test, names, 10, 48, by_size=True)
    assert data.class_counts.tolist() == [4, 15, 48]
    (folder / "cars_test_annos_withlabels.mat").unlink()
    with pytest.raises(ValueError, match="put stanford_cars/ with .*cars_test_annos_withlabels.mat there"):
        load("stanford_cars_lt", tmp_path)


def test_flowers102_lt_cuts_train_and_val(tmp_path, monkeypatch):
    import hashlib
    import torchvision
    folder, labels = tmp_path / "flowers-102", np.arange(102 * 21) % 102  # of image 1, 2, ...
    touch(folder / "jpg", [f"image_{i:05d}.jpg" for i in range(1, len(labels) + 1)])
    order = np.random.default_rng(0).permutation(len(labels)) + 1
    order = order[np.argsort((order - 1) // 102, kind="stable")]  # 10 of each class, then 10, then 1
    ids = {"trnid": order[:1020], "valid": order[1020:2040], "tstid": order[2040:]}
    mat(folder / "imagelabels.mat", labels=labels[None] + 1)
    mat(folder / "setid.mat", **{key: value[None] for key, value in ids.items()})
    md5 = {file: hashlib.md5((folder / file).read_bytes()).hexdigest()
           for file in ("imagelabels.mat", "setid.mat")}
    monkeypatch.setattr(torchvision.datasets.Flowers102, "_file_dict", {
        "label": ("imagelabels.mat", md5["imagelabels.mat"]), "setid": ("setid.mat", md5["setid.mat"])})
    rows = {key: [(f"flowers-102/jpg/image_{i:05d}.jpg", int(labels[i - 1])) for i in value]
            for key, value in ids.items()}
    names = getattr(torchvision.datasets.Flowers102, "classes", [str(i) for i in range(102)])  # since 0.22
    data = assert_cut("flowers102_lt", tmp_path, rows["trnid"] + rows["valid"], rows["tstid"], names, 10, 20)
    assert all(rooms.facts(data)[key] == value for key, value in PUBLISHED["flowers102_lt"].items()
               if key != "test")


@pytest.mark.parametrize("name", MATLAB)
def test_without_scipy_a_matlab_split_says_so(tmp_path, monkeypatch, name):
    monkeypatch.setattr(builders, "find_spec", lambda package: None)
    with pytest.raises(ValueError, match="needs scipy to be read: pip install scipy, or give lists"):
        load(name, tmp_path)
    lists = own_lists(tmp_path, TRAIN, TEST)  # these need none
    assert load(name, tmp_path, train_list=lists[0], test_list=lists[1]).num_classes == 3


# ---------------------------------------------------------------- what is published

def test_published_numbers_of_the_cut_sets_are_the_rules():
    for name, (_, factor, n_max, _) in CUT.items():
        row = PUBLISHED[name]
        if "groups" not in row:
            assert n_max is None  # they depend on the second largest class
            continue
        counts = long_tail_counts(row["classes"], n_max, factor)
        groups = shot_groups(torch.tensor(counts))
        assert (row["train"], row["largest"], row["smallest"]) == (sum(counts), counts[0], counts[-1])
        assert row["groups"] == tuple(int(group.sum()) for group in groups.values())


def test_published_numbers_of_the_fixed_lists_agree_with_one_another():
    for name in LISTED:
        row = PUBLISHED[name]
        assert sum(row.get("groups", [row["classes"]])) == row["classes"]
        per_class = {"imagenet_lt": (20, 50), "places_lt": (20, 100), "inat18": (None, 3)}.get(name)
        if per_class:
            assert row["test"] == per_class[1] * row["classes"]
            assert per_class[0] is None or row["val"] == per_class[0] * row["classes"]


def test_the_readme_s_table_has_the_published_numbers():
    table = (ROOT / "README.md").read_text().split("## Data sets")[1].split("\n##")[0]
    rows = [line.split("|")[1:-1] for line in table.splitlines() if line.startswith("| `")]
    numbers = lambda cell: [int(number.replace(",", "")) for number in re.findall(r"[\d,]*\d", cell)]
    known = []
    for name_cell, _, _, classes, images in rows:
        names = re.findall("`(.*?)`", name_cell)  # a row may hold several sets
        known += names
        published = [PUBLISHED.get(name, {}) for name in names]
        assert numbers(classes) == [row["classes"] for row in published if row], names
        sizes = [list(dict.fromkeys(row[part] for row in published if part in row))
                 for part in ("train", "val", "test")]  # the two CIFARs share their test images
        assert numbers(images) == sum(sizes, []), names
        assert ("not published" in images) == any(row and "train" not in row for row in published), names
    assert sorted(known) == sorted([*PUBLISHED, "FILE.npz", "folder"])
    assert {*PUBLISHED, "folder"} == {*rooms.BUILDERS}
    assert set(re.findall(r"`(\w+)`\*", table)) == set(MATLAB)  # these need scipy


def test_the_embedded_set_has_its_published_numbers(capsys):
    assert main(["fashion_lt"]) == 0
    shown = capsys.readouterr().out
    assert "2478 training images (1000..10 a class), 1000 val, 2000 test; 5 many, 3 medium, 2 few" in shown


def test_facts_know_which_class_has_how_many_images():
    def facts(targets):
        split = ImageFiles(np.array([b"a"] * len(targets)), np.array(targets))
        return rooms.facts(rooms.Dataset("tiny", split, None, split, ["a", "b", "c"], (0,) * 3, (1,) * 3, 4))
    counts = np.repeat([0, 1, 2], [101, 100, 19])
    found = facts(counts)
    assert found["groups"] == (1, 1, 1) and (found["largest"], found["smallest"]) == (101, 19)
    other = facts(2 - counts)
    assert found["counts"] != other["counts"]
    assert {**found, "counts": 0} == {**other, "counts": 0}


# ---------------------------------------------------------------- the checker

def write_fruits(root, sizes=(9, 8, 4), test=3):
    """Fruits-360's layout with JPEGs: RGB, the first of a class grey, the second CMYK."""
    folder = root / "fruits-360-original-size"
    for part in ("Training", "Test"):
        for c, size in enumerate(sizes):
            for i in range(size if part == "Training" else test):
                mode = ["L", "CMYK", "RGB"][min(i, 2)]
                jpeg(folder / part / f"fruit {c}" / f"r {i}.jpg", 100 * c + i, mode)
    return folder


def test_the_checker_passes_a_whole_set_and_shows_its_statistics(tmp_path, monkeypatch, capsys):
    write_fruits(tmp_path)
    published = dict(classes=3, train=16, test=9, largest=8, smallest=2, groups=(0, 0, 3))
    monkeypatch.setitem(PUBLISHED, "fruits360_lt", published)
    monkeypatch.setitem(CUT, "fruits360_lt", (CUT["fruits360_lt"][0], 4, None, ""))
    published["train"] = sum(load("fruits360_lt", tmp_path).class_counts)
    assert main(["fruits360_lt", "--data-dir", str(tmp_path), "--workers", "2"]) == 0
    shown = capsys.readouterr().out
    images = [np.asarray(read_image(os.fsdecode(path)), np.float64) / 255
              for path in load("fruits360_lt", tmp_path).train.paths]
    pixels = np.concatenate([image.reshape(-1, 3) for image in images])  # all of one size
    for numbers in (pixels.mean(0), pixels.std(0)):
        assert " ".join(f"{number:.3f}" for number in numbers) in shown
    assert "every file is there and decodes" in shown
    assert main(["fruits360_lt", "--data-dir", str(tmp_path), "--fast"]) == 0
    assert "not decoded" in capsys.readouterr().out


def test_statistics_count_every_image_alike(tmp_path, capsys):
    for name, side, colour in (("a", 4, (0, 51, 0)), ("b", 40, (255, 102, 51))):
        (tmp_path / "train" / name).mkdir(parents=True)
        Image.new("RGB", (side, side), colour).save(tmp_path / "train" / name / f"{side}.png")
    (tmp_path / "test").symlink_to(tmp_path / "train")
    assert check(load("folder", tmp_path)) == []
    assert "mean 0.500 0.300 0.100 and standard deviation 0.500 0.100 0.100" in capsys.readouterr().out


def test_the_checker_names_each_fault(tmp_path, monkeypatch, capsys):
    folder = write_fruits(tmp_path)
    monkeypatch.setitem(CUT, "fruits360_lt", (CUT["fruits360_lt"][0], 1, None, ""))
    monkeypatch.setitem(PUBLISHED, "fruits360_lt", dict(
        classes=3, train=21, val=5, test=9, largest=8, smallest=4, groups=(0, 0, 3), counts="0" * 16))
    data = load("fruits360_lt", tmp_path)
    halve(folder / "Training" / "fruit 0" / "r 1.jpg")
    (folder / "Training" / "fruit 1" / "r 0.jpg").write_bytes(b"")
    (folder / "Test" / "fruit 2" / "r 1.jpg").unlink()
    data.test.paths[-1] = data.test.paths[0]
    wrong = check(data, PUBLISHED["fruits360_lt"], workers=2)
    assert len(wrong) == 6
    for line, pattern in zip(wrong, [
            "train: 20, published: 21", "the images per class are not the published ones",
            "train: cannot decode .*fruit 0/r 1.jpg: .*truncated", "train: cannot decode .*fruit 1/r 0.jpg: ",
            "test: .*fruit 0/r 0.jpg is there twice", "test: no such file: .*fruit 2/r 1.jpg"]):
        assert re.match(pattern, line), (line, pattern)
    assert len(check(data, None, fast=True)) == 2  # --fast sees the missing file and the one listed twice


def test_the_checker_is_a_command_that_ends_with_1_and_ten_offenders(tmp_path):
    write_listed(tmp_path, "imagenet_lt")  # lists alone: every image is missing, and there are too few
    done = subprocess.run([sys.executable, "-m", "common.data", "imagenet_lt", "--data-dir", str(tmp_path),
                           "--fast"], cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 1, done.stderr
    lines = done.stdout.splitlines()
    start = next(i for i, line in enumerate(lines) if line.endswith("things are wrong, the first ten:"))
    offenders = lines[start + 1:]
    assert len(offenders) == 10 and "train: 1001, published: 115846" in offenders
    missing = 1001 + 1000 + 1000
    assert lines[start].startswith(f"{missing + sum('published' in line for line in offenders)} things")
    assert any("no such file" in line and "n01440764_1.JPEG" in line for line in offenders)


@pytest.mark.parametrize("flags, message", [
    (["imagenet_lt"], "no such list file"), (["mars_lt"], "unknown data set 'mars_lt'"),
    (["places_lt", "--imb-factor", "0.5"], "imbalance factor"), (["--fast"], "required: name"),
    (["folder", "--train-list", "a.txt"], "give both --train-list and --test-list")])
def test_the_checker_ends_with_2_and_one_line_on_bad_input(tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit) as caught:
        main([*flags, "--data-dir", str(tmp_path)])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error


def test_grey_palette_and_cmyk_files_are_read_as_rgb(tmp_path):
    grey = jpeg(tmp_path / "l.jpg", mode="L")
    image = read_image(tmp_path / "l.jpg")
    assert image.mode == "RGB" and len(set(np.asarray(image)[3, 4])) == 1
    assert abs(np.asarray(image)[..., 0].astype(int) - grey[..., 0]).mean() < 6
    Image.new("CMYK", (8, 8), (255, 0, 0, 0)).save(tmp_path / "c.jpg")
    assert np.asarray(read_image(tmp_path / "c.jpg"))[4, 4] == pytest.approx((0, 255, 255), abs=3)
    Image.new("P", (8, 8), 1).save(tmp_path / "p.png")
    assert read_image(tmp_path / "p.png").mode == "RGB"
    with pytest.raises(ValueError, match="nothing.jpg"):
        read_image(tmp_path / "nothing.jpg")
