"""Class-Balanced Distillation for Long-Tailed Visual Recognition (CBD)
Iscen, Araujo, Gong, Schmid. BMVC 2021, https://arxiv.org/abs/2104.05279

Instance sampling gives good features but a classifier that favours the head; class-balanced sampling one
that overfits the tail. So stage one trains K teachers with the first. Stage two trains a student from scratch
with the second, its features drawn to the teachers' (K > 1: through a linear h, as wide as theirs together).

    python cbd.py                                                     # embedded images, 2 minutes on 2 cores
    python cbd.py --dataset cifar100_lt --teachers 4
    torchrun --nproc_per_node 8 cbd.py --dataset imagenet_lt --data-dir /data/imagenet --teachers 4

Expect (last epoch, all classes, 5 seeds, results/cbd.md) on the embedded images: teacher 71.6 +- .6,
class-balanced sampling 77.8 +- .5, CBD 78.7 +- .3.

[G]: the authors' code, google-research/class_balanced_distillation. Departures stand at their lines; those in
common/, paper: pixels and crops open / here: minus mean, over std; padded crops, above 64 pixels [G]'s.
"""
import copy
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from common.evaluate import nearest_class_mean, scores
from common.flags import BOOLEAN, Parser, count, fraction, number, positive, text
from common.folder import load_net
from common.ranks import bad_input, first_rank_first
from common.resnet import ARCHS, CosineClassifier, build_backbone
from common.run import Run

# ---------------------------------------------------------------- recipes

SMALL = dict(  # paper: nothing smaller than ImageNet-LT / here: LDAM-DRW's net, batch, epochs and lr
    arch="resnet32", epochs=200, batch_size=128, lr=0.1, evaluate_every=5, quick=dict(epochs=30),
    weight_decay=5e-4)  # MiSLAS's README; its configs and LDAM-DRW: 2e-4
LARGE = dict(  # section 4.1, appendix A.2 ([G]: lr .05 at batch 128)
    arch="resnet50", epochs=200, batch_size=256, lr=0.2, evaluate_every=1, quick=dict(epochs=30),
    weight_decay=1e-4)  # paper: not given / here: as [G], whose 2e-4 its loss halves; on batch norm's too
FASHION = {**SMALL, "arch": "resnet14", "epochs": 20, "batch_size": 32, "quick": dict(epochs=5)}  # ours
RECIPES = {
    "fashion_lt": FASHION, "cifar10_lt": SMALL, "cifar100_lt": SMALL,
    "imagenet_lt": {**LARGE, "epochs": 90, "weight_decay": 2.5e-4},  # [G]: 5e-4, halved
    "inat18": LARGE, "inat17": LARGE,  # paper: not given / here: inat17's weight decay is inat18's
    # ours, for own images: at 64 pixels as the embedded set; or (not measured) at 224 from ImageNet's weights
    "small": {**FASHION, "image_size": 64},
    "small_224": dict(LARGE, pretrained=True, epochs=20, batch_size=32, lr=0.01, quick=dict(epochs=5)),
}
DISTILLING = "cbd", "kd", "hybrid"  # second stages: a student from scratch, with teachers
FROM_TEACHER = "finetune", "crt"  # a copy of the first teacher, trained further
ALONE = "class-balanced", "logit-adjusted"  # a net from scratch, without a teacher


def parse_args(argv=None):
    parser = Parser(__doc__, RECIPES)  # --dataset, --epochs, --lr, --resume, ...: common/flags.py
    add = parser.method
    add("--arch", choices=ARCHS, metavar="F", help="resnet14, 20, 32, 44, 56, 110; 10, 18, 34, 50, 101, 152")
    add("--teachers", type=count, help="K (1 unless kinds or checkpoints say more)")
    add("--teacher-kinds", nargs="+", choices=["standard", "augmented"], help="one per teacher (Table 1)")
    add("--teacher-checkpoints", type=text, nargs="+", metavar="FILE", help="instead of stage one")
    add("--only-teacher", type=count, metavar="I", help="train the I-th teacher, from 1, and stop")
    add("--second-stage", choices=[*DISTILLING, *FROM_TEACHER, *ALONE], default="cbd",
        help="Table 2's and Figure 2's rows; the last two need no teacher")
    add("--second-stage-epochs", type=count, help="(--epochs; finetune and crt: 10)")
    add("--second-stage-lr", type=number, help="(--lr; finetune: .01)")
    add("--student-augmentation", choices=["standard", "augmented"], default="standard", help="of stage two")
    add("--student-sampling", choices=["class-balanced", "instance"], help="(instance if logit-adjusted)")
    add("--loss", choices=["ce", "logit-adjusted"], default="ce", help="second stage's classification loss")
    add("--projection", choices=["linear", "relu"], help="h of Eq. (4) (with one teacher none, else relu)")
    add("--pretrained", action=BOOLEAN, default=False, help="nets start from torchvision's ImageNet weights")
    add("--alpha", type=fraction, default=0.4, help="weight of the distillation, Eq. (2)")
    add("--beta", type=number, default=100.0, help="scale of the feature distillation, Eq. (2)")
    add("--gamma", type=positive, default=20.0, help="cosine classifier's scale")  # paper: open / here: [G]'s
    add("--temperature", type=positive, default=2.0, help="T of kd and hybrid, Eq. (3)")
    add("--noise", type=number, default=0.01, help="sigma of the augmented kind's noise, in [0, 1]")  # [G]: 0
    return parser.parse_args(argv)


# ---------------------------------------------------------------- samplers

def instance_indices(targets, generator):
    """Every image once, in a random order: p_j = n_j / n (section 3.2). targets: [n]. Returns int64 [n]."""
    return torch.randperm(len(targets), generator=generator)


def class_balanced_indices(targets, generator, length=None):
    """Every class equally likely, p_j = 1 / c (section 3.2). targets: class ids [n]. generator: a CPU
    torch.Generator. length: indices to draw (None: n). Returns int64 [length]. Raises ValueError."""
    targets = torch.as_tensor(targets)
    length = len(targets) if length is None else length  # paper: an epoch's length not given / here: n
    if targets.ndim != 1 or targets.is_floating_point() or not len(targets) or min(targets.min(), length) < 0:
        raise ValueError(f"targets must be class ids [n], length not negative, got {targets} and {length}")
    class_sizes = torch.bincount(targets)
    classes = class_sizes.nonzero().flatten()
    members = targets.argsort(stable=True).split(class_sizes[classes].tolist())

    drawn = torch.randint(len(classes), (length,), generator=generator)
    slots = drawn.argsort(stable=True).split(torch.bincount(drawn, minlength=len(classes)).tolist())
    indices = torch.empty(length, dtype=torch.int64)
    # paper: which image of a class not said / here: a new shuffled cycle an epoch, no repeats before its end
    for own, places in zip(members, slots):  # a class's images, and where in the epoch it was drawn
        cycles = math.ceil(len(places) / len(own))
        shuffled = torch.rand(cycles, len(own), generator=generator).argsort(1)  # each row a permutation
        indices[places] = own[shuffled].flatten()[:len(places)]
    return indices


# ---------------------------------------------------------------- losses

def feature_distillation_loss(student, teacher):
    """l_F, mean of 1 - cos. student, teacher: features [N, D]. Returns a scalar. Raises ValueError."""
    if student.shape != teacher.shape or student.ndim != 2:
        raise ValueError(f"features must both be [N, D], got {list(student.shape)} and {list(teacher.shape)}")
    return (1 - F.cosine_similarity(student.float(), teacher.float(), dim=1)).mean()


def cbd_loss(logits, targets, student_features, teacher_features, alpha=0.4, beta=100.0):
    """Eq. (2), the mean of a batch; with h(v) and K teachers' features side by side Eq. (4). logits: [N, C];
    targets: class ids [N]; features: [N, D]. Returns a scalar. Raises ValueError. l_F: again, for copying."""
    shapes = [list(x.shape) for x in (logits, targets, student_features, teacher_features)]
    if logits.ndim != 2 or student_features.ndim != 2 or shapes[2] != shapes[3] or not 0 <= alpha <= 1 or \
            not len(logits) == len(targets) == len(student_features):
        raise ValueError(f"must be [N, C], [N], [N, D], [N, D], alpha in [0, 1]; got {shapes}, {alpha}")
    l_f = (1 - F.cosine_similarity(student_features.float(), teacher_features.float(), dim=1)).mean()
    return (1 - alpha) * F.cross_entropy(logits.float(), targets) + alpha * beta * l_f  # Eq. (2), (4)


def classifier_distillation_loss(logits, targets, teacher_logits, alpha=0.4, temperature=2.0):
    """Eq. (3), the common knowledge distillation. logits, teacher_logits: [N, C]; targets: class ids [N].
    Returns a scalar. Raises ValueError."""
    shapes = [list(logits.shape), list(teacher_logits.shape)]
    if shapes[0] != shapes[1] or len(shapes[0]) != 2 or not 0 <= alpha <= 1 or not temperature > 0:
        raise ValueError(f"must both be [N, C], alpha in [0, 1], T > 0; got {shapes}, {alpha}, {temperature}")
    soft_targets = (teacher_logits.float() / temperature).softmax(1)
    l_kd = F.cross_entropy(logits.float() / temperature, soft_targets)
    return (1 - alpha) * F.cross_entropy(logits.float(), targets) + alpha * temperature ** 2 * l_kd  # Eq. (3)


# ---------------------------------------------------------------- nets and schedule

class CBDNet(nn.Module):
    """Backbone f, projection h where there are several teachers, cosine classifier g_W.

    project_to: width of all teachers' features together, or None: no h. projection: "relu" for relu(h(v)),
    "linear" for h(v). forward: images [N, 3, H, W] -> (logits [N, C], what the classifier sees [N, D]).
    """

    def __init__(self, arch, num_classes, gamma=20.0, project_to=None, image_size=32, projection="relu",
                 pretrained=False):
        super().__init__()
        self.settings = dict(arch=arch, num_classes=num_classes, gamma=gamma, project_to=project_to,
                             image_size=image_size, projection=projection)
        self.backbone = build_backbone(arch, image_size, pretrained=pretrained)
        self.feature_dim = project_to or self.backbone.feature_dim

        self.h = nn.Linear(self.backbone.feature_dim, project_to) if project_to else nn.Identity()
        if project_to:  # [G]: Glorot's start / here: its absolute values, as v is not negative: so no unit
            nn.init.xavier_uniform_(self.h.weight).data.abs_()  # of relu(h(v)) starts at 0 for every image
            nn.init.zeros_(self.h.bias)
        # paper: h takes v of unit length (3.1), g_W and l_F take h(v) / here, as in [G]: v of any length, and
        # relu(h(v)), as the teachers' features are not negative either; --projection linear: no relu
        self.rectify = nn.ReLU() if projection == "relu" else nn.Identity()  # without h: no change
        self.classifier = CosineClassifier(self.feature_dim, num_classes, gamma)

    def forward(self, images):
        features = self.rectify(self.h(self.backbone(images)))
        return self.classifier(features), features


class Teachers(nn.ModuleList):
    """K frozen teachers as one net. forward: images -> (the mean of their logits [N, C], V_hat [N, sum of
    D_k]: their features, each of unit length as in section 3.1, side by side)."""

    @torch.no_grad()
    def forward(self, images):
        logits, features = zip(*(teacher(images) for teacher in self))
        # paper: "average output" (4.3), and one teacher in Eq. (3) / here: mean logits, as in [G], for both
        return torch.stack(logits).mean(0), torch.cat([F.normalize(v.float(), dim=1) for v in features], 1)


def new_net(run, name, project_to=None):
    """A net whose first weights follow from --seed and its name."""
    torch.manual_seed(run.seed(name, "initialisation"))
    return CBDNet(run.args.arch, run.data.num_classes, run.args.gamma, project_to, run.data.image_size,
                  run.args.projection or "relu", run.args.pretrained)


def load_model(path, class_names=None, arch=None):
    """A saved net in eval mode, on the CPU, and what was saved; ValueError for other class_names or arch."""
    return load_net(path, "cbd", [CBDNet], class_names, arch)


def cosine_lr(progress, lr):
    """Half a cosine from lr to 0 (appendix A.2), no warm-up. progress: fraction of the epochs, in [0, 1]."""
    return lr * 0.5 * (1 + math.cos(math.pi * progress))


# ---------------------------------------------------------------- stage one: teachers

def train_teacher(run, name, file, kind):
    """Instance sampling and cross-entropy, Eq. (1). kind: standard (crop, flip), or augmented: colour jitter
    (paper: of no given strength / here: SimCLR's, with greyscale, as in [G]) and noise, too."""
    args, model = run.args, run.place(new_net(run, name))
    forward = run.compiled(model)
    optimizer = torch.optim.SGD(model.parameters(), args.lr, momentum=0.9, weight_decay=args.weight_decay,
                                fused=run.device.type == "cuda")  # appendix A.2

    for epoch in run.epochs(name, file, model, optimizer, args.epochs, augmentation=kind):
        model.train()
        indices = instance_indices(run.targets, epoch.generator)

        for images, targets, share, ends_step in epoch.batches(indices):  # share: of a global batch
            with run.autocast():  # paper: precision not given / here: bf16 where the device computes it
                logits, _ = forward(images)
                loss = share * F.cross_entropy(logits, targets)  # Eq. (1). paper: sum / here: mean
            loss.backward()
            epoch.track(loss=loss)
            if ends_step:  # the batch's last part on this rank
                run.sum_gradients(model)
                optimizer.param_groups[0]["lr"] = cosine_lr(epoch.progress, args.lr)
                optimizer.step()
                optimizer.zero_grad()

        if epoch.is_scored:
            epoch.log(**run.scores(model))
    return model


def default_kinds(num_teachers):
    """Standard and augmented in turn, an odd last one augmented: Table 1's best rows for K of 2 to 5.
    paper: for K = 1 the augmented one is better / here: standard, as Table 2's CBD."""
    return ["augmented" if i % 2 or i == num_teachers - 1 > 0 else "standard" for i in range(num_teachers)]


def teacher_kinds(args):
    """The teachers' kinds, as named or by default; [] where none is needed. Raises ValueError."""
    given, only = args.teacher_kinds or args.teacher_checkpoints or [], args.only_teacher
    K = args.teachers or len(given) or 1
    if (args.teacher_kinds and args.teacher_checkpoints) or (given and len(given) != K):
        raise ValueError("--teachers, --teacher-kinds and --teacher-checkpoints contradict one another")
    if only and (args.teacher_checkpoints or only > K):
        raise ValueError(f"--only-teacher trains one of the {K} teachers, from 1, and takes no checkpoints")
    alone = args.second_stage in ALONE and not only
    if alone and (args.teachers or given):
        raise ValueError(f"--second-stage {args.second_stage} has no teacher; leave out flags about them")
    return [] if alone else args.teacher_kinds or default_kinds(K)


# ---------------------------------------------------------------- stage two: student, or a baseline

def objective(args, images, targets, logits, features, teachers):
    """Table 2's and Figure 2's rows: what --second-stage minimises on a batch. Returns a scalar."""
    if args.second_stage not in DISTILLING:
        return F.cross_entropy(logits, targets)  # Eq. (1)

    teacher_logits, teacher_features = teachers(images)
    if args.second_stage == "cbd":
        return cbd_loss(logits, targets, features, teacher_features, args.alpha, args.beta)
    loss = classifier_distillation_loss(logits, targets, teacher_logits, args.alpha, args.temperature)
    if args.second_stage == "hybrid":  # paper: not written out / here: + alpha beta l_F
        loss = loss + args.alpha * args.beta * feature_distillation_loss(features, teacher_features)
    return loss


def second_net(run, teachers):
    """A student from scratch; or a copy of the first teacher: all of it learns, or (crt) a new classifier."""
    args = run.args
    if args.second_stage in FROM_TEACHER:
        model = copy.deepcopy(teachers[0]).requires_grad_(args.second_stage == "finetune")
        if args.second_stage == "crt":
            torch.manual_seed(run.seed("crt", "initialisation"))
            model.classifier = CosineClassifier(model.feature_dim, run.data.num_classes, args.gamma)
        return model

    projects = args.second_stage in ("cbd", "hybrid") and (len(teachers) > 1 or args.projection)
    return new_net(run, "student", sum(t.feature_dim for t in teachers) if projects else None)


def second_name(args, kinds, sampling):
    """The stage's name. It is a key of seeds: another name trains another net."""
    stage, K = args.second_stage, len(kinds)
    name = f"{stage} of {kinds[0]}" if stage in FROM_TEACHER else stage
    if stage in DISTILLING:
        name += f", K={K}" + ("" if kinds == default_kinds(K) else " of " + " ".join(kinds))
    projection = f"h {args.projection}" if args.projection else None
    settings = [projection, args.loss, sampling, args.student_augmentation]
    usual = None, "ce", "class-balanced", "standard"
    return ", ".join([name, *(each for each in settings if each not in usual)])


def train_student(run, teachers, kinds, epochs):
    """Class-balanced sampling and distillation from the teachers. Returns the stage's name and the net."""
    args = run.args
    adjusted = "logit-adjusted" in (args.loss, args.second_stage)
    log_prior = (run.class_counts / len(run.targets)).log().to(run.device)

    # paper: the loss is "replaced by" logit adjustment / here: it then samples by instance, as the log prior
    # must be that of the samples; kd and hybrid distil the adjusted logits, as the teachers' hold it too
    sampling = args.student_sampling or ("instance" if adjusted else "class-balanced")
    sample = class_balanced_indices if sampling == "class-balanced" else instance_indices
    lr = 0.01 if args.second_stage == "finetune" else args.lr  # paper: footnote 2 / here: on a cosine, too
    lr = lr if args.second_stage_lr is None else args.second_stage_lr

    name = second_name(args, kinds, sampling)
    model = run.place(second_net(run, teachers))
    forward = run.compiled(model)
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9, weight_decay=args.weight_decay,
                                fused=run.device.type == "cuda")

    for epoch in run.epochs(name, "student.pt", model, optimizer, epochs, args.student_augmentation):
        for part in model.children():  # batch norm of a frozen part keeps its statistics
            part.train(any(p.requires_grad for p in part.parameters()))
        indices = sample(run.targets, epoch.generator)

        for images, targets, share, ends_step in epoch.batches(indices):
            with run.autocast():
                logits, features = forward(images)
                logits = logits + log_prior if adjusted else logits  # Menon et al. (ICLR 2021)
                loss = share * objective(args, images, targets, logits, features, teachers)
            loss.backward()
            epoch.track(loss=loss)
            if ends_step:
                run.sum_gradients(model)
                optimizer.param_groups[0]["lr"] = cosine_lr(epoch.progress, lr)
                optimizer.step()
                optimizer.zero_grad()

        if epoch.is_scored:
            epoch.log(**run.scores(model))
    return name, model


# ---------------------------------------------------------------- main

def assess(run, model):
    """A net's scores and NCM (A.5; paper: distance not named / here: cosine of what the classifier sees)."""
    logits, features, targets = run.outputs(model)
    means = run.class_means(model)
    nearest = nearest_class_mean(means, torch.arange(len(means)), features, len(means))
    ncm = 100 * (nearest == targets).float().mean().item()
    return {**scores(logits, targets, run.data.class_counts), "ncm": ncm}


def main(args):
    with bad_input():  # whatever is wrong is found before anything is written
        kinds, run = teacher_kinds(args), Run("cbd", args)
        run.data.color_jitter = 0.0  # some data sets' "standard" has it; here crop and flip alone, as in [G]
        if args.evaluate:
            return run.evaluate(load_model, assess)

        given = [load_model(path, run.data.class_names, args.arch) for path in args.teacher_checkpoints or []]
        run.normalise_as(*(saved for _, saved in given), paths=args.teacher_checkpoints)
        kinds = [saved["augmentation"] for _, saved in given] or kinds
        with first_rank_first():  # which downloads the weights; fails now if it cannot be built
            build_backbone(args.arch, run.data.image_size, pretrained=args.pretrained)
        # paper: crt's epochs and lr not given / here: 10 as classifier-balancing@f162ade, at stage one's lr
        second_epochs = args.second_stage_epochs or (10 if args.second_stage in FROM_TEACHER else args.epochs)
        trained = [] if given else [args.epochs] * (1 if args.only_teacher else len(kinds))
        run.open(trained + [second_epochs] * (args.only_teacher is None))

    with run:
        teachers = Teachers()
        for k, kind in enumerate(kinds, 1):
            if args.only_teacher in (None, k):
                name = f"teacher {k}, {kind}"
                teacher = run.place(given[k - 1][0]) if given else \
                    train_teacher(run, name, f"teacher_{k}.pt", kind)
                run.add(name, assess(run, teacher))
                teachers.append(teacher.eval().requires_grad_(False))

        if args.only_teacher is None:
            if len(teachers) > 1:  # section 4.3; its NCM is on V_hat
                run.add(f"teacher ensemble, K={len(teachers)}", assess(run, teachers))
            name, student = train_student(run, teachers, kinds, second_epochs)
            run.add(name, assess(run, student))
    return run.finish()


if __name__ == "__main__":
    main(parse_args())
