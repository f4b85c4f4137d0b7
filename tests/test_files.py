"""The room common/files.py: pixels of image files, class folders, list files."""
import io
import os
import sys
import unicodedata

import numpy as np
import pytest
from PIL import Image

from common.data import check, image_side, load, main, read_image, read_list
from tests.tiny import names_of, picture, tree


# ---------------------------------------------------------------- pixels

@pytest.mark.parametrize("ending", ["png", "tif", "pgm"])
def test_sixteen_bits_are_scaled_to_eight(tmp_path, ending):
    grey = (np.arange(64 * 64).reshape(64, 64) * 16).astype(np.uint16)
    path = tmp_path / f"grey.{ending}"
    if ending == "pgm":
        path.write_bytes(b"P5 64 64 65535\n" + grey.astype(">u2").tobytes())
    else:
        Image.fromarray(grey).save(path)
    found = np.asarray(read_image(path)).astype(float)
    assert np.abs(found - grey[..., None] / 257).max() <= 0.5 + 1e-9


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
    picture(tmp_path / "a.jpg", (8, 6), exif=exif)
    assert read_image(tmp_path / "a.jpg").size == (8, 6)


def test_grey_palette_and_cmyk_files_are_read_as_rgb(tmp_path):
    for mode, colour, rgb in (("L", 70, (70, 70, 70)), ("CMYK", (255, 0, 0, 0), (0, 255, 255))):
        Image.new(mode, (8, 8), colour).save(tmp_path / "a.jpg")
        image = read_image(tmp_path / "a.jpg")
        assert image.mode == "RGB" and np.asarray(image)[4, 4] == pytest.approx(rgb, abs=3)
    Image.new("P", (8, 8), 1).save(tmp_path / "p.png")
    assert read_image(tmp_path / "p.png").mode == "RGB"


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


def test_what_is_no_picture_is_refused_by_name_and_starts_no_ghostscript(tmp_path, monkeypatch):
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for mode in ("F", "I"):
        Image.new(mode, (8, 8), 3).save(tmp_path / f"{mode}.tif")
    Image.new("RGB", (3000, 2)).save(tmp_path / "long.png")
    for name, content in {"zero.ppm": b"P6 0 0 255\n", "empty.gif": b"",
                          "eps.jpg": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"
                                     b"showpage\n"}.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")

    whys = {"F.tif": "mode F.* no known range", "I.tif": "mode I.* no known range", "eps.jpg": "cannot",
            "long.png": "3000 x 2 pixels are too long", "zero.ppm": "cannot identify", "empty.gif": "cannot",
            "folder.png": "not a regular file", "pipe.png": "not a regular file", "nothing.png": "No such"}
    for name, why in whys.items():
        with pytest.raises(ValueError, match=f"{name}: .*{why}"):
            read_image(tmp_path / name)
    assert not (tmp_path / "started").exists()
    picture(tmp_path / "one.png", (1, 1))  # the smallest picture is one
    assert np.asarray(read_image(tmp_path / "one.png")).tolist() == [[[0, 0, 0]]]


def write_lists(root, train, test):
    """List files of rows (path, label) of ROOT, whose folders are made. Returns `load`'s arguments."""
    for name, rows in (("train", train), ("test", test)):
        for path, _ in rows:
            (root / path).parent.mkdir(exist_ok=True, parents=True)
        (root / f"{name}.txt").write_text("".join(f"{path} {label}\n" for path, label in rows))
    return {"train_list": root / "train.txt", "test_list": root / "test.txt"}


# ---------------------------------------------------------------- one look for recipe and loader

def test_the_median_picture_says_the_size_for_recipe_and_loader(tmp_path):
    for name, side in (("c", 200), ("a", 30), ("b", 50)):
        picture(tmp_path / "train" / name / "a.png", (side, side))
    assert image_side("folder", tmp_path) == 50

    tree(tmp_path / "real", {"ant": 3, "bee": 3}, size=(300, 300))
    picture(tmp_path / "real" / "train" / "ant" / "0.png")  # one small picture does not make all small
    for part in ("train", "test"):  # class folders that are links are looked into
        (tmp_path / "set" / part).mkdir(parents=True)
        for name in ("ant", "bee"):
            (tmp_path / "set" / part / name).symlink_to(tmp_path / "real" / part / name)
    assert image_side("folder", tmp_path / "set") == 300
    assert load("folder", tmp_path / "set").image_size == 224
    assert image_side("folder", tmp_path / "nowhere") is None is image_side("cifar100_lt", tmp_path / "set")


def test_lists_and_their_recipe_have_one_size(tmp_path):
    lists = write_lists(tmp_path, [("c/1.png", 0), ("a/1.png", 1), ("b/1.png", 2)],
                        [("c/2.png", 0), ("a/2.png", 1), ("b/2.png", 2)])
    with pytest.raises(ValueError, match="can be decoded"):
        load("folder", tmp_path, **lists)
    for name, side in (("a", 300), ("b", 300), ("c", 20)):
        picture(tmp_path / name / "1.png", (side, side))
    assert image_side("folder", tmp_path, lists["train_list"]) == 300
    data = load("folder", tmp_path, **lists)
    assert data.image_size == 224 and data.color_jitter == 0  # a set of one's own has no jitter


# ---------------------------------------------------------------- what lies in a folder

def test_subfolders_and_every_ending_are_read_hidden_files_are_not(tmp_path):
    tree(tmp_path, {"ant": 3, "bee": 3})
    ant = tmp_path / "train" / "ant"
    more = {"a.tif", "b.TIFF", "c.gif", "images/d.jpg", "images/deep/e.bmp", "f.pgm", "g.webp"}
    for name in more:
        picture(ant / name)
    (ant / "round").symlink_to(ant)  # and no end of it
    for name in ("train/ant/._0.png", "train/.ipynb_checkpoints/0.png", "train/ant/.thumbnails/0.png",
                 "test/.ipynb_checkpoints/x/0.png", "train/._ant.png"):
        picture(tmp_path / name)
    (tmp_path / "train" / ".DS_Store").write_bytes(b"x")

    data = load("folder", tmp_path)
    assert data.class_names == ["ant", "bee"] and data.class_counts.tolist() == [10, 3]
    assert {name for name in names_of(data.train, ant) if name[0] != "."} == {
        "0.png", "1.png", "2.png", *more}
    assert len(data.test) == 4 and check(data) == []


BAD_FOLDERS = {  # the files that there are (a name that ends in / is a folder), and what the error says
    "nothing": ([], "no such folder: .*train"),
    "no test images": (["train/a/0.png"], "no such folder: .*test .--test-fraction 0.2 sets"),
    "a stranger": (["train/a/0.png", "test/a/0.png", "test/stranger/"], "stranger is a class that"),
    "a hollow class": (["train/a/0.png", "train/hollow/", "test/a/0.png"],
                       r"class 1 \(hollow\) has no training image"),
    "an empty split": (["train/a/0.png", "test/a/"], "no image files in .*test"),
    "empty folders": (["train/", "test/"], "no class folders in .*train"),
    "a flat folder": (["train/a.png", "test/a.png"],
                      "no class folders in .*train: the images of each class must lie"),
    "a single class": (["train/ant/0.png", "test/ant/0.png"], "one class alone, ant"),
}


@pytest.mark.parametrize("fault", BAD_FOLDERS)
def test_bad_folders_are_refused_by_name(fault, tmp_path):
    names, message = BAD_FOLDERS[fault]
    for name in names:
        (tmp_path / name).mkdir(parents=True) if name.endswith("/") else picture(tmp_path / name)
    with pytest.raises(ValueError, match=message):
        load("folder", tmp_path)


ODDITIES = {"train/stray.png": "images in no class folder: 1 (stray.png)",
            "train/ant/._0.png": "hidden files: 2 (", "train/.thumbnails/0.png": ".thumbnails/0.png",
            "train/ant/notes.txt": "files that are no images: 1 (ant/notes.txt)",
            "train/ant/half.png": "cannot decode", "train/bee/pipe.png": "not a regular file",
            "train/bee/float.tif": "no known range", "train/bee/long.png": "too long",
            "test/bee/eps.jpg": "eps.jpg: cannot identify", "test/bee/gone.png": "no such file",
            "test/bee/b\udcff.jpg": "b\\udcff.jpg", "train/c\udcff/0.png": "c\\udcff/0.png"}


def test_the_checker_prints_each_oddity_of_a_tree_whatever_the_terminal_s_encoding(tmp_path, monkeypatch):
    for stream in ("stdout", "stderr"):
        monkeypatch.setattr(sys, stream, io.TextIOWrapper(io.BytesIO(), "ascii"))
    tree(tmp_path, {"ant": 3, "bee": 3})
    for name in ODDITIES:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"junk") if path.name != "pipe.png" else os.mkfifo(path)
    half = picture(tmp_path / "train" / "ant" / "half.png", (40, 40))
    half.write_bytes(half.read_bytes()[:60])
    Image.new("F", (8, 8)).save(tmp_path / "train" / "bee" / "float.tif")
    Image.new("RGB", (3000, 2)).save(tmp_path / "train" / "bee" / "long.png")
    (tmp_path / "test" / "bee" / "gone.png").unlink()
    (tmp_path / "test" / "bee" / "gone.png").symlink_to("nowhere")

    assert main(["folder", "--data-dir", str(tmp_path)]) == 1
    sys.stdout.flush()
    shown = sys.stdout.buffer.getvalue().decode("ascii")
    for line in (*ODDITIES.values(), "looked at is 20 pixels (median)", "8 things are wrong"):
        assert line in shown, (line, shown)


def test_the_checker_calls_pictures_of_one_value_wrong(tmp_path):
    for name in ("ant", "bee"):
        for part in ("train", "test"):
            (tmp_path / part / name).mkdir(parents=True)
            Image.new("RGB", (20, 20), "white").save(tmp_path / part / name / "a.png")
    wrong = check(load("folder", tmp_path))
    assert len(wrong) == 3 and all("has one value, 1.000" in line for line in wrong)


def test_two_spellings_of_a_class_name_are_one_class(tmp_path):
    composed, decomposed = (unicodedata.normalize(form, "éclair") for form in ("NFC", "NFD"))
    train = [(f"train/{name}/0.png", c) for c, name in ((1, composed), (1, decomposed), (0, "ant"))]
    test = [(f"test/{decomposed}/0.png", 1), ("test/ant/0.png", 0)]
    for path, _ in train + test:
        picture(tmp_path / path)
    lists = write_lists(tmp_path, train, test)
    for data in (load("folder", tmp_path), load("folder", tmp_path, **lists)):
        assert data.class_names == ["ant", composed] and data.class_counts.tolist() == [1, 2]

    # names that are given are composed too
    (tmp_path / "train_classes.txt").write_text(f"bee\n{decomposed}\n", encoding="utf-8")
    assert load("folder", tmp_path, **lists).class_names == ["bee", composed]
    images, targets = np.zeros((2, 8, 8), np.uint8), np.arange(2)
    np.savez(tmp_path / "a.npz", x_train=images, y_train=targets, x_test=images, y_test=targets,
             class_names=["ant", decomposed])
    assert load(tmp_path / "a.npz").class_names == ["ant", composed]


def test_an_unreadable_folder_is_one_line(tmp_path):
    with pytest.raises(ValueError, match="File name too long|no such folder"):
        load("folder", tmp_path / ("x" * 300))
    tree(tmp_path, {"ant": 1, "bee": 1})
    closed = tmp_path / "train" / "ant"
    closed.chmod(0)
    try:
        if os.access(closed, os.R_OK):
            pytest.skip("this user may read everything")
        with pytest.raises(ValueError, match="cannot read .*ant: Permission denied"):
            load("folder", tmp_path)
    finally:
        closed.chmod(0o755)


# ---------------------------------------------------------------- lists

LINES = "a/1.jpg 0\na/2.jpg 0\nb/3 4.jpg 1\n"


@pytest.mark.parametrize("content", [
    b"\xef\xbb\xbf" + LINES.encode(), LINES.encode("utf-16"), LINES.replace("/", "\\").encode(),
    b"\xef\xbb\xbf" + LINES.replace("/", "\\").replace("\n", "\r\n").encode()])
def test_windows_lists_are_read(tmp_path, content):
    (tmp_path / "list.txt").write_bytes(content)
    listing = read_list(tmp_path / "list.txt")
    assert listing.names == ["a/1.jpg", "a/2.jpg", "b/3 4.jpg"] and listing.targets.tolist() == [0, 0, 1]
