"""ReActNet: networks with 1-bit weights and activations (Liu et al., ECCV 2020; liuzechun/ReActNet@a6cd08d).

A net maps images [N, 3, H, W] to logits [N, C]; `.features` stops at the last map [N, D, h, w], D being
`.feature_dim`. `binarize` of a net or a piece: True; "activations", with real weights (ReActNet's first
training step, and what `unpack` returns); False, the full-precision twin: real weights, no sign. Parameters
have the same names and shapes in all three, so any state dict loads strictly into any of them.
"""
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F


# ---------------------------------------------------------------- pieces

class _Sign(torch.autograd.Function):
    """sign(x), sign(0) = 0; backwards the derivative of the piecewise polynomial: 2 - 2|x| on [-1, 1], else 0
    (Bi-Real Net). Saves that derivative, one tensor, instead of the polynomials' graph."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x.abs().mul_(-2).add_(2).clamp_(min=0))
        return x.sign()

    @staticmethod
    def backward(ctx, gradient):
        slope, = ctx.saved_tensors
        return gradient * slope


class _PReLU(torch.autograd.Function):
    """F.prelu of x [N, C, H, W] and slope [C], backwards in whole-tensor operations: torch's kernel goes one
    element at a time on a CPU."""

    @staticmethod
    def forward(ctx, x, slope):
        ctx.save_for_backward(x, slope)
        return F.prelu(x, slope)

    @staticmethod
    def backward(ctx, gradient):
        x, slope = ctx.saved_tensors
        above = torch.ops.aten.threshold_backward(gradient, x, 0)  # where x > 0, else 0
        below = gradient - above
        return torch.addcmul(above, below, slope[:, None, None]), (below * x).sum((0, 2, 3))


class _BinaryWeight(torch.autograd.Function):
    """mean|w| sign(w), the mean over each output channel, sign(0) = +1; backwards the gradient passes where
    |w| <= 1, not multiplied by the mean."""

    @staticmethod
    def forward(ctx, weight):
        size = weight.abs()
        ctx.save_for_backward(size <= 1)

        scale = size.mean((1, 2, 3), keepdim=True)
        return torch.copysign(scale, weight + 0.0)  # -0.0 + 0.0 = +0.0; torch.where takes 20 times as long

    @staticmethod
    def backward(ctx, gradient):
        passes, = ctx.saved_tensors
        return gradient * passes


class BinaryConv2d(nn.Conv2d):
    """Convolution with weights mean|w| sign(w), without bias; `weight` holds the real w, started as Conv2d's.

    binarize: True, or anything else for a plain convolution with w. Padding is zero: at the border a binary
    input is in {-1, 0, 1}. ReActNet starts w at rand * .001, all signs +1; Conv2d's start is ours.
    """

    def __init__(self, in_channels, out_channels, kernel_size, stride=1, padding=0, binarize=True):
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, bias=False)
        self.binarize = binarize is True

    def forward(self, x):
        weight = _BinaryWeight.apply(self.weight) if self.binarize else self.weight
        return F.conv2d(x, weight, None, self.stride, self.padding)


class RSign(nn.Module):
    """sign(x + b) with a learnable b per channel, 0 at the start; x + b where binarize is False."""

    def __init__(self, channels, binarize=True):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.binarize = bool(binarize)

    def forward(self, x):
        x = x + self.bias.to(x.dtype)  # under autocast everything between convolutions stays bf16
        return _Sign.apply(x) if self.binarize else x


class RPReLU(nn.Module):
    """PReLU(x + g) + z with learnable g, z (0 at the start) and slope (.25) per channel."""

    def __init__(self, channels):
        super().__init__()
        self.before = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.slope = nn.Parameter(torch.full((channels,), 0.25))
        self.after = nn.Parameter(torch.zeros(1, channels, 1, 1))

    def forward(self, x):
        before, slope, after = (p.to(x.dtype) for p in (self.before, self.slope, self.after))
        return _PReLU.apply(x + before, slope) + after


def _shrink(x):
    """Mean of 2x2 pixels; of what there is of them at the border of a map of odd side."""
    return F.avg_pool2d(x, 2, ceil_mode=True)


class _BlockA(nn.Module):
    """A binary 3x3 and a binary 1x1 convolution, each with a shortcut. Where channels double there are two
    1x1 convolutions side by side, so that both halves have one."""

    def __init__(self, in_channels, channels, stride, binarize):
        super().__init__()
        self.stride = stride

        self.sign1 = RSign(in_channels, binarize)
        self.conv1 = BinaryConv2d(in_channels, in_channels, 3, stride, 1, binarize)
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.act1 = RPReLU(in_channels)

        self.sign2 = RSign(in_channels, binarize)
        halves = channels // in_channels  # 1 or 2
        self.conv2 = nn.ModuleList(BinaryConv2d(in_channels, in_channels, 1, 1, 0, binarize)
                                   for _ in range(halves))
        self.bn2 = nn.ModuleList(nn.BatchNorm2d(in_channels) for _ in range(halves))
        self.act2 = RPReLU(channels)

    def forward(self, x):
        u = self.bn1(self.conv1(self.sign1(x))) + (_shrink(x) if self.stride == 2 else x)
        u = self.act1(u)

        v = self.sign2(u)
        parts = [bn(conv(v)) + u for conv, bn in zip(self.conv2, self.bn2)]
        return self.act2(parts[0] if len(parts) == 1 else torch.cat(parts, 1))


class _Block18(nn.Module):
    """A binary 3x3 convolution with a shortcut (Bi-Real Net's block); where the stride is 2 the shortcut is a
    mean and a real 1x1 convolution."""

    def __init__(self, in_channels, channels, stride, binarize):
        super().__init__()
        self.sign = RSign(in_channels, binarize)
        self.conv = BinaryConv2d(in_channels, channels, 3, stride, 1, binarize)
        self.bn = nn.BatchNorm2d(channels)
        self.shortcut = None if stride == 1 else nn.Sequential(
            nn.AvgPool2d(2, ceil_mode=True), nn.Conv2d(in_channels, channels, 1, bias=False),
            nn.BatchNorm2d(channels))
        self.act = RPReLU(channels)

    def forward(self, x):
        shortcut = x if self.shortcut is None else self.shortcut(x)
        return self.act(self.bn(self.conv(self.sign(x))) + shortcut)


# ---------------------------------------------------------------- nets

class _ReActNet(nn.Module):
    def forward(self, images):
        return self.classifier(self.features(images).mean((2, 3)))

    def features(self, images):
        return self.blocks(self.stem(images))


class ReActNetA(_ReActNet):
    """ReActNet-A: MobileNet's 13 blocks with full binary 3x3 convolutions, a real stem and classifier.

    width: factor of all channels (1: D = 1024). image_size: side in pixels; up to 64 the stem has stride 1
    instead of 2, and a 32-pixel image ends in a 2x2 map. Raises ValueError for a width that leaves no
    channel.
    """

    def __init__(self, num_classes=1000, width=1.0, image_size=224, binarize=True):
        super().__init__()
        c = _base_channels(32, width)
        self.stem = nn.Sequential(nn.Conv2d(3, c, 3, 1 if image_size <= 64 else 2, 1, bias=False),
                                  nn.BatchNorm2d(c))

        plan = [(1, 2, 1), (2, 4, 2), (4, 4, 1), (4, 8, 2), (8, 8, 1), (8, 16, 2), *[(16, 16, 1)] * 5,
                (16, 32, 2), (32, 32, 1)]  # channels in and out, in units of c; stride
        self.blocks = nn.Sequential(*(_BlockA(i * c, o * c, stride, binarize) for i, o, stride in plan))

        self.feature_dim = 32 * c
        self.classifier = nn.Linear(self.feature_dim, num_classes)


class ReActNet18(_ReActNet):
    """ReActNet on Bi-Real Net's ResNet-18: 16 binary 3x3 convolutions, each with a shortcut.

    width: factor of all channels (1: D = 512). image_size: side in pixels; up to 64 the stem is 3x3 without
    stride and pooling, and a 32-pixel image ends in a 4x4 map. Raises ValueError as `ReActNetA`.
    """

    def __init__(self, num_classes=1000, width=1.0, image_size=224, binarize=True):
        super().__init__()
        c = _base_channels(64, width)
        if image_size <= 64:
            self.stem = nn.Sequential(nn.Conv2d(3, c, 3, 1, 1, bias=False), nn.BatchNorm2d(c))
        else:
            self.stem = nn.Sequential(nn.Conv2d(3, c, 7, 2, 3, bias=False), nn.BatchNorm2d(c),
                                      nn.MaxPool2d(3, 2, 1))

        blocks, in_channels = [], c
        for channels in (c, 2 * c, 4 * c, 8 * c):
            for _ in range(4):
                stride = 2 if channels > in_channels else 1
                blocks.append(_Block18(in_channels, channels, stride, binarize))
                in_channels = channels
        self.blocks = nn.Sequential(*blocks)

        self.feature_dim = 8 * c
        self.classifier = nn.Linear(self.feature_dim, num_classes)


def _base_channels(channels, width):
    if not 0 < width <= 16 or round(channels * width) < 1:
        raise ValueError(f"a width of {width} leaves no channel, or is above 16, which no memory holds")
    return round(channels * width)


# ---------------------------------------------------------------- size and cost

@torch.no_grad()
def count_operations(net, image_size):
    """Multiplications of one image of that side: {"flops", "bops", "ops"}, ops = flops + bops / 64.

    bops: those of convolutions with binary weights; flops: those of all other convolutions and linear layers.
    As ReActNet counts, batch norm, activations and pooling are left out.
    """
    counts, hooks = {"flops": 0, "bops": 0}, []

    def count(module, inputs, output):
        kind = "bops" if getattr(module, "binarize", False) else "flops"
        counts[kind] += output[0, 0].numel() * module.weight.numel()  # pixels x weights

    for module in net.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            hooks.append(module.register_forward_hook(count))

    was_training = net.training
    try:
        net.eval()(torch.zeros(1, 3, image_size, image_size, device=next(net.parameters()).device))
    finally:
        net.train(was_training)
        for hook in hooks:
            hook.remove()

    return {**counts, "ops": counts["flops"] + counts["bops"] / 64}


def pack(net):
    """A net's state with its binary weights as single bits, for a file.

    Returns {"binary": {name: {"bits": uint8 [ceil(n / 8)], "scale": float [O], "shape": [O, I, k, k]}},
    "real": {name: tensor}}, on the CPU. Raises ValueError for a net without binary weights.
    """
    binary = {}
    for name, module in net.named_modules():
        if isinstance(module, BinaryConv2d) and module.binarize:
            weight = _BinaryWeight.apply(module.weight.detach())  # as the net itself computes it
            bits = np.packbits((weight >= 0).flatten().cpu().numpy())
            binary[f"{name}.weight"] = {"bits": torch.from_numpy(bits), "shape": list(weight.shape),
                                        "scale": weight[:, 0, 0, 0].abs().cpu()}

    if not binary:
        raise ValueError("the net has no binary weights to pack")

    real = {name: value.cpu() for name, value in net.state_dict().items() if name not in binary}
    return {"binary": binary, "real": real}


def unpack(packed):
    """A state dict from what `pack` returned, for the net with binarize="activations": its convolutions hold
    exactly the weights that the packed net computed with, so its logits are the same."""
    state = dict(packed["real"])

    for name, entry in packed["binary"].items():
        shape, scale = entry["shape"], entry["scale"].view(-1, 1, 1, 1)
        bits = np.unpackbits(entry["bits"].numpy(), count=int(np.prod(shape)))
        signs = torch.from_numpy(bits).view(shape) > 0
        state[name] = torch.where(signs, scale, -scale)
    return state
