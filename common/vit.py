"""Vision transformers (Dosovitskiy et al., ICLR 2021) and masked autoencoders (He et al., CVPR 2022).

Written from the papers. Parameter counts are those that XuZhengzhuo/LiVT@68546ef logs for its nets.
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

VIT_SIZES = {  # DeiT's names (Touvron et al., ICML 2021)
    "tiny": dict(width=192, depth=12, heads=3),
    "small": dict(width=384, depth=12, heads=6),
    "base": dict(width=768, depth=12, heads=12),
    "large": dict(width=1024, depth=24, heads=16),
}


# ---------------------------------------------------------------- patches, positions, masks

def patchify(images, patch_size):
    """images [N, 3, H, W] -> patches [N, L, 3 p p], row by row; inside a patch: row, column, channel. H and W
    must be multiples of p."""
    n, c, height, width = images.shape
    rows, columns = height // patch_size, width // patch_size

    patches = images.permute(0, 2, 3, 1).reshape(n, rows, patch_size, columns, patch_size, c)
    return patches.transpose(2, 3).reshape(n, rows * columns, patch_size * patch_size * c)


def unpatchify(patches, patch_size):
    """The inverse of `patchify` for square images: [N, L, 3 p p] -> [N, 3, H, H]."""
    n, length, values = patches.shape
    side = math.isqrt(length)

    images = patches.reshape(n, side, side, patch_size, patch_size, values // patch_size ** 2)
    return images.permute(0, 5, 1, 3, 2, 4).reshape(n, -1, side * patch_size, side * patch_size)


def sincos_positions(width, side):
    """Fixed positions of a side x side grid and, first, of the class token (zero): [1, 1 + side^2, width].

    A quarter of the width each for sin and cos of the column and of the row, at frequencies 10000^(-4i/width)
    (MAE, appendix A.1). Raises ValueError where width is not a multiple of 4.
    """
    if width % 4:
        raise ValueError(f"sin-cos positions need a width that is a multiple of 4, got {width}")

    frequencies = 10000 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * frequencies
    axis = torch.cat([angles.sin(), angles.cos()], 1)  # [side, width / 2]

    # [row, column, width]: its column's half, then its row's
    grid = torch.cat([axis[None].expand(side, -1, -1), axis[:, None].expand(-1, side, -1)], 2)
    return torch.cat([torch.zeros(1, width), grid.flatten(0, 1).float()])[None]


def resize_positions(positions, length):
    """Positions [1, 1 + l, D] of a square grid, bicubically for one of `length` patches; the class token's
    stays as it is."""
    old, new = math.isqrt(positions.shape[1] - 1), math.isqrt(length)
    if old == new:
        return positions

    grid = positions[:, 1:].reshape(1, old, old, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, (new, new), mode="bicubic", align_corners=False)
    return torch.cat([positions[:, :1], grid.flatten(2).transpose(1, 2)], 1)


def random_masking(num_images, num_patches, mask_ratio, generator=None, device=None):
    """Which patches the encoder sees: of each image int(L (1 - r)), uniformly without replacement (MAE,
    section 3).

    generator: None for torch's own. device: where to draw (None: the generator's, or the CPU). Returns (keep:
    int64 [N, int(L (1 - r))], the kept patches in a random order; restore: int64 [N, L], the inverse
    permutation of (kept, masked); mask: float [N, L], 1 where masked). Raises ValueError.
    """
    if num_images < 1 or num_patches < 1 or not 0 < mask_ratio < 1:
        raise ValueError(f"masking needs images, patches and a mask ratio in (0, 1), got {num_images}, "
                         f"{num_patches}, {mask_ratio}")
    kept = int(num_patches * (1 - mask_ratio))
    if not 0 < kept < num_patches:
        raise ValueError(f"a mask ratio of {mask_ratio} keeps {kept} of {num_patches} patches; between 1 and "
                         f"{num_patches - 1} must be kept")

    device = device or ("cpu" if generator is None else generator.device)
    noise = torch.rand(num_images, num_patches, generator=generator, device=device)
    order = noise.argsort(1)  # a random order of the patches: the first are kept
    restore = order.argsort(1)  # where each patch stands in that order
    return order[:, :kept], restore, (restore >= kept).float()


def take(tokens, indices):
    """Rows of each image's tokens: [N or 1, L, D], [N, l] -> [N, l, D]."""
    tokens = tokens.expand(indices.shape[0], -1, -1)
    return tokens.gather(1, indices[..., None].expand(-1, -1, tokens.shape[2]))


# ---------------------------------------------------------------- transformer

def attention(query, key, value):
    """softmax(q k^T / sqrt(d)) v. All [N, heads, L, d]."""
    if query.device.type == "cpu":  # written out it is, in bf16, 1.3 to 1.5 times as fast as torch's kernel
        query = query / math.sqrt(query.shape[-1])
        return (query @ key.transpose(-2, -1)).softmax(-1) @ value
    return F.scaled_dot_product_attention(query, key, value)


class DropPath(nn.Module):
    """Leaves out a residual branch for whole images with the given rate, in training (stochastic depth, Huang
    et al., ECCV 2016); what is left is scaled to the same mean."""

    def __init__(self, rate):
        super().__init__()
        self.rate = rate

    def forward(self, branch):
        if self.rate == 0 or not self.training:
            return branch

        kept = torch.rand(branch.shape[0], 1, 1, device=branch.device) >= self.rate
        return branch * (kept / (1 - self.rate)).to(branch.dtype)


class Block(nn.Module):
    """Pre-norm transformer block: x + attention(norm(x)), then x + mlp(norm(x)); 12 D^2 + 13 D parameters.
    [N, L, D] -> the same."""

    def __init__(self, width, heads, drop_path=0.0):
        super().__init__()
        self.heads, self.drop_path = heads, DropPath(drop_path)

        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.qkv = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, tokens):
        n, length, width = tokens.shape
        qkv = self.qkv(self.norm1(tokens)).reshape(n, length, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each [N, heads, L, D / heads]
        mixed = attention(query, key, value).transpose(1, 2).reshape(n, length, width)

        tokens = tokens + self.drop_path(self.project(mixed))
        return tokens + self.drop_path(self.mlp(self.norm2(tokens)))


def initialise(module):
    """MAE's start (section A.1): Glorot uniform for every linear layer, biases 0.

    paper: in MAE's code the patch embedding, a convolution, keeps the bias that torch gives it, uniform in
    +-1/sqrt(3 p p) / here: 0, as of every other layer. paper: how LiVT's ViT from scratch starts is not
    given / here: like this, too.
    """
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.xavier_uniform_(part.weight)
            nn.init.zeros_(part.bias)


def check_sizes(image_size, patch_size, width, heads):
    """Raise ValueError where an image is not made of whole patches, or a width not of whole heads."""
    if min(image_size, patch_size, width, heads) < 1 or image_size % patch_size:
        raise ValueError(f"the image size ({image_size}) must be a multiple of the patch size ({patch_size})")
    if width % heads:
        raise ValueError(f"the width ({width}) must be a multiple of the number of heads ({heads})")


class ViT(nn.Module):
    """Vision transformer, classifying by the normed mean of its patch tokens (MAE's fine-tuning).

    image_size, patch_size: pixels. num_classes: 0 leaves out the classifier. drop_path: rate of the last
    block, rising linearly from 0. forward: images [N, 3, H, H] -> (logits [N, C], features [N, D]). Positions
    are learnt, from sin-cos on. Raises ValueError.
    """

    def __init__(self, image_size=224, patch_size=16, width=768, depth=12, heads=12, num_classes=0,
                 drop_path=0.0):
        super().__init__()
        check_sizes(image_size, patch_size, width, heads)
        if depth < 1 or not 0 <= drop_path < 1:
            raise ValueError(f"depth must be at least 1, drop path in [0, 1), got {depth} and {drop_path}")

        self.settings = dict(image_size=image_size, patch_size=patch_size, width=width, depth=depth,
                             heads=heads, num_classes=num_classes, drop_path=drop_path)
        self.image_size, self.patch_size, self.feature_dim = image_size, patch_size, width
        self.num_patches = (image_size // patch_size) ** 2

        self.patch_embed = nn.Linear(3 * patch_size ** 2, width)  # a p x p convolution of stride p
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(sincos_positions(width, image_size // patch_size))
        self.blocks = nn.Sequential(*(Block(width, heads, drop_path * i / max(1, depth - 1))
                                      for i in range(depth)))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, num_classes) if num_classes else None

        initialise(self)
        nn.init.normal_(self.class_token, std=0.02)
        if self.head is not None:  # MAE's fine-tuning: logits of 0, but for a trifle, at the start
            nn.init.trunc_normal_(self.head.weight, std=2e-5)

    def tokens(self, patches, keep=None):
        """Patches [N, L, 3 p p] -> tokens behind the last block [N, 1 + l, D], not normed, the class token
        first. keep: int64 [N, l], the patches that are seen; None: all of them."""
        positions = self.positions[:, 1:]
        if keep is not None:
            patches, positions = take(patches, keep), take(positions, keep)

        first = (self.class_token + self.positions[:, :1]).expand(patches.shape[0], -1, -1)
        return self.blocks(torch.cat([first, self.patch_embed(patches) + positions], 1))

    def forward(self, images):
        tokens = self.tokens(patchify(images, self.patch_size))
        features = self.norm(tokens[:, 1:].mean(1))  # without the class token
        return features if self.head is None else (self.head(features), features)


class MAE(nn.Module):
    """Masked autoencoder: a ViT sees a few patches, a light decoder predicts the pixels of the others.

    Positions are fixed (sin-cos) in both. forward: images [N, 3, H, H], keep and restore of `random_masking`
    -> (predictions, targets), both [N, L - l, 3 p p], of the masked patches alone; norm_pix: targets of mean
    0 and variance 1 within each patch. Raises ValueError.
    """

    def __init__(self, image_size=224, patch_size=16, width=768, depth=12, heads=12, decoder_width=512,
                 decoder_depth=8, decoder_heads=16, norm_pix=True):
        super().__init__()
        check_sizes(image_size, patch_size, decoder_width, decoder_heads)
        self.norm_pix = norm_pix

        self.encoder = ViT(image_size, patch_size, width, depth, heads)
        self.encoder.positions.requires_grad_(False)

        self.decoder_embed = nn.Linear(width, decoder_width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_width))
        self.decoder_positions = nn.Parameter(sincos_positions(decoder_width, image_size // patch_size),
                                              requires_grad=False)
        self.decoder = nn.Sequential(*(Block(decoder_width, decoder_heads) for _ in range(decoder_depth)))
        self.decoder_norm = nn.LayerNorm(decoder_width, eps=1e-6)
        self.predict = nn.Linear(decoder_width, 3 * patch_size ** 2)

        for part in (self.decoder_embed, self.decoder, self.predict):
            initialise(part)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, images, keep, restore):
        patches = patchify(images, self.encoder.patch_size)
        seen = self.encoder.norm(self.encoder.tokens(patches, keep))  # the class token and the kept patches
        seen = self.decoder_embed(seen)  # [N, 1 + l, decoder_width]

        # attention does not know an order, so the decoder's tokens stay as (class, kept, masked), each with
        # its own position: nothing is put back in place, and the last L - l tokens are what is predicted
        order = restore.argsort(1)  # kept, then masked
        masked = order[:, keep.shape[1]:]
        tokens = torch.cat([seen, self.mask_token.to(seen.dtype).expand(*masked.shape, -1)], 1)
        positions = torch.cat([self.decoder_positions[:, :1].expand(images.shape[0], -1, -1),
                               take(self.decoder_positions[:, 1:], order)], 1)
        decoded = self.decoder(tokens + positions)[:, -masked.shape[1]:]

        targets = take(patches, masked)
        if self.norm_pix:
            mean, variance = targets.mean(2, keepdim=True), targets.var(2, keepdim=True)
            targets = (targets - mean) / (variance + 1e-6).sqrt()
        return self.predict(self.decoder_norm(decoded)), targets
