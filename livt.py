"""Learning Imbalanced Data with Vision Transformers (LiVT)
Xu, Liu, Yang, Chai, Yuan. CVPR 2023, https://arxiv.org/abs/2212.02015

Stage one, masked generative pre-training (MGP), trains a ViT as a masked autoencoder: no labels, whose
imbalance would bias its features. Stage two, balanced fine-tuning (BFT), adds a classifier, by the balanced
binary cross-entropy (Bal-BCE): in training alone, logits are shifted by their class's log odds.

    python livt.py                                                    # embedded images, 3 minutes on 2 cores
    python livt.py --dataset cifar100_lt --loss balanced-bce bce ce balanced-ce
    torchrun --nproc_per_node 8 livt.py --dataset imagenet_lt --data-dir /data/imagenet

Expect (embedded images, all classes, 3 seeds, results/livt.md): BCE 50.9 +- .8, Bal-BCE 68.8 +- .9, by
`bayes_decode` 72.1 +- .6. No MGP: 65.8 +- .4 in as many epochs, 69.2 +- 1.4 in as much time.

`paper:` marks a departure or a choice; [G]: the authors' code, XuZhengzhuo/LiVT@68546ef, and its logs. Small
departures (augmentation, pixels, test images) and the paper's other rows' commands: results/livt.md.
"""
import math

import torch
import torch.nn.functional as F

from common.augment import mixup_cutmix
from common.data import balanced_subset
from common.evaluate import scores
from common.flags import BOOLEAN, Parser, count, fraction, number, text
from common.folder import load_net
from common.loader import Cut
from common.pretrained import vit_weights
from common.ranks import bad_input, ranks
from common.run import Run
from common.vit import MAE, VIT_SIZES, ViT, random_masking, resize_positions

# ---------------------------------------------------------------- recipes

PAPER = dict(  # the table in [G]'s README; evaluate_every, quick: ours
    arch="base", width=None, depth=None, heads=None, patch_size=16, image_size=224,
    decoder_width=512, decoder_depth=8, decoder_heads=16,
    mgp_epochs=800, mgp_warmup_epochs=40, mgp_batch_size=4096, mgp_lr=1.5e-4,
    epochs=100, batch_size=1024, lr=1e-3,  # paper: 1e-3 / here: for 256 images, as [G] and MAE scale it
    warmup_epochs=5,  # paper: 10 / here: as in all of [G]'s runs
    weight_decay=0.05, drop_path=0.1, augment="strong", mixup=0.8, cutmix=1.0, tau=1.0, evaluate_every=1,
    quick=dict(mgp_epochs=200, mgp_warmup_epochs=10, epochs=30))
# paper: CIFAR starts from ImageNet-LT's MGP net, at 64 pixels / here: MGP on CIFAR-LT itself, at 32; all ours
SMALL = {
    **PAPER, "arch": "tiny", "patch_size": 4, "image_size": 32,
    "decoder_width": 128, "decoder_depth": 1, "decoder_heads": 4,  # as SDMAE: a large one overfits
    "mgp_batch_size": 512, "batch_size": 256, "evaluate_every": 5,
    "quick": dict(mgp_epochs=30, mgp_warmup_epochs=3, mgp_batch_size=64, mgp_lr=2e-3, epochs=8,
                  warmup_epochs=1, batch_size=64, lr=4e-3, augment="plain", drop_path=0.0)}
FASHION = {  # all ours; chosen on the validation images
    **SMALL, "arch": "mini", "patch_size": 8, "decoder_width": 64,
    "mgp_epochs": 55, "mgp_warmup_epochs": 5, "mgp_batch_size": 64, "mgp_lr": 4e-3,
    "epochs": 22, "batch_size": 32, "lr": 8e-3, "augment": "plain", "drop_path": 0.0,
    "quick": dict(mgp_epochs=10, mgp_warmup_epochs=1, epochs=10, warmup_epochs=1)}
RECIPES = {
    "fashion_lt": FASHION,
    "cifar10_lt": SMALL, "cifar100_lt": SMALL,
    "imagenet_lt": {**PAPER, "lr": 2.5e-4},  # paper: 1e-3 / here: for 1024, as in [G]'s log, ending at 60.8
    "inat18": {**PAPER, "drop_path": 0.2},  # paper: MGP at 128 pixels / here: at 224, in one run
    "places_lt": {**PAPER, "epochs": 30, "tau": 1.05},
    "small": {**FASHION, "patch_size": None, "image_size": 64},  # ours, for small sets: 16 tokens, too
}
SIZES = {**VIT_SIZES, "mini": dict(width=128, depth=4, heads=4)}  # ours, for 16 tokens
LOSSES = ("ce", "balanced-ce", "bce", "balanced-bce")
NOT_CLASSIFYING = ("all", "many", "medium", "few", "ece", "mce", "group_sizes", "per_class_accuracy")


def parse_args(argv=None):
    parser = Parser(__doc__, RECIPES)  # --dataset, --seed, --resume, ...: common/flags.py
    add = parser.method
    add("--stage", choices=["mgp", "bft", "both"], default="both", help="pre-training, fine-tuning, or both")
    add("--mgp-checkpoint", type=text, metavar="FILE", help="instead of stage one: an mgp.pt, or the encoder "
        "of facebookresearch/mae, of LiVT's authors, or a plain ViT of timm; --arch, --patch-size must fit")
    add("--from-scratch", action=BOOLEAN, default=False, help="leave out stage one")
    add("--loss", nargs="+", choices=LOSSES, metavar="LOSS", default=["balanced-bce", "bce"],
        help=f"{', '.join(LOSSES)}: of fine-tuning; each trains a net, the first is the run's own")
    add("--tau", type=number, help="factor of the balanced losses' bias")
    add("--images-per-class", type=count, metavar="N", help="train on the first N of each class")
    add("--arch", choices=SIZES, help="size of the ViT")
    add("--width", type=count, help="(that of --arch) channels of the ViT")
    add("--depth", type=count, help="(that of --arch) blocks of the ViT")
    add("--heads", type=count, help="(that of --arch) attention heads of the ViT")
    add("--patch-size", type=count, help="pixels (a quarter of the image)")
    add("--decoder-width", type=count, help="of the masked autoencoder's decoder")
    add("--decoder-depth", type=count, help="of the masked autoencoder's decoder")
    add("--decoder-heads", type=count, help="of the masked autoencoder's decoder")
    add("--mask-ratio", type=fraction, default=0.75, help="share of the patches that MGP hides")
    add("--norm-pix", action=BOOLEAN, default=True, help="MGP's targets are normalised patch by patch")
    add("--mgp-epochs", type=count, help="of pre-training")
    add("--mgp-warmup-epochs", type=number, help="linear warm-up of pre-training")
    add("--mgp-batch-size", type=count, help="global, over all ranks")
    add("--mgp-lr", type=number, help="peak of pre-training for 256 images; scaled with the batch size")
    add("--epochs", type=count, help="of fine-tuning")
    add("--warmup-epochs", type=number, help="linear warm-up of fine-tuning")
    add("--lr", type=number, help="peak of fine-tuning for 256 images; scaled with the batch size")
    add("--weight-decay", type=number, help="on matrices")
    add("--layer-decay", type=fraction, help="(.75; from scratch 1) lr of a block over that of the next one")
    add("--drop-path", type=fraction, help="rate of the last block, in fine-tuning")
    add("--label-smoothing", type=fraction, default=0.0, help="of the targets")  # paper: not given / here: 0
    add("--augment", choices=["plain", "strong"], help="of BFT; strong: RandAugment, erasing, mixing too")
    add("--mixup", type=number, help="alpha of Mixup; 0 leaves it out, and so does --augment plain")
    add("--cutmix", type=number, help="alpha of CutMix; likewise")
    return parser.parse_args(argv)


# ---------------------------------------------------------------- samplers

def instance_indices(targets, generator):
    """Every image once, in a random order. targets: [n]. Returns int64 [n]."""
    return torch.randperm(len(targets), generator=generator)


# ---------------------------------------------------------------- losses

def balanced_bce_loss(logits, targets, class_counts, tau=1.0):
    """Balanced binary cross-entropy, Eq. (6): sigmoid cross-entropy on z_c + tau log(pi_c / (1 - pi_c)),
    summed over the classes, mean over the batch; pi_c: the class's share of the images. tau = 0 is plain BCE,
    Eq. (5). Theorem 2: for tau = 1 the sigmoid is pi_c e^z_c / (pi_c e^z_c + 1 - pi_c), a softmax over yes
    and no, each weighted by how many images it has; so the bias knows how frequent a class is, z_c need not.

    logits: [N, C]; targets: class ids [N] or soft targets [N, C]; class_counts: training images per class
    [C] (on the CPU: then no step waits for a GPU). Returns a scalar. Raises ValueError.
    """
    counts = torch.as_tensor(class_counts).double()
    if logits.ndim != 2 or counts.shape != logits.shape[1:] or not tau >= 0 or \
            targets.shape not in (logits.shape, logits.shape[:1]):
        raise ValueError(f"logits must be [N, C], targets [N] or [N, C], class_counts [C], tau not negative; "
                         f"got {list(logits.shape)}, {list(targets.shape)}, {list(counts.shape)}, {tau}")
    if (counts <= 0).any() or len(counts) < 2:
        raise ValueError("finite log odds need two classes, and a training image of every class")

    bias = counts.log() - (counts.sum() - counts).log()  # Eq. (10), without the rounding of 1 - pi
    shifted = logits.float() + tau * bias.float().to(logits.device, non_blocking=True)  # [G] drops tau here

    if targets.ndim == 1:
        targets = F.one_hot(targets, logits.shape[1])
    losses = F.binary_cross_entropy_with_logits(shifted, targets.float(), reduction="none")
    return losses.sum(1).mean()  # Eq. (6); paper: class weights w_i / here: 1, as in [G]


def balanced_ce_loss(logits, targets, class_counts, tau=1.0):
    """Balanced cross-entropy, Theorem 1: softmax cross-entropy on z_c + tau log pi_c, mean over the batch.
    tau = 0 is plain cross-entropy. Arguments, result and errors: as of balanced_bce_loss."""
    counts = torch.as_tensor(class_counts).double()
    if logits.ndim != 2 or counts.shape != logits.shape[1:] or not tau >= 0 or \
            targets.shape not in (logits.shape, logits.shape[:1]):
        raise ValueError(f"logits must be [N, C], targets [N] or [N, C], class_counts [C], tau not negative; "
                         f"got {list(logits.shape)}, {list(targets.shape)}, {list(counts.shape)}, {tau}")
    if (counts <= 0).any():
        raise ValueError("every class needs a training image: else the log of its prior is not finite")

    log_prior = (counts / counts.sum()).log().float().to(logits.device, non_blocking=True)
    if targets.ndim == 2:
        targets = targets.float()
    return F.cross_entropy(logits.float() + tau * log_prior, targets)  # Eq. (3)


def bayes_decode(logits, class_counts, tau=1.0):
    """Scores whose largest is the Bayes classifier for the balanced error, from a net trained by
    balanced_bce_loss: log sigmoid(z_c + tau b_c) - log pi_c, b_c the class's log odds; tau = 0 for plain BCE.

    At the population optimum with hard targets sigmoid(z_c + tau b_c) is p(c | x) under the training prior,
    so the score is log p(x | c) minus log p(x), exactly. logits: [N, C]; class_counts: [C]. Returns [N, C].
    Raises ValueError. Ours: the paper takes the largest z_c.
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
    """Scores whose largest is the Bayes classifier for the balanced error. loss, one of `LOSSES`, tau: that
    the net was trained by. logits: [N, C]; class_counts: [C]. Returns [N, C]. Raises ValueError."""
    if loss.endswith("bce"):
        return bayes_decode(logits, class_counts, tau if loss == "balanced-bce" else 0.0)
    # a cross-entropy's z + tau log pi is log p(c | x) but for a constant; less log pi, as above
    counts = torch.as_tensor(class_counts, device=logits.device).double()
    return logits.double() + ((tau if loss == "balanced-ce" else 0.0) - 1) * (counts / counts.sum()).log()


# ---------------------------------------------------------------- what the paper adds to a backbone

def net_sizes(args):
    """What a ViT is built from: image_size, patch_size, width, depth, heads."""
    named = {key: getattr(args, key) for key in ("width", "depth", "heads") if getattr(args, key) is not None}
    patch_size = args.patch_size or args.image_size // 4
    return {"image_size": args.image_size, "patch_size": patch_size, **SIZES[args.arch], **named}


def pretrained_vit(sizes, num_classes, drop_path, encoder):
    """A ViT for fine-tuning with an encoder's weights: its classifier and last norm are new, positions are
    interpolated to the image size. encoder: {} for none (paper: that start is not given / here: MAE's)."""
    model = ViT(**sizes, num_classes=num_classes, drop_path=drop_path)
    if encoder:
        weights = {name: value for name, value in encoder.items() if not name.startswith("norm.")}
        weights["positions"] = resize_positions(weights["positions"], model.num_patches)
        model.load_state_dict({**model.state_dict(), **weights})
    return model


def load_model(path, class_names=None):
    """A saved classifier in eval mode, on the CPU, and what was saved with it (class_names, mean, std, loss,
    tau, ...). class_names: of the data that it is to meet. Raises ValueError."""
    model, saved = load_net(path, "livt", [ViT], class_names)
    if model.head is None or not {"loss", "tau"} <= set(saved):
        raise ValueError(f"{path} is no fine-tuned net; a pre-trained encoder goes to --mgp-checkpoint")
    return model, saved


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
    part, *rest = name.split(".")
    layer = int(rest[0]) + 1 if part == "blocks" else depth + 1 if part in ("norm", "head") else 0
    return decay ** (depth + 1 - layer)


def parameter_groups(model, weight_decay, scale_of):
    """AdamW's groups, one for each lr factor scale_of(name) and weight decay. paper: not given; [G]: MGP's
    tokens decay / here: no decay on biases, norms, positions and tokens."""
    groups = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            scale = scale_of(name)
            decay = weight_decay if parameter.ndim == 2 else 0.0  # positions and tokens are [1, L, D]
            group = groups.setdefault((scale, decay), {"scale": scale, "weight_decay": decay, "params": []})
            group["params"].append(parameter)
    return list(groups.values())


# ---------------------------------------------------------------- stage one: masked generative pre-training

def pretrain(run, sizes):
    """Algorithm 1, lines 1 to 9: a masked autoencoder. Returns its encoder's weights, on the CPU."""
    args = run.args
    torch.manual_seed(run.seed("mgp", "initialisation"))
    mae = run.place(MAE(**sizes, decoder_width=args.decoder_width, decoder_depth=args.decoder_depth,
                        decoder_heads=args.decoder_heads, norm_pix=args.norm_pix))
    forward = run.compiled(mae)

    peak_lr = args.mgp_lr * args.mgp_batch_size / 256
    groups = parameter_groups(mae, args.weight_decay, lambda name: 1.0)
    optimizer = torch.optim.AdamW(groups, peak_lr, betas=(0.9, 0.95), fused=run.device.type != "mps")

    # paper: an epoch's last, partial batch is open, [G] drops it / here: trained on, in both stages
    for epoch in run.epochs("mgp", "mgp.pt", (mae.encoder, mae), optimizer, args.mgp_epochs,
                            augmentation="resized", batch_size=args.mgp_batch_size):
        mae.train()
        indices = instance_indices(run.targets, epoch.generator)

        for images, _, share, ends_step in epoch.batches(indices):  # share: of a step's images
            keep, restore, _ = random_masking(len(images), mae.encoder.num_patches, args.mask_ratio,
                                              device=run.device)
            with run.autocast():  # paper: fp16 / here: bf16, which needs no scaler
                predictions, pixels = forward(images, keep, restore)  # of the masked patches alone
                # line 6; paper: |x - x'|_2 / here: mean square over the masked patches, as [G] and MAE
                loss = share * F.mse_loss(predictions.float(), pixels)
            loss.backward()
            epoch.track(loss=loss)
            if ends_step:  # under --grad-accumulation not every batch does
                run.sum_gradients(mae)
                for group in optimizer.param_groups:
                    group["lr"] = warmup_cosine_lr(
                        epoch.now, args.mgp_epochs, args.mgp_warmup_epochs, peak_lr)
                optimizer.step()
                optimizer.zero_grad()

    run.add("mgp", dict.fromkeys(NOT_CLASSIFYING))  # no classifier, no scores
    return {name: value.cpu() for name, value in mae.encoder.state_dict().items()}


# ---------------------------------------------------------------- stage two: balanced fine-tuning

def finetune(run, sizes, encoder, loss_name, file):
    """Algorithm 1, lines 10 to 20: a classifier from the encoder's weights ({}: none), by one of `LOSSES`."""
    args, C, class_counts = run.args, run.data.num_classes, run.class_counts
    loss_function = balanced_bce_loss if loss_name.endswith("bce") else balanced_ce_loss
    tau = args.tau if loss_name.startswith("balanced") else 0.0
    strong = args.augment == "strong"
    plain = "standard" if args.image_size <= 64 else "resized"  # ours: small images are padded, then cropped
    mix = mixup_cutmix(C, args.mixup if strong else 0, args.cutmix if strong else 0)

    torch.manual_seed(run.seed("bft", "initialisation"))
    model = run.place(pretrained_vit(sizes, C, args.drop_path, encoder))
    forward = run.compiled(model)

    peak_lr, decay = args.lr * args.batch_size / 256, args.layer_decay
    if decay is None:  # paper: .75; [G]: .65, too / here: .75; 1 from scratch, where nothing is to be kept
        decay = 1.0 if args.from_scratch else 0.75
    groups = parameter_groups(model, args.weight_decay,
                              lambda name: layer_lr_scale(name, sizes["depth"], decay))
    # paper: beta2 .99 / here: .999, as in three of [G]'s four runs
    optimizer = torch.optim.AdamW(groups, peak_lr, betas=(0.9, 0.999), fused=run.device.type != "mps")

    name = f"{loss_name}, from scratch" if args.from_scratch else loss_name  # and the key of its seeds
    for epoch in run.epochs(name, file, model, optimizer, args.epochs, "strong" if strong else plain,
                            loss=loss_name, tau=args.tau):
        model.train()
        indices = instance_indices(run.targets, epoch.generator)

        for images, targets, share, ends_step in epoch.batches(indices):
            images, targets = mix(images, targets)  # soft targets [N, C]
            targets = (1 - args.label_smoothing) * targets + args.label_smoothing / C
            with run.autocast():
                logits, _ = forward(images)
                loss = share * loss_function(logits, targets, class_counts, tau)  # lines 16, 17: Eq. (6)
            loss.backward()
            epoch.track(loss=loss)
            if ends_step:
                run.sum_gradients(model)
                lr = warmup_cosine_lr(epoch.now, args.epochs, args.warmup_epochs, peak_lr, min(peak_lr, 1e-6))
                for group in optimizer.param_groups:
                    group["lr"] = group["scale"] * lr
                optimizer.step()
                optimizer.zero_grad()

        if epoch.is_scored:
            epoch.log(**run.scores(model))  # of z without the bias

    add_scores(run, name, model, loss_name, args.tau, class_counts)  # paper: open / here: of the last epoch


def add_scores(run, name, model, loss, tau, class_counts):
    """A net's rows: Bayes decoding, and the paper's, argmax z. loss, tau, class_counts: of its training."""
    logits, features, targets = (part.cpu() for part in run.outputs(model))
    bayes = second_decoding(loss, logits, class_counts, tau)
    for row, z in ((f"{name}, Bayes decoding", bayes), (name, logits)):
        run.add(row, scores(z, targets, run.data.class_counts), (z, features, targets))


# ---------------------------------------------------------------- main

def check_args(args, sizes, pretrains):
    """Refuse flags that contradict one another, or sizes that do not fit. Raises ValueError."""
    if args.from_scratch + bool(args.mgp_checkpoint) + (args.stage == "mgp") > 1:
        raise ValueError("choose one of --stage mgp, --mgp-checkpoint FILE and --from-scratch")
    if args.stage == "bft" and not (args.mgp_checkpoint or args.from_scratch or args.evaluate):
        raise ValueError("--stage bft needs --mgp-checkpoint FILE, or --from-scratch")
    if len(set(args.loss)) < len(args.loss):
        raise ValueError("--loss names a loss twice")

    with torch.device("meta"):  # without memory
        num_patches = ViT(**sizes, drop_path=args.drop_path).num_patches
        if pretrains:
            MAE(**sizes, decoder_width=args.decoder_width, decoder_depth=1, decoder_heads=args.decoder_heads)
            random_masking(1, num_patches, args.mask_ratio)
            Cut(args.mgp_batch_size, 0, ranks(), args.grad_accumulation)


def main(args):
    sizes, pretrains = net_sizes(args), not (args.from_scratch or args.mgp_checkpoint or args.evaluate)
    with bad_input():  # whatever is wrong is found before anything is written
        check_args(args, sizes, pretrains)
        run = Run("livt", args)
        if args.images_per_class:
            run.data = balanced_subset(run.data, args.images_per_class)

        if args.evaluate:
            model, saved = load_model(args.evaluate, run.data.class_names)
            run.normalise_as(saved)
            run.data.image_size = saved["image_size"]
            add_scores(run, args.evaluate, model.to(run.device), saved["loss"], saved["tau"],
                       saved["class_counts"])
            run.report()
            return {"method": "livt", "dataset": run.data.name, **run.stages[-1]}

        encoder = vit_weights(args.mgp_checkpoint, sizes) if args.mgp_checkpoint else {}
        run.open([args.mgp_epochs] * pretrains + [args.epochs] * len(args.loss) * (args.stage != "mgp"))

    with run:
        if pretrains:
            encoder = pretrain(run, sizes)
        if args.stage != "mgp":
            for loss_name in reversed(args.loss):  # the first named, the run's own, comes last
                file = "model.pt" if loss_name == args.loss[0] else f"model_{loss_name}.pt"
                finetune(run, sizes, encoder, loss_name, file)
    return run.finish()


if __name__ == "__main__":
    main(parse_args())
