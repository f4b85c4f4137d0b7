"""Learning Binary Networks on Long-Tailed Distributions (CANDLE)
ICLR 2023 submission, OpenReview ZEXh0XyO2hh; later arXiv 2404.00285

Stage A calibrates a pre-trained teacher: its frozen encoder sees images in several resolutions, a module M
joins the maps, and a new classifier learns the long-tailed classes. Stage B distils it into a network with
1-bit weights and activations: its classifier follows the teacher's logits (L_KL), its encoder the logits and
the features (L_FS), in a balance lambda that is learnt by maximising what the encoder minimises.

    python candle.py                                                     # embedded images
    python candle.py --ablation                                          # Table 3's four rows
    python candle.py --export runs/candle_fashion_lt_seed0/student.pt    # 1-bit weights, for deployment
    torchrun --nproc_per_node 8 candle.py --dataset places_lt --data-dir /data/places

Expect (embedded images, 3 seeds; results/candle.md): baseline 67.0 +- 1.4, teacher 75.6, CANDLE 72.3 +- .2.
With --quick, on validation images: 70.3; --student-sampling class-balanced, which is ours: 72.2.

`paper:` marks a departure or a choice, results/candle.md lists the others. [D]: earlier public code of the
first author, caisarl76's fork of BalancedMetaSoftmax-Classification@5c1eabf.
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from common.augment import resize
from common.data import ImageFiles
from common.evaluate import add_gains_over_baseline, classifier_by_frequency, head_median_tail
from common.flags import BOOLEAN, Parser, count, number, part, positive, text
from common.folder import load_net
from common.pretrained import encoder_for, load_encoder
from common.ranks import bad_input
from common.resnet import ScaledLinear, tau_normalise
from common.run import Run
from common.student import NETS, Student, export, label_loss, map_shape, optimizer_for, projection, variant

# ---------------------------------------------------------------- recipes

PAPER = dict(  # section 4, A.5; 3.4: resolutions; calibration, evaluate_every, quick: ours
    arch="reactnet_a", student_width=1.0, student_resolution=224,  # paper: a ReActNet / here: [D]'s
    teacher="resnet152", teacher_weights="ImageNet-1K", resolutions=[128, 224, 480],
    epochs=400, batch_size=256, lr=0.01, weight_decay=0.0,  # paper: lr of most sets / here: of all
    calibration_epochs=30, calibration_lr=0.1, evaluate_every=10, augmentation="standard",
    quick=dict(epochs=30, calibration_epochs=15))
CIFAR = dict(PAPER, augmentation="resized")  # random resized crops, as [D] has for CIFAR too
# Table 2: one resolution. paper: an EfficientNet that knows ImageNet-21K / here: ImageNet-1K alone
LARGE = dict(PAPER, teacher="efficientnet_v2_m", resolutions=[224], evaluate_every=5)
FASHION = dict(  # all ours
    PAPER, arch="reactnet_18", student_width=0.25, student_resolution=32, teacher="resnet14", epochs=15,
    teacher_weights="embedded", resolutions=[16, 32, 48], calibration_epochs=5, batch_size=32,
    evaluate_every=5, quick=dict(epochs=5, calibration_epochs=2), smoothing=[0.1, 0], head_median=[0.3, 0.7])
RECIPES = {
    # smoothing: MiSLAS's by imbalance factor, or [D]'s; head_median: where these end (Table 8; [D])
    "fashion_lt": FASHION, "small": dict(FASHION, image_size=48),  # own images, which the teacher never saw
    "cifar10_lt": dict(CIFAR, smoothing={10: [0.1, 0], 50: [0.2, 0], 100: [0.3, 0]}, head_median=[0.3, 0.7]),
    "cifar100_lt": dict(CIFAR, smoothing={10: [0.2, 0], 50: [0.3, 0], 100: [0.4, 0.1]},
                        head_median=[36 / 100, 71 / 100]),
    "caltech101_lt": dict(PAPER, smoothing=[0.01, 0.01], head_median=[36 / 102, 72 / 102]),
    "cub200_lt": dict(PAPER, smoothing=[0.04, 0.01], head_median=[72 / 200, 142 / 200]),
    "stanford_dogs_lt": dict(PAPER, smoothing=[0.0, 0.03], head_median=[43 / 120, 85 / 120]),
    "stanford_cars_lt": dict(PAPER, smoothing=[0.0, 0.38], head_median=[70 / 196, 139 / 196]),
    "fgvc_aircraft_lt": dict(PAPER, smoothing=[0.0, 0.39], head_median=[36 / 100, 71 / 100]),
    "dtd_lt": dict(PAPER, smoothing=[0.01, 0.39], head_median=[14 / 47, 33 / 47]),
    "flowers102_lt": dict(PAPER, smoothing=[0.04, 0.04], head_median=[36 / 102, 72 / 102]),
    "fruits360_lt": dict(PAPER, smoothing=[0.0, 0.0], head_median=[7 / 24, 14 / 24]),
    "places_lt": dict(LARGE, smoothing=[0.4, 0.1], head_median=[131 / 365, 259 / 365]),
    "imagenet_lt": dict(LARGE, smoothing=[0.3, 0.0], head_median=[390 / 1000, 835 / 1000]),
    "inat18": dict(LARGE, smoothing=[0.3, 0.0], head_median=[842 / 8142, 4543 / 8142]),
}


def parse_args(argv=None):
    parser = Parser(__doc__, RECIPES)  # --dataset, --epochs, --lr, --resume, ...: common/flags.py
    add = parser.method
    add("--ablation", action=BOOLEAN, default=False, help="Table 3: four rows")
    add("--calibration", action=BOOLEAN, default=True, help="--no-calibration: Table 3's baseline alone")
    add("--baseline", action=BOOLEAN, default=True, help="train the baseline too, for the gains over it")
    add("--from-scratch", nargs="?", const="ce", choices=["ce", "tau-norm", "balanced-softmax"],
        help="a student of the labels alone, without a teacher (ce)")
    add("--arch", choices=NETS, help="of the student")
    add("--student-width", type=positive, help="factor of its channels")
    add("--student-resolution", type=count, help="pixels")
    add("--binarize", action=BOOLEAN, default=True, help="--no-binarize: its full-precision twin")
    add("--classifier", choices=["linear", "cosine"], default="linear", help="of the student (Table 9)")
    add("--student-optimizer", choices=["adam", "sgd"], default="adam", help="sgd: Figure 8")
    add("--student-sampling", choices=["instance", "class-balanced"], default="instance", help="stage B")
    add("--teacher", type=text, help="CIFAR ResNet (resnet56), torchvision's name of a net, or timm:NAME")
    add("--teacher-weights", type=text, metavar="FILE", help="its state dict, or: ImageNet-1K, embedded")
    add("--teacher-normalisation", type=number, nargs=6, metavar="X", help="mean, std of what it learnt from")
    add("--resolutions", type=count, nargs="+", help="that the teacher sees, in pixels")
    add("--base-resolution", type=count, help="that of them whose map the student learns (its own)")
    add("--smoothing", type=part, nargs=2, metavar=("HEAD", "TAIL"), help="of the labels, in calibration")
    add("--calibration-epochs", type=count, help="of stage A")
    add("--calibration-lr", type=number, help="at the first step of stage A")
    add("--balance", choices=["learned", "fixed"], default="learned", help="Eq. (4), or Eq. (1)")
    add("--fixed-lambda", type=part, default=0.5, help="of --balance fixed, and of the baseline")
    add("--balance-optimizer", choices=["sgd", "adam"], default="sgd", help="of lambda's network")
    add("--balance-lr", type=number, default=30.0, help="of lambda's network, over the run's steps together")
    add("--kl-reduction", choices=["mean", "batchmean"], default="batchmean", help="of L_KL")  # [D]: mean
    add("--direct-multi-resolution", action=BOOLEAN, default=False, help="to the student too (Figure 5)")
    add("--export", type=text, metavar="CHECKPOINT", help="write a saved student's 1-bit weights beside it")
    return parser.parse_args(argv)


# ---------------------------------------------------------------- samplers and losses

def equal_class_indices(targets, generator):
    """As many as images: every class once a round, in a new order; its images in shuffled cycles.

    targets: class ids [n]. generator: a CPU torch.Generator. Returns int64 [n]. Raises ValueError.
    """
    if targets.ndim != 1 or len(targets) == 0:
        raise ValueError(f"targets must be class ids in a vector, not empty, got {list(targets.shape)}")
    class_sizes = targets.unique(return_counts=True)[1].tolist()
    members = targets.argsort(stable=True).split(class_sizes)
    rounds, drawn = math.ceil(len(targets) / len(members)), []
    for images in members:
        cycles = torch.rand(math.ceil(rounds / len(images)), len(images), generator=generator).argsort(1)
        drawn.append(images[cycles].flatten()[:rounds])

    drawn = torch.stack(drawn, 1)  # [rounds, classes]
    order = torch.rand(drawn.shape, generator=generator).argsort(1)  # of the classes, anew in each round
    return drawn.gather(1, order).flatten()[:len(targets)]


def label_aware_smoothing_loss(logits, targets, class_counts, head, tail, shape="concave"):
    """Stage A's loss, MiSLAS's (CVPR 2021, section 3.3): cross-entropy whose labels are smoothed by e_y.

    logits: [N, C]; targets: class ids [N]; class_counts: [C]. head, tail: e of the largest and the smallest
    class, in [0, 1); shape: how e changes between. Returns a scalar. Raises ValueError.
    """
    counts = torch.as_tensor(class_counts, device=logits.device).float()
    shapes = [list(x.shape) for x in (logits, targets, counts)]
    if not (0 <= head < 1 and 0 <= tail < 1) or shape not in ("concave", "linear", "convex") or \
            logits.ndim != 2 or shapes[1:] != [shapes[0][:1], shapes[0][1:]]:
        raise ValueError(f"must be [N, C], [N], [C], in [0, 1), concave, linear or convex; got {shapes}, "
                         f"{head}, {tail}, {shape!r}")

    span = counts.max() - counts.min()
    x = torch.where(span > 0, (counts - counts.min()) / span.clamp(min=1), torch.ones_like(counts))
    rise = {"concave": (math.pi / 2 * x).sin(), "linear": x,
            "convex": 1 + (1.5 * math.pi + math.pi / 2 * x).sin()}[shape]  # 0 in the tail, 1 in the head
    e = (tail + (head - tail) * rise)[targets]
    log_p = logits.float().log_softmax(1)
    nll = -log_p.gather(1, targets[:, None]).squeeze(1)
    return ((1 - e) * nll - e * log_p.mean(1)).mean()  # e: over all C, as MiSLAS's code; its paper: C - 1


def distillation_kl(student_logits, teacher_logits, temperature=2.0, reduction="mean"):
    """L_KL: KL(teacher || student). logits: [N, C]. reduction: "mean" over N and C, or "batchmean". paper:
    temperature open / here: 2, no factor of its square, as [D]. Returns a scalar. Raises ValueError."""
    given = [list(student_logits.shape), list(teacher_logits.shape), temperature, reduction]
    if given[0] != given[1] or len(given[0]) != 2 or not temperature > 0 or \
            reduction not in ("mean", "batchmean"):
        raise ValueError(f"must be [N, C] twice, a positive temperature, mean or batchmean; got {given}")
    log_p = (teacher_logits.float() / temperature).log_softmax(1)
    log_q = (student_logits.float() / temperature).log_softmax(1)
    kl = log_p.exp() * (log_p - log_q)
    return kl.mean() if reduction == "mean" else kl.sum(1).mean()


def feature_similarity_loss(student_map, teacher_map):
    """L_FS: mean of 2 (1 - cos) of the flattened maps [N, D, h, w], the squared distance of unit vectors.
    paper: "cosine distance" / here: twice it, before pooling, as [D]. Returns a scalar. Raises ValueError."""
    if student_map.shape != teacher_map.shape or student_map.ndim != 4:
        raise ValueError(f"maps must be [N, D, h, w], got {[*student_map.shape]} and {[*teacher_map.shape]}")
    cosine = F.cosine_similarity(student_map.float().flatten(1), teacher_map.float().flatten(1), dim=1)
    return 2 * (1 - cosine).mean()


# ---------------------------------------------------------------- what the paper adds to a backbone

class LossBalance(nn.Module):
    """Atten_phi, Eq. (3), A.5: scalars L_KL and L_FS, detached inside -> lambda in (0, 1)."""

    def __init__(self, hidden=(18, 34, 50)):  # paper: "expanding by 16" / here: added, not multiplied
        super().__init__()
        layers = [nn.Sequential(nn.Linear(a, b), nn.LeakyReLU()) for a, b in zip((2, *hidden), hidden)]
        self.layers = nn.Sequential(*layers, nn.Linear(hidden[-1], 1))

    def forward(self, kl, fs):
        losses = torch.stack([kl.detach(), fs.detach()]).float()
        with torch.autocast(losses.device.type, enabled=False):  # bf16 would round lambda to 1
            return self.layers(losses).sigmoid().squeeze(0)


class SizeInterpolationConcat(nn.Module):
    """M, A.5: maps [N, teacher_dim, h_r, w_r], one a resolution -> joined [N, width, side, side]. own: the
    slice of the base resolution, which the student's map is compared with."""

    def __init__(self, teacher_dim, student_dim, resolutions, base_resolution, side):
        super().__init__()
        # paper: 1x1 convolutions, all to the student's width / here: batch norm and LeakyReLU behind, the
        # other resolutions to half of it, as [D], utils/feature_similarity.py
        widths = [student_dim if r == base_resolution else student_dim // 2 for r in resolutions]
        self.convs = nn.ModuleList(nn.Sequential(nn.Conv2d(teacher_dim, width, 1, bias=False),
                                                 nn.BatchNorm2d(width), nn.LeakyReLU()) for width in widths)
        if len(resolutions) == 1:  # paper: open / here: g reads the map as it is
            widths, self.convs = [teacher_dim], nn.ModuleList([nn.Identity()])
        place = resolutions.index(base_resolution)
        self.own = slice(sum(widths[:place]), sum(widths[:place + 1]))
        self.width, self.side = sum(widths), side  # side: of the student's map

    def forward(self, maps):
        maps = [conv(x) for conv, x in zip(self.convs, maps, strict=True)]
        # paper: nearest / here: 8 to 4 and the like by means: 66.5, not 64.3 (results/candle.md)
        modes = ["nearest" if x.shape[-1] % self.side else "area" for x in maps]
        return torch.cat([F.interpolate(x, self.side, mode=mode) for x, mode in zip(maps, modes)], 1)


class Teacher(nn.Module):
    """Frozen encoder e_T (it has no training mode), module M, classifier g. forward: images of any side ->
    (logits [N, C], pooled features). settings: what rebuilds it."""

    def __init__(self, arch, num_classes, resolutions, base_resolution, student_dim, side, affine=None,
                 encoder=None):
        super().__init__()
        self.settings = dict(arch=arch, num_classes=num_classes, resolutions=resolutions, affine=affine,
                             base_resolution=base_resolution, student_dim=student_dim, side=side)
        self.encoder = encoder or load_encoder(arch, affine=affine)
        self.join = SizeInterpolationConcat(self.encoder.feature_dim, student_dim, resolutions,
                                            base_resolution, side)
        self.classifier = ScaledLinear(self.join.width, num_classes)  # paper: linear / here: scaled, as [D]

    def outputs(self, images):
        """What `forward` returns, and the map [N, D, side, side] that a student is compared with."""
        joined = self.join([self.encoder(resize(images, r)) for r in self.settings["resolutions"]])
        features = joined.mean((2, 3))
        return self.classifier(features), features, joined[:, self.join.own]

    def forward(self, images):
        return self.outputs(images)[:2]


def load_model(path, class_names=None):
    """A saved net in eval mode, on the CPU, and what was saved with it. Raises ValueError."""
    return load_net(path, "candle", [Teacher, Student], class_names)


# ---------------------------------------------------------------- schedule; stage A: the teacher

def cosine_lr(progress, lr):
    """Half a cosine from lr to 0, without warm-up. progress: a fraction of the epochs, in [0, 1]."""
    return lr * 0.5 * (1 + math.cos(math.pi * progress))


def new_teacher(run, encoder, resolutions):
    """A teacher that is not calibrated yet."""
    args = run.args
    torch.manual_seed(run.seed("teacher", resolutions, "initialisation"))
    student_dim, side = map_shape(args.arch, args.student_width, args.student_resolution)
    return run.place(Teacher(args.teacher, run.data.num_classes, resolutions, args.base_resolution,
                             student_dim, side, encoder.affine, encoder))


def calibrate(run, file, teacher):
    """Stage A: M and g learn, by class-balanced sampling and label-aware smoothing."""
    args, counts = run.args, run.class_counts.to(run.device)
    name = f"teacher, {' '.join(map(str, teacher.settings['resolutions']))}"
    # paper: "following MiSLAS" (second stage: 10 epochs, lr .005 to .05) / here: 30 at .1, as g is new
    optimizer = torch.optim.SGD([p for p in teacher.parameters() if p.requires_grad], args.calibration_lr,
                                momentum=0.9, weight_decay=5e-4)

    for epoch in run.epochs(name, file, teacher, optimizer, args.calibration_epochs, args.augmentation):
        teacher.train()
        indices = equal_class_indices(run.targets, epoch.generator)
        for images, targets, share, ends_step in epoch.batches(indices):
            with run.autocast():
                loss = label_aware_smoothing_loss(teacher(images)[0], targets, counts, *args.smoothing)
            (share * loss).backward()
            epoch.track(loss=share * loss)
            if ends_step:
                run.sum_gradients(teacher)
                optimizer.param_groups[0]["lr"] = cosine_lr(epoch.progress, args.calibration_lr)
                optimizer.step()
                optimizer.zero_grad()
        if epoch.is_scored:
            epoch.log(**assess(run, teacher))
    run.add(name, assess(run, teacher))
    return teacher.eval().requires_grad_(False)


# ---------------------------------------------------------------- stage B: the student

def new_parts(run, teacher, row):
    """What a row of Table 3 trains: student, connector, for "learned" Atten_phi. All rows start alike."""
    args = run.args
    torch.manual_seed(run.seed("student", "initialisation"))
    student = Student(args.arch, run.data.num_classes, args.student_width, args.student_resolution,
                      args.binarize, args.classifier)
    if args.compile:
        student.net.blocks.compile()

    connector = nn.Identity()
    if teacher and len(teacher.settings["resolutions"]) == 1:  # paper: open / here: a 1x1 convolution, as [D]
        connector = projection(student.net.feature_dim, teacher.encoder.feature_dim)
    atten = [LossBalance()] if row == "learned" else []
    return run.place(nn.ModuleList([student, connector, *atten]))


def adversarial_losses(kl_of, fs, features, classifier, atten):
    """Eq. (4) in one backward pass: three losses, each with a gradient for its own player alone; L_KL;
    lambda. kl_of: logits -> L_KL; fs: L_FS; features: pooled; atten: Atten_phi."""
    classifier.requires_grad_(False)  # theta_c is a constant for the encoder
    kl = kl_of(classifier(features))
    classifier.requires_grad_(True)
    lam = atten(kl, fs)  # Eq. (3)

    encoder_loss = (1 - lam.detach()) * kl + lam.detach() * fs  # min over theta_e
    balance_loss = -((1 - lam) * kl.detach() + lam * fs.detach())  # max over phi
    classifier_loss = kl_of(classifier(features.detach()))  # min over theta_c
    return [encoder_loss, balance_loss, classifier_loss], kl, lam


def objective(run, parts, teacher, images, targets, row):
    """What a row minimises on a batch: losses that are added, and what of it is logged. row: "fixed", Eq.
    (1); "learned", Eq. (4); "labels": Table 3's baseline, or without a teacher from scratch."""
    args, (student, connector, *atten) = run.args, parts
    student_map = student.encode(images)
    features, classifier = student_map.mean((2, 3)), student.classifier
    if teacher is None:
        loss = label_loss(args.from_scratch, classifier(features), targets, run.class_counts)
        return [loss], {"loss": loss}

    teacher_logits, _, teacher_map = teacher.outputs(images)
    fs = feature_similarity_loss(connector(student_map), teacher_map)
    kl_of = lambda logits: distillation_kl(logits, teacher_logits, reduction=args.kl_reduction)
    if args.direct_multi_resolution:
        features = student.direct_features(features, images, args.resolutions)  # Figure 5

    if row == "learned":
        losses, kl, lam = adversarial_losses(kl_of, fs, features, classifier, *atten)
        return losses, {"loss": losses[0], "kl": kl, "fs": fs, "lambda": lam}

    logits, key = classifier(features), "ce" if row == "labels" else "kl"
    # paper: baseline "without calibrating" / here: g knows nothing then, so labels in L_KL's place
    other = F.cross_entropy(logits, targets) if row == "labels" else kl_of(logits)
    lam = torch.full_like(fs, args.fixed_lambda)  # paper: open / here: .5, as [D]
    loss = (1 - lam) * other + lam * fs  # Eq. (1)
    return [loss], {"loss": loss, key: other, "fs": fs, "lambda": lam}


def train_student(run, name, file, teacher, row):
    """Stage B: a row of Table 3, or a student from scratch. Returns it."""
    args, parts = run.args, new_parts(run, teacher, row)
    student, name = parts[0], name + variant(args)
    optimizers = [optimizer_for(args, parts[:2], run.device)]  # Adam without weight decay (3.1)
    # paper: lr of phi not given / here: divided by the steps, so that lambda goes as far in short runs
    steps = args.epochs * math.ceil(len(run.targets) / args.batch_size)
    kind = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}[args.balance_optimizer]
    optimizers += [kind(phi.parameters(), args.balance_lr / steps) for phi in parts[2:]]

    for epoch in run.epochs(name, file, (student, parts), optimizers, args.epochs, args.augmentation):
        parts.train()
        indices = torch.randperm(len(run.targets), generator=epoch.generator)
        if args.student_sampling == "class-balanced":
            indices = equal_class_indices(run.targets, epoch.generator)
        for images, targets, share, ends_step in epoch.batches(indices):
            with run.autocast():
                losses, terms = objective(run, parts, teacher, images, targets, row)
            (share * sum(losses)).backward()  # paper: min, max in turn / here: together
            epoch.track(**{key: share * value for key, value in terms.items()})
            if ends_step:
                run.sum_gradients(parts)
                for optimizer in optimizers:
                    optimizer.param_groups[0]["lr"] = cosine_lr(epoch.progress, optimizer.defaults["lr"])
                    optimizer.step()
                    optimizer.zero_grad()
        if row == "learned":
            epoch.log(lambdas=epoch.curve("lambda"))  # Figure 6
        if epoch.is_scored:
            epoch.log(**assess(run, student))
    run.add(name, assess(run, student))
    return student


# ---------------------------------------------------------------- main

def assess(run, model):
    """A net's scores, also by head, median and tail; its classifier from the head to the tail."""
    result, counts = run.scores(model), run.data.class_counts
    return {**result, **head_median_tail(result["per_class_accuracy"], counts, run.args.head_median),
            **classifier_by_frequency(model.classifier, counts)}


def check_args(args):
    """Choose the smoothing, refuse flags that contradict one another. Raises ValueError."""
    if isinstance(args.smoothing, dict):  # that of the nearest imbalance factor that MiSLAS lists
        factor = args.imb_factor or 100
        args.smoothing = args.smoothing[min(args.smoothing, key=lambda known: abs(known - factor))]
    base = args.base_resolution = args.base_resolution or args.student_resolution  # paper: the latter
    if base not in args.resolutions or len(set(args.resolutions)) < len(args.resolutions):
        raise ValueError(f"--resolutions must differ and hold the base ({base}), got {args.resolutions}")
    if args.ablation and (len(args.resolutions) == 1 or args.balance == "fixed" or not args.baseline):
        raise ValueError("--ablation trains all rows itself; it needs several --resolutions")
    if args.ablation + bool(args.from_scratch) + (not args.calibration) > 1 or args.evaluate and args.export:
        raise ValueError("choose one of --ablation, --from-scratch, --no-calibration; --evaluate or --export")


def main(args):
    with bad_input():  # whatever is wrong is found before anything is written
        check_args(args)
        if args.export:
            return export(args, lambda: Run("candle", args).evaluate(load_model, assess))
        run = Run("candle", args)
        if args.evaluate:
            return run.evaluate(load_model, assess)
        if isinstance(run.data.train, ImageFiles) and run.data.image_size > 64:
            run.data.image_size = max(args.resolutions)  # decoded once for all of them
        map_shape(args.arch, args.student_width, args.student_resolution)  # fails now if it cannot be built
        if not args.from_scratch:
            encoder = encoder_for(run.data, args.teacher, args.teacher_weights,
                                  args.teacher_normalisation, min(args.resolutions))
        A, B, both = [args.calibration_epochs], [args.epochs], args.calibration and not args.from_scratch
        run.open(B * args.baseline + (A + B + B) * args.ablation + A + B if both else B)

    with run:
        if args.from_scratch:
            student = train_student(run, "from scratch", "student.pt", None, "labels")
            if args.from_scratch == "tau-norm":
                tau_normalise(student.classifier)
                run.add("from scratch, tau-normalised", assess(run, student))
        elif args.baseline or not args.calibration:  # Table 3, first row
            teacher = new_teacher(run, encoder, [args.base_resolution]).eval().requires_grad_(False)
            file = "baseline.pt" if args.calibration else "student.pt"
            train_student(run, "baseline", file, teacher, "labels")
        if args.ablation:  # second, third. paper: their teacher is open / here: of one resolution
            teacher = calibrate(run, "teacher_single.pt", new_teacher(run, encoder, [args.base_resolution]))
            train_student(run, "calibrate & distill", "calibrate_distill.pt", teacher, "fixed")
            train_student(run, "learned balance", "learned_balance.pt", teacher, "learned")
        if both:  # last row: CANDLE
            teacher = calibrate(run, "teacher.pt", new_teacher(run, encoder, args.resolutions))
            name = "candle" + ", fixed balance" * (args.balance == "fixed")
            train_student(run, name, "student.pt", teacher, args.balance)
        add_gains_over_baseline(run.stages)  # Figures 9 to 11
    return run.finish()


if __name__ == "__main__":
    main(parse_args())
