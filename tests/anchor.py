"""The baseline that everyone has: plain cross-entropy on CIFAR-100-LT by LDAM-DRW's recipe, to the letter.

    python -m tests.anchor --dataset data/cifar100_if10.npz --imb-factor 100 --out runs/anchor_seed0 --resume

Cao et al., NeurIPS 2019 (the LDAM paper), print 38.3 for it at factor 100. Data, net, crops and scores are
those of the four scripts: a number near it shows that they are everyone's. The recipe is cifar_train.py's of
kaidic/LDAM-DRW@2536330 with --loss_type CE --train_rule None. Departures: the last epoch's scores (it prints
the best epoch's on the test images, too); bf16 products in training, where the device has them (--no-amp:
float32); the draw of the subset, where an .npz does not keep CIFAR's own order.
"""
import argparse
import json
import sys
import time
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import trange

from common.data import load
from common.evaluate import scores, table
from common.folder import atomic_write, device_name, git_commit, versions
from common.loader import Augmentation, Cut, every_image, make_loader
from common.ranks import autocast, bad_input, choose_device, derive_seed, generator
from common.resnet import CifarResNet


def parse_args(argv=None):
    parser = argparse.ArgumentParser("python -m tests.anchor", description=__doc__.split("\n")[0])
    add, boolean = parser.add_argument, argparse.BooleanOptionalAction
    add("--dataset", default="cifar100_lt", help="name, or FILE.npz")
    add("--imb-factor", type=float, help="largest class / smallest class, at least 1")
    add("--epochs", type=int, default=200, help="where the run ends; the schedule stays that of 200")
    add("--seed", type=int, default=0, help="initialisation, sampling, augmentation")
    add("--amp", action=boolean, default=True, help="bf16 where the device computes it")
    add("--out", required=True, metavar="FOLDER", help="for log.jsonl, last.pt, result.json")
    add("--resume", action=boolean, default=False, help="continue what is in --out, or start")
    return parser.parse_args(argv)


def step_lr(epoch):
    """The learning rate of a whole epoch, counted from 1: linear warm-up over 5, then two steps of .01."""
    return 0.1 * epoch / 5 if epoch <= 5 else 0.1 * (1 if epoch <= 160 else 0.01 if epoch <= 180 else 0.0001)


def build_net(num_classes):
    """ResNet-32, shortcuts without parameters, and a linear classifier with bias; weights Kaiming normal."""
    classifier = nn.Linear(64, num_classes)
    nn.init.kaiming_normal_(classifier.weight)
    return nn.Sequential(CifarResNet(32), classifier)


def train_epoch(net, optimizer, batches, cast):
    """One pass, the last and smaller batch included. Returns the mean loss of its images."""
    net.train()
    total, count = 0.0, 0
    for images, targets, *_ in batches:
        with cast():
            loss = F.cross_entropy(net(images), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total, count = total + len(images) * loss.detach(), count + len(images)
    return (total / count).item()


@torch.no_grad()
def evaluate(net, loader, class_counts):
    """Scores over all of the loader's images, in float32: logits rounded to bf16 would tie."""
    net.eval()
    outputs = [(net(images), targets) for images, targets, *_ in every_image(loader)]
    return scores(*map(torch.cat, zip(*outputs)), class_counts)


def main(args):
    if args.epochs < 1:
        raise ValueError(f"--epochs must be at least 1, got {args.epochs}")
    device, last = choose_device(), Path(args.out, "last.pt")
    data = load(args.dataset, imb_factor=args.imb_factor)
    data.mean, data.std = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
    augmentation = Augmentation("standard", derive_seed(args.seed, "augmentation"))  # padded crop, flip
    train_loader = make_loader(data.train, data, Cut(128), device, augmentation)
    test_loader = make_loader(data.test, data, Cut(256), device)
    torch.manual_seed(derive_seed(args.seed, "initialisation"))
    net = build_net(data.num_classes).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9, weight_decay=2e-4)
    cast, seconds = autocast(device, args.amp), 0.0  # of training, evaluation not among them
    settings = {name: getattr(args, name) for name in ("dataset", "imb_factor", "epochs", "seed", "amp")}
    log = [{"argv": sys.argv, "args": settings, "versions": versions(), "device": device_name("auto"),
            "git_commit": git_commit()}]
    if last.exists():
        state = torch.load(last, map_location=device, weights_only=True)
        log = [json.loads(line) for line in state["log"].splitlines()]
        if not args.resume or log[0]["args"] != settings:
            raise ValueError(f"{last.parent} holds a run of {log[0]['args']}; name another --out, or "
                             "continue it with --resume and the same flags")
        net.load_state_dict(state["net"])
        optimizer.load_state_dict(state["optimizer"])
        seconds = log[-1]["seconds"]
    last.parent.mkdir(parents=True, exist_ok=True)

    for epoch in trange(len(log), args.epochs + 1, disable=None):
        started = time.time()
        optimizer.param_groups[0]["lr"] = step_lr(epoch)
        # instance sampling: every image once, in a random order
        indices = torch.randperm(len(data.train), generator=generator(args.seed, "sampling", epoch))
        loss = train_epoch(net, optimizer, train_loader.batches(indices, epoch), cast)
        seconds += time.time() - started
        log.append({"epoch": epoch, "loss": loss, "lr": step_lr(epoch), "seconds": seconds})
        if epoch % 5 == 0 or epoch == args.epochs:
            log[-1].update(evaluate(net, test_loader, data.class_counts))
        lines = "".join(json.dumps(row) + "\n" for row in log)
        state = {"net": net.state_dict(), "optimizer": optimizer.state_dict(), "log": lines}
        atomic_write(last, lambda file: torch.save(state, file))
        atomic_write(last.with_name("log.jsonl"), lambda file: file.write(lines.encode()))

    # the last epoch's scores, in the shape that common.summary reads
    stage = {"name": "cross-entropy", **log[-1], "images_per_second": args.epochs * len(data.train) / seconds}
    result = {"method": "anchor", "dataset": data.name, "seed": args.seed, **stage, "stages": [stage],
              "class_counts": data.class_counts.tolist(), **log[0]}
    atomic_write(last.with_name("result.json"), lambda f: f.write(json.dumps(result, indent=1).encode()))
    print(table([(stage["name"], stage)]))
    return result


if __name__ == "__main__":
    with bad_input():
        main(parse_args())
