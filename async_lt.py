"""Asynchronous Modeling: A Dual-Phase Perspective for Long-Tailed Recognition
ICLR 2021 submission, OpenReview u846Bqhry_; its authors and code are not public.

Frequent classes turn the gradient their way, rare ones make it fluctuate; so they are learnt one after the
other. Phase one trains on the C1 most frequent classes alone. Phase two goes on from that net with all C, on
a small set: a memory bank of a few images of each phase-one class, and all images of the rest. A loss that
matches the graph of the frozen phase-one net's features with that of the new ones keeps what was learnt.

    python async_lt.py                                                # embedded images, 2 minutes on 2 cores
    python async_lt.py --dataset cifar100_lt
    torchrun --nproc_per_node 8 async_lt.py --dataset imagenet_lt --data-dir /data/imagenet

Expect (last epoch, all classes, results/*.md): embedded images, 5 seeds: plain 78.0 +- 1.1, two phases 79.0
+- .8. CIFAR-100-LT, 200 epochs, one seed: 44.0, 45.9 (paper: 42.48, 44.79); --quick, 3 seeds: 38.0, 40.8.

Departures, and what the paper leaves open, stand behind `paper:`. [L] is LUCIR's code, with the same margin
loss and lambda: hshustc/CVPR19_Incremental_Learning. Pixels (not described) are minus mean, over std.
"""
import copy
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from common.data import long_tail_counts
from common.evaluate import shot_groups
from common.flags import BOOLEAN, Parser, count, fraction, number, positive, text
from common.folder import load_net
from common.ranks import bad_input, first_rank_first, say
from common.resnet import ARCHS, CosineClassifier, build_backbone
from common.run import Run

# ---------------------------------------------------------------- recipes

CIFAR = dict(  # appendix A. paper: lr decayed "by 0.01" at epochs 160 and 180 of 200 / here: times .01
    arch="resnet32", epochs=200, batch_size=64, lr=0.1, weight_decay=5e-4, schedule="step", evaluate_every=5,
    # paper: one schedule for both phases / here: a lower lr in phase two, chosen on Tiny-ImageNet
    phase_two_lr=0.01, quick=dict(epochs=30, phase_two_epochs=40))
LARGE = dict(  # appendix A. paper: batch size not given / here: 128
    arch="resnet50", epochs=200, batch_size=128, lr=0.05, weight_decay=5e-4, schedule="cosine",
    evaluate_every=1, quick=dict(epochs=30))
FASHION = {  # ours; phase two chosen on the validation images
    **CIFAR, "arch": "resnet14", "epochs": 16, "batch_size": 32, "schedule": "cosine",
    "phase_two_epochs": 60, "evaluate_every": 10, "quick": dict(epochs=5, phase_two_epochs=15)}
RECIPES = {
    "fashion_lt": FASHION, "cifar100_lt": CIFAR, "cifar10_lt": CIFAR,  # paper: no CIFAR-10
    "places_lt": {  # appendix A: decayed at epochs 20 and 40 of 60
        **LARGE, "arch": "resnet152", "pretrained": True, "epochs": 60, "feature_lr": 5e-4,
        "schedule": "step", "milestones": [1 / 3, 2 / 3], "quick": dict(epochs=12)},
    "inat18": LARGE, "imagenet_lt": {**LARGE, "epochs": 90},  # paper: epochs open / here: Kang et al.'s
    "small": {**FASHION, "image_size": 64},  # ours, for own images; the next one is not measured
    "small_224": dict(LARGE, pretrained=True, epochs=20, batch_size=32, lr=0.01, quick=dict(epochs=5)),
}


def parse_args(argv=None):
    parser = Parser(__doc__, RECIPES)  # --dataset, --lr, --weight-decay, --resume, ...: common/flags.py
    add = parser.method
    add("--plain", action=BOOLEAN, help="the paper's single-phase baseline alone; --no-plain leaves it out")
    add("--sampling", choices=["progressive", "instance"], default="progressive", help="of plain, phase one")
    add("--phase-one-classes", type=count, metavar="C1", help="(classes with 20 images and more)")
    add("--phase-one-checkpoint", type=text, metavar="FILE", help="a trained net, instead of phase one")
    add("--memory-per-class", type=count, default=10, help="of a phase-one class")  # paper: on Places-LT
    add("--retentive", action=BOOLEAN, default=True, help="the memory-retentive loss, Eq. (8)")
    add("--graph-similarity", choices=["cos", "neg-sq", "self"], default="cos",
        help="s of Eq. (6); self: no graph, each image attends to itself alone")
    add("--temperature", type=positive, default=0.1, help="of the attention, Eq. (6)")
    add("--lambda-scale", type=number, default=1.0, help="lambda is this times sqrt(C1 / C2)")
    add("--margin", action=BOOLEAN, default=True, help="the intra-classification loss of Eq. (9)")
    add("--imprint", action=BOOLEAN, default=True, help="start new rows at their class means")
    add("--scale", type=positive, default=10.0, help="of the cosine classifier, at the start")
    add("--arch", choices=ARCHS, metavar="F", help="resnet14, 20, 32, 44, 56, 110; 10, 18, 34, 50, 101, 152")
    add("--pretrained", action=BOOLEAN, default=False, help="start from ImageNet weights")
    add("--plain-epochs", type=count, help="(--epochs) of the baseline")
    add("--phase-two-epochs", type=count, help="(--epochs) over the memory bank and the rest")
    add("--feature-lr", type=number, help="(--lr) of the backbone")
    add("--plain-lr", type=number, help="(--lr)")
    add("--phase-two-lr", type=number, help="(--lr)")
    add("--schedule", choices=["step", "cosine"], help="of the learning rates")
    add("--milestones", type=fraction, nargs="*", default=[0.8, 0.9], help="of step, in [0, 1] of the epochs")
    add("--lr-gamma", type=number, default=0.01, help="what the rates are multiplied by at a step")
    add("--track-gradients", action=BOOLEAN, default=False, help="log Figure 1's cosines and norms")
    return parser.parse_args(argv)


# ---------------------------------------------------------------- class split, samplers

def phase_one_classes(class_counts, num_old=None):
    """Class ids of phase one [C1] and of the rest [C2], each from the most to the least frequent, ties by id.
    class_counts: [C]. num_old: C1; None: many and medium, at least 20 images. Raises ValueError."""
    counts = torch.as_tensor(class_counts)
    # appendix A. paper: 70 on CIFAR100-LT / here: its rule at all factors; 82 at 50, 70 at 100, 61 at 200
    chosen = int((~shot_groups(counts)["few"]).sum()) if num_old is None else num_old
    if not (2 if num_old is None else 1) <= chosen < len(counts):  # one class alone teaches nothing
        raise ValueError(f"phase one would have {chosen} of the {len(counts)} classes, phase two the others; "
                         f"choose --phase-one-classes between 1 and {len(counts) - 1}")
    return counts.argsort(descending=True, stable=True).tensor_split([chosen])


def progressive_probabilities(class_counts, progress):
    """p_j(t) = (1 - t/T) n_j / sum n + (t/T) / C (section 3.2.1): by instance first, by class at the end.
    class_counts: [C], images each. progress: t/T in [0, 1]. Returns [C], summing to 1. Raises ValueError."""
    counts = torch.as_tensor(class_counts).double()
    if counts.ndim != 1 or (counts < 0).any() or counts.sum() == 0 or not 0 <= progress <= 1:
        raise ValueError(f"must be counts, not all zero, and in [0, 1]; got {class_counts} and {progress}")
    return (1 - progress) * counts / counts.sum() + progress / len(counts)  # p_j(t)


def weighted_indices(targets, probabilities, generator):
    """Draw n images: a class by its probability, then the next of its shuffled cycle (paper: does not say).
    targets: class ids [n]; probabilities: [C], 0 for empty classes; on the CPU. Returns int64 [n]."""
    drawn = torch.multinomial(probabilities, len(targets), replacement=True, generator=generator)
    members = targets.argsort(stable=True).split(targets.bincount(minlength=len(probabilities)).tolist())
    slots = drawn.argsort(stable=True).split(drawn.bincount(minlength=len(probabilities)).tolist())
    indices = torch.empty(len(targets), dtype=torch.int64)
    for images, places in zip(members, slots):  # a class's images, and where in the epoch it was drawn
        if len(places):
            cycles = math.ceil(len(places) / len(images))
            shuffled = torch.rand(cycles, len(images), generator=generator).argsort(1)  # rows: permutations
            indices[places] = images[shuffled].flatten()[:len(places)]
    return indices


def select_exemplars(features, k):
    """The memory bank of one class, Eq. (2) to (5), s being the cosine. features: [n, D], normalised inside.
    k: images to choose, at least 1. Returns rows, all different, int64 [min(k, n)]. Raises ValueError."""
    if features.ndim != 2 or len(features) == 0 or k < 1:
        raise ValueError(f"features must be [n, D], n and k at least 1, got {list(features.shape)} and {k}")
    features = F.normalize(features.float(), dim=1)  # paper: as they are / here: of unit length
    center = features.mean(0)  # c_j
    query, chosen = center, []

    for _ in range(min(k, len(features))):
        similarity = features @ F.normalize(query, dim=0)
        similarity[chosen] = -math.inf  # paper: may choose an image twice / here: once
        chosen.append(similarity.argmax().item())  # Eq. (2), (5). paper: over X_1 / here: over class j
        memory = features[chosen]  # M_j
        p = (memory @ F.normalize(center, dim=0)).softmax(0)  # Eq. (3)
        z = p @ memory  # Eq. (4)
        query = center + (center - z)  # c_j + Delta, for Eq. (5)
    return torch.tensor(chosen, device=features.device)


# ---------------------------------------------------------------- losses

def memory_retentive_loss(old, new, temperature=0.1, similarity="cos"):
    """Eq. (6) to (8): how far each old node is from the new nodes it attends to. A node is an image.
    old, new: features of the same images under the frozen and the trained net [N, D], normalised inside; the
    gradient goes through `new` alone. similarity: "cos"; "neg-sq", minus the squared distance; "self", each
    node attends to itself alone: no graph. Returns the mean over old nodes, a scalar. Raises ValueError."""
    if old.shape != new.shape or old.ndim != 2 or not temperature > 0 or \
            similarity not in ("cos", "neg-sq", "self"):
        raise ValueError(f"must be [N, D], [N, D], above 0, cos, neg-sq or self; got {list(old.shape)}, "
                         f"{list(new.shape)}, {temperature}, {similarity}")
    # paper: features as they are / here: of unit length, because the classifier sees directions alone
    old, new = F.normalize(old.detach().float(), dim=1), F.normalize(new.float(), dim=1)
    cosines = old @ new.t()  # [old i, new j]
    s = 2 * cosines - 2 if similarity == "neg-sq" else cosines  # -||z_i - z^_j||^2 of unit vectors, or cos
    if similarity == "self":
        attention = torch.eye(len(s)).to(s)
    else:  # paper: no temperature / here: .1, as at 1 it is nearly uniform and draws all nodes to their mean
        attention = (s / temperature).softmax(1)  # Eq. (6): a_ji at [i, j]

    distances = torch.cdist(old, new, compute_mode="donot_use_mm_for_euclid_dist")  # 0 where they agree
    mu = (attention * distances).sum(1)  # Eq. (7), whose sum is meant over j
    return mu.mean()  # Eq. (8). paper: the sum / here: the mean, as in Eq. (9)'s other terms


def margin_loss(cosines, targets, num_old, margin=0.5, k=2):
    """L_intra of Eq. (9): an old sample's own cosine is to exceed its k largest phase-two ones by the margin.
    cosines: [N, C], classes 0..num_old-1 being phase one's; targets: class ids [N], in the same order. Mean
    over old samples x negatives, a scalar; 0 when the batch has no old sample. Raises ValueError."""
    if cosines.ndim != 2 or targets.shape != cosines.shape[:1] or not 0 < num_old < cosines.shape[1] or k < 1:
        raise ValueError(f"must be [N, C], [N], num_old in 1..C-1, k at least 1; got {list(cosines.shape)}, "
                         f"{list(targets.shape)}, {num_old}, {k}")
    # paper: every sample against any other class; m, K not given / here, as [L]: old against new; .5, 2
    is_old = (targets < num_old).float()
    positives = cosines.gather(1, targets[:, None])
    negatives = cosines[:, num_old:].topk(min(k, cosines.shape[1] - num_old), dim=1).values

    # paper: summed over K, divided by the batch / here, as [L]: the mean over K and over old samples
    hinge = (margin - positives + negatives).clamp(min=0).mean(1)
    return (hinge * is_old).sum() / is_old.sum().clamp(min=1)


# ---------------------------------------------------------------- net and optimiser

class AsyncNet(nn.Module):
    """Images [N, 3, H, W] -> (logits [N, C], features [N, D]). While `known` [C] leaves classes out, as in
    phase one, their rows of the classifier are not used and their logits are -inf."""

    def __init__(self, arch, num_classes, scale=10.0, image_size=32, pretrained=False):
        super().__init__()
        self.settings = dict(arch=arch, num_classes=num_classes, scale=scale, image_size=image_size)
        # paper: ResNets / here: without the last ReLU, as [L], in plain too, so that features can be negative
        self.backbone = build_backbone(arch, image_size, last_relu=False, pretrained=pretrained)
        # paper: a cosine one is an option, no scale / here: it is, in plain too; learnt from 10 ([L]: 1)
        self.classifier = CosineClassifier(self.backbone.feature_dim, num_classes, scale, learn_scale=True)
        self.register_buffer("known", torch.ones(num_classes, dtype=torch.bool))

    def forward(self, images):
        features = self.backbone(images)
        return self.classifier(features).masked_fill(~self.known, -math.inf), features


def new_net(run, name, classes):
    """A net that knows these classes; its first weights follow from --seed and its name."""
    args, C = run.args, run.data.num_classes
    torch.manual_seed(run.seed(name, "initialisation"))
    model = AsyncNet(args.arch, C, args.scale, run.data.image_size, args.pretrained)
    model.known.copy_(torch.isin(torch.arange(C), classes))
    return run.place(model)


def load_model(path, class_names=None, arch=None):
    """A saved net and what was saved with it (class_names, mean, std, ...), as common.folder.load_net."""
    return load_net(path, "async_lt", [AsyncNet], class_names, arch)


def sgd(run, model, lr):
    """The optimiser of both phases. base: a group's rate at the start; the backbone's is --feature-lr."""
    feature_lr = lr if run.args.feature_lr is None else run.args.feature_lr
    groups = [{"params": model.backbone.parameters(), "base": feature_lr},
              {"params": model.classifier.parameters(), "base": lr}]
    return torch.optim.SGD(groups, lr, momentum=0.9, weight_decay=run.args.weight_decay,
                           fused=run.device.type == "cuda")


def step_lr(progress, lr, milestones, gamma):
    """lr times gamma for every milestone reached. progress: a fraction of the epochs, in [0, 1)."""
    return lr * gamma ** sum(progress >= milestone for milestone in milestones)


def cosine_lr(progress, lr):
    """Half a cosine from lr to 0, without warm-up. progress: a fraction of the epochs, in [0, 1]."""
    return lr * 0.5 * (1 + math.cos(math.pi * progress))


def set_rates(args, optimizer, progress):
    """Every group's learning rate, by --schedule. progress: a fraction of the epochs."""
    for group in optimizer.param_groups:
        if args.schedule == "cosine":
            group["lr"] = cosine_lr(progress, group["base"])
        else:
            group["lr"] = step_lr(progress, group["base"], args.milestones, args.lr_gamma)


# ---------------------------------------------------------------- phase one, and plain

def train_phase_one(run, name, file, classes, epochs, lr, head):
    """Eq. (1) on the images of `classes`; of all: "Ours (plain)". head: class ids, for Figure 1 alone."""
    args, model = run.args, new_net(run, name, classes)
    forward, optimizer = run.compiled(model), sgd(run, model, lr)
    members = torch.isin(run.targets, classes).nonzero().flatten()  # X_1, or X

    # paper: augmentation not given / here: common/loader.py's "standard"; for files near Kang et al.'s
    for epoch in run.epochs(name, file, model, optimizer, epochs):
        model.train()
        if args.sampling == "instance":
            indices = members[torch.randperm(len(members), generator=epoch.generator)]
        else:  # paper: "could be" done in phase one, over all C / here: done, in plain too, over `classes`
            progress = epoch.number / max(1, epochs - 1)  # t/T, from 0 to 1
            p = torch.zeros(len(run.class_counts)).double()
            p[classes] = progressive_probabilities(run.class_counts[classes], progress)
            indices = members[weighted_indices(run.targets[members], p, epoch.generator)]

        for images, targets, share, ends_step in epoch.batches(indices):  # share: 1, or a rank's part
            with run.autocast():  # paper: precision not given / here: bf16 where the device computes it
                logits, _ = forward(images)
                loss = share * F.cross_entropy(logits, targets)  # Eq. (1). paper: the sum / here: the mean
            loss.backward()
            epoch.track(loss=loss)
            if ends_step:
                run.sum_gradients(model)
                set_rates(args, optimizer, epoch.progress)
                optimizer.step()
                optimizer.zero_grad()

        if args.track_gradients:
            epoch.log(**run.gradient_norms(model, classes, head))
        if epoch.is_scored:
            epoch.log(**run.scores(model))
    return model


# ---------------------------------------------------------------- phase two

def memory_bank(run, old_model, old):
    """M: indices of --memory-per-class training images of each phase-one class. old: class ids [C1]."""
    k = run.args.memory_per_class
    X_1 = torch.isin(run.targets, old).nonzero().flatten()
    features, targets, indices = run.features(old_model, X_1)
    bank = [indices[targets == c][select_exemplars(features[targets == c], k)] for c in old]
    if min(map(len, bank)) < k:
        say(f"note: a phase-one class with fewer than {k} images has all of them in the memory bank")
    return torch.cat(bank)


def train_phase_two(run, old_model, old, new):
    """Eq. (9) on the memory bank and all images of `new`. old, new: class ids [C1], [C2]. Returns the net."""
    args = run.args
    old_model.eval().requires_grad_(False)  # stays as it is, for G_old
    X_2 = torch.isin(run.targets, new).nonzero().flatten()
    D = torch.cat([memory_bank(run, old_model, old), X_2])  # indices of M and X_2

    # the phase-one net, with rows W_c^2: random ones, as phase one's weight decay shrank those it did not use
    model = copy.deepcopy(old_model).requires_grad_(True)
    model.known.fill_(True)
    model.classifier.weight.data[new] = new_net(run, "phase two", new).classifier.weight.data[new]
    if args.imprint:  # paper: their start is open / here: class means, as [L]
        features, targets, _ = run.features(old_model, X_2)
        model.classifier.imprint(features.to(run.device), targets.to(run.device), new, old)

    # paper: sqrt(C / C1) in section 5, sqrt(C1 / C2) in appendix A / here: the latter, Places-LT's 2.03
    lambda_ = args.lambda_scale * math.sqrt(len(old) / len(new))
    order = torch.cat([old, new]).to(run.device)  # as margin_loss wants it, old classes first
    place_of = order.argsort()  # class id -> its place in `order`
    epochs = args.phase_two_epochs or args.epochs
    lr = args.lr if args.phase_two_lr is None else args.phase_two_lr
    forward, optimizer = run.compiled(model), sgd(run, model, lr)

    for epoch in run.epochs("two phases", "model.pt", model, optimizer, epochs):
        model.train()
        indices = D[torch.randperm(len(D), generator=epoch.generator)]

        for images, targets, share, ends_step in epoch.batches(indices):
            with run.autocast():
                logits, features = forward(images)
                loss = F.cross_entropy(logits, targets)  # L_cls
                if args.margin:
                    cosines = logits / model.classifier.scale
                    loss = loss + margin_loss(cosines[:, order], place_of[targets], len(old))  # L_intra
                if args.retentive:
                    old_features = old_model.backbone(images)  # frozen: no gradient
                    # paper: the graph of D, in Algorithm 1 of a batch / here: of one rank's part of a batch
                    loss = loss + lambda_ * memory_retentive_loss(
                        old_features, features, args.temperature, args.graph_similarity)
                loss = share * loss  # Eq. (9)
            loss.backward()
            epoch.track(loss=loss)
            if ends_step:
                run.sum_gradients(model)
                set_rates(args, optimizer, epoch.progress)
                optimizer.step()
                optimizer.zero_grad()

        if args.track_gradients:
            epoch.log(**run.gradient_norms(model, order, old))
        if epoch.is_scored:
            epoch.log(**run.scores(model))
    return model


# ---------------------------------------------------------------- main

def main(args):
    does_plain, does_phases = args.plain is not False, not args.plain  # both where neither flag is given
    path, trained, old = args.phase_one_checkpoint, None, None
    with bad_input():  # whatever is wrong is found before anything is written
        if path and (args.plain or args.evaluate):
            raise ValueError("--plain and --evaluate have no phase two; leave out --phase-one-checkpoint")
        if args.graph_similarity == "self" and not args.retentive:
            raise ValueError("--graph-similarity self is a memory-retentive loss; leave out --no-retentive")
        run = Run("async_lt", args)
        if args.evaluate:
            return run.evaluate(load_model, Run.scores)

        C, counts = run.data.num_classes, run.class_counts
        if args.plain and counts.min() == counts.max():  # Figure 1's balanced set: "the same classes"
            counts = long_tail_counts(C, counts.max().item(), 100)
        if does_phases or args.track_gradients:
            old, new = phase_one_classes(counts, args.phase_one_classes)
        if path:
            trained, saved = load_model(path, run.data.class_names, args.arch)
            run.normalise_as(saved)
            if not torch.equal(trained.known.nonzero().flatten(), old.sort().values):
                raise ValueError(f"{path} was trained on other classes than the {len(old)} of phase one here")
        with first_rank_first():  # which downloads the weights
            build_backbone(args.arch, run.data.image_size, pretrained=args.pretrained)
        plain, first = [args.plain_epochs or args.epochs], [] if trained else [args.epochs]
        run.open(plain * does_plain + (first + [args.phase_two_epochs or args.epochs]) * does_phases)

    with run:
        if does_plain:
            name = "plain" if args.sampling == "progressive" else "plain, instance"
            lr = args.lr if args.plain_lr is None else args.plain_lr
            model = train_phase_one(run, name, "plain.pt", torch.arange(C), plain[0], lr, old)
            run.add(name, run.scores(model))
        if does_phases:
            old_model = run.place(trained) if trained else train_phase_one(
                run, "phase one", "phase_one.pt", old, args.epochs, args.lr, old)
            run.add("phase one", run.scores(old_model))
            model = train_phase_two(run, old_model, old, new)
            run.add("two phases", run.scores(model))
    return run.finish()


if __name__ == "__main__":
    main(parse_args())
