"""Asynchronous Modeling: A Dual-Phase Perspective for Long-Tailed Recognition
(ICLR 2021 submission, OpenReview u846Bqhry_; its authors and code are not public).

Phase one trains on the C1 most frequent classes alone. Phase two starts from that net and trains all C
classes on a small balanced set: a memory bank of a few images of each phase-one class, and all images of the
rest. A graph-matching loss between the features of the frozen phase-one net and the new ones keeps what was
learnt.

Where we depart, or had to choose ([L]: hshustc/CVPR19_Incremental_Learning, which the method builds on):
- paper: lambda = sqrt(C/C1) in section 5, sqrt(C1/C2) in appendix A / here: sqrt(C1/C2), because the best
  value for Places-LT, 2.03, is sqrt(294/71).
- paper, Eq. (6): s may be any similarity, no temperature / here: cosine over .1, because at temperature 1 the
  attention is nearly uniform and pulls all features to their mean; --temperature 1 is the literal reading.
- paper, Eq. (7), (8): unnormalised features, summed over nodes / here: unit features, mean over nodes,
  because the classifier sees directions alone and cross-entropy is a mean too.
- paper, Eq. (2) to (5): may choose an image twice / here: an image is chosen once; features are unit length.
- paper: L_intra's margin, K and whom it concerns are open / here: [L]'s .5 and 2, samples of phase-one
  classes against phase-two classes, because it is there to keep the memory from "being dominated by new
  classes".
- paper: how W_c^2 starts is open / here: imprinted class means, as [L]; --no-imprint for random rows.
- paper: cosine classifier without its scale / here: learnable, as [L], from 10 instead of [L]'s 1: ours.
- paper: one schedule for both phases / here: phase two has its own lr and epochs where a recipe says so:
  ours.
- paper: progressive sampling "could be incorporated" / here: in phase one and in plain; phase two shuffles.
- paper: augmentation not given / here: crop, flip, on ImageNet-LT and Places-LT colour jitter, as
  classifier-balancing@f162ade, but crops from .05 of the area on (there .08), as cbd.py's.
- paper: batch sizes of the large sets, and epochs of ImageNet-LT, not given / here: as the recipes say.
- paper: rows marked with a dagger have "extended parameters" that are not described / here: left out.
- Under torchrun and --grad-accumulation the graph of Eq. (6) and the mean of Eq. (9) span one rank's part of
  a batch, not all of it.

    python async_lt.py                                                # embedded images
    python async_lt.py --dataset cifar100_lt
    torchrun --nproc_per_node 8 async_lt.py --dataset imagenet_lt --data-dir /data/imagenet

What to expect (last epoch, all classes; results/async_lt.md): embedded images, 5 seeds: plain 78.0 +- 1.1,
two phases 79.0 +- .8, its rarest classes 43.4 -> 53.2. 100 classes of Tiny-ImageNet in CIFAR-100-LT's shape,
30 epochs, 3 seeds: plain 27.6 +- .4, two phases 29.6 +- 1.0; without the retentive loss 27.6 (1 seed).
"""
import argparse
import copy
import math
import time
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from common import runtime
from common.data import image_side, load
from common.evaluate import Diverged, predict, scores, shot_groups, table
from common.loader import UnreadableImage, every_image, make_loader, split_batches
from common.resnet import ARCHS, CosineClassifier, build_backbone

# ---------------------------------------------------------------- recipes

STEPS = dict(schedule="step", milestones=[0.8, 0.9], lr_gamma=0.01)  # epochs 160 and 180 of 200, appendix A
COSINE = dict(schedule="cosine", milestones=[], lr_gamma=1.0)
RECIPES = {
    "fashion_lt": dict(  # all ours; phase two chosen on the validation images
        COSINE, arch="resnet14", epochs=16, batch_size=32, lr=0.1, weight_decay=5e-4, feature_lr=None,
        phase_two_epochs=60, phase_two_lr=0.01, pretrained=False, evaluate_every=10,
        quick=dict(epochs=5, phase_two_epochs=15)),
    "cifar10_lt": dict(  # ours: cifar100_lt's
        STEPS, arch="resnet32", epochs=200, batch_size=64, lr=0.1, weight_decay=5e-4, feature_lr=None,
        phase_two_epochs=200, phase_two_lr=0.01, pretrained=False, evaluate_every=5,
        quick=dict(epochs=30, phase_two_epochs=40)),
    "cifar100_lt": dict(  # appendix A; phase_two_lr: ours (paper: .1), after a prototype on other images
        STEPS, arch="resnet32", epochs=200, batch_size=64, lr=0.1, weight_decay=5e-4, feature_lr=None,
        phase_two_epochs=200, phase_two_lr=0.01, pretrained=False, evaluate_every=5,
        quick=dict(epochs=30, phase_two_epochs=40)),
    "places_lt": dict(  # appendix A; batch: ours; milestones: epochs 20 and 40
        schedule="step", milestones=[1 / 3, 2 / 3], lr_gamma=0.01, arch="resnet152", epochs=60,
        batch_size=128, lr=0.05, weight_decay=5e-4, feature_lr=5e-4, phase_two_epochs=60, phase_two_lr=None,
        pretrained=True, evaluate_every=1, quick=dict(epochs=12, phase_two_epochs=12)),
    "imagenet_lt": dict(  # appendix A; epochs and batch: ours (classifier-balancing's 90; lr .05 as given)
        COSINE, arch="resnet50", epochs=90, batch_size=128, lr=0.05, weight_decay=5e-4, feature_lr=None,
        phase_two_epochs=90, phase_two_lr=None, pretrained=False, evaluate_every=1,
        quick=dict(epochs=30, phase_two_epochs=30)),
    "inat18": dict(  # appendix A; epochs and batch: ours (classifier-balancing's 200)
        COSINE, arch="resnet50", epochs=200, batch_size=128, lr=0.05, weight_decay=5e-4, feature_lr=None,
        phase_two_epochs=200, phase_two_lr=None, pretrained=False, evaluate_every=1,
        quick=dict(epochs=30, phase_two_epochs=30)),
}


def parse_args(argv=None):
    boolean = argparse.BooleanOptionalAction
    parser = runtime.Parser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument_group("data").add_argument
    add("--dataset", default="fashion_lt", help="name, or FILE.npz, or folder (with --data-dir)")
    add("--recipe", help="settings of another data set; wins over the data set's own")
    add("--data-dir", default="data", help="where data sets are, or are downloaded to")
    add("--train-list", metavar="FILE", help="lines `path label` of your own, paths relative to --data-dir")
    add("--test-list", metavar="FILE", help="likewise, for the images that are tested on")
    add("--imb-factor", type=float, help="largest class / smallest class, at least 1")
    add("--subset-seed", type=int, default=0, help="which images are kept; 0 as in LDAM-DRW")
    add("--evaluate-on", choices=["test", "val"], default="test", help="split that is scored")
    add("--workers", type=int, default=runtime.cores(), help="decoding processes for image files, a rank")
    add("--skip-bad-images", action=boolean, default=False, help="leave out files that cannot be decoded")
    add = parser.add_argument_group("method").add_argument
    add("--plain", action=boolean, help="the paper's single-phase baseline alone; --no-plain leaves it out")
    add("--phase-one-classes", type=int, metavar="C1", help="(classes with 20 images and more)")
    add("--phase-one-checkpoint", metavar="FILE", help="a trained phase-one net; starts at the memory bank")
    add("--memory-per-class", type=int, default=10, help="images of a phase-one class in the memory bank")
    add("--retentive", action=boolean, default=True, help="the memory-retentive loss, Eq. (8)")
    add("--margin", action=boolean, default=True, help="the intra-classification loss of Eq. (9)")
    add("--lambda-scale", type=float, default=1.0, help="lambda is this times sqrt(C1 / C2)")
    add("--graph-similarity", choices=["cos", "neg-sq"], default="cos", help="s of Eq. (6)")
    add("--temperature", type=float, default=0.1, help="of the attention, Eq. (6)")
    add("--imprint", action=boolean, default=True, help="start new rows at their class means")
    add("--scale", type=float, default=10.0, help="of the cosine classifier, at the start")
    add("--phase-two-epochs", type=int, help="over the memory bank and the rest")
    add("--phase-two-lr", type=float, help="(--lr) at the first step of phase two")
    add("--track-gradients", action=boolean, default=False, help="log Figure 1's cosines and norms")
    add = parser.add_argument_group("optimisation").add_argument
    add("--arch", choices=ARCHS, help="backbone")
    add("--pretrained", action=boolean, help="start from ImageNet weights")
    add("--epochs", type=int, help="of phase one, and of plain")
    add("--batch-size", type=int, help="global, over all ranks")
    add("--lr", type=float, help="at the first step, for the given batch size")
    add("--feature-lr", type=float, help="(--lr) of the backbone")
    add("--weight-decay", type=float, help="on all parameters")
    add("--schedule", choices=["step", "cosine"], help="of the learning rates")
    add("--milestones", type=float, nargs="*", help="of the step schedule, as fractions of the epochs")
    add("--lr-gamma", type=float, help="what the step schedule multiplies the rates by")
    add("--grad-accumulation", type=int, default=1, help="parts that a rank's batch is cut into")
    add("--sync-bn", action=boolean, default=False, help="batch norm over all ranks (GPUs)")
    add("--amp", action=boolean, default=True, help="bf16 where the device computes it")
    add("--compile", action=boolean, default=False, help="torch.compile the trained net")
    add = parser.add_argument_group("run").add_argument
    add("--seed", type=int, default=0, help="initialisation, sampling, augmentation")
    add("--quick", action=boolean, default=False, help="the same method on a short schedule")
    add("--evaluate", metavar="CHECKPOINT", help="score a saved model, train nothing")
    add("--evaluate-every", type=int, help="epochs between evaluations; the last epoch is always evaluated")
    add("--device", default="auto", help="cpu, cuda, cuda:1, mps")
    add("--time-limit", type=float, metavar="MINUTES", help="stop after a step; --resume goes on")
    add("--resume", action=boolean, default=False, help="continue what is in --out, or start")
    add("--out", help="(runs/async_lt_<dataset>_seed<seed>)")
    return runtime.parse_with_recipe(parser, RECIPES, image_side, argv)


# ---------------------------------------------------------------- samplers

def progressive_probabilities(class_counts, progress):
    """p_j(t) = (1 - t/T) n_j / sum n + (t/T) / C (section 3.2.1): by instance first, by class at the end.

    class_counts: images per class [C]. progress: t/T in [0, 1]. Returns [C], summing to 1. Raises ValueError.
    """
    counts = torch.as_tensor(class_counts).double()
    if not 0 <= progress <= 1:
        raise ValueError(f"progress must lie in [0, 1], got {progress}")
    if counts.ndim != 1 or len(counts) == 0 or (counts < 0).any() or counts.sum() == 0:
        raise ValueError("class_counts must be a vector of counts, not all zero")
    return (1 - progress) * counts / counts.sum() + progress / len(counts)  # p_j(t)


def weighted_indices(targets, probabilities, generator):
    """Draw as many images as there are: a class by its probability, then the next of its shuffled cycle.

    targets: class ids [n]; probabilities: [C], 0 for a class without images; on the CPU. Returns int64 [n].
    """
    C = len(probabilities)
    drawn = torch.multinomial(probabilities, len(targets), replacement=True, generator=generator)
    slots = drawn.argsort(stable=True).split(torch.bincount(drawn, minlength=C).tolist())
    members = targets.argsort(stable=True).split(torch.bincount(targets, minlength=C).tolist())
    indices = torch.empty(len(targets), dtype=torch.int64)
    for images, places in zip(members, slots):
        if len(places):
            cycles = math.ceil(len(places) / len(images))
            shuffled = torch.rand(cycles, len(images), generator=generator).argsort(1)  # rows: permutations
            indices[places] = images[shuffled].flatten()[:len(places)]
    return indices


# ---------------------------------------------------------------- memory bank

def select_exemplars(features, k):
    """The memory bank of one class, Eq. (2) to (5), s being the cosine.

    features: [n, D], normalised inside. k: images to choose, at least 1. Returns the chosen rows in order of
    choice, int64 [min(k, n)], all different. Raises ValueError. Needs memory for n x D numbers, no n x n.
    """
    if features.ndim != 2 or len(features) == 0 or k < 1:
        raise ValueError(f"features must be [n, D], n and k at least 1, got {list(features.shape)} and {k}")
    features = F.normalize(features.float(), dim=1)
    center = features.mean(0)  # c_j
    query, taken, chosen = center, torch.zeros(len(features), device=features.device), []
    for _ in range(min(k, len(features))):
        similarity = features @ F.normalize(query, dim=0) + taken
        chosen.append(similarity.argmax())  # Eq. (2), (5)
        taken[chosen[-1]] = -math.inf
        memory = features[torch.stack(chosen)]
        p = (memory @ F.normalize(center, dim=0)).softmax(0)  # Eq. (3)
        z = p @ memory  # Eq. (4)
        query = center + (center - z)
    return torch.stack(chosen)


# ---------------------------------------------------------------- losses

def memory_retentive_loss(old, new, temperature=0.1, similarity="cos"):
    """Eq. (6) to (8): how far each old node is from the new nodes it attends to.

    old, new: features of the same images under the frozen and the trained net [N, D], normalised inside; the
    gradient goes through `new` alone. similarity: "cos", or "neg-sq" (minus the squared distance). Returns
    the mean over the old nodes, a scalar. Raises ValueError.
    """
    if old.shape != new.shape or old.ndim != 2:
        raise ValueError(f"features must both be [N, D], got {list(old.shape)} and {list(new.shape)}")
    if not temperature > 0 or similarity not in ("cos", "neg-sq"):
        raise ValueError(f"temperature must be positive, s cos or neg-sq; got {temperature}, {similarity}")
    old, new = F.normalize(old.detach().float(), dim=1), F.normalize(new.float(), dim=1)
    cosines = old @ new.t()  # [old i, new j]
    s = cosines if similarity == "cos" else 2 * cosines - 2  # ||z_i - z^_j||^2 = 2 - 2 cos
    attention = (s / temperature).softmax(1)  # Eq. (6)
    # cdist: a finite gradient, 0, where two nodes coincide
    distances = torch.cdist(old, new, compute_mode="donot_use_mm_for_euclid_dist")
    return (attention * distances).sum(1).mean()  # Eq. (7), (8)


def margin_loss(cosines, targets, num_old, margin=0.5, k=2):
    """L_intra of Eq. (9): an old sample's own cosine exceeds its k largest phase-two cosines by the margin.

    cosines: [N, C], classes 0..num_old-1 being phase one's; targets: class ids [N], in the same order. Mean
    over old samples x negatives, a scalar; 0 when the batch has no old sample. Raises ValueError.
    """
    if cosines.ndim != 2 or targets.shape != cosines.shape[:1] or not 0 < num_old < cosines.shape[1] or k < 1:
        raise ValueError(f"cosines must be [N, C], targets [N], num_old in 1..C-1 and k at least 1, got "
                         f"{list(cosines.shape)}, {list(targets.shape)}, {num_old}, {k}")
    is_old = (targets < num_old).float()
    positive = cosines.gather(1, targets[:, None])
    negatives = cosines[:, num_old:].topk(min(k, cosines.shape[1] - num_old), dim=1).values
    hinge = (margin - positive + negatives).clamp(min=0).mean(1)
    return (hinge * is_old).sum() / is_old.sum().clamp(min=1)  # Eq. (9)


# ---------------------------------------------------------------- what the paper adds to a backbone

class AsyncNet(nn.Module):
    """Backbone without its last ReLU, as [L], and a cosine classifier with a learnable scale.

    forward: images [N, 3, H, W] -> (logits [N, C] in the data set's own class ids, features [N, D]). The
    classifier has all C rows from the start; while `known` [C] leaves classes out, as in phase one, theirs
    are not used and their logits are -inf.
    """

    def __init__(self, arch, num_classes, scale=10.0, image_size=32, pretrained=False):
        super().__init__()
        self.backbone = build_backbone(arch, image_size, last_relu=False, pretrained=pretrained)
        self.classifier = CosineClassifier(self.backbone.feature_dim, num_classes, scale, learn_scale=True)
        self.register_buffer("known", torch.ones(num_classes, dtype=torch.bool))

    def forward(self, images):
        features = self.backbone(images)
        return self.classifier(features).masked_fill(~self.known, -math.inf), features


@torch.no_grad()
def imprint(classifier, features, targets, classes, others):
    """Set the rows of `classes` to their class's mean unit feature, as long as the rows of `others` are on
    average ([L]). features: [n, D], targets: [n]; classes, others: class ids."""
    length = classifier.weight[others].norm(dim=1).mean()
    features = F.normalize(features, dim=1)
    for c in classes.tolist():
        classifier.weight[c] = length * F.normalize(features[targets == c].mean(0), dim=0)


def save_model(path, model, args, data):
    """Write a net with what rebuilds it and prepares its images."""
    runtime.save_checkpoint(path, {
        "method": "async_lt", "arch": args.arch, "image_size": data.image_size, "dataset": data.name,
        "class_names": data.class_names, "mean": data.mean, "std": data.std,
        "state_dict": {name: value.cpu() for name, value in model.state_dict().items()}})


def load_model(path, num_classes=None, arch=None):
    """A saved net in eval mode, on the CPU, and what was saved with it (class_names, mean, std, ...). Raises
    ValueError, also where arch or num_classes are given and the net has others."""
    saved = runtime.load_net(path, "async_lt", num_classes, arch)
    model = AsyncNet(saved["arch"], len(saved["class_names"]), image_size=saved["image_size"])
    model.load_state_dict(saved["state_dict"])
    return model.to(memory_format=torch.channels_last).eval(), saved


# ---------------------------------------------------------------- schedule

def step_lr(progress, lr, milestones, gamma):
    """lr times gamma for every milestone reached. progress: a fraction of the epochs, in [0, 1)."""
    return lr * gamma ** sum(progress >= milestone for milestone in milestones)


def cosine_lr(progress, lr):
    """Half a cosine from lr to 0, without warm-up. progress: a fraction of the epochs, in [0, 1]."""
    return lr * 0.5 * (1 + math.cos(math.pi * progress))


# ---------------------------------------------------------------- training

def gradient_norms(model, loader, indices, is_head, amp):
    """Figure 1 on a probe of fixed size: cosine of the head's, and of the tail's, part of the gradient with
    the whole, and the three norms. indices: training images of the probe; is_head: bool [C]."""
    model.eval()  # batch norm's statistics stay as they are
    head = tail = 0
    for images, targets, _, _ in loader.batches(indices):
        with runtime.autocast(loader.device, amp)():
            losses = F.cross_entropy(model(images)[0], targets, reduction="none") / len(indices)
        of_head, of_tail = (torch.cat([g.reshape(-1) for g in torch.autograd.grad(
            losses[is_head[targets] == side].sum(), list(model.parameters()), retain_graph=True)])
            for side in (True, False))
        head, tail = head + of_head, tail + of_tail
    whole = head + tail
    return {"cosine_head": F.cosine_similarity(head, whole, dim=0).item(), "norm_head": head.norm().item(),
            "cosine_tail": F.cosine_similarity(tail, whole, dim=0).item(), "norm_tail": tail.norm().item(),
            "norm": whole.norm().item()}


def train_stage(name, model, loss_of, sample, epochs, lr, is_head, data, loaders, args, run, device):
    """Train a net. loss_of(images, targets, logits, features): mean loss of a batch. sample(epoch,
    generator): an epoch's index list. Returns {"best_all": percent, "seconds", "images_per_second"},
    evaluation not in them."""
    seed = runtime.derive_seed(args.seed, name, "augmentation")
    loader = make_loader(data.train, data, args.batch_size, device, "standard", seed, runtime.rank(),
                         runtime.ranks(), args.grad_accumulation, args.workers, args.skip_bad_images)
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(
        [{"params": model.backbone.parameters(), "base": lr if args.feature_lr is None else args.feature_lr},
         {"params": model.classifier.parameters(), "base": lr}],
        lr, momentum=0.9, weight_decay=args.weight_decay, fused=device.type == "cuda")
    autocast = runtime.autocast(device, args.amp)
    forward = torch.compile(model) if args.compile else model
    state = run.open_stage(name, model, optimizer)

    def lr_at(progress, base):
        return cosine_lr(progress, base) if args.schedule == "cosine" else \
            step_lr(progress, base, args.milestones, args.lr_gamma)

    for epoch in range(state["epoch"], epochs):
        model.train()
        started, step = time.time() - state["seconds"], state["step"]
        indices = sample(epoch, runtime.generator(args.seed, name, "sampling", epoch))
        steps = math.ceil(len(indices) / args.batch_size)  # the last partial batch included
        losses = torch.zeros(steps, device=device)
        losses[:step] = state["losses"]
        for images, targets, share, ends_step in tqdm(
                loader.batches(indices, epoch, step), f"{name}, epoch {epoch + 1}",
                (steps - step) * args.grad_accumulation, leave=False,
                disable=None if runtime.rank() == 0 else True):
            with autocast():
                loss = share * loss_of(images, targets, *forward(images))
            loss.backward()
            losses[step] += loss.detach()
            if ends_step:
                runtime.sum_gradients(parameters)
                for group in optimizer.param_groups:
                    group["lr"] = lr_at((epoch + step / steps) / epochs, group["base"])
                optimizer.step()
                optimizer.zero_grad()
                step += 1
                if run.must_stop():
                    state.update(step=step, losses=losses[:step], seconds=time.time() - started)
                    run.save_stage(state, model, optimizer)
                    run.stop()
        runtime.average_buffers(model)
        mean_loss = run.check_losses(  # the epoch's one host sync
            losses, name, epoch, lambda step: lr_at((epoch + step / steps) / epochs, lr))
        state.update(epoch=epoch + 1, step=0, losses=losses[:0], seconds=time.time() - started)
        row = {"stage": name, "epoch": epoch + 1, "loss": mean_loss, "seconds": state["seconds"]}
        if args.track_gradients:
            probe = torch.randperm(len(data.train), generator=runtime.generator(args.seed, "probe"))[:512]
            row.update(gradient_norms(model, loaders[0], probe[model.known.cpu()[data.train.targets[probe]]],
                                      is_head, args.amp))
        if (epoch + 1) % args.evaluate_every == 0 or epoch + 1 == epochs:
            row.update(assess(model, loaders[1], data, args.amp))
            state["best_all"] = max(state["best_all"], row["all"])
            runtime.say(f"{name}, epoch {epoch + 1} of {epochs}: loss {mean_loss:.3f}, all {row['all']:.1f}")
        run.log(**row)
        run.save_stage(state, model, optimizer)
    runtime.report_bad_images([loader])
    return {"best_all": state["best_all"], "seconds": state["seconds"],
            "images_per_second": epochs * len(sample(0, torch.Generator())) / state["seconds"]}


def assess(model, loader, data, amp):
    """A net's scores over all of the loader's images, each rank computing its part of them."""
    images = every_image(loader, runtime.rank(), runtime.ranks())
    logits, _, targets = (runtime.gather_ranks(part) for part in
                          predict(model, images, runtime.autocast(loader.device, amp)))
    return scores(logits, targets, data.class_counts)


@torch.no_grad()
def extract_features(model, loader, indices, amp):
    """Features [n, D] of training images, not augmented, their targets [n] and indices [n], without what
    --skip-bad-images leaves out; on the CPU. Each rank computes every ranks-th; all get all, by index."""
    model.eval()
    mine = indices[runtime.rank()::runtime.ranks()]
    none = torch.zeros(0, model.backbone.feature_dim, device=loader.device)
    rows = [(none, none[:, 0].long())]  # a rank may have no image, or none that can be read
    for images, labels, share, _ in loader.batches(mine):
        if share > 0:
            with runtime.autocast(loader.device, amp)():
                rows.append((model.backbone(images).float(), labels))
    read = mine[[i not in loader.bad_indices for i in mine.tolist()]].to(loader.device)
    parts = [runtime.gather_ranks(part).cpu() for part in (*map(torch.cat, zip(*rows)), read)]
    return [part[parts[2].argsort()] for part in parts]


# ---------------------------------------------------------------- main

def phase_one_classes(class_counts, num_old=None):
    """Class ids from the most to the least frequent (ties by id) and C1: how many phase one trains on.

    class_counts: [C]. num_old: C1; None takes many and medium, the classes with at least 20 images (appendix
    A). Returns (order [C], C1). Raises ValueError for C1 of 0 or C.
    """
    counts = torch.as_tensor(class_counts)
    chosen = int((~shot_groups(counts)["few"]).sum()) if num_old is None else num_old
    if not 0 < chosen < len(counts):
        raise ValueError(f"phase one would have {chosen} of the {len(counts)} classes, and one phase none; "
                         f"choose --phase-one-classes between 1 and {len(counts) - 1}")
    return counts.argsort(descending=True, stable=True), chosen


def check_args(args):
    """Refuse values of this method's flags that cannot work. Raises ValueError."""
    if args.temperature == 0 or args.scale == 0:
        raise ValueError("--temperature and --scale must be positive")
    if not all(0 < milestone < 1 for milestone in args.milestones):
        raise ValueError(f"--milestones are fractions of the epochs, between 0 and 1, got {args.milestones}")
    if args.plain and args.phase_one_checkpoint:
        raise ValueError("--plain trains no phase two; leave out --phase-one-checkpoint")


def main(args):
    with runtime.bad_input():
        device = runtime.start_ranks(args.device)
        runtime.check_flags(args, device)
        check_args(args)
        with runtime.first_rank_first():
            data = load(args.dataset, args.data_dir, args.imb_factor, args.subset_seed, args.train_list,
                        args.test_list)
        split = data.split(args.evaluate_on)
        split_batches(1, args.batch_size, 0, runtime.ranks(), args.grad_accumulation)  # raises if it cannot
        path = args.evaluate or args.phase_one_checkpoint
        if path:  # a trained net sees images as it did when it was trained
            trained, saved = load_model(path, data.num_classes, None if args.evaluate else args.arch)
            data.mean, data.std = saved["mean"], saved["std"]
        loaders = [make_loader(part, data, 256, device, workers=args.workers, skip_bad=args.skip_bad_images)
                   for part in (data.train, split)]
        if args.evaluate:
            result = assess(trained.to(device), loaders[1], data, args.amp)
            runtime.report_bad_images(loaders)
            runtime.say(table([(Path(args.evaluate).stem, result)]))
            return {"method": "async_lt", "dataset": data.name, **result}
        order, num_old = phase_one_classes(data.class_counts, args.phase_one_classes)
        if path and not torch.equal(trained.known.nonzero().flatten(), order[:num_old].sort().values):
            raise ValueError(f"{path} was trained on other classes than the {num_old} of phase one here")
        with runtime.first_rank_first():  # which downloads the weights
            build_backbone(args.arch, data.image_size, pretrained=args.pretrained)
        run = runtime.open_run(args, "async_lt")
    with runtime.bad_input((UnreadableImage, Diverged)):
        stages = run_stages(args, data, loaders, order, num_old, trained if path else None, run, device)
    runtime.report_bad_images(loaders)
    runtime.say(table([(stage["name"], stage) for stage in stages]))
    return run.finish("async_lt", data, stages)


def run_stages(args, data, loaders, order, num_old, trained, run, device):
    """Plain, phase one, memory bank, phase two. Returns result.json's `stages`."""
    targets, counts = torch.from_numpy(data.train.targets), torch.from_numpy(data.class_counts)
    C = len(counts)
    old, new = order[:num_old], order[num_old:]  # class ids
    is_old = torch.zeros(C, dtype=torch.bool).index_fill(0, old, True)
    stages = []

    def train(name, file, model, sample, loss_of, epochs, lr):
        """Train a net, or load it where a resumed run has finished it, and score it. sample None: trained."""
        done = run.state.get("done", {})
        if args.sync_bn:
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        model.to(device, memory_format=torch.channels_last)
        if name in done:
            model.load_state_dict(load_model(run.folder / file)[0].state_dict())
        elif sample is not None:
            done = {**done, name: train_stage(name, model, loss_of, sample, epochs, lr, is_old.to(device),
                                              data, loaders, args, run, device)}
            save_model(run.folder / file, model, args, data)
            run.save(done=done)
        unknown = {"best_all": None, "seconds": None, "images_per_second": None}
        stages.append({"name": name, **assess(model, loaders[1], data, args.amp), **done.get(name, unknown)})
        return model.eval()

    def new_model(name, known):
        torch.manual_seed(runtime.derive_seed(args.seed, name, "initialisation"))
        model = AsyncNet(args.arch, C, args.scale, data.image_size, args.pretrained)
        model.known.copy_(known)
        return model

    def progressive(classes):
        """The sampler of the images of `classes`: progressive from instance to class (section 3.2.1)."""
        images = torch.isin(targets, classes).nonzero().flatten()

        def sample(epoch, generator):
            progress, probabilities = epoch / max(1, args.epochs - 1), torch.zeros(C, dtype=torch.double)
            probabilities[classes] = progressive_probabilities(counts[classes], progress)
            return images[weighted_indices(targets[images], probabilities, generator)]
        return sample

    cross_entropy = lambda images, targets, logits, features: F.cross_entropy(logits, targets)  # Eq. (1)
    if args.plain is not False:  # "Ours (plain)": one phase, all classes
        train("plain", "plain.pt", new_model("plain", torch.ones(C, dtype=torch.bool)), progressive(order),
              cross_entropy, args.epochs, args.lr)
        if args.plain:
            return stages

    # Phase one: the C1 most frequent classes, Eq. (1)
    old_model = train("phase one", "phase_one.pt", trained or new_model("phase one", is_old),
                      None if trained else progressive(old), cross_entropy, args.epochs, args.lr)
    old_model.requires_grad_(False)

    # Memory bank M, Eq. (2) to (5); phase two trains on D = M u X2
    head = torch.isin(targets, old).nonzero().flatten()
    features, labels, head = extract_features(old_model, loaders[0], head, args.amp)
    bank = [head[labels == c][select_exemplars(features[labels == c], args.memory_per_class)] for c in old]
    short = sum(len(chosen) < args.memory_per_class for chosen in bank)
    if short:
        runtime.say(f"note: {short} phase-one classes have fewer than {args.memory_per_class} images; the "
                    "memory bank takes all of theirs")
    tail = torch.isin(targets, new).nonzero().flatten()
    images_two = torch.cat([*bank, tail])

    # Phase two: all C classes, Eq. (9)
    model = copy.deepcopy(old_model).requires_grad_(True)
    model.known.fill_(True)
    model.classifier.weight.data[new] = new_model("phase two", is_old).classifier.weight.data[new].to(device)
    if args.imprint:
        tail_features, tail_targets, _ = extract_features(old_model, loaders[0], tail, args.amp)
        imprint(model.classifier, tail_features.to(device), tail_targets.to(device), new, old)
    graph_weight = args.lambda_scale * math.sqrt(num_old / len(new))  # lambda, appendix A
    by_frequency, place_of = order.to(device), order.argsort().to(device)  # place by frequency <-> class id

    def phase_two_loss(images, targets, logits, features):
        loss = F.cross_entropy(logits, targets)
        if args.margin:
            cosines = logits / model.classifier.scale
            loss = loss + margin_loss(cosines[:, by_frequency], place_of[targets], num_old)
        if args.retentive:
            with torch.inference_mode():
                before = old_model.backbone(images)
            loss = loss + graph_weight * memory_retentive_loss(
                before.clone(), features, args.temperature, args.graph_similarity)
        return loss

    train("two phases", "model.pt", model,
          lambda epoch, generator: images_two[torch.randperm(len(images_two), generator=generator)],
          phase_two_loss, args.phase_two_epochs or args.epochs,
          args.lr if args.phase_two_lr is None else args.phase_two_lr)
    return stages


if __name__ == "__main__":
    main(parse_args())
