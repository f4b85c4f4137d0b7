"""The room common/loader.py: who gets which positions, augmentation, resident and streamed batches."""
import math
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from common.data import Dataset, ImageFiles, Images, load
from common.loader import (AUGMENTATIONS, CHUNK, Augmentation, Cut, UnreadableImage, count_steps, every_image,
                           make_loader, mix_seed, split_batches)

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


def tiny(images, mean=MEAN, std=STD):
    """A data set whose training images these are; the target of image i is i % 7."""
    images = np.asarray(images, np.uint8)
    split = Images(images, np.arange(len(images)) % 7)
    names = [str(i) for i in range(split.targets.max() + 1)]
    return Dataset("tiny", split, None, split, names, mean, std, images.shape[1])


def random_images(n, side=12, seed=0):
    return np.random.RandomState(seed).randint(0, 256, (n, side, side, 3), np.uint8)


def loader_of(data, batch_size, augmentation="none", seed=0, noise=0.01, rank=0, ranks=1, accumulation=1,
              **kw):
    cut = Cut(batch_size, rank, ranks, accumulation)
    return make_loader(data.train, data, cut, "cpu", Augmentation(augmentation, seed, noise), **kw)


def to_pixels(images, mean=MEAN, std=STD):
    """Undo the normalisation: uint8 [N, H, W, 3]."""
    pixels = images.permute(0, 2, 3, 1).double() * torch.tensor(std) + torch.tensor(mean)
    assert (255 * pixels - (255 * pixels).round()).abs().max() < 1e-3  # they are whole numbers
    return (255 * pixels).round().to(torch.uint8).numpy()


def by_position(data, indices, batch_size, ranks=1, accumulation=1, epoch=0, **kw):
    """What every rank drew, back at its position in the list: images [n, 3, H, W] and targets [n]."""
    images, targets = [None] * len(indices), [None] * len(indices)
    for rank in range(ranks):
        loader = loader_of(data, batch_size, rank=rank, ranks=ranks, accumulation=accumulation, **kw)
        parts = split_batches(len(indices), Cut(batch_size, rank, ranks, accumulation))
        batches = list(loader.batches(indices, epoch))
        for (positions, share, ends_step), batch in zip(parts, batches, strict=True):
            assert (batch.share, batch.ends_step) == (share, ends_step)
            for position, image, target in zip(positions, batch.images, batch.targets, strict=True):
                assert images[position] is None or torch.equal(images[position], image)
                images[position], targets[position] = image, target
    return torch.stack(images), torch.stack(targets)


# ---------------------------------------------------------------- who gets which positions

@pytest.mark.parametrize("n, batch_size, ranks, accumulation", [
    (16, 8, 1, 1), (23, 8, 2, 1), (23, 8, 2, 2), (21, 8, 4, 2), (17, 8, 4, 1), (3, 12, 4, 3), (1, 6, 3, 2),
    (25, 12, 3, 4), (0, 4, 2, 1), (3, 1, 1, 1), (1, 1, 1, 1), (1, 4, 1, 1), (9, 8, 1, 8), (7, 8, 8, 1)])
def test_ranks_and_parts_share_out_every_global_batch(n, batch_size, ranks, accumulation):
    values = np.random.RandomState(0).rand(n)
    joins = n > 1 and n % batch_size == 1  # a single image that is left over is part of the batch before it
    steps = math.ceil(n / batch_size) - joins
    assert count_steps(n, batch_size) == steps
    weighted, drawn = np.zeros(steps), [[] for _ in range(steps)]
    shares, parts = np.zeros(steps), np.zeros((ranks, steps))
    for rank in range(ranks):
        step = 0
        for positions, share, ends_step in split_batches(n, Cut(batch_size, rank, ranks, accumulation)):
            # What must fit into memory at once (or one more, where the ranks' parts are uneven), and never
            # nothing: batch norm and means need an image
            assert 1 <= len(positions) <= batch_size // (ranks * accumulation) + 1
            drawn[step] += positions
            parts[rank, step] += 1
            shares[step] += share
            weighted[step] += share * values[positions].mean()
            step += ends_step
        assert step == steps  # every rank steps once a global batch, or torchrun would hang
    assert (parts == parts[0]).all()  # and goes forward as often, or synchronised batch norm would
    for step in range(steps):
        whole = list(range(step * batch_size, min((step + 1) * batch_size, n)))
        whole += [n - 1] if joins and step == steps - 1 else []
        copies = 1 if len(whole) >= ranks else ranks  # fewer images than ranks: each rank has them all
        assert sorted(drawn[step]) == sorted(copies * whole)
        assert shares[step] == pytest.approx(1)
        assert weighted[step] == pytest.approx(values[whole].mean())  # so losses add up to the mean


@pytest.mark.parametrize("n, batch_size, accumulation", [(17, 8, 1), (17, 8, 2), (18, 8, 1), (3, 1, 1)])
def test_a_resumed_epoch_goes_on_with_the_same_parts(n, batch_size, accumulation):
    cut = Cut(batch_size, accumulation=accumulation)
    parts = list(split_batches(n, cut))
    steps = np.cumsum([0] + [ends_step for _, _, ends_step in parts])[:-1]
    for first in range(count_steps(n, batch_size) + 1):
        later = [part for part, step in zip(parts, steps) if step >= first]
        assert list(split_batches(n, cut, first)) == later


@pytest.mark.parametrize("batch_size, ranks, accumulation", [(0, 1, 1), (10, 4, 1), (8, 2, 3), (4, 8, 1),
                                                             (8, 1, 0), (-8, 2, 1)])
def test_a_batch_size_that_cannot_be_shared_out_is_refused_at_once(batch_size, ranks, accumulation):
    with pytest.raises(ValueError, match="batch size"):
        Cut(batch_size, 0, ranks, accumulation)


def test_an_unknown_augmentation_is_refused():
    with pytest.raises(ValueError, match="blur.*standard"):
        loader_of(tiny(random_images(4)), 2, "blur")


def test_seeds_differ_by_number_and_order():
    numbers = [(0,), (1,), (0, 1), (1, 2), (2, 1), (1, 2, 1), (1, 2, 0, 1), (1, 2, 3)]
    seeds = [mix_seed(*some) for some in numbers]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)  # what torch's manual_seed takes on every device


# ---------------------------------------------------------------- resident: none and standard

def test_without_augmentation_a_batch_is_pixels_minus_mean_over_std():
    images, indices = random_images(10), [3, 9, 3, 0, 7, 7, 1, 2]
    batches = list(loader_of(tiny(images), 3).batches(indices))
    assert [len(batch.targets) for batch in batches] == [3, 3, 2]  # the last partial batch is kept
    found = torch.cat([batch.images for batch in batches]).permute(0, 2, 3, 1)
    expected = (images[indices] / 255 - MEAN) / STD
    assert np.allclose(found, expected, rtol=0, atol=1e-5)
    assert torch.cat([batch.targets for batch in batches]).tolist() == [i % 7 for i in indices]


@pytest.mark.parametrize("n, ranks", [(7, 1), (7, 3), (2, 3)])
def test_every_image_counts_once_among_the_ranks_and_no_rank_goes_without_a_batch(n, ranks):
    loader = loader_of(tiny(random_images(n)), 2)
    counted = []
    for rank in range(ranks):
        batches = list(every_image(loader, rank, ranks))
        assert batches
        counted += [t for _, targets, share, _ in batches if share > 0 for t in targets.tolist()]
    assert sorted(counted) == list(range(n))


@pytest.mark.parametrize("augmentation", AUGMENTATIONS)
@pytest.mark.parametrize("size", [16, 24])
def test_images_come_in_the_size_that_the_data_set_names_in_float32_and_channels_last(augmentation, size):
    data = tiny(random_images(9, side=16) // 3 + 80)  # far from 0 and 255, where PIL cuts off in between
    data.image_size = size
    images, targets, _, _ = next(iter(loader_of(data, 9, augmentation).batches(range(9))))
    assert images.is_contiguous(memory_format=torch.channels_last) and not images.is_contiguous()
    assert images.dtype == torch.float32 and targets.dtype == torch.int64
    assert images.shape == (9, 3, size, size)
    if augmentation == "none":
        expected = np.stack([Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC)
                             for image in data.train.images])
        ours = 255 * (images.permute(0, 2, 3, 1) * torch.tensor(STD) + torch.tensor(MEAN))
        assert np.abs(ours.numpy() - expected).max() < 1.5


def crops_of(image):
    """The 9 * 9 * 2 images that a crop with 4 black pixels of padding and a flip can give: bytes -> (y, x,
    flipped)."""
    height, width, _ = image.shape
    padded = np.zeros((height + 8, width + 8, 3), np.uint8)
    padded[4:-4, 4:-4] = image
    crops = {}
    for y in range(9):
        for x in range(9):
            crop = padded[y:y + height, x:x + width]
            crops[crop.tobytes()] = (y, x, 0)
            crops[crop[:, ::-1].tobytes()] = (y, x, 1)
    return crops


def test_standard_augmentation_draws_every_crop_and_flip_equally_often():
    image = random_images(1)
    crops, drawn = crops_of(image[0]), np.zeros((9, 9, 2))
    assert len(crops) == 162
    # One image all the time, as a class-balanced sampler repeats it within an epoch. A KeyError is an image
    # that is no crop; padding that is black only after the normalisation would be one.
    for batch in loader_of(tiny(image), 500, "standard").batches(np.zeros(162 * 30, int)):
        for pixels in to_pixels(batch.images):
            drawn[crops[pixels.tobytes()]] += 1

    for axes in ((), (1, 2), (0, 2), (0, 1)):  # all of it, and each draw by itself, which is sharper
        counts = drawn.sum(axes) if axes else drawn
        freedom = counts.size - 1
        statistic = ((counts - counts.mean()) ** 2 / counts.mean()).sum()  # chi square, to five sigma
        assert statistic < freedom + 5 * math.sqrt(2 * freedom)
    assert drawn.std() > 3  # far too even would mean a list of crops, not draws


# ---------------------------------------------------------------- the same images for any ranks, any resume

@pytest.mark.parametrize("augmentation", AUGMENTATIONS)
def test_images_do_not_depend_on_ranks_or_accumulation(augmentation):
    data = tiny(random_images(9))
    indices = np.random.RandomState(1).randint(0, 9, 18)  # the last global batch holds two images
    kw = dict(augmentation=augmentation, seed=5, epoch=2, noise=0.1)
    expected, targets = by_position(data, indices, 8, **kw)
    assert targets.tolist() == (indices % 7).tolist()
    for n in (18, 17):  # of 17 the last image joins the batch before it, and stays what it would be
        for ranks, accumulation in ((1, 1), (2, 1), (1, 2), (2, 2), (4, 1)):
            images, same_targets = by_position(data, indices[:n], 8, ranks, accumulation, **kw)
            assert torch.equal(same_targets, targets[:n])
            torch.testing.assert_close(images, expected[:n], rtol=0, atol=1e-5)


@pytest.mark.parametrize("augmentation", AUGMENTATIONS[1:])
def test_images_depend_on_seed_epoch_and_position_and_nothing_else(augmentation):
    data = tiny(random_images(9))
    drawn = [by_position(data, [*range(8), 0], 4, augmentation=augmentation, seed=seed, epoch=epoch)[0]
             for seed, epoch in ((0, 0), (0, 1), (1, 0), (1, 1))]
    for i, images in enumerate(drawn):
        assert not torch.equal(images[0], images[8])
        for other in drawn[:i]:
            assert (images != other).flatten(1).any(1).sum() >= 8  # one crop in 162 may agree

    through = loader_of(data, 4, augmentation, seed=1)
    for epoch in (0, 1):  # drawn[3] is of a loader that has not gone through epoch 0, as after a resume
        images = torch.cat([batch.images for batch in through.batches([*range(8), 0], epoch)])
    assert torch.equal(images, drawn[3])


# ---------------------------------------------------------------- colour jitter, greyscale, noise

def test_augmented_images_are_jittered_8_in_10_and_grey_2_in_10():
    # One colour inside, so crops cannot change the middle; no channel nears 0 or 1, and noise is off
    data = tiny(np.full((1, 12, 12, 3), (110, 70, 40)))
    batch, = loader_of(data, 4000, "augmented", noise=0.0).batches(np.zeros(4000, int))
    middle = batch.images[:, :, 6, 6].double() * torch.tensor(STD) + torch.tensor(MEAN)
    grey = (middle.amax(1) - middle.amin(1)) < 1e-5
    same = ((255 * middle - torch.tensor([110, 70, 40])).abs() < 0.01).all(1)
    # Saturation never falls below .2, so grey is greyscale; standard deviation of both frequencies < .0064
    assert abs(grey.double().mean() - 0.2) < 0.03
    assert abs(same.double().mean() - 0.2 * 0.8) < 0.03


@pytest.mark.parametrize("noise", [0.01, 0.003])
def test_noise_has_the_sigma_asked_for_on_pixels_in_0_to_1(noise):
    # grey stays grey under the jitter, and 100 / 255 stays more than 6 sigma away from both ends of the clamp
    side, n = 24, 100
    data = tiny(np.full((1, side, side, 3), 100), mean=(0, 0, 0), std=(1, 1, 1))
    loader = loader_of(data, 40, "augmented", noise=noise)
    images = torch.cat([batch.images for batch in loader.batches(np.zeros(n, int))])
    pixels = images[:, :, 4:-4, 4:-4].double()  # without the padding
    levels = pixels.mean((1, 2, 3), keepdim=True)
    assert levels.std() > 0.05  # the jitter is on

    z = (pixels - levels) / noise
    # 76,800 numbers: sigma is known to .26%; a normal's mean absolute value is sqrt(2 / pi)
    assert z.std() == pytest.approx(1, abs=0.02)
    assert z.abs().mean() == pytest.approx(math.sqrt(2 / math.pi), abs=0.02)
    flat = z.flatten(1)
    close = flat @ flat.t() / flat.shape[1] - torch.eye(n)
    assert close.abs().max() < 0.25  # no two images share their noise, in one batch or in two (sigma .036)
    assert abs((z[:, 0] * z[:, 1]).mean()) < 0.03 and abs((z[:, 1] * z[:, 2]).mean()) < 0.03


def test_noise_is_clamped_to_pixels():
    data = tiny(np.zeros((1, 12, 12, 3)), mean=(0, 0, 0), std=(1, 1, 1))
    batch, = loader_of(data, 64, "augmented", noise=0.1).batches(np.zeros(64, int))
    # Black images: half of all noise is cut off at 0, the rest has the mean absolute value of a normal
    assert batch.images.min() == 0 and batch.images.max() <= 1
    assert (batch.images == 0).double().mean() == pytest.approx(0.5, abs=0.02)
    assert batch.images.mean() == pytest.approx(0.1 / math.sqrt(2 * math.pi), rel=0.03)


# ---------------------------------------------------------------- streamed

def write_folder(root, images, ending="png", **kw):
    """images [n, H, W, 3] as root/train/{a,b}/iii.ENDING in turn, one test image a class. Returns the set."""
    for part, some in (("train", images), ("test", images[:2])):
        for i, image in enumerate(some):
            folder = root / part / "ab"[i % 2]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder / f"{i:03d}.{ending}", **kw)
    return load("folder", root)


def test_streamed_small_images_are_the_resident_ones(tmp_path):
    images = random_images(7, side=16)
    data = write_folder(tmp_path, images)
    order = [int(path[-7:-4]) for path in data.train.paths.tolist()]  # which image each file is
    resident = tiny(images[order], data.mean, data.std)
    resident.train.targets[:] = np.array(order) % 2
    found, targets = by_position(data, [4, 0, 0, 6, 2], 2)
    expected, expected_targets = by_position(resident, [4, 0, 0, 6, 2], 2)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert torch.equal(targets, expected_targets)


def test_streamed_small_images_are_cropped_from_black_padding(tmp_path):
    images = random_images(2, side=16)
    data = write_folder(tmp_path, images)
    crops = [crops_of(image) for image in images]
    found, targets = by_position(data, [0, 1] * 8, 4, augmentation="standard")
    corners = {crops[target][pixels.tobytes()]  # a KeyError is no crop of its image
               for target, pixels in zip(targets, to_pixels(found, data.mean, data.std))}
    assert len(corners) > 8


@pytest.mark.parametrize("augmentation", AUGMENTATIONS)
def test_streamed_images_do_not_depend_on_ranks_or_accumulation(augmentation, tmp_path):
    data = write_folder(tmp_path, random_images(7, side=16))
    indices = [0, 1, 2, 3, 4, 5, 6, 6, 0]  # the last image joins the batch before it
    kw = dict(augmentation=augmentation, seed=5, epoch=2, noise=0.1)
    images, targets = by_position(data, indices, 4, **kw)
    for ranks, accumulation in ((2, 1), (2, 2)):
        again, same_targets = by_position(data, indices, 4, ranks, accumulation, **kw)
        assert torch.equal(again, images) and torch.equal(same_targets, targets)
    if augmentation != "none":
        assert not torch.equal(images[6], images[7])  # drawn twice, cropped twice
        for other in (dict(seed=6), dict(epoch=3)):
            assert not torch.equal(by_position(data, indices, 4, **{**kw, **other})[0], images)


def test_workers_give_the_same_batches_epoch_after_epoch_and_live_on(tmp_path):
    data, processes = write_folder(tmp_path, random_images(7, side=16)), set()
    workers = loader_of(data, 3, "augmented", seed=1, workers=2)
    for epoch, indices in ((0, [0, 1, 2, 3, 4, 5, 6]), (1, [6, 2, 2, 0])):
        found = list(workers.batches(indices, epoch))
        processes |= {worker.pid for worker in workers.loader._iterator._workers}
        fresh = loader_of(data, 3, "augmented", seed=1, workers=0)  # as after a resume
        for batch, expected in zip(found, fresh.batches(indices, epoch), strict=True):
            assert torch.equal(batch.images, expected.images) and torch.equal(batch.targets, expected.targets)
            assert (batch.share, batch.ends_step) == (expected.share, expected.ends_step)
            assert batch.images.is_contiguous(memory_format=torch.channels_last)
    assert len(processes) == 2  # so the next epoch begins at once


@pytest.mark.parametrize("augmentation", AUGMENTATIONS)
def test_large_images_become_224_pixels_sent_as_bytes_where_that_will_do(augmentation, tmp_path):
    data = write_folder(tmp_path, random_images(3, side=70))
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    loader = loader_of(data, 3, augmentation)
    batch, = loader.batches(range(3))
    assert torch.equal(torch.rand(3), expected)  # no random number of the process is taken
    assert batch.images.shape == (3, 3, 224, 224) and batch.images.dtype == torch.float32
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    sent = loader.loader.dataset[0, 0, 0]
    assert (sent.dtype, sent.shape) == ((torch.float32, (3, 224, 224)) if augmentation in (
        "augmented", "strong") else (torch.uint8, (224, 224, 3)))


def test_a_large_image_is_evaluated_on_its_middle(tmp_path):
    # Red runs along x, green along y, from 0 to 250. The short side becomes 256 pixels, the middle 224 stay.
    gradient = np.zeros((101, 151, 3), np.uint8)
    gradient[..., 0] = np.linspace(0, 250, 151)
    gradient[..., 1] = np.linspace(0, 250, 101)[:, None]
    data = write_folder(tmp_path, gradient[None].repeat(2, 0))
    batch, = loader_of(data, 2).batches([0, 1])
    image = batch.images[0].permute(1, 2, 0) * torch.tensor(data.std) + torch.tensor(data.mean)
    red, green = 255 * image[112, :, 0], 255 * image[:, 112, 1]
    width = 256 * 151 / 101
    for values, side in ((red, width), (green, 256)):
        expected = 250 * (torch.arange(224) + (side - 224) / 2 + 0.5) / side
        assert (values - expected).abs().max() < 4


def test_random_resized_crops_take_5_to_100_percent_of_a_large_image(tmp_path):
    # In an image that is its own map (red = x, green = y) a crop's range of values shows the area it covers
    ramp = np.zeros((120, 120, 3), np.uint8)
    ramp[..., 0], ramp[..., 1] = np.arange(120), np.arange(120)[:, None]
    data = write_folder(tmp_path, ramp[None].repeat(2, 0))
    areas, flips = [], 0
    for batch in loader_of(data, 20, "standard", seed=2).batches([0] * 100):
        pixels = 255 * (batch.images.permute(0, 2, 3, 1) * torch.tensor(data.std) + torch.tensor(data.mean))
        span = pixels.amax((1, 2)) - pixels.amin((1, 2)) + 1
        areas += (span[:, 0] * span[:, 1] / 120 ** 2).tolist()
        flips += (pixels[:, 100, 0, 0] > pixels[:, 100, -1, 0]).sum().item()
    assert 0.03 < min(areas) < 0.12 and 0.8 < max(areas) <= 1.01
    assert 0.42 < np.mean(areas) < 0.6  # uniform in (.05, 1), a little less for crops that do not fit
    assert 30 < flips < 70


@pytest.mark.parametrize("damage, workers", [("half", 0), ("half", 1), (b"", 0), (b"junk", 0),
                                             (b"\x89PNG\r\n\x1a\n", 0), ("gone", 0)])
def test_an_image_that_cannot_be_decoded_raises_its_path(damage, workers, tmp_path):
    data = write_folder(tmp_path, random_images(6, side=40), "jpg", quality=95)
    bad = tmp_path / "train" / "b" / "003.jpg"
    whole = bad.read_bytes()
    bad.write_bytes(damage if isinstance(damage, bytes) else whole[:len(whole) // 2])
    if damage == "gone":
        bad.unlink()
    with pytest.raises(UnreadableImage, match="skip-bad-images") as caught:
        list(loader_of(data, 3, workers=workers).batches(range(6)))
    assert str(bad) in str(caught.value)
    assert isinstance(caught.value, ValueError)  # so a script ends with one line, not a traceback


def test_a_jittered_set_varies_in_brightness_contrast_and_saturation_but_not_in_hue(tmp_path):
    # A crop of one colour stays one colour, which torchvision's jitter of (.4, .4, .4, 0) moves as a whole
    colour = np.array([120, 100, 80], np.uint8)
    data = write_folder(tmp_path, np.zeros((2, 80, 80, 3), np.uint8) + colour)

    def images(augmentation, n):
        batch, = loader_of(data, n, augmentation, seed=3).batches([0] * n)
        return batch.images

    def colours(augmentation, n=64):
        pixels = to_pixels(images(augmentation, n), data.mean, data.std).astype(int)
        assert (pixels == pixels[:, :1, :1]).all()
        return pixels[:, 0, 0]

    unjittered = {augmentation: images(augmentation, 4) for augmentation in ("resized", "strong")}
    assert (colours("standard") == colour).all()
    data.color_jitter = 0.4
    found = colours("standard")
    grey, luma = found @ [0.299, 0.587, 0.114], colour @ [0.299, 0.587, 0.114]
    brightness = grey / luma
    assert 0.58 < brightness.min() < 0.7 and 1.3 < brightness.max() < 1.42
    spread = (found[:, 0] - found[:, 2]) / brightness / 40  # saturation times, in a flat image, contrast
    assert 0.33 < spread.min() < 0.6 and 1.4 < spread.max() < 2.05
    assert (abs(found @ [1, -2, 1]) <= 5).all()  # green midway between red and blue: the hue
    assert (colours("none", 1) == colour).all()
    for augmentation, expected in unjittered.items():  # the transformers' recipes have no jitter
        assert torch.equal(images(augmentation, 4), expected)


@pytest.mark.parametrize("batch_size, accumulation", [(2 * CHUNK + 3, 1), (3 * CHUNK, 2)])
def test_batches_are_whole_however_workers_cut_them_into_chunks(tmp_path, batch_size, accumulation):
    data = write_folder(tmp_path, random_images(9, side=16))
    indices = np.random.RandomState(0).randint(0, 9, 5 * CHUNK + 1)
    kw = dict(augmentation="standard", seed=4, accumulation=accumulation)
    with_workers, alone = (loader_of(data, batch_size, workers=workers, **kw) for workers in (2, 0))
    targets = []
    for batch, expected in zip(with_workers.batches(indices), alone.batches(indices), strict=True):
        assert torch.equal(batch.images, expected.images) and len(batch.targets) == len(batch.images)
        targets += batch.targets.tolist()
    assert targets == data.train.targets[indices].tolist()


def test_workers_get_flat_arrays_and_no_list_of_paths(tmp_path):
    n = 20000
    paths = np.array([f"/data/train/a class/image number {i:07d}.jpg".encode() for i in range(n)])
    split = ImageFiles(paths, np.arange(n) % 3)
    data = SimpleNamespace(mean=MEAN, std=STD, image_size=224, color_jitter=0.4)
    loader = make_loader(split, data, Cut(256), "cpu", Augmentation("standard"), workers=2)
    flat = paths.nbytes + split.targets.nbytes
    # what a spawned worker would get; a forked one shares it, as no object in it is counted by reference
    assert flat <= len(pickle.dumps(loader.loader.dataset)) < flat + 20000
    assert paths.dtype.kind == "S" and loader.loader.dataset.split.paths is paths
    # an epoch's index list reaches them chunk by chunk
    loader.sampler.indices, loader.sampler.parts = np.arange(n), list(split_batches(n, Cut(256)))
    assert len(pickle.dumps(loader.sampler.parts)) < 20000
    assert max(len(pickle.dumps(chunk)) for chunk in loader.sampler) < 1000
    assert sum(map(len, loader.sampler)) == n and len(loader.sampler) == math.ceil(n / 256) * 16 - 14
