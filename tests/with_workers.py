"""A process whose loader has worker processes: `python tests/with_workers.py FOLDER WORKERS LINE` prints
their ids and then runs the line of Python, which may use `batches`."""
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from common.loader import CHUNK, Augmentation, Cut, make_loader
from common.longtail import ImageFiles
from common.ranks import bad_input
from common.workers import LostWorker


def start(folder, workers, batches=100):
    """An iterator over so many batches of FOLDER/*.png, whose first one is taken, and the workers' ids."""
    paths = np.array([bytes(path) for path in sorted(Path(folder).glob("*.png"))])
    data = SimpleNamespace(mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2), image_size=64, color_jitter=0)
    split = ImageFiles(paths, np.zeros(len(paths), np.int64))

    loader = make_loader(split, data, Cut(CHUNK), "cpu", Augmentation("standard"), workers)
    iterator = loader.batches(np.zeros(batches * CHUNK, np.int64))
    next(iterator)
    return iterator, [process.pid for process in loader.loader._iterator._workers]


if __name__ == "__main__":
    folder, workers, line = sys.argv[1:]
    with bad_input(LostWorker):
        batches, pids = start(folder, int(workers))
        print(*pids, flush=True)
        exec(line)
