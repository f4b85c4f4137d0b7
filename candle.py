"""CANDLE: Learning Binary Networks on Long-Tailed Distributions
(ICLR 2023 submission, OpenReview ZEXh0XyO2hh; later arXiv 2404.00285; its code is not public. [D]: earlier
public code of its first author.)

Stage A calibrates an off-the-shelf teacher: its frozen encoder sees images in several resolutions, a small
module joins the maps, and a new classifier learns the long-tailed classes. Stage B distils it into a network
with 1-bit weights and activations: the student's classifier follows the teacher's logits, its encoder the
logits and the features, in a balance that is learnt by maximising what the encoder minimises.

Where we depart, or had to choose:
- paper: lambda = Atten(L_KL, L_FS), an MLP "expanding by 16 per layer starting at 2" / here: widths
  2-18-34-50-1, because the other reading, times 16, has 4 million weights for two numbers; its inputs are
  batch means without gradient, as [D].
- paper: reduction of L_KL open / here: mean over batch and classes, T = 2, as [D], because lambda can rise to
  1 (Figure 6) only while L_FS > L_KL; --kl-reduction batchmean sums over the classes.
- paper: L_FS is the "cosine distance" / here: 2 (1 - cos) of the maps before pooling, as [D].
- paper: min and max in turn / here: one backward pass for all three players of Eq. (4), their gradients taken
  at the same weights; lambda has its own learning rate, 1e-3 as [D].
- paper: lambda of Eq. (1) open / here: .5, as [D].
- paper: all 1x1 convolutions of M have the student's width / here: those of the other resolutions half of it,
  each with batch norm and LeakyReLU, as [D]; the teacher's new classifier has learnable factors s, as [D].
- paper: where single-resolution rows match features is open / here: a 1x1 convolution behind the student
  takes its map to the teacher's width, as [D]; with several resolutions the student's own map is compared.
- paper: the ablation's rows have one teacher each or in common, open / here: two, calibrated alike, because a
  classifier of three resolutions cannot read the features of one.
- paper: baseline "without calibrating with feature distillation" / here: labels and L_FS, half each: our
  reading; without calibration there is no teacher classifier to follow.
- paper: calibration's schedule open / here: SGD as MiSLAS's second stage; smoothing factors are MiSLAS's for
  CIFAR and [D]'s elsewhere; samples are class-balanced, each class exactly as often.
- paper: M resizes maps to the nearest cell / here: where a map's side is a multiple (8 to 4, of small nets)
  by means, because the nearest of four cells is hard to predict (results/candle.md).
- [D]: a crop for each resolution, on CIFAR with one resolution no crop / here: one crop and flip in every
  row, resized on the device; random resized crops from .2 of the area on for CIFAR, from .05 for image files
  ([D]: .08), and 4-pixel padded crops for the embedded images; ImageNet's mean and deviation for files.
- paper: ImageNet-21K's EfficientNet teaches the large sets / here: torchvision's EfficientNetV2-M, which
  knows ImageNet-1K alone; --teacher-weights takes others of that shape.
- paper: cosine classifier (Table 9) not described / here: its scale is learnt, from 10.
- ReActNet: weights start at rand * .001 / here: as Conv2d's, because batch norm's epsilon is comparable to
  the variance that such small weights leave.
- Figure 5's student with all resolutions is not described / here: its pooled features are their mean;
  for its costs alone, as it is scored at its own resolution.
- Under torchrun and --grad-accumulation lambda belongs to one rank's part of a batch.

    python candle.py                                                     # embedded images
    python candle.py --ablation                                          # Table 3's four rows
    python candle.py --export runs/candle_fashion_lt_seed0/student.pt    # 1-bit weights, for deployment
    python candle.py --dataset cifar100_lt
    torchrun --nproc_per_node 8 candle.py --dataset places_lt --data-dir /data/places

What to expect (last epoch, all classes; results/candle.md): embedded images, 3 seeds: baseline 67.2 +- 1.4,
calibrate & distill 68.3 +- .2, with learned balance 66.0 +- .4, CANDLE 68.1 +- .8, its teacher 75.8 +- .2.
That teacher, made without labels, is weak, and --balance fixed (71.3 +- 1.6), which lets the encoder see its
logits, is better. With a teacher that knows the objects: baseline 70.0 +- 1.3, then 82.1 +- .7, 82.5 +- .2
and 81.2 +- .8. 100 classes of Tiny-ImageNet, 8 epochs, 1 seed: baseline 12.8 (rarest classes .3), CANDLE
11.2 (9.6).
"""
import argparse
import math
import time
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from common import runtime
from common.data import ASSETS, ImageFiles, image_side, load
from common.evaluate import Diverged, classifier_by_frequency, head_median_tail, predict, scores, table
from common.loader import UnreadableImage, every_image, make_loader, resize, split_batches
from common.reactnet import ReActNet18, ReActNetA, pack, unpack
from common.resnet import CosineClassifier, build_encoder

# ---------------------------------------------------------------- recipes

RECIPES = {name: {  # section 4, A.5: epochs, batch, lr, weight decay; 3.4: resolutions; calibration: ours
    "arch": "reactnet_a", "student_width": 1.0, "student_resolution": 224, "teacher": "resnet152",
    "teacher_weights": "ImageNet-1K", "resolutions": [128, 224, 480], "epochs": 400, "batch_size": 256,
    "lr": 0.01, "weight_decay": 0.0, "calibration_epochs": 30, "calibration_lr": 0.1, "evaluate_every": 10,
    "augmentation": "standard", "quick": dict(epochs=30, calibration_epochs=5), **own} for name, own in {
        # head_median: where head and median end (Table 8; [D]), as fractions of the classes
        "fashion_lt": dict(  # all ours
            arch="reactnet_18", student_width=0.25, student_resolution=32, teacher="resnet14",
            teacher_weights="embedded", resolutions=[16, 32, 48], smoothing=[0.1, 0.0], epochs=15,
            batch_size=32, calibration_epochs=5, evaluate_every=5, head_median=[3 / 10, 7 / 10],
            quick=dict(epochs=5, calibration_epochs=2)),
        # smoothing [head, tail]: MiSLAS's for CIFAR, by imbalance factor; [D]'s elsewhere
        # resized: random resized crops, as [D] has for CIFAR too
        "cifar10_lt": dict(augmentation="resized", head_median=[3 / 10, 7 / 10],
                           smoothing={10: [0.1, 0.0], 50: [0.2, 0.0], 100: [0.3, 0.0]}),
        "cifar100_lt": dict(augmentation="resized", head_median=[36 / 100, 71 / 100],
                            smoothing={10: [0.2, 0.0], 50: [0.3, 0.0], 100: [0.4, 0.1]}),
        "caltech101_lt": dict(smoothing=[0.01, 0.01], head_median=[36 / 102, 72 / 102]),
        "cub200_lt": dict(smoothing=[0.04, 0.01], head_median=[72 / 200, 142 / 200]),
        "stanford_dogs_lt": dict(smoothing=[0.0, 0.03], head_median=[43 / 120, 85 / 120]),
        "stanford_cars_lt": dict(smoothing=[0.0, 0.38], head_median=[70 / 196, 139 / 196]),
        "fgvc_aircraft_lt": dict(smoothing=[0.0, 0.39], head_median=[36 / 100, 71 / 100]),
        "dtd_lt": dict(smoothing=[0.01, 0.39], head_median=[14 / 47, 33 / 47]),
        "flowers102_lt": dict(smoothing=[0.04, 0.04], head_median=[36 / 102, 72 / 102]),
        "fruits360_lt": dict(smoothing=[0.0, 0.0], head_median=[7 / 24, 14 / 24]),
        # Table 2: another teacher, one resolution
        "places_lt": dict(teacher="efficientnet_v2_m", resolutions=[224], evaluate_every=5,
                          smoothing=[0.4, 0.1], head_median=[131 / 365, 259 / 365]),
        "imagenet_lt": dict(teacher="efficientnet_v2_m", resolutions=[224], evaluate_every=5,
                            smoothing=[0.3, 0.0], head_median=[390 / 1000, 835 / 1000]),
        "inat18": dict(teacher="efficientnet_v2_m", resolutions=[224], evaluate_every=5,
                       smoothing=[0.3, 0.0], head_median=[842 / 8142, 4543 / 8142]),
    }.items()}
EMBEDDED = {"embedded": ASSETS / "fashion_teacher.pt"}
NETS = {"reactnet_a": ReActNetA, "reactnet_18": ReActNet18}


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
    add("--teacher", help="torchvision's name of a convolutional net, or a CIFAR ResNet (resnet14)")
    add("--teacher-weights", metavar="FILE", help="its state dict, or: ImageNet-1K, embedded")
    add("--resolutions", type=int, nargs="+", help="that the teacher sees, in pixels")
    add("--smoothing", type=float, nargs=2, metavar=("HEAD", "TAIL"), help="of the labels, in calibration")
    add("--calibration-epochs", type=int, help="of stage A")
    add("--calibration-lr", type=float, help="at the first step of stage A")
    add("--ablation", action=boolean, default=False, help="Table 3: four rows")
    add("--calibration", action=boolean, default=True, help="--no-calibration: Table 3's baseline alone")
    add("--baseline", action=boolean, default=True, help="train the baseline too, for the gains over it")
    add("--from-scratch", action=boolean, default=False, help="a student of labels alone (Figures 1, 2, 8)")
    add("--balance", choices=["learned", "fixed"], default="learned", help="Eq. (4), or Eq. (1)")
    add("--fixed-lambda", type=float, default=0.5, help="of --balance fixed, and of the baseline")
    add("--balance-lr", type=float, default=1e-3, help="of lambda's network")
    add("--kl-reduction", choices=["mean", "batchmean"], default="mean", help="or summed over classes")
    add("--direct-multi-resolution", action=boolean, default=False, help="to the student too (Figure 5)")
    add = parser.add_argument_group("optimisation").add_argument
    add("--arch", choices=NETS, help="of the student")
    add("--student-width", type=float, help="factor of its channels")
    add("--student-resolution", type=int, help="pixels; one of --resolutions")
    add("--binarize", action=boolean, default=True, help="--no-binarize: its full-precision twin")
    add("--classifier", choices=["linear", "cosine"], default="linear", help="of the student (Table 9)")
    add("--student-optimizer", choices=["adam", "sgd"], default="adam", help="sgd: of lambda too (Figure 8)")
    add("--epochs", type=int, help="of stage B, of the baseline, and from scratch")
    add("--batch-size", type=int, help="global, over all ranks")
    add("--lr", type=float, help="at the first step, for the given batch size")
    add("--weight-decay", type=float, help="on all of the student's parameters")
    add("--grad-accumulation", type=int, default=1, help="parts that a rank's batch is cut into")
    add("--sync-bn", action=boolean, default=False, help="batch norm over all ranks (GPUs)")
    add("--amp", action=boolean, default=True, help="bf16 where the device computes it")
    add("--compile", action=boolean, default=False, help="torch.compile the trained net")
    add = parser.add_argument_group("run").add_argument
    add("--seed", type=int, default=0, help="initialisation, sampling, augmentation")
    add("--quick", action=boolean, default=False, help="the same method on a short schedule")
    add("--evaluate", metavar="CHECKPOINT", help="score a saved model, train nothing")
    add("--export", metavar="CHECKPOINT", help="write a saved student with 1-bit weights beside it")
    add("--evaluate-every", type=int, help="epochs between evaluations; the last epoch is always evaluated")
    add("--device", default="auto", help="cpu, cuda, cuda:1, mps")
    add("--time-limit", type=float, metavar="MINUTES", help="stop after a step; --resume goes on")
    add("--resume", action=boolean, default=False, help="continue what is in --out, or start")
    add("--out", help="(runs/candle_<dataset>_seed<seed>)")
    args = runtime.parse_with_recipe(parser, RECIPES, image_side, argv)
    if isinstance(args.smoothing, dict):  # that of the nearest imbalance factor that MiSLAS lists
        args.smoothing = args.smoothing[min(args.smoothing, key=lambda f: abs(f - (args.imb_factor or 100)))]
    return args


# ---------------------------------------------------------------- samplers and losses

def class_balanced_indices(targets, generator):
    """As many draws as images: every class once a round, in a new order; its images in a shuffled cycle.

    targets: class ids [n]. generator: a CPU torch.Generator. Returns int64 [n]. Raises ValueError. MiSLAS
    (CVPR 2021) draws four images of a class in a row."""
    if targets.ndim != 1 or len(targets) == 0:
        raise ValueError(f"targets must be class ids in a vector, not empty, got {list(targets.shape)}")
    members = targets.argsort(stable=True).split(targets.unique(return_counts=True)[1].tolist())
    rounds, drawn = math.ceil(len(targets) / len(members)), []
    for images in members:
        cycles = torch.rand(math.ceil(rounds / len(images)), len(images), generator=generator).argsort(1)
        drawn.append(images[cycles].flatten()[:rounds])
    drawn = torch.stack(drawn, 1)  # [rounds, classes]
    return drawn.gather(1, torch.rand(drawn.shape, generator=generator).argsort(1)).flatten()[:len(targets)]


def label_aware_smoothing_loss(logits, targets, class_counts, head, tail, shape="concave"):
    """Stage A's loss, MiSLAS's (CVPR 2021, section 3.3): cross-entropy whose labels are smoothed by e_y.

    logits: [N, C]; targets: class ids [N]; class_counts: [C]. head, tail: e of the largest and the smallest
    class, in [0, 1), spread over all C; shape: how e grows between them with the count; equal counts all have
    e = head. Returns the mean, a scalar. Raises ValueError."""
    if not (0 <= head < 1 and 0 <= tail < 1) or shape not in ("concave", "linear", "convex"):
        raise ValueError(f"smoothing must lie in [0, 1), its shape be concave, linear or convex; got {head}, "
                         f"{tail} and {shape!r}")
    counts = torch.as_tensor(class_counts, device=logits.device).float()
    if logits.ndim != 2 or targets.shape != logits.shape[:1] or counts.shape != logits.shape[1:]:
        raise ValueError("logits must be [N, C], targets [N], class_counts [C], got "
                         f"{list(logits.shape)}, {list(targets.shape)} and {list(counts.shape)}")
    span = counts.max() - counts.min()
    x = torch.where(span > 0, (counts - counts.min()) / span.clamp(min=1), torch.ones_like(counts))
    rise = {"concave": (math.pi / 2 * x).sin(), "linear": x,
            "convex": 1 + (1.5 * math.pi + math.pi / 2 * x).sin()}[shape]  # 0 in the tail, 1 in the head
    e = (tail + (head - tail) * rise)[targets]
    log_p = logits.float().log_softmax(1)
    nll = -log_p.gather(1, targets[:, None]).squeeze(1)
    return ((1 - e) * nll - e * log_p.mean(1)).mean()  # -log_p.mean: all C classes alike


def distillation_kl(student_logits, teacher_logits, temperature=2.0, reduction="mean"):
    """L_KL, KL(teacher || student) of softmaxes at a temperature, without a factor T^2. logits: [N, C].
    reduction: "mean" over batch and classes, or "batchmean". Returns a scalar. Raises ValueError."""
    shapes = [list(logits.shape) for logits in (student_logits, teacher_logits)]
    known = reduction in ("mean", "batchmean")
    if shapes[0] != shapes[1] or len(shapes[0]) != 2 or not temperature > 0 or not known:
        raise ValueError("logits must both be [N, C], temperature positive, reduction mean or batchmean; got "
                         f"{shapes}, {temperature} and {reduction!r}")
    log_p, log_q = ((z.float() / temperature).log_softmax(1) for z in (teacher_logits, student_logits))
    kl = log_p.exp() * (log_p - log_q)
    return kl.mean() if reduction == "mean" else kl.sum(1).mean()


def feature_similarity_loss(student_map, teacher_map):
    """L_FS, mean of 2 (1 - cos) of the flattened maps: the squared distance of unit vectors. maps: [N, D, h,
    w]. Returns a scalar. Raises ValueError."""
    if student_map.shape != teacher_map.shape or student_map.ndim != 4:
        raise ValueError(f"maps must both be [N, D, h, w], got {list(student_map.shape)} and "
                         f"{list(teacher_map.shape)}")
    cosine = F.cosine_similarity(student_map.float().flatten(1), teacher_map.float().flatten(1), dim=1)
    return 2 * (1 - cosine).mean()


# ---------------------------------------------------------------- what the paper adds to a backbone

class LossBalance(nn.Module):
    """Atten_phi: L_KL and L_FS, scalars that are detached inside -> lambda in (0, 1) (appendix A.5)."""

    def __init__(self, hidden=(18, 34, 50)):
        super().__init__()
        layers = [nn.Sequential(nn.Linear(a, b), nn.LeakyReLU()) for a, b in zip((2, *hidden), hidden)]
        self.layers = nn.Sequential(*layers, nn.Linear(hidden[-1], 1))

    def forward(self, kl, fs):
        losses = torch.stack([kl.detach(), fs.detach()]).float()
        with torch.autocast(losses.device.type, enabled=False):  # bf16 would round lambda to 1
            return self.layers(losses).sigmoid().squeeze(0)


class SizeInterpolationConcat(nn.Module):
    """M: the teacher's maps of all resolutions through 1x1 convolutions, at one side, one behind the other.

    forward: maps [N, teacher_dim, h_r, w_r], one a resolution -> [N, width, side, side]. The student's
    resolution gets its width, others half; a single one stays as it is. `.own`: the student's slice."""

    def __init__(self, teacher_dim, student_dim, resolutions, student_resolution, side):
        super().__init__()
        widths = [student_dim if r == student_resolution else student_dim // 2 for r in resolutions]
        self.convs = nn.ModuleList(nn.Sequential(nn.Conv2d(teacher_dim, width, 1, bias=False),
                                                 nn.BatchNorm2d(width), nn.LeakyReLU()) for width in widths)
        if len(resolutions) == 1:
            widths, self.convs = [teacher_dim], nn.ModuleList([nn.Identity()])
        place = resolutions.index(student_resolution)
        self.own = slice(sum(widths[:place]), sum(widths[:place + 1]))
        self.width, self.side = sum(widths), side

    def forward(self, maps):
        maps = [conv(x) for conv, x in zip(self.convs, maps, strict=True)]
        return torch.cat([F.interpolate(x, (self.side, self.side), mode="nearest" if x.shape[-1] % self.side
                                        else "area") for x in maps], 1)


class Teacher(nn.Module):
    """Frozen encoder e_T (batch norm folded: it has no training mode), module M, linear classifier g, factors
    s. forward: images of any side -> (logits [N, C], pooled features); `outputs` has behind these the map
    that a student is compared with, [N, D, side, side]. settings: what rebuilds it."""

    def __init__(self, arch, num_classes, resolutions, student_resolution, student_dim, side, encoder=None):
        super().__init__()
        self.settings = dict(arch=arch, num_classes=num_classes, resolutions=resolutions, side=side,
                             student_resolution=student_resolution, student_dim=student_dim)
        self.encoder = build_encoder(arch) if encoder is None else encoder
        self.join = SizeInterpolationConcat(self.encoder.feature_dim, student_dim, resolutions,
                                            student_resolution, side)
        self.classifier = nn.Linear(self.join.width, num_classes)
        self.scale = nn.Parameter(torch.ones(1, num_classes))

    def outputs(self, images):
        joined = self.join([self.encoder(resize(images, r)) for r in self.settings["resolutions"]])
        features = joined.mean((2, 3))
        return self.scale * self.classifier(features), features, joined[:, self.join.own]

    def forward(self, images):
        return self.outputs(images)[:2]


class Student(nn.Module):
    """A ReActNet for images of one resolution; forward: of any side -> (logits [N, C], pooled features)."""

    def __init__(self, arch, num_classes, width, resolution, binarize=True, classifier="linear"):
        super().__init__()
        self.settings = dict(arch=arch, num_classes=num_classes, width=width, resolution=resolution,
                             binarize=binarize, classifier=classifier)
        self.net = NETS[arch](num_classes, width, resolution, binarize)
        self.classifier = self.net.classifier if classifier == "linear" else \
            CosineClassifier(self.net.feature_dim, num_classes, 10.0, learn_scale=True)
        self.net.classifier = nn.Identity()

    def encode(self, images, resolution=None):
        return self.net.features(resize(images, resolution or self.settings["resolution"]))

    def forward(self, images):
        features = self.encode(images).mean((2, 3))
        return self.classifier(features), features


def save_model(path, model, data):
    """Write a net with what rebuilds it and prepares its images."""
    runtime.save_checkpoint(path, {
        "method": "candle", "kind": type(model).__name__, "arch": model.settings["arch"], "packed": False,
        "settings": model.settings, "dataset": data.name, "class_names": data.class_names, "mean": data.mean,
        "std": data.std, "image_size": data.image_size,
        "state_dict": {name: value.cpu() for name, value in model.state_dict().items()}})


def load_model(path, num_classes=None):
    """A saved teacher or student (packed: mean|w| sign(w) as real weights) in eval mode, on the CPU, and what
    was saved with it. Raises ValueError, also where it knows other than num_classes classes."""
    saved = runtime.load_net(path, "candle", num_classes)
    model = {"Teacher": Teacher, "Student": Student}[saved["kind"]](**saved["settings"])
    model.load_state_dict(unpack(saved["state_dict"]) if saved["packed"] else saved["state_dict"])
    return model.to(memory_format=torch.channels_last).eval(), saved


# ---------------------------------------------------------------- schedule and training

def cosine_lr(progress, lr):
    """Half a cosine from lr to 0, without warm-up. progress: a fraction of the epochs, in [0, 1]."""
    return lr * 0.5 * (1 + math.cos(math.pi * progress))


def distil(images, targets, parts, teacher, learns_from, args):
    """Stage B, or a baseline, on a batch: what is minimised; and loss, L_KL (or cross-entropy), L_FS, lambda.
    parts: the student ("model"), its "connector" and "balance". learns_from: "labels", or the teacher in a
    "fixed" or "learned" balance."""
    student, classifier = parts["model"], parts["model"].classifier
    student_map = student.encode(images)
    features = student_map.mean((2, 3))
    if teacher is None:  # from scratch
        loss = F.cross_entropy(classifier(features), targets)
        return loss, [loss]
    with torch.no_grad():
        teacher_logits, _, teacher_map = teacher.outputs(images)
    fs = feature_similarity_loss(parts["connector"](student_map), teacher_map)
    balance = torch.full_like(fs, args.fixed_lambda)
    if learns_from == "labels":  # Table 3's baseline: the teacher is not calibrated
        ce = F.cross_entropy(classifier(features), targets)
        loss = (1 - balance) * ce + balance * fs
        return loss, [loss, ce, fs, balance]
    if args.direct_multi_resolution:
        others = [r for r in teacher.settings["resolutions"] if r != args.student_resolution]
        features = torch.stack([features, *(student.encode(images, r).mean((2, 3)) for r in others)]).mean(0)
    kl_of = lambda logits: distillation_kl(logits, teacher_logits, reduction=args.kl_reduction)
    if learns_from == "fixed":
        kl = kl_of(classifier(features))
        loss = (1 - balance) * kl + balance * fs  # Eq. (1)
        return loss, [loss, kl, fs, balance]
    # Eq. (4), its three players in one backward pass: each detach leaves a term to one of them
    constant = {name: p.detach() for name, p in classifier.named_parameters()}
    kl = kl_of(torch.func.functional_call(classifier, constant, features))
    balance = parts["balance"](kl, fs)
    loss = (1 - balance.detach()) * kl + balance.detach() * fs  # min over theta_e, the encoder
    gain = (1 - balance) * kl.detach() + balance * fs.detach()  # max over phi, the balance
    return loss - gain + kl_of(classifier(features.detach())), [loss, kl, fs, balance]  # theta_c


def train_stage(name, parts, step_of, terms, sample, optimizer, epochs, data, test_loader, args, run, device):
    """Train `parts`, whose "model" is scored. step_of(images, targets): what is minimised, and the values of
    `terms`, the loss first. Returns what result.json has of it: MiB with evaluation, seconds without."""
    seed = runtime.derive_seed(args.seed, name, "augmentation")
    loader = make_loader(data.train, data, args.batch_size, device, args.augmentation, seed, runtime.rank(),
                         runtime.ranks(), args.grad_accumulation, args.workers, args.skip_bad_images)
    autocast, targets = runtime.autocast(device, args.amp), torch.from_numpy(data.train.targets)
    steps = math.ceil(len(targets) / args.batch_size)  # of an epoch, its last partial batch included
    state = {"means": [], **run.open_stage(name, parts, optimizer)}
    runtime.peak_memory(device)  # from here on
    for epoch in range(state["epoch"], epochs):
        parts.train()
        started, step = time.time() - state["seconds"], state["step"]
        indices = sample(targets, runtime.generator(args.seed, name, "sampling", epoch))
        losses = torch.zeros(len(terms), steps, device=device)
        losses[:, :step] = state["losses"]
        for images, labels, share, ends_step in tqdm(
                loader.batches(indices, epoch, step), f"{name}, epoch {epoch + 1}",
                (steps - step) * args.grad_accumulation, leave=False,
                disable=None if runtime.rank() == 0 else True):
            with autocast():
                minimised, values = step_of(images, labels)
            (share * minimised).backward()
            losses[:, step] += share * torch.stack(values).detach()
            if ends_step:
                runtime.sum_gradients(parts.parameters())
                for group in optimizer.param_groups:
                    group["lr"] = cosine_lr((epoch + step / steps) / epochs, group["base"])
                optimizer.step()
                optimizer.zero_grad()
                step += 1
                if run.must_stop():
                    state.update(step=step, losses=losses[:, :step], seconds=time.time() - started)
                    run.save_stage(state, parts, optimizer)
                    run.stop()
        runtime.average_buffers(parts)
        run.check_losses(losses[0].clone(), name, epoch, lambda step: cosine_lr(
            (epoch + step / steps) / epochs, optimizer.param_groups[0]["base"]))
        means = dict(zip(terms, runtime.sum_ranks(losses).mean(1).tolist()))
        state.update(epoch=epoch + 1, step=0, losses=losses[:, :0], seconds=time.time() - started,
                     means=[*state["means"], means])
        row = {"stage": name, "epoch": epoch + 1, **means, "seconds": state["seconds"]}
        if (epoch + 1) % args.evaluate_every == 0 or epoch + 1 == epochs:
            row.update(assess(parts["model"], test_loader, data, args))
            state["best_all"] = max(state["best_all"], row["all"])
            runtime.say(f"{name}, epoch {epoch + 1} of {epochs}: " + ", ".join(
                f"{key} {value:.3g}" for key, value in {**means, "all": row["all"]}.items()))
        run.log(**row)
        run.save_stage(state, parts, optimizer)
    runtime.report_bad_images([loader])
    return {"best_all": state["best_all"], "epochs": state["means"], "seconds": state["seconds"],
            "seconds_per_epoch": state["seconds"] / epochs, "peak_memory_mb": runtime.peak_memory(device),
            "images_per_second": epochs * len(targets) / state["seconds"]}


def assess(model, loader, data, args):
    """A net's scores, each rank computing its part; its classifier from the head to the tail."""
    images = every_image(loader, runtime.rank(), runtime.ranks())
    logits, _, targets = (runtime.gather_ranks(part) for part in
                          predict(model, images, runtime.autocast(loader.device, args.amp)))
    result = scores(logits, targets, data.class_counts)
    return {**result, **head_median_tail(result["per_class_accuracy"], data.class_counts, args.head_median),
            **classifier_by_frequency(model.classifier, data.class_counts)}


# ---------------------------------------------------------------- main

def check_args(args):
    """Refuse values of this method's flags that cannot work. Raises ValueError."""
    if not all(0 <= value < 1 for value in (*args.smoothing, args.fixed_lambda)):
        raise ValueError("--smoothing and --fixed-lambda (at 1, nothing trains the classifier) must lie in "
                         f"[0, 1), got {args.smoothing} and {args.fixed_lambda}")
    if args.student_resolution not in args.resolutions or len(set(args.resolutions)) < len(args.resolutions):
        raise ValueError(f"--resolutions must be different sides in pixels, the student's own "
                         f"({args.student_resolution}) among them, got {args.resolutions}")
    if args.ablation and (len(args.resolutions) == 1 or args.balance == "fixed" or not args.baseline):
        raise ValueError("--ablation trains all rows itself; it needs several --resolutions")
    if args.ablation + args.from_scratch + (not args.calibration) > 1:
        raise ValueError("choose one of --ablation, --from-scratch and --no-calibration")


def main(args):
    with runtime.bad_input():
        device = runtime.start_ranks(args.device)
        runtime.check_flags(args, device)
        check_args(args)
        saved_net = args.export or args.evaluate
        with runtime.first_rank_first():
            data = load(args.dataset, args.data_dir, args.imb_factor, args.subset_seed, args.train_list,
                        args.test_list)
            encoder, path = None, args.teacher_weights
            if not (saved_net or args.from_scratch):
                state = path if path == "ImageNet-1K" else runtime.load_checkpoint(EMBEDDED.get(path, path))
                encoder = build_encoder(args.teacher, state)
                if min(args.resolutions) < encoder.stride:
                    raise ValueError(f"--resolutions {min(args.resolutions)} leaves no map: the teacher's "
                                     f"stride is {encoder.stride}")
        split = data.split(args.evaluate_on)
        split_batches(1, args.batch_size, 0, runtime.ranks(), args.grad_accumulation)  # raises if it cannot
        if saved_net:  # it sees images as it did when it was trained
            model, saved = load_model(saved_net, data.num_classes)
            data.mean, data.std, data.image_size = saved["mean"], saved["std"], saved["image_size"]
        elif isinstance(data.train, ImageFiles) and data.image_size > 64:  # decoded once for all resolutions
            data.image_size = max(args.resolutions)
        loader = make_loader(split, data, 256, device, workers=args.workers, skip_bad=args.skip_bad_images)
        if args.export:
            path = Path(args.export).with_name(f"{Path(args.export).stem}_packed.pt")
            saved["settings"]["binarize"] = "activations"
            runtime.save_checkpoint(path, {**saved, "packed": True, "state_dict": pack(model)})
            runtime.say(f"wrote {path}: {path.stat().st_size / 1e6:.2f} MB")
            model, _ = load_model(path)
        if saved_net:
            result = assess(model.to(device), loader, data, args)
            runtime.report_bad_images([loader])
            runtime.say(table([(Path(saved_net).stem, result)]))
            return {"method": "candle", "dataset": data.name, **result}
        with torch.device("meta"):  # shapes alone; fails now if it cannot be built
            net = NETS[args.arch](data.num_classes, args.student_width, args.student_resolution).eval()
            map_shape = net.features(torch.empty(1, 3, *[args.student_resolution] * 2)).shape[1:3]
        run = runtime.open_run(args, "candle")
    with runtime.bad_input((UnreadableImage, Diverged)):
        stages = run_stages(args, data, loader, encoder, *map_shape, run, device)
    runtime.report_bad_images([loader])
    runtime.say(table([(stage["name"], stage) for stage in stages]))
    if encoder is not None and args.teacher_weights == "ImageNet-1K" and data.name == "imagenet_lt":
        runtime.say("warning: the teacher learnt these classes from all of ImageNet-1K (paper: ImageNet-21K)")
    return run.finish("candle", data, stages)


def run_stages(args, data, test_loader, encoder, student_dim, side, run, device):
    """Baseline, calibration, students. Returns result.json's `stages`; the last one is the run's own."""
    stages, counts, own = [], torch.from_numpy(data.class_counts).to(device), args.student_resolution

    def train(name, file, parts, step_of, terms, sample, optimizer, epochs):
        """Train a net, or load it where a resumed run has finished it, and score it."""
        model, done = parts["model"], run.state.get("done", {})
        if args.sync_bn:
            nn.SyncBatchNorm.convert_sync_batchnorm(parts)
        if name in done:
            model.load_state_dict(load_model(run.folder / file)[0].state_dict())
        else:
            done = {**done, name: train_stage(name, parts, step_of, terms, sample, optimizer, epochs, data,
                                              test_loader, args, run, device)}
            save_model(run.folder / file, model, data)
            run.save(done=done)
        stages.append({"name": name, **assess(model, test_loader, data, args), **done[name]})

    def train_teacher(resolutions, file):
        """Stage A; without a file, a teacher that is not calibrated."""
        torch.manual_seed(runtime.derive_seed(args.seed, "teacher", resolutions, "initialisation"))
        teacher = Teacher(args.teacher, data.num_classes, resolutions, own, student_dim, side, encoder)
        teacher.to(device, memory_format=torch.channels_last)
        if file:
            optimizer = torch.optim.SGD([{"params": [p for p in teacher.parameters() if p.requires_grad],
                                          "base": args.calibration_lr}], momentum=0.9, weight_decay=5e-4)

            def calibrate(images, targets):
                loss = label_aware_smoothing_loss(teacher(images)[0], targets, counts, *args.smoothing)
                return loss, [loss]
            train(f"teacher, {' '.join(map(str, resolutions))}", file, nn.ModuleDict({"model": teacher}),
                  calibrate, ["loss"], class_balanced_indices, optimizer, args.calibration_epochs)
        return teacher.eval().requires_grad_(False)

    def train_student(name, file, teacher, learns_from):
        """Stage B, or a baseline. All students of a run start from the same weights."""
        torch.manual_seed(runtime.derive_seed(args.seed, "student", "initialisation"))
        net = Student(args.arch, data.num_classes, args.student_width, own, args.binarize, args.classifier)
        parts = nn.ModuleDict({"model": net, "connector": nn.Identity()})
        if teacher and len(teacher.settings["resolutions"]) == 1:  # as [D]; not in the student's file
            D = teacher.encoder.feature_dim
            parts["connector"] = nn.Sequential(nn.Conv2d(student_dim, D, 1, bias=False), nn.BatchNorm2d(D),
                                               nn.ReLU())
            nn.init.kaiming_normal_(parts["connector"][0].weight, mode="fan_out")
        groups = [{"params": list(parts.parameters()), "base": args.lr, "weight_decay": args.weight_decay}]
        if learns_from == "learned":
            parts["balance"] = LossBalance()
            groups.append({"params": list(parts["balance"].parameters()), "base": args.balance_lr})
        parts.to(device, memory_format=torch.channels_last)
        if args.compile:
            net.net.blocks.compile()
        optimizer = torch.optim.Adam(groups, fused=device.type != "mps") \
            if args.student_optimizer == "adam" else torch.optim.SGD(groups, momentum=0.9)
        name += ", full precision" * (not args.binarize) + ", cosine" * (args.classifier == "cosine")
        name += ", sgd" * (args.student_optimizer == "sgd") + ", direct" * args.direct_multi_resolution
        terms = ["loss", "ce" if learns_from == "labels" else "kl", "fs", "lambda"] if teacher else ["loss"]
        step_of = lambda images, targets: distil(images, targets, parts, teacher, learns_from, args)
        shuffled = lambda targets, generator: torch.randperm(len(targets), generator=generator)
        train(name, file, parts, step_of, terms, shuffled, optimizer, args.epochs)

    if args.from_scratch:
        train_student("from scratch", "student.pt", None, "labels")
    elif args.baseline or not args.calibration:
        train_student("baseline", "baseline.pt" if args.calibration else "student.pt",
                      train_teacher([own], None), "labels")
    if args.ablation:
        teacher = train_teacher([own], "teacher_single.pt")
        train_student("calibrate & distill", "calibrate_distill.pt", teacher, "fixed")
        train_student("learned balance", "learned_balance.pt", teacher, "learned")
    if args.calibration and not args.from_scratch:
        train_student("candle" + ", fixed balance" * (args.balance == "fixed"), "student.pt",
                      train_teacher(args.resolutions, "teacher.pt"), args.balance)
    for stage in stages[1:] if args.baseline else []:  # Figures 9 to 11, in the data set's own class ids
        pairs = zip(stage["per_class_accuracy"], stages[0]["per_class_accuracy"])
        stage["gain_over_baseline"] = [None if ours is None else ours - base for ours, base in pairs]
    return stages


if __name__ == "__main__":
    main(parse_args())
