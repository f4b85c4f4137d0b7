"""Operations on a whole batch of images.

Images are [N, 3, H, W], lying in memory pixel by pixel (channels_last); whether they are uint8, in [0, 1] or
normalised stands at each function. The random numbers that an augmentation needs are an argument (`uniforms`
in [0, 1), a row an image): a caller decides where they come from. `mixup_cutmix` alone draws its own.
"""
import math

import torch


def normalise(images, mean, std):
    """Pixels of 0..255, uint8 or float [N, 3, H, W] -> float32 like them: in [0, 1], minus mean, over std.

    mean, std: of the three channels, tensors or sequences. The result is in channels_last order.
    """
    # Whole rows of pixels at once: tensor operations along 3 channels alone are 8 times as slow on a CPU
    width = images.shape[3]
    mean, std = (torch.as_tensor(values, device=images.device).repeat(width) for values in (mean, std))

    pixels = images.permute(0, 2, 3, 1).to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    rows = pixels.flatten(2).sub_(255 * mean).div_(255 * std)  # [N, H, 3 W]

    return rows.view(pixels.shape).permute(0, 3, 1, 2)


def resize(images, side, mode="bilinear"):
    """Images [N, C, H, H] -> [N, C, side, side], antialiased; the same tensor where H is side.

    mode: "bilinear" or "bicubic"; the latter overshoots the range of its input.
    """
    if images.shape[-1] == side:
        return images
    resized = torch.nn.functional.interpolate(images, (side, side), mode=mode, align_corners=False,
                                              antialias=True)
    return resized.contiguous(memory_format=torch.channels_last)


# ---------------------------------------------------------------- crops

def random_crop_flip(padded, indices, uniforms, size):
    """Pick images, crop and flip them, in one gather.

    padded: uint8 [n, H, H, 3], as they are stored; indices: [N]; uniforms: [N, 3]. Returns uint8
    [N, 3, size, size]: the distribution of RandomCrop(size) of the padded image and a flip at .5.
    """
    side = padded.shape[1]
    corner = (uniforms[:, :2] * (side - size + 1)).long()
    span = torch.arange(size, device=padded.device)

    rows = indices[:, None] * side + corner[:, :1] + span
    columns = corner[:, 1:] + torch.where(uniforms[:, 2:] < 0.5, span, size - 1 - span)
    pixels = rows[:, :, None] * side + columns[:, None, :]  # [N, size, size], their places among all pixels

    crops = padded.view(-1, 3).index_select(0, pixels.flatten()).view(*pixels.shape, 3)
    return crops.permute(0, 3, 1, 2)


def random_box(uniforms, side, area, aspect, whole):
    """The boxes of torchvision's RandomResizedCrop and RandomErasing: ten tries of an area and an aspect.

    uniforms: [N, 22]. side: of the square image, in pixels. area: range, as a fraction of the image's;
    aspect: range of width / height, drawn in its logarithm. whole: where no try fits, the whole image (else
    a box without pixels; then a box must also be smaller than the image). Returns top, left, height, width,
    float [N, 1].
    """
    areas = side * side * (area[0] + (area[1] - area[0]) * uniforms[:, :10])
    aspects = aspect[0] * (aspect[1] / aspect[0]) ** uniforms[:, 10:20]
    heights, widths = (areas / aspects).sqrt().round(), (areas * aspects).sqrt().round()

    longer = torch.maximum(heights, widths)
    fits = (torch.minimum(heights, widths) > 0) & (longer <= side) if whole else longer < side
    first = (fits.cumsum(1) == 0).sum(1, keepdim=True)  # number of tries before the first that fits
    found, first = first < 10, first.clamp(max=9)

    height, width = (torch.where(found, tries.gather(1, first), float(side if whole else 0))
                     for tries in (heights, widths))
    top = (uniforms[:, 20:21] * (side - height + 1)).floor()
    left = (uniforms[:, 21:] * (side - width + 1)).floor()
    return top, left, height, width


def random_resized_crop_flip(images, uniforms, size, min_area=0.2):
    """Crop a random box, resize it bicubically to size x size, flip at .5.

    images: uint8 [N, 3, H, H]; uniforms: [N, 23]. Returns uint8 [N, 3, size, size]: the distribution of
    RandomResizedCrop(size, (min_area, 1)) and a flip; without antialiasing where a crop is larger than
    `size`.
    """
    side = images.shape[-1]
    top, left, height, width = random_box(uniforms[:, :22], side, (min_area, 1.0), (3 / 4, 4 / 3), whole=True)

    # where each new pixel's centre lies in the image, from -1 to 1
    centres = (torch.arange(size, device=images.device) + 0.5) / size
    y, x = (2 * (corner + centres * length) / side - 1 for corner, length in ((top, height), (left, width)))
    x = torch.where(uniforms[:, 22:] < 0.5, x, x.flip(1))
    grid = torch.stack([x[:, None, :].expand(-1, size, -1), y[:, :, None].expand(-1, -1, size)], 3)

    crops = torch.nn.functional.grid_sample(images.float(), grid, "bicubic", "border", align_corners=False)
    return crops.round_().clamp_(0, 255).to(torch.uint8)


# ---------------------------------------------------------------- colours

def _blend(images, other, factor):
    return (factor * images + (1 - factor) * other).clamp_(0, 1)


def _grey(images):
    red, green, blue = images.split(1, dim=1)
    return 0.2989 * red + 0.587 * green + 0.114 * blue  # ITU-R 601-2 luma


def _shift_hue(images, shift):
    """Turn the colours of images in [0, 1] through hue, saturation, value (Smith 1978); shift: [N, 1, 1], in
    turns."""
    red, green, blue = images.unbind(1)
    value, low = images.amax(1), images.amin(1)
    chroma = value - low
    safe = torch.where(chroma > 0, chroma, 1.0)

    hue = torch.where(value == red, (green - blue) / safe,
                      torch.where(value == green, 2 + (blue - red) / safe, 4 + (red - green) / safe))
    hue = (hue / 6 + shift) % 1.0

    # channel n of HSV -> RGB: v - chroma * clamp(min(k, 4 - k), 0, 1), k = (n + 6 h) mod 6, n = 5, 3, 1
    k = torch.stack([(n + 6 * hue) % 6 for n in (5, 3, 1)], 1)
    return value[:, None] - chroma[:, None] * torch.minimum(k, 4 - k).clamp(0, 1)


def color_jitter_gray(images, uniforms, strength=1.0):
    """SimCLR's colour distortion: jitter with p = .8, then greyscale with p = .2, drawn per image.

    images: [N, 3, H, W] in [0, 1]; uniforms: [N, 6]. At strength s brightness, contrast and saturation
    factors are uniform in [1 - .8 s, 1 + .8 s] (from 0 at least), hue shifts in [-.2 s, .2 s] turns, applied
    in this order (torchvision's ColorJitter draws the order). Chen et al., "Big Self-Supervised Models"
    (2020).
    """
    u = uniforms.t().view(6, -1, 1, 1, 1)
    low, high = max(0.0, 1 - 0.8 * strength), 1 + 0.8 * strength
    brightness, contrast, saturation = (low + (high - low) * u[i] for i in range(3))

    out = _blend(images, 0.0, brightness)
    out = _blend(out, _grey(out).mean((2, 3), keepdim=True), contrast)
    out = _blend(out, _grey(out), saturation)
    out = _shift_hue(out, (0.4 * strength * (u[3] - 0.5)).squeeze(1))

    out = torch.where(u[4] < 0.8, out, images)
    return torch.where(u[5] < 0.2, _grey(out).expand_as(out), out)


# ---------------------------------------------------------------- RandAugment

def _level(strength, weakest, strongest):
    """What a RandAugment strength of 0..30 means for an operation, given its values at 0 and at 30."""
    return torch.linspace(weakest, strongest, 31)[strength].item()


def _affine_matrices(numbers, signs, side, strength):
    """RandAugment's operations 0 to 5 (identity, shear and translation of x and of y, rotation) as maps from
    a new place to the old one, [N, 2, 3]; the identity for all other numbers."""
    matrices = torch.eye(2, 3).repeat(len(numbers), 1, 1)

    for axis in (0, 1):
        shear = torch.where(numbers == 1 + axis, signs * _level(strength, 0.0, 0.3), 0.0)  # about the corner
        shift = torch.where(numbers == 3 + axis, signs * int(_level(strength, 0.0, 150 / 331 * side)), 0.0)
        matrices[:, axis, 1 - axis] = shear
        matrices[:, axis, 2] = shear - 2 / side * shift

    angle = torch.where(numbers == 5, signs * math.radians(_level(strength, 0.0, 30.0)), 0.0)
    matrices[:, 0, 0] = matrices[:, 1, 1] = angle.cos()
    matrices[:, 0, 1] -= angle.sin()
    matrices[:, 1, 0] += angle.sin()
    return matrices


def _photometric(strength):
    """RandAugment's operations 6 to 13, (function, arguments): the four signed ones twice, for +1 and -1."""
    from torchvision.transforms.v2 import functional as tv
    signed = (tv.adjust_brightness, tv.adjust_saturation, tv.adjust_contrast, tv.adjust_sharpness)
    factor = _level(strength, 0.0, 0.9)

    return [*((operation, [1 + sign * factor]) for operation in signed for sign in (1, -1)),
            (tv.posterize, [round(8 - _level(strength, 0.0, 4.0))]),
            (tv.solarize, [255 * _level(strength, 1.0, 0.0)]),
            (tv.autocontrast, []),
            (tv.equalize, [])]


def rand_augment(images, uniforms, strength=9):
    """RandAugment (Cubuk et al., 2020) as torchvision draws it, for a batch whose images each get their own
    operations.

    images: uint8 [N, 3, H, H]. uniforms: [N, 2 K], on the CPU, where the operations are chosen without
    waiting for a GPU: K operations in turn, each by one number for which of torchvision's 14 and one for its
    sign. strength: 0..30. Returns uint8, like images.
    """
    device, side = images.device, images.shape[-1]
    photometric = _photometric(strength)

    for u in uniforms.split(2, dim=1):
        numbers, signs = (u[:, 0] * 14).long(), torch.where(u[:, 1] < 0.5, -1.0, 1.0)

        # all that moves pixels, in one gather
        matrices = _affine_matrices(numbers, signs, side, strength).to(device, non_blocking=True)
        grid = torch.nn.functional.affine_grid(matrices, list(images.shape), align_corners=False)
        images = torch.nn.functional.grid_sample(images.float(), grid, "nearest", align_corners=False)
        images = images.to(torch.uint8)

        # all that changes colours, operation by operation
        kinds = torch.where(numbers < 10, 2 * (numbers - 6) + (signs < 0), numbers - 2)
        for kind, (operation, arguments) in enumerate(photometric):
            members = (kinds == kind).nonzero().flatten()
            if len(members):
                members = members.to(device, non_blocking=True)
                images[members] = operation(images[members], *arguments)
    return images


# ---------------------------------------------------------------- of normalised images

def random_erasing(images, uniforms, normals, probability=0.25):
    """Random erasing (Zhong et al., AAAI 2020): at the given probability a box becomes noise.

    images: normalised, [N, 3, H, H]; uniforms: [N, 23]; normals: like images. The distribution of
    torchvision's RandomErasing(probability, value="random").
    """
    side = images.shape[-1]
    # torchvision draws height / width here
    top, left, height, width = random_box(uniforms[:, :22], side, (0.02, 0.33), (1 / 3.3, 1 / 0.3), False)

    line = torch.arange(side, device=images.device)
    rows = (line >= top) & (line < top + height)  # [N, H]
    columns = (line >= left) & (line < left + width)
    erased = rows[:, None, :, None] & columns[:, None, None, :] & (uniforms[:, 22:, None, None] < probability)

    return torch.where(erased, normals, images).contiguous(memory_format=torch.channels_last)


def mixup_cutmix(num_classes, mixup=0.8, cutmix=1.0):
    """A function (images [N, 3, H, H], targets [N]) -> (mixed images, soft targets [N, C]): Mixup or CutMix,
    each half of the time, for a batch at once; an alpha of 0 leaves one out. Draws from torch's own generator
    on the CPU."""
    if not mixup > 0 and not cutmix > 0:
        return lambda images, targets: (images, torch.nn.functional.one_hot(targets, num_classes).float())

    from torchvision.transforms import v2
    kinds = [kind(alpha=float(alpha), num_classes=num_classes)
             for kind, alpha in ((v2.MixUp, mixup), (v2.CutMix, cutmix)) if alpha > 0]
    return v2.RandomChoice(kinds)
