"""Image files and lists of them -> paths, labels, pixels."""
import json
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".webp")


# ---------------------------------------------------------------- image files and lists of them

def read_image(path):
    """The image in a file as a PIL image in RGB: grey, palette and CMYK files become RGB, too. Raises
    ValueError with the path and why it cannot be decoded."""
    from PIL import Image
    try:
        with Image.open(path) as file:
            return file.convert("RGB")
    except Exception as reason:  # PIL and its codecs raise nearly anything for a damaged file
        raise ValueError(f"{path}: {' '.join(str(reason).split()) or type(reason).__name__}") from reason


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
    labels. Returns a `Listing`. Raises ValueError with file and line."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no such list file: {path} (lines `relative/path label`; --train-list and "
                         "--test-list name other files)")
    if path.suffix == ".json":
        return _read_inat_json(path)
    names, targets = [], []
    for number, line in enumerate(path.read_bytes().rstrip().splitlines(), 1):
        words = line.strip().rsplit(maxsplit=1)
        if len(words) < 2 or not words[1].isdigit() or len(words[1]) > 18:
            raise ValueError(f"{path}, line {number}: must be `relative/path label`, with a label 0, 1, ..., "
                             f"it is {os.fsdecode(line[:80])!r}")
        names.append(os.fsdecode(words[0]))
        targets.append(int(words[1]))
    if not names:
        raise ValueError(f"{path} is empty; it must hold lines `relative/path label`")
    return Listing(path, "line", names, np.array(targets, np.int64))


def _read_inat_json(path):
    try:
        content = json.loads(path.read_bytes())
        file_of = {image["id"]: image["file_name"] for image in content["images"]}
        names = [file_of[annotation["image_id"]] for annotation in content["annotations"]]
        targets = [int(annotation["category_id"]) for annotation in content["annotations"]]
        name_of = {int(category["id"]): str(category["name"]) for category in content["categories"]}
    except (ValueError, KeyError, TypeError) as reason:
        raise ValueError(f"{path} is not an iNaturalist annotation file with images, annotations and "
                         f"categories ({type(reason).__name__}: {str(reason)[:80]})") from reason
    if not names or min(targets) < 0 or sorted(name_of) != list(range(len(name_of))):
        raise ValueError(f"{path} has no annotations, or its category ids are not 0..C-1")
    return Listing(path, "annotation", names, np.array(targets, np.int64),
                   [name_of[i] for i in range(len(name_of))])


def check_lists(train, others, root, num_classes=None):
    """Refuse `Listing`s that cannot be one data set: a label out of range, a class without a training image,
    an image in two splits, a folder that is not there. num_classes: C (None: as many as the training list
    has). Returns C. Raises ValueError with file and line."""
    C, last = num_classes, int(train.targets.argmax())
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
                         f"({lacking.sum()} such classes)")
    seen = {}  # name: (listing, its place there)
    for listing in (train, *others):
        for i, name in enumerate(listing.names):
            first, place = seen.setdefault(name, (listing, i))
            if first is not listing:
                raise ValueError(f"{listing.where(i)}: {name} is in another split too "
                                 f"({first.where(place)}); is this the right list?")
        folder = Path(root, listing.names[0]).parent
        if not folder.is_dir():
            raise ValueError(f"no such folder: {folder} ({listing.where(0)} names {listing.names[0]})")
    return C


def scan(folder, class_names):
    """Paths of the image files FOLDER/CLASS/*.jpg and their targets, class by class in the names' order. Raises
    ValueError."""
    ids = {class_name: i for i, class_name in enumerate(class_names)}
    paths, targets = [], []
    for class_name in class_folders(folder):
        if class_name not in ids:
            raise ValueError(f"{folder}/{class_name} is a class that the training images do not have")
        files = sorted(f for f in Path(folder, class_name).iterdir() if f.suffix.lower() in IMAGE_ENDINGS)
        paths += files
        targets += [ids[class_name]] * len(files)
    if not paths:
        raise ValueError(f"no image files in {folder}")
    return paths, targets


def class_folders(folder, what="class folders"):
    """Names of the folders in a folder, sorted. what: what must be there. Raises ValueError."""
    if not Path(folder).is_dir():
        raise ValueError(f"no such folder: {folder} (looked for {what})")
    names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    if not names:
        raise ValueError(f"no class folders in {folder}")
    return names


def first_side(paths):
    """Longer side in pixels of the first of these files that is an image, None where there is none."""
    from PIL import Image
    for path in paths:
        try:
            with Image.open(path) as image:
                return max(image.size)
        except (OSError, SyntaxError, ValueError):  # the loader's business; the next one will do
            continue
    return None
