"""Our training steps beside the loop that common CIFAR-LT code bases run, interleaved in one process.

    python -m tests.benchmark                        # about 8 minutes on 2 idle cores
    python -m tests.benchmark --only resnet32 data   # some rows, printed alone
    python -m tests.benchmark --device cuda          # the same there, and whole schedules of cbd.py

Ours is what the scripts run, without schedule, logs and checkpoints; the peers' loop and nets are those of
tests/peers.py. In every round each variant does an epoch of a few steps; the first step, in which workers
start and kernels are chosen, is not timed. Right behind it torch.mm is, in the same precision: the floor.
A ratio is ours over the peer's images per second in the same round; a share is what part of the floor's
FLOP/s the products of the variant's own steps reach. Shown are medians over the rounds. Peak memory is that
of two steps, above the imports, in processes of their own (without the peer's workers). Images are random
bytes in CIFAR-100-LT's shape. Goals are for 2 threads of a CPU with bf16.
"""
import argparse
import json
import multiprocessing
import sys
import tempfile
import time
from collections import namedtuple
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import median

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import cbd
import livt
from common import ranks
from common.data import load, long_tail_counts
from common.folder import atomic_write, device_name, git_commit, versions
from common.loader import Augmentation, Cut, make_loader
from common.reactnet import ReActNet18
from common.resnet import build_encoder
from common.vit import MAE, VIT_SIZES, ViT, random_masking
from tests import peers

CLASSES, COUNTS = 100, long_tail_counts(100, 500, 100)  # CIFAR-100-LT
VIT = dict(image_size=32, patch_size=4, **VIT_SIZES["tiny"])
DECODER = dict(decoder_width=128, decoder_depth=1, decoder_heads=4)
VIT_B = dict(image_size=224, patch_size=16, **VIT_SIZES["base"])
DECODER_B = dict(decoder_width=512, decoder_depth=8, decoder_heads=16)


# What is trained: each returns a net, its loss of (its output, targets), and what makes its optimiser

def resnet(arch, ours, fused):
    net = cbd.CBDNet(arch, CLASSES) if ours else getattr(peers, arch)(CLASSES)
    loss = (lambda output, targets: F.cross_entropy(output[0], targets)) if ours else F.cross_entropy
    return net, loss, lambda: torch.optim.SGD(net.parameters(), 0.1, 0.9, weight_decay=5e-4, fused=fused)


def adamw(net, lr, betas, ours, lr_scale):
    groups = livt.parameter_groups(net, 0.05, lr_scale) if ours else net.parameters()
    return lambda: torch.optim.AdamW(groups, lr, betas, weight_decay=0.05, fused=ours or None)


def vit_finetuning(sizes, ours, fused):
    net, counts = (ViT if ours else peers.TextbookViT)(**sizes, num_classes=CLASSES), torch.tensor(COUNTS)
    balanced = lambda output, targets: livt.balanced_bce_loss(output[0], targets, counts)
    scale = lambda name: livt.layer_lr_scale(name, sizes["depth"], 0.75)
    return net, balanced if ours else F.cross_entropy, adamw(net, 1e-3, (0.9, 0.999), ours, scale)


class RandomlyMaskedMAE(MAE):
    def forward(self, images):
        keep, restore, _ = random_masking(len(images), self.encoder.num_patches, 0.75, device=images.device)
        predictions, pixels = super().forward(images, keep, restore)
        return F.mse_loss(predictions.float(), pixels)


def vit_pretraining(sizes, decoder, ours, fused):
    net = (RandomlyMaskedMAE if ours else peers.TextbookMAE)(**sizes, **decoder)
    return net, lambda loss, targets: loss, adamw(net, 1.5e-4, (0.9, 0.95), ours, lambda name: 1.0)


def reactnet(ours, fused):
    net = ReActNet18(CLASSES, image_size=32) if ours else peers.reactnet18(CLASSES)
    return net, F.cross_entropy, lambda: torch.optim.Adam(net.parameters(), 0.01, fused=ours)


def frozen_teacher(ours, fused):
    return build_encoder("resnet152") if ours else peers.resnet152_encoder(), None, None


# build: one of the functions above; None: the data path alone. batch_size: images a step. steps: timed in a
# round on a CPU. goals: {(ours, peer), two of `VARIANTS`: {"ratio", "share": at least; "memory": ours over
# the peer's, at most}}. side: of the images in pixels
Workload = namedtuple("Workload", "title build batch_size steps goals augmentation side memory_batch_size",
                      defaults=["standard", 32, None])
VARIANTS = {"peer, 2 workers": dict(ours=False, workers=2), "peer": dict(ours=False), "ours": dict(ours=True),
            "ours, fp32": dict(ours=True, amp=False)}
WITH_WORKERS, PAIR, FP32 = ("ours", "peer, 2 workers"), ("ours", "peer"), ("ours, fp32", "peer")
WORKLOADS = {
    "resnet32": Workload("ResNet-32", partial(resnet, "resnet32"), 128, 3, {
        WITH_WORKERS: dict(ratio=2.2, share=0.5), PAIR: dict(ratio=1.7, share=0.5),
        FP32: dict(ratio=1.3, share=0.7)}),
    "resnet18": Workload("resnet18", partial(resnet, "resnet18"), 128, 1, {PAIR: dict(ratio=2.3, share=.85)}),
    "vit_finetuning": Workload("ViT-Tiny/4 fine-tuning", partial(vit_finetuning, VIT), 128, 1, {
        PAIR: dict(ratio=1.8)}),
    "vit_pretraining": Workload("ViT-Tiny/4 pre-training", partial(vit_pretraining, VIT, DECODER), 128, 2, {
        PAIR: dict(ratio=1.4)}, "resized"),
    "vit_b_finetuning": Workload("ViT-B/16 fine-tuning", partial(vit_finetuning, VIT_B), 8, 1, {
        PAIR: dict(ratio=2.2)}, side=224),
    "vit_b_pretraining": Workload("ViT-B/16 pre-training", partial(vit_pretraining, VIT_B, DECODER_B), 8, 1, {
        PAIR: dict(ratio=1.5)}, "resized", side=224),
    "reactnet18": Workload("ReActNet-18", reactnet, 16, 4, {
        PAIR: dict(ratio=2.0, memory=0.55), FP32: dict(ratio=1.4, memory=0.55)}, memory_batch_size=32),
    **{f"teacher{side}": Workload("frozen ResNet-152", frozen_teacher, batch_size, 1, {
        PAIR: dict(ratio=2.0, share=0.8)}, side=side) for side, batch_size in ((224, 8), (480, 2))},
    "data": Workload("data path alone", None, 128, 80, {WITH_WORKERS: dict(ratio=10.0)}),
}


def make_npz(path, counts=COUNTS, num_test=10_000):
    """A data set of random images of 32 pixels, with as many of each class as `counts` says; its path."""
    random = np.random.RandomState(0)
    x_train, x_test = (random.randint(0, 256, (n, 32, 32, 3), np.uint8) for n in (sum(counts), num_test))
    np.savez(path, x_train=x_train, y_train=np.repeat(np.arange(len(counts)), counts), x_test=x_test,
             y_test=np.arange(num_test) % len(counts))
    return str(path)


def images_for(work, npz):
    """The data set of a workload; for a larger side a few images, each repeated in rows and columns."""
    data = load(npz)
    if work.side != data.image_size:
        data = data.subset(np.unique(data.train.targets, return_index=True)[1])  # one of each class
        data.train.images = np.tile(data.train.images, (1, *[work.side // data.image_size] * 2, 1))
        data.image_size = work.side
    return data


def our_epoch(net, loss_of, optimizer, batches, device, autocast):
    """The scripts' loop; after every step the number of its images."""
    losses = torch.zeros(1, device=device)
    for images, targets, share, ends_step in batches:
        with autocast():
            loss = share * loss_of(net(images), targets)
        loss.backward()
        losses[0] += loss.detach()
        optimizer.step()
        optimizer.zero_grad()
        yield len(images)


def forward_epoch(net, images, steps, autocast):
    """A frozen net sees the same images again and again."""
    for _ in range(steps):
        with torch.no_grad(), autocast():
            net(images)
        yield len(images)


def prepare(work, data, device, batch_size, ours, amp=True, workers=0):
    """A function of a number of steps -> an iterator: each `next` does one and gives its number of images."""
    indices = lambda steps: torch.randint(len(data.train), (steps * batch_size,))
    if ours:
        loader = make_loader(data.train, data, Cut(batch_size), device, Augmentation(work.augmentation))
        batches = lambda steps: loader.batches(indices(steps))
    else:
        batches = lambda steps: peers.pil_loader(data, batch_size, indices(steps), workers, work.augmentation,
                                                 device.type == "cuda")
    if work.build is None:
        return lambda steps: (len(batch[0]) for batch in batches(steps))
    net, loss_of, make_optimizer = work.build(ours, ours and device.type == "cuda")
    layout = torch.channels_last if ours else torch.contiguous_format
    net.to(device, memory_format=layout)
    autocast = ranks.autocast(device, True) if ours and amp else nullcontext
    if loss_of is None:
        images = torch.rand(batch_size, 3, work.side, work.side, device=device).to(memory_format=layout)
        return lambda steps: forward_epoch(net, images, steps, autocast)
    optimizer, epoch = make_optimizer(), partial(our_epoch, autocast=autocast) if ours else peers.epoch
    return lambda steps: epoch(net, loss_of, optimizer, batches(steps), device)


def now(device):
    """The time at which the device has done all that it was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def images_per_second(epoch, steps, device):
    """The speed of `steps` steps behind a first one."""
    running = epoch(1 + steps)
    next(running)
    started = now(device)
    speed = sum(islice(running, steps)) / (now(device) - started)
    assert next(running, None) is None  # the peer's worker processes end here
    return speed


def matmul_flops(dtype, device, seconds=0.2):
    """FLOP/s of torch.mm of square matrices: of side 1024, on a GPU 8192."""
    side, calls = 8192 if device.type == "cuda" else 1024, 0
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    torch.mm(a, b)
    started = ended = now(device)
    while ended - started < seconds:
        torch.mm(a, b)
        ended, calls = now(device), calls + 1
    return 2 * side ** 3 * calls / (ended - started)


def peak_memory(name, variant, npz, device, batch_size):
    """MiB of two steps above the imports, for a process of its own; None where it cannot be told."""
    torch.optim.SGD([torch.zeros(1)]).zero_grad()  # torch imports its compiler at the first call
    work, device = WORKLOADS[name], ranks.choose_device(device)
    ranks.peak_memory(device)
    imports = ranks.peak_memory(device)
    sum(prepare(work, images_for(work, npz), device, batch_size, **{**VARIANTS[variant], "workers": 0})(2))
    return None if imports is None else ranks.peak_memory(device) - imports


def measure(name, npz, device, rounds, quick):
    """A workload's rows: its goals, each with what was measured."""
    work = WORKLOADS[name]
    if quick:
        side = min(work.side, 64) if name.startswith("teacher") else work.side
        work = work._replace(batch_size=2, steps=1, side=side)
    elif device.type == "cuda" and work.build:
        work = work._replace(steps=40 * work.steps)
    data, memory_batch_size = images_for(work, npz), work.memory_batch_size or work.batch_size
    variants = [v for v in VARIANTS if any(v in pair for pair in work.goals)]
    amp = "ours" if work.build and ranks.supports_bf16(device) else None
    precision = {v: torch.bfloat16 if v == amp else torch.float32 for v in variants}
    epochs = {v: prepare(work, data, device, work.batch_size, **VARIANTS[v]) for v in variants}
    rates, shares, gflop, peaks = {v: [] for v in variants}, {v: [] for v in variants}, {}, {}
    for side in ("peer", "ours") if work.build else ():
        with FlopCounterMode(display=False) as counter:
            images = sum(epochs[side](1))
        gflop |= {v: counter.get_total_flops() / images / 1e9 for v in variants if v.startswith(side)}
    for number in range(rounds):
        for v in variants[::(-1) ** number]:
            rates[v].append(images_per_second(epochs[v], work.steps, device))
            if gflop:
                shares[v].append(1e9 * gflop[v] * rates[v][-1] / matmul_flops(precision[v], device))
    del epochs
    for v in variants if work.build and not quick else ():
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            peaks[v] = pool.submit(peak_memory, name, v, npz, str(device), memory_batch_size).result()

    speed = {v: median(rates[v]) for v in variants}
    share = {v: median(shares[v]) for v in variants if shares[v]}
    rows = []
    for (ours, peer), goals in work.goals.items():
        ratios = [a / b for a, b in zip(rates[ours], rates[peer])]
        values = {"ratio": median(ratios), **({"share": share[ours]} if share else {})}
        if peaks.get(ours) is not None:
            values["memory"] = peaks[ours] / peaks[peer]
        of_both = lambda values: [values[peer], values[ours]] if values else None
        rows.append({
            "name": name, "workload": f"{work.title}, {work.side} px, batch {work.batch_size}",
            "ours": "bf16" if precision[ours] == torch.bfloat16 else "fp32", "peer": peer, **values,
            "ratio_range": [min(ratios), max(ratios)], "images_per_second": of_both(speed),
            "share_of_floor": of_both(share), "gflop_per_image": of_both(gflop),
            "peak_memory_mib": of_both(peaks if "memory" in values else None),
            "memory_batch_size": memory_batch_size, "rounds": {peer: rates[peer], ours: rates[ours]},
            "to_reach": goals if device.type == "cpu" else {},
            "reached": {key: values[key] <= goal if key == "memory" else values[key] >= goal
                        for key, goal in goals.items() if key in values and device.type == "cpu"}})
    return rows


def schedule(npz, device, epochs=200, peer_steps=170, flags=("--no-compile", "--compile")):
    """Rows of whole runs of cbd.py's first stage, against the peer's speed over `peer_steps` steps."""
    epoch = prepare(WORKLOADS["resnet32"], load(npz), device, 128, ours=False, workers=4)
    peer, rows = images_per_second(epoch, peer_steps, device), []
    for flag in flags:
        with tempfile.TemporaryDirectory() as folder:
            started = time.perf_counter()
            result = cbd.main(cbd.parse_args([
                "--dataset", npz, "--only-teacher", "1", "--epochs", str(epochs), "--evaluate-every",
                str(epochs), "--device", str(device), flag, "--out", f"{folder}/run"]))
            whole = time.perf_counter() - started
        seconds, speed = (result["stages"][0][key] for key in ("seconds", "images_per_second"))
        rows.append({
            "name": "schedule", "workload": f"cbd.py, ResNet-32, 32 px, batch 128, {epochs} epochs",
            "ours": flag, "peer": f"peer, 4 workers, {peer_steps} steps", "seconds": seconds,
            "ratio": speed / peer, "whole_run_seconds": whole, "images_per_second": [peer, speed],
            "to_reach": {"seconds": 30, "ratio": 20},
            "reached": {"seconds": seconds <= 30, "ratio": speed / peer >= 20}})
    return rows


HEAD = "| workload | ours | against | images/s | ratio (range) | share of the floor | peak MiB | to reach |"


def table_line(row):
    """A row in Markdown. Arrows go from the peer to ours; a row of `schedule` has seconds for a share."""
    arrow = lambda values, form: f"{values[0]:{form}} -> {values[1]:{form}}" if values else "-"
    spread = "{:.2f} to {:.2f}".format(*row.get("ratio_range", [row["ratio"]] * 2))
    share, memory = arrow(row.get("share_of_floor"), ".2f"), arrow(row.get("peak_memory_mib"), ".0f")
    if "seconds" in row:
        share = f"training {row['seconds']:.1f} s, whole run {row['whole_run_seconds']:.1f} s"
    if memory != "-":
        memory += f" (batch {row['memory_batch_size']})"
    answers = {True: "yes", False: "no", None: "not measured"}
    goals = [f"{key} {goal:g}: {answers[row['reached'].get(key)]}" for key, goal in row["to_reach"].items()]
    speed, ratio = arrow(row["images_per_second"], ".4g"), f"{row['ratio']:.2f} ({spread})"
    cells = row["workload"], row["ours"], row["peer"], speed, ratio, share, memory, ", ".join(goals) or "-"
    return f"| {' | '.join(cells)} |"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.error = ranks.fail
    add = parser.add_argument
    add("--rounds", type=int, default=5, help="that medians are taken over")
    add("--device", default="cpu", help="cpu, cuda")
    add("--only", nargs="+", choices=[*WORKLOADS, "schedule"], help="rows; schedule needs a GPU")
    add("--quick", action="store_true", help="2 images a step, 1 step a round, no memory: it runs, no more")
    add("--out", help="JSON file (results/benchmark.json; with --only and --quick none)")
    args = parser.parse_args(argv)
    with ranks.bad_input():
        device = ranks.choose_device(args.device)
        if args.rounds < 1 or device.type != "cuda" and "schedule" in (args.only or ()):
            raise ValueError("--rounds must be at least 1, and the whole schedule needs --device cuda")
        out = args.out or (None if args.only or args.quick else "results/benchmark.json")
        if out and not Path(out).parent.is_dir():
            raise ValueError(f"there is no folder {Path(out).parent} for {out}")
        content = json.loads(Path(out).read_text()) if out and Path(out).exists() else {}
    names = args.only or [*WORKLOADS, *["schedule"] * (device.type == "cuda")]
    print(f"{device_name(args.device)}, torch {torch.__version__}, medians of {args.rounds} rounds\n")
    print(f"{HEAD}\n{'|---' * 8}|", flush=True)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        npz = make_npz(f"{folder}/cifar100_lt_shape.npz")
        for name in names:
            rows += schedule(npz, device, 2 if args.quick else 200) if name == "schedule" else \
                measure(name, npz, device, args.rounds, args.quick)
            print("\n".join(table_line(row) for row in rows if row["name"] == name), flush=True)
    if out:  # each kind of device has its own entry
        content[device.type] = {
            "device": device_name(args.device), "versions": versions(), "git_commit": git_commit(),
            "argv": sys.argv[1:] if argv is None else argv, "rows": rows}
        atomic_write(out, lambda file: file.write(json.dumps(content, indent=1).encode()))
    return rows


if __name__ == "__main__":
    main()
