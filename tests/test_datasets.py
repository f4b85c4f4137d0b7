"""The papers' data sets of image files: builders, list files, the checker."""
import json
import re
import runpy
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from common import builders, data as rooms
from common.data import (CUT, LISTED, MATLAB, PUBLISHED, ImageFiles, check, image_side, load,
                         long_tail_counts, long_tail_indices, main)
from common.evaluate import shot_groups
from tests.tiny import ROOT, names_of, picture

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
INAT = ((0.466, 0.471, 0.380), (0.195, 0.194, 0.192))


def touch(root, paths):
    """Empty files: builders look at names alone."""
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()


def write_list(path, rows):
    path.write_text("".join(f"{name} {label}\n" for name, label in rows))


def rows_of(split, root):
    return list(zip(names_of(split, root), split.targets.tolist()))


# ---------------------------------------------------------------- list files

NAMES = {  # of a training, a validation and a test image of class i
    "imagenet_lt": ("train/n{:08d}/1.JPEG", "train/n{:08d}/762.JPEG", "val/n{:08d}/ILSVRC2012.JPEG"),
    "places_lt": ("train/place_{}/4.jpg", "train/place_{}/2049.jpg", "val/place_{}/Places365.jpg"),
    "inat18": ("train_val2018/Plantae/{}/a.jpg", None, "train_val2018/Plantae/{}/b.jpg")}


def write_listed(root, name):
    """The list files of a fixed set with all of its classes: one training image of a class, two of the last;
    the folders that the first lines name. Returns {split: rows}."""
    C, (prefix, tested) = PUBLISHED[name]["classes"], LISTED[name]
    rows = {part: [(pattern.format(i), i) for i in range(C)]
            for part, pattern in zip(("train", "val", "test"), NAMES[name]) if pattern}
    rows["test"].reverse()
    rows["train"].append((NAMES[name][0].format(C - 1).replace(".", "_2."), C - 1))
    for part in rows:
        write_list(root / f"{prefix}_{tested if part == 'test' else part}.txt", rows[part])
        (root / rows[part][0][0]).parent.mkdir(parents=True, exist_ok=True)
    return rows


@pytest.mark.parametrize("name, class_name, jitter, normalisation", [
    ("imagenet_lt", "n00000001", 0.4, IMAGENET), ("places_lt", "place_1", 0.4, IMAGENET),
    ("inat18", "Plantae/1", 0.0, INAT)])
def test_listed_sets_have_their_lists_images_in_the_lists_order(tmp_path, name, class_name, jitter,
                                                                normalisation):
    rows = write_listed(tmp_path, name)
    data = load(name, tmp_path)
    for part in ("train", "val", "test"):
        split = getattr(data, part)
        assert rows.get(part) == (split and rows_of(split, tmp_path))
    assert data.num_classes == PUBLISHED[name]["classes"] and data.class_counts[-1] == 2
    assert data.class_names[1] == class_name and data.color_jitter == jitter
    assert (data.mean, data.std) == normalisation
    assert data.image_size == 224 == image_side(name, tmp_path)


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
    parts = {"train": [(f"{folder.format(i)}/a b{i}.jpg", i) for i in range(C)],
             "val": [(f"{folder.format(i)}/val {i}.jpg", i) for i in (3, 0, 5)]}
    for part, rows in parts.items():
        touch(tmp_path, [rows[0][0]])
        inat_json(tmp_path / f"{part}20{name[4:]}.json", rows, [f"name {i}" for i in range(C)])
    official = load(name, tmp_path)
    for part, rows in parts.items():
        write_list(tmp_path / f"{LISTED[name][0]}_{part}.txt", rows)
    listed = load(name, tmp_path)

    for data in (official, listed):
        assert rows_of(data.train, tmp_path) == parts["train"] and data.val is None
        assert rows_of(data.test, tmp_path) == parts["val"]
    assert official.class_names[17] == "name 17"
    assert listed.class_names[17] == folder.format(17).split("/", 1)[1]


TRAIN = [("a b/one two.jpg", 0), ("a b/3.jpg", 0), ("c/  4.jpg", 1), ("d/5.jpg", 2)]
TEST = [("c/6 .jpg", 1), ("a b/7.jpg", 0)]


def own_lists(root, train=TRAIN, test=TEST):
    """A user's own list files, and the images of TRAIN and TEST. Returns `load`'s arguments."""
    touch(root, [path for path, _ in TRAIN + TEST])
    lists = {"train_list": root / "mine train.txt", "test_list": root / "mine test.txt"}
    write_list(lists["train_list"], train)
    write_list(lists["test_list"], test)
    return lists


def test_lists_of_ones_own_take_spaces_and_any_line_ends(tmp_path):
    lists = own_lists(tmp_path)
    lists["test_list"].write_bytes(b"c/6 .jpg\t1\r\n  a b/7.jpg   0\r\n\r\n\n")
    for name, jitter in (("imagenet_lt", 0.4), ("cub200_lt", 0.4), ("inat17", 0)):
        data = load(name, tmp_path, **lists)
        assert rows_of(data.train, tmp_path) == TRAIN and rows_of(data.test, tmp_path) == TEST
        assert data.class_names == ["a b", "c", "d"] and data.val is None and data.color_jitter == jitter


def test_one_list_of_ones_own_stands_beside_the_data_sets_other(tmp_path):
    rows = write_listed(tmp_path, "places_lt")
    write_list(tmp_path / "mine.txt", rows["test"][:5])
    data = load("places_lt", tmp_path, test_list=tmp_path / "mine.txt")
    assert len(data.test) == 5 and len(data.train) == 366 and len(data.val) == 365
    data = load("places_lt", tmp_path, train_list=tmp_path / "Places_LT_val.txt")
    assert data.val is None and len(data.train) == 365  # its val images are training images now

    for name, words in (("folder", "give both --train-list and --test-list"), ("dtd_lt", "give both"),
                        ("cifar10_lt", "name image files"), ("a.npz", "name image files")):
        with pytest.raises(ValueError, match=words):
            load(name, tmp_path, train_list=tmp_path / "mine.txt")


@pytest.mark.parametrize("name", ["places_lt", "fashion_lt"])
def test_a_fixed_list_takes_no_factor(name, tmp_path):
    with pytest.raises(ValueError, match=f"--imb-factor does not apply to {name}"):
        load(name, tmp_path, imb_factor=10)


FAULTS = {  # what is wrong: training rows, test rows, what the error says
    "label beyond the data set": (TRAIN, [*TEST, ("c/8.jpg", 3)], "mine test.txt, line 3: label 3 is out of"),
    "huge label": ([*TRAIN, ("c/8.jpg", 10**15)], TEST, "mine train.txt, line 5: label 10{15} among only"),
    "class without training image": (
        [*TRAIN, ("d/8.jpg", 4)], [*TEST, ("d/9.jpg", 3)], "mine test.txt, line 3: class 3 has no image"),
    "class without any image": (
        [*TRAIN, ("d/8.jpg", 4)], TEST,
        "mine train.txt: class 3 of 0..4 has no image.*labels have gaps .3 has no image.: number the 4"),
    "labels from 1": ([("c/8.jpg", 1), ("d/8.jpg", 2)], [("c/9.jpg", 1)],
                      "mine train.txt: labels start at 1, .*: subtract 1 from every label"),
    "two labels": ([*TRAIN, (TRAIN[0][0], 1)], TEST,
                   "mine train.txt, line 5: a b/one two.jpg has label 1 here and 0 in line 1"),
    "training image in the test list": (
        TRAIN, [*TEST, TRAIN[2]],
        r"mine test.txt, line 3: c/  4.jpg is in another split too \(.*train.txt, line 3\)"),
    "no label": (TRAIN, [*TEST, ("c/8.jpg", "")], "mine test.txt, line 3: must be `relative/path label`"),
    "negative label": ([("c/8.jpg", -1), *TRAIN], TEST, "mine train.txt, line 1: must be .* 'c/8.jpg -1'"),
    "label before the path": (TRAIN, [(1, "c/8.jpg")], "mine test.txt, line 1: must be .* '1 c/8.jpg'"),
    "empty list": (TRAIN, [], "mine test.txt is empty"),
    "one class": (TRAIN[:1], [("a b/7.jpg", 0)], "one class alone, a b"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_bad_lists_are_refused_with_file_and_line(tmp_path, fault):
    *rows, message = FAULTS[fault]
    with pytest.raises(ValueError, match=message):
        load("imagenet_lt", tmp_path, **own_lists(tmp_path, *rows))


def test_a_missing_folder_or_list_and_a_bad_json_are_refused_by_name(tmp_path):
    lists, elsewhere = own_lists(tmp_path), tmp_path / "elsewhere"
    with pytest.raises(ValueError, match=r"no such folder: .*elsewhere/a b \(.*mine train.txt, line 1 names"):
        load("places_lt", elsewhere, **lists)
    with pytest.raises(ValueError, match="no such list file: .*nothing.txt"):
        load("places_lt", tmp_path, **{**lists, "train_list": tmp_path / "nothing.txt"})
    write_list(tmp_path / "mine train_classes.txt", [("one", ""), ("two", "")])
    with pytest.raises(ValueError, match="has 3 classes, but names for 2"):
        load("places_lt", tmp_path, **lists)

    for content, message in (("{", "is not an iNaturalist"), ('{"images": []}', "is not an iNaturalist"),
                             ("[" * 100_000, "is not an iNaturalist"),  # nested deeper than Python's stack
                             ('{"images": [], "annotations": [], "categories": []}', "has no annotations")):
        (tmp_path / "train2018.json").write_text(content)
        with pytest.raises(ValueError, match=f"train2018.json {message}"):
            load("inat18", tmp_path)


def test_lists_beyond_the_published_classes_are_refused(tmp_path):
    rows = write_listed(tmp_path, "places_lt")
    write_list(tmp_path / "Places_LT_train.txt", [*rows["train"], ("train/x/y.jpg", 365)])
    with pytest.raises(ValueError, match="Places_LT_train.txt, line 367: label 365 is out of range"):
        load("places_lt", tmp_path)
    write_list(tmp_path / "Places_LT_train.txt", rows["train"][:-2])
    (tmp_path / "Places_LT_val.txt").unlink()
    with pytest.raises(ValueError, match="Places_LT_test.txt, line 1: class 364 has no image in the "):
        load("places_lt", tmp_path)


# ---------------------------------------------------------------- the small sets

def caltech101(root):
    names, sizes = ["BACKGROUND_Google", "Faces easy", "ant"], [40, 33, 31]
    touch(root, [f"caltech101/101_ObjectCategories/{name}/image_{i:04d}.jpg"
                 for name, size in zip(names, sizes) for i in range(size)])
    return names, sizes


def test_caltech101_lt_cuts_30_images_of_a_class_and_tests_on_the_others(tmp_path):
    names, sizes = caltech101(tmp_path)
    data = load("caltech101_lt", tmp_path)
    assert data.class_names == names and data.class_counts.tolist() == [30, 9, 3]
    assert np.bincount(data.test.targets).tolist() == [10, 3, 1]
    whole = load("caltech101_lt", tmp_path, imb_factor=1)
    train, test = set(names_of(whole.train, tmp_path)), set(names_of(whole.test, tmp_path))
    assert len(train) == 90 and not train & test and len(train | test) == sum(sizes)
    assert set(names_of(data.train, tmp_path)) <= train
    assert set(names_of(load("caltech101_lt", tmp_path, seed=3).test, tmp_path)) == test


# Each writes what an archive holds, and returns class names, training rows, test rows (and validation rows)

def cub200(root):
    names, folder = ["001.Black_footed_Albatross", "002.Laysan_Albatross", "003.Sooty"], "CUB_200_2011"
    rows = [(f"{name}/{i}.jpg", c) for c, name in enumerate(names) for i in range(62)]
    touch(root / folder / "images", [path for path, _ in rows])
    for file, values in (("images.txt", [path for path, _ in rows]), ("classes.txt", names),
                         ("image_class_labels.txt", [label + 1 for _, label in rows]),
                         ("train_test_split.txt", [i % 2 for i in range(len(rows))])):
        (root / folder / file).write_text("".join(f"{i} {value}\n" for i, value in enumerate(values, 1)))
    rows = [(f"{folder}/images/{path}", label) for path, label in rows]
    return names, rows[1::2], rows[::2]


def fruits360(root):
    names, sizes, rows = ["apple 6", "cabbage white 1", "pear 3"], [110, 120, 300], []
    for part in ("Training", "Test", "Validation"):
        rows.append([(f"fruits-360-original-size/{part}/{name}/r0_{i:03d}.jpg", c)
                     for c, name in enumerate(names) for i in range(sizes[c] if part == "Training" else 2)])
        touch(root, [path for path, _ in rows[-1]])
    return names, *rows


def fgvc_aircraft(root):
    names, folder, rows = ["707-320", "A 310", "Boeing 747"], "fgvc-aircraft-2013b/data", []
    for part, size in (("trainval", 204), ("test", 6)):
        some = [(f"{part}{i:06d}", i % 3) for i in range(size)]
        rows.append([(f"{folder}/images/{image}.jpg", c) for image, c in some])
        touch(root, [path for path, _ in rows[-1]])
        write_list(root / folder / f"images_variant_{part}.txt", [(image, names[c]) for image, c in some])
    (root / folder / "variants.txt").write_text("\n".join(names) + "\n")
    return names, *rows


def dtd(root):
    names, labels, rows = ["banded", "woven"], root / "dtd" / "dtd" / "labels", []
    labels.mkdir(parents=True)
    for part, size in (("train", 45), ("val", 45), ("test", 3)):
        some = [(f"{name}/{part}{i}.jpg", c) for c, name in enumerate(names) for i in range(size)]
        rows.append([(f"dtd/dtd/images/{path}", c) for path, c in some])
        touch(root, [path for path, _ in rows[-1]])
        (labels / f"{part}1.txt").write_text("".join(f"{path}\n" for path, _ in some))
    return names, rows[0] + rows[1], rows[2]


def mat(path, **content):
    """A MATLAB file; lists are cell arrays [n, 1]."""
    scipy_io = pytest.importorskip("scipy.io", reason="without scipy these data sets cannot be read at all")
    path.parent.mkdir(parents=True, exist_ok=True)
    for key, value in content.items():
        if isinstance(value, list):
            content[key] = np.empty((len(value), 1), object)
            content[key][:, 0] = value
    scipy_io.savemat(path, content)


def stanford_dogs(root):
    breeds, rows = ["n02085620-Chihuahua", "n02085782-Japanese_spaniel", "n02098105-soft-coated_terrier"], []
    for part, size in (("train", 100), ("test", 3)):
        some = [(f"{breed}/{part}{i}.jpg", c) for c, breed in enumerate(breeds) for i in range(size)]
        rows.append([(f"stanford_dogs/Images/{path}", c) for path, c in some])
        touch(root, [path for path, _ in rows[-1]])
        mat(root / "stanford_dogs" / f"{part}_list.mat", file_list=[path for path, _ in some],
            labels=np.array([[c + 1.0] for _, c in some]))
    return ["Chihuahua", "Japanese_spaniel", "soft-coated_terrier"], *rows


def stanford_cars(root):
    names, folder, rows = ["Acura RL Sedan 2012", "Audi S4", "BMW M3 Coupe"], root / "stanford_cars", []
    for part, file, labels in (("train", "devkit/cars_train_annos.mat", np.repeat(range(3), [30, 48, 60])),
                               ("test", "cars_test_annos_withlabels.mat", np.arange(7) % 3)):
        some = [(f"{i:05d}.jpg", c) for i, c in enumerate(labels.tolist())]
        rows.append([(f"stanford_cars/cars_{part}/{path}", c) for path, c in some])
        touch(root, [path for path, _ in rows[-1]])
        mat(folder / file, annotations=np.array([(c + 1, path) for path, c in some],
                                                [("class", object), ("fname", object)]))
    mat(folder / "devkit" / "cars_meta.mat", class_names=np.array([names], object))
    return names, *rows


def flowers102(root):
    torchvision = pytest.importorskip("torchvision")
    labels = np.arange(102 * 21) % 102  # of image 1, 2, ...
    order = np.random.default_rng(0).permutation(len(labels)) + 1
    order = order[np.argsort((order - 1) // 102, kind="stable")]  # 10 of each class, then 10, then 1
    ids = {"trnid": order[:1020], "valid": order[1020:2040], "tstid": order[2040:]}
    mat(root / "flowers-102" / "imagelabels.mat", labels=labels[None] + 1)
    mat(root / "flowers-102" / "setid.mat", **{key: value[None] for key, value in ids.items()})
    train, val, test = ([(f"flowers-102/jpg/image_{i:05d}.jpg", int(labels[i - 1])) for i in some]
                        for some in ids.values())
    touch(root, [path for path, _ in train + val + test])
    names = getattr(torchvision.datasets.Flowers102, "classes", [str(i) for i in range(102)])  # since 0.22
    return names, train + val, test


@pytest.mark.parametrize("write, factor, n_max, by_size", [
    (cub200, 10, 30, False), (fruits360, 100, 120, True), (fgvc_aircraft, 10, 6667 / 100, False),
    (dtd, 10, 80, False), (stanford_dogs, 10, 100, True), (stanford_cars, 10, 48, True),
    (flowers102, 10, 20, False)])
def test_a_small_set_is_the_rule_s_images_of_its_archive(write, factor, n_max, by_size, tmp_path,
                                                         monkeypatch):
    monkeypatch.setattr("torchvision.datasets.flowers102.check_integrity", lambda path, md5: True)
    (names, train, test, *val), name = write(tmp_path), f"{write.__name__}_lt"
    sizes = np.bincount([label for _, label in train])
    order = np.argsort(-sizes, kind="stable") if by_size else range(len(names))

    def rule(factor):
        counts = np.zeros(len(names), int)
        counts[order] = long_tail_counts(len(names), n_max, factor)
        return np.minimum(counts, sizes).tolist()

    data = load(name, tmp_path)
    assert data.class_counts.tolist() == rule(factor) and sum(rule(factor)) < len(train)
    kept = long_tail_indices([label for _, label in train], rule(factor), seed=0)
    assert rows_of(data.train, tmp_path) == [train[i] for i in kept]
    assert rows_of(data.test, tmp_path) == test
    assert [rows_of(split, tmp_path) for split in [data.val] if split] == val
    assert data.class_names == names and data.image_size == 224 and data.color_jitter == 0.4
    assert (data.mean, data.std) == IMAGENET

    other = load(name, tmp_path, seed=1)
    assert other.class_counts.tolist() == rule(factor) and (other.train.paths != data.train.paths).any()
    assert (other.test.paths == data.test.paths).all()
    assert load(name, tmp_path, imb_factor=1).class_counts.tolist() == rule(1)


def test_a_damaged_cub200_is_one_line(tmp_path):
    cub200(tmp_path)
    labels = tmp_path / "CUB_200_2011" / "image_class_labels.txt"
    whole = labels.read_text()
    for text, message in ((whole.replace("\n7 1\n", "\n7\n"), "image_class_labels.txt, line 7: must be `7 "),
                          (whole.replace("\n7 1\n", "\n7 x\n"), "invalid literal"),
                          (whole[:-6], "differ in their number of lines"),
                          (whole.replace("\n7 1\n", "\n7 4\n"), r"labels must lie in 0..2, found 0..3")):
        labels.write_text(text)
        with pytest.raises(ValueError, match=message):
            load("cub200_lt", tmp_path)


@pytest.mark.parametrize("write, gone, message", [
    (cub200, "CUB_200_2011/image_class_labels.txt",
     "labels.txt .looked for CUB_200_2011/ of CUB_200_2011.tgz"),
    (fruits360, "fruits-360-original-size/Test", "no such folder: .*Test"),
    (stanford_dogs, "stanford_dogs/test_list.mat",
     "no such file: .*test_list.mat .looked for .* of lists.tar"),
    (stanford_cars, "stanford_cars/cars_test_annos_withlabels.mat",
     "put stanford_cars/ with .*cars_test_annos_withlabels.mat there"),
    (dtd, "dtd/dtd/images", "no such folder: .*banded .dtd_lt needs dtd/dtd/ of dtd-r1.0.1.tar.gz in")])
def test_what_lacks_in_an_archive_is_named(write, gone, message, tmp_path):
    write(tmp_path)
    (tmp_path / gone).rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=message):
        load(f"{write.__name__}_lt", tmp_path)


@pytest.mark.parametrize("name", MATLAB)
def test_without_scipy_a_matlab_split_says_so(tmp_path, monkeypatch, name):
    monkeypatch.setattr(builders, "find_spec", lambda package: None)
    with pytest.raises(ValueError, match="needs scipy to be read: pip install scipy, or give lists"):
        load(name, tmp_path)
    assert load(name, tmp_path, **own_lists(tmp_path)).num_classes == 3  # these need none


# ---------------------------------------------------------------- what is published

def test_published_numbers_are_the_rules_and_agree_with_one_another():
    for name, (_, factor, n_max, _) in CUT.items():
        row = PUBLISHED[name]
        assert ("groups" in row) == (n_max is not None)  # the others depend on the second largest class
        if n_max:
            counts = long_tail_counts(row["classes"], n_max, factor)
            groups = shot_groups(torch.tensor(counts))
            assert (row["train"], row["largest"], row["smallest"]) == (sum(counts), counts[0], counts[-1])
            assert row["groups"] == tuple(int(group.sum()) for group in groups.values())

    per_class = {"imagenet_lt": (20, 50), "places_lt": (20, 100), "inat18": (None, 3)}  # to validate, to test
    for name in LISTED:
        row, (val, test) = PUBLISHED[name], per_class.get(name, (None, None))
        assert sum(row.get("groups", [row["classes"]])) == row["classes"]
        assert test is None or row["test"] == test * row["classes"]
        assert val is None or row["val"] == val * row["classes"]


def test_the_readme_s_table_has_the_published_numbers():
    table = (ROOT / "README.md").read_text().split("## Data sets")[1].split("\n##")[0]
    rows = [line.split("|")[1:-1] for line in table.splitlines() if line.startswith("| `")]
    numbers = lambda cell: [int(number.replace(",", "")) for number in re.findall(r"[\d,]*\d", cell)]
    known = []
    for name_cell, _, _, classes, images in rows:
        names = re.findall("`(.*?)`", name_cell)  # a row may hold several sets
        known += names
        published = [PUBLISHED[name] for name in names if name in PUBLISHED]
        assert numbers(classes) == [row["classes"] for row in published], names
        sizes = [list(dict.fromkeys(row[part] for row in published if part in row))
                 for part in ("train", "val", "test")]  # the two CIFARs share their test images
        assert numbers(images) == sum(sizes, []), names
        assert ("not published" in images) == any("train" not in row for row in published), names
    assert sorted(known) == sorted([*PUBLISHED, "FILE.npz", "folder"])
    assert {*PUBLISHED, "folder"} == {*rooms.BUILDERS}
    assert set(re.findall(r"`(\w+)`\*", table)) == set(MATLAB)  # these need scipy


def test_facts_know_which_class_has_how_many_images():
    def facts(targets):
        split = ImageFiles(np.array([b"a"] * len(targets)), np.array(targets))
        return rooms.facts(rooms.Dataset("tiny", split, None, split, ["a", "b", "c"], (0,) * 3, (1,) * 3, 4))

    targets = np.repeat([0, 1, 2], [101, 100, 19])
    found, other = facts(targets), facts(2 - targets)
    assert found["groups"] == (1, 1, 1) and (found["largest"], found["smallest"]) == (101, 19)
    assert found["counts"] != other["counts"]
    assert {**found, "counts": 0} == {**other, "counts": 0}


# ---------------------------------------------------------------- the checker

def test_the_embedded_set_has_its_published_numbers(capsys):
    assert main(["fashion_lt"]) == 0
    shown = capsys.readouterr().out
    assert "2478 training images (1000..10 a class), 1000 val, 2000 test; 5 many, 3 medium, 2 few" in shown


def few_fruits(root, monkeypatch, factor, **published):
    """Fruits-360 with 9, 8 and 4 training images that can be decoded, and what is published of it."""
    for part, sizes in (("Training", (9, 8, 4)), ("Test", (3, 3, 3))):
        for c, size in enumerate(sizes):
            for i in range(size):
                picture(root / "fruits-360-original-size" / part / f"fruit {c}" / f"r {i}.jpg", (20 + i, 20))
    monkeypatch.setitem(CUT, "fruits360_lt", (CUT["fruits360_lt"][0], factor, None, ""))
    monkeypatch.setitem(PUBLISHED, "fruits360_lt", dict(
        classes=3, test=9, largest=8, groups=(0, 0, 3), **published))


def test_the_checker_passes_a_whole_set(tmp_path, monkeypatch, capsys):
    few_fruits(tmp_path, monkeypatch, 4, train=8 + 4 + 2, smallest=2)
    flags = ["fruits360_lt", "--data-dir", str(tmp_path), "--workers", "2"]
    assert main(flags) == 0 and "every file is there and decodes" in capsys.readouterr().out
    assert main([*flags, "--fast"]) == 0 and "not decoded" in capsys.readouterr().out


def test_statistics_count_every_image_alike(tmp_path, capsys):
    for name, side, colour in (("a", 4, (0, 51, 0)), ("b", 40, (255, 102, 51))):
        (tmp_path / "train" / name).mkdir(parents=True)
        Image.new("RGB", (side, side), colour).save(tmp_path / "train" / name / f"{side}.png")
        picture(tmp_path / "test" / name / "0.png")  # which does not count
    assert check(load("folder", tmp_path)) == []
    assert "mean 0.500 0.300 0.100 and standard deviation 0.500 0.100 0.100" in capsys.readouterr().out


def test_the_checker_names_each_fault(tmp_path, monkeypatch):
    few_fruits(tmp_path, monkeypatch, 1, train=21, val=5, smallest=4, counts="0" * 16)
    data, folder = load("fruits360_lt", tmp_path), tmp_path / "fruits-360-original-size"
    half = folder / "Training" / "fruit 0" / "r 1.jpg"
    half.write_bytes(half.read_bytes()[:half.stat().st_size // 2])
    (folder / "Training" / "fruit 1" / "r 0.jpg").write_bytes(b"")
    (folder / "Test" / "fruit 2" / "r 1.jpg").unlink()
    data.test.paths[-1] = data.test.paths[0]

    wrong = check(data, PUBLISHED["fruits360_lt"], workers=2)
    for line, pattern in zip(wrong, [
            "train: 20, published: 21", "the images per class are not the published ones",
            "train: cannot decode .*fruit 0/r 1.jpg: ", "train: cannot decode .*fruit 1/r 0.jpg: ",
            "test: .*fruit 0/r 0.jpg is there twice", "test: no such file: .*fruit 2/r 1.jpg"], strict=True):
        assert re.match(pattern, line), (line, pattern)
    assert len(check(data, None, fast=True)) == 2  # --fast sees the missing file and the one listed twice


def test_the_checker_is_a_command_that_ends_with_1_and_ten_offenders(tmp_path, monkeypatch, capsys):
    write_listed(tmp_path, "places_lt")  # lists alone: every image is missing, and there are too few
    monkeypatch.setattr(sys, "argv", ["data.py", "places_lt", "--data-dir", str(tmp_path), "--fast"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "common" / "data.py"), run_name="__main__")
    assert stop.value.code == 1
    lines = capsys.readouterr().out.splitlines()
    start = next(i for i, line in enumerate(lines) if line.endswith("things are wrong, the first ten:"))
    offenders = lines[start + 1:]
    assert len(offenders) == 10 and "train: 366, published: 62500" in offenders
    wrong = 366 + 365 + 365 + sum("published" in line for line in offenders)
    assert lines[start].startswith(f"{wrong} things")
    assert any("no such file" in line and "place_0/4.jpg" in line for line in offenders)


@pytest.mark.parametrize("flags, message", [
    (["imagenet_lt"], "no such list file"), (["mars_lt"], f"known: {', '.join(rooms.BUILDERS)}"),
    (["places_lt", "--imb-factor", "0.5"], "imbalance factor"), (["--fast"], "required: name"),
    (["folder", "--train-list", "a.txt"], "give both --train-list and --test-list")])
def test_the_checker_ends_with_2_and_one_line_on_bad_input(tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit) as caught:
        main([*flags, "--data-dir", str(tmp_path)])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error
