"""The door to every data set: `load(name)` returns a `Dataset` with `.train`, `.val` (or None) and `.test`.

    python -m common.data imagenet_lt --data-dir /data/imagenet

checks a data set before a night is burnt on it: files, counts, groups, mean and standard deviation.
"""
import argparse
import hashlib
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from common.builders import (ASSETS, BUILDERS, CUT, FASHION_ORDER, LISTED, MATLAB, PUBLISHED, build_listed,
                             build_npz)
from common.files import IMAGE_ENDINGS, check_lists, first_side, read_image, read_list
from common.longtail import (Dataset, ImageFiles, Images, balanced_subset, channel_statistics,
                             cut_to_long_tail, long_tail_counts, long_tail_indices, moments)

# ---------------------------------------------------------------- load

def load(name, data_dir="data", imb_factor=None, seed=0, train_list=None, test_list=None):
    """Build a long-tailed data set.

    name: a key of `BUILDERS`, or the path of an .npz file. data_dir: where the files are or are downloaded to
    (for "folder": the folder itself). imb_factor: max/min images per class, >= 1; None is the papers' for the
    sets that are cut from a balanced one (100; most of CANDLE's: 10), and no cut for an .npz or a folder.
    seed: which images are kept. train_list, test_list: list files (`read_list`) that take the place of the
    data set's own, paths relative to data_dir. Returns a `Dataset`. Raises ValueError, saying what was wrong
    and what to do.
    """
    if imb_factor is not None:
        long_tail_counts(1, 1, imb_factor)
    is_npz = str(name).endswith(".npz")
    if not is_npz and name not in BUILDERS:
        raise ValueError(f"unknown data set {name!r}; known: {', '.join(BUILDERS)}, or a FILE.npz")
    if train_list or test_list:
        if is_npz or name not in (*LISTED, *CUT, "folder"):
            raise ValueError(f"--train-list and --test-list name image files, which {name} does not have")
        return build_listed(name, data_dir, imb_factor, seed, train_list, test_list)
    if is_npz:
        return build_npz(str(name), name, imb_factor, seed)
    return BUILDERS[name](name, data_dir, imb_factor, seed)


def image_side(name, data_dir="data"):
    """Side in pixels of a data set's images, without reading them all: 224 for the papers' sets of image
    files, an .npz by its header, a folder by its first readable image. None where there is nothing to look at
    (then `load` says what is missing)."""
    if name in LISTED or name in CUT:
        return 224
    if str(name).endswith(".npz") and Path(name).is_file():
        import zipfile
        try:
            with zipfile.ZipFile(name) as archive, archive.open("x_train.npy") as member:
                version = np.lib.format.read_magic(member)
                read = np.lib.format.read_array_header_1_0 if version == (1, 0) else \
                    np.lib.format.read_array_header_2_0
                return int(read(member)[0][1])
        except Exception:  # zipfile, zlib and numpy each raise their own for a damaged file; `load` says so
            return None
    if name == "folder":
        root = Path(data_dir, "train") if Path(data_dir, "train").is_dir() else data_dir  # or own list files
        return first_side(os.path.join(folder, file) for folder, _, files in os.walk(root)
                           for file in sorted(files) if file.lower().endswith(IMAGE_ENDINGS))
    return None


# ---------------------------------------------------------------- python -m common.data

def facts(data):
    """What `PUBLISHED` holds, of this data set."""
    counts = data.class_counts
    return dict(classes=data.num_classes, train=len(data.train), val=len(data.val or ()), test=len(data.test),
                largest=int(counts.max()), smallest=int(counts.min()),
                groups=(int((counts > 100).sum()), int(((counts >= 20) & (counts <= 100)).sum()),
                        int((counts < 20).sum())),
                counts=hashlib.sha256(counts.astype("<i8").tobytes()).hexdigest()[:16])


def _look_at(paths, fast):
    """What is wrong with some image files, and the summed histograms [3, 256] of the others, each image's
    pixels counting 1 in all. fast: only see whether they are there."""
    wrong, histograms = [], np.zeros((3, 256))
    for path in map(os.fsdecode, paths):
        if not os.path.isfile(path):
            wrong.append(f"no such file: {path}")
        elif not fast:
            try:
                image = read_image(path)
                histograms += np.reshape(image.histogram(), (3, 256)) / (image.width * image.height)
            except ValueError as reason:
                wrong.append(f"cannot decode {reason}")
    return wrong, histograms


def check(data, published=None, fast=False, workers=1):
    """Look at every file of a data set, compare its numbers with the published ones, and print what it has.

    published: a row of `PUBLISHED` or None. fast: do not decode the files. workers: threads that decode
    (PIL's codecs run side by side). Returns a list of what is wrong, a line each.
    """
    found, wrong = facts(data), []
    print("{name}: {classes} classes, {train} training images ({largest}..{smallest} a class), {val} val, "
          "{test} test; {groups[0]} many, {groups[1]} medium, {groups[2]} few"
          .format(name=data.name, **found), flush=True)
    for key, value in (published or {}).items():
        if found[key] != value and not (key == "val" and not found["val"]):  # nobody needs the val list
            wrong.append(f"{key}: {found[key]}, published: {value}" if key != "counts" else
                         "the images per class are not the published ones, class by class")
    histograms = np.zeros((3, 256))
    for part in ("train", "val", "test"):
        split = getattr(data, part)
        if not isinstance(split, ImageFiles):
            continue
        paths, times = np.unique(split.paths, return_counts=True)
        wrong += [f"{part}: {os.fsdecode(path)} is there twice" for path in paths[times > 1]]
        chunks = [paths[i:i + 64] for i in range(0, len(paths), 64)]
        with ThreadPoolExecutor(max(workers, 1)) as pool, \
                tqdm(total=len(paths), desc=part, unit="file", disable=None) as bar:
            for chunk, (bad, some) in zip(chunks, pool.map(lambda chunk: _look_at(chunk, fast), chunks)):
                wrong += [f"{part}: {line}" for line in bad]
                histograms += some if part == "train" else 0
                bar.update(len(chunk))
    decoded = isinstance(data.train, Images)
    if decoded or histograms.any():
        means, stds = channel_statistics(data.train.images) if decoded else moments(histograms)
        shown = [" ".join(f"{value:.3f}" for value in values)
                 for values in (means, stds, data.mean, data.std)]
        print("mean {} and standard deviation {} of the training images; the nets see them minus {}, over {}"
              .format(*shown))
    return wrong


def main(argv=None):
    """The command. Returns its exit code: 0, 1 where something is wrong, 2 where there is no data set."""
    def fail(message):
        print(f"error: {' '.join(str(message).split())}", file=sys.stderr, flush=True)
        sys.exit(2)
    parser = argparse.ArgumentParser("python -m common.data", allow_abbrev=False,
                                     description="Check a data set: files, counts, groups, mean, deviation.")
    parser.error = fail
    parser.add_argument("name", help=f"{', '.join(BUILDERS)}, or FILE.npz")
    parser.add_argument("--data-dir", default="data", help="where the data set is")
    parser.add_argument("--imb-factor", type=float, help="largest class / smallest class, at least 1")
    parser.add_argument("--subset-seed", type=int, default=0, help="which images are kept")
    parser.add_argument("--train-list", help="list file of your own; paths relative to --data-dir")
    parser.add_argument("--test-list", help="list file of your own; paths relative to --data-dir")
    parser.add_argument("--fast", action="store_true", help="do not decode the files")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="threads that decode")
    args = parser.parse_args(argv)
    try:
        data = load(args.name, args.data_dir, args.imb_factor, args.subset_seed, args.train_list,
                    args.test_list)
    except (ValueError, ImportError) as reason:
        fail(reason)
    own = args.train_list or args.test_list or args.imb_factor is not None
    published = None if own else PUBLISHED.get(args.name)
    if published is None or "largest" not in published:
        print("note: there are no published images per class to compare with")
    wrong = check(data, published, args.fast, args.workers)
    if wrong:
        print(f"{len(wrong)} things are wrong" + (", the first ten:" if len(wrong) > 10 else ":"))
        print("\n".join(wrong[:10]))
        return 1
    print("every file is there" + (" (not decoded)" if args.fast else " and decodes"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
