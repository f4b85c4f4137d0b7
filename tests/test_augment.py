"""The room common/augment.py: operations on a whole batch, against torchvision's on one image."""
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tv

from common.augment import (color_jitter_gray, mixup_cutmix, normalise, rand_augment, random_box,
                            random_crop_flip, random_erasing, random_resized_crop_flip, resize)


def random_images(n, side):
    """uint8 [n, 3, side, side], in channels_last order."""
    images = np.random.RandomState(0).randint(0, 256, (n, side, side, 3), np.uint8)
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def random_numbers(*shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_normalised_images_are_pixels_minus_mean_over_std_whatever_their_layout(dtype, layout):
    pixels, (mean, std) = random_images(3, 6)[:, :, :4], torch.tensor([[0.5, 0.4, 0.3], [0.2, 0.25, 0.3]])
    images = pixels.to(dtype).contiguous(memory_format=layout)
    found = normalise(images, mean, std)
    expected = (pixels.double() / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)
    assert found.dtype == torch.float32 and found.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(images, pixels.to(dtype))  # not worked on in place
    assert torch.equal(normalise(images, mean.tolist(), std.tolist()), found)


def test_a_crop_is_a_window_of_the_padded_image_turned_over_or_not():
    padded, indices = random_images(5, 12), [4, 0, 4, 2]
    uniforms = torch.tensor([[0, 0, 0], [0.999, 0.999, 0], [0.5, 0.2, 0.5], [0.3, 0.8, 0.999]])
    crops = random_crop_flip(padded.permute(0, 2, 3, 1), torch.tensor(indices), uniforms, 8)  # corners 0 to 4
    windows = [(0, 0, False), (4, 4, False), (2, 1, True), (1, 4, True)]
    for crop, index, (y, x, flips) in zip(crops, indices, windows, strict=True):
        window = padded[index, :, y:y + 8, x:x + 8]
        assert torch.equal(crop, window.flip(2) if flips else window)
    assert crops.is_contiguous(memory_format=torch.channels_last)


def test_resizing_is_torchvision_s_and_leaves_images_of_that_side_alone():
    images = torch.randn(3, 3, 12, 12).contiguous(memory_format=torch.channels_last)
    for side in (5, 24, 17):
        out = resize(images, side)
        torch.testing.assert_close(out, tv.resize(images, [side, side], antialias=True), rtol=0, atol=1e-5)
        assert out.is_contiguous(memory_format=torch.channels_last)
    assert resize(images, 12) is images


@pytest.mark.parametrize("strength", [1.0, 0.5, 1.5])
def test_colour_jitter_is_torchvisions_image_by_image(strength):
    numbers, kinds = random_numbers(60, 96), set()
    images, uniforms = numbers[:, 6:].reshape(60, 3, 5, 6), numbers[:, :6]
    images[:3] = torch.tensor([[0.0], [0.5], [1.0]])[:, None, None]  # black, grey, white: no hue to shift
    low, high = max(0, 1 - 0.8 * strength), 1 + 0.8 * strength
    for expected, u, found in zip(images, uniforms.tolist(), color_jitter_gray(images, uniforms, strength)):
        if u[4] < 0.8:
            for i, adjust in enumerate((tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation)):
                expected = adjust(expected, low + u[i] * (high - low))
            expected = tv.adjust_hue(expected, -0.2 * strength + u[3] * 0.4 * strength)
        if u[5] < 0.2:
            expected = tv.rgb_to_grayscale(expected, num_output_channels=3)
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)
        kinds.add((u[4] < 0.8, u[5] < 0.2))
    assert len(kinds) == 4  # all four cases were seen


@pytest.mark.parametrize("side, area, whole", [(32, (0.2, 1.0), True), (32, (0.9, 1.0), True),
                                               (32, (0.02, 0.33), False), (8, (0.6, 0.9), False)])
def test_boxes_are_drawn_as_torchvision_draws_them(side, area, whole):
    torch.manual_seed(0)
    aspect, keys = ((3 / 4, 4 / 3), "top left height width") if whole else ((1 / 3.3, 1 / 0.3), "i j h w")
    ours = torch.cat(random_box(torch.rand(2000, 22), side, area, aspect, whole), 1).double().numpy()
    assert (ours == ours.round()).all()
    assert (ours[:, :2] >= 0).all() and (ours[:, :2] + ours[:, 2:] <= side).all()
    transform = v2.RandomResizedCrop(side, area) if whole else v2.RandomErasing(1.0, area, value="random")
    drawn = [transform.make_params([torch.zeros(3, side, side)]) for _ in range(2000)]
    theirs = np.array([[0 if d.get("v", 0) is None else d[key] for key in keys.split()] for d in drawn])

    def measured(boxes):
        """Sizes, aspects, and where in their room the boxes with pixels lie."""
        place = boxes[:, :2] / (side - boxes[:, 2:] + 1)
        return *boxes[:, 2:].T, boxes[:, 3] / boxes[:, 2].clip(1), *place[boxes[:, 2] > 0].T
    for number, pair in enumerate(zip(measured(ours), measured(theirs), strict=True)):
        points, limit = np.concatenate(pair), 1.95 * math.sqrt(sum(1 / len(values) for values in pair))
        below = [np.searchsorted(np.sort(values), points, "right") / len(values) for values in pair]
        assert abs(below[0] - below[1]).max() < limit, number  # Kolmogorov and Smirnov's, at p = .001


def test_a_resized_crop_is_torch_s_interpolation_of_the_box():
    images, uniforms = random_images(30, 32), random_numbers(30, 23)
    ours = random_resized_crop_flip(images, uniforms, 24)
    assert ours.dtype == torch.uint8 and ours.shape == (30, 3, 24, 24)
    boxes = torch.cat(random_box(uniforms[:, :22], 32, (0.2, 1.0), (3 / 4, 4 / 3), True), 1).int().tolist()
    for image, (top, left, height, width), u, found in zip(images, boxes, uniforms, ours):
        crop = image[None, :, top:top + height, left:left + width].float()
        expected = F.interpolate(crop, (24, 24), mode="bicubic", align_corners=False).round().clamp(0, 255)
        difference = found - (expected.flip(3) if u[22] >= 0.5 else expected)
        assert difference[..., 3:-3, 3:-3].abs().max() <= 1  # at the border ours sees what lies behind it
    whole = torch.tensor([1.0] * 10 + [0.5] * 10 + [0.0] * 3).expand(30, -1)  # all of the area, aspect 1
    assert torch.equal(random_resized_crop_flip(images, whole, 32), images)


@pytest.mark.parametrize("strength", [9, 27])
def test_rand_augment_gives_every_image_torchvision_s_operations_in_turn(strength):
    images, uniforms = random_images(200, 16), random_numbers(200, 4)
    before, together = images.clone(), rand_augment(images, uniforms, strength)
    for image, u, found in zip(images.split(1), uniforms.split(1), together):
        alone = rand_augment(rand_augment(image, u[:, :2], strength), u[:, 2:], strength)
        assert torch.equal(found, alone[0])
    assert torch.equal(images, before)
    assert len({int(14 * u) for u in uniforms[:, ::2].flatten().tolist()}) == 14

    images = random_images(4, 32).contiguous()
    images[:2] = (images[:2].float() / 3 + 60).to(torch.uint8)  # less contrast, for what stretches it
    space = v2.RandAugment(1, strength)._AUGMENTATION_SPACE
    assert len(space) == 14
    for number, name in enumerate(space):
        alone = v2.RandAugment(1, strength)
        alone._AUGMENTATION_SPACE = {name: space[name]}
        uniforms = torch.tensor([[(number + 0.5) / 14, sign] for sign in (0.25, 0.75)])
        for image in images:
            expected = {tuple(alone(image).flatten().tolist()) for _ in range(16)}  # of either sign
            both = rand_augment(image.expand(2, -1, -1, -1), uniforms, strength).flatten(1)
            ours = {tuple(pixels) for pixels in both.tolist()}
            assert len(ours) == len(expected), name
            for a in ours:  # rounding may move a pixel of a rotation that lies on an edge
                unlike = min((np.array(a) != np.array(b)).mean() for b in expected)
                assert unlike < (0.01 if number in (1, 2, 5) else 1e-9), name


def test_random_erasing_puts_noise_into_one_box_of_some_images():
    n, side = 2000, 16
    images, normals = torch.full((n, 3, side, side), 7.0), torch.randn(n, 3, side, side)
    out = random_erasing(images, random_numbers(n, 23), normals, 0.25)
    erased = (out != 7).all(1)
    assert torch.equal(torch.where(erased[:, None], normals, images), out)
    some = erased[erased.flatten(1).any(1)]
    assert len(some) / n == pytest.approx(0.25, abs=5 * math.sqrt(0.25 * 0.75 / n))
    for box in some[:50]:  # a rectangle
        rows, columns = box.any(1).nonzero(), box.any(0).nonzero()
        assert box[rows.min():rows.max() + 1, columns.min():columns.max() + 1].all()
    share = some.float().mean((1, 2))
    assert 0.01 < share.min() and share.max() < 0.36 and 0.13 < share.mean() < 0.22


def test_mixing_mixes_images_and_targets_alike():
    torch.manual_seed(0)
    images = torch.eye(4)[:, :3, None, None].expand(4, 3, 8, 8).contiguous()  # image i: channel i is 1
    targets, kinds = torch.tensor([2, 0, 1, 4]), {"both": set(), "CutMix": set()}
    for _ in range(60):
        for name, mix in (("both", mixup_cutmix(5)), ("CutMix", mixup_cutmix(5, 0, 1))):
            mixed, soft = mix(images, targets)
            kinds[name].add(bool(((mixed == 0) | (mixed == 1)).all()))  # each pixel is one image's
            assert soft.shape == (4, 5) and torch.allclose(soft.sum(1), torch.ones(4))
            share = mixed.mean((2, 3)).diagonal()  # of image i in mixture i, by pixels
            assert share.tolist() == pytest.approx(soft[range(3), targets[:3]].tolist(), abs=1e-5)
    assert kinds == {"both": {True, False}, "CutMix": {True}}
    alone = [mixup_cutmix(5, 0, 1)(images, targets)[0] for _ in range(9)]
    assert not all(torch.equal(mixed, images) for mixed in alone)
    same, hard = mixup_cutmix(5, 0, 0)(images, targets)
    assert torch.equal(same, images) and torch.equal(hard, torch.eye(5)[targets])
