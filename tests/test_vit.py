"""The room common/vit.py: parameter counts, patches, positions, masking, blocks, ViT, MAE."""
import math

import pytest
import torch
import torch.nn.functional as F

from common.vit import (MAE, VIT_SIZES, Block, DropPath, ViT, attention, patchify, random_masking,
                        resize_positions, sincos_positions, unpatchify)

SMALL = dict(image_size=16, patch_size=4, width=16, depth=2, heads=2)


def parameters(model, trained=False):
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trained)


# ---------------------------------------------------------------- counts

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


def test_any_width_depth_and_number_of_heads():
    width, depth, patch, C, tokens = 24, 3, 2, 7, 17
    model = ViT(8, patch, width, depth, heads=6, num_classes=C)
    assert parameters(model) == 3 * patch ** 2 * width + width + width + tokens * width + \
        depth * (12 * width ** 2 + 13 * width) + 2 * width + width * C + C
    logits, features = model(torch.randn(5, 3, 8, 8))
    assert logits.shape == (5, C) and features.shape == (5, width)


# ---------------------------------------------------------------- patches and positions

def test_patches_are_rows_columns_channels_and_unpatchify_is_the_inverse():
    images = torch.randn(2, 3, 8, 8)
    patches = patchify(images, 4)
    assert patches.shape == (2, 4, 48)
    for number, (row, column) in enumerate([(0, 0), (0, 4), (4, 0), (4, 4)]):
        values = [images[1, c, row + i, column + j] for i in range(4) for j in range(4) for c in range(3)]
        assert torch.equal(patches[1, number], torch.stack(values))
    assert torch.equal(unpatchify(patches, 4), images)
    assert torch.equal(patchify(images.contiguous(memory_format=torch.channels_last), 4), patches)


def test_the_patch_embedding_is_a_convolution_of_its_own_stride():
    model, images = ViT(**SMALL), torch.randn(2, 3, 16, 16)
    kernel = model.patch_embed.weight.reshape(16, 4, 4, 3).permute(0, 3, 1, 2)
    expected = F.conv2d(images, kernel, model.patch_embed.bias, stride=4).flatten(2).transpose(1, 2)
    assert torch.allclose(model.patch_embed(patchify(images, 4)), expected, atol=1e-5)


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
    assert torch.allclose(grid, grid[:, :1].expand(8, 8, 8), atol=1e-5)  # columns stay equal
    rows = grid[:, 0, 0]  # row r of 8 lies at (r + .5) / 2 - .5 of 4
    assert (rows.diff() > 0).all() and torch.allclose(rows + rows.flip(0), torch.full((8,), 3.0), atol=1e-5)
    assert torch.allclose(rows, ((torch.arange(8) + 0.5) / 2 - 0.5).clamp(0, 3), atol=0.25)


# ---------------------------------------------------------------- masking

@pytest.mark.parametrize("length, ratio, kept", [(64, 0.75, 16), (196, 0.75, 49), (16, 0.9, 1),
                                                 (10, 0.33, 6)])
def test_masking_keeps_int_l_1_minus_r_patches_and_restore_is_the_inverse(length, ratio, kept):
    keep, restore, mask = random_masking(7, length, ratio, torch.Generator().manual_seed(0))
    assert keep.shape == (7, kept) and kept == int(length * (1 - ratio))
    assert keep.dtype == restore.dtype == torch.int64
    assert (mask.sum(1) == length - kept).all() and set(mask.unique().tolist()) == {0, 1}
    for image in range(7):
        assert sorted(restore[image].tolist()) == list(range(length))
        order = restore[image].argsort()  # (kept, masked)
        assert torch.equal(order[:kept], keep[image])
        assert (mask[image, order[:kept]] == 0).all() and (mask[image, order[kept:]] == 1).all()
        values = torch.randn(length)
        assert torch.equal(values[order][restore[image]], values)


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


# ---------------------------------------------------------------- transformer

def test_attention_written_out_is_torch_s():
    q, k, v = torch.randn(3, 2, 4, 9, 8)
    assert torch.allclose(attention(q, k, v), F.scaled_dot_product_attention(q, k, v), atol=1e-6)


def test_a_block_is_torch_s_pre_norm_encoder_layer():
    torch.manual_seed(0)
    block = Block(16, 4).eval()
    theirs = torch.nn.TransformerEncoderLayer(16, 4, 64, dropout=0, activation="gelu", norm_first=True,
                                              layer_norm_eps=1e-6, batch_first=True).eval()
    theirs.load_state_dict({
        "self_attn.in_proj_weight": block.qkv.weight, "self_attn.in_proj_bias": block.qkv.bias,
        "self_attn.out_proj.weight": block.project.weight, "self_attn.out_proj.bias": block.project.bias,
        "linear1.weight": block.mlp[0].weight, "linear1.bias": block.mlp[0].bias,
        "linear2.weight": block.mlp[2].weight, "linear2.bias": block.mlp[2].bias,
        "norm1.weight": block.norm1.weight, "norm1.bias": block.norm1.bias,
        "norm2.weight": block.norm2.weight, "norm2.bias": block.norm2.bias})
    tokens = torch.randn(3, 7, 16)
    assert torch.allclose(block(tokens), theirs(tokens), atol=1e-5)


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


def test_a_vit_classifies_by_the_normed_mean_of_its_patch_tokens_from_logits_of_zero():
    torch.manual_seed(0)
    model, images = ViT(**SMALL, num_classes=5).eval(), torch.randn(4, 3, 16, 16)
    logits, features = model(images)
    assert logits.abs().max() < 1e-3 and (model.head.bias == 0).all()
    tokens = torch.cat([model.class_token.expand(4, 1, 16),
                        model.patch_embed(patchify(images, 4))], 1) + model.positions
    for block in model.blocks:
        tokens = block(tokens)
    assert torch.allclose(features, F.layer_norm(tokens[:, 1:].mean(1), (16,), eps=1e-6), atol=1e-5)
    assert torch.allclose(logits, model.head(features)) and model.positions.requires_grad


# ---------------------------------------------------------------- masked autoencoder

def some_mae(**changes):
    torch.manual_seed(0)
    model = MAE(**SMALL, decoder_width=12, decoder_depth=2, decoder_heads=3, **changes)
    for block in (*model.encoder.blocks, *model.decoder):  # biases and norms that show
        torch.nn.init.normal_(block.mlp[2].bias)
    return model.eval()


def test_an_mae_predicts_what_one_does_that_puts_tokens_back_in_place():
    model, images = some_mae(), torch.randn(3, 3, 16, 16)
    keep, restore, mask = random_masking(3, 16, 0.75, torch.Generator().manual_seed(0))
    predictions, targets = model(images, keep, restore)
    encoder, patches = model.encoder, patchify(images, 4)
    for n in range(3):
        embedded = encoder.patch_embed(patches[n]) + encoder.positions[0, 1:]  # all, and then the kept ones
        tokens = torch.cat([encoder.class_token[0] + encoder.positions[0, :1], embedded[keep[n]]])[None]
        for block in encoder.blocks:
            tokens = block(tokens)
        seen = model.decoder_embed(encoder.norm(tokens))[0]
        canvas = model.mask_token[0].expand(16, -1).clone()
        canvas[keep[n]] = seen[1:]
        tokens = (torch.cat([seen[:1], canvas]) + model.decoder_positions[0])[None]
        for block in model.decoder:
            tokens = block(tokens)
        everywhere = model.predict(model.decoder_norm(tokens))[0, 1:]
        masked = restore[n].argsort()[4:]
        assert (mask[n, masked] == 1).all()
        assert torch.allclose(predictions[n], everywhere[masked], atol=1e-4)
        expected = torch.stack([(p - p.mean()) / (p.var() + 1e-6).sqrt() for p in patches[n, masked]])
        assert torch.allclose(targets[n], expected, atol=1e-5)
        # the paper's loss: over all patches, weighted by the mask
        full = torch.stack([(p - p.mean()) / (p.var() + 1e-6).sqrt() for p in patches[n]])
        loss = (((everywhere - full) ** 2).mean(1) * mask[n]).sum() / mask[n].sum()
        assert F.mse_loss(predictions[n], targets[n]).item() == pytest.approx(loss.item(), rel=1e-4)


def test_what_is_masked_reaches_neither_the_encoder_nor_a_prediction():
    model, images = some_mae(), torch.randn(2, 3, 16, 16)
    keep, restore, mask = random_masking(2, 16, 0.5, torch.Generator().manual_seed(0))
    other = unpatchify(torch.where(mask[..., None] == 1, torch.randn(2, 16, 48), patchify(images, 4)), 4)
    assert torch.equal(model.encoder.tokens(patchify(images, 4), keep),
                       model.encoder.tokens(patchify(other, 4), keep))
    (a, targets_a), (b, targets_b) = model(images, keep, restore), model(other, keep, restore)
    assert torch.equal(a, b) and not torch.allclose(targets_a, targets_b)


def test_targets_have_mean_zero_and_variance_one_or_are_pixels():
    images = 3 + 2 * torch.randn(2, 3, 16, 16)
    keep, restore, mask = random_masking(2, 16, 0.5, torch.Generator().manual_seed(0))
    _, targets = some_mae()(images, keep, restore)
    assert targets.mean(2).abs().max() < 1e-5 and (targets.var(2) - 1).abs().max() < 1e-5
    assert (some_mae()(torch.zeros(2, 3, 16, 16), keep, restore)[1] == 0).all()  # not nan
    _, pixels = some_mae(norm_pix=False)(images, keep, restore)
    for n in range(2):
        assert torch.equal(pixels[n], patchify(images, 4)[n, restore[n].argsort()[8:]])


def test_positions_are_fixed_in_pre_training_and_everything_else_learns():
    model = some_mae()
    keep, restore, _ = random_masking(2, 16, 0.5, torch.Generator().manual_seed(0))
    F.mse_loss(*model(torch.randn(2, 3, 16, 16), keep, restore)).backward()
    fixed = {name for name, p in model.named_parameters() if p.grad is None}
    assert fixed == {"encoder.positions", "decoder_positions"}
    assert torch.equal(model.decoder_positions, sincos_positions(12, 4))


@pytest.mark.parametrize("changes, words", [
    (dict(image_size=18), "image size"), (dict(patch_size=5), "patch size"), (dict(heads=3), "heads"),
    (dict(width=18), "multiple of 4"), (dict(depth=0), "depth"), (dict(drop_path=1.0), "drop path"),
    (dict(patch_size=0), "at least|multiple")])
def test_sizes_that_do_not_fit_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        ViT(**{**SMALL, **changes})


def test_a_decoder_of_an_odd_width_is_refused():
    with pytest.raises(ValueError, match="heads"):
        MAE(**SMALL, decoder_width=20, decoder_heads=3)
