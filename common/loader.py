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
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch

from common.augment import (color_jitter_gray, normalise, rand_augment, random_crop_flip, random_erasing,
                            random_resized_crop_flip, resize)
from common.files import read_image
from common.longtail import Images
from common.workers import PATIENCE, items, start_worker

AUGMENTATIONS = ("none", "standard", "augmented", "resized", "strong")
CROP_PADDING = 4  # black pixels on each side before the random crop of small images
RAND_AUGMENT, ERASING = (2, 9), 0.25  # operations and their strength of 0..30; probability
CHUNK, CHUNKS_AHEAD = 16, 32  # image files that a worker process sends at once, and how many of these wait
UNIFORMS = {"resized": 23, "strong": 46}  # random numbers that an augmentation takes for an image (others: 9)


class UnreadableImage(ValueError):
    """An image file that cannot be decoded. reason: its path and why."""
    one_rank = True  # under torchrun one rank meets it, not all

    def __init__(self, reason):
        super().__init__(f"cannot decode {reason} (--skip-bad-images leaves such files out)")


# ---------------------------------------------------------------- who gets which positions

@dataclass(frozen=True)
class Cut:
    """How an index list is cut into batches.

    batch_size: images of a global batch, which one optimiser step sees. rank, ranks: this process among those
    that share it. accumulation: parts that a rank's share is cut into, for want of memory. Raises ValueError.
    """
    batch_size: int
    rank: int = 0
    ranks: int = 1
    accumulation: int = 1

    def __post_init__(self):
        if min(self.batch_size, self.accumulation) < 1 or self.batch_size % (self.ranks * self.accumulation):
            raise ValueError(f"the batch size ({self.batch_size}) must be a multiple of ranks x gradient "
                             f"accumulation ({self.ranks} x {self.accumulation})")


class Batch(NamedTuple):
    """One rank's part of a global batch (or, with gradient accumulation, a part of that part).

    images: float32 [N, 3, H, W] in channels_last order; targets: int64 [N]. share: what this part's mean loss
    counts for in the mean over the global batch. ends_step: whether the optimiser steps after this part.
    """
    images: torch.Tensor
    targets: torch.Tensor
    share: float
    ends_step: bool


def count_steps(num_indices, batch_size):
    """Global batches, and so optimiser steps, in an epoch over a list of that length: the last one may be
    smaller. But a single image that is left over joins the batch before it: batch norm has no variance of one
    image whose map has shrunk to one pixel."""
    steps = math.ceil(num_indices / batch_size)
    return steps - 1 if num_indices % batch_size == 1 and steps > 1 else steps


def split_batches(num_indices, cut, first_step=0):
    """Positions of one rank's parts: yields (positions: a range, share, ends_step) for a list of that length.

    Global batch b of `count_steps` holds positions b * batch_size onwards. A rank takes every ranks-th
    position of it, in as many parts as every other rank. A global batch with fewer images than ranks goes to
    every rank whole, each with share 1 / ranks. So no part is ever empty. first_step: the first global batch.
    """
    steps = count_steps(num_indices, cut.batch_size)
    for step in range(first_step, steps):
        start = step * cut.batch_size
        whole = range(start, num_indices if step == steps - 1 else start + cut.batch_size)

        takers = cut.ranks if len(whole) >= cut.ranks else 1  # among which it is dealt out
        mine = whole[cut.rank % takers::takers]
        weight = 1 / (len(whole) * (cut.ranks // takers))  # of an image

        # as many parts as the largest rank's images need (one that joined needs none of its own), but no more
        # than the smallest one has images
        largest, smallest = math.ceil(min(len(whole), cut.batch_size) / takers), len(whole) // takers
        pieces = min(math.ceil(largest * cut.ranks * cut.accumulation / cut.batch_size), smallest)
        ends = [len(mine) * i // pieces for i in range(pieces + 1)]

        for i in range(pieces):
            part = mine[ends[i]:ends[i + 1]]
            yield part, len(part) * weight, i == pieces - 1


def every_image(loader, rank=0, ranks=1):
    """Batches of all of the loader's images, each once: this rank's every ranks-th. A rank that gets none of
    a few images yields one with share 0: it does not count."""
    mine = range(rank, loader.num_images, ranks)
    for images, targets, share, ends_step in loader.batches(mine or [0]):
        yield images, targets, share if mine else 0.0, ends_step


# ---------------------------------------------------------------- augmentation

class Augmentation(NamedTuple):
    """How training images vary.

    name: "none"; "standard" (random crop with 4 black pixels of padding, random flip); "augmented" (those,
    colour jitter and greyscale, Gaussian noise of sigma `noise` on pixels in [0, 1], clamped); "resized"
    (random resized crop of at least .2 of the area, flip); "strong" (those, RandAugment, random erasing).
    seed: of all its random numbers.
    """
    name: str = "none"
    seed: int = 0
    noise: float = 0.01


def mix_seed(*numbers):
    """A 63-bit seed made from non-negative integers; other numbers, or another order, give another seed, but
    zeros at the end do not count."""
    words = np.random.SeedSequence(numbers).generate_state(2, np.uint32)
    return int(words[0]) << 31 | int(words[1]) >> 1


# ---------------------------------------------------------------- resident

class ResidentLoader:
    """Batches from a decoded split that lies on the device as uint8, without worker processes. Images of
    another side than the data set's `image_size` are resized to it."""

    def __init__(self, split, data, cut, device, augmentation):
        images = torch.from_numpy(split.images).to(device)
        self.size, self.stored_size = data.image_size, images.shape[1]
        if augmentation.name in ("standard", "augmented"):  # padded once, not per batch
            images = torch.nn.functional.pad(images, (0, 0, *[CROP_PADDING] * 4))

        self.images, self.targets = images, torch.from_numpy(split.targets).to(device)  # [n, H, W, 3], [n]
        self.mean, self.std = (torch.tensor(values, device=device) for values in (data.mean, data.std))
        self.augmentation, self.seed, self.noise = augmentation
        self.cut, self.device, self.num_images = cut, device, len(split)

    def batches(self, indices, epoch=0, first_step=0):
        """An iterator over this rank's `Batch`es of an epoch over `indices` (int64 [n]), from the global
        batch `first_step` on."""
        indices = torch.as_tensor(indices).to(self.device)
        uniforms, choices = self._draw(len(indices), epoch)

        for positions, share, ends_step in split_batches(len(indices), self.cut, first_step):
            here = slice(positions.start, positions.stop, positions.step)
            images = self._pixels(indices[here], uniforms[here], choices[here])

            if self.augmentation == "augmented":
                images = color_jitter_gray(images / 255, uniforms[here, 3:])
                images += self.noise * self._normals(images.shape[1:], positions, epoch)
                images = 255 * images.clamp_(0, 1)
            if images.shape[-1] != self.size:
                images = resize(images.float(), self.size, "bicubic").clamp_(0, 255)

            images = normalise(images, self.mean, self.std)
            if self.augmentation == "strong":
                normals = self._normals(images.shape[1:], positions, epoch)
                images = random_erasing(images, uniforms[here, 23:], normals, ERASING)

            yield Batch(images, self.targets[indices[here]], share, ends_step)

    def _pixels(self, chosen, uniforms, choices):
        """The stored images `chosen`, cropped and flipped and, if "strong", with RandAugment: uint8
        [N, 3, H, H]."""
        if self.augmentation in ("standard", "augmented"):
            return random_crop_flip(self.images, chosen, uniforms[:, :3], self.stored_size)

        images = self.images[chosen].permute(0, 3, 1, 2)
        if self.augmentation == "none":
            return images

        images = random_resized_crop_flip(images, uniforms[:, :23], self.size)
        return rand_augment(images, choices, RAND_AUGMENT[1]) if self.augmentation == "strong" else images

    def _draw(self, num_indices, epoch):
        """All of an epoch's uniform random numbers at once, and those of RandAugment's choices, which stay on
        the CPU: row i belongs to position i of the list, on every rank."""
        seed, columns = mix_seed(self.seed, epoch), UNIFORMS.get(self.augmentation, 9)
        generator = torch.Generator(self.device).manual_seed(seed)
        uniforms = torch.rand(num_indices, columns, generator=generator, device=self.device)

        generator = torch.Generator().manual_seed(seed + 1)
        return uniforms, torch.rand(num_indices, 2 * RAND_AUGMENT[0], generator=generator)

    def _normals(self, shape, positions, epoch):
        """Standard normal noise [N, *shape]: drawn batch_size positions at a time, of which these take
        theirs."""
        size = self.cut.batch_size
        blocks = range(positions[0] // size, positions[-1] // size + 1)  # two, where an image joined

        drawn = []
        for block in blocks:
            generator = torch.Generator(self.device).manual_seed(mix_seed(self.seed, epoch, block + 1))
            drawn.append(torch.randn(size, *shape, generator=generator, device=self.device))
        start, stop = (end - blocks[0] * size for end in (positions.start, positions.stop))
        return torch.cat(drawn)[start:stop:positions.step]


# ---------------------------------------------------------------- streamed

def _to_bytes(image):
    """A PIL image as uint8 [H, W, 3]."""
    return torch.from_numpy(np.array(image))


def file_transform(data, augmentation):
    """torchvision's transforms of one image file, PIL -> tensor: up to 64 pixels crop and flip, above 64
    random resized crops. They end in uint8 [H, W, 3], a quarter of the bytes to send, where neither noise nor
    erasing needs normalised floats [3, H, W]."""
    from torchvision.transforms import v2
    name, size, flip = augmentation.name, data.image_size, v2.RandomHorizontalFlip()

    if name in ("resized", "strong"):  # MAE's pre-training: from .2 on; fine-tuning large images: .08
        scale = (0.08 if name == "strong" and size > 64 else 0.2, 1.0)
        steps = [v2.RandomResizedCrop(size, scale, interpolation=v2.InterpolationMode.BICUBIC), flip]
    elif name == "none":
        steps = [v2.Resize((size, size))] if size <= 64 else \
            [v2.Resize(size * 256 // 224), v2.CenterCrop(size)]
    elif size <= 64:
        steps = [v2.Resize((size, size)), v2.RandomCrop(size, padding=CROP_PADDING), flip]
    else:  # area (.05, 1) is CBD's released setting
        steps = [v2.RandomResizedCrop(size, scale=(0.05, 1.0)), flip]

    if name == "standard" and data.color_jitter:
        steps.append(v2.ColorJitter(*[data.color_jitter] * 3, 0))
    if name not in ("augmented", "strong"):
        return v2.Compose([*steps, _to_bytes])

    to_floats = [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)]
    normalised = v2.Normalize(data.mean, data.std)
    if name == "augmented":
        steps += [v2.RandomApply([v2.ColorJitter(0.8, 0.8, 0.8, 0.2)], 0.8), v2.RandomGrayscale(0.2)]
        return v2.Compose([*steps, *to_floats, v2.GaussianNoise(0.0, augmentation.noise), normalised])
    return v2.Compose([*steps, v2.RandAugment(*RAND_AUGMENT), *to_floats, normalised,
                       v2.RandomErasing(ERASING, value="random")])


class _Files(torch.utils.data.Dataset):
    """Item (index, epoch, position) -> the augmented image; or a string, why it cannot be decoded."""

    def __init__(self, split, transform, seed):
        self.split, self.transform, self.seed = split, transform, seed

    def __getitem__(self, item):
        index, epoch, position = item
        try:
            image = read_image(os.fsdecode(bytes(self.split.paths[index])))
        except ValueError as reason:
            return str(reason)

        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(mix_seed(self.seed, epoch, position))
            return self.transform(image)


def _collate(images):
    """The images in one tensor, in memory that processes share; or why the first bad one of them is that."""
    reasons = [image for image in images if isinstance(image, str)]
    return reasons[0] if reasons else torch.utils.data.default_collate(images)


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

    Up to 64 pixels the augmentations are those of `ResidentLoader`; above, random resized crops.
    """

    def __init__(self, split, data, cut, device, augmentation, workers):
        self.targets, self.num_images = torch.from_numpy(split.targets).to(device), len(split)
        self.mean, self.std = (torch.tensor(values, device=device) for values in (data.mean, data.std))
        self.cut, self.device, self.augmentation = cut, device, augmentation.name
        self.sampler = _EpochChunks()

        # chunks of all workers together, two parts' worth
        ahead = min(2 * cut.batch_size // (cut.ranks * cut.accumulation * CHUNK), CHUNKS_AHEAD)
        self.loader = torch.utils.data.DataLoader(
            _Files(split, file_transform(data, augmentation), augmentation.seed),
            batch_sampler=self.sampler, collate_fn=_collate, num_workers=workers,
            worker_init_fn=start_worker, timeout=PATIENCE if workers else 0,
            prefetch_factor=max(2, ahead // workers) if workers else None,
            # A forked worker sees the parent's list of paths; another kind would get a copy of it
            multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
            # Evaluation is rare: its workers go
            persistent_workers=workers > 0 and augmentation.name != "none",
            generator=torch.Generator(),  # or every epoch would take a number from the global one
            pin_memory=device.type == "cuda")

    def batches(self, indices, epoch=0, first_step=0):
        """An iterator over this rank's `Batch`es of an epoch over `indices` (int64 [n]), from the global
        batch `first_step` on. Raises UnreadableImage, and LostWorker where a worker process is gone."""
        indices = np.asarray(indices)
        parts = list(split_batches(len(indices), self.cut, first_step))
        self.sampler.indices, self.sampler.epoch, self.sampler.parts = indices, epoch, parts
        targets = self.targets[torch.as_tensor(indices, device=self.device)]  # of the whole list
        chunks = items(self.loader)

        for positions, share, ends_step in parts:
            pieces = [next(chunks) for _ in range(0, len(positions), CHUNK)]
            for piece in pieces:
                if isinstance(piece, str):
                    raise UnreadableImage(piece)

            images = torch.cat([piece.to(self.device, non_blocking=True) for piece in pieces])
            if images.dtype == torch.uint8:
                images = normalise(images.permute(0, 3, 1, 2), self.mean, self.std)
            images = images.contiguous(memory_format=torch.channels_last)

            here = slice(positions.start, positions.stop, positions.step)
            yield Batch(images, targets[here], share, ends_step)


# ---------------------------------------------------------------- the door

def decoded(data, side):
    """A small data set of image files with all of them decoded, `side` pixels wide and high. Raises
    UnreadableImage."""
    as_tested = file_transform(SimpleNamespace(image_size=side), Augmentation())

    def read(path):
        try:
            return as_tested(read_image(os.fsdecode(path))).numpy()
        except ValueError as reason:
            raise UnreadableImage(reason) from reason

    def images_of(split):
        with ThreadPoolExecutor() as pool:  # PIL's codecs run side by side
            return split and Images(np.stack(list(pool.map(read, split.paths.tolist()))), split.targets)

    data = data.with_splits(images_of(data.train), images_of(data.val), images_of(data.test))
    data.image_size = side
    return data


def make_loader(split, data, cut, device, augmentation=Augmentation(), workers=0):
    """The loader for a split of `data`: resident for decoded images, streamed for image files.

    cut: a `Cut`. augmentation: an `Augmentation`. workers: processes that decode image files. Its
    `.batches(indices, epoch)` yields `Batch`es. Raises ValueError.
    """
    if augmentation.name not in AUGMENTATIONS:
        raise ValueError(f"unknown augmentation {augmentation.name!r}; known: {', '.join(AUGMENTATIONS)}")
    if isinstance(split, Images):
        return ResidentLoader(split, data, cut, torch.device(device), augmentation)
    return StreamedLoader(split, data, cut, torch.device(device), augmentation, workers)
