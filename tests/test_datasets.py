"""The papers' data sets of image files: builders, list files, the checker."""
import json
import re
import runpy
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from common.data import (BUILDERS, CUT, LISTED, MATLAB, PUBLISHED, Dataset, ImageFiles, check, facts,
                         image_side, load, long_tail_counts, long_tail_indices, main)
from common.evaluate import shot_groups
from tests.tiny import ROOT, names_of, picture

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
INAT = ((0.466, 0.471, 0.380), (0.195, 0.194, 0.192))
NAMES = {  # of a training, a validation and a test image of class i
    "imagenet_lt": ("train/n{:08d}/1.JPEG", "train/n{:08d}/762.JPEG", "val/n{:08d}/ILSVRC2012.JPEG"),
    "places_lt": ("train/place_{}/4.jpg", "train/place_{}/2049.jpg", "val/place_{}/Places365.jpg"),
    "inat18": ("train_val2018/Plantae/{}/a.jpg", None, "train_val2018/Plantae/{}/b.jpg")}
TRAIN = [("a b/one two.jpg", 0), ("a b/3.jpg", 0), ("c/  4.jpg", 1), ("d/5.jpg", 2)]
TEST = [("c/6 .jpg", 1), ("a b/7.jpg", 0)]
CUB_LABELS, GONE = "CUB_200_2011/image_class_labels.txt", (None, None)


def touch(root, rows):
    """Empty files at the paths of rows (path, label): builders look at names alone."""
    for path, _ in rows:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()


def write_list(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{name} {label}\n" for name, label in rows))


def rows_of(split, root):
    return split and list(zip(names_of(split, root), split.targets.tolist()))


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
def test_listed_sets_have_their_lists_images_in_order(tmp_path, name, class_name, jitter, normalisation):
    rows, data = write_listed(tmp_path, name), load(name, tmp_path)
    assert all(rows_of(getattr(data, part), tmp_path) == rows.get(part) for part in ("train", "val", "test"))
    assert data.num_classes == PUBLISHED[name]["classes"] and data.class_counts[-1] == 2
    assert data.class_names[1] == class_name and data.color_jitter == jitter
    assert (data.mean, data.std) == normalisation and data.image_size == 224 == image_side(name, tmp_path)


def test_a_list_may_be_one_s_own_beside_the_set_s_other_and_has_all_published_classes_and_no_more(tmp_path):
    rows, train, val = write_listed(tmp_path, "places_lt"), *(
        tmp_path / f"Places_LT_{part}.txt" for part in ("train", "val"))
    write_list(tmp_path / "mine.txt", rows["test"][:5])
    data = load("places_lt", tmp_path, test_list=tmp_path / "mine.txt")
    assert len(data.test) == 5 and len(data.train) == 366 and len(data.val) == 365
    data = load("places_lt", tmp_path, train_list=val)
    assert data.val is None and len(data.train) == 365  # its val images are training images now
    for more, words in (([("train/x/y.jpg", 365)], "_LT_train.txt, line 365: label 365 is out of range"),
                        ([], "_LT_val.txt, line 365: class 364 has no image in the ")):
        write_list(train, rows["train"][:-2] + more)
        pytest.raises(ValueError, load, "places_lt", tmp_path).match(words)
    write_list(train, rows["train"])
    val.unlink()
    assert load("places_lt", tmp_path).val is None  # it may be missing
    train.unlink()
    pytest.raises(ValueError, load, "places_lt", tmp_path).match("no such list file: .*Places_LT_train.txt")


@pytest.mark.parametrize("name, folder", [("inat18", "train_val2018/Aves/{}"),
                                          ("inat17", "train_val_images/Aves/Acanthis {} bird")])
def test_inaturalist_from_the_official_json_is_the_lists_set(name, folder, tmp_path):
    C, found = PUBLISHED[name]["classes"], []
    parts = {"train": [(f"{folder.format(i)}/a b{i}.jpg", i) for i in range(C)],
             "val": [(f"{folder.format(i)}/val {i}.jpg", i) for i in (3, 0, 5)]}
    for part, rows in parts.items():
        touch(tmp_path, rows[:1])
        rows = list(enumerate(rows, 1000))  # images, annotations and categories stand in other orders
        (tmp_path / f"{part}20{name[4:]}.json").write_text(json.dumps({
            "images": [{"id": i, "file_name": path} for i, (path, _) in reversed(rows)],
            "annotations": [{"id": i, "image_id": i, "category_id": label} for i, (_, label) in rows],
            "categories": [{"id": i, "name": f"name {i}"} for i in reversed(range(C))]}))
    found.append(load(name, tmp_path))
    for part, rows in parts.items():
        write_list(tmp_path / f"{LISTED[name][0]}_{part}.txt", rows)
    found.append(load(name, tmp_path))
    for data, class_name in zip(found, ("name 17", folder.format(17).split("/", 1)[1])):
        assert rows_of(data.train, tmp_path) == parts["train"] and data.val is None
        assert rows_of(data.test, tmp_path) == parts["val"] and data.class_names[17] == class_name


def own_lists(root, train=TRAIN, test=TEST):
    """A user's own list files, and the images of TRAIN and TEST. Returns `load`'s arguments."""
    touch(root, TRAIN + TEST)
    write_list(root / "mine train.txt", train)
    write_list(root / "mine test.txt", test)
    return {"train_list": root / "mine train.txt", "test_list": root / "mine test.txt"}


def test_lists_of_ones_own_take_spaces_and_any_line_ends_and_need_no_scipy(tmp_path, monkeypatch):
    monkeypatch.setattr("common.builders.find_spec", lambda package: None)
    for name in MATLAB:
        pytest.raises(ValueError, load, name, tmp_path).match("needs scipy .* pip install scipy, or give l")
    lists = own_lists(tmp_path)
    lists["test_list"].write_bytes(b"c/6 .jpg\t1\r\n  a b/7.jpg   0\r\n\r\n\n")
    for name in ("imagenet_lt", "cub200_lt", "inat17", *MATLAB):
        data = load(name, tmp_path, **lists)
        assert rows_of(data.train, tmp_path) == TRAIN and rows_of(data.test, tmp_path) == TEST
        assert data.class_names == ["a b", "c", "d"] and data.val is None
        assert data.color_jitter == (0 if name == "inat17" else 0.4)


@pytest.mark.parametrize("train, test, words", [
    (TRAIN, [*TEST, ("c/8.jpg", 3)], "mine test.txt, line 3: label 3 is out of"),
    ([*TRAIN, ("c/8.jpg", 10**15)], TEST, "mine train.txt, line 5: label 10{15} among only"),
    ([*TRAIN, ("d/8.jpg", 4)], [*TEST, ("d/9.jpg", 3)], "mine test.txt, line 3: class 3 has no image"),
    ([*TRAIN, ("d/8", 4)], TEST, "mine train.txt: class 3 of 0..4 has no .*gaps .3 has no .*: number the 4"),
    ([("c/8", 1), ("d/8", 2)], [("c/9", 1)], "mine train.txt: labels start at 1, .*: subtract 1 from every"),
    ([*TRAIN, (TRAIN[0][0], 1)], TEST, "train.txt, line 5: a b/one two.jpg has label 1 here and 0 in line 1"),
    (TRAIN, [*TEST, TRAIN[2]], "test.txt, line 3: c/  4.jpg is in another split too .*train.txt, line 3.;"),
    (TRAIN, [*TEST, ("c/8.jpg", "")], "mine test.txt, line 3: must be `relative/path label`"),
    ([("c/8.jpg", -1), *TRAIN], TEST, "mine train.txt, line 1: must be .* 'c/8.jpg -1'"),
    (TRAIN, [(1, "c/8.jpg")], "mine test.txt, line 1: must be .* '1 c/8.jpg'"),
    (TRAIN, [], "mine test.txt is empty"), (TRAIN[:1], [("a b/7.jpg", 0)], "one class alone, a b")])
def test_bad_lists_are_refused_with_file_and_line(train, test, words, tmp_path):
    pytest.raises(ValueError, load, "imagenet_lt", tmp_path, **own_lists(tmp_path, train, test)).match(words)


def test_what_lacks_or_does_not_go_together_is_refused_by_name(tmp_path):
    lists, one = own_lists(tmp_path), {"train_list": tmp_path / "mine train.txt"}
    write_list(tmp_path / "mine train_classes.txt", [("one", ""), ("two", "")])
    for name, folder, flags, words in (
            ("places_lt", "other", lists, r"no such folder: .*other/a b \(.*mine train.txt, line 1 names"),
            ("places_lt", "", {**lists, "train_list": tmp_path / "not.txt"}, "no such list file: .*not.txt"),
            ("places_lt", "", lists, "has 3 classes, but names for 2"),
            ("folder", "", one, "give both --train-list and --test-list"), ("dtd_lt", "", one, "give both"),
            ("cifar10_lt", "", one, "name image files"), ("a.npz", "", one, "name image files"),
            *((name, "", {"imb_factor": 10}, f"--imb-factor does not apply to {name}")  # a fixed list
              for name in ("places_lt", "fashion_lt"))):
        pytest.raises(ValueError, load, name, tmp_path / folder, **flags).match(words)
    for content, words in (("{", "is not an iNaturalist"), ('{"images": []}', "is not an iNaturalist"),
                           ("[" * 100_000, "is not an iNaturalist"),  # nested deeper than Python's stack
                           ('{"images": [], "annotations": [], "categories": []}', "has no annotations")):
        (tmp_path / "train2018.json").write_text(content)
        pytest.raises(ValueError, load, "inat18", tmp_path).match(f"train2018.json {words}")


def images_of(pattern, names, sizes):
    """Rows (path, label) of so many images of each class."""
    return [(pattern.format(name, i), c) for c, name in enumerate(names) for i in range(sizes[c])]


def test_caltech101_lt_cuts_30_images_of_a_class_and_tests_on_the_others(tmp_path):
    names, sizes = ["BACKGROUND_Google", "Faces easy", "ant"], [40, 33, 31]
    touch(tmp_path, images_of("caltech101/101_ObjectCategories/{}/image_{:04d}.jpg", names, sizes))
    data, whole = load("caltech101_lt", tmp_path), load("caltech101_lt", tmp_path, imb_factor=1)
    assert data.class_names == names and data.class_counts.tolist() == [30, 9, 3]
    assert np.bincount(data.test.targets).tolist() == [10, 3, 1]
    train, test = set(names_of(whole.train, tmp_path)), set(names_of(whole.test, tmp_path))
    assert len(train) == 90 and not train & test and len(train | test) == sum(sizes)
    assert set(names_of(data.train, tmp_path)) <= train
    assert set(names_of(load("caltech101_lt", tmp_path, seed=3).test, tmp_path)) == test


# Each writes what an archive holds beside images; returns class names, training, test (and validation) rows

def cub200(root):
    names, folder = ["001.Black_footed_Albatross", "002.Laysan_Albatross", "003.Sooty"], root / "CUB_200_2011"
    rows = images_of("CUB_200_2011/images/{}/{}.jpg", names, [62] * 3)
    for file, values in (("images.txt", [path.split("/", 2)[2] for path, _ in rows]), ("classes.txt", names),
                         ("image_class_labels.txt", [c + 1 for _, c in rows]),
                         ("train_test_split.txt", [i % 2 for i in range(len(rows))])):
        write_list(folder / file, enumerate(values, 1))
    return names, rows[1::2], rows[::2]


def fruits360(root):
    names, sizes = ["apple 6", "cabbage white 1", "pear 3"], {"Training": [110, 120, 300]}
    return names, *(images_of(f"fruits-360-original-size/{part}/{{}}/r0_{{:03d}}.jpg", names,
                              sizes.get(part, [2] * 3)) for part in ("Training", "Test", "Validation"))


def fgvc_aircraft(root):
    names, folder, rows = ["707-320", "A 310", "Boeing 747"], "fgvc-aircraft-2013b/data", []
    for part, size in (("trainval", 204), ("test", 6)):
        some = [(f"{part}{i:06d}", i % 3) for i in range(size)]
        rows.append([(f"{folder}/images/{image}.jpg", c) for image, c in some])
        write_list(root / folder / f"images_variant_{part}.txt", [(image, names[c]) for image, c in some])
    (root / folder / "variants.txt").write_text("\n".join(names) + "\n")
    return names, *rows


def dtd(root):
    names, rows = ["banded", "woven"], []
    for part, size in (("train", 45), ("val", 45), ("test", 3)):
        listed = images_of(f"{{}}/{part}{{}}.jpg", names, [size] * 2)
        write_list(root / f"dtd/dtd/labels/{part}1.txt", [(path, "") for path, _ in listed])
        rows.append([(f"dtd/dtd/images/{path}", c) for path, c in listed])
    return names, rows[0] + rows[1], rows[2]


def mat(path, **content):
    scipy_io = pytest.importorskip("scipy.io", reason="without scipy these data sets cannot be read at all")
    path.parent.mkdir(parents=True, exist_ok=True)
    scipy_io.savemat(path, content)


def stanford_dogs(root):
    breeds, rows = ["n02085620-Chihuahua", "n02085782-Japanese_spaniel", "n02098105-soft-coated_terrier"], []
    for part, size in (("train", 100), ("test", 3)):
        rows.append(images_of(f"stanford_dogs/Images/{{}}/{part}{{}}.jpg", breeds, [size] * 3))
        mat(root / "stanford_dogs" / f"{part}_list.mat", labels=np.array([[c + 1.0] for _, c in rows[-1]]),
            file_list=np.array([[path.split("/", 2)[2]] for path, _ in rows[-1]], object))  # a cell array
    return ["Chihuahua", "Japanese_spaniel", "soft-coated_terrier"], *rows


def stanford_cars(root):
    names, folder, rows = ["Acura RL Sedan 2012", "Audi S4", "BMW M3 Coupe"], root / "stanford_cars", []
    for part, file, labels in (("train", "devkit/cars_train_annos.mat", np.repeat(range(3), [30, 48, 60])),
                               ("test", "cars_test_annos_withlabels.mat", np.arange(7) % 3)):
        rows.append([(f"stanford_cars/cars_{part}/{i:05d}.jpg", c) for i, c in enumerate(labels.tolist())])
        mat(folder / file, annotations=np.array([(c + 1, path.split("/")[2]) for path, c in rows[-1]],
                                                [("class", object), ("fname", object)]))
    mat(folder / "devkit" / "cars_meta.mat", class_names=np.array([names], object))
    return names, *rows


def flowers102(root):
    torchvision = pytest.importorskip("torchvision")
    labels = np.arange(102 * 21) % 102  # of image 1, 2, ...
    order = np.random.default_rng(0).permutation(len(labels)) + 1
    order = order[np.argsort((order - 1) // 102, kind="stable")]  # 10 of each class, then 10, then 1
    mat(root / "flowers-102" / "imagelabels.mat", labels=labels[None] + 1)
    mat(root / "flowers-102" / "setid.mat", trnid=order[None, :1020], valid=order[None, 1020:2040],
        tstid=order[None, 2040:])
    rows = [(f"flowers-102/jpg/image_{i:05d}.jpg", int(labels[i - 1])) for i in order]
    names = getattr(torchvision.datasets.Flowers102, "classes", [str(i) for i in range(102)])  # since 0.22
    return names, rows[:2040], rows[2040:]


@pytest.mark.parametrize("write, factor, n_max, by_size", [
    (cub200, 10, 30, False), (fruits360, 100, 120, True), (fgvc_aircraft, 10, 6667 / 100, False),
    (dtd, 10, 80, False), (stanford_dogs, 10, 100, True), (stanford_cars, 10, 48, True),
    (flowers102, 10, 20, False)])
def test_a_small_set_is_its_archive_s_by_the_rule(write, factor, n_max, by_size, tmp_path, monkeypatch):
    monkeypatch.setattr("torchvision.datasets.flowers102.check_integrity", lambda path, md5: True)
    (names, train, test, *val), name = write(tmp_path), f"{write.__name__}_lt"
    touch(tmp_path, sum([train, test, *val], []))
    sizes = np.bincount([label for _, label in train])
    order = np.argsort(-sizes, kind="stable") if by_size else range(len(names))
    data, other, uncut = (load(name, tmp_path, **flags) for flags in ({}, {"seed": 1}, {"imb_factor": 1}))
    for each, cut in ((data, factor), (other, factor), (uncut, 1)):
        rule = np.minimum(long_tail_counts(len(names), n_max, cut), sizes[order])
        assert each.class_counts[order].tolist() == rule.tolist()
    kept = long_tail_indices([label for _, label in train], data.class_counts, seed=0)
    assert rows_of(data.train, tmp_path) == [train[i] for i in kept] and len(kept) < len(train)
    assert rows_of(data.test, tmp_path) == test == rows_of(other.test, tmp_path)
    assert [rows_of(split, tmp_path) for split in [data.val] if split] == val
    assert data.class_names == names and data.image_size == 224 and data.color_jitter == 0.4
    assert (data.mean, data.std) == IMAGENET and (other.train.paths != data.train.paths).any()


@pytest.mark.parametrize("write, name, old, new, words", [
    (cub200, CUB_LABELS, "\n7 1\n", "\n7\n", "image_class_labels.txt, line 7: must be `7 "),
    (cub200, CUB_LABELS, "\n7 1\n", "\n7 x\n", "invalid literal"),
    (cub200, CUB_LABELS, "\n7 1\n", "\n7 4\n", "labels must lie in 0..2, found 0..3"),
    (cub200, CUB_LABELS, "\n186 3", "", "differ in their number of lines"),
    (cub200, CUB_LABELS, *GONE, "labels.txt .looked for CUB_200_2011/ of CUB_200_2011.tgz"),
    (fruits360, "fruits-360-original-size/Test", *GONE, "no such folder: .*Test"),
    (stanford_dogs, "stanford_dogs/test_list.mat", *GONE, "no such file: .*test_list.mat .*for .*lists.tar"),
    (stanford_cars, "stanford_cars/cars_test_annos_withlabels.mat", *GONE,
     "put stanford_cars/ with .*cars_test_annos_withlabels.mat there"),
    (dtd, "dtd/dtd/images", *GONE, "no such folder: .*banded .dtd_lt needs dtd/dtd/ of dtd-r1.0.1.tar.gz")])
def test_what_lacks_or_is_damaged_in_an_archive_is_named(write, name, old, new, words, tmp_path):
    touch(tmp_path, sum(write(tmp_path)[1:], []))
    if old:
        (tmp_path / name).write_text((tmp_path / name).read_text().replace(old, new))
    else:
        (tmp_path / name).rename(tmp_path / "elsewhere")
    pytest.raises(ValueError, load, f"{write.__name__}_lt", tmp_path).match(words)


def test_published_numbers_are_the_rules_agree_with_one_another_and_stand_in_the_readme_s_table():
    for name, (_, factor, n_max, _) in CUT.items():
        row = PUBLISHED[name]
        assert ("groups" in row) == (n_max is not None)  # the others depend on the second largest class
        if n_max:
            counts = long_tail_counts(row["classes"], n_max, factor)
            groups = shot_groups(torch.tensor(counts)).values()
            assert (row["train"], row["largest"], row["smallest"]) == (sum(counts), counts[0], counts[-1])
            assert row["groups"] == tuple(int(group.sum()) for group in groups)
    per_class = {"imagenet_lt": (20, 50), "places_lt": (20, 100), "inat18": (None, 3)}  # to validate, to test
    for name in LISTED:
        row, (val, test) = PUBLISHED[name], per_class.get(name, (None, None))
        assert sum(row.get("groups", [row["classes"]])) == row["classes"]
        assert test is None or row["test"] == test * row["classes"]
        assert val is None or row["val"] == val * row["classes"]

    table, known = (ROOT / "README.md").read_text().split("## Data sets")[1].split("\n##")[0], []
    numbers = lambda cell: [int(number.replace(",", "")) for number in re.findall(r"[\d,]*\d", cell)]
    for line in (line for line in table.splitlines() if line.startswith("| `")):
        name_cell, _, _, classes, images = line.split("|")[1:-1]
        names = re.findall("`(.*?)`", name_cell)  # a row may hold several sets
        known += names
        published = [PUBLISHED[name] for name in names if name in PUBLISHED]
        assert numbers(classes) == [row["classes"] for row in published], names
        sizes = [list(dict.fromkeys(row[part] for row in published if part in row))
                 for part in ("train", "val", "test")]  # the two CIFARs share their test images
        assert numbers(images) == sum(sizes, []), names
        assert ("not published" in images) == any("train" not in row for row in published), names
    assert sorted(known) == sorted([*PUBLISHED, "FILE.npz", "folder"])
    assert {*PUBLISHED, "folder"} == {*BUILDERS}
    assert set(re.findall(r"`(\w+)`\*", table)) == set(MATLAB)  # these need scipy


def test_facts_know_which_class_has_how_many_images():
    found, targets = [], np.repeat([0, 1, 2], [101, 100, 19])
    for ids in (targets, 2 - targets):
        split = ImageFiles(np.array([b"a"] * len(ids)), ids)
        found.append(facts(Dataset("tiny", split, None, split, ["a", "b", "c"], (0,) * 3, (1,) * 3, 4)))
    assert found[0]["groups"] == (1, 1, 1) and (found[0]["largest"], found[0]["smallest"]) == (101, 19)
    assert [key for key in found[0] if found[0][key] != found[1][key]] == ["counts"]


def few_fruits(root, monkeypatch, factor, **published):
    """Fruits-360 with 9, 8 and 4 training images that can be decoded, and what is published of it."""
    for part, sizes in (("Training", (9, 8, 4)), ("Test", (3, 3, 3))):
        for path, _ in images_of(f"fruits-360-original-size/{part}/{{}}/r {{}}.jpg", ("0", "1", "2"), sizes):
            picture(root / path, (20 + int(path[-5]), 20))
    monkeypatch.setitem(CUT, "fruits360_lt", (CUT["fruits360_lt"][0], factor, None, ""))
    monkeypatch.setitem(PUBLISHED, "fruits360_lt", dict(
        classes=3, test=9, largest=8, groups=(0, 0, 3), **published))


def test_the_checker_passes_a_whole_set_and_prints_its_numbers(tmp_path, monkeypatch, capsys):
    assert main(["fashion_lt"]) == 0
    shown = capsys.readouterr().out
    assert "2478 training images (1000..10 a class), 1000 val, 2000 test; 5 many, 3 medium, 2 few" in shown
    few_fruits(tmp_path, monkeypatch, 4, train=8 + 4 + 2, smallest=2)
    flags = ["fruits360_lt", "--data-dir", str(tmp_path), "--workers", "2"]
    assert main(flags) == 0 and "every file is there and decodes" in capsys.readouterr().out
    assert main([*flags, "--fast"]) == 0 and "not decoded" in capsys.readouterr().out
    for name, side, colour in (("a", 4, (0, 51, 0)), ("b", 40, (255, 102, 51))):  # every image counts alike
        picture(tmp_path / "test" / name / "0.png")  # but for those to test on
        picture(tmp_path / "train" / name / "0.png")
        Image.new("RGB", (side, side), colour).save(tmp_path / "train" / name / "0.png")
    assert check(load("folder", tmp_path)) == []
    assert "mean 0.500 0.300 0.100 and standard deviation 0.500 0.100 0.100" in capsys.readouterr().out


def test_the_checker_names_each_fault(tmp_path, monkeypatch):
    few_fruits(tmp_path, monkeypatch, 1, train=21, val=5, smallest=4, counts="0" * 16)
    data, folder = load("fruits360_lt", tmp_path), tmp_path / "fruits-360-original-size"
    half = folder / "Training" / "0" / "r 1.jpg"
    half.write_bytes(half.read_bytes()[:half.stat().st_size // 2])
    (folder / "Training" / "1" / "r 0.jpg").write_bytes(b"")
    (folder / "Test" / "2" / "r 1.jpg").unlink()
    data.test.paths[-1] = data.test.paths[0]
    wrong = check(data, PUBLISHED["fruits360_lt"], workers=2)
    for line, pattern in zip(wrong, [
            "train: 20, published: 21", "the images per class are not the published ones",
            "train: cannot decode .*Training/0/r 1.jpg: ", "train: cannot decode .*Training/1/r 0.jpg: ",
            "test: .*Test/0/r 0.jpg is there twice", "test: no such file: .*Test/2/r 1.jpg"], strict=True):
        assert re.match(pattern, line), (line, pattern)
    assert len(check(data, None, fast=True)) == 2  # --fast sees the missing file and the one listed twice


def test_the_checker_ends_with_1_and_ten_offenders_or_with_2_and_one_line(tmp_path, monkeypatch, capsys):
    write_listed(tmp_path, "places_lt")  # lists alone: every image is missing, and there are too few
    monkeypatch.setattr(sys, "argv", ["data.py", "places_lt", "--data-dir", str(tmp_path), "--fast"])
    stop = pytest.raises(SystemExit, runpy.run_path, str(ROOT / "common" / "data.py"), run_name="__main__")
    before, _, after = capsys.readouterr().out.partition(" things are wrong, the first ten:\n")
    offenders = after.splitlines()
    assert stop.value.code == 1 and len(offenders) == 10 and "train: 366, published: 62500" in offenders
    wrong = 366 + 365 + 365 + sum("published" in line for line in offenders)
    assert before.splitlines()[-1] == str(wrong)
    assert any("no such file" in line and "place_0/4.jpg" in line for line in offenders)

    for flags, words in (
            (["imagenet_lt"], "no such list file"), (["mars_lt"], f"known: {', '.join(BUILDERS)}"),
            (["places_lt", "--imb-factor", "0.5"], "imbalance factor"), (["--fast"], "required: name"),
            (["folder", "--train-list", "a.txt"], "give both --train-list and --test-list")):
        assert pytest.raises(SystemExit, main, [*flags, "--data-dir", str(tmp_path)]).value.code == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and words in error
