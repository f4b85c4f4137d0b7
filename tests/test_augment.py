"""The room common/augment.py: operations on a whole batch, against torchvision's on one image."""
import math

import numpy as np
import pytest
import torch

from common.augment import (color_jitter_gray, mixup_cutmix, normalise, rand_augment, random_box,
                            random_crop_flip, random_erasing, random_resized_crop_flip, resize)


def random_images(n, side=12, seed=0):
    """uint8 [n, 3, side, side], in channels_last order."""
    images = np.random.RandomState(seed).randint(0, 256, (n, side, side, 3), np.uint8)
    return torch.from_numpy(images).permute(0, 3, 1, 2)


# ---------------------------------------------------------------- layout, size

@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_normalised_images_are_pixels_minus_mean_over_std_whatever_their_layout(dtype, layout):
    pixels = random_images(3, side=6)[:, :, :4]  # [3, 3, 4, 6]
    images = pixels.to(dtype).contiguous(memory_format=layout)
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
    found = normalise(images, mean, std)
    for channel in range(3):
        expected = (pixels[:, channel].double() / 255 - mean[channel]) / std[channel]
        assert (found[:, channel] - expected).abs().max() < 1e-5
    assert found.dtype == torch.float32 and found.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(images, pixels.to(dtype))  # not worked on in place
    assert torch.equal(normalise(images, torch.tensor(mean), torch.tensor(std)), found)


def test_a_crop_is_a_window_of_the_padded_image_turned_over_or_not():
    padded = random_images(5, side=12)
    indices = torch.tensor([4, 0, 4, 2])
    uniforms = torch.tensor([[0, 0, 0], [0.999, 0.999, 0], [0.5, 0.2, 0.5], [0.3, 0.8, 0.999]])
    crops = random_crop_flip(padded.permute(0, 2, 3, 1), indices, uniforms, 8)  # corners 0 to 4
    windows = [(0, 0, False), (4, 4, False), (2, 1, True), (1, 4, True)]
    for crop, index, (y, x, flips) in zip(crops, indices, windows, strict=True):
        window = padded[index, :, y:y + 8, x:x + 8]
        assert torch.equal(crop, window.flip(2) if flips else window)
    assert crops.is_contiguous(memory_format=torch.channels_last)


def test_resizing_is_torchvision_s_and_leaves_images_of_that_side_alone():
    from torchvision.transforms.v2 import functional as tv
    images = torch.randn(3, 3, 12, 12).contiguous(memory_format=torch.channels_last)
    for side in (5, 24, 17):
        out = resize(images, side)
        torch.testing.assert_close(out, tv.resize(images, [side, side], antialias=True), rtol=0, atol=1e-5)
        assert out.is_contiguous(memory_format=torch.channels_last)
    assert resize(images, 12) is images


# ---------------------------------------------------------------- colours

@pytest.mark.parametrize("strength", [1.0, 0.5, 1.5])
def test_colour_jitter_is_torchvisions_image_by_image(strength):
    from torchvision.transforms.v2 import functional as tv
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(60, 3, 5, 6, generator=generator)
    images[:3] = torch.tensor([[0.0], [0.5], [1.0]])[:, None, None]  # black, grey, white: no hue to shift
    uniforms = torch.rand(60, 6, generator=generator)
    found = color_jitter_gray(images, uniforms, strength)
    kinds = set()
    for image, u, result in zip(images, uniforms.tolist(), found):
        expected, jitters, greys = image, u[4] < 0.8, u[5] < 0.2
        kinds.add((jitters, greys))
        if jitters:
            low, high = max(0, 1 - 0.8 * strength), 1 + 0.8 * strength
            expected = tv.adjust_brightness(expected, low + u[0] * (high - low))
            expected = tv.adjust_contrast(expected, low + u[1] * (high - low))
            expected = tv.adjust_saturation(expected, low + u[2] * (high - low))
            expected = tv.adjust_hue(expected, -0.2 * strength + u[3] * 0.4 * strength)
        if greys:
            expected = tv.rgb_to_grayscale(expected, num_output_channels=3)
        torch.testing.assert_close(result, expected, rtol=0, atol=2e-5)
    assert len(kinds) == 4  # all four cases were seen


# ---------------------------------------------------------------- resized crops, RandAugment, erasing, mixing

def same_distribution(ours, theirs):
    """The two-sample Kolmogorov-Smirnov distance stays below its value at p = .001."""
    points = np.concatenate([ours, theirs])
    below = [np.searchsorted(np.sort(drawn), points, "right") / len(drawn) for drawn in (ours, theirs)]
    return abs(below[0] - below[1]).max() < 1.95 * math.sqrt(1 / len(ours) + 1 / len(theirs))


@pytest.mark.parametrize("side, area, whole", [(32, (0.2, 1.0), True), (32, (0.9, 1.0), True),
                                               (32, (0.02, 0.33), False), (8, (0.6, 0.9), False)])
def test_boxes_are_drawn_as_torchvision_draws_them(side, area, whole):
    from torchvision.transforms import v2
    torch.manual_seed(0)
    aspect = (3 / 4, 4 / 3) if whole else (1 / 3.3, 1 / 0.3)
    ours = torch.cat(random_box(torch.rand(2000, 22), side, area, aspect, whole), 1).double().numpy()
    assert (ours == ours.round()).all()
    assert (ours[:, :2] >= 0).all() and (ours[:, :2] + ours[:, 2:] <= side).all()

    transform = v2.RandomResizedCrop(side, area) if whole else v2.RandomErasing(1.0, area, value="random")
    image = [torch.zeros(3, side, side)]
    drawn = [transform.make_params(image) for _ in range(2000)]
    keys = ("top", "left", "height", "width") if whole else ("i", "j", "h", "w")
    theirs = np.array([[0 if d.get("v", 0) is None else d[key] for key in keys] for d in drawn])

    def measured(boxes):
        """Sizes, aspects, and where in their room the boxes with pixels lie."""
        place = boxes[:, :2] / (side - boxes[:, 2:] + 1)
        return *boxes[:, 2:].T, boxes[:, 3] / boxes[:, 2].clip(1), *place[boxes[:, 2] > 0].T
    for number, pair in enumerate(zip(measured(ours), measured(theirs), strict=True)):
        assert same_distribution(*pair), number


def test_a_resized_crop_is_torch_s_interpolation_of_the_box():
    images = random_images(30, side=32)
    uniforms = torch.rand(30, 23, generator=torch.Generator().manual_seed(0))
    ours = random_resized_crop_flip(images, uniforms, 24)
    assert ours.dtype == torch.uint8 and ours.shape == (30, 3, 24, 24)

    boxes = torch.cat(random_box(uniforms[:, :22], 32, (0.2, 1.0), (3 / 4, 4 / 3), True), 1).int().tolist()
    for image, (top, left, height, width), u, found in zip(images, boxes, uniforms, ours):
        crop = image[None, :, top:top + height, left:left + width].float()
        expected = torch.nn.functional.interpolate(crop, (24, 24), mode="bicubic", align_corners=False)
        expected = expected.round().clamp(0, 255)[0]
        expected = expected.flip(2) if u[22] >= 0.5 else expected
        inner = (slice(None), slice(3, -3), slice(3, -3))  # at the border ours sees what lies behind it
        assert (found.float() - expected)[inner].abs().max() <= 1

    whole = torch.zeros(30, 23)
    whole[:, :10], whole[:, 10:20] = 1.0, 0.5  # all of the area, aspect 1
    assert torch.equal(random_resized_crop_flip(images, whole, 32), images)


@pytest.mark.parametrize("strength", [9, 27])
def test_rand_augment_s_operations_are_torchvision_s(strength):
    from torchvision.transforms import v2
    images = random_images(4, side=32).contiguous()
    images[:2] = (images[:2].float() / 3 + 60).to(torch.uint8)  # less contrast, for what stretches it
    space = v2.RandAugment(1, strength)._AUGMENTATION_SPACE
    assert len(space) == 14
    for number, name in enumerate(space):
        alone = v2.RandAugment(1, strength)
        alone._AUGMENTATION_SPACE = {name: space[name]}
        for image in images:
            expected = {tuple(alone(image).flatten().tolist()) for _ in range(16)}  # of either sign
            uniforms = torch.tensor([[(number + 0.5) / 14, sign] for sign in (0.25, 0.75)])
            ours = {tuple(drawn.flatten().tolist())
                    for drawn in rand_augment(image[None].expand(2, -1, -1, -1), uniforms, strength)}
            assert len(ours) == len(expected), name
            for a in ours:  # rounding may move a pixel of a rotation that lies on an edge
                unlike = min((np.array(a) != np.array(b)).mean() for b in expected)
                assert unlike < (0.01 if number in (1, 2, 5) else 1e-9), name


def test_rand_augment_gives_every_image_its_own_operations_in_turn():
    images = random_images(200, side=16)
    uniforms = torch.rand(200, 4, generator=torch.Generator().manual_seed(0))
    together, before = rand_augment(images, uniforms), images.clone()
    for n in range(200):
        first = rand_augment(images[n:n + 1], uniforms[n:n + 1, :2])
        assert torch.equal(together[n:n + 1], rand_augment(first, uniforms[n:n + 1, 2:])), n
    assert torch.equal(images, before)
    assert len({int(14 * u) for u in uniforms[:, ::2].flatten().tolist()}) == 14


def test_random_erasing_puts_noise_into_one_box_of_some_images():
    n, side = 2000, 16
    generator = torch.Generator().manual_seed(0)
    images, normals = torch.full((n, 3, side, side), 7.0), torch.randn(n, 3, side, side, generator=generator)
    out = random_erasing(images, torch.rand(n, 23, generator=generator), normals, 0.25)
    erased = (out != 7).all(1)
    assert torch.equal(torch.where(erased[:, None], normals, images), out)
    some = erased.flatten(1).any(1)
    assert some.float().mean().item() == pytest.approx(0.25, abs=5 * math.sqrt(0.25 * 0.75 / n))
    for box in erased[some][:50]:
        rows, columns = box.any(1).nonzero(), box.any(0).nonzero()
        assert box[rows.min():rows.max() + 1, columns.min():columns.max() + 1].all()  # a rectangle
        assert box.sum() == len(rows) * len(columns)

    share = erased[some].float().mean((1, 2))
    assert 0.01 < share.min() and share.max() < 0.36 and 0.13 < share.mean() < 0.22


def test_mixing_mixes_images_and_targets_alike():
    torch.manual_seed(0)
    images = torch.eye(4)[:, :3, None, None].expand(4, 3, 8, 8).contiguous()  # image i: channel i is 1
    targets, kinds = torch.tensor([2, 0, 1, 4]), set()
    for _ in range(60):
        mixed, soft = mixup_cutmix(5)(images, targets)
        assert soft.shape == (4, 5) and torch.allclose(soft.sum(1), torch.ones(4))
        share = mixed.mean((2, 3))  # of each image in each mixture, by pixels
        for i in range(3):
            assert share[i, i] == pytest.approx(soft[i, targets[i]].item(), abs=1e-5)
        kinds.add(bool(((mixed == 0) | (mixed == 1)).all()))
    assert kinds == {True, False}  # CutMix, and Mixup
    same, hard = mixup_cutmix(5, 0, 0)(images, targets)
    assert torch.equal(same, images) and torch.equal(hard, torch.eye(5)[targets])
    assert all(((m := mixup_cutmix(5, 0, 1)(images, targets)[0]) == 0).logical_or(m == 1).all()
               for _ in range(20))
