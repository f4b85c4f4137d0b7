"""An epoch's index list -> batches of normalised images on the device.

A sampler is any function that returns an epoch's index list; `make_loader` gives one of two loaders with the
same interface: `ResidentLoader` keeps a decoded split on the device and augments whole batches with tensor
operations; `StreamedLoader` decodes image files in worker processes with torchvision's transforms.

Under torchrun every rank calls with the same list and gets its slice of each global batch. Every random
number of an augmentation is a function of (seed, epoch, position in the list): it does not change with the
number of ranks, the number of workers, or a resumed run.
"""
import atexit
import math
import multiprocessing
import os
import signal
import sys
from typing import NamedTuple

import numpy as np
import torch

from common.data import Images, read_image

AUGMENTATIONS = ("none", "standard", "augmented", "resized", "strong")
CROP_PADDING = 4  # black pixels on each side before the random crop of small images
RAND_AUGMENT, ERASING = (2, 9), 0.25  # operations and their strength of 0..30; probability
CHUNK, CHUNKS_AHEAD = 16, 32  # image files that a worker process sends at once, and how many of these wait
UNIFORMS = {"resized": 23, "strong": 46}  # random numbers that an augmentation takes for an image (others: 9)


class UnreadableImage(ValueError):
    """An image file that cannot be decoded."""
    one_rank = True  # under torchrun one rank meets it, not all


class Batch(NamedTuple):
    """One rank's part of a global batch (or, with gradient accumulation, a part of that part).

    images: float32 [N, 3, H, W] in channels_last order; targets: int64 [N]. share: what this part's mean loss
    counts for in the mean over the global batch. ends_step: whether the optimiser steps after this part.
    """
    images: torch.Tensor
    targets: torch.Tensor
    share: float
    ends_step: bool


def normalise(images, mean, std):
    """uint8 [N, H, W, 3] -> float32 [N, 3, H, W] (channels_last): pixels in [0, 1], minus mean, over std."""
    # Whole rows of pixels at once: tensor operations along 3 channels alone are 8 times as slow on a CPU
    width = images.shape[2]
    mean, std = (torch.as_tensor(values, device=images.device).repeat(width) for values in (mean, std))
    rows = images.float().contiguous().flatten(2)
    return rows.sub_(255 * mean).div_(255 * std).view(images.shape).permute(0, 3, 1, 2)


def resize(images, side):
    """Images [N, C, H, H] -> [N, C, side, side], bilinear, antialiased; the same tensor where H is side."""
    if images.shape[-1] == side:
        return images
    return torch.nn.functional.interpolate(images, (side, side), mode="bilinear", align_corners=False,
                                           antialias=True).contiguous(memory_format=torch.channels_last)


def split_batches(num_indices, batch_size, rank=0, ranks=1, accumulation=1, first_step=0):
    """Positions of one rank's parts: yields (positions: a range, share, ends_step) for a list of that length.

    Global batch b holds positions b * batch_size onwards; the last one may be smaller. A rank takes every
    ranks-th position of it, in as many parts as every other rank. A global batch with fewer images than ranks
    goes to every rank whole, each with share 1 / ranks. So no part is ever empty. first_step: the
    first global batch. Raises ValueError.
    """
    if batch_size < 1 or accumulation < 1 or batch_size % (ranks * accumulation):
        raise ValueError(f"the batch size ({batch_size}) must be a multiple of ranks x gradient accumulation "
                         f"({ranks} x {accumulation})")

    def parts():
        for start in range(first_step * batch_size, num_indices, batch_size):
            whole = range(start, min(start + batch_size, num_indices))
            takers = ranks if len(whole) >= ranks else 1  # among which it is dealt out
            mine, weight = whole[rank % takers::takers], 1 / (len(whole) * (ranks // takers))
            # as many as the largest rank's part needs, but no more than the smallest one has images
            pieces = min(math.ceil(math.ceil(len(whole) / takers) * ranks * accumulation / batch_size),
                         len(whole) // takers)
            cuts = [len(mine) * i // pieces for i in range(pieces + 1)]
            for i in range(pieces):
                part = mine[cuts[i]:cuts[i + 1]]
                yield part, len(part) * weight, i == pieces - 1
    return parts()


def every_image(loader, rank=0, ranks=1):
    """Batches of all of the loader's images, each once: this rank's every ranks-th. A rank that gets none of
    a few images yields one with share 0: it does not count."""
    mine = range(rank, loader.num_images, ranks)
    for images, targets, share, ends_step in loader.batches(mine or [0]):
        yield images, targets, share if mine else 0.0, ends_step


# ---------------------------------------------------------------- augmentation of whole batches
# Each takes the random numbers it needs as an argument, so that a caller decides where they come from.

def random_crop_flip(padded, indices, uniforms, size):
    """Crop and flip in one gather. padded: uint8 [n, H, H, 3]; indices: [N]; uniforms: [N, 3] in [0, 1).
    Returns uint8 [N, size, size, 3]. The distribution of RandomCrop(size) of the padded image and a flip at
    .5.
    """
    side = padded.shape[1]
    corner = (uniforms[:, :2] * (side - size + 1)).long()
    span = torch.arange(size, device=padded.device)
    rows = indices[:, None] * side + corner[:, :1] + span
    columns = corner[:, 1:] + torch.where(uniforms[:, 2:] < 0.5, span, size - 1 - span)
    pixels = rows[:, :, None] * side + columns[:, None, :]  # [N, size, size], their places among all pixels
    return padded.view(-1, 3).index_select(0, pixels.flatten()).view(*pixels.shape, 3)


def _blend(images, other, factor):
    return (factor * images + (1 - factor) * other).clamp_(0, 1)


def _grey(images):
    red, green, blue = images.split(1, dim=1)
    return 0.2989 * red + 0.587 * green + 0.114 * blue  # ITU-R 601-2 luma


def _shift_hue(images, shift):
    """images: [N, 3, H, W] in [0, 1]; shift: [N, 1, 1] in turns. Through hue, saturation, value (Smith
    1978)."""
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


def random_box(uniforms, side, area, aspect, whole):
    """The boxes of torchvision's RandomResizedCrop and RandomErasing: ten tries of an area and an aspect.

    uniforms: [N, 22] in [0, 1). side: of the square image, in pixels. area: range, as a fraction of the
    image's; aspect: range of width / height, drawn in its logarithm. whole: where no try fits, the whole
    image (else a box without pixels; then a box must also be smaller than the image). Returns top, left,
    height, width, float [N, 1].
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

    images: uint8 [N, H, H, 3]; uniforms: [N, 23] in [0, 1). Returns uint8 [N, 3, size, size]. The
    distribution of RandomResizedCrop(size, (min_area, 1)) and a flip; without antialiasing where a crop is
    larger than `size`.
    """
    side = images.shape[1]
    top, left, height, width = random_box(uniforms[:, :22], side, (min_area, 1.0), (3 / 4, 4 / 3), whole=True)
    centres = (torch.arange(size, device=images.device) + 0.5) / size  # of the new pixels, within the box
    y, x = (2 * (corner + centres * length) / side - 1 for corner, length in ((top, height), (left, width)))
    x = torch.where(uniforms[:, 22:] < 0.5, x, x.flip(1))
    grid = torch.stack([x[:, None, :].expand(-1, size, -1), y[:, :, None].expand(-1, -1, size)], 3)
    out = torch.nn.functional.grid_sample(images.permute(0, 3, 1, 2).float(), grid, "bicubic", "border",
                                          align_corners=False)
    return out.round_().clamp_(0, 255).to(torch.uint8)


def rand_augment(images, uniforms, strength=9):
    """RandAugment (Cubuk et al., 2020) as torchvision draws it, for a batch whose images each get their own
    operations.

    images: uint8 [N, 3, H, H]. uniforms: [N, 2 K] in [0, 1), on the CPU, where the operations are chosen
    without waiting for a GPU: K operations in turn, each by one number for which of torchvision's 14 and one
    for its sign. strength: 0..30. Returns uint8, like images.
    """
    from torchvision.transforms.v2 import functional as tv
    side = images.shape[-1]

    def level(high, low=0.0):
        return torch.linspace(low, high, 31)[strength].item()
    photometric = [  # numbers 6 to 13; signed ones for +1 and -1
        *((operation, [1 + sign * level(0.9)]) for operation in (
            tv.adjust_brightness, tv.adjust_saturation, tv.adjust_contrast, tv.adjust_sharpness)
          for sign in (1, -1)),
        (tv.posterize, [round(8 - level(4.0))]), (tv.solarize, [255 * level(0.0, 1.0)]),
        (tv.autocontrast, []), (tv.equalize, [])]
    for u in uniforms.split(2, dim=1):
        number, sign = (u[:, 0] * 14).long(), torch.where(u[:, 1] < 0.5, -1.0, 1.0)
        # 0 to 5: identity, shear and translation of x and of y, rotation, in one gather
        matrices = torch.eye(2, 3).repeat(len(images), 1, 1)
        for axis in (0, 1):
            shear = torch.where(number == 1 + axis, sign * level(0.3), 0.0)  # about the top left corner
            shift = torch.where(number == 3 + axis, sign * int(level(150 / 331 * side)), 0.0)
            matrices[:, axis, 1 - axis] = shear
            matrices[:, axis, 2] = shear - 2 / side * shift
        angle = torch.where(number == 5, sign * math.radians(level(30.0)), 0.0)
        matrices[:, 0, 0] = matrices[:, 1, 1] = angle.cos()
        matrices[:, 0, 1] -= angle.sin()
        matrices[:, 1, 0] += angle.sin()
        grid = torch.nn.functional.affine_grid(matrices.to(images.device, non_blocking=True),
                                               list(images.shape), align_corners=False)
        images = torch.nn.functional.grid_sample(images.float(), grid, "nearest", align_corners=False)
        images = images.to(torch.uint8)
        kind = torch.where(number < 10, 2 * (number - 6) + (sign < 0), number - 2)  # place in `photometric`
        for place, (operation, arguments) in enumerate(photometric):
            members = (kind == place).nonzero().flatten()
            if len(members):
                members = members.to(images.device, non_blocking=True)
                images[members] = operation(images[members], *arguments)
    return images


def random_erasing(images, uniforms, normals, probability=0.25):
    """Random erasing (Zhong et al., AAAI 2020): at the given probability a box becomes noise.

    images: normalised, [N, 3, H, H]; uniforms: [N, 23] in [0, 1); normals: like images. The distribution of
    torchvision's RandomErasing(probability, value="random").
    """
    side = images.shape[-1]
    # torchvision draws height / width here
    top, left, height, width = random_box(uniforms[:, :22], side, (0.02, 0.33), (1 / 3.3, 1 / 0.3), False)
    line = torch.arange(side, device=images.device)
    rows, columns = (line >= top) & (line < top + height), (line >= left) & (line < left + width)
    erased = rows[:, None, :, None] & columns[:, None, None, :] & (uniforms[:, 22:, None, None] < probability)
    return torch.where(erased, normals, images).contiguous(memory_format=torch.channels_last)


def mixup_cutmix(num_classes, mixup=0.8, cutmix=1.0):
    """A function (images [N, 3, H, H], targets [N]) -> (mixed images, soft targets [N, C]): Mixup or CutMix,
    each half of the time, for a batch at once; an alpha of 0 leaves one out. Draws from torch's own generator
    on the CPU."""
    if not mixup > 0 and not cutmix > 0:
        return lambda images, targets: (images, torch.nn.functional.one_hot(targets, num_classes).float())
    from torchvision.transforms import v2
    return v2.RandomChoice([kind(alpha=float(alpha), num_classes=num_classes)
                            for kind, alpha in ((v2.MixUp, mixup), (v2.CutMix, cutmix)) if alpha > 0])


# ---------------------------------------------------------------- resident

class ResidentLoader:
    """Batches from a decoded split that lies on the device as uint8, without worker processes.

    augmentation: "none", "standard" (random crop with 4 black pixels of padding, random flip), "augmented"
    (those, colour jitter and greyscale, Gaussian noise of sigma `noise` on pixels in [0, 1], clamped),
    "resized" (random resized crop of at least .2 of the area, flip) or "strong" (those, RandAugment, random
    erasing). size: side of the batches' images in pixels; others are resized to it.
    """
    bad_images = bad_indices = frozenset()  # decoded long ago

    def __init__(self, split, mean, std, batch_size, device, augmentation, seed, rank, ranks, accumulation,
                 noise, size):
        images = torch.from_numpy(split.images).to(device)
        self.size, self.stored_size = size, images.shape[1]
        if augmentation in ("standard", "augmented"):  # padded once, not per batch
            images = torch.nn.functional.pad(images, (0, 0, *[CROP_PADDING] * 4))
        self.images, self.targets = images, torch.from_numpy(split.targets).to(device)
        self.mean, self.std = torch.tensor(mean, device=device), torch.tensor(std, device=device)
        self.batch_size, self.rank, self.ranks, self.accumulation = batch_size, rank, ranks, accumulation
        self.augmentation, self.seed, self.noise = augmentation, seed, noise
        self.num_images, self.device = len(split), device

    def batches(self, indices, epoch=0, first_step=0):
        """An iterator over this rank's `Batch`es of an epoch over `indices` (int64 [n]), from the global
        batch `first_step` on."""
        indices = torch.as_tensor(indices).to(self.device)
        # All of the epoch's random numbers at once: row i belongs to position i of the list, on every rank
        seed, columns = mix_seed(self.seed, epoch), UNIFORMS.get(self.augmentation, 9)
        generator = torch.Generator(self.device).manual_seed(seed)
        uniforms = torch.rand(len(indices), columns, generator=generator, device=self.device)
        choices = torch.rand(len(indices), 2 * RAND_AUGMENT[0],  # on the CPU
                             generator=torch.Generator().manual_seed(seed + 1))
        for positions, share, ends_step in split_batches(len(indices), self.batch_size, self.rank, self.ranks,
                                                         self.accumulation, first_step):
            here = slice(positions.start, positions.stop, positions.step)
            chosen = indices[here]
            if self.augmentation == "none":
                images = self.images[chosen]
            elif self.augmentation in UNIFORMS:
                images = random_resized_crop_flip(self.images[chosen], uniforms[here, :23], self.size)
                if self.augmentation == "strong":
                    images = rand_augment(images, choices[here], RAND_AUGMENT[1])
                images = images.permute(0, 2, 3, 1)
            else:
                images = random_crop_flip(self.images, chosen, uniforms[here, :3], self.stored_size)
            if self.augmentation == "augmented":
                images = color_jitter_gray(images.permute(0, 3, 1, 2) / 255, uniforms[here, 3:])
                images += self.noise * self._normals(images.shape[1:], positions, epoch)
                images = (255 * images.clamp_(0, 1)).permute(0, 2, 3, 1)
            if images.shape[1] != self.size:
                images = torch.nn.functional.interpolate(
                    images.permute(0, 3, 1, 2).float(), (self.size, self.size), mode="bicubic",
                    align_corners=False, antialias=True).clamp_(0, 255).permute(0, 2, 3, 1)
            images = normalise(images, self.mean, self.std)
            if self.augmentation == "strong":
                normals = self._normals(images.shape[1:], positions, epoch)
                images = random_erasing(images, uniforms[here, 23:], normals, ERASING)
            yield Batch(images, self.targets[chosen], share, ends_step)

    def _normals(self, shape, positions, epoch):
        """Standard normal noise [N, *shape]: drawn for the global batch, of which the positions take
        theirs."""
        number, first = divmod(positions.start, self.batch_size)
        generator = torch.Generator(self.device).manual_seed(mix_seed(self.seed, epoch, number + 1))
        drawn = torch.randn(self.batch_size, *shape, generator=generator, device=self.device)
        return drawn[first:first + positions.stop - positions.start:positions.step]


def mix_seed(*numbers):
    """A 63-bit seed made from non-negative integers; other numbers, or another order, give another seed, but
    zeros at the end do not count."""
    words = np.random.SeedSequence(numbers).generate_state(2, np.uint32)
    return int(words[0]) << 31 | int(words[1]) >> 1


# ---------------------------------------------------------------- streamed

def _pixels(image):
    """A PIL image as uint8 [H, W, 3]."""
    return torch.from_numpy(np.array(image))


def _file_transform(augmentation, image_size, mean, std, noise, color_jitter):
    """torchvision v2 transforms of an image file: up to 64 pixels crop and flip, above 64 random resized
    crops. They end in uint8 [H, W, 3], a quarter of the bytes to send, where neither noise nor erasing needs
    normalised floats [3, H, W]."""
    from torchvision.transforms import v2
    flip = v2.RandomHorizontalFlip()
    if augmentation == "none":
        steps = [v2.Resize((image_size, image_size))] if image_size <= 64 else \
            [v2.Resize(image_size * 256 // 224), v2.CenterCrop(image_size)]
    elif image_size <= 64:
        steps = [v2.Resize((image_size, image_size)), v2.RandomCrop(image_size, padding=CROP_PADDING), flip]
    else:  # area (.05, 1) is CBD's released setting
        steps = [v2.RandomResizedCrop(image_size, scale=(0.05, 1.0)), flip]
    if augmentation in ("resized", "strong"):  # MAE's pre-training: from .2 on; fine-tuning large images: .08
        scale = (0.08 if augmentation == "strong" and image_size > 64 else 0.2, 1.0)
        steps = [v2.RandomResizedCrop(image_size, scale, interpolation=v2.InterpolationMode.BICUBIC), flip]
    if augmentation == "strong":
        steps.append(v2.RandAugment(*RAND_AUGMENT))
    if augmentation == "standard" and color_jitter:
        steps.append(v2.ColorJitter(color_jitter, color_jitter, color_jitter, 0))
    if augmentation == "augmented":
        steps += [v2.RandomApply([v2.ColorJitter(0.8, 0.8, 0.8, 0.2)], 0.8), v2.RandomGrayscale(0.2)]
    if augmentation not in ("augmented", "strong"):
        return v2.Compose([*steps, _pixels])
    noise = [v2.GaussianNoise(0.0, noise)] if augmentation == "augmented" else []
    erasing = [v2.RandomErasing(ERASING, value="random")] if augmentation == "strong" else []
    return v2.Compose([*steps, v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), *noise,
                       v2.Normalize(mean, std), *erasing])


class _Files(torch.utils.data.Dataset):
    """Item (index, epoch, position) -> (image, target, "" or why the file cannot be decoded), the image being
    `blank` where it cannot."""

    def __init__(self, split, transform, blank, seed):
        self.split, self.transform, self.blank, self.seed = split, transform, blank, seed

    def __getitem__(self, item):
        index, epoch, position = item
        target = int(self.split.targets[index])
        try:
            image = read_image(os.fsdecode(bytes(self.split.paths[index])))
        except ValueError as reason:
            return self.blank, target, str(reason)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(mix_seed(self.seed, epoch, position))
            return self.transform(image), target, ""


def _leave_signals_to_the_parent(worker):
    """Signals to the whole process group must leave the parent its batch: SIGINT does nothing to a worker,
    SIGTERM ends it half a minute later."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(30))


def _kill_workers():
    """When the process ends: multiprocessing would send them SIGTERM and wait for them."""
    if hasattr(signal, "SIGCHLD"):  # torch's handler would take it for an accident
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


class _EpochChunks:
    """A batch sampler that is told its batches before every epoch, so that worker processes live on. It cuts
    them into chunks, so that all workers make the first batch together instead of one batch each."""

    def __init__(self):
        self.indices, self.epoch, self.parts = [], 0, []

    def __iter__(self):
        for positions, _, _ in self.parts:
            for start in range(0, len(positions), CHUNK):
                yield [(int(self.indices[p]), self.epoch, p) for p in positions[start:start + CHUNK]]

    def __len__(self):
        return sum(math.ceil(len(positions) / CHUNK) for positions, _, _ in self.parts)


class StreamedLoader:
    """Batches from image files, decoded and augmented in `workers` processes (0: in this one).

    Up to 64 pixels the augmentations are those of `ResidentLoader`; above, random resized crops. A file that
    cannot be decoded raises UnreadableImage with its path; with skip_bad it is left out of its batch, and
    `.bad_images` collects what was wrong with it, `.bad_indices` which images these are.
    """

    def __init__(self, split, mean, std, batch_size, device, augmentation, seed, rank, ranks, accumulation,
                 noise, image_size, workers, skip_bad, color_jitter):
        transform = _file_transform(augmentation, image_size, mean, std, noise, color_jitter)
        floats = augmentation in ("augmented", "strong")
        blank = torch.zeros(3, image_size, image_size) if floats else \
            torch.zeros(image_size, image_size, 3, dtype=torch.uint8)
        self.sampler, self.device, self.skip_bad = _EpochChunks(), device, skip_bad
        self.bad_images, self.bad_indices = set(), set()
        self.mean, self.std = torch.tensor(mean, device=device), torch.tensor(std, device=device)
        self.batch_size, self.rank, self.ranks, self.accumulation = batch_size, rank, ranks, accumulation
        self.num_images = len(split)
        atexit.register(_kill_workers)
        ahead = min(2 * batch_size // (ranks * accumulation * CHUNK), CHUNKS_AHEAD)  # of all workers together
        self.loader = torch.utils.data.DataLoader(
            _Files(split, transform, blank, seed), batch_sampler=self.sampler, num_workers=workers,
            worker_init_fn=_leave_signals_to_the_parent,
            prefetch_factor=max(2, ahead // workers) if workers else None,
            # A forked worker sees the parent's list of paths; another kind would get a copy of it
            multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
            persistent_workers=workers > 0 and augmentation != "none",  # evaluation is rare: its workers go
            generator=torch.Generator(),  # or every epoch would take a number from the global one
            pin_memory=device.type == "cuda")

    def batches(self, indices, epoch=0, first_step=0):
        """An iterator over this rank's `Batch`es of an epoch over `indices` (int64 [n]), from the global
        batch `first_step` on."""
        parts = list(split_batches(len(indices), self.batch_size, self.rank, self.ranks, self.accumulation,
                                   first_step))
        self.sampler.indices, self.sampler.epoch, self.sampler.parts = np.asarray(indices), epoch, parts
        chunks = iter(self.loader)
        for positions, share, ends_step in parts:
            pieces = [next(chunks) for _ in range(0, len(positions), CHUNK)]
            images, targets = (torch.cat([piece[i].to(self.device, non_blocking=True) for piece in pieces])
                               for i in range(2))
            reasons = [reason for piece in pieces for reason in piece[2]]
            readable = [i for i, reason in enumerate(reasons) if not reason]
            if len(readable) < len(reasons):
                bad = [reason for reason in reasons if reason]
                if not self.skip_bad:
                    self.loader = chunks = None  # ends the worker processes
                    raise UnreadableImage(f"cannot decode {bad[0]} (--skip-bad-images leaves such files out)")
                self.bad_images.update(bad)
                self.bad_indices.update(int(indices[p]) for p, reason in zip(positions, reasons) if reason)
                share *= len(readable) / len(reasons)
                readable = readable or [0]  # a batch of bad images alone: a black one that counts nothing, so
                images, targets = images[readable], targets[readable]  # that the ranks stay in step
            if images.dtype == torch.uint8:
                images = normalise(images, self.mean, self.std)
            yield Batch(images.contiguous(memory_format=torch.channels_last), targets, share, ends_step)


def make_loader(split, data, batch_size, device, augmentation="none", seed=0, rank=0, ranks=1, accumulation=1,
                workers=0, skip_bad=False, noise=0.01):
    """The loader for a split of `data`: resident for decoded images, streamed for image files.

    batch_size: global. augmentation: one of `AUGMENTATIONS`. seed: of the augmentation. accumulation: parts
    that a rank's batch is cut into. Its `.batches(indices, epoch)` yields `Batch`es. Raises ValueError.
    """
    if augmentation not in AUGMENTATIONS:
        raise ValueError(f"unknown augmentation {augmentation!r}; known: {', '.join(AUGMENTATIONS)}")
    split_batches(1, batch_size, rank, ranks, accumulation)  # refuses a batch size that cannot be cut
    common = (split, data.mean, data.std, batch_size, torch.device(device), augmentation, seed, rank, ranks,
              accumulation, noise)
    if isinstance(split, Images):
        return ResidentLoader(*common, data.image_size)
    return StreamedLoader(*common, data.image_size, workers, skip_bad, data.color_jitter)
