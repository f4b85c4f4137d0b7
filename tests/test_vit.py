"""The room common/vit.py: parameter counts, patches, positions, masking, drop path, starts, targets. That a
ViT and an MAE compute the textbook's, gradients too, is in test_benchmark.py, beside the peers' ones."""
import math

import pytest
import torch
import torch.nn.functional as F

from common.vit import (MAE, VIT_SIZES, DropPath, ViT, patchify, random_masking, resize_positions,
                        sincos_positions, unpatchify)

SMALL = dict(image_size=16, patch_size=4, width=16, depth=2, heads=2)
DECODER = dict(decoder_width=12, decoder_depth=2, decoder_heads=3)


def parameters(model, trained=False):
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trained)


@pytest.mark.parametrize("size, large, at_384, no_head, cifar10, cifar100, mae, mae_all", [
    ("tiny", 5717416, 5790376, 5524416, 5362762, 5380132, 31200000, 31338688),
    ("small", 22050664, 22196584, 21665664, 21342346, 21376996, 47401728, 47578240),
    ("base", 86567656, 86859496, 85798656, 85152010, 85221220, 111655680, 111907840),
    ("large", 304326632, 304715752, 303301632, 302439434, 302531684, 329239296, 329541888)])
def test_parameter_counts(size, large, at_384, no_head, cifar10, cifar100, mae, mae_all):
    with torch.device("meta"):
        sizes = VIT_SIZES[size]
        assert parameters(ViT(224, 16, **sizes, num_classes=1000)) == large
        assert parameters(ViT(384, 16, **sizes, num_classes=1000)) == at_384
        assert parameters(ViT(224, 16, **sizes)) == no_head
        assert parameters(ViT(32, 4, **sizes, num_classes=10)) == cifar10
        assert parameters(ViT(32, 4, **sizes, num_classes=100)) == cifar100
        assert parameters(MAE(224, 16, **sizes), trained=True) == mae
        assert parameters(MAE(224, 16, **sizes)) == mae_all


# ---------------------------------------------------------------- patches and positions

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
    for i in range(4):  # frequencies 1, 1/10, 1/100, 1/1000
        assert grid[0, 3, i].item() == pytest.approx(math.sin(3 * 10.0 ** -i), abs=1e-6)
        assert grid[0, 3, 4 + i].item() == pytest.approx(math.cos(3 * 10.0 ** -i), abs=1e-6)

    with pytest.raises(ValueError, match="multiple of 4"):
        sincos_positions(18, 5)


def test_positions_are_interpolated_and_the_class_token_s_kept():
    positions = torch.randn(1, 17, 8)
    assert resize_positions(positions, 16) is positions

    ramp = torch.arange(4.0)[:, None, None].expand(4, 4, 8).reshape(1, 16, 8)
    larger = resize_positions(torch.cat([positions[:, :1], ramp], 1), 64)
    assert torch.equal(larger[:, 0], positions[:, 0])

    grid = larger[0, 1:].reshape(8, 8, 8)
    rows = grid[:, 0, 0]  # row r of 8 lies at (r + .5) / 2 - .5 of 4
    torch.testing.assert_close(grid, rows[:, None, None].expand(8, 8, 8))  # columns stay equal
    torch.testing.assert_close(rows, 3 - rows.flip(0))
    assert rows[3].item() == pytest.approx(1.296875)  # 0 to 3 by Keys' cubic kernel (a = -.75), a quarter on
    assert torch.allclose(rows, ((torch.arange(8) + 0.5) / 2 - 0.5).clamp(0, 3), atol=0.25)


# ---------------------------------------------------------------- masking

@pytest.mark.parametrize("length, ratio, kept", [(64, 0.75, 16), (196, 0.75, 49), (16, 0.9, 1),
                                                 (10, 0.33, 6)])
def test_masking_keeps_int_l_1_minus_r_patches_and_restore_is_the_inverse(length, ratio, kept):
    keep, restore, mask = random_masking(7, length, ratio, torch.Generator().manual_seed(0))
    assert keep.shape == (7, kept) and keep.dtype == restore.dtype == torch.int64
    order = restore.argsort(1)  # (kept, masked)
    assert torch.equal(order[:, :kept], keep)
    assert torch.equal(restore.sort(1).values, torch.arange(length).expand(7, -1))
    assert torch.equal(mask, torch.ones(7, length).scatter(1, keep, 0.0))


def test_every_patch_is_masked_equally_often_and_orders_are_independent():
    keep, _, mask = random_masking(4000, 16, 0.75, torch.Generator().manual_seed(1))
    assert (mask.mean(0) - 0.75).abs().max() < 5 * math.sqrt(0.75 * 0.25 / 4000)
    together = ((1 - mask).t() @ (1 - mask) / 4000)[~torch.eye(16, dtype=torch.bool)]
    assert (together - 4 / 16 * 3 / 15).abs().max() < 5 * math.sqrt(0.05 * 0.95 / 4000)  # pairs too
    first = torch.bincount(keep[:, 0], minlength=16) / 4000  # and the order of the kept ones is random
    assert (first - 1 / 16).abs().max() < 5 * math.sqrt(1 / 16 / 4000)

    again, _, _ = random_masking(4000, 16, 0.75, torch.Generator().manual_seed(1))
    assert torch.equal(again, keep)


@pytest.mark.parametrize("arguments", [(0, 16, 0.5), (2, 0, 0.5), (2, 16, 0.0), (2, 16, 1.0), (2, 16, -1.0),
                                       (2, 16, math.nan), (2, 4, 0.9)])
def test_masking_refuses_bad_input(arguments):
    with pytest.raises(ValueError):
        random_masking(*arguments)


# ---------------------------------------------------------------- nets

def test_drop_path_leaves_out_whole_images_keeps_the_mean_and_rests_in_eval_mode():
    torch.manual_seed(0)
    drop, branch = DropPath(0.3), torch.ones(5000, 2, 3)
    out = drop(branch)
    assert (out == out[:, :1, :1]).all()
    assert out.unique().tolist() == [0, pytest.approx(1 / 0.7)]
    assert out.mean().item() == pytest.approx(1, abs=5 * math.sqrt(0.3 / 0.7 / 5000))
    assert torch.equal(drop.eval()(branch), branch)

    rates = [block.drop_path.rate for block in ViT(16, 4, 16, 5, 2, drop_path=0.2).blocks]
    assert rates == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])


def test_a_vit_starts_at_logits_of_zero_and_glorot_uniform_elsewhere():
    torch.manual_seed(0)
    model = ViT(**SMALL, num_classes=5)
    logits, _ = model(torch.randn(4, 3, 16, 16))
    assert 0 < logits.abs().max() < 1e-3

    weight = model.blocks[0].mlp[0].weight  # [64, 16]
    bound = math.sqrt(6 / 80)
    assert 0.99 * bound < weight.abs().max() <= bound
    assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)
    assert not any(part.bias.any() for part in model.modules() if isinstance(part, torch.nn.Linear))


def test_targets_have_mean_zero_and_variance_one_or_are_pixels():
    torch.manual_seed(0)
    images = 3 + 2 * torch.randn(2, 3, 16, 16)
    keep, restore, _ = random_masking(2, 16, 0.5, torch.Generator().manual_seed(0))
    _, targets = MAE(**SMALL, **DECODER)(images, keep, restore)
    assert targets.mean(2).abs().max() < 1e-5 and (targets.var(2) - 1).abs().max() < 1e-5
    assert (MAE(**SMALL, **DECODER)(torch.zeros(2, 3, 16, 16), keep, restore)[1] == 0).all()  # not nan

    _, pixels = MAE(**SMALL, **DECODER, norm_pix=False)(images, keep, restore)
    for n in range(2):
        assert torch.equal(pixels[n], patchify(images, 4)[n, restore[n].argsort()[8:]])


def test_positions_are_fixed_in_pre_training_and_everything_else_learns():
    model = MAE(**SMALL, **DECODER)
    keep, restore, _ = random_masking(2, 16, 0.5, torch.Generator().manual_seed(0))
    F.mse_loss(*model(torch.randn(2, 3, 16, 16), keep, restore)).backward()
    fixed = {name for name, p in model.named_parameters() if p.grad is None}
    assert fixed == {"encoder.positions", "decoder_positions"}
    assert torch.equal(model.decoder_positions, sincos_positions(12, 4))
    assert ViT(**SMALL).positions.requires_grad


@pytest.mark.parametrize("changes, words", [
    (dict(image_size=18), "image size"), (dict(patch_size=5), "patch size"), (dict(heads=3), "heads"),
    (dict(width=18), "multiple of 4"), (dict(depth=0), "depth"), (dict(drop_path=1.0), "drop path"),
    (dict(patch_size=0), "at least|multiple")])
def test_sizes_that_do_not_fit_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        ViT(**{**SMALL, **changes})
    with pytest.raises(ValueError, match="heads"):
        MAE(**SMALL, decoder_width=20, decoder_heads=3)
