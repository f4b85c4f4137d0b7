"""What common CIFAR-LT code bases run, for tests/benchmark.py: a data set of PIL images, torchvision's
transforms, DataLoader, float32, NCHW, and blocks as textbooks have them."""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import models, transforms


class PilImages(Dataset):
    """Item -> (normalised image [3, 32, 32], target), one image at a time."""

    def __init__(self, split, transform):
        self.split, self.transform = split, transform

    def __getitem__(self, index):
        return self.transform(Image.fromarray(self.split.images[index])), int(self.split.targets[index])


def pil_loader(data, batch_size, indices, workers, augmentation, pin_memory=False):
    """The peers' loader. augmentation: "standard", or "resized" as masked autoencoders are trained."""
    side = data.image_size
    crop = transforms.RandomCrop(side, padding=4) if augmentation == "standard" else \
        transforms.RandomResizedCrop(side, (0.2, 1.0), interpolation=transforms.InterpolationMode.BICUBIC)
    transform = transforms.Compose([crop, transforms.RandomHorizontalFlip(), transforms.ToTensor(),
                                    transforms.Normalize(data.mean, data.std)])
    return DataLoader(PilImages(data.train, transform), batch_size, sampler=indices.tolist(),
                      num_workers=workers, pin_memory=pin_memory)


def epoch(net, loss_of, optimizer, loader, device):
    """The loop; after every step the number of its images."""
    for images, targets in loader:
        loss = loss_of(net(images.to(device)), targets.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()  # for the mean that they print
        yield len(images)


class Residual(nn.Module):
    def __init__(self, body, shortcut, activation):
        super().__init__()
        self.body, self.shortcut, self.activation = body, shortcut, activation

    def forward(self, x):
        return self.activation(self.body(x) + self.shortcut(x))


def resnet_block(in_channels, channels, stride):
    """He et al., CVPR 2016: two 3x3 convolutions, shortcut of option A."""
    body = nn.Sequential(nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False), nn.BatchNorm2d(channels),
                         nn.ReLU(), nn.Conv2d(channels, channels, 3, 1, 1, bias=False),
                         nn.BatchNorm2d(channels))
    padding = (0, 0, 0, 0, *[(channels - in_channels) // 2] * 2)
    halved = lambda x: F.pad(x[:, :, ::2, ::2], padding)
    return Residual(body, nn.Identity() if stride == 1 else halved, nn.ReLU())


class LearnableBias(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1, channels, 1, 1))

    def forward(self, x):
        return x + self.bias.expand_as(x)


class BinaryConvolution(nn.Conv2d):
    """Bi-Real Net: signs forwards; backwards, for activations, the derivative of a piecewise polynomial, by
    autograd. Masks are turned into numbers where they are used, as ReActNet's public code does it."""

    def forward(self, x):
        below, left, inside = x < -1, x < 0, x < 1
        out = (-1) * below.float() + (x * x + x * 2) * (1 - below.float())
        out = out * left.float() + (-x * x + x * 2) * (1 - left.float())
        out = out * inside.float() + 1 * (1 - inside.float())
        signs = torch.sign(x).detach() - out.detach() + out
        size = self.weight.abs().mean((1, 2, 3), keepdim=True).detach()
        binary, clipped = size * torch.sign(self.weight), self.weight.clamp(-1, 1)
        return F.conv2d(signs, binary.detach() - clipped.detach() + clipped, None, self.stride, self.padding)


def react_block(in_channels, channels, stride):
    """ReActNet's block on Bi-Real Net's ResNet-18."""
    body = nn.Sequential(LearnableBias(in_channels), BinaryConvolution(
        in_channels, channels, 3, stride, 1, bias=False), nn.BatchNorm2d(channels))
    shortcut = nn.Identity() if stride == 1 else nn.Sequential(
        nn.AvgPool2d(2), nn.Conv2d(in_channels, channels, 1, bias=False), nn.BatchNorm2d(channels))
    activation = nn.Sequential(LearnableBias(channels), nn.PReLU(channels), LearnableBias(channels))
    return Residual(body, shortcut, activation)


def net_of(block, widths, num_classes, *activation):
    """A net for small images: 3x3 convolution, blocks from each width to the next, mean, classifier."""
    blocks = (block(a, b, 1 if a == b else 2) for a, b in zip(widths, widths[1:]))
    return nn.Sequential(nn.Conv2d(3, widths[0], 3, 1, 1, bias=False), nn.BatchNorm2d(widths[0]), *activation,
                         *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], num_classes))


def resnet32(num_classes):
    return net_of(resnet_block, [16] * 6 + [32] * 5 + [64] * 5, num_classes, nn.ReLU())


def resnet18(num_classes):
    net = models.resnet18(num_classes=num_classes)
    net.conv1, net.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()  # for small images
    return net


def resnet152_encoder():
    return nn.Sequential(*list(models.resnet152().children())[:-2]).eval().requires_grad_(False)


def reactnet18(num_classes, width=64):
    return net_of(react_block, [width] * 5 + [2 * width] * 4 + [4 * width] * 4 + [8 * width] * 4, num_classes)


class TransformerBlock(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads, self.norm1, self.norm2 = heads, *(nn.LayerNorm(width, eps=1e-6) for _ in range(2))
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x):
        n, length, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).reshape(n, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attention = (q @ k.transpose(-2, -1) * (width // self.heads) ** -0.5).softmax(-1)
        x = x + self.proj((attention @ v).transpose(1, 2).reshape(n, length, width))
        return x + self.mlp(self.norm2(x))


class TextbookViT(nn.Module):
    """Logits from the normed mean of the patch tokens."""

    def __init__(self, image_size, patch_size, width, depth, heads, num_classes):
        super().__init__()
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(torch.randn(1, 1 + (image_size // patch_size) ** 2, width) * 0.02)
        self.embed = nn.Conv2d(3, width, patch_size, patch_size)
        self.blocks = nn.Sequential(*(TransformerBlock(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, num_classes) if num_classes else None

    def forward(self, images):
        x = self.embed(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_token.expand(len(x), -1, -1), x], 1) + self.positions
        return self.head(self.norm(self.blocks(x)[:, 1:].mean(1)))


class TextbookMAE(TextbookViT):
    """Masked autoencoder (He et al., CVPR 2022): images -> mean squared error on the masked patches."""

    def __init__(self, decoder_width, decoder_depth, decoder_heads, patch_size, width, **sizes):
        super().__init__(patch_size=patch_size, width=width, **sizes, num_classes=0)
        self.patch_size = patch_size
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_width))
        fixed = torch.zeros(1, self.positions.requires_grad_(False).shape[1], decoder_width)
        self.decoder_positions = nn.Parameter(fixed, requires_grad=False)
        self.decoder_embed = nn.Linear(width, decoder_width)
        blocks = (TransformerBlock(decoder_width, decoder_heads) for _ in range(decoder_depth))
        self.decoder = nn.Sequential(*blocks, nn.LayerNorm(decoder_width, eps=1e-6),
                                     nn.Linear(decoder_width, 3 * patch_size ** 2))

    def forward(self, images):
        x = self.embed(images).flatten(2).transpose(1, 2) + self.positions[:, 1:]
        n, length, width = x.shape
        kept, p, side = length // 4, self.patch_size, math.isqrt(length)
        order = torch.rand(n, length, device=x.device).argsort(1)
        restore = order.argsort(1)
        x = x.gather(1, order[:, :kept, None].expand(-1, -1, width))
        first = (self.class_token + self.positions[:, :1]).expand(n, -1, -1)
        x = self.decoder_embed(self.norm(self.blocks(torch.cat([first, x], 1))))
        tokens = torch.cat([x[:, 1:], self.mask_token.expand(n, length - kept, -1)], 1)
        tokens = tokens.gather(1, restore[..., None].expand(-1, -1, tokens.shape[2]))
        predicted = self.decoder(torch.cat([x[:, :1], tokens], 1) + self.decoder_positions)[:, 1:]
        target = images.reshape(n, 3, side, p, side, p).permute(0, 2, 4, 3, 5, 1).reshape(n, length, -1)
        mean, variance = target.mean(-1, keepdim=True), target.var(-1, keepdim=True)
        error = (predicted - (target - mean) / (variance + 1e-6) ** 0.5).square().mean(-1)
        mask = (restore >= kept).float()
        return (error * mask).sum() / mask.sum()
