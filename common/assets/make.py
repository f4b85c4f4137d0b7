"""Rebuild what is embedded:  python -m common.assets.make [--pretrain [--labels]] [--source DIR] [--out FILE]

fashion_lt.npz is cut from Fashion-MNIST (Zalando Research, MIT licence, see NOTICE): a long-tailed training
set at imbalance factor 100 (1000 images in the head class), 100 validation images a class from the rest of
the training set, and 200 test images a class. The same files give the same arrays.

fashion_teacher.pt (--pretrain) is CANDLE's off-the-shelf teacher for it: a ResNet-14 that learnt from 2000
images a class of what is left of Fashion-MNIST's training set, in no split of fashion_lt.npz. It never saw a
label: it was trained to tell by how many quarter turns an image was rotated (Gidaris et al., ICLR 2018). So
it stands for weights that are not long-tailed and not made for the task, as ImageNet's are, but it knows much
less than they do. The same recipe gives the same accuracy within a point. --images FILE.npz pre-trains on the
training images of another set instead; --labels learns the labels instead of the turns, for a teacher that
knows the task's objects as ImageNet's weights know those of most data sets.

DIR holds the four original *-ubyte.gz files (Debian's package dataset-fashion-mnist has them in
/usr/share/datasets/fashion-mnist); without it torchvision downloads them.
"""
import argparse
import gzip
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from common import ranks
from common.data import FASHION_ORDER, load, long_tail_counts, long_tail_indices
from common.augment import normalise, random_crop_flip
from common.loader import CROP_PADDING
from common.resnet import CIFAR_DEPTHS, build_backbone

CLASS_NAMES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag",
               "Ankle boot")
FILES = {part: (f"{prefix}-images-idx3-ubyte.gz", f"{prefix}-labels-idx1-ubyte.gz")
         for part, prefix in (("train", "train"), ("test", "t10k"))}
TEACHER_IMAGES = 2000  # a class


def read_fashion_mnist(source, part):
    """uint8 images [n, 28, 28] and labels [n] of one part of Fashion-MNIST (idx files: 16 and 8 header
    bytes)."""
    images, labels = (gzip.decompress((Path(source) / name).read_bytes()) for name in FILES[part])
    return (np.frombuffer(images, np.uint8, offset=16).reshape(-1, 28, 28),
            np.frombuffer(labels, np.uint8, offset=8))


def split_fashion_mnist(y):
    """Indices of the embedded training images, of the validation images, and of the teacher's, from the
    labels of Fashion-MNIST's training set. No image is in two of them."""
    counts = np.zeros(10, np.int64)
    counts[list(FASHION_ORDER)] = long_tail_counts(10, 1000, 100)
    # One draw a class: its first images train, the 100 behind them validate
    drawn = np.split(long_tail_indices(y, counts + 100, seed=0), np.cumsum(counts + 100)[:-1])
    rest = np.setdiff1d(np.arange(len(y)), np.concatenate(drawn))
    available = np.bincount(y[rest], minlength=10)
    teacher = rest[long_tail_indices(y[rest], np.minimum(available, TEACHER_IMAGES), seed=0)]
    return (np.concatenate([indices[:count] for indices, count in zip(drawn, counts)]),
            np.concatenate([indices[count:] for indices, count in zip(drawn, counts)]), teacher)


def fashion_lt(source):
    """The arrays of fashion_lt.npz, from the four files in `source`."""
    x, y = read_fashion_mnist(source, "train")
    x_test, y_test = read_fashion_mnist(source, "test")
    train, val, _ = split_fashion_mnist(y)
    test = long_tail_indices(y_test, [200] * 10, seed=0)
    return {"x_train": x[train], "y_train": y[train], "x_val": x[val], "y_val": y[val],
            "x_test": x_test[test], "y_test": y_test[test], "class_names": np.array(CLASS_NAMES)}


def turned(images):
    """The four quarter turns of images [N, 3, H, H], one behind the other [4 N, 3, H, H], and which turn each
    is [4 N]."""
    turns = torch.arange(4, device=images.device).repeat_interleave(len(images))
    return torch.cat([images.rot90(k, (2, 3)) for k in range(4)]).contiguous(
        memory_format=torch.channels_last), turns


def pretrain(images, test_images, mean, std, arch="resnet14", epochs=5, batch_size=64, lr=0.1, seed=0,
             targets=None, test_targets=None):
    """Train a CIFAR ResNet to tell quarter turns apart, or the classes when there are targets.

    images, test_images: uint8 [n, H, H, 3]. mean, std: per channel, that the net's images are normalised by.
    batch_size: images, each of which a step sees in all four turns. targets, test_targets: int64 [n] arrays,
    the labels to learn from upright images instead. Returns (the backbone, percent of test_images' turns, or
    labels, that it tells).
    """
    torch.manual_seed(ranks.derive_seed(seed, "pretrain"))
    device = ranks.choose_device()
    autocast = ranks.autocast(device, True)
    outputs = 4
    if targets is not None:
        outputs = int(targets.max()) + 1
        targets, test_targets = (torch.from_numpy(t).to(device) for t in (targets, test_targets))
    net = nn.Sequential(build_backbone(arch), nn.Linear(64, outputs))
    net = net.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(net.parameters(), lr, momentum=0.9, weight_decay=5e-4)
    side, steps = images.shape[1], len(images) // batch_size
    padded = F.pad(torch.from_numpy(images).to(device), (0, 0, *[CROP_PADDING] * 4))
    test_images = torch.from_numpy(test_images).permute(0, 3, 1, 2).to(device)
    mean, std = torch.tensor(mean, device=device), torch.tensor(std, device=device)
    for epoch in range(epochs):
        generator = ranks.generator(seed, "pretrain", epoch)
        order = torch.randperm(len(images), generator=generator)
        uniforms = torch.rand(len(images), 3, generator=generator).to(device)
        for step in tqdm(range(steps), f"epoch {epoch + 1} of {epochs}", leave=False):
            chosen = order[step * batch_size:(step + 1) * batch_size].to(device)
            crops = random_crop_flip(padded, chosen, uniforms[chosen], side)
            batch = normalise(crops, mean, std)
            batch, answers = turned(batch) if targets is None else (batch, targets[chosen])
            with autocast():
                loss = F.cross_entropy(net(batch), answers)
            optimizer.zero_grad()
            loss.backward()
            progress = (epoch + step / steps) / epochs
            optimizer.param_groups[0]["lr"] = lr * 0.5 * (1 + math.cos(math.pi * progress))
            optimizer.step()
        print(f"epoch {epoch + 1} of {epochs}: loss of the last step {loss.item():.3f}", flush=True)
    net.eval()
    correct = total = 0
    with torch.no_grad(), autocast():
        for part in torch.arange(len(test_images), device=device).split(256):
            batch = normalise(test_images[part], mean, std)
            batch, answers = turned(batch) if targets is None else (batch, test_targets[part])
            correct += (net(batch).argmax(1) == answers).sum().item()
            total += len(answers)
    return net[0].cpu(), 100 * correct / total


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.error = ranks.fail
    parser.add_argument("--source", help="folder of the four *-ubyte.gz files; downloads them if left out")
    parser.add_argument("--out", help="file to write (the embedded one)")
    parser.add_argument("--pretrain", action="store_true", help="the teacher instead of the images")
    parser.add_argument("--labels", action="store_true", help="pre-train it on labels; needs --out")
    parser.add_argument("--images", metavar="FILE.npz", help="pre-train on this set's training images")
    parser.add_argument("--arch", choices=CIFAR_DEPTHS, default="resnet14", help="of the teacher")
    parser.add_argument("--epochs", type=int, default=5, help="of pre-training")
    args = parser.parse_args(argv)
    if args.labels and not (args.pretrain and args.out):
        parser.error("--labels is for --pretrain, and --out: the embedded teacher has seen none")
    source = args.source
    if source is None and not args.images:
        from torchvision.datasets import FashionMNIST
        FashionMNIST("data", download=True)
        source = "data/FashionMNIST/raw"
    embedded = "fashion_teacher.pt" if args.pretrain else "fashion_lt.npz"
    out = Path(args.out or Path(__file__).parent / embedded)
    if args.pretrain:
        data = load(args.images or "fashion_lt")  # its mean and std are those that candle.py normalises by
        test = data.val or data.test
        images, targets = data.train.images, data.train.targets
        if not args.images:
            x, y = read_fashion_mnist(source, "train")
            chosen = split_fashion_mnist(y)[2]
            images = np.pad(x[chosen], ((0, 0), (2, 2), (2, 2)))  # 28 -> 32 pixels
            images, targets = np.repeat(images[..., None], 3, axis=3), y[chosen].astype(np.int64)
        labels = {"targets": targets, "test_targets": test.targets} if args.labels else {}
        net, accuracy = pretrain(images, test.images, data.mean, data.std, args.arch, args.epochs, **labels)
        # the difference between half and single precision is far below that between two seeds
        state = {name: value.half() if value.is_floating_point() else value
                 for name, value in net.state_dict().items()}
        told = "label" if args.labels else "rotation"
        torch.save({"arch": args.arch, "state_dict": state, f"{told}_accuracy": accuracy}, out)
        what = f"{len(test.images)} labels" if args.labels else f"{4 * len(test.images)} quarter turns"
        print(f"tells {accuracy:.1f}% of {what} of images it never saw")
    else:
        np.savez_compressed(out, **fashion_lt(source))
    print(f"wrote {out}: {out.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
