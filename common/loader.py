"""An epoch's index list -> batches of normalised images on the device.

A sampler is any function that returns an epoch's index list; `make_loader` gives one of two loaders with the
same interface: `ResidentLoader` keeps a decoded split on the device and augments whole batches with tensor
operations; `StreamedLoader` decodes image files in worker processes with torchvision's transforms.

Under torchrun every rank calls with the same list and gets its slice of each global batch. Every random
number of an augmentation is a function of (seed, epoch, position in the list): it does not change with the
number of ranks, the number of workers, or a resumed run.
"""
import math
import os
from typing import NamedTuple

import numpy as np
import torch

from common.data import Images

AUGMENTATIONS = ("none", "standard", "augmented")
CROP_PADDING = 4  # black pixels on each side before the random crop of small images


class UnreadableImage(ValueError):
    """An image file that cannot be decoded."""


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
    mean, std = (torch.as_tensor(values, device=images.device).view(3, 1, 1) for values in (mean, std))
    images = images.permute(0, 3, 1, 2).float().contiguous(memory_format=torch.channels_last)
    return images.sub_(255 * mean).div_(255 * std)


def split_batches(num_indices, batch_size, rank=0, ranks=1, accumulation=1):
    """Positions of one rank's parts: yields (positions: a range, share, ends_step) for a list of that length.

    Global batch b holds positions b * batch_size onwards; the last one may be smaller. A rank takes every
    ranks-th position of it, in as many parts as every other rank. A global batch with fewer images than ranks
    goes to every rank whole, each with share 1 / ranks. So no part is ever empty. Raises ValueError.
    """
    if batch_size < 1 or accumulation < 1 or batch_size % (ranks * accumulation):
        raise ValueError(f"the batch size ({batch_size}) must be a multiple of ranks x gradient accumulation "
                         f"({ranks} x {accumulation})")

    def parts():
        for start in range(0, num_indices, batch_size):
            whole = range(start, min(start + batch_size, num_indices))
            mine, weight = (whole[rank::ranks], 1 / len(whole)) if len(whole) >= ranks else \
                (whole, 1 / (len(whole) * ranks))
            # as many as the largest rank's part needs, but no more than the smallest one has images
            most, least = (math.ceil(len(whole) / ranks), len(whole) // ranks) if len(whole) >= ranks else \
                (len(whole), len(whole))
            pieces = min(math.ceil(most * ranks * accumulation / batch_size), least)
            cuts = [len(mine) * i // pieces for i in range(pieces + 1)]
            for i in range(pieces):
                part = mine[cuts[i]:cuts[i + 1]]
                yield part, len(part) * weight, i == pieces - 1
    return parts()


# ---------------------------------------------------------------- augmentation of whole batches
# Each takes the random numbers it needs as an argument, so that a caller decides where they come from.

def random_crop_flip(padded, indices, uniforms, size):
    """Crop and flip in one gather. padded: uint8 [n, H, H, 3]; indices: [N]; uniforms: [N, 3] in [0, 1).
    Returns uint8 [N, size, size, 3]. The distribution of RandomCrop(size) of the padded image and a flip at
    .5.
    """
    corner = (uniforms[:, :2] * (padded.shape[1] - size + 1)).long()
    span = torch.arange(size, device=padded.device)
    rows = corner[:, :1] + span
    columns = corner[:, 1:] + torch.where(uniforms[:, 2:] < 0.5, span, size - 1 - span)
    return padded[indices[:, None, None], rows[:, :, None], columns[:, None, :]]


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


# ---------------------------------------------------------------- resident

class ResidentLoader:
    """Batches from a decoded split that lies on the device as uint8, without worker processes.

    augmentation: "none", "standard" (random crop with 4 black pixels of padding, random flip) or "augmented"
    (those, colour jitter and greyscale, Gaussian noise of sigma `noise` on pixels in [0, 1], clamped).
    """
    bad_images = bad_indices = frozenset()  # decoded long ago

    def __init__(self, split, mean, std, batch_size, device, augmentation, seed, rank, ranks, accumulation,
                 noise):
        images = torch.from_numpy(split.images).to(device)
        self.size = images.shape[1]
        if augmentation != "none":  # padded once, not per batch
            images = torch.nn.functional.pad(images, (0, 0, *[CROP_PADDING] * 4))
        self.images, self.targets = images, torch.from_numpy(split.targets).to(device)
        self.mean, self.std = torch.tensor(mean, device=device), torch.tensor(std, device=device)
        self.batch_size, self.rank, self.ranks, self.accumulation = batch_size, rank, ranks, accumulation
        self.augmentation, self.seed, self.noise = augmentation, seed, noise
        self.num_images, self.device = len(split), device

    def batches(self, indices, epoch=0):
        """An iterator over this rank's `Batch`es of an epoch over `indices` (int64 [n])."""
        indices = torch.as_tensor(indices).to(self.device)
        # All of the epoch's random numbers at once: row i belongs to position i of the list, on every rank
        generator = torch.Generator(self.device).manual_seed(mix_seed(self.seed, epoch))
        uniforms = torch.rand(len(indices), 9, generator=generator, device=self.device)
        for positions, share, ends_step in split_batches(len(indices), self.batch_size, self.rank, self.ranks,
                                                         self.accumulation):
            here = slice(positions.start, positions.stop, positions.step)
            chosen = indices[here]
            if self.augmentation == "none":
                images = self.images[chosen]
            else:
                images = random_crop_flip(self.images, chosen, uniforms[here, :3], self.size)
            if self.augmentation == "augmented":
                images = color_jitter_gray(images.permute(0, 3, 1, 2) / 255, uniforms[here, 3:])
                images += self.noise * self._normals(images.shape[1:], positions, epoch)
                images = (255 * images.clamp_(0, 1)).permute(0, 2, 3, 1)
            yield Batch(normalise(images, self.mean, self.std), self.targets[chosen], share, ends_step)

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

def _file_transform(augmentation, image_size, mean, std, noise):
    """torchvision v2 transforms of an image file: up to 64 pixels crop and flip, above 64 random resized
    crops."""
    from torchvision.transforms import v2
    flip = v2.RandomHorizontalFlip()
    if augmentation == "none":
        steps = [v2.Resize((image_size, image_size))] if image_size <= 64 else \
            [v2.Resize(image_size * 256 // 224), v2.CenterCrop(image_size)]
    elif image_size <= 64:
        steps = [v2.Resize((image_size, image_size)), v2.RandomCrop(image_size, padding=CROP_PADDING), flip]
    else:  # area (.05, 1) is CBD's released setting
        steps = [v2.RandomResizedCrop(image_size, scale=(0.05, 1.0)), flip]
    if augmentation == "augmented":
        steps += [v2.RandomApply([v2.ColorJitter(0.8, 0.8, 0.8, 0.2)], 0.8), v2.RandomGrayscale(0.2)]
    steps += [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)]
    if augmentation == "augmented":
        steps.append(v2.GaussianNoise(0.0, noise))
    return v2.Compose([*steps, v2.Normalize(mean, std)])


class _Files(torch.utils.data.Dataset):
    """Item (index, epoch, position) -> (image [3, H, W], target, "" or why the file cannot be decoded)."""

    def __init__(self, split, transform, image_size, seed):
        self.split, self.transform, self.size, self.seed = split, transform, image_size, seed

    def __getitem__(self, item):
        from PIL import Image
        index, epoch, position = item
        path = os.fsdecode(bytes(self.split.paths[index]))
        target = int(self.split.targets[index])
        try:
            with Image.open(path) as file:
                image = file.convert("RGB")
        except (OSError, SyntaxError, ValueError) as reason:  # what PIL raises for damaged files
            return torch.zeros(3, self.size, self.size), target, f"{path}: {reason}"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(mix_seed(self.seed, epoch, position))
            return self.transform(image), target, ""


class _EpochBatches:
    """A batch sampler that is told its batches before every epoch, so that worker processes live on."""

    def __init__(self):
        self.indices, self.epoch, self.parts = [], 0, []

    def __iter__(self):
        for positions, _, _ in self.parts:
            yield [(int(self.indices[p]), self.epoch, p) for p in positions]

    def __len__(self):
        return len(self.parts)


class StreamedLoader:
    """Batches from image files, decoded and augmented in `workers` processes (0: in this one).

    Up to 64 pixels the augmentations are those of `ResidentLoader`; above, random resized crops. A file that
    cannot be decoded raises UnreadableImage with its path; with skip_bad it is left out of its batch, and
    `.bad_images` collects what was wrong with it, `.bad_indices` which images these are.
    """

    def __init__(self, split, mean, std, batch_size, device, augmentation, seed, rank, ranks, accumulation,
                 noise, image_size, workers, skip_bad):
        transform = _file_transform(augmentation, image_size, mean, std, noise)
        self.sampler, self.device, self.skip_bad = _EpochBatches(), device, skip_bad
        self.bad_images, self.bad_indices = set(), set()
        self.batch_size, self.rank, self.ranks, self.accumulation = batch_size, rank, ranks, accumulation
        self.num_images = len(split)
        self.loader = torch.utils.data.DataLoader(
            _Files(split, transform, image_size, seed), batch_sampler=self.sampler, num_workers=workers,
            persistent_workers=workers > 0 and augmentation != "none",  # evaluation is rare: its workers go
            pin_memory=device.type == "cuda")

    def batches(self, indices, epoch=0):
        """An iterator over this rank's `Batch`es of an epoch over `indices` (int64 [n])."""
        parts = list(split_batches(len(indices), self.batch_size, self.rank, self.ranks, self.accumulation))
        self.sampler.indices, self.sampler.epoch, self.sampler.parts = np.asarray(indices), epoch, parts
        for (positions, share, ends_step), (images, targets, reasons) in zip(parts, self.loader):
            readable = [i for i, reason in enumerate(reasons) if not reason]
            if len(readable) < len(reasons):
                bad = [reason for reason in reasons if reason]
                if not self.skip_bad:
                    raise UnreadableImage(f"cannot decode {bad[0]} (--skip-bad-images leaves such files out)")
                self.bad_images.update(bad)
                self.bad_indices.update(int(indices[p]) for p, reason in zip(positions, reasons) if reason)
                share *= len(readable) / len(reasons)
                readable = readable or [0]  # a batch of bad images alone: a black one that counts nothing, so
                images, targets = images[readable], targets[readable]  # that the ranks stay in step
            images = images.to(self.device, memory_format=torch.channels_last, non_blocking=True)
            yield Batch(images, targets.to(self.device, non_blocking=True), share, ends_step)


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
        return ResidentLoader(*common)
    return StreamedLoader(*common, data.image_size, workers, skip_bad)
