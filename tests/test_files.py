"""The room common/files.py: pixels of image files, class folders, list files."""
import os
import subprocess
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.data import check, image_side, load, read_image, read_list

ROOT = Path(__file__).parent.parent


def picture(path, side=20, colour=(200, 100, 50), **options):
    """An image file of one colour but for one pixel, its folder made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGB", (side, side), colour)
    image.putpixel((0, 0), (0, 0, 0))
    image.save(path, **options)
    return path


def tree(root, classes=("ant", "bee"), count=3, side=20):
    """root/{train,test}/CLASS/i.png."""
    for part in ("train", "test"):
        for name in classes:
            for i in range(count):
                picture(root / part / name / f"{i}.png", side)
    return root


def names_of(split, root):
    return sorted(os.path.relpath(os.fsdecode(path), root) for path in split.paths)


# ---------------------------------------------------------------- pixels

GREY16 = (np.arange(64 * 64).reshape(64, 64) * 16).astype(np.uint16)


@pytest.mark.parametrize("ending", ["png", "tif", "pgm"])
def test_sixteen_bits_are_scaled_to_eight(tmp_path, ending):
    path = tmp_path / f"grey.{ending}"
    if ending == "pgm":
        path.write_bytes(b"P5 64 64 65535\n" + GREY16.astype(">u2").tobytes())
    else:
        Image.fromarray(GREY16).save(path)
    found = np.asarray(read_image(path)).astype(float)
    assert np.abs(found - GREY16[..., None] / 257).max() <= 0.5 + 1e-9


TURNED = {1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud,
          5: lambda a: a.swapaxes(0, 1), 6: lambda a: np.rot90(a, -1),
          7: lambda a: np.rot90(a, 2).swapaxes(0, 1), 8: np.rot90}


@pytest.mark.parametrize("orientation", TURNED)
def test_the_orientation_in_exif_is_applied(tmp_path, orientation):
    pixels = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(read_image(tmp_path / "a.png"), TURNED[orientation](pixels))


@pytest.mark.parametrize("exif", [b"Exif\0\0garbage", b"Exif\0\0II*\0\x08\0\0\0\x05\0\x12\x01"])
@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_a_damaged_exif_block_leaves_the_picture_as_it_is(tmp_path, exif):
    Image.new("RGB", (8, 6), (9, 99, 200)).save(tmp_path / "a.jpg", exif=exif)
    assert read_image(tmp_path / "a.jpg").size == (8, 6)


@pytest.mark.parametrize("mode, ending", [("RGBA", "png"), ("LA", "png"), ("RGBA", "tif"), ("PA", "tif"),
                                          ("P", "png"), ("P", "gif")])
def test_what_is_transparent_shows_white(tmp_path, mode, ending):
    image = Image.new("RGBA", (8, 8), (10, 20, 30, 0))  # nearly black below what cannot be seen
    image.paste((200, 200, 200, 255), (0, 0, 4, 8))
    options = {}
    if mode == "P":
        image, options = Image.new("P", (8, 8), 1), {"transparency": 0}
        image.putpalette([10, 20, 30, 200, 200, 200])
        image.paste(0, (4, 0, 8, 8))
    image.convert(mode).save(tmp_path / f"a.{ending}", **options)
    found = np.asarray(read_image(tmp_path / f"a.{ending}"))
    assert (found[:, :4] == 200).all() and (found[:, 4:] == 255).all()


def test_half_transparent_pixels_are_mixed_with_white(tmp_path):
    Image.new("RGBA", (2, 2), (0, 100, 200, 51)).save(tmp_path / "a.png")
    assert np.asarray(read_image(tmp_path / "a.png"))[0, 0] == pytest.approx((204, 224, 244), abs=1)


def write_odd(folder):
    """Files that are refused, and why."""
    for mode in ("F", "I"):
        Image.new(mode, (8, 8), 3).save(folder / f"{mode}.tif")
    Image.new("RGB", (3000, 2)).save(folder / "long.png")
    (folder / "eps.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"
                                     b"showpage\n")
    (folder / "zero.ppm").write_bytes(b"P6 0 0 255\n")
    (folder / "empty.gif").write_bytes(b"")
    (folder / "folder.png").mkdir()
    os.mkfifo(folder / "pipe.png")
    return {"F.tif": "mode F.* no known range", "I.tif": "mode I.* no known range", "eps.jpg": "cannot",
            "long.png": "3000 x 2 pixels are too long", "zero.ppm": "cannot identify", "empty.gif": "cannot",
            "folder.png": "not a regular file", "pipe.png": "not a regular file", "nothing.png": "No such"}


def test_what_is_no_picture_is_refused_by_name(tmp_path):
    for name, why in write_odd(tmp_path).items():
        with pytest.raises(ValueError, match=f"{name}: .*{why}"):
            read_image(tmp_path / name)
    Image.new("RGB", (1, 1), (1, 2, 3)).save(tmp_path / "one.png")
    assert np.asarray(read_image(tmp_path / "one.png")).tolist() == [[[1, 2, 3]]]


def test_a_file_that_names_itself_an_image_starts_no_ghostscript(tmp_path, monkeypatch):
    gs = tmp_path / "gs"
    gs.write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    gs.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    write_odd(tmp_path)
    with pytest.raises(ValueError, match="eps.jpg"):
        read_image(tmp_path / "eps.jpg")
    assert not (tmp_path / "started").exists()


def test_the_checker_calls_pictures_of_one_value_wrong(tmp_path):
    for name in ("ant", "bee"):
        for part in ("train", "test"):
            (tmp_path / part / name).mkdir(parents=True)
            Image.new("RGB", (20, 20), "white").save(tmp_path / part / name / "a.png")
    wrong = check(load("folder", tmp_path))
    assert len(wrong) == 3 and all("has one value, 1.000" in line for line in wrong)


# ---------------------------------------------------------------- one look for recipe and loader

def test_one_small_picture_does_not_make_all_small(tmp_path):
    tree(tmp_path, side=300)
    picture(tmp_path / "train" / "ant" / "0.png", 20)
    assert image_side("folder", tmp_path) == 300 and load("folder", tmp_path).image_size == 224


def test_class_folders_that_are_links_are_looked_into(tmp_path):
    tree(tmp_path / "real", side=300)
    for part in ("train", "test"):
        (tmp_path / "set" / part).mkdir(parents=True)
        for name in ("ant", "bee"):
            (tmp_path / "set" / part / name).symlink_to(tmp_path / "real" / part / name)
    assert image_side("folder", tmp_path / "set") == 300
    assert load("folder", tmp_path / "set").image_size == 224


def test_folders_made_in_another_order_give_the_same_size(tmp_path):
    for order in ((0, 1, 2), (2, 1, 0), (1, 2, 0)):
        root = tmp_path / str(order)
        for i in order:
            picture(root / "train" / f"class {i}" / "a.png", (30, 50, 200)[i])
        assert image_side("folder", root) == 50


def test_lists_and_their_recipe_have_one_size(tmp_path):
    for name, side in (("a", 300), ("b", 300), ("c", 20)):
        picture(tmp_path / name / "1.png", side)
        picture(tmp_path / name / "2.png", side)
    (tmp_path / "train.txt").write_text("c/1.png 0\na/1.png 1\nb/1.png 2\n")
    (tmp_path / "test.txt").write_text("c/2.png 0\na/2.png 1\nb/2.png 2\n")
    assert image_side("folder", tmp_path, tmp_path / "train.txt") == 300
    data = load("folder", tmp_path, train_list=tmp_path / "train.txt", test_list=tmp_path / "test.txt")
    assert data.image_size == 224


# ---------------------------------------------------------------- what lies in a folder

def test_subfolders_and_every_ending_are_read(tmp_path):
    tree(tmp_path)
    for name in ("a.tif", "b.TIFF", "c.gif", "images/d.jpg", "images/deep/e.bmp", "f.pgm", "g.webp"):
        picture(tmp_path / "train" / "ant" / name)
    (tmp_path / "train" / "ant" / "round").symlink_to(tmp_path / "train" / "ant")  # and no end of it
    data = load("folder", tmp_path)
    assert data.class_counts.tolist() == [10, 3]
    assert {name for name in names_of(data.train, tmp_path / "train" / "ant") if name[0] != "."} == {
        "0.png", "1.png", "2.png", "a.tif", "b.TIFF", "c.gif", "f.pgm", "g.webp", "images/d.jpg",
        "images/deep/e.bmp"}
    assert check(data) == []


def test_hidden_files_and_folders_are_no_images_and_no_classes(tmp_path):
    tree(tmp_path)
    before = names_of(load("folder", tmp_path).train, tmp_path)
    for name in ("train/ant/._0.png", "train/.ipynb_checkpoints/0.png", "train/ant/.thumbnails/0.png",
                 "test/.ipynb_checkpoints/x/0.png", "train/._ant.png"):
        picture(tmp_path / name)
    (tmp_path / "train" / ".DS_Store").write_bytes(b"x")
    data = load("folder", tmp_path)
    assert names_of(data.train, tmp_path) == before and data.class_names == ["ant", "bee"]


def test_a_flat_folder_and_a_single_class_are_refused(tmp_path):
    for part in ("train", "test"):
        picture(tmp_path / part / "a.png")
    with pytest.raises(ValueError, match="no class folders in .*train: the images of each class must lie"):
        load("folder", tmp_path)
    tree(tmp_path, ["ant"])
    with pytest.raises(ValueError, match="one class alone, ant"):
        load("folder", tmp_path)
    (tmp_path / "a.txt").write_text("train/ant/0.png 0\n")
    (tmp_path / "b.txt").write_text("test/ant/0.png 0\n")
    with pytest.raises(ValueError, match="one class alone, ant"):
        load("folder", tmp_path, train_list=tmp_path / "a.txt", test_list=tmp_path / "b.txt")
    images, targets = np.zeros((3, 8, 8), np.uint8), np.zeros(3, int)
    np.savez(tmp_path / "a.npz", x_train=images, y_train=targets, x_test=images, y_test=targets)
    with pytest.raises(ValueError, match="one class alone, 0"):
        load(tmp_path / "a.npz")


ODDITIES = {"train/stray.png": "images in no class folder: 1 (stray.png)",
            "train/ant/._0.png": "hidden files: 2 (", "train/.thumbnails/0.png": ".thumbnails/0.png",
            "train/ant/notes.txt": "files that are no images: 1 (ant/notes.txt)",
            "train/ant/half.png": "cannot decode", "train/bee/pipe.png": "not a regular file",
            "train/bee/float.tif": "no known range", "train/bee/long.png": "too long",
            "test/bee/eps.jpg": "eps.jpg: cannot identify", "test/bee/gone.png": "no such file",
            "test/bee/b\udcff.jpg": "b\\udcff.jpg"}


def checker(data_dir, encoding):
    return subprocess.run([sys.executable, "-m", "common.data", "folder", "--data-dir", str(data_dir)],
                          cwd=ROOT, capture_output=True, env={**os.environ, "PYTHONIOENCODING": encoding})


def test_the_checker_prints_each_oddity_of_a_tree(tmp_path):
    tree(tmp_path)
    for name in ODDITIES:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"junk") if path.name != "pipe.png" else os.mkfifo(path)
    half = picture(tmp_path / "train" / "ant" / "half.png", 40)
    half.write_bytes(half.read_bytes()[:60])
    Image.new("F", (8, 8)).save(tmp_path / "train" / "bee" / "float.tif")
    Image.new("RGB", (3000, 2)).save(tmp_path / "train" / "bee" / "long.png")
    (tmp_path / "test" / "bee" / "gone.png").unlink()
    (tmp_path / "test" / "bee" / "gone.png").symlink_to("nowhere")
    done = checker(tmp_path, "ascii:strict")
    shown = done.stdout.decode("ascii")
    assert done.returncode == 1 and b"Traceback" not in done.stderr
    for name, line in ODDITIES.items():
        assert line in shown, (name, shown)
    assert "shown at 20 pixels" in shown and "7 things are wrong" in shown


def test_two_spellings_of_a_class_name_are_one_class(tmp_path):
    composed, decomposed = (unicodedata.normalize(form, "éclair") for form in ("NFC", "NFD"))
    for part, name in (("train", composed), ("train", decomposed), ("test", decomposed), ("train", "ant"),
                       ("test", "ant")):
        picture(tmp_path / part / name / f"{len(name)}.png")
    data = load("folder", tmp_path)
    assert data.class_names == ["ant", composed] and data.class_counts.tolist() == [1, 2]
    (tmp_path / "a.txt").write_text(f"train/{composed}/6.png 1\ntrain/{decomposed}/7.png 1\n"
                                    "train/ant/3.png 0\n")
    (tmp_path / "b.txt").write_text(f"test/{decomposed}/7.png 1\n")
    listed = load("folder", tmp_path, train_list=tmp_path / "a.txt", test_list=tmp_path / "b.txt")
    assert listed.class_names == data.class_names and listed.class_counts.tolist() == [1, 2]


def test_class_names_of_arrays_and_lists_are_composed_too(tmp_path):
    composed, decomposed = (unicodedata.normalize(form, "éclair") for form in ("NFC", "NFD"))
    images, targets = np.zeros((2, 8, 8), np.uint8), np.arange(2)
    np.savez(tmp_path / "a.npz", x_train=images, y_train=targets, x_test=images, y_test=targets,
             class_names=np.array(["ant", decomposed]))
    assert load(tmp_path / "a.npz").class_names == ["ant", composed]

    for part in ("train", "test"):
        for name in ("ant", "bee"):
            picture(tmp_path / part / name / "0.png")
        (tmp_path / f"{part}.txt").write_text(f"{part}/ant/0.png 0\n{part}/bee/0.png 1\n")
    (tmp_path / "train_classes.txt").write_text(f"ant\n{decomposed}\n", encoding="utf-8")
    data = load("folder", tmp_path, train_list=tmp_path / "train.txt", test_list=tmp_path / "test.txt")
    assert data.class_names == ["ant", composed]



def test_an_unreadable_folder_is_one_line(tmp_path):
    (tmp_path / ("x" * 255)).mkdir()
    with pytest.raises(ValueError, match="File name too long|no such folder"):
        load("folder", tmp_path / ("x" * 300))
    tree(tmp_path / "set")
    (tmp_path / "set" / "train" / "ant").chmod(0)
    try:
        if os.access(tmp_path / "set" / "train" / "ant", os.R_OK):
            pytest.skip("this user may read everything")
        with pytest.raises(ValueError, match="cannot read .*ant: Permission denied"):
            load("folder", tmp_path / "set")
    finally:
        (tmp_path / "set" / "train" / "ant").chmod(0o755)


# ---------------------------------------------------------------- lists

LINES = "a/1.jpg 0\na/2.jpg 0\nb/3 4.jpg 1\n"


@pytest.mark.parametrize("content", [
    b"\xef\xbb\xbf" + LINES.encode(), LINES.encode("utf-16"), LINES.replace("/", "\\").encode(),
    b"\xef\xbb\xbf" + LINES.replace("/", "\\").replace("\n", "\r\n").encode()])
def test_windows_lists_are_read(tmp_path, content):
    (tmp_path / "list.txt").write_bytes(content)
    listing = read_list(tmp_path / "list.txt")
    assert listing.names == ["a/1.jpg", "a/2.jpg", "b/3 4.jpg"] and listing.targets.tolist() == [0, 0, 1]


def lists_of(tmp_path, train, test):
    for name, rows in (("train", train), ("test", test)):
        for path, _ in rows:
            (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.txt").write_text("".join(f"{path} {label}\n" for path, label in rows))
    return {"train_list": tmp_path / "train.txt", "test_list": tmp_path / "test.txt"}


@pytest.mark.parametrize("train, test, message", [
    ([("a/1", 1), ("b/1", 2)], [("a/2", 1)], "train.txt: labels start at 1, .*: subtract 1 from every label"),
    ([("a/1", 0), ("b/1", 2), ("c/1", 3), ("c/3", 3)], [("a/2", 0)],
     r"labels have gaps \(1 has no image\): number the 3 classes 0..2"),
    ([("a/1", 0), ("b/1", 1), ("a/1", 1)], [("a/2", 0)],
     "train.txt, line 3: a/1 has label 1 here and 0 in line 1")])
def test_labels_that_are_no_class_ids_get_advice(tmp_path, train, test, message):
    with pytest.raises(ValueError, match=message):
        load("imagenet_lt", tmp_path, **lists_of(tmp_path, train, test))


@pytest.mark.parametrize("labels, message", [([1, 2, 3, 3], "labels start at 1, .*: subtract 1"),
                                             ([0, 0, 2, 3], r"\(1 has no image\): number the 3 classes")])
def test_labels_of_an_npz_get_advice(tmp_path, labels, message):
    images = np.zeros((4, 8, 8), np.uint8)
    np.savez(tmp_path / "a.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "a.npz")


def test_deeply_nested_json_is_one_line(tmp_path):
    (tmp_path / "deep.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="deep.json is not an iNaturalist"):
        read_list(tmp_path / "deep.json")


def test_a_class_name_of_no_encoding_ends_in_a_line(tmp_path):
    tree(tmp_path, ["ant", "b\udcff", "hollow"])
    for path in (tmp_path / "train" / "hollow").iterdir():
        path.unlink()
    (tmp_path / "train" / "b\udcff" / "0.png").write_bytes(b"junk")
    error = checker(tmp_path, "utf-8").stderr
    assert error.startswith(b"error: folder: class 2 (hollow) has no training image")
    picture(tmp_path / "train" / "hollow" / "0.png")
    assert b"b\\udcff/0.png" in checker(tmp_path, "utf-8").stdout


def test_members_of_an_npz_that_nothing_needs_are_not_read(tmp_path):
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (4, 8, 8), np.uint8), np.array([0, 1, 0, 1])
    arrays = dict(x_train=images, y_train=labels, x_test=images, y_test=labels)
    np.savez(tmp_path / "a.npz", notes=np.array([{}], object), **arrays)  # a pickle, which is never read
    assert np.array_equal(load(tmp_path / "a.npz").train.images[..., 0], images)
