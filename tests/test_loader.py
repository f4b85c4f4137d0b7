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
    split, names = Images(np.asarray(images, np.uint8), np.arange(len(images)) % 7), list("0123456")
    return Dataset("tiny", split, None, split, names[:len(images)], mean, std, split.images.shape[1])


def write_folder(root, images, ending="png", **kw):
    """images [n, H, W, 3] as root/train/{a,b}/iii.ENDING in turn, one test image a class. Returns the set."""
    for part, some in (("train", images), ("test", images[:2])):
        for i, image in enumerate(some):
            folder = root / part / "ab"[i % 2]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder / f"{i:03d}.{ending}", **kw)
    return load("folder", root)


def random_images(n, side=12):
    return np.random.RandomState(0).randint(0, 256, (n, side, side, 3), np.uint8)


def loader_of(data, batch_size, augmentation="none", seed=0, noise=0.01, rank=0, ranks=1, accumulation=1,
              **kw):
    cut = Cut(batch_size, rank, ranks, accumulation)
    return make_loader(data.train, data, cut, "cpu", Augmentation(augmentation, seed, noise), **kw)


def to_pixels(images, data):
    """Undo the normalisation: 0..255, [N, H, W, 3]."""
    return 255 * (images.permute(0, 2, 3, 1).double() * torch.tensor(data.std) + torch.tensor(data.mean))


def to_bytes(images, data):
    pixels = to_pixels(images, data)
    assert (pixels - pixels.round()).abs().max() < 5e-4  # they are whole numbers
    return pixels.round().to(torch.uint8).numpy()


def by_position(data, indices, batch_size, ranks=1, accumulation=1, epoch=0, **kw):
    """What every rank drew, back at its position in the list: images [n, 3, H, W] and targets [n]."""
    images, targets = [None] * len(indices), [None] * len(indices)
    for rank in range(ranks):
        loader = loader_of(data, batch_size, rank=rank, ranks=ranks, accumulation=accumulation, **kw)
        parts = split_batches(len(indices), loader.cut)
        for (positions, *of_part), batch in zip(parts, loader.batches(indices, epoch), strict=True):
            assert [batch.share, batch.ends_step] == of_part
            for position, image, target in zip(positions, batch.images, batch.targets, strict=True):
                assert images[position] is None or torch.equal(images[position], image)
                images[position], targets[position] = image, target
    return torch.stack(images), torch.stack(targets)


@pytest.mark.parametrize("n, batch_size, ranks, accumulation", [
    (16, 8, 1, 1), (23, 8, 2, 1), (23, 8, 2, 2), (21, 8, 4, 2), (17, 8, 4, 1), (3, 12, 4, 3), (1, 6, 3, 2),
    (25, 12, 3, 4), (0, 4, 2, 1), (3, 1, 1, 1), (1, 1, 1, 1), (1, 4, 1, 1), (9, 8, 1, 8), (7, 8, 8, 1),
    (17, 8, 1, 1), (17, 8, 1, 2), (18, 8, 1, 1)])
def test_parts_share_out_every_batch_and_a_resumed_epoch_goes_on(n, batch_size, ranks, accumulation):
    values = np.random.RandomState(0).rand(n)
    joins = n > 1 and n % batch_size == 1  # a single image that is left over is part of the batch before it
    steps, parts_of_ranks = math.ceil(n / batch_size) - joins, []
    assert count_steps(n, batch_size) == steps
    for rank in range(ranks):
        cut = Cut(batch_size, rank, ranks, accumulation)
        parts = list(split_batches(n, cut))
        # What must fit into memory at once (or one more, where the ranks' parts are uneven), and never
        # nothing: batch norm and means need an image
        assert {1 <= len(part) <= batch_size // (ranks * accumulation) + 1 for part, _, _ in parts} <= {True}
        begins = [0, *(i for i, (_, _, ends_step) in enumerate(parts, 1) if ends_step)]
        # every rank steps once a global batch, or torchrun would hang
        assert len(begins) == steps + 1 and begins[-1] == len(parts)
        assert all(list(split_batches(n, cut, first)) == parts[i:] for first, i in enumerate(begins))
        parts_of_ranks.append([parts[i:j] for i, j in zip(begins, begins[1:])])
    for step, of_ranks in enumerate(zip(*parts_of_ranks)):
        assert len(set(map(len, of_ranks))) == 1  # it goes forward as often, or synchronised batch norm would
        parts = [part for parts in of_ranks for part in parts]
        whole = list(range(step * batch_size, n if step == steps - 1 else (step + 1) * batch_size))
        copies = 1 if len(whole) >= ranks else ranks  # fewer images than ranks: each rank has them all
        assert copies > 1 or len(of_ranks[0]) <= accumulation
        assert sorted(p for part, _, _ in parts for p in part) == sorted(copies * whole)
        assert sum(share for _, share, _ in parts) == pytest.approx(1)
        mean = sum(share * values[part].mean() for part, share, _ in parts)
        assert mean == pytest.approx(values[whole].mean())  # so losses add up to it


@pytest.mark.parametrize("n, ranks", [(7, 1), (7, 3), (2, 3)])
def test_every_image_counts_once_among_the_ranks_and_no_rank_goes_without_a_batch(n, ranks):
    loader = loader_of(tiny(random_images(n)), 2)
    batches = [list(every_image(loader, rank, ranks)) for rank in range(ranks)]
    counted = [t for some in batches for _, targets, share, _ in some if share > 0 for t in targets.tolist()]
    assert all(batches) and sorted(counted) == list(range(n))


def test_batch_sizes_that_cannot_be_shared_out_and_unknown_augmentations_are_refused_at_once():
    for size, ranks, accumulation in ((0, 1, 1), (10, 4, 1), (8, 2, 3), (4, 8, 1), (8, 1, 0), (-8, 2, 1)):
        with pytest.raises(ValueError, match="batch size"):
            Cut(size, 0, ranks, accumulation)
    with pytest.raises(ValueError, match="blur.*standard"):
        loader_of(tiny(random_images(4)), 2, "blur")


def test_seeds_differ_by_number_and_order():
    numbers = [(0,), (1,), (0, 1), (1, 2), (2, 1), (1, 2, 1), (1, 2, 0, 1), (1, 2, 3)]
    seeds = {mix_seed(*some) for some in numbers}
    assert len(seeds) == len(numbers)
    assert all(0 <= seed < 2**63 for seed in seeds)  # what torch's manual_seed takes on every device


@pytest.mark.parametrize("augmentation", AUGMENTATIONS)
@pytest.mark.parametrize("size", [16, 24])
def test_images_come_in_the_size_that_the_data_set_names_in_float32_and_channels_last(augmentation, size):
    data = tiny(random_images(9, 16) // 3 + 80)  # far from 0 and 255, where PIL cuts off in between
    data.image_size, indices = size, [3, 8, 3, 0, 7, 7, 1]
    batches = list(loader_of(data, 4, augmentation).batches(indices))
    assert [batch.targets.tolist() for batch in batches] == [[3, 1, 3, 0], [0, 0, 1]]  # and a partial batch
    for images, targets, _, _ in batches:
        assert images.shape == (len(targets), 3, size, size)
        assert images.dtype == torch.float32 and targets.dtype == torch.int64
        assert images.is_contiguous(memory_format=torch.channels_last) and not images.is_contiguous()
    if augmentation == "none":
        expected = [Image.fromarray(data.train.images[i]).resize((size, size), Image.Resampling.BICUBIC)
                    for i in indices]
        found = to_pixels(torch.cat([batch.images for batch in batches]), data).numpy()
        assert np.abs(found - np.stack(expected)).max() < 1.5


def crops_of(image):
    """The 162 images that 4 black pixels of padding, a crop and a flip can give: bytes -> (y, x, flipped)."""
    (height, width, _), crops = image.shape, {}
    padded = np.pad(image, ((4, 4), (4, 4), (0, 0)))
    for y, x in np.ndindex(9, 9):
        crop = padded[y:y + height, x:x + width]
        crops |= {crop.tobytes(): (y, x, 0), crop[:, ::-1].tobytes(): (y, x, 1)}
    return crops


def test_standard_augmentation_draws_every_crop_and_flip_equally_often():
    data, drawn = tiny(random_images(1)), np.zeros((9, 9, 2))
    crops = crops_of(data.train.images[0])
    assert len(crops) == 162
    # One image all the time, as a class-balanced sampler repeats it within an epoch. A KeyError is an image
    # that is no crop; padding that is black only after the normalisation would be one.
    for batch in loader_of(data, 500, "standard").batches(np.zeros(162 * 30, int)):
        for pixels in to_bytes(batch.images, data):
            drawn[crops[pixels.tobytes()]] += 1

    for axes in ((), (1, 2), (0, 2), (0, 1)):  # all of it, and each draw by itself, which is sharper
        counts = drawn.sum(axes) if axes else drawn
        freedom = counts.size - 1
        statistic = ((counts - counts.mean()) ** 2 / counts.mean()).sum()  # chi square, to five sigma
        assert statistic < freedom + 5 * math.sqrt(2 * freedom)
    assert drawn.std() > 3  # far too even would mean a list of crops, not draws


@pytest.mark.parametrize("augmentation", AUGMENTATIONS)
@pytest.mark.parametrize("kind", ["resident", "streamed"])
def test_images_are_files_or_crops_by_seed_epoch_and_position_and_nothing_else(kind, augmentation, tmp_path):
    images, indices = random_images(9, 16), [*range(9), 3, 4, 4, 5, 8, 2, 1, 0, 0]
    data = tiny(images) if kind == "resident" else write_folder(tmp_path, images)
    if kind == "streamed":  # in the order of the files
        images = np.stack([np.array(Image.open(path)) for path in data.train.paths])
    kw = dict(augmentation=augmentation, seed=5, epoch=2, noise=0.1)
    expected, targets = by_position(data, indices, 8, **kw)  # the last global batch holds two images
    assert targets.tolist() == data.train.targets[indices].tolist()
    if augmentation == "none":
        assert (to_bytes(expected, data) == images[indices]).all()
    if augmentation == "standard":  # a KeyError is no crop of its image from black padding
        crops = zip(map(crops_of, images[indices]), to_bytes(expected, data), strict=True)
        assert len({possible[crop.tobytes()] for possible, crop in crops}) > 8
    for n in (18, 17):  # of 17 the last image joins the batch before it, and stays what it would be
        for ranks, accumulation in ((1, 1), (2, 1), (1, 2), (2, 2), (4, 1)):
            found, same_targets = by_position(data, indices[:n], 8, ranks, accumulation, **kw)
            assert torch.equal(same_targets, targets[:n])
            torch.testing.assert_close(found, expected[:n], rtol=0, atol=1e-5 if kind == "resident" else 0)

    if augmentation != "none":
        for i, j in ((0, 16), (16, 17)):  # one image each, drawn twice, cropped twice
            assert not torch.equal(expected[i], expected[j])
        drawn = [expected]
        for seed, epoch in ((5, 3), (6, 2), (6, 3)):
            images, _ = by_position(data, indices, 8, **{**kw, "seed": seed, "epoch": epoch})
            for other in drawn:
                assert (images != other).flatten(1).any(1).sum() >= 16  # one crop in 162 may agree
            drawn.append(images)
        through = loader_of(data, 8, augmentation, 6, 0.1)
        for epoch in (2, 3):  # drawn[3] is of a loader that has not gone through epoch 2, as after a resume
            images = torch.cat([batch.images for batch in through.batches(indices, epoch)])
        assert torch.equal(images, drawn[3])


@pytest.mark.parametrize("batch_size, accumulation, num_indices", [
    (3, 1, 7), (2 * CHUNK + 3, 1, 5 * CHUNK + 1), (3 * CHUNK, 2, 5 * CHUNK + 1)])
def test_workers_live_on_and_give_the_batches_of_one_process(tmp_path, batch_size, accumulation, num_indices):
    data, processes = write_folder(tmp_path, random_images(9, 16)), set()
    kw = dict(augmentation="augmented", seed=1, accumulation=accumulation)
    loader = loader_of(data, batch_size, workers=2, **kw)
    for epoch in (0, 1):
        indices = np.random.RandomState(epoch).randint(0, 9, num_indices)
        found = list(loader.batches(indices, epoch))
        processes |= {worker.pid for worker in loader.loader._iterator._workers}
        fresh = loader_of(data, batch_size, workers=0, **kw)  # as after a resume
        for batch, expected in zip(found, fresh.batches(indices, epoch), strict=True):
            assert torch.equal(batch.images, expected.images) and torch.equal(batch.targets, expected.targets)
            assert batch[2:] == expected[2:] and len(batch.targets) == len(batch.images)
            assert batch.images.is_contiguous(memory_format=torch.channels_last)
        assert torch.cat([batch.targets for batch in found]).tolist() == data.train.targets[indices].tolist()
    assert len(processes) == 2  # so the next epoch begins at once


def test_workers_get_flat_arrays_and_no_list_of_paths():
    n = 20000
    paths = np.array([f"/data/train/a class/image number {i:07d}.jpg".encode() for i in range(n)])
    split = ImageFiles(paths, np.arange(n) % 3)
    data = SimpleNamespace(mean=MEAN, std=STD, image_size=224, color_jitter=0.4)
    loader = make_loader(split, data, Cut(256), "cpu", Augmentation("standard"), workers=2)
    flat = paths.nbytes + split.targets.nbytes
    # what a spawned worker would get; a forked one shares it, as no object in it is counted by reference
    assert flat <= len(pickle.dumps(loader.loader.dataset)) < flat + 20000
    assert loader.loader.dataset.split.paths is paths
    # an epoch's index list reaches them chunk by chunk
    loader.sampler.indices, loader.sampler.parts = np.arange(n), list(split_batches(n, Cut(256)))
    assert len(pickle.dumps(loader.sampler.parts)) < 20000
    assert max(len(pickle.dumps(chunk)) for chunk in loader.sampler) < 1000
    assert sum(map(len, loader.sampler)) == n and len(loader.sampler) == math.ceil(n / 256) * 16 - 14


@pytest.mark.parametrize("noise", [0.01, 0.003])
def test_noise_has_the_sigma_asked_for_on_pixels_in_0_to_1_and_is_clamped(noise):
    # grey stays grey under the jitter, and 100 / 255 stays more than 6 sigma away from both ends of the clamp
    grey, ends = (tiny([np.full((24, 24, 3), level) for level in levels], (0, 0, 0), (1, 1, 1))
                  for levels in ([100], [0, 255]))
    batches = loader_of(grey, 40, "augmented", noise=noise).batches(np.zeros(100, int))
    pixels = torch.cat([batch.images for batch in batches])[:, :, 4:-4, 4:-4].double()  # without the padding
    levels = pixels.mean((1, 2, 3), keepdim=True)
    assert levels.std() > 0.05  # the jitter is on
    z = (pixels - levels) / noise
    # 76,800 numbers: sigma is known to .26%; a normal's mean absolute value is sqrt(2 / pi)
    assert z.std() == pytest.approx(1, abs=0.02)
    assert z.abs().mean() == pytest.approx(math.sqrt(2 / math.pi), abs=0.02)
    close = z.flatten(1) @ z.flatten(1).t() / z[0].numel() - torch.eye(100)
    assert close.abs().max() < 0.25  # no two images share their noise, in one batch or in two (sigma .036)
    assert abs((z[:, 0] * z[:, 1]).mean()) < 0.03 and abs((z[:, 1] * z[:, 2]).mean()) < 0.03

    (images, *_), = loader_of(ends, 128, "augmented", noise=10 * noise).batches([0] * 64 + [1] * 64)
    assert images.min() == 0 and images.max() == 1
    # on black half of all noise is cut off at 0, the rest has the mean absolute value of a normal
    assert (images[:64] == 0).double().mean() == pytest.approx(0.5, abs=0.02)
    assert images[:64].mean() == pytest.approx(10 * noise / math.sqrt(2 * math.pi), rel=0.03)


@pytest.mark.parametrize("augmentation", AUGMENTATIONS)
def test_large_images_become_224_pixels_and_are_sent_as_bytes_where_that_will_do(augmentation, tmp_path):
    # an image that is its own map: red runs along x, green along y, from 0 to 250
    ramp = np.zeros((120, 150, 3), np.uint8)
    ramp[..., 0], ramp[..., 1] = np.linspace(0, 250, 150), np.linspace(0, 250, 120)[:, None]
    data = write_folder(tmp_path, ramp[None].repeat(3, 0))
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    loader = loader_of(data, 3, augmentation, seed=2)
    batch, = loader.batches(range(3))
    assert torch.equal(torch.rand(3), expected)  # no random number of the process is taken
    assert batch.images.shape == (3, 3, 224, 224) and batch.images.dtype == torch.float32
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    as_floats, sent = augmentation in ("augmented", "strong"), loader.loader.dataset[0, 0, 0]
    assert (sent.dtype, sent.shape) == ((torch.float32, (3, 224, 224)) if as_floats
                                        else (torch.uint8, (224, 224, 3)))
    if augmentation == "none":  # the short side becomes 256 pixels, the middle 224 stay
        image = to_pixels(batch.images, data)[0]
        for values, side in ((image[112, :, 0], 320), (image[:, 112, 1], 256)):
            expected = 250 * (torch.arange(224) + (side - 224) / 2 + 0.5) / side
            assert (values - expected).abs().max() < 4
    if augmentation == "standard":  # a random crop, whose range of values shows the area that it covers
        pixels = torch.cat([to_pixels(batch.images, data) for batch in loader.batches([0] * 100)])
        width, height, _ = ((pixels.amax((1, 2)) - pixels.amin((1, 2))) / 250).unbind(1)
        areas, flips = (width + 1 / 150) * (height + 1 / 120), pixels[:, 100, 0, 0] > pixels[:, 100, -1, 0]
        assert 0.03 < areas.min() < 0.12 and 0.8 < areas.max() <= 1.01
        assert 0.42 < areas.mean() < 0.6  # uniform in (.05, 1), a little less for crops that do not fit
        assert 30 < flips.sum() < 70


def test_a_jittered_set_varies_in_brightness_contrast_and_saturation_but_not_in_hue(tmp_path):
    # A crop of one colour stays one colour, which torchvision's jitter of (.4, .4, .4, 0) moves as a whole
    colour = np.array([120, 100, 80], np.uint8)
    data = write_folder(tmp_path, np.zeros((2, 80, 80, 3), np.uint8) + colour)

    def images(augmentation, n=4):
        return next(loader_of(data, n, augmentation, seed=3).batches([0] * n)).images

    def colours(augmentation):
        pixels = to_bytes(images(augmentation, 64), data).astype(int)
        assert (pixels == pixels[:, :1, :1]).all()
        return pixels[:, 0, 0]

    assert (colours("standard") == colour).all()
    unjittered = {augmentation: images(augmentation) for augmentation in ("resized", "strong", "none")}
    data.color_jitter = 0.4
    for augmentation, expected in unjittered.items():  # nor do the transformers' recipes have it
        assert torch.equal(images(augmentation), expected)
    found = colours("standard")
    brightness = found @ [0.299, 0.587, 0.114] / (colour @ [0.299, 0.587, 0.114])
    assert 0.58 < brightness.min() < 0.7 and 1.3 < brightness.max() < 1.42
    spread = (found[:, 0] - found[:, 2]) / brightness / 40  # saturation times, in a flat image, contrast
    assert 0.33 < spread.min() < 0.6 and 1.4 < spread.max() < 2.05
    assert (abs(found @ [1, -2, 1]) <= 5).all()  # green midway between red and blue: the hue


@pytest.mark.parametrize("damage, workers", [("half", 0), ("half", 1), (b"", 0), (b"junk", 0),
                                             (b"\x89PNG\r\n\x1a\n", 0), ("gone", 0)])
def test_an_image_that_cannot_be_decoded_raises_its_path(damage, workers, tmp_path):
    data, bad = write_folder(tmp_path, random_images(6, 40), "jpg", quality=95), tmp_path / "train/b/003.jpg"
    whole = bad.read_bytes()
    bad.write_bytes(damage if isinstance(damage, bytes) else whole[:len(whole) // 2])
    if damage == "gone":
        bad.unlink()
    with pytest.raises(UnreadableImage, match="skip-bad-images") as caught:
        list(loader_of(data, 3, workers=workers).batches(range(6)))
    assert str(bad) in str(caught.value)
    assert isinstance(caught.value, ValueError)  # so a script ends with one line, not a traceback
