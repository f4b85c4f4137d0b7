"""The room common/vit.py. That a ViT and an MAE compute the textbook's is in test_benchmark.py."""
import math

import pytest
import torch
import torch.nn.functional as F

from common.vit import (MAE, VIT_SIZES, DropPath, ViT, patchify, random_masking, resize_positions,
                        sincos_positions, unpatchify)

SMALL = dict(image_size=16, patch_size=4, width=16, depth=2, heads=2)
DECODER = dict(decoder_width=12, decoder_depth=2, decoder_heads=3)


@pytest.mark.parametrize("size, counts", [  # of each ViT (image side, patch side, classes), MAE: all, trained
    ("tiny", [5717416, 5790376, 5524416, 5362762, 5380132, 31338688, 31200000]),
    ("small", [22050664, 22196584, 21665664, 21342346, 21376996, 47578240, 47401728]),
    ("base", [86567656, 86859496, 85798656, 85152010, 85221220, 111907840, 111655680]),
    ("large", [304326632, 304715752, 303301632, 302439434, 302531684, 329541888, 329239296])])
def test_parameter_counts(size, counts):
    shapes = ((224, 16, 1000), (384, 16, 1000), (224, 16, 0), (32, 4, 10), (32, 4, 100))
    with torch.device("meta"):
        mae = MAE(224, 16, **VIT_SIZES[size])
        nets = [ViT(*shape[:2], **VIT_SIZES[size], num_classes=shape[2]) for shape in shapes]
    parameters = [list(net.parameters()) for net in (*nets, mae)]
    parameters.append([p for p in mae.parameters() if p.requires_grad])
    assert [sum(p.numel() for p in some) for some in parameters] == counts


def test_patches_are_rows_columns_channels_and_unpatchify_is_the_inverse():
    images = torch.randn(2, 3, 8, 8)
    patches = patchify(images, 4)
    assert torch.equal(patches[:, 1], images[:, :, :4, 4:].permute(0, 2, 3, 1).flatten(1))
    assert torch.equal(unpatchify(patches, 4), images)
    assert torch.equal(patchify(images.contiguous(memory_format=torch.channels_last), 4), patches)


def test_positions_tell_columns_and_rows_apart_and_the_class_token_has_none():
    positions = sincos_positions(16, 5)[0]
    assert positions.shape == (26, 16) and (positions[0] == 0).all()
    grid = positions[1:].reshape(5, 5, 16)
    assert torch.equal(grid[0, :, :8], grid[3, :, :8]) and torch.equal(grid[:, 0, 8:], grid[:, 2, 8:])
    assert torch.equal(grid[2, 3, :8], grid[3, 2, 8:])  # one code for both axes
    angles = 3 * torch.tensor([1, 0.1, 0.01, 0.001])  # frequencies times the column
    torch.testing.assert_close(grid[0, 3, :8], torch.cat([angles.sin(), angles.cos()]), rtol=0, atol=1e-6)


def test_positions_are_interpolated_and_the_class_token_s_kept():
    positions = torch.randn(1, 17, 8)
    assert resize_positions(positions, 16) is positions
    positions[0, 1:] = torch.arange(4.0).repeat_interleave(4)[:, None]  # the row
    larger = resize_positions(positions, 64)
    assert torch.equal(larger[:, 0], positions[:, 0])
    # rows 0 to 3 by Keys' cubic kernel (a = -.75) where row r of 8 lies, (r + .5) / 2 - .5; columns are equal
    rows = torch.tensor([-0.10546875, 0.19140625, 0.66796875, 1.296875,
                         1.703125, 2.33203125, 2.80859375, 3.10546875])
    torch.testing.assert_close(larger[0, 1:].view(8, 8, 8), rows[:, None, None].expand(8, 8, 8))


def test_masking_keeps_int_l_1_minus_r_patches_each_equally_often_and_restore_is_the_inverse():
    for length, ratio, kept in ((64, 0.75, 16), (196, 0.75, 49), (16, 0.9, 1), (10, 0.33, 6)):
        keep, restore, mask = random_masking(7, length, ratio)
        assert keep.shape == (7, kept) and keep.dtype == restore.dtype == torch.int64
        assert torch.equal(restore.argsort(1)[:, :kept], keep)  # (kept, masked)
        assert torch.equal(restore.sort(1).values, torch.arange(length).expand(7, -1))
        assert torch.equal(mask, torch.ones(7, length).scatter(1, keep, 0.0))

    n = 4000
    (keep, _, mask), again = (random_masking(n, 16, 0.75, torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(again[0], keep)
    assert (mask.mean(0) - 0.75).abs().max() < 5 * math.sqrt(0.75 * 0.25 / n)
    together = ((1 - mask).t() @ (1 - mask) / n)[~torch.eye(16, dtype=torch.bool)]
    assert (together - 4 / 16 * 3 / 15).abs().max() < 5 * math.sqrt(0.05 * 0.95 / n)  # pairs too
    first = torch.bincount(keep[:, 0], minlength=16) / n  # and the order of the kept ones is random
    assert (first - 1 / 16).abs().max() < 5 * math.sqrt(1 / 16 / n)


def test_drop_path_leaves_out_whole_images_keeps_the_mean_and_rests_in_eval_mode():
    torch.manual_seed(0)
    drop, branch = DropPath(0.3), torch.ones(5000, 2, 3)
    out = drop(branch)
    assert (out == out[:, :1, :1]).all() and out.unique().tolist() == [0, pytest.approx(1 / 0.7)]
    assert out.mean().item() == pytest.approx(1, abs=5 * math.sqrt(0.3 / 0.7 / 5000))
    assert torch.equal(drop.eval()(branch), branch)
    rates = [block.drop_path.rate for block in ViT(16, 4, 16, 5, 2, drop_path=0.2).blocks]
    assert rates == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])


def test_a_vit_starts_at_logits_of_zero_and_glorot_uniform_elsewhere():
    torch.manual_seed(0)
    model = ViT(**SMALL, num_classes=5)
    assert 0 < model(torch.randn(4, 3, 16, 16))[0].abs().max() < 1e-3
    weight, bound = model.blocks[0].mlp[0].weight, math.sqrt(6 / 80)  # [64, 16]
    assert 0.99 * bound < weight.abs().max() <= bound
    assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)
    assert not any(part.bias.any() for part in model.modules() if isinstance(part, torch.nn.Linear))


def test_an_mae_s_targets_are_normed_or_pixels_and_all_but_its_positions_learns():
    torch.manual_seed(0)
    images = 3 + 2 * torch.randn(2, 3, 16, 16)
    keep, restore, _ = random_masking(2, 16, 0.5)
    model = MAE(**SMALL, **DECODER)
    predictions, targets = model(images, keep, restore)
    assert targets.mean(2).abs().max() < 1e-5 and (targets.var(2) - 1).abs().max() < 1e-5
    assert (model(torch.zeros(2, 3, 16, 16), keep, restore)[1] == 0).all()  # not nan
    _, pixels = MAE(**SMALL, **DECODER, norm_pix=False)(images, keep, restore)
    for found, whole, order in zip(pixels, patchify(images, 4), restore.argsort(1)):
        assert torch.equal(found, whole[order[8:]])

    F.mse_loss(predictions, targets).backward()
    fixed = {name for name, p in model.named_parameters() if p.grad is None}
    assert fixed == {"encoder.positions", "decoder_positions"}
    assert torch.equal(model.decoder_positions, sincos_positions(12, 4))
    assert ViT(**SMALL).positions.requires_grad


@pytest.mark.parametrize("make, sizes, words", [
    *((random_masking, sizes, "mask") for sizes in ((0, 16, 0.5), (2, 0, 0.5), (2, 16, 0.0), (2, 16, 1.0),
                                                    (2, 16, -1.0), (2, 16, math.nan), (2, 4, 0.9))),
    (sincos_positions, (18, 5), "multiple of 4"), (ViT, (18, 4, 16, 2, 2), "image size"),
    (ViT, (16, 5, 16, 2, 2), "patch size"), (ViT, (16, 0, 16, 2, 2), "at least|multiple"),
    (ViT, (16, 4, 18, 2, 2), "multiple of 4"), (ViT, (16, 4, 16, 0, 2), "depth"),
    (ViT, (16, 4, 16, 2, 3), "heads"), (ViT, (16, 4, 16, 2, 2, 0, 1.0), "drop path"),
    (MAE, (16, 4, 16, 2, 2, 20, 2, 3), "heads")])
def test_sizes_that_do_not_fit_are_refused(make, sizes, words):
    with pytest.raises(ValueError, match=words):
        make(*sizes)
