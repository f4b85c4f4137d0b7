"""Small data sets, a tiny run of each script, processes that start warm, and comparing what runs leave."""
import atexit
import ctypes
import importlib
import json
import multiprocessing
import os
import socket
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

from common.augment import normalise
from common.data import load
from common.run import Run

ROOT = Path(__file__).parent.parent
COUNTS = (8, 60, 3, 30, 12)  # not in the order of the ids
COLOURS = ((200, 60, 60), (60, 200, 60), (60, 60, 200), (200, 200, 60), (60, 200, 200))


def tiny_npz(path, counts=COUNTS, size=8, test=6, **more):
    """Images in the colour of their class, with noise, their own mirror images; ids in a random order. more:
    other arrays."""
    generator = np.random.default_rng(0)
    arrays = {}
    for part, sizes in (("train", counts), ("test", [test] * len(counts))):
        targets = generator.permutation(np.repeat(np.arange(len(counts)), sizes))
        halves = np.array(COLOURS)[targets % 5][:, None, None]
        halves = halves + generator.integers(-50, 51, (len(targets), size, size // 2, 3))
        images = np.concatenate([halves, halves[:, :, ::-1]], 2)
        arrays |= {f"x_{part}": images.astype(np.uint8), f"y_{part}": targets}
    np.savez(path, **arrays, **more)
    return str(path)


def noise_npz(folder, num_images=37, num_test=11, name="images.npz", turn=0, **more):
    """Images of three classes that nothing can be learnt from, so that every rounding shows. turn: added to
    the ids, which begin again at 0. more: other arrays."""
    generator = np.random.default_rng(0)
    targets = np.concatenate([[0, 1, 2], generator.integers(0, 3, num_images - 3)])
    images, targets = generator.integers(0, 256, (num_images, 8, 8, 3), dtype=np.uint8), (targets + turn) % 3
    np.savez(folder / name, x_train=images, y_train=targets, x_test=images[:num_test],
             y_test=targets[:num_test], **more)


def image_folder(folder, side=16, counts=(9, 5, 4), test=3):
    """PNG files in the colour of their class: FOLDER/train/CLASS/00.png and FOLDER/test/CLASS/00.png."""
    from PIL import Image
    generator = np.random.default_rng(0)
    for part, sizes in (("train", counts), ("test", [test] * len(counts))):
        for c, size in enumerate(sizes):
            (folder / part / "abcde"[c]).mkdir(parents=True)
            for i in range(size):
                image = np.array(COLOURS[c]) + generator.integers(-50, 51, (side, side, 3))
                Image.fromarray(image.astype(np.uint8)).save(folder / part / "abcde"[c] / f"{i:02}.png")


def picture(path, size=(20, 20), **options):
    """An image file of one colour but for one pixel, its folder made. Returns its path."""
    from PIL import Image
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGB", size, (200, 100, 50))
    image.putpixel((0, 0), (0, 0, 0))
    image.save(path, **options)
    return path


def tree(root, sizes, parts=("train", "test"), size=(20, 20)):
    """PNG files ROOT/PART/CLASS/0.png, ...: sizes[CLASS] to train on, two in any other part. Returns ROOT."""
    for part in parts:
        for name, count in sizes.items():
            for i in range(count if part == "train" else 2):
                picture(root / part / name / f"{i}.png", size)
    return root


def names_of(split, root):
    """The paths of a split's image files, from ROOT on."""
    return [os.path.relpath(os.fsdecode(path), root) for path in split.paths]


def as_seen(npz, part="train"):
    """Images as a net sees them, [n, 3, H, W], without augmentation; their targets [n]."""
    data = load(str(npz))
    split = getattr(data, part)
    images = torch.from_numpy(split.images).permute(0, 3, 1, 2)
    return normalise(images, data.mean, data.std), torch.from_numpy(split.targets)


class Row(NamedTuple):
    """A script for the tests of what all four share. flags: all its stages in a second on `noise_npz`; nets:
    the files that it leaves, each with its stage in result.json; more: other stages there; takes: the flags
    that take a net, each with one of `nets`. The main result is the last net's."""
    flags: list
    nets: dict
    more: list
    takes: dict


ROWS = {
    "cbd": Row(
        ["--teachers", "2", "--arch", "resnet14"],
        {"teacher_1.pt": "teacher 1, standard", "teacher_2.pt": "teacher 2, augmented",
         "student.pt": "cbd, K=2"}, ["teacher ensemble, K=2"],
        {"--evaluate": "student.pt", "--teacher-checkpoints": "teacher_1.pt"}),
    "async_lt": Row(
        ["--arch", "resnet14", "--phase-two-epochs", "2", "--phase-one-classes", "2",
         "--memory-per-class", "3"],
        {"plain.pt": "plain", "phase_one.pt": "phase one", "model.pt": "two phases"}, [],
        {"--evaluate": "model.pt", "--phase-one-checkpoint": "phase_one.pt"}),
    "livt": Row(
        ["--width", "16", "--depth", "2", "--heads", "2", "--patch-size", "4", "--image-size", "8",
         "--decoder-width", "16", "--decoder-depth", "1", "--decoder-heads", "2", "--mgp-epochs", "2",
         "--mgp-batch-size", "16", "--augment", "strong"],  # with all that draws numbers
        {"mgp.pt": "mgp", "model_bce.pt": "bce", "model.pt": "balanced-bce"},
        ["bce, Bayes decoding", "balanced-bce, Bayes decoding"],
        {"--evaluate": "model.pt", "--mgp-checkpoint": "mgp.pt"}),
    "candle": Row(
        ["--arch", "reactnet_18", "--student-width", "0.0625", "--student-resolution", "16", "--resolutions",
         "8", "16", "--teacher", "resnet14", "--teacher-weights", "embedded", "--calibration-epochs", "2",
         "--smoothing", "0.1", "0"],
        {"baseline.pt": "baseline", "teacher.pt": "teacher, 8 16", "student.pt": "candle"}, [],
        {"--evaluate": "student.pt", "--export": "student.pt"}),
}
METHODS = list(ROWS)


def run(method, folder, *flags, name="run"):
    """A tiny run in this process, on FOLDER/images.npz, that writes to FOLDER/NAME. Returns its result."""
    if not (folder / "images.npz").exists():
        noise_npz(folder)
    module = importlib.import_module(method)
    return module.main(module.parse_args([*tiny_flags(method, folder), "--out", str(folder / name), *flags]))


def prepared(method, folder, *flags):
    """A tiny run that has no folder yet, so that what a stage is made of can be called by itself."""
    args = [*tiny_flags(method, folder), "--no-amp", "--out", str(folder / "prepared"), *flags]
    if not (folder / "images.npz").exists():
        noise_npz(folder)
    return Run(method, importlib.import_module(method).parse_args(args))


def tiny_flags(method, folder=Path()):
    return ["--dataset", str(folder / "images.npz"), *ROWS[method].flags, "--epochs", "2", "--batch-size",
            "16", "--device", "cpu", "--evaluate-every", "1"]


def run_in_parts(method, folder, *flags, name="parts"):
    """The same, cut off behind every single step. Returns the result, and how often it was cut off."""
    for cuts in range(200):
        try:
            return run(method, folder, *flags, "--time-limit", "0", "--resume", name=name), cuts
        except SystemExit as stop:
            assert stop.code == 0


def refused(capsys, method, folder, *flags, name="refused"):
    """The one error line of a run that must write nothing."""
    before = (folder / name).exists()
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run(method, folder, *flags, name=name)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1, error
    assert (folder / name).exists() == before
    return error


STARTED = []  # conftest.py ends what a failed test has left
os.environ["PYTHONPATH"] = str(ROOT)  # for the server of `start`
FORK = multiprocessing.get_context("forkserver")
FORK.set_forkserver_preload(["__main__", "tests.tiny", *METHODS])


def start(method, folder, *flags, prepare=None, out="out", err="err", environment=(), group=False):
    """A script with tiny flags in FOLDER, in a process of its own whose imports are done: a fork of a process
    that has done nothing else. prepare(): called in it first. out, err: files for what it prints. group: a
    process group of its own. Returns a multiprocessing.Process."""
    if not (folder / "images.npz").exists():
        noise_npz(folder)
    process = FORK.Process(target=_work, args=(method, folder, [*tiny_flags(method), *flags], prepare,
                                               folder / out, folder / err, dict(environment), group))
    STARTED.append(process)
    process.start()
    return process


def _work(method, folder, flags, prepare, out, err, environment, group):
    os.chdir(folder)
    os.environ.update(environment)
    if group:
        os.setsid()
    for number, name, path in ((1, "stdout", out), (2, "stderr", err)):
        if path.name == "closed":  # as `>&-` leaves it
            os.close(number)
            setattr(sys, name, None)
        else:
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666), number)
            setattr(sys, name, os.fdopen(number, "w", closefd=False))
    torch.set_num_threads(1)
    if prepare:
        prepare()
    module, sys.argv = importlib.import_module(method), [f"{method}.py", *flags]
    try:
        module.main(module.parse_args(flags))
    finally:
        atexit._run_exitfuncs()  # as at a script's end; multiprocessing leaves them out


def start_ranks(method, folder, *flags, **how):
    """The same on two ranks, as torchrun would start them. Returns the processes."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    shared = dict(MASTER_ADDR="localhost", MASTER_PORT=str(port), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    return [start(method, folder, *flags, **how, environment={**shared, "RANK": rank, "LOCAL_RANK": rank})
            for rank in "01"]


def ended(process, seconds=120):
    """The exit code of a process, negative where a signal ended it, after its end."""
    process.join(seconds)
    assert process.exitcode is not None, "it did not end"
    return process.exitcode


def wait_for(condition, seconds=120):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end
        time.sleep(0.005)


def like_any_user():
    """Let root's right to read and write everything go, for this process and for good (Linux)."""
    if sys.platform == "linux":
        version, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
        assert ctypes.CDLL(None).capset(version, none) == 0


def without_batch_norm():
    """Only batch norm's affine part is left, so that parts of a batch must give one process's numbers."""
    torch.nn.BatchNorm2d.forward = lambda self, x: x * self.weight.view(-1, 1, 1) + self.bias.view(-1, 1, 1)


def weights(path):
    return torch.load(path, weights_only=True)["state_dict"]


def same_weights(a, b):
    a, b = weights(a), weights(b)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def result_of(folder):
    return json.loads((folder / "result.json").read_text())


def log_rows(folder):
    """The lines of log.jsonl behind the first one."""
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()[1:]]


def without_times(value):
    """A result or a log line without times and without what may differ between two runs of one kind."""
    if isinstance(value, dict):
        return {key: without_times(item) for key, item in value.items()
                if key not in ("seconds", "seconds_per_epoch", "images_per_second", "peak_memory_mb", "out",
                               "dataset", "resume", "time_limit", "argv")}
    return [without_times(item) for item in value] if isinstance(value, list) else value


def assert_same_run(a, b):
    """Two folders hold the same files, nets, log and result, bit for bit."""
    names = sorted(path.name for path in a.iterdir())
    assert names == sorted(path.name for path in b.iterdir())
    assert "result.json" in names and ".lock" not in names and "previous.pt" not in names
    for name in names:
        if name.endswith(".pt") and name != "last.pt":
            assert same_weights(a / name, b / name), name
    assert without_times(log_rows(a)) == without_times(log_rows(b))
    assert without_times(result_of(a)) == without_times(result_of(b))
