"""Learning Imbalanced Data with Vision Transformers: LiVT (Xu et al., CVPR 2023, arXiv 2212.02015)

Stage one (MGP) pre-trains a ViT as a masked autoencoder on the long-tailed images, without labels, so that
the imbalance of the labels cannot reach the features. Stage two (BFT) fine-tunes it with the balanced binary
cross-entropy, whose logits are shifted by each class's log odds log pi_c / (1 - pi_c).

Where we depart, or had to choose ([G]: XuZhengzhuo/LiVT@68546ef and the logs it ships):
- paper: the loss sums over classes / here: that, and the mean over the batch, as [G]; class weights w_i of
  Eq. (5) and (6) are 1, as in [G].
- paper: tau / here: multiplies the bias in both balanced losses; [G] ignores it in Bal-BCE.
- paper: AdamW's beta2 .99 and 10 epochs of warm-up in BFT / here: .999 and 5, because all of [G]'s runs have
  these; layer decay .75 and no label smoothing, where [G]'s runs differ among themselves. From scratch no
  layer decay: there is nothing to protect.
- paper: lr 1e-3 / here: for 256 images, scaled with the batch size, as [G] and MAE do.
- paper: fp16 / here: bf16, without a scaler. No weight decay on tokens, as on biases.
- paper: RandAugment m9-mstd0.5-inc1 of timm, 9 of 10, each of two operations half of the time / here:
  torchvision's, 9 of 30, two operations always, because it is in the required packages.
- paper: test images resized bicubically, to S above 224 pixels / here: by the loader that all scripts share,
  bilinearly to 256/224 S, then cut to S. Images are normalised by their own data set's mean and std.
- paper: iNat18 is pre-trained at 128 pixels / here: at --image-size, 224, in one run; two commands below.
- paper: the best epoch on the test images ([G]) / here: the last epoch.
- paper: CIFAR starts from an ImageNet-LT checkpoint at 64 pixels (command below) / here by default:
  pre-trained on CIFAR-LT itself, 32 pixels, patches of 4, a decoder of 128x1: ours, not in the paper. Short
  schedules (fashion_lt, --quick) also differ in lr, batch size and augmentation (BFT: crop and flip).
- beyond the paper: Bal-BCE's optimum is not the Bayes classifier of the balanced error for more than two
  classes: it compares a class with the rest's long-tailed mixture, and ties go to the head. `bayes_decode`
  recovers that classifier from the same logits, exactly at the population optimum with hard targets. Every
  table shows both decodings; the paper's is the headline.
- Under torchrun masks, drop path and mixup are drawn by each rank for its own part of the batch.

    python livt.py                                                    # embedded images
    python livt.py --dataset cifar100_lt --loss balanced-bce bce ce balanced-ce
    torchrun --nproc_per_node 8 livt.py --dataset imagenet_lt --data-dir /data/imagenet

The paper's other comparisons, flags to add: --from-scratch --loss ce --augment plain is the row "ViT", with
--augment strong a DeiT-like one; --images-per-class 160 is ImageNet-BAL; --stage bft --mgp-checkpoint FILE
--image-size 384 fine-tunes at 384 pixels; --stage mgp --image-size 128 pre-trains iNat18 as the paper does.
CIFAR its way: --recipe imagenet_lt --stage bft --mgp-checkpoint FILE --image-size 64 --epochs 20.

What to expect (last epoch, all classes; results/livt.md): embedded images, 3 seeds: BCE 50.9 +- .8, Bal-BCE
68.8 +- .9, decoded by `bayes_decode` 72.1 +- .6; without MGP 65.8 +- .4. 100 classes of Tiny-ImageNet,
a tiny ViT, a very short schedule, 1 seed: BCE 4.8, CE 12.9, Bal-CE 16.7, Bal-BCE 16.3, without MGP 9.6.
"""
import argparse
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from common import runtime
from common.data import balanced_subset, image_side, load
from common.evaluate import Diverged, predict, scores, table
from common.loader import UnreadableImage, every_image, make_loader, mixup_cutmix, split_batches
from common.vit import MAE, VIT_SIZES, ViT, random_masking, resize_positions

# ---------------------------------------------------------------- recipes

PAPER = dict(  # table of hyper-parameters; warmup_epochs of BFT: [G]; evaluate_every, quick: ours
    arch="base", width=None, depth=None, heads=None, patch_size=16, image_size=224, decoder_width=512,
    decoder_depth=8, decoder_heads=16, mgp_epochs=800, mgp_warmup_epochs=40, mgp_batch_size=4096,
    mgp_lr=1.5e-4, epochs=100, warmup_epochs=5, batch_size=1024, lr=1e-3, weight_decay=0.05,
    drop_path=0.1, augment="strong", mixup=0.8, cutmix=1.0, tau=1.0, evaluate_every=1,
    quick=dict(mgp_epochs=200, mgp_warmup_epochs=10, epochs=30))
SMALL = {  # all ours; decoder 128x1: "SDMAE" found large decoders to overfit small sets
    **PAPER, "arch": "tiny", "patch_size": 4, "image_size": 32, "decoder_width": 128, "decoder_depth": 1,
    "decoder_heads": 4, "mgp_warmup_epochs": 40, "mgp_batch_size": 512, "batch_size": 256,
    "evaluate_every": 5,
    "quick": dict(mgp_epochs=30, mgp_warmup_epochs=3, mgp_batch_size=64, mgp_lr=2e-3, epochs=8,
                  warmup_epochs=1, batch_size=64, lr=4e-3, augment="plain", drop_path=0.0)}
RECIPES = {
    "fashion_lt": {  # all ours; chosen on the validation images
        **SMALL, "arch": "mini", "patch_size": 8, "decoder_width": 64,
        "mgp_epochs": 55, "mgp_warmup_epochs": 5, "mgp_batch_size": 64, "mgp_lr": 4e-3, "epochs": 22,
        "batch_size": 32, "lr": 8e-3, "augment": "plain", "drop_path": 0.0,
        "quick": dict(mgp_epochs=10, mgp_warmup_epochs=1, epochs=10, warmup_epochs=1)},
    "cifar10_lt": SMALL,
    "cifar100_lt": SMALL,
    "imagenet_lt": PAPER,
    "inat18": {**PAPER, "drop_path": 0.2},
    "places_lt": {**PAPER, "epochs": 30, "tau": 1.05},
}
SIZES = {**VIT_SIZES, "mini": dict(width=128, depth=4, heads=4)}  # ours, for 16 tokens
LOSSES = ("ce", "balanced-ce", "bce", "balanced-bce")


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
    add("--images-per-class", type=int, metavar="N", help="train on the first N of each class (ImageNet-BAL)")
    add("--subset-seed", type=int, default=0, help="which images are kept; 0 as in LDAM-DRW")
    add("--evaluate-on", choices=["test", "val"], default="test", help="split that is scored")
    add("--workers", type=int, default=runtime.cores(), help="decoding processes for image files, a rank")
    add("--skip-bad-images", action=boolean, default=False, help="leave out files that cannot be decoded")
    add = parser.add_argument_group("net").add_argument
    add("--arch", choices=SIZES, help="size of the ViT")
    add("--width", type=int, help="(that of --arch) channels of the ViT")
    add("--depth", type=int, help="(that of --arch) blocks of the ViT")
    add("--heads", type=int, help="(that of --arch) attention heads of the ViT")
    add("--patch-size", type=int, help="pixels")
    add("--image-size", type=int, help="pixels; images are resized to it")
    add("--decoder-width", type=int, help="of the masked autoencoder's decoder")
    add("--decoder-depth", type=int, help="of the masked autoencoder's decoder")
    add("--decoder-heads", type=int, help="of the masked autoencoder's decoder")
    add = parser.add_argument_group("method").add_argument
    add("--stage", choices=["mgp", "bft", "both"], default="both", help="pre-training, fine-tuning, or both")
    add("--mgp-checkpoint", metavar="FILE", help="a pre-trained net (mgp.pt), instead of stage one")
    add("--from-scratch", action=boolean, default=False, help="leave out stage one")
    add("--loss", nargs="+", choices=LOSSES, default=["balanced-bce", "bce"],
        help="of fine-tuning; each trains a net, the first is the run's own")
    add("--tau", type=float, help="factor of the balanced losses' bias")
    add("--mask-ratio", type=float, default=0.75, help="share of the patches that MGP hides")
    add("--norm-pix", action=boolean, default=True, help="MGP's targets are normalised patch by patch")
    add("--augment", choices=["plain", "strong"], help="of BFT; strong: RandAugment, erasing, mixing too")
    add("--mixup", type=float, help="alpha of Mixup; 0 leaves it out, and so does --augment plain")
    add("--cutmix", type=float, help="alpha of CutMix; likewise")
    add("--label-smoothing", type=float, default=0.0, help="of the fine-tuning targets")
    add("--drop-path", type=float, help="rate of the last block, in fine-tuning")
    add("--layer-decay", type=float, help="(.75; from scratch 1) lr of a block over that of the next one")
    add = parser.add_argument_group("optimisation").add_argument
    add("--mgp-epochs", type=int, help="of pre-training")
    add("--mgp-warmup-epochs", type=float, help="linear warm-up of pre-training")
    add("--mgp-batch-size", type=int, help="global, over all ranks")
    add("--mgp-lr", type=float, help="peak of pre-training for 256 images; scaled with the batch size")
    add("--epochs", type=int, help="of fine-tuning")
    add("--warmup-epochs", type=float, help="linear warm-up of fine-tuning")
    add("--batch-size", type=int, help="global, over all ranks")
    add("--lr", type=float, help="peak of fine-tuning for 256 images; scaled with the batch size")
    add("--weight-decay", type=float, help="on matrices")
    add("--grad-accumulation", type=int, default=1, help="parts that a rank's batch is cut into")
    add("--sync-bn", action=boolean, default=False, help="batch norm over all ranks (GPUs); a ViT has none")
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
    add("--out", help="(runs/livt_<dataset>_seed<seed>)")
    return runtime.parse_with_recipe(parser, RECIPES, image_side, argv)


# ---------------------------------------------------------------- samplers

def instance_indices(targets, generator):
    """Every image once, in a random order. targets: [n]. Returns int64 [n]."""
    return torch.randperm(len(targets), generator=generator)


# ---------------------------------------------------------------- losses

def balanced_bce_loss(logits, targets, class_counts, tau=1.0):
    """Balanced binary cross-entropy, Eq. (6): sigmoid cross-entropy on z_c + tau log(pi_c / (1 - pi_c)),
    summed over the classes, mean over the batch. tau = 0 is plain BCE, Eq. (5).

    logits: [N, C]; targets: class ids [N] or soft targets [N, C]; class_counts: training images per class
    [C] (on the CPU: then no step waits for a GPU). Returns a scalar. Raises ValueError.
    """
    counts = torch.as_tensor(class_counts)
    if logits.ndim != 2 or counts.shape != logits.shape[1:] or not tau >= 0 or \
            targets.shape not in (logits.shape, logits.shape[:1]):
        raise ValueError(f"logits must be [N, C], targets [N] or [N, C], class_counts [C], tau not negative; "
                         f"got {list(logits.shape)}, {list(targets.shape)}, {list(counts.shape)}, {tau}")
    if (counts <= 0).any() or len(counts) < 2:
        raise ValueError("every class needs a training image, and there must be two classes: else the log "
                         "odds of a class are not finite")
    counts = counts.double()
    bias = counts.log() - (counts.sum() - counts).log()  # log pi - log(1 - pi), without cancellation
    if targets.ndim == 1:
        targets = F.one_hot(targets, logits.shape[1])
    shifted = logits.float() + tau * bias.float().to(logits.device, non_blocking=True)  # Eq. (6)
    return F.binary_cross_entropy_with_logits(shifted, targets.float(), reduction="none").sum(1).mean()


def balanced_ce_loss(logits, targets, class_counts, tau=1.0):
    """Balanced cross-entropy, Theorem 1: softmax cross-entropy on z_c + tau log pi_c, mean over the batch.
    tau = 0 is plain cross-entropy.

    logits: [N, C]; targets: class ids [N] or soft targets [N, C]; class_counts: training images per class
    [C] (on the CPU: then no step waits for a GPU). Returns a scalar. Raises ValueError.
    """
    counts = torch.as_tensor(class_counts)
    if logits.ndim != 2 or counts.shape != logits.shape[1:] or not tau >= 0 or \
            targets.shape not in (logits.shape, logits.shape[:1]):
        raise ValueError(f"logits must be [N, C], targets [N] or [N, C], class_counts [C], tau not negative; "
                         f"got {list(logits.shape)}, {list(targets.shape)}, {list(counts.shape)}, {tau}")
    if (counts <= 0).any():
        raise ValueError("every class needs a training image: else the log of its prior is not finite")
    log_prior = (counts.double() / counts.sum()).log().float().to(logits.device, non_blocking=True)
    if targets.ndim == 2:
        targets = targets.float()
    return F.cross_entropy(logits.float() + tau * log_prior, targets)  # Eq. (3)


def bayes_decode(logits, class_counts, tau=1.0):
    """Scores whose largest is the Bayes classifier for the balanced error, from a net trained by
    balanced_bce_loss: log sigmoid(z_c + tau b_c) - log pi_c, b_c the class's log odds; tau = 0 for plain BCE.

    At the population optimum with hard targets sigmoid(z_c + tau b_c) is p(c | x) under the training prior,
    so the score is log p(x | c) minus log p(x), exactly. logits: [N, C]; class_counts: [C]. Returns [N, C].
    Raises ValueError.
    """
    counts = torch.as_tensor(class_counts, device=logits.device).double()
    if logits.ndim != 2 or counts.shape != logits.shape[1:] or not tau >= 0:
        raise ValueError(f"logits must be [N, C], class_counts [C] and tau not negative, got "
                         f"{list(logits.shape)}, {list(counts.shape)}, {tau}")
    if (counts <= 0).any() or len(counts) < 2:
        raise ValueError("every class needs a training image, and there must be two classes")
    bias = counts.log() - (counts.sum() - counts).log()
    log_prior = counts.log() - counts.sum().log()
    return F.logsigmoid(logits.double() + tau * bias) - log_prior


def second_decoding(loss, logits, class_counts, tau=1.0):
    """The Bayes classifier's scores for the balanced error at the population optimum of any of `LOSSES`.

    loss, tau: that the net was trained by. logits: [N, C]; class_counts: [C]. Returns [N, C]. Raises
    ValueError.
    """
    if loss.endswith("bce"):
        return bayes_decode(logits, class_counts, tau if loss == "balanced-bce" else 0.0)
    counts = torch.as_tensor(class_counts, device=logits.device).double()
    return logits.double() + ((tau if loss == "balanced-ce" else 0.0) - 1) * (counts / counts.sum()).log()


# ---------------------------------------------------------------- what the paper adds to a backbone

def net_sizes(args):
    """What a ViT is built from: image_size, patch_size, width, depth, heads."""
    named = {key: getattr(args, key) for key in ("width", "depth", "heads") if getattr(args, key) is not None}
    return {"image_size": args.image_size, "patch_size": args.patch_size, **SIZES[args.arch], **named}


def pretrained_vit(sizes, num_classes, drop_path, encoder):
    """A ViT for fine-tuning with the encoder of an MGP checkpoint ({} for none): its classifier and its last
    norm are new, positions are interpolated to the image size."""
    model = ViT(**sizes, num_classes=num_classes, drop_path=drop_path)
    if encoder:
        weights = {name: value for name, value in encoder.items() if not name.startswith("norm.")}
        weights["positions"] = resize_positions(weights["positions"], model.num_patches)
        missing, unexpected = model.load_state_dict(weights, strict=False)
        assert set(missing) == {"norm.weight", "norm.bias", "head.weight", "head.bias"} and not unexpected
    return model


def save_model(path, model, what, sizes, args, data):
    """Write a net (or a masked autoencoder's encoder) with what rebuilds it and decodes its logits. what:
    "mgp", or its loss."""
    runtime.save_checkpoint(path, {
        "method": "livt", "arch": args.arch, "what": what, "sizes": sizes, "tau": args.tau,
        "dataset": data.name, "class_names": data.class_names, "class_counts": data.class_counts.tolist(),
        "mean": data.mean, "std": data.std,
        "state_dict": {name: value.cpu() for name, value in model.state_dict().items()}})


def load_model(path, num_classes=None):
    """A saved classifier in eval mode, on the CPU, and what was saved with it (class_names, mean, std, what:
    its loss, ...). num_classes: refuse a net that has another number. Raises ValueError."""
    saved = runtime.load_net(path, "livt", num_classes)
    if saved["what"] == "mgp":
        raise ValueError(f"{path} is a pre-trained encoder without a classifier; it goes to --mgp-checkpoint")
    model = ViT(**saved["sizes"], num_classes=len(saved["class_names"]))
    model.load_state_dict(saved["state_dict"])
    return model.eval(), saved


def load_encoder(path, sizes):
    """The weights of an MGP checkpoint's encoder. Raises ValueError where it is another net than `sizes`
    says (but for the image size)."""
    saved = runtime.load_net(path, "livt")
    if saved["what"] != "mgp":
        raise ValueError(f"{path} is a fine-tuned net; --mgp-checkpoint takes an mgp.pt")
    for key in ("width", "depth", "heads", "patch_size"):
        if saved["sizes"][key] != sizes[key]:
            flag = key.replace("_", "-")
            raise ValueError(f"{path} has {flag} {saved['sizes'][key]}, not {sizes[key]} (--arch, --{flag})")
    return saved["state_dict"]


# ---------------------------------------------------------------- schedule

def warmup_cosine_lr(epoch, epochs, warmup_epochs, lr, min_lr=0.0):
    """Learning rate at a fractional epoch: linear from 0 to lr over the warm-up, then half a cosine to
    min_lr at `epochs`. A schedule that is shorter than its warm-up ends in it."""
    if epoch < warmup_epochs:
        return lr * epoch / warmup_epochs
    progress = (epoch - warmup_epochs) / (epochs - warmup_epochs)
    return min_lr + (lr - min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def layer_lr_scale(name, depth, decay):
    """Layer-wise lr decay: the factor decay^(depth + 1 - layer) of a ViT's parameter, layer being 0 for the
    embedding, i + 1 for block i, depth + 1 for the last norm and the classifier."""
    part = name.split(".")
    layer = int(part[1]) + 1 if part[0] == "blocks" else depth + 1 if part[0] in ("norm", "head") else 0
    return decay ** (depth + 1 - layer)


def parameter_groups(model, weight_decay, scale_of):
    """AdamW's groups, one for each lr factor scale_of(name) and weight decay: none on biases, norms, tokens
    and positions."""
    groups = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            plain = parameter.ndim != 2  # tokens and positions are [1, L, D]
            key = (scale_of(name), 0.0 if plain else weight_decay)
            groups.setdefault(key, {"scale": key[0], "weight_decay": key[1], "params": []})["params"].append(
                parameter)
    return list(groups.values())


# ---------------------------------------------------------------- training

def train_stage(name, model, loss_of, augmentation, settings, data, test_loader, args, run, device):
    """Train a net. loss_of(forward, images, targets): mean loss of a batch. settings: epochs, warmup_epochs,
    batch_size, lr (peak), min_lr, beta2, scale_of(parameter's name): factor of its lr. test_loader: None
    where there is nothing to score. Returns {"best_all": percent, "seconds", "images_per_second", "loss"},
    evaluation not in the times."""
    seed = runtime.derive_seed(args.seed, name, "augmentation")
    loader = make_loader(data.train, data, settings["batch_size"], device, augmentation, seed, runtime.rank(),
                         runtime.ranks(), args.grad_accumulation, args.workers, args.skip_bad_images)
    optimizer = torch.optim.AdamW(parameter_groups(model, args.weight_decay, settings["scale_of"]),
                                  settings["lr"], betas=(0.9, settings["beta2"]), fused=device.type != "mps")
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    autocast = runtime.autocast(device, args.amp)
    forward = torch.compile(model) if args.compile else model
    targets_of_all = torch.from_numpy(data.train.targets)
    steps, epochs = math.ceil(len(targets_of_all) / settings["batch_size"]), settings["epochs"]
    state = {"loss": None, **run.open_stage(name, model, optimizer)}

    def lr_at(epoch):
        return warmup_cosine_lr(epoch, epochs, settings["warmup_epochs"], settings["lr"], settings["min_lr"])

    for epoch in range(state["epoch"], epochs):
        model.train()
        started, step = time.time() - state["seconds"], state["step"]
        losses = torch.zeros(steps, device=device)
        losses[:step] = state["losses"]
        starts_step = True
        indices = instance_indices(targets_of_all, runtime.generator(args.seed, name, "sampling", epoch))
        for images, targets, share, ends_step in tqdm(
                loader.batches(indices, epoch, step), f"{name}, epoch {epoch + 1}",
                (steps - step) * args.grad_accumulation, leave=False,
                disable=None if runtime.rank() == 0 else True):
            if starts_step:  # masks, mixing and drop path draw from torch's own generators
                torch.manual_seed(runtime.derive_seed(args.seed, name, "noise", epoch, step, runtime.rank()))
            with autocast():
                loss = share * loss_of(forward, images, targets)
            loss.backward()
            starts_step = ends_step
            losses[step] += loss.detach()
            if ends_step:
                runtime.sum_gradients(parameters)
                for group in optimizer.param_groups:
                    group["lr"] = group["scale"] * lr_at(epoch + step / steps)
                optimizer.step()
                optimizer.zero_grad()
                step += 1
                if run.must_stop():
                    state.update(step=step, losses=losses[:step], seconds=time.time() - started)
                    run.save_stage(state, model, optimizer)
                    run.stop()
        mean_loss = run.check_losses(  # the epoch's one host sync
            losses, name, epoch, lambda step: lr_at(epoch + step / steps))
        state.update(epoch=epoch + 1, step=0, losses=losses[:0], loss=mean_loss,
                     seconds=time.time() - started)
        row = {"stage": name, "epoch": epoch + 1, "loss": mean_loss, "seconds": state["seconds"]}
        if (epoch + 1) % args.evaluate_every == 0 or epoch + 1 == epochs:
            if test_loader is not None:
                logits, targets = outputs(model, test_loader, args.amp)
                row.update(scores(logits, targets, data.class_counts))
                state["best_all"] = max(state["best_all"], row["all"])
            runtime.say(f"{name}, epoch {epoch + 1} of {epochs}: loss {mean_loss:.3f}"
                        + (f", all {row['all']:.1f}" if "all" in row else ""))
        run.log(**row)
        run.save_stage(state, model, optimizer)
    runtime.report_bad_images([loader])
    return {"best_all": state["best_all"] if test_loader is not None else None, "seconds": state["seconds"],
            "images_per_second": epochs * len(targets_of_all) / state["seconds"], "loss": state["loss"]}


def outputs(model, loader, amp):
    """(logits, targets) of all of the loader's images, each rank computing its part of them."""
    images = every_image(loader, runtime.rank(), runtime.ranks())
    logits, _, targets = predict(model, images, runtime.autocast(loader.device, amp))
    return runtime.gather_ranks(logits).cpu(), runtime.gather_ranks(targets).cpu()


def assess(model, loss, tau, class_counts, loader, amp):
    """A net's scores by the paper's decoding, argmax z, and by the Bayes classifier's."""
    logits, targets = outputs(model, loader, amp)
    return scores(logits, targets, class_counts), \
        scores(second_decoding(loss, logits, class_counts, tau), targets, class_counts)


# ---------------------------------------------------------------- main

def runs_mgp(args):
    """Whether stage one is part of the run."""
    return not (args.evaluate or args.from_scratch or args.mgp_checkpoint)


def check_args(args, sizes):
    """Refuse values of this method's flags that cannot work. Raises ValueError."""
    if not 0 <= args.label_smoothing < 1:
        raise ValueError(f"--label-smoothing must lie in [0, 1), got {args.label_smoothing}")
    if args.layer_decay is not None and not 0 < args.layer_decay <= 1:
        raise ValueError(f"--layer-decay must lie in (0, 1], got {args.layer_decay}")
    if args.from_scratch and (args.mgp_checkpoint or args.stage == "mgp"):
        raise ValueError("--from-scratch leaves out stage one; leave out --mgp-checkpoint and --stage mgp")
    if args.stage == "mgp" and args.mgp_checkpoint:
        raise ValueError("--mgp-checkpoint is a finished stage one; leave out --stage mgp")
    if args.stage == "bft" and not (args.mgp_checkpoint or args.from_scratch):
        raise ValueError("--stage bft needs --mgp-checkpoint FILE, or --from-scratch")
    if len(set(args.loss)) < len(args.loss):
        raise ValueError("--loss names a loss twice")
    with torch.device("meta"):  # without memory; these raise for sizes that do not fit
        ViT(**sizes, drop_path=args.drop_path)
        if runs_mgp(args):
            MAE(**sizes, decoder_width=args.decoder_width, decoder_depth=1, decoder_heads=args.decoder_heads)
            random_masking(1, (args.image_size // args.patch_size) ** 2, args.mask_ratio)
    for flag in ["batch_size"] + ["mgp_batch_size"] * runs_mgp(args):
        try:
            split_batches(1, getattr(args, flag), 0, runtime.ranks(), args.grad_accumulation)
        except ValueError as reason:
            raise ValueError(f"--{flag.replace('_', '-')}: {reason}") from reason


def main(args):
    with runtime.bad_input():
        device = runtime.start_ranks(args.device)
        runtime.check_flags(args, device)
        sizes = net_sizes(args)
        check_args(args, sizes)
        with runtime.first_rank_first():
            data = load(args.dataset, args.data_dir, args.imb_factor, args.subset_seed, args.train_list,
                        args.test_list)
        if args.images_per_class is not None:
            data = balanced_subset(data, args.images_per_class)
        if data.image_size != args.image_size and not args.evaluate:
            runtime.say(f"images are resized from {data.image_size} to {args.image_size} pixels")
        data.image_size = args.image_size
        if data.num_classes < 2 and args.stage != "mgp":
            raise ValueError(f"{data.name} has one class; only --stage mgp can learn from it")
        split = data.split(args.evaluate_on)
        if args.evaluate:
            model, saved = load_model(args.evaluate, data.num_classes)
            data.mean, data.std, data.image_size = saved["mean"], saved["std"], saved["sizes"]["image_size"]
        loader = make_loader(split, data, 256, device, workers=args.workers, skip_bad=args.skip_bad_images)
        if args.evaluate:
            paper, bayes = assess(model.to(device), saved["what"], saved["tau"], saved["class_counts"],
                                  loader, args.amp)
            runtime.report_bad_images([loader])
            name = Path(args.evaluate).stem
            runtime.say(table([(f"{name}, Bayes decoding", bayes), (name, paper)]))
            return {"method": "livt", "dataset": data.name, **paper}
        encoder = load_encoder(args.mgp_checkpoint, sizes) if args.mgp_checkpoint else {}
        run = runtime.open_run(args, "livt")
    with runtime.bad_input((UnreadableImage, Diverged)):
        stages = run_stages(args, data, loader, sizes, encoder, run, device)
    runtime.report_bad_images([loader])
    runtime.say(table([(stage["name"], stage) for stage in stages]))
    return run.finish("livt", data, stages)


def pretrain(sizes, data, args, run, device):
    """Stage one, masked generative pre-training, without labels. Returns the encoder's weights, on the
    CPU."""
    torch.manual_seed(runtime.derive_seed(args.seed, "mgp", "initialisation"))
    mae = MAE(**sizes, decoder_width=args.decoder_width, decoder_depth=args.decoder_depth,
              decoder_heads=args.decoder_heads, norm_pix=args.norm_pix).to(device)

    def reconstruction_loss(forward, images, targets):
        keep, restore, _ = random_masking(len(images), mae.encoder.num_patches, args.mask_ratio,
                                          device=device)
        predictions, pixels = forward(images, keep, restore)
        return F.mse_loss(predictions.float(), pixels)  # over the masked patches

    if "mgp" in run.state.get("done", {}):
        return load_encoder(run.folder / "mgp.pt", sizes)
    stats = train_stage("mgp", mae, reconstruction_loss, "resized", dict(
        epochs=args.mgp_epochs, warmup_epochs=args.mgp_warmup_epochs, batch_size=args.mgp_batch_size,
        lr=args.mgp_lr * args.mgp_batch_size / 256, min_lr=0.0, beta2=0.95, scale_of=lambda name: 1.0),
        data, None, args, run, device)
    save_model(run.folder / "mgp.pt", mae.encoder, "mgp", sizes, args, data)
    run.save(done={"mgp": stats})
    return {name: value.cpu() for name, value in mae.encoder.state_dict().items()}


def run_stages(args, data, test_loader, sizes, encoder, run, device):
    """Both stages. Returns result.json's `stages`."""
    stages = []
    if runs_mgp(args):
        encoder = pretrain(sizes, data, args, run, device)
        nothing = dict.fromkeys(("all", "many", "medium", "few", "ece", "mce", "group_sizes",
                                 "per_class_accuracy"))  # it does not classify
        stages.append({"name": "mgp", **nothing, **run.state["done"]["mgp"]})
        if args.stage == "mgp":
            return stages

    # Stage two, balanced fine-tuning: one net for each loss; the first named, the run's own, comes last
    strong = args.augment == "strong"
    mix = mixup_cutmix(data.num_classes, *((args.mixup, args.cutmix) if strong else (0, 0)))
    augmentation = "strong" if strong else "standard" if args.image_size <= 64 else "resized"
    counts = torch.from_numpy(data.class_counts)
    decay = args.layer_decay or (1.0 if args.from_scratch else 0.75)
    lr = args.lr * args.batch_size / 256
    settings = dict(epochs=args.epochs, warmup_epochs=args.warmup_epochs, batch_size=args.batch_size, lr=lr,
                    min_lr=min(lr, 1e-6), beta2=0.999,
                    scale_of=lambda name: layer_lr_scale(name, sizes["depth"], decay))
    for loss_name in reversed(args.loss):
        torch.manual_seed(runtime.derive_seed(args.seed, "bft", "initialisation"))
        model = pretrained_vit(sizes, data.num_classes, args.drop_path, encoder).to(device)
        loss_function = balanced_bce_loss if loss_name.endswith("bce") else balanced_ce_loss
        tau = args.tau if loss_name.startswith("balanced") else 0.0

        def classification_loss(forward, images, targets):
            images, soft_targets = mix(images, targets)
            soft_targets = (1 - args.label_smoothing) * soft_targets + args.label_smoothing / data.num_classes
            return loss_function(forward(images)[0], soft_targets, counts, tau)

        file = "model.pt" if loss_name == args.loss[0] else f"model_{loss_name}.pt"
        name = loss_name + ", from scratch" * args.from_scratch
        done = run.state.get("done", {})
        if name in done:
            model.load_state_dict(load_model(run.folder / file)[0].state_dict())
        else:
            done = {**done, name: train_stage(name, model, classification_loss, augmentation, settings, data,
                                              test_loader, args, run, device)}
            save_model(run.folder / file, model, loss_name, sizes, args, data)
            run.save(done=done)
        paper, bayes = assess(model, loss_name, args.tau, data.class_counts, test_loader, args.amp)
        untrained = {"best_all": None, "seconds": None, "images_per_second": None}
        stages += [{"name": f"{name}, Bayes decoding", **bayes, **untrained},
                   {"name": name, **paper, **done[name]}]
    return stages


if __name__ == "__main__":
    main(parse_args())
