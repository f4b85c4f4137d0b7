"""Tests import the scripts from the repository's root, take one core, and leave no process behind."""
import functools
import os
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """whole(method): the folder of a tiny run that nothing has cut off, beside images.npz; how many seconds
    it took. Nothing in it may be changed."""
    from tests.tiny import run

    @functools.cache
    def of(method):
        folder, started = tmp_path_factory.mktemp(method), time.time()
        run(method, folder)
        return folder / "run", time.time() - started
    return of


@pytest.fixture
def still(tmp_path, monkeypatch):
    """A folder with an images.npz that training shows as it is: crops have no padding, flips change nothing.
    With --lr 0 a log so has the losses of the nets that are saved, on images that are known."""
    from tests.tiny import tiny_npz
    monkeypatch.setattr("common.loader.CROP_PADDING", 0)
    tiny_npz(tmp_path / "images.npz")
    return tmp_path


@pytest.fixture(autouse=True)
def end_processes():
    """End what a failed test has started and left running."""
    yield
    from tests.tiny import STARTED
    for process in STARTED:
        process.kill()
        process.join()
    STARTED.clear()
