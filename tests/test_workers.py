"""The room common/workers.py: worker processes signalled, stopped, killed, orphaned, out of memory."""
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))

from common.loader import CHUNK, Augmentation, Cut, make_loader
from common.longtail import ImageFiles
from common.ranks import bad_input
from common.workers import LostWorker

linux = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc, or needs what Linux alone has")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with one image."""
    folder = tmp_path_factory.mktemp("images")
    Image.fromarray(np.full((64, 64, 3), 60, np.uint8)).save(folder / "0.png")
    return folder


def start(folder, workers, batches=100, epochs=1):
    """An iterator over epochs of so many batches of FOLDER/0.png, whose first one is taken, and the workers'
    ids."""
    data = SimpleNamespace(mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2), image_size=64, color_jitter=0)
    split = ImageFiles(np.array([bytes(Path(folder, "0.png"))]), np.zeros(1, np.int64))
    loader = make_loader(split, data, Cut(CHUNK), "cpu", Augmentation("standard"), workers)
    indices = np.zeros(batches * CHUNK, np.int64)
    iterator = (batch for epoch in range(epochs) for batch in loader.batches(indices, epoch))
    next(iterator)
    return iterator, [process.pid for process in loader.loader._iterator._workers]


def script(folder, line):
    """A process with two workers that prints their ids, and then does what the line says, which may use
    `batches`."""
    return [sys.executable, __file__, folder, line]


def is_gone(pid, seconds=5):
    """Whether a process has ended, or does so within some seconds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.05)
    return False


@linux
def test_signals_are_the_parent_s_business_however_long_its_step_takes(folder):
    iterator, (pid,) = start(folder, 1)
    for number in (signal.SIGTERM, signal.SIGINT):
        os.kill(pid, number)
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    both = 1 << signal.SIGTERM - 1 | 1 << signal.SIGINT - 1
    assert int(status["SigIgn"], 16) & both == both and not int(status["SigCgt"], 16) & both
    assert not int(status["SigCgt"], 16) & 1 << signal.SIGALRM - 1  # nor does it end some time later
    assert int(status["SigBlk"], 16) & both == both  # from before its first line of Python
    assert len(list(iterator)) == 99
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    assert not mask & {signal.SIGTERM, signal.SIGINT}  # the parent hears them again


@linux
def test_workers_die_with_their_parent_even_stopped_ones(folder):
    with subprocess.Popen(script(folder, "time.sleep(60)"), stdout=subprocess.PIPE, text=True) as parent:
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        os.kill(pids[0], signal.SIGSTOP)
        parent.kill()
    assert len(pids) == 2 and all(is_gone(pid) for pid in pids)


@linux
def test_a_stopped_worker_does_not_keep_a_process_from_ending(folder):
    with subprocess.Popen(script(folder, "sys.stdin.readline()"), stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as parent:
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        os.kill(pids[1], signal.SIGSTOP)
        _, errors = parent.communicate("end\n", timeout=60)  # it would wait for ever
    assert (parent.returncode, errors) == (0, "")
    assert all(is_gone(pid) for pid in pids)


@pytest.mark.parametrize("batches, epochs", [(100, 1), (1, 2)])
def test_a_stopped_worker_is_woken_when_its_images_are_waited_for(batches, epochs, folder, monkeypatch):
    monkeypatch.setattr("common.loader.PATIENCE", 0.5)
    iterator, (pid,) = start(folder, 1, batches, epochs)
    os.kill(pid, signal.SIGSTOP)
    assert len(list(iterator)) == batches * epochs - 1


def test_a_killed_worker_is_one_line_where_its_images_are_waited_for(folder, monkeypatch):
    monkeypatch.setattr("common.loader.PATIENCE", 0.5)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # a plain DataLoader of another test leaves torch's own
    iterator, (pid,) = start(folder, 1)
    os.kill(pid, signal.SIGKILL)
    time.sleep(0.5)
    torch.ones(3).sum()  # a training step does not hear of it
    with pytest.raises(LostWorker, match="killed.*--workers") as caught:
        list(iterator)
    assert "\n" not in str(caught.value) and isinstance(caught.value, ValueError) and caught.value.one_rank


def test_what_a_worker_s_own_mistake_raises_keeps_its_traceback(folder, monkeypatch):
    monkeypatch.setattr("common.loader.read_image", lambda path: "no image")
    with pytest.raises(Exception, match="Original Traceback") as caught:
        start(folder, 1)
    assert not isinstance(caught.value, LostWorker)


@linux
def test_a_full_shared_memory_is_one_line_that_says_what_to_do(folder):
    own = ["unshare", "-rm", "sh", "-c", "mount -t tmpfs -o size=256k none /dev/shm && exec \"$@\"", "sh"]
    if subprocess.run([*own, "true"], capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount a /dev/shm of its own")
    done = subprocess.run([*own, *script(folder, "[time.sleep(.02) for batch in batches]")],
                          capture_output=True, text=True, timeout=120)
    lines = done.stderr.splitlines()
    assert done.returncode == 2 and len(lines) == 1, done.stderr
    assert lines[0].startswith("error: the shared memory, /dev/shm, is full") and "--shm-size" in lines[0]


if __name__ == "__main__":
    with bad_input(LostWorker):
        batches, pids = start(sys.argv[1], 2)
        print(*pids, flush=True)
        exec(sys.argv[2])
