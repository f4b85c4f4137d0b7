"""Small data sets, and comparing what was saved, errors, for the tests of the scripts."""
import numpy as np
import pytest
import torch

COUNTS = (8, 60, 3, 30, 12)  # not in the order of the ids
COLOURS = ((200, 60, 60), (60, 200, 60), (60, 60, 200), (200, 200, 60), (60, 200, 200))


def tiny_npz(path, counts=COUNTS, size=8, test=6):
    """Images in the colour of their class, with noise; ids in a random order."""
    generator = np.random.default_rng(0)
    arrays = {}
    for part, sizes in (("train", counts), ("test", [test] * len(counts))):
        targets = generator.permutation(np.repeat(np.arange(len(counts)), sizes))
        images = np.array(COLOURS)[targets % 5][:, None, None]
        images = images + generator.integers(-50, 51, (len(targets), size, size, 3))
        arrays |= {f"x_{part}": images.astype(np.uint8), f"y_{part}": targets}
    np.savez(path, **arrays)
    return str(path)


def weights(path):
    return torch.load(path, weights_only=True)["state_dict"]


def same_weights(a, b):
    a, b = weights(a), weights(b)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def one_error(run, capsys, folder, *flags):
    """The one error line of a run that must write nothing. run(folder, *flags, name=...): starts it."""
    with pytest.raises(SystemExit) as stop:
        run(folder, *flags, name="refused")
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1, error
    assert not (folder / "refused").exists()
    return error
