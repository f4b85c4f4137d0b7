"""Classes and probabilities of image files, from any net that one of the four scripts saved:

    python -m common.predict runs/cbd_fashion_lt_seed0/student.pt photo.jpg more/*.png [--top 3] [--csv]

Images are prepared as those of the test split were; packed 1-bit nets (candle.py --export) are read, too.
"""
import argparse
import csv
import importlib
import sys
from types import SimpleNamespace

import torch

from common.augment import normalise
from common.files import escape_unprintable, read_image
from common.flags import count, text
from common.folder import load_checkpoint
from common.loader import Augmentation, file_transform
from common.ranks import bad_input, fail

METHODS = ("cbd", "async_lt", "livt", "candle")
BATCH = 64


def load_any(path):
    """The net in a checkpoint, in eval mode, and what was saved with it. Raises ValueError.

    The script that saved it rebuilds it, and is found by its name alone: no room imports a method.
    """
    saved = load_checkpoint(path)
    method = saved.get("method") if isinstance(saved, dict) else None
    if method not in METHODS:
        raise ValueError(f"{path} is not a net that one of {', '.join(METHODS)} saved")
    return importlib.import_module(method).load_model(path)


@torch.no_grad()
def predict_files(model, saved, paths):
    """Softmax of the net's logits, [n, C], for image files; the columns are saved["class_names"]. Raises
    ValueError where a file cannot be decoded."""
    as_tested = file_transform(SimpleNamespace(image_size=saved["image_size"]), Augmentation("none"))
    probabilities = []
    for start in range(0, len(paths), BATCH):
        images = torch.stack([as_tested(read_image(path)) for path in paths[start:start + BATCH]])
        images = images.permute(0, 3, 1, 2)  # [N, 3, H, W]
        logits, _ = model(normalise(images, saved["mean"], saved["std"]))
        probabilities.append(logits.float().softmax(1))
    return torch.cat(probabilities)


def main(argv=None):
    parser = argparse.ArgumentParser("python -m common.predict", description=__doc__.split(":")[0] + ".")
    parser.error = fail
    parser.add_argument("checkpoint", type=text, help="student.pt, model.pt, ... of a run's folder")
    parser.add_argument("files", type=text, nargs="+", help="image files")
    parser.add_argument("--top", type=count, default=1, help="most probable classes to show of each file")
    parser.add_argument("--csv", action="store_true", help="file,class,probability; one line a class")
    args = parser.parse_args(argv)

    with bad_input():
        model, saved = load_any(args.checkpoint)
        best = predict_files(model, saved, args.files).topk(min(args.top, len(saved["class_names"])))

    escape_unprintable()
    writer = csv.writer(sys.stdout)
    if args.csv:
        writer.writerow(["file", "class", "probability"])
    for path, probabilities, classes in zip(args.files, best.values.tolist(), best.indices.tolist()):
        pairs = [(saved["class_names"][c], p) for c, p in zip(classes, probabilities)]
        if args.csv:
            writer.writerows([path, name, f"{p:.4f}"] for name, p in pairs)
        else:
            print(f"{path}: " + ", ".join(f"{name} {100 * p:.1f}%" for name, p in pairs))


if __name__ == "__main__":
    main()
