"""CANDLE's student: a ReActNet as a classifier for images of any size; around its training what is no part of
the method; its export with 1-bit weights."""
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from common.augment import resize
from common.folder import load_net, save_checkpoint
from common.ranks import say
from common.reactnet import ReActNet18, ReActNetA, pack, unpack
from common.resnet import CosineClassifier, ScaledLinear

NETS = {"reactnet_a": ReActNetA, "reactnet_18": ReActNet18}


class Student(nn.Module):
    """A ReActNet `net`, for images of one resolution, and a `classifier` on its pooled features.

    forward: images [N, 3, H, H], resized to the resolution -> (logits [N, C], features [N, D]). `encode` ends
    at the last map [N, D, h, w]. binarize: False for its full-precision twin. classifier: linear; cosine (not
    described by CANDLE: its scale is learnt, from 10); scaled (with a factor for each class). settings: what
    rebuilds it.
    """

    def __init__(self, arch, num_classes, width, resolution, binarize=True, classifier="linear"):
        super().__init__()
        self.settings = dict(arch=arch, num_classes=num_classes, width=width, resolution=resolution,
                             binarize=binarize, classifier=classifier)
        self.net = NETS[arch](num_classes, width, resolution, binarize)
        self.classifier, self.net.classifier = self.net.classifier, nn.Identity()

        if classifier == "cosine":
            self.classifier = CosineClassifier(self.net.feature_dim, num_classes, 10.0, learn_scale=True)
        if classifier == "scaled":
            self.classifier = ScaledLinear(self.net.feature_dim, num_classes)

    def load_state_dict(self, state, strict=True):
        """Also what `pack` returned: mean|w| sign(w) as real weights."""
        return super().load_state_dict(unpack(state) if "binary" in state else state, strict)

    def encode(self, images, resolution=None):
        return self.net.features(resize(images, resolution or self.settings["resolution"]))

    def direct_features(self, features, images, resolutions):
        """CANDLE's Figure 5, for its costs. paper: not described / here: the mean of pooled features: these
        [N, D] of its own resolution, and those of the others."""
        others = [r for r in resolutions if r != self.settings["resolution"]]
        return torch.stack([features, *(self.encode(images, r).mean((2, 3)) for r in others)]).mean(0)

    def forward(self, images):
        features = self.encode(images).mean((2, 3))
        return self.classifier(features), features


def projection(student_dim, teacher_dim):
    """A 1x1 convolution, batch norm and ReLU, which take a student's map to a teacher's width."""
    conv = nn.Conv2d(student_dim, teacher_dim, 1, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out")
    return nn.Sequential(conv, nn.BatchNorm2d(teacher_dim), nn.ReLU())


def map_shape(arch, width, resolution):
    """(D, side) of the last map of a net of `NETS`. Raises ValueError where that is one pixel, or nothing."""
    with torch.device("meta"):  # shapes alone
        net = NETS[arch](1, width, resolution).eval()
        D, side = net.features(torch.empty(1, 3, resolution, resolution)).shape[1:3]
    if side < 2:
        raise ValueError(f"--student-resolution {resolution} leaves a map of one pixel; {arch} needs 2 x 2")
    return D, side


def label_loss(kind, logits, targets, class_counts):
    """What a student without a teacher learns by: cross-entropy; for kind "balanced-softmax" BALMS's (Ren et
    al., NeurIPS 2020), whose logits are raised by the classes' log counts. Returns a scalar."""
    if kind == "balanced-softmax":
        logits = logits + class_counts.log().to(logits.device)
    return F.cross_entropy(logits, targets)


def optimizer_for(args, net, device):
    """Adam, or by --student-optimizer sgd SGD with momentum, of a net's parameters."""
    if args.student_optimizer == "sgd":
        return torch.optim.SGD(net.parameters(), args.lr, momentum=0.9, weight_decay=args.weight_decay)
    return torch.optim.Adam(net.parameters(), args.lr, weight_decay=args.weight_decay,
                            fused=device.type != "mps")


def variant(args):
    """What a stage's name says of a student that is not CANDLE's own. It is a key of seeds: another name
    trains another net."""
    said = {
        "balanced softmax": args.from_scratch == "balanced-softmax",
        "full precision": not args.binarize,
        "cosine": args.classifier == "cosine",
        "sgd": args.student_optimizer == "sgd",
        "direct": args.direct_multi_resolution,
        "class-balanced": args.student_sampling == "class-balanced",
    }
    return "".join(f", {word}" for word, holds in said.items() if holds)


def export(args, evaluate):
    """Write a student that candle.py saved, args.export, beside itself with 1-bit weights; name that file
    args.evaluate, and return what evaluate() does: the data, which only scores need, may be missing. Raises
    ValueError where it is no such student."""
    model, saved = load_net(args.export, "candle", [Student])
    path = Path(args.export)
    packed = path.with_name(f"{path.stem}_packed.pt")
    settings = {**saved["settings"], "binarize": "activations"}
    save_checkpoint(packed, {**saved, "settings": settings, "state_dict": pack(model)})
    say(f"wrote {packed}: {packed.stat().st_size / 1e6:.2f} MB")

    args.evaluate = str(packed)
    try:
        return evaluate()
    except ValueError as reason:
        return say(f"not scored: {reason}")
