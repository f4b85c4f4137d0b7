"""Residual backbones, torchvision's published weights for them, and the cosine classifier.

A backbone maps images [N, 3, H, W] to pooled features [N, D] and says its D as `.feature_dim`.
"""
import hashlib
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

CIFAR_DEPTHS = {f"resnet{depth}": depth for depth in (14, 20, 32, 44, 56, 110)}
IMAGENET_ARCHS = ("resnet10", "resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
ARCHS = (*CIFAR_DEPTHS, *IMAGENET_ARCHS)
# torchvision's nets that `build_encoder` knows how to cut before their pooling
FAMILIES = ("resnet", "resnext", "wide_resnet", "regnet", "efficientnet", "mobilenet", "convnext")


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut without parameters (option A of He et al., CVPR 2016, section 4.2):
    every second pixel, the new channels zero, half of them before and half behind the old ones."""

    def __init__(self, in_channels, channels, stride, last_relu=True):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride, self.new_channels, self.last_relu = stride, channels - in_channels, last_relu

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = self.bn2(self.conv2(out))
        if self.stride > 1 or self.new_channels:
            half = self.new_channels // 2
            x = F.pad(x[:, :, ::self.stride, ::self.stride], (0, 0, 0, 0, half, self.new_channels - half))
        return F.relu(out + x, inplace=True) if self.last_relu else out + x


class CifarResNet(nn.Module):
    """ResNet of depth 6n + 2 for small images: three groups of n blocks, 16, 32 and 64 channels wide.

    forward: [N, 3, H, W] -> features [N, 64], average-pooled. last_relu: whether the last block ends in a
    ReLU; without it features can be negative. Raises ValueError for a depth not 6n + 2. He et al., CVPR 2016,
    section 4.2; initialisation as LDAM-DRW@2536330 (Kaiming normal). ResNet-32 with a linear classifier over
    10 classes has 464,154 parameters.
    """
    feature_dim = 64

    def __init__(self, depth, last_relu=True):
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"a CIFAR ResNet has depth 6n + 2 (14, 20, 32, ...), got {depth}")
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)

        blocks, in_channels = [], 16
        for channels in (16, 32, 64):
            for i in range((depth - 2) // 6):
                blocks.append(BasicBlock(in_channels, channels, 2 if i == 0 and channels > 16 else 1))
                in_channels = channels
        blocks[-1].last_relu = last_relu
        self.blocks = nn.Sequential(*blocks)

        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, images):
        x = F.relu(self.bn1(self.conv1(images)), inplace=True)
        return self.blocks(x).mean((2, 3))


class _WithoutLastReLU(nn.Module):
    """A torchvision block whose output is not rectified."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x):
        block = self.block
        out = block.bn2(block.conv2(block.relu(block.bn1(block.conv1(x)))))
        if hasattr(block, "conv3"):  # a bottleneck
            out = block.bn3(block.conv3(block.relu(out)))
        return out + (x if block.downsample is None else block.downsample(x))


# ---------------------------------------------------------------- weights

def imagenet_weights(arch):
    """torchvision's ImageNet-1K weights by name, from torch.hub's cache or downloaded into it. Raises
    ValueError, also where the cached file is another one."""
    from torchvision.models import get_model_weights
    return published_weights(get_model_weights(arch).IMAGENET1K_V1.url)


def published_weights(url):
    """A state dict from torch.hub's cache, or downloaded into it; executes no code from the file.

    url: its name ends in the first digits of the file's sha256, as torchvision's do (resnet18-f37072fd.pth):
    they are checked each time, because the cache is a folder like any other. Raises ValueError.
    """
    name = url.rsplit("/", 1)[1]
    prefix = Path(name).stem.rpartition("-")[2]
    path = Path(torch.hub.get_dir(), "checkpoints", name)

    try:
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), prefix)
        digest = hashlib.sha256()
        with open(path, "rb") as file:
            while chunk := file.read(2 ** 20):
                digest.update(chunk)
    except (OSError, RuntimeError) as reason:  # no network, no right to write; a download that was cut
        raise ValueError(f"{name} could not be downloaded ({reason}); put {name} from {url} into "
                         f"{path.parent}") from reason

    if not digest.hexdigest().startswith(prefix):
        raise ValueError(f"{path} is not the published file, whose sha256 starts with {prefix}; delete it, "
                         f"or put there what {url} has")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as reason:  # torch, zipfile and pickle each raise their own
        raise ValueError(f"{path} holds more than weights; delete it") from reason


def load_weights(net, state, arch):
    """Load a state dict strictly, but for the classifier, which stays as it is.

    state: with or without a classifier (fc.*, classifier.*). Raises ValueError, naming what is missing, what
    is left over and what has another shape.
    """
    classifier = ("fc.", "classifier.")
    own = net.state_dict()
    own = {name: value for name, value in own.items() if not name.startswith(classifier)}
    state = {name: value for name, value in state.items() if not name.startswith(classifier)}

    differences = {
        "missing": [name for name in own if name not in state  # older files do not count batches
                    and not name.endswith("num_batches_tracked")],
        "unexpected": [name for name in state if name not in own],
        "of another shape": [f"{name} {list(state[name].shape)}, not {list(value.shape)}"
                             for name, value in own.items()
                             if name in state and state[name].shape != value.shape]}
    said = [f"{len(names)} {what} ({', '.join(names[:2])}{', ...' if len(names) > 2 else ''})"
            for what, names in differences.items() if names]
    if said:
        raise ValueError(f"these weights are not a {arch}'s: of {len(own)} entries {'; '.join(said)}")

    net.load_state_dict(state, strict=False)


# ---------------------------------------------------------------- backbones by name

def _torchvision_resnet(arch, image_size, last_relu, pretrained):
    """torchvision's ResNet without its classifier; gamma of each block's last batch norm starts at 0."""
    from torchvision.models import resnet as tv  # imported here: the CIFAR nets need no torchvision
    if arch == "resnet10":  # OLTR@f50e375: one basic block a group
        net = tv.ResNet(tv.BasicBlock, [1, 1, 1, 1], zero_init_residual=True)
    else:
        net = getattr(tv, arch)(weights=None, zero_init_residual=True)

    if image_size <= 64:  # the usual stem for small images: the 7x7 one would leave a 1x1 map of 32 pixels
        net.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
        net.maxpool = nn.Identity()

    if pretrained:
        load_weights(net, pretrained, arch)

    net.feature_dim = net.fc.in_features
    net.fc = nn.Identity()
    if not last_relu:
        net.layer4[-1] = _WithoutLastReLU(net.layer4[-1])
    return net


def build_backbone(arch, image_size=32, last_relu=True, pretrained=False):
    """A backbone by name.

    arch: one of `ARCHS`; resnet14, 20, 32, 44, 56 and 110 are the CIFAR nets, the others torchvision's
    (bottlenecks v1.5: stride on the 3x3; a 3x3 stem without pooling up to 64 pixels). image_size: side in
    pixels. last_relu: False lets features be negative. pretrained: a state dict to start from
    (`common.pretrained.backbone_weights` reads one from a file), or True or "ImageNet-1K" for torchvision's
    weights (above 64 pixels). Returns a module [N, 3, H, W] -> [N, feature_dim]. Raises ValueError for an
    unknown name, for weights that do not fit, or where there are none.
    """
    if arch not in ARCHS:
        raise ValueError(f"unknown architecture {arch!r}; known: {', '.join(ARCHS)}")
    if pretrained in (True, "ImageNet-1K"):
        if arch not in IMAGENET_ARCHS or arch == "resnet10" or image_size <= 64:
            raise ValueError(f"there are no ImageNet weights for {arch} at {image_size} pixels")
        pretrained = imagenet_weights(arch)

    if arch in IMAGENET_ARCHS:
        return _torchvision_resnet(arch, image_size, last_relu, pretrained)
    net = CifarResNet(CIFAR_DEPTHS[arch], last_relu)
    if pretrained:
        load_weights(net, pretrained, arch)
    return net


class CosineClassifier(nn.Module):
    """logits = scale * cos(features, W_c), without bias; so |logits| <= scale.

    forward: features [N, D] -> logits [N, C], in the weights' own precision, under autocast too. scale: the
    factor gamma; a parameter when learn_scale, else fixed. W is Glorot uniform, as
    google-research/class_balanced_distillation has it.
    """

    def __init__(self, feature_dim, num_classes, scale, learn_scale=False):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_classes, feature_dim))
        nn.init.xavier_uniform_(self.weight)
        scale = torch.tensor(float(scale))
        if learn_scale:
            self.scale = nn.Parameter(scale)
        else:
            self.register_buffer("scale", scale)

    def forward(self, features):
        # bf16 rounds cosines to 3 digits, so this small product leaves autocast
        with torch.autocast(features.device.type, enabled=False):
            features = F.normalize(features.to(self.weight.dtype), dim=1)
            return self.scale * features @ F.normalize(self.weight, dim=1).t()

    @torch.no_grad()
    def imprint(self, features, targets, classes, others):
        """Set the rows of `classes` to their class's mean unit feature, as long as the rows of `others` are
        on average (hshustc/CVPR19_Incremental_Learning).

        features: [n, D]; targets: class ids [n]; classes, others: class ids.
        """
        length = self.weight[others].norm(dim=1).mean()
        features = F.normalize(features, dim=1)
        for c in classes.tolist():
            self.weight[c] = length * F.normalize(features[targets == c].mean(0), dim=0)


class ScaledLinear(nn.Linear):
    """logits = s_c (W_c v + b_c), with a learnable factor s of each class, 1 at the start (learnable weight
    scaling, Kang et al., ICLR 2020). forward: features [N, D] -> logits [N, C]."""

    def __init__(self, feature_dim, num_classes):
        super().__init__(feature_dim, num_classes)
        self.scale = nn.Parameter(torch.ones(num_classes))

    def forward(self, features):
        return self.scale * super().forward(features)


@torch.no_grad()
def tau_normalise(classifier, tau=1.0):
    """Scale a classifier's rows to |W_c|^(1 - tau), drop its bias if it has one (Kang et al., ICLR 2020)."""
    classifier.weight /= classifier.weight.norm(dim=1, keepdim=True) ** tau
    if getattr(classifier, "bias", None) is not None:
        classifier.bias.zero_()


def fold_batch_norm(net):
    """A frozen copy of a net in which batch norm right behind a convolution is part of its weights and bias.

    net: any module that torch.fx can trace; it is put in eval mode. The copy computes what the net does in
    eval mode, 1.1 to 1.3 times as fast on a CPU, and needs no gradient.
    """
    from torch.fx.experimental.optimization import fuse
    return fuse(net.eval()).eval().requires_grad_(False)


def build_encoder(arch, state=None):
    """A frozen backbone that ends in its last map, batch norm folded: images [N, 3, H, W] -> [N, D, h, w].

    arch: a CIFAR ResNet, or torchvision's name of a ResNet, EfficientNet or another net of `FAMILIES`. state:
    its state dict, with or without a classifier, itself or as {"state_dict": ...}, loaded strictly; or
    "ImageNet-1K", torchvision's; None: random weights. D is `.feature_dim`, `.stride` the pixels of the image
    a pixel of the map. Raises ValueError for an unknown name, and for a state that is not to be had or does
    not fit.
    """
    if arch in CIFAR_DEPTHS:
        net = CifarResNet(CIFAR_DEPTHS[arch])
    else:
        from torchvision.models import get_model, list_models
        if not arch.startswith(FAMILIES) or arch not in list_models():
            raise ValueError(f"unknown encoder {arch!r}; known: {', '.join(CIFAR_DEPTHS)}, and torchvision's "
                             f"{', '.join(FAMILIES)}")
        net = get_model(arch, weights=None)

    if state == "ImageNet-1K":
        if arch in CIFAR_DEPTHS:
            raise ValueError(f"there are no ImageNet weights for {arch}; name --teacher-weights FILE")
        state = imagenet_weights(arch)
    if state is not None:
        load_weights(net, state.get("state_dict", state), arch)

    if arch in CIFAR_DEPTHS:
        encoder = nn.Sequential(net.conv1, net.bn1, nn.ReLU(), net.blocks)
    else:  # without pooling and classifier
        encoder = net.features if hasattr(net, "features") else nn.Sequential(*list(net.children())[:-2])

    encoder = fold_batch_norm(encoder)
    with torch.no_grad():
        shape = encoder(torch.zeros(1, 3, 224, 224)).shape
    encoder.feature_dim, encoder.stride = shape[1], 224 // shape[2]
    return encoder
