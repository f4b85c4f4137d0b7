"""Residual backbones and the cosine classifier.

A backbone maps images [N, 3, H, W] to pooled features [N, D] and says its D as `.feature_dim`.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

CIFAR_DEPTHS = {"resnet14": 14, "resnet20": 20, "resnet32": 32}
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


def imagenet_weights(arch):
    """torchvision's ImageNet-1K weights by name, from its cache or downloaded. Raises ValueError offline."""
    from torchvision.models import get_model_weights
    weights = get_model_weights(arch).IMAGENET1K_V1
    try:
        return weights.get_state_dict(progress=True, check_hash=True)
    except OSError as reason:  # what urllib raises without a network
        raise ValueError(f"the ImageNet weights of {arch} could not be downloaded ({reason}); put "
                         f"{weights.url.rsplit('/', 1)[1]} from {weights.url} into "
                         f"{torch.hub.get_dir()}/checkpoints") from reason


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
        net.load_state_dict(imagenet_weights(arch))
    net.feature_dim = net.fc.in_features
    net.fc = nn.Identity()
    if not last_relu:
        net.layer4[-1] = _WithoutLastReLU(net.layer4[-1])
    return net


def build_backbone(arch, image_size=32, last_relu=True, pretrained=False):
    """A backbone by name.

    arch: one of `ARCHS`; resnet14, 20 and 32 are the CIFAR nets, the others torchvision's (bottlenecks v1.5:
    stride on the 3x3; a 3x3 stem without pooling up to 64 pixels). image_size: side in pixels. last_relu:
    False lets features be negative. pretrained: start from torchvision's ImageNet-1K weights (above 64
    pixels). Returns a module [N, 3, H, W] -> [N, feature_dim]. Raises ValueError for an unknown name, or
    where there are no such weights.
    """
    if pretrained and (arch not in IMAGENET_ARCHS or arch == "resnet10" or image_size <= 64):
        raise ValueError(f"there are no ImageNet weights for {arch} at {image_size} pixels")
    if arch in CIFAR_DEPTHS:
        return CifarResNet(CIFAR_DEPTHS[arch], last_relu)
    if arch in IMAGENET_ARCHS:
        return _torchvision_resnet(arch, image_size, last_relu, pretrained)
    raise ValueError(f"unknown architecture {arch!r}; known: {', '.join(ARCHS)}")


class CosineClassifier(nn.Module):
    """logits = scale * cos(features, W_c), without bias; so |logits| <= scale.

    forward: features [N, D] -> logits [N, C], in float32. scale: the factor gamma; a parameter when
    learn_scale, else fixed. W is Glorot uniform, as google-research/class_balanced_distillation has it.
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
            return self.scale * F.normalize(features.float(), dim=1) @ F.normalize(self.weight, dim=1).t()


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
            raise ValueError(f"there are no ImageNet weights for {arch}; name a file of your own weights")
        state = imagenet_weights(arch)
    if state is not None:
        state = state.get("state_dict", state)
        of_classifier = lambda values, yes: {key: value for key, value in values.items()
                                             if key.startswith(("fc.", "classifier.")) == yes}
        try:
            net.load_state_dict({**of_classifier(net.state_dict(), True), **of_classifier(state, False)})
        except RuntimeError as reason:
            raise ValueError(f"these weights are not a {arch}'s: {' '.join(str(reason).split())[:200]}") \
                from reason
    if arch in CIFAR_DEPTHS:
        encoder = nn.Sequential(net.conv1, net.bn1, nn.ReLU(), net.blocks)
    else:  # without pooling and classifier
        encoder = net.features if hasattr(net, "features") else nn.Sequential(*list(net.children())[:-2])
    encoder = fold_batch_norm(encoder)
    with torch.no_grad():
        shape = encoder(torch.zeros(1, 3, 224, 224)).shape
    encoder.feature_dim, encoder.stride = shape[1], 224 // shape[2]
    return encoder
