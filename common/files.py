"""Image files and lists of them -> paths, labels, pixels."""
import codecs
import json
import os
import stat
import sys
import unicodedata
from pathlib import Path
from typing import NamedTuple

import numpy as np

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".ppm", ".pgm", ".bmp", ".webp", ".tif", ".tiff", ".gif")
FORMATS = ("JPEG", "PNG", "PPM", "BMP", "WEBP", "TIFF", "GIF")  # not PIL's others: EPS starts Ghostscript
LONGEST_SHAPE = 50  # longer side / shorter side; resized to 256 pixels, a longer one would fill the memory


class MissingFile(ValueError):
    """A file or folder that a data set needs is not there."""


def escape_unprintable():
    """From here on print file names that the terminal's encoding lacks with backslashes, instead of ending
    in UnicodeEncodeError. For the start of a program."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


# ---------------------------------------------------------------- pixels

def read_image(path):
    """The picture in a file as a PIL image in RGB, 8 bits a channel, turned as its EXIF orientation says.

    Grey, palette and CMYK become RGB; 16-bit grey is scaled to 8 bits; what is transparent shows white, the
    page that such pictures are drawn for. Of several pictures in a file the first counts. Raises ValueError
    with the path and why it cannot be decoded; 32-bit pixels, whose range is unknown, are refused, and so is
    what is no regular file or more than 50 times as long as wide.
    """
    from PIL import Image, ImageOps
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise ValueError("not a regular file")
        with Image.open(path, formats=FORMATS) as file:
            if max(file.size) > LONGEST_SHAPE * min(file.size):
                raise ValueError(f"{file.width} x {file.height} pixels are too long and thin (at most "
                                 f"{LONGEST_SHAPE} to 1)")
            file.load()
            try:
                is_turned = file.getexif().get(0x0112, 1) != 1  # the tag Orientation
                image = ImageOps.exif_transpose(file) if is_turned else file
            except Exception:  # a damaged EXIF block says nothing: the picture as it is stored
                image = file
            return _as_rgb(image, file.format)
    except Exception as reason:  # PIL and its codecs raise nearly anything for a damaged file
        raise ValueError(f"{path}: {' '.join(str(reason).split()) or type(reason).__name__}") from reason


def _as_rgb(image, file_format):
    from PIL import Image
    # older versions of PIL read 16-bit files of these formats as 32-bit integers
    sixteen = image.mode.startswith("I;16") or image.mode == "I" and file_format in ("PNG", "PPM")
    if sixteen:  # 65535 / 257 = 255; PIL's own conversion clips at 255
        image = Image.fromarray(np.rint(np.asarray(image) / 257).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"32-bit pixels (PIL's mode {image.mode}) have no known range; save them with 8 or "
                         "16 bits a channel")
    if image.mode[-1] in "aA" or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def side_of(path):
    """Longer side in pixels of the image in a file; None where it is none (`read_image` says why)."""
    from PIL import Image
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            return None
        with Image.open(path, formats=FORMATS) as image:
            return max(image.size)
    except Exception:  # as above
        return None


# ---------------------------------------------------------------- class folders

def image_names(folder):
    """Files in a folder and its subfolders, links followed, each folder's sorted by name.

    Returns the paths of the image files; of files that are hidden, or in a hidden folder; and of the others.
    """
    def stop(reason):
        raise reason

    images, hidden, others = [], [], []
    above = {}  # folder: what it and the folders above it really are
    for root, folders, files in os.walk(folder, followlinks=True, onerror=stop):
        real, outer = os.path.realpath(root), above.get(os.path.dirname(root), ())
        if real in outer:  # a link to a folder above it
            folders.clear()
            continue
        above[root] = (*outer, real)
        folders.sort()

        in_hidden = "/." in root[len(str(folder)):]
        for name in sorted(files):
            kind = hidden if in_hidden or name.startswith(".") else \
                images if name.lower().endswith(IMAGE_ENDINGS) else others
            kind.append(os.path.join(root, name))
    return images, hidden, others


def class_folders(folder, what="class folders"):
    """Names of the folders in a folder that are not hidden, sorted. what: what must be there. Raises
    ValueError."""
    if not Path(folder).is_dir():
        raise MissingFile(f"no such folder: {folder} (looked for {what})")
    names = sorted(entry.name for entry in os.scandir(folder)
                   if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise ValueError(f"no class folders in {folder}: the images of each class must lie in a folder of "
                         "their own, named as the class")
    return names


def composed(name):
    """A class name in Unicode's composed form (NFC): files from a Mac may spell it decomposed."""
    return unicodedata.normalize("NFC", name)


def scan(folder, class_names):
    """Read the names in a folder FOLDER/CLASS/*.jpg.

    Returns the image files' paths and targets, class by class in the names' order, and what is left out:
    {what: paths}. Raises ValueError.
    """
    ids = {class_name: i for i, class_name in enumerate(class_names)}
    for name in class_folders(folder):
        if composed(name) not in ids:
            raise ValueError(f"{Path(folder, name)} is a class that the training images do not have")

    images, hidden, others = image_names(folder)
    start = len(os.path.join(folder, ""))
    parts = [(path, path[start:].split(os.sep)) for path in images]
    stray = [path for path, names in parts if len(names) == 1]
    found = [(ids[composed(names[0])], path) for path, names in parts if len(names) > 1]
    if not found:
        raise ValueError(f"no image files in {folder}")

    targets, paths = zip(*sorted(found, key=lambda pair: pair[0]))
    return paths, targets, {"images in no class folder": stray, "hidden files": hidden,
                            "files that are no images": others}


# ---------------------------------------------------------------- list files

class Listing(NamedTuple):
    """What a list file says. file: its path; unit: "line" or what else it counts; names: paths of images
    relative to the data set's root; targets: int64 [n]; class_names: C strings, or None."""
    file: Path
    unit: str
    names: list
    targets: np.ndarray
    class_names: list = None

    def where(self, i):
        """Where image i (from 0) stands."""
        return f"{self.file}, {self.unit} {i + 1}"


def read_list(path):
    """Read a list file: lines `relative/path label` as OLTR and classifier-balancing have them, labels from
    0, maybe spaces in the path; or an official .json of iNaturalist 2017 or 2018, whose category ids are the
    labels. Windows' byte-order marks and backslashes are read. A file NAME_classes.txt beside NAME.txt names
    the classes, one a line. Returns a `Listing`. Raises ValueError with file and line."""
    path = Path(path)
    if not path.is_file():
        raise MissingFile(f"no such list file: {path} (lines `relative/path label`; --train-list and "
                         "--test-list name other files)")
    if path.suffix == ".json":
        return _read_inat_json(path)

    names, targets = [], []
    for number, line in enumerate(_lines(path), 1):
        words = line.strip().rsplit(maxsplit=1)
        if len(words) < 2 or not words[1].isdigit() or len(words[1]) > 18:
            raise ValueError(f"{path}, line {number}: must be `relative/path label`, with a label 0, 1, ..., "
                             f"it is {os.fsdecode(line[:80])!r}")
        name = words[0] if b"/" in words[0] else words[0].replace(b"\\", b"/")
        names.append(os.fsdecode(name))
        targets.append(int(words[1]))
    if not names:
        raise ValueError(f"{path} is empty; it must hold lines `relative/path label`")

    classes = path.with_name(f"{path.stem}_classes.txt")
    class_names = [os.fsdecode(line) for line in _lines(classes)] if classes.is_file() else None
    return Listing(path, "line", names, np.array(targets, np.int64), class_names)


def _lines(path):
    """A text file's lines as bytes in UTF-8, without byte-order mark."""
    content = path.read_bytes()
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        content = content.decode("utf-16", "replace").encode()
    return content.removeprefix(codecs.BOM_UTF8).rstrip().splitlines()


def _read_inat_json(path):
    try:
        content = json.loads(path.read_bytes())
        file_of = {image["id"]: image["file_name"] for image in content["images"]}
        names = [file_of[annotation["image_id"]] for annotation in content["annotations"]]
        targets = [int(annotation["category_id"]) for annotation in content["annotations"]]
        name_of = {int(category["id"]): str(category["name"]) for category in content["categories"]}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as reason:
        raise ValueError(f"{path} is not an iNaturalist annotation file with images, annotations and "
                         f"categories ({type(reason).__name__}: {str(reason)[:80]})") from reason
    if not names or min(targets) < 0 or sorted(name_of) != list(range(len(name_of))):
        raise ValueError(f"{path} has no annotations, or its category ids are not 0..C-1")
    return Listing(path, "annotation", names, np.array(targets, np.int64),
                   [name_of[i] for i in range(len(name_of))])


def numbering_advice(targets):
    """What to do about class ids [n] of training images that are not 0..C-1, each there."""
    labels = np.unique(targets)
    if labels[-1] - labels[0] + 1 == len(labels):
        return f"labels start at {labels[0]}, they must start at 0: subtract {labels[0]} from every label"
    missing = np.argmax(labels != np.arange(len(labels)))
    return f"labels have gaps ({missing} has no image): number the {len(labels)} classes 0..{len(labels) - 1}"


def check_lists(train, others, root, num_classes=None):
    """Refuse `Listing`s that cannot be one data set: a label out of range, a class without a training image,
    an image in two splits or with two labels, a folder that is not there. num_classes: C (None: as many as
    the training list has). Returns C. Raises ValueError with file and line."""
    C, last = num_classes, int(train.targets.argmax())
    if train.targets.min() > 0 and min(listing.targets.min() for listing in others) > 0:
        raise ValueError(f"{train.file}: {numbering_advice(train.targets)}")
    if C is None:
        C = int(train.targets[last]) + 1
        if C > len(train.names):  # some class has no image; do not count up to a label of 10^15
            raise ValueError(f"{train.where(last)}: label {C - 1} among only {len(train.names)} images: "
                             "class ids must be 0..C-1, each with an image")
    for listing in (train, *others):
        for i in np.flatnonzero(listing.targets >= C)[:1]:
            raise ValueError(f"{listing.where(i)}: label {listing.targets[i]} is out of range, there are "
                             f"classes 0..{C - 1} in {'the data set' if num_classes else train.file}")
    lacking = np.bincount(train.targets, minlength=C) == 0
    for listing in others:
        for i in np.flatnonzero(lacking[listing.targets])[:1]:
            raise ValueError(f"{listing.where(i)}: class {listing.targets[i]} has no image in the training "
                             f"list {train.file}")
    if lacking.any():
        raise ValueError(f"{train.file}: class {lacking.argmax()} of 0..{C - 1} has no image "
                         f"({lacking.sum()} such classes); {numbering_advice(train.targets)}")

    seen = {}  # name: (listing, its place there)
    for listing in (train, *others):
        for i, name in enumerate(listing.names):
            first, place = seen.setdefault(name, (listing, i))
            if first is not listing:
                raise ValueError(f"{listing.where(i)}: {name} is in another split too "
                                 f"({first.where(place)}); is this the right list?")
            if first.targets[place] != listing.targets[i]:
                raise ValueError(f"{listing.where(i)}: {name} has label {listing.targets[i]} here and "
                                 f"{first.targets[place]} in {first.unit} {place + 1}")
        folder = Path(root, listing.names[0]).parent
        if not folder.is_dir():
            raise MissingFile(f"no such folder: {folder} ({listing.where(0)} names {listing.names[0]})")
    return C
