"""CBD: Class-Balanced Distillation for Long-Tailed Visual Recognition
(Ahmet Iscen, Andre Araujo, Boqing Gong, Cordelia Schmid; BMVC 2021, arXiv 2104.05279).

Stage one trains K teachers with instance sampling. Stage two trains a student from scratch with
class-balanced sampling, while its features are pulled towards the teachers' (cosine distance); with K > 1 a
linear layer h maps them to the width of all teachers' features together. All classifiers are cosine ones.

Where we depart, [G] being the authors' code, google-research/class_balanced_distillation:
- paper: the classifier stands on h(v) / here: on relu(h(v)), as in [G], because the teachers' features, which
  it is to match, are not negative either.
- paper: gamma is not given / here: 20, fixed, as in [G].
- paper: lr .2 at batch 256 ([G]: .05 at batch 128) / here: the paper's.
- paper: weight decay is not given / here: 2.5e-4 (iNaturalist 1e-4) on all parameters, batch norm's too,
  because [G] multiplies tf.nn.l2_loss, which halves, by half of 5e-4 (2e-4).
- paper: noise of sigma .01 for the augmented teacher (none in [G]) / here: on; --noise 0 turns it off.
- paper: pixels not described ([G]: in [0, 1]) / here: minus mean, over standard deviation.
- paper: the loss is "replaced by" logit adjustment / here: --loss logit-adjusted then samples by instance,
  because the log prior must be that of the samples; --student-sampling class-balanced is the other reading.
  With kd and hybrid the adjusted logits are distilled too: the teachers' hold the prior as well.
- paper: epochs and lr of the re-trained classifier (crt) not given / here: 10 epochs, as
  classifier-balancing@f162ade has on ImageNet-LT (30 on iNaturalist), at stage one's lr.
- paper: fine-tuning at lr .01 for 10 epochs / here: with the same cosine schedule as every stage.
- paper: the augmented teacher's "color jitter" has no strength / here: SimCLR's, with greyscale, as in [G].
- paper: the hybrid is not written out / here: (1 - alpha) CE + alpha (beta l_F + T^2 l_KD); with several
  teachers kd and hybrid distil the mean of their logits.
- paper: precision not given / here: bf16 products where the device computes them; --no-amp for float32.
- paper: nothing smaller than ImageNet-LT / here: recipes for small images are ours, and so are all --quick.

    python cbd.py                                                     # embedded images, 2 minutes on 2 cores
    python cbd.py --dataset cifar100_lt --teachers 4
    torchrun --nproc_per_node 8 cbd.py --dataset imagenet_lt --data-dir /data/imagenet --teachers 4

What to expect (last epoch, all classes; results/cbd.md): embedded images, 5 seeds: teacher 71.6 +- .6,
class-balanced sampling 77.8 +- .5, CBD 78.7 +- .3, with 4 teachers 77.8 +- .4. 100 classes of Tiny-ImageNet
in CIFAR-100-LT's shape, 30 epochs, 1 seed: teacher 23.8, class-balanced 17.8, CBD 29.6, with 4 teachers 31.1.
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
from common.evaluate import Diverged, class_sums, nearest_class_mean, predict, scores, table
from common.loader import UnreadableImage, every_image, make_loader, split_batches
from common.resnet import ARCHS, CosineClassifier, build_backbone

# ---------------------------------------------------------------- recipes

RECIPES = {
    "fashion_lt": dict(  # all ours, not tuned
        arch="resnet14", epochs=20, batch_size=32, lr=0.1, weight_decay=5e-4, evaluate_every=5,
        quick=dict(epochs=5)),
    "cifar10_lt": dict(  # ours: LDAM-DRW's net, batch, epochs and lr, cosine schedule, MiSLAS's weight decay
        arch="resnet32", epochs=200, batch_size=128, lr=0.1, weight_decay=5e-4, evaluate_every=5,
        quick=dict(epochs=30)),
    "cifar100_lt": dict(  # ours, as above
        arch="resnet32", epochs=200, batch_size=128, lr=0.1, weight_decay=5e-4, evaluate_every=5,
        quick=dict(epochs=30)),
    "imagenet_lt": dict(  # appendix A.2; weight decay: [G]; arch: section 4.1
        arch="resnet50", epochs=90, batch_size=256, lr=0.2, weight_decay=2.5e-4, evaluate_every=1,
        quick=dict(epochs=30)),
    "inat18": dict(  # appendix A.2; weight decay: [G]; arch: section 4.1
        arch="resnet50", epochs=200, batch_size=256, lr=0.2, weight_decay=1e-4, evaluate_every=1,
        quick=dict(epochs=30)),
    "inat17": dict(  # appendix A.2; weight decay: ours, iNat18's ([G] has no iNat17)
        arch="resnet50", epochs=200, batch_size=256, lr=0.2, weight_decay=1e-4, evaluate_every=1,
        quick=dict(epochs=30)),
}
DISTILLING, FROM_TEACHER = ("cbd", "kd", "hybrid"), ("finetune", "crt")
UNTRAINED = {"best_all": None, "seconds": None, "images_per_second": None}  # of a stage that trains nothing
SECOND_STAGES = (*DISTILLING, "class-balanced", *FROM_TEACHER)


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
    add("--teachers", type=int, help="K (1 unless kinds or checkpoints say more)")
    add("--teacher-kinds", nargs="+", choices=["standard", "augmented"], help="one a teacher (Table 1)")
    add("--teacher-checkpoints", nargs="+", metavar="FILE", help="trained teachers, instead of stage one")
    add("--only-teacher", type=int, metavar="I", help="train the I-th teacher, from 1, and stop")
    add("--second-stage", choices=SECOND_STAGES, default="cbd", help="Table 2's and Figure 2's rows")
    add("--second-stage-epochs", type=int, help="(--epochs; finetune and crt: 10)")
    add("--second-stage-lr", type=float, help="(--lr; finetune: .01)")
    add("--student-augmentation", choices=["standard", "augmented"], default="standard", help="of stage two")
    add("--student-sampling", choices=["class-balanced", "instance"],
        help="(class-balanced; with --loss logit-adjusted instance)")
    add("--loss", choices=["ce", "logit-adjusted"], default="ce", help="second stage's classification loss")
    add("--alpha", type=float, default=0.4, help="weight of the distillation, Eq. (2)")
    add("--beta", type=float, default=100.0, help="scale of the feature distillation, Eq. (2)")
    add("--gamma", type=float, default=20.0, help="scale of the cosine classifier")
    add("--temperature", type=float, default=2.0, help="T of kd and hybrid, Eq. (3)")
    add("--noise", type=float, default=0.01, help="sigma of the augmented teacher's noise, pixels in [0, 1]")
    add = parser.add_argument_group("optimisation").add_argument
    add("--arch", choices=ARCHS, help="backbone")
    add("--epochs", type=int, help="of each stage")
    add("--batch-size", type=int, help="global, over all ranks")
    add("--lr", type=float, help="at the first step, for the given batch size")
    add("--weight-decay", type=float, help="on all parameters")
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
    add("--out", help="(runs/cbd_<dataset>_seed<seed>)")
    return runtime.parse_with_recipe(parser, RECIPES, image_side, argv)


# ---------------------------------------------------------------- samplers

def instance_indices(targets, generator):
    """Every image once, in a random order: p_j = n_j / n (section 3.2). targets: [n]. Returns int64 [n]."""
    return torch.randperm(len(targets), generator=generator)


def class_balanced_indices(targets, generator, length=None):
    """Every class equally likely, p_j = 1 / c (section 3.2); inside a class a shuffled cycle, so that no
    image repeats before all of its class were drawn.

    targets: class ids [n]. generator: a CPU torch.Generator. length: indices to draw (None: n).
    Returns int64 [length]. Raises ValueError.
    """
    targets = torch.as_tensor(targets)
    length = len(targets) if length is None else length
    if targets.ndim != 1 or len(targets) == 0 or targets.is_floating_point() or targets.min() < 0:
        raise ValueError(f"targets must be class ids from 0 in a vector, not empty, got {targets.dtype} "
                         f"{list(targets.shape)}")
    if length < 0:
        raise ValueError(f"length must not be negative, got {length}")
    class_sizes = torch.bincount(targets)
    classes = class_sizes.nonzero().flatten()
    members = targets.argsort(stable=True).split(class_sizes[classes].tolist())
    drawn = torch.randint(len(classes), (length,), generator=generator)
    slots = drawn.argsort(stable=True).split(torch.bincount(drawn, minlength=len(classes)).tolist())
    indices = torch.empty(length, dtype=torch.int64)
    for images, places in zip(members, slots):
        cycles = math.ceil(len(places) / len(images))
        shuffled = torch.rand(cycles, len(images), generator=generator).argsort(1)  # each row a permutation
        indices[places] = images[shuffled].flatten()[:len(places)]
    return indices


# ---------------------------------------------------------------- losses

def feature_distillation_loss(student, teacher):
    """l_F, mean of 1 - cos. student, teacher: features [N, D]. Returns a scalar. Raises ValueError."""
    if student.shape != teacher.shape or student.ndim != 2:
        raise ValueError(f"features must both be [N, D], got {list(student.shape)} and {list(teacher.shape)}")
    return (1 - F.cosine_similarity(student.float(), teacher.float(), dim=1)).mean()


def cbd_loss(logits, targets, student_features, teacher_features, alpha=0.4, beta=100.0):
    """Eq. (2); with h(v) and the K teachers' concatenated features, Eq. (4).

    logits: [N, C]; targets: class ids [N]; features: [N, D]. Returns a scalar. Raises ValueError.
    """
    if student_features.shape != teacher_features.shape or student_features.ndim != 2:
        raise ValueError(f"features must both be [N, D], got {list(student_features.shape)} and "
                         f"{list(teacher_features.shape)}")
    if logits.ndim != 2 or not len(logits) == len(targets) == len(student_features):
        raise ValueError(f"logits must be [N, C] and targets [N], got {list(logits.shape)} and "
                         f"{list(targets.shape)} with features {list(student_features.shape)}")
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must lie in [0, 1], got {alpha}")
    distance = (1 - F.cosine_similarity(student_features.float(), teacher_features.float(), dim=1)).mean()
    return (1 - alpha) * F.cross_entropy(logits.float(), targets) + alpha * beta * distance  # Eq. (2), (4)


def classifier_distillation_loss(logits, targets, teacher_logits, alpha=0.4, temperature=2.0):
    """Eq. (3), the common knowledge distillation.

    logits, teacher_logits: [N, C]; targets: class ids [N]. Returns a scalar. Raises ValueError.
    """
    if logits.shape != teacher_logits.shape or logits.ndim != 2:
        raise ValueError(f"logits must both be [N, C], got {list(logits.shape)} and "
                         f"{list(teacher_logits.shape)}")
    if not 0 <= alpha <= 1 or not temperature > 0:
        raise ValueError(f"alpha must lie in [0, 1], the temperature above 0, got {alpha}, {temperature}")
    soft_targets = (teacher_logits.float() / temperature).softmax(1)
    l_kd = F.cross_entropy(logits.float() / temperature, soft_targets)
    return (1 - alpha) * F.cross_entropy(logits.float(), targets) + alpha * temperature ** 2 * l_kd  # Eq. (3)


def logit_adjusted(logits, log_prior, tau=1.0):
    """z + tau log prior: cross-entropy on it is the logit-adjusted loss of Menon et al. (ICLR 2021), for
    samples drawn from that prior. logits: [N, C]; log_prior: [C]. Returns [N, C]. Raises ValueError."""
    if logits.shape[-1:] != log_prior.shape:
        raise ValueError(f"log_prior {list(log_prior.shape)} does not fit logits {list(logits.shape)}")
    return logits + tau * log_prior


# ---------------------------------------------------------------- what the paper adds to a backbone

class CBDNet(nn.Module):
    """Backbone f, projection h where there are several teachers, cosine classifier g_W.

    forward: images [N, 3, H, W] -> (logits [N, C], features). features: v [N, D], or with project_to
    relu(h(v)) [N, project_to], the width of all teachers' features together; the classifier sees these.
    """

    def __init__(self, arch, num_classes, gamma=20.0, project_to=None, image_size=32):
        super().__init__()
        self.backbone, self.image_size = build_backbone(arch, image_size), image_size
        self.feature_dim = project_to or self.backbone.feature_dim
        self.h = nn.Linear(self.backbone.feature_dim, project_to) if project_to else None
        if self.h is not None:  # [G]: Keras's default
            nn.init.xavier_uniform_(self.h.weight)
            nn.init.zeros_(self.h.bias)
        self.classifier = CosineClassifier(self.feature_dim, num_classes, gamma)

    def forward(self, images):
        features = self.backbone(images)
        if self.h is not None:
            features = F.relu(self.h(features))
        return self.classifier(features), features


@torch.no_grad()
def teacher_outputs(teachers, images):
    """The teachers' targets for a batch: V_hat [N, sum of D_k], each part of unit length, and the mean of
    their logits [N, C]. The teachers must be in eval mode."""
    logits, features = zip(*(teacher(images) for teacher in teachers))
    return torch.cat([F.normalize(v.float(), dim=1) for v in features], 1), torch.stack(logits).mean(0)


def save_model(path, model, augmentation, args, data):
    """Write a net with what rebuilds it and prepares its images, and how it was augmented."""
    runtime.save_checkpoint(path, {
        "method": "cbd", "arch": args.arch, "gamma": model.classifier.scale.item(),
        "image_size": model.image_size, "augmentation": augmentation,
        "project_to": None if model.h is None else model.feature_dim,
        "dataset": data.name, "class_names": data.class_names, "mean": data.mean, "std": data.std,
        "state_dict": {name: value.cpu() for name, value in model.state_dict().items()}})


def load_model(path, num_classes=None, arch=None):
    """A saved net in eval mode, on the CPU, and what was saved with it (class_names, mean, std, ...).

    arch, num_classes: refuse a net that has others. Raises ValueError.
    """
    saved = runtime.load_net(path, "cbd", num_classes, arch)
    model = CBDNet(saved["arch"], len(saved["class_names"]), saved["gamma"], saved["project_to"],
                   saved["image_size"])
    model.load_state_dict(saved["state_dict"])
    return model.to(memory_format=torch.channels_last).eval(), saved


# ---------------------------------------------------------------- schedule

def cosine_lr(progress, lr):
    """Half a cosine from lr to 0, without warm-up. progress: a fraction of the epochs, in [0, 1]."""
    return lr * 0.5 * (1 + math.cos(math.pi * progress))


# ---------------------------------------------------------------- training

def train_stage(name, model, loss_of, sample, augmentation, epochs, lr, data, test_loader, args, run, device):
    """Train those parameters of `model` that require a gradient; a part without any stays in eval mode.

    loss_of(images, targets, logits, features): mean loss of a batch. sample(targets, generator): an epoch's
    index list. Returns {"best_all": percent, "seconds", "images_per_second"}, evaluation not in the times.
    """
    seed = runtime.derive_seed(args.seed, name, "augmentation")
    loader = make_loader(data.train, data, args.batch_size, device, augmentation, seed, runtime.rank(),
                         runtime.ranks(), args.grad_accumulation, args.workers, args.skip_bad_images,
                         args.noise)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr, momentum=0.9, weight_decay=args.weight_decay,
                                fused=device.type == "cuda")
    autocast = runtime.autocast(device, args.amp)
    forward = torch.compile(model) if args.compile else model
    all_targets = torch.from_numpy(data.train.targets)
    steps = math.ceil(len(all_targets) / args.batch_size)  # of an epoch, its last partial batch included
    state = run.open_stage(name, model, optimizer)

    for epoch in range(state["epoch"], epochs):
        started, step = time.time() - state["seconds"], state["step"]
        losses = torch.zeros(steps, device=device)
        losses[:step] = state["losses"]
        for part in model.children():  # batch norm of a frozen part keeps its statistics
            part.train(any(p.requires_grad for p in part.parameters()))
        indices = sample(all_targets, runtime.generator(args.seed, name, "sampling", epoch))
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
                    group["lr"] = cosine_lr((epoch + step / steps) / epochs, lr)
                optimizer.step()
                optimizer.zero_grad()
                step += 1
                if run.must_stop():
                    state.update(step=step, losses=losses[:step], seconds=time.time() - started)
                    run.save_stage(state, model, optimizer)
                    run.stop()
        runtime.average_buffers(model)
        mean_loss = run.check_losses(  # the epoch's one host sync
            losses, name, epoch, lambda step: cosine_lr((epoch + step / steps) / epochs, lr))
        state.update(epoch=epoch + 1, step=0, losses=losses[:0], seconds=time.time() - started)
        row = {"stage": name, "epoch": epoch + 1, "loss": mean_loss, "seconds": state["seconds"]}
        if (epoch + 1) % args.evaluate_every == 0 or epoch + 1 == epochs:
            logits, _, targets = outputs(model, test_loader, args.amp)
            row.update(scores(logits, targets, data.class_counts))
            state["best_all"] = max(state["best_all"], row["all"])
            runtime.say(f"{name}, epoch {epoch + 1} of {epochs}: loss {mean_loss:.3f}, all {row['all']:.1f}")
        run.log(**row)
        run.save_stage(state, model, optimizer)
    runtime.report_bad_images([loader])
    return {"best_all": state["best_all"], "seconds": state["seconds"],
            "images_per_second": epochs * len(all_targets) / state["seconds"]}


def outputs(model, loader, amp):
    """(logits, features, targets) of all of the loader's images, each rank computing its part of them."""
    images = every_image(loader, runtime.rank(), runtime.ranks())
    parts = predict(model, images, runtime.autocast(loader.device, amp))
    return [runtime.gather_ranks(part) for part in parts]


def assess(model, train_loader, test_loader, data, amp):
    """A net's scores, NCM's accuracy among them (appendix A.5), and what an ensemble needs: its logits, unit
    features [N, D], class means [C, D], and the targets."""
    logits, features, targets = outputs(model, test_loader, amp)
    images = every_image(train_loader, runtime.rank(), runtime.ranks())
    means = runtime.sum_ranks(class_sums(model, images, data.num_classes,
                                         runtime.autocast(train_loader.device, amp)))
    means /= torch.from_numpy(data.class_counts).to(means.device)[:, None]
    return {**scores(logits, targets, data.class_counts), "ncm": ncm_accuracy(means, features, targets)}, \
        [part.cpu() for part in (logits, F.normalize(features, dim=1), means, targets)]


def ncm_accuracy(means, features, targets):
    """Percent of the features [N, D] whose nearest class mean [C, D] is their own class's."""
    classes = torch.arange(len(means), device=means.device)
    predictions = nearest_class_mean(means, classes, features, len(means))
    return 100 * (predictions == targets).float().mean().item()


def run_stage(name, file, model, how, data, loaders, args, run, device):
    """Train a net as `how` says (None: it is a trained one), or load it where a resumed run has finished it;
    then score it. Returns (the net, frozen; its entry of result.json's stages; what an ensemble needs)."""
    done = run.state.get("done", {})
    if args.sync_bn:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    model.to(device, memory_format=torch.channels_last)
    if name in done:
        model.load_state_dict(load_model(run.folder / file)[0].state_dict())
    elif how is not None:
        stats = train_stage(name, model, **how, data=data, test_loader=loaders[1], args=args, run=run,
                            device=device)
        done = {**done, name: stats}
        save_model(run.folder / file, model, how["augmentation"], args, data)
        run.save(done=done)
    model.eval().requires_grad_(False)
    result, for_ensemble = assess(model, *loaders, data, args.amp)
    return model, {"name": name, **result, **done.get(name, UNTRAINED)}, for_ensemble


# ---------------------------------------------------------------- main

def check_args(args):
    """Refuse values of this method's flags that cannot work. Raises ValueError."""
    if args.alpha > 1:
        raise ValueError(f"--alpha must lie in [0, 1], got {args.alpha}")
    if args.gamma == 0 or args.temperature == 0:
        raise ValueError("--gamma and --temperature must be positive")


def default_kinds(num_teachers):
    """Standard and augmented in turn, an odd last one augmented: Table 1's best rows."""
    kinds = [("standard", "augmented")[i % 2] for i in range(num_teachers)]
    return kinds if num_teachers == 1 or num_teachers % 2 == 0 else [*kinds[:-1], "augmented"]


def teacher_kinds(args):
    """The K teachers' kinds, as named or by default. Raises ValueError where flags contradict one another."""
    counts = {len(given) for given in (args.teacher_kinds, args.teacher_checkpoints) if given}
    counts |= set() if args.teachers is None else {args.teachers}
    if len(counts) > 1:
        raise ValueError("--teachers, --teacher-kinds and --teacher-checkpoints must agree on K")
    num_teachers = counts.pop() if counts else 1
    only = args.only_teacher
    if only is not None and (args.teacher_checkpoints or only > num_teachers):
        raise ValueError(f"--only-teacher trains one of the {num_teachers} teachers, counted from 1 and "
                         f"without --teacher-checkpoints; got {only}")
    return args.teacher_kinds or default_kinds(num_teachers)


def main(args):
    with runtime.bad_input():
        device = runtime.start_ranks(args.device)
        runtime.check_flags(args, device)
        check_args(args)
        kinds = teacher_kinds(args)
        with runtime.first_rank_first():
            data = load(args.dataset, args.data_dir, args.imb_factor, args.subset_seed, args.train_list,
                        args.test_list)
        data.color_jitter = 0.0  # "standard" is crop and flip alone, as in [G]
        split = data.split(args.evaluate_on)
        split_batches(1, args.batch_size, 0, runtime.ranks(), args.grad_accumulation)  # raises if it cannot
        paths = [args.evaluate] if args.evaluate else args.teacher_checkpoints or []
        trained = [load_model(path, data.num_classes, None if args.evaluate else args.arch) for path in paths]
        for path, (_, saved) in zip(paths, trained):  # a trained net sees images as it did in training
            if (saved["mean"], saved["std"]) != (trained[0][1]["mean"], trained[0][1]["std"]):
                raise ValueError(f"{path} and {paths[0]} were trained on differently normalised images")
            data.mean, data.std = saved["mean"], saved["std"]
        loaders = [make_loader(part, data, 256, device, workers=args.workers, skip_bad=args.skip_bad_images)
                   for part in (data.train, split)]
        if args.evaluate:
            model, _ = trained[0]
            result, _ = assess(model.to(device), *loaders, data, args.amp)
            runtime.report_bad_images(loaders)
            runtime.say(table([(Path(args.evaluate).stem, result)]))
            return {"method": "cbd", "dataset": data.name, **result}
        build_backbone(args.arch, data.image_size)  # fails now if it cannot be built
        run = runtime.open_run(args, "cbd")
    with runtime.bad_input((UnreadableImage, Diverged)):
        stages = run_stages(args, data, loaders, kinds, trained, run, device)
    runtime.report_bad_images(loaders)
    runtime.say(table([(stage["name"], stage) for stage in stages]))
    return run.finish("cbd", data, stages)


def run_stages(args, data, loaders, kinds, trained, run, device):
    """Both stages. Returns result.json's `stages`: teachers, their ensemble, student."""
    where = dict(data=data, loaders=loaders, args=args, run=run, device=device)
    log_prior = (torch.from_numpy(data.class_counts) / len(data.train)).log().to(device)

    def new_model(name, project_to=None):
        torch.manual_seed(runtime.derive_seed(args.seed, name, "initialisation"))
        return CBDNet(args.arch, data.num_classes, args.gamma, project_to, data.image_size)

    # Stage one: K teachers, instance sampling, Eq. (1)
    teachers, stages, members = [], [], []
    for number, kind in enumerate(kinds, 1):
        if args.only_teacher not in (None, number):
            continue
        if trained:
            model, saved = trained[number - 1]
            name, how = f"teacher {number}, {saved['augmentation']}", None
        else:
            name = f"teacher {number}, {kind}"
            model = new_model(name)
            how = dict(loss_of=lambda images, targets, logits, features: F.cross_entropy(logits, targets),
                       sample=instance_indices, augmentation=kind, epochs=args.epochs, lr=args.lr)
        model, entry, member = run_stage(name, f"teacher_{number}.pt", model, how, **where)
        teachers.append(model)
        stages.append(entry)
        members.append(member)
    if args.only_teacher:
        return stages
    if len(teachers) > 1:  # section 4.3: the average output; NCM on what the student is distilled from, V_hat
        logits, features, means, targets = zip(*members)
        entry = scores(torch.stack(logits).mean(0), targets[0], data.class_counts)
        stages.append({"name": f"teacher ensemble, K={len(teachers)}", **entry, **UNTRAINED,
                       "ncm": ncm_accuracy(torch.cat(means, 1), torch.cat(features, 1), targets[0])})

    # Stage two: a student from scratch, class-balanced sampling, Eq. (2) to (4); or a baseline
    second, adjusted = args.second_stage, args.loss == "logit-adjusted"
    own_kinds = [saved["augmentation"] for _, saved in trained] or kinds
    name = second
    if second in DISTILLING:
        name += f", K={len(teachers)}"
        name += "" if own_kinds == default_kinds(len(teachers)) else " of " + " ".join(own_kinds)
    if second in FROM_TEACHER:  # the first teacher goes on: all of it, or a new classifier on what is frozen
        name += f" of {own_kinds[0]}"
        model = copy.deepcopy(teachers[0]).requires_grad_(second == "finetune")
        if second == "crt":
            torch.manual_seed(runtime.derive_seed(args.seed, "crt", "initialisation"))
            model.classifier = CosineClassifier(model.feature_dim, data.num_classes, args.gamma)
    else:
        several = second in ("cbd", "hybrid") and len(teachers) > 1
        model = new_model("student", sum(t.feature_dim for t in teachers) if several else None)
    sampling = args.student_sampling or ("instance" if adjusted else "class-balanced")
    name += (", logit-adjusted" if adjusted else "") + (", instance" if sampling == "instance" else "")
    name += ", augmented" if args.student_augmentation == "augmented" else ""

    def student_loss(images, targets, logits, features):
        if adjusted:
            logits = logit_adjusted(logits, log_prior)
        if second not in DISTILLING:
            return F.cross_entropy(logits, targets)
        teacher_features, teacher_logits = teacher_outputs(teachers, images)
        if second == "cbd":
            return cbd_loss(logits, targets, features, teacher_features, args.alpha, args.beta)
        loss = classifier_distillation_loss(logits, targets, teacher_logits, args.alpha, args.temperature)
        if second == "hybrid":
            loss = loss + args.alpha * args.beta * feature_distillation_loss(features, teacher_features)
        return loss

    epochs = args.second_stage_epochs or (10 if second in FROM_TEACHER else args.epochs)
    lr = 0.01 if second == "finetune" else args.lr  # footnote 2
    lr = lr if args.second_stage_lr is None else args.second_stage_lr
    _, entry, _ = run_stage(name, "student.pt", model, dict(
        loss_of=student_loss, augmentation=args.student_augmentation, epochs=epochs, lr=lr,
        sample=class_balanced_indices if sampling == "class-balanced" else instance_indices), **where)
    return [*stages, entry]


if __name__ == "__main__":
    main(parse_args())
