"""Tests import the scripts from the repository's root, take one core, and leave no process behind."""
import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True)
def end_processes():
    """End what a failed test has started and left running."""
    yield
    from tests.tiny import STARTED
    for process in STARTED:
        process.kill()
        process.join()
    STARTED.clear()
