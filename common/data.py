"""The door to every data set: `load(name)` returns a `Dataset` with `.train`, `.val` (or None) and `.test`.

    python -m common.data imagenet_lt --data-dir /data/imagenet

checks a data set before a night is burnt on it: files, counts, groups, mean and standard deviation.
"""
import argparse
import hashlib
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from tqdm import tqdm

from common.builders import (ASSETS, BUILDERS, CUT, FASHION_ORDER, LISTED, MATLAB, PUBLISHED, SOURCES, Own,
                             build_listed, build_npz, count_images, image_side, training_files)
from common.files import MissingFile, escape_unprintable, read_image, read_list
from common.folder import atomic_write
from common.longtail import (Dataset, ImageFiles, Images, balanced_subset, channel_statistics,
                             cut_to_long_tail, fingerprint, long_tail_counts, long_tail_indices, moments,
                             note)


def load(name, data_dir="data", imb_factor=None, seed=0, **own):
    """Build a long-tailed data set.

    name: a key of `BUILDERS`, or the path of an .npz file. data_dir: where the files are or are downloaded to
    (for "folder": the folder itself). imb_factor: max/min images per class, >= 1; None is the papers' for the
    sets that are cut from a balanced one (100; most of CANDLE's: 10), and no cut for an .npz or a folder.
    seed: which images are kept. own: train_list, test_list, test_fraction, class_names, each as in `Own`.
    Returns a `Dataset`. Raises ValueError, saying what was wrong and what to do.
    """
    own = Own(**own)
    train_list, test_list, test_fraction, _ = own
    if imb_factor is not None:
        long_tail_counts(1, 1, imb_factor)
    is_npz = str(name).endswith(".npz")
    if not is_npz and name not in BUILDERS:
        raise ValueError(f"unknown data set {name!r}; known: {', '.join(BUILDERS)}, or a FILE.npz")
    if (train_list or test_list) and name not in (*LISTED, *CUT, "folder"):
        raise ValueError(f"--train-list and --test-list name image files, which {name} does not have")
    if test_fraction is not None and not 0 < test_fraction < 1:
        raise ValueError(f"--test-fraction must lie between 0 and 1, got {test_fraction}")
    if test_fraction and (test_list or name != "folder" and not train_list):
        raise ValueError("--test-fraction is for images without a test split: a folder without test/, or "
                         "--train-list without --test-list")
    try:
        if train_list or test_list:
            data = build_listed(name, data_dir, imb_factor, seed, own)
        elif is_npz:
            data = build_npz(str(name), name, imb_factor, seed, own)
        elif name == "folder" or name in LISTED:
            data = BUILDERS[name](name, data_dir, imb_factor, seed, own)
        else:
            data = BUILDERS[name](name, data_dir, imb_factor, seed)
    except MissingFile as reason:
        if name not in SOURCES or train_list:
            raise
        raise ValueError(f"{reason}; {name} is had from {SOURCES[name]}") from reason
    except OSError as reason:
        raise ValueError(f"cannot read {reason.filename or data_dir}: {reason.strerror}") from reason
    if data.num_classes < 2:
        raise ValueError(f"{name} has one class alone, {data.class_names[0]}: a classifier needs two")
    return data


def write_lists(data, folder, data_dir=None):
    """Write the training and test images of a data set of image files as lists that `load` takes.

    folder: gets train_list.txt and test_list.txt (lines `relative/path label`), and train_list_classes.txt
    with the classes' names. data_dir: what the paths are relative to (None: the folder that all have in
    common). Returns train_list, test_list and data_dir for `load`. Raises ValueError.
    """
    if not isinstance(data.train, ImageFiles):
        raise ValueError(f"{data.name} has no image files that lists could name")
    paths = {part: list(map(os.fsdecode, getattr(data, part).paths)) for part in ("train", "test")}
    if data_dir is None:
        data_dir = os.path.commonpath([os.path.dirname(path) for some in paths.values() for path in some])

    os.makedirs(folder, exist_ok=True)
    classes = b"".join(os.fsencode(name) + b"\n" for name in data.class_names)
    Path(folder, "train_list_classes.txt").write_bytes(classes)
    for part, some in paths.items():
        names = [os.fsencode(os.path.relpath(path, data_dir)) for path in some]
        for name in names:
            if name != name.strip() or len(name.splitlines()) > 1 or b"\\" in name and b"/" not in name:
                raise ValueError(f"{os.fsdecode(name)!r} cannot stand in a list: rename it, without line "
                                 "breaks, backslashes and spaces at its ends")
        Path(folder, f"{part}_list.txt").write_bytes(b"".join(
            b"%s %d\n" % pair for pair in zip(names, getattr(data, part).targets.tolist())))
    return str(Path(folder, "train_list.txt")), str(Path(folder, "test_list.txt")), str(data_dir)


# ---------------------------------------------------------------- image files that cannot be read

def _look_at(paths, decode):
    """What is wrong with some image files, {path: a line}, and the summed histograms [3, 256] of the others,
    each image's pixels counting 1 in all. Without `decode` only see whether they are there."""
    wrong, histograms = {}, np.zeros((3, 256))
    for path in paths:
        name = os.fsdecode(path)
        if not os.path.exists(name):
            wrong[path] = f"no such file: {name}"
        elif decode:
            try:
                image = read_image(name)
                histograms += np.reshape(image.histogram(), (3, 256)) / (image.width * image.height)
            except ValueError as reason:
                wrong[path] = f"cannot decode {reason}"
    return wrong, histograms


def look_at(paths, workers=1, what="files", decode=True):
    """`_look_at` for all of `paths` (bytes), in `workers` threads (PIL's codecs run side by side), with a
    progress bar named `what`."""
    wrong, histograms = {}, np.zeros((3, 256))
    chunks = [paths[i:i + 64] for i in range(0, len(paths), 64)]
    with ThreadPoolExecutor(max(workers, 1)) as pool, \
            tqdm(total=len(paths), desc=what, unit="file", disable=None) as bar:
        for chunk, (bad, some) in zip(chunks, pool.map(lambda chunk: _look_at(chunk, decode), chunks)):
            wrong.update(bad)
            histograms += some
            bar.update(len(chunk))
    return wrong, histograms


def find_unreadable(paths, workers=1, cache=None, what="files"):
    """What is wrong with those image files that cannot be decoded: {path: a line}.

    paths: bytes [n]. workers: threads. cache: a file that remembers which files were readable, by path, size
    and time of change, so that a second call looks at new ones alone; of several processes one looks, while
    the others wait for what it finds. what: the progress bar's name.
    """
    with _alone(cache):
        readable, keys = _read_cache(cache), np.array([_file_key(path) for path in paths], np.uint64)
        wrong, _ = look_at(np.unique(paths[~np.isin(keys, readable)]).tolist(), workers, what)
        is_good = np.array([path not in wrong for path in paths.tolist()], bool)
        if cache:
            readable = np.union1d(readable, keys[is_good])
            atomic_write(cache, lambda file: np.save(file, readable))
    return wrong


def count_readable(name, data_dir="data", train_list=None, workers=1, cache=None):
    """`count_images` without those that cannot be decoded. workers, cache: as in `find_unreadable`."""
    if not train_list and name != "folder":
        return count_images(name)
    try:
        paths = np.array(list(map(os.fsencode, training_files(data_dir, train_list))))
    except (OSError, ValueError):
        return None
    wrong = find_unreadable(paths, workers, cache, "read train") if len(paths) else {}
    return sum(path not in wrong for path in paths.tolist())


@contextmanager
def _alone(cache):
    """Let the other processes wait that want to look at image files and remember them beside `cache`."""
    if not cache:
        yield
        return

    folder, opened = Path(cache).parent, None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        import fcntl
        opened = os.open(folder, os.O_RDONLY)
        fcntl.flock(opened, fcntl.LOCK_EX)
    except (ImportError, OSError) as reason:  # Windows; some network disks
        note(f"{folder} cannot be locked ({reason}): each process looks at all image files")
    try:
        yield
    finally:
        if opened is not None:
            os.close(opened)


def leave_out_unreadable(data, workers=1, cache=None):
    """A data set without the image files that cannot be decoded, so that class counts are those of what can.

    Prints each one and why. workers, cache: as in `find_unreadable`. Raises ValueError where nothing is left
    of a class or split.
    """
    splits, lines = {}, []
    for part in ("train", "val", "test"):
        split = splits[part] = getattr(data, part)
        if isinstance(split, ImageFiles):
            wrong = find_unreadable(split.paths, workers, cache, f"read {part}")
            is_good = [path not in wrong for path in split.paths.tolist()]
            splits[part] = split.subset(np.flatnonzero(is_good))
            lines += [f"{part}: {line}" for line in wrong.values()]
    if not lines:
        return data

    note(f"{len(lines)} unreadable image files are left out:\n" + "\n".join(lines))
    try:
        return data.with_splits(**splits)
    except ValueError as reason:
        raise ValueError(f"{reason}, without its unreadable files; the first is {lines[0]}") from reason


def _file_key(path):
    """A number that changes with a file; 0 where there is none."""
    try:
        found = os.stat(path)
    except OSError:
        return 0
    words = b"%s\0%d\0%d" % (os.path.abspath(path), found.st_size, found.st_mtime_ns)
    return int.from_bytes(hashlib.sha256(words).digest()[:8], "little")


def _read_cache(cache):
    if not cache or not os.path.exists(cache):
        return np.zeros(0, np.uint64)
    try:
        return np.load(cache, allow_pickle=False).astype(np.uint64)
    except (OSError, ValueError, EOFError) as reason:
        note(f"{cache} is damaged ({reason}): all image files are looked at again")
        return np.zeros(0, np.uint64)


# ---------------------------------------------------------------- python -m common.data

def facts(data):
    """What `PUBLISHED` holds, of this data set."""
    counts = data.class_counts
    return dict(classes=data.num_classes, train=len(data.train), val=len(data.val or ()), test=len(data.test),
                largest=int(counts.max()), smallest=int(counts.min()),
                groups=(int((counts > 100).sum()), int(((counts >= 20) & (counts <= 100)).sum()),
                        int((counts < 20).sum())),
                counts=hashlib.sha256(counts.astype("<i8").tobytes()).hexdigest()[:16])


def check(data, published=None, fast=False, workers=1):
    """Look at every file of a data set, compare its numbers with the published ones, and print what it has.

    published: a row of `PUBLISHED` or None. fast: do not decode the files. workers: threads that decode
    (PIL's codecs run side by side). Returns a list of what is wrong, a line each.
    """
    found, wrong = facts(data), []
    print("{name}: {classes} classes, {train} training images ({largest}..{smallest} a class), {val} val, "
          "{test} test; {groups[0]} many, {groups[1]} medium, {groups[2]} few"
          .format(name=data.name, **found), flush=True)
    single = [data.class_names[c] for c in np.flatnonzero(data.class_counts == 1)]
    if single:
        have = "class has" if len(single) == 1 else "classes have"
        print(f"note: {len(single)} {have} one training image alone: {', '.join(single[:5])}"
              + ", ..." * (len(single) > 5))
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
        bad, some = look_at(paths.tolist(), workers, part, not fast)
        wrong += [f"{part}: {line}" for line in bad.values()]
        histograms += some if part == "train" else 0
    decoded = isinstance(data.train, Images)
    if decoded or histograms.any():
        means, stds = channel_statistics(data.train.images) if decoded else moments(histograms)
        shown = [" ".join(f"{value:.3f}" for value in values)
                 for values in (means, stds, data.mean, data.std)]
        print("mean {} and standard deviation {} of the training images; the nets see them minus {}, over {}"
              .format(*shown))
        wrong += [f"train: channel {c} of all images has one value, {mean:.3f}: are these the pictures?"
                  for c, (mean, std) in enumerate(zip(means, stds)) if std == 1]
    return wrong


def main(argv=None):
    """The command. Returns its exit code: 0, 1 where something is wrong, 2 where there is no data set."""
    escape_unprintable()

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
    parser.add_argument("--test-fraction", type=float, help="of each class, where there is no test split")
    parser.add_argument("--skip-bad-images", action="store_true", help="count without what cannot be decoded")
    parser.add_argument("--fast", action="store_true", help="do not decode the files")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="threads that decode")
    args = parser.parse_args(argv)
    try:
        data = load(args.name, args.data_dir, args.imb_factor, args.subset_seed, train_list=args.train_list,
                    test_list=args.test_list, test_fraction=args.test_fraction)
        if args.skip_bad_images:
            data = leave_out_unreadable(data, args.workers)
    except (ValueError, ImportError) as reason:
        fail(reason)
    own = args.train_list or args.test_list or args.imb_factor is not None
    published = None if own else PUBLISHED.get(args.name)
    if published is None or "largest" not in published:
        print("note: there are no published images per class to compare with")
    wrong = check(data, published, args.fast, args.workers)
    if wrong:
        things = "thing is" if len(wrong) == 1 else "things are"
        print(f"{len(wrong)} {things} wrong" + (", the first ten:" if len(wrong) > 10 else ":"))
        print("\n".join(wrong[:10]))
        return 1
    print("every file is there" + (" (not decoded)" if args.fast else " and decodes"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
