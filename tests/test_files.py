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

TURNED = {1: np.array, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud, 5: lambda a: a.swapaxes(0, 1),
          6: lambda a: np.rot90(a, -1), 7: lambda a: np.rot90(a, 2).swapaxes(0, 1), 8: np.rot90}
ODDITIES = {"train/stray.png": "images in no class folder: 1 (stray.png)",  # a file: what is said of it
            "train/ant/._0.png": "hidden files: 2 (", "train/.thumbnails/0.png": ".thumbnails/0.png",
            "train/ant/notes.txt": "files that are no images: 1 (ant/notes.txt)",
            "train/ant/half.png": "cannot decode", "train/bee/pipe.png": "not a regular file",
            "train/bee/float.tif": "no known range", "train/bee/long.png": "too long",
            "test/bee/eps.jpg": "eps.jpg: cannot identify", "test/bee/gone.png": "no such file",
            "test/bee/b\udcff.jpg": "b\\udcff.jpg", "train/c\udcff/0.png": "c\\udcff/0.png"}


def pixels_of(path):
    return np.asarray(read_image(path)).astype(float)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_every_picture_becomes_eight_bit_rgb_turned_as_its_exif_says_on_white(tmp_path):
    grey, names = (np.arange(64 * 64).reshape(64, 64) * 16).astype(np.uint16), ("a.png", "a.tif", "a.pgm")
    for name in names[:2]:
        Image.fromarray(grey).save(tmp_path / name)
    (tmp_path / names[2]).write_bytes(b"P5 64 64 65535\n" + grey.astype(">u2").tobytes())
    for name in names:
        assert np.abs(pixels_of(tmp_path / name) - grey[..., None] / 257).max() <= 0.5 + 1e-9
    pixels, exif = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3), Image.Exif()
    for orientation, turned in TURNED.items():
        exif[0x0112] = orientation
        Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
        assert np.array_equal(read_image(tmp_path / "a.png"), turned(pixels))
    for damaged in (b"Exif\0\0garbage", b"Exif\0\0II*\0\x08\0\0\0\x05\0\x12\x01"):
        assert read_image(picture(tmp_path / "a.jpg", (8, 6), exif=damaged)).size == (8, 6)

    for mode, colour, rgb in (("L", 70, (70, 70, 70)), ("CMYK", (255, 0, 0, 0), (0, 255, 255))):
        Image.new(mode, (8, 8), colour).save(tmp_path / "a.jpg")
        image = read_image(tmp_path / "a.jpg")
        assert image.mode == "RGB" and np.asarray(image)[4, 4] == pytest.approx(rgb, abs=3)
    Image.new("P", (8, 8), 1).save(tmp_path / "p.png")
    assert read_image(tmp_path / "p.png").mode == "RGB"
    clear = Image.new("RGBA", (8, 8), (10, 20, 30, 0))  # nearly black below what cannot be seen
    clear.paste((200, 200, 200, 255), (0, 0, 4, 8))
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([10, 20, 30, 200, 200, 200])
    palette.paste(0, (4, 0, 8, 8))
    for name in ("RGBA.png", "LA.png", "RGBA.tif", "PA.tif", "P.png", "P.gif"):
        mode, path = name.split(".")[0], tmp_path / name
        palette.save(path, transparency=0) if mode == "P" else clear.convert(mode).save(path)
        assert (pixels_of(path)[:, :4] == 200).all() and (pixels_of(path)[:, 4:] == 255).all()
    Image.new("RGBA", (2, 2), (0, 100, 200, 51)).save(tmp_path / "a.png")  # is mixed with white
    assert pixels_of(tmp_path / "a.png")[0, 0] == pytest.approx((204, 224, 244), abs=1)


def test_what_is_no_picture_is_refused_by_name_and_starts_no_ghostscript(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    eps = "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
    for name, content in {"gs": f"#!/bin/sh\ntouch {tmp_path}/started\n", "zero.ppm": "P6 0 0 255\n",
                          "eps.jpg": eps, "empty.gif": ""}.items():
        (tmp_path / name).write_text(content)
        (tmp_path / name).chmod(0o755)
    for mode in ("F", "I"):
        Image.new(mode, (8, 8), 3).save(tmp_path / f"{mode}.tif")
    Image.new("RGB", (3000, 2)).save(tmp_path / "long.png")
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    whys = {"F.tif": "mode F.* no known range", "I.tif": "mode I.* no known range", "eps.jpg": "cannot",
            "long.png": "3000 x 2 pixels are too long", "zero.ppm": "cannot identify", "empty.gif": "cannot",
            "folder.png": "not a regular file", "pipe.png": "not a regular file", "nothing.png": "No such"}
    for name, why in whys.items():
        pytest.raises(ValueError, read_image, tmp_path / name).match(f"{name}: .*{why}")
    assert not (tmp_path / "started").exists()
    assert pixels_of(picture(tmp_path / "one.png", (1, 1))).tolist() == [[[0, 0, 0]]]  # the smallest picture


def write_lists(root, train, test):
    """List files of rows (path, label). Returns `load`'s arguments."""
    for name, rows in (("train", train), ("test", test)):
        (root / f"{name}.txt").write_text("".join(f"{path} {label}\n" for path, label in rows))
    return {"train_list": root / "train.txt", "test_list": root / "test.txt"}


def test_the_median_picture_of_a_folder_or_a_list_says_the_size_for_recipe_and_loader(tmp_path):
    for name, side in (("c", 200), ("a", 30), ("b", 50)):
        picture(tmp_path / "train" / name / "a.png", (side, side))
    assert image_side("folder", tmp_path) == 50
    real, linked = tree(tmp_path / "real", {"ant": 3, "bee": 3}, size=(300, 300)), tmp_path / "set"
    picture(real / "train" / "ant" / "0.png")  # one small picture does not make all small
    for folder in ("train/ant", "train/bee", "test/ant", "test/bee"):  # links are looked into
        (linked / folder).parent.mkdir(parents=True, exist_ok=True)
        (linked / folder).symlink_to(real / folder)
    assert image_side("folder", linked) == 300 and load("folder", linked).image_size == 224
    assert image_side("folder", tmp_path / "nowhere") is None is image_side("cifar100_lt", linked)
    lists = write_lists(tmp_path, *([(f"{c}/{i}.png", "cab".index(c)) for c in "cab"] for i in (1, 2)))
    (tmp_path / "c").mkdir()
    pytest.raises(ValueError, load, "folder", tmp_path, **lists).match("can be decoded")
    for name, side in (("a", 300), ("b", 300), ("c", 20)):
        picture(tmp_path / name / "1.png", (side, side))
    assert image_side("folder", tmp_path, lists["train_list"]) == 300
    data = load("folder", tmp_path, **lists)
    assert data.image_size == 224 and data.color_jitter == 0  # a set of one's own has no jitter


def test_subfolders_and_every_ending_are_read_hidden_files_not_and_one_value_everywhere_is_wrong(tmp_path):
    ant = tree(tmp_path, {"ant": 3, "bee": 3}) / "train" / "ant"
    more = {"a.tif", "b.TIFF", "c.gif", "images/d.jpg", "images/deep/e.bmp", "f.pgm", "g.webp"}
    hidden = ("train/ant/._0.png", "train/.ipynb_checkpoints/0.png", "train/ant/.thumbnails/0.png",
              "test/.ipynb_checkpoints/x/0.png", "train/._ant.png")
    for path in [*map(ant.joinpath, more), *map(tmp_path.joinpath, hidden)]:
        picture(path)
    (ant / "round").symlink_to(ant)  # and no end of it
    (tmp_path / "train" / ".DS_Store").write_bytes(b"x")
    data = load("folder", tmp_path)
    assert data.class_names == ["ant", "bee"] and data.class_counts.tolist() == [10, 3]
    assert {*names_of(data.train.subset(range(10)), ant)} == {"0.png", "1.png", "2.png", *more}
    assert len(data.test) == 4 and check(data) == []
    for path in data.train.paths:
        Image.new("RGB", (20, 20), "white").save(os.fsdecode(path))
    wrong = check(data)
    assert len(wrong) == 3 and all("has one value, 1.000" in line for line in wrong)


@pytest.mark.parametrize("names, words", [  # the files that there are; a name that ends in / is a folder
    ("", "no such folder: .*train"), ("train/a/0.png", "no such folder: .*test .--test-fraction 0.2 sets"),
    ("train/a/0.png test/a/0.png test/stranger/", "stranger is a class that"),
    ("train/a/0.png train/hollow/ test/a/0.png", r"class 1 \(hollow\) has no training image"),
    ("train/a/0.png test/a/", "no image files in .*test"), ("train/ test/", "no class folders in .*train"),
    ("train/a.png test/a.png", "no class folders in .*train: the images of each class must lie"),
    ("train/ant/0.png test/ant/0.png", "one class alone, ant")])
def test_bad_folders_are_refused_by_name(names, words, tmp_path):
    for name in names.split():
        (tmp_path / name).mkdir(parents=True) if name.endswith("/") else picture(tmp_path / name)
    pytest.raises(ValueError, load, "folder", tmp_path).match(words)


def test_the_checker_prints_each_oddity_of_a_tree_whatever_the_terminal_s_encoding(tmp_path, monkeypatch):
    for stream in ("stdout", "stderr"):
        monkeypatch.setattr(sys, stream, io.TextIOWrapper(io.BytesIO(), "ascii"))
    tree(tmp_path, {"ant": 3, "bee": 3})
    for path in map(tmp_path.joinpath, ODDITIES):
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


def test_the_checker_names_classes_of_one_image_and_counts_without_bad_files_if_asked(tmp_path, capsys):
    tree(tmp_path, {"ant": 3, "bee": 1, "cow": 2})
    (tmp_path / "train" / "cow" / "0.png").write_bytes(b"junk")
    flags = ["folder", "--data-dir", str(tmp_path)]
    assert main(flags) == 1
    shown = capsys.readouterr().out
    assert "6 training images" in shown and "note: 1 class has one training image alone: bee\n" in shown
    assert main([*flags, "--skip-bad-images"]) == 0
    shown = capsys.readouterr().out
    assert "5 training images" in shown and "2 classes have one training image alone: bee, cow\n" in shown


def test_two_spellings_of_a_class_name_are_one_class(tmp_path):
    composed, decomposed = (unicodedata.normalize(form, "éclair") for form in ("NFC", "NFD"))
    train = [(f"train/{name}/0.png", c) for c, name in ((1, composed), (1, decomposed), (0, "ant"))]
    test = [(f"test/{decomposed}/0.png", 1), ("test/ant/0.png", 0)]
    lists = write_lists(tmp_path, train, test)
    for path, _ in train + test:
        picture(tmp_path / path)
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
    pytest.raises(ValueError, load, "folder", tmp_path / ("x" * 300)).match("name too long|no such folder")
    closed = tree(tmp_path, {"ant": 1, "bee": 1}) / "train" / "ant"
    closed.chmod(0)
    try:
        if os.access(closed, os.R_OK):
            pytest.skip("this user may read everything")
        pytest.raises(ValueError, load, "folder", tmp_path).match("cannot read .*ant: Permission denied")
    finally:
        closed.chmod(0o755)


def test_windows_lists_are_read(tmp_path):
    unix, marked = "a/1.jpg 0\na/2.jpg 0\nb/3 4.jpg 1\n", b"\xef\xbb\xbf"
    windows = unix.replace("/", "\\")
    for content in (marked + unix.encode(), unix.encode("utf-16"), windows.encode(),
                    marked + windows.replace("\n", "\r\n").encode()):
        (tmp_path / "list.txt").write_bytes(content)
        listing = read_list(tmp_path / "list.txt")
        assert listing.names == ["a/1.jpg", "a/2.jpg", "b/3 4.jpg"] and listing.targets.tolist() == [0, 0, 1]
