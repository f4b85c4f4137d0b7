"""livt.py: losses as the paper's theorems, decodings, schedule, nets, both stages, what it refuses."""
import functools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import livt
from common.evaluate import scores
from common.ranks import generator
from common.vit import MAE, VIT_SIZES, ViT
from tests import tiny
from tests.tiny import as_seen, log_rows, refused, same_weights, tiny_npz, weights

COUNTS = torch.tensor([500, 120, 30, 9])
SIZES = dict(image_size=8, patch_size=2, width=16, depth=2, heads=2)
PLAIN = ("--no-amp", "--augment", "plain", "--drop-path", "0")
run = functools.partial(tiny.run, "livt")


# ---------------------------------------------------------------- losses

def slow_balanced_ce(z, targets, counts, tau):
    """Theorem 1, a number at a time. targets: [N, C]."""
    pi, total = (counts.double() / counts.sum()).tolist(), 0.0
    for row, weights_of in zip(z.tolist(), targets.tolist()):
        for c, weight in enumerate(weights_of):
            total += weight * math.log(sum((p / pi[c]) ** tau * math.exp(value - row[c])
                                           for p, value in zip(pi, row)))
    return total / len(z)


def slow_balanced_bce(z, targets, counts, tau):
    """Theorem 2, a number at a time, summed over the classes. targets: [N, C]."""
    pi, total = (counts.double() / counts.sum()).tolist(), 0.0
    for row, weights_of in zip(z.tolist(), targets.tolist()):
        for value, p, weight in zip(row, pi, weights_of):
            odds = (p / (1 - p)) ** tau * math.exp(value)
            total -= weight * math.log(odds / (1 + odds)) + (1 - weight) * math.log(1 / (1 + odds))
    return total / len(z)


PAIRS = [(livt.balanced_ce_loss, slow_balanced_ce), (livt.balanced_bce_loss, slow_balanced_bce)]


@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0, 1.05])
@pytest.mark.parametrize("loss, slow", PAIRS)
def test_losses_are_the_theorems_of_ids_and_soft_targets_whatever_the_size_of_the_data_set(loss, slow, tau):
    generator = torch.Generator().manual_seed(0)
    z, ids = 3 * torch.randn(20, 4, generator=generator), torch.randint(4, (20,), generator=generator)
    one_hot = F.one_hot(ids, 4).float()
    soft = 0.7 * one_hot + 0.3 * one_hot.flip(0)
    for targets, table in ((ids, one_hot), (one_hot, one_hot), (soft, soft)):
        expected = slow(z, table, COUNTS, tau)
        assert loss(z, targets, COUNTS, tau).item() == pytest.approx(expected, rel=1e-5)
        assert loss(z, targets, 7 * COUNTS, tau).item() == pytest.approx(expected, rel=1e-5)
    assert loss(z, ids, COUNTS).item() == loss(z, ids, COUNTS, 1.0).item()


@pytest.mark.parametrize("name, C, expected", [("imagenet_lt", 1000, 7.4165), ("inat18", 8142, 9.0803)])
def test_the_loss_starts_at_the_prior_s_entropy_plus_about_one(name, C, expected):
    # class_count_histograms.json: [images, classes with that many] of the published training lists
    histogram = json.loads((Path(__file__).parent / "class_count_histograms.json").read_text())[name]
    counts = torch.tensor([images for images, classes in histogram for _ in range(classes)])
    pi = counts.double() / counts.sum()  # as targets: the loss is linear in them
    assert len(counts) == C
    loss = livt.balanced_bce_loss(torch.zeros(1, C), pi[None], counts)
    assert loss.item() == pytest.approx(expected, abs=5e-4)


def test_rare_and_dominant_classes_stay_finite_also_from_bf16():
    logits, counts = torch.zeros(1, 2, dtype=torch.bfloat16), torch.tensor([437512, 1])
    loss = livt.balanced_bce_loss(logits, torch.tensor([1]), counts)
    # b = +-log 437512: the loss is 2 log(1 + 437512); a float32 prior would give 2.0016 log(...)
    assert loss.item() == pytest.approx(2 * math.log(437513), rel=1e-6) and loss.dtype == torch.float32


def test_losses_and_decoding_refuse_bad_input():
    z, ids = torch.zeros, lambda n: torch.zeros(n).long()
    good = (z(2, 4), ids(2), COUNTS)
    for loss, _ in PAIRS:
        loss(*good)
        for bad in ((z(4), ids(4), COUNTS), (z(2, 4), ids(3), COUNTS), (z(2, 4), z(2, 3), COUNTS),
                    (*good, -0.1), (*good[:2], [5, 0, 3, 1]), (*good[:2], [0, 0, 0, 9]), (*good[:2], [5, 3])):
            with pytest.raises(ValueError):
                loss(*bad[:2], torch.as_tensor(bad[2]), *bad[3:])
    for call in (lambda: livt.balanced_bce_loss(z(2, 1), ids(2), torch.tensor([7])),
                 lambda: livt.bayes_decode(z(2, 1), torch.tensor([7]))):
        with pytest.raises(ValueError, match="two classes"):
            call()


# ---------------------------------------------------------------- decodings, on Gaussians

@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0, 1.05])
def test_at_a_loss_s_optimum_its_second_decoding_is_the_bayes_classifier_and_the_paper_s_is_not(tau):
    angles = torch.arange(5).double() * 2 * math.pi / 5
    means = 1.6 * torch.stack([angles.cos(), angles.sin()], 1)
    x = 6 * torch.rand(4000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 3
    density = -0.5 * (x[:, None] - means).pow(2).sum(2)  # log p(x | c) of unit Gaussians, but for a constant
    counts = torch.tensor([5000, 1581, 500, 158, 50])
    pi = counts.double() / counts.sum()
    posterior = (density + pi.log()).softmax(1)  # p(c | x) under the training prior

    optima = {"ce": posterior.log(), "balanced-ce": posterior.log() - tau * pi.log(),
              "bce": posterior.logit(), "balanced-bce": posterior.logit() - tau * pi.logit()}
    assert set(optima) == set(livt.LOSSES)
    for name, z in optima.items():
        found = livt.second_decoding(name, z, counts, tau)
        assert (found.argmax(1) == density.argmax(1)).all(), name
        difference = found - density  # the score itself is log p(x | c), but for a constant of x
        assert (difference - difference[:, :1]).abs().max() < 1e-6
        if name.endswith("bce"):
            assert (z.argmax(1) != density.argmax(1)).double().mean() > 0.05
    assert torch.equal(livt.bayes_decode(z, counts, tau), found)


# ---------------------------------------------------------------- schedule, layer-wise decay, nets

def test_the_schedule_warms_up_linearly_and_ends_at_the_smallest_lr():
    at = lambda epoch: livt.warmup_cosine_lr(epoch, 100, 5, 2.0, 1e-6)
    assert at(0) == 0 and at(2.5) == 1 and at(5) == 2 and at(100) == pytest.approx(1e-6)
    assert at(52.5) == pytest.approx(1 + 5e-7)
    assert at(5 + 95 / 3) == pytest.approx(1.5, abs=1e-5)
    assert livt.warmup_cosine_lr(0, 10, 0, 2.0) == 2.0
    assert livt.warmup_cosine_lr(1.5, 2, 3, 2.0) == 1.0  # shorter than its warm-up


def test_layer_wise_decay_of_a_vit_b_goes_from_0238_to_1():
    with torch.device("meta"):
        model = ViT(**VIT_SIZES["base"], num_classes=10)
    scale = {name: livt.layer_lr_scale(name, 12, 0.75) for name, _ in model.named_parameters()}
    for name in ("class_token", "positions", "patch_embed.weight", "patch_embed.bias"):
        assert scale[name] == pytest.approx(0.75 ** 13) and round(scale[name], 4) == 0.0238
    assert scale["blocks.0.qkv.weight"] == pytest.approx(0.75 ** 12)
    assert scale["blocks.11.mlp.2.bias"] == pytest.approx(0.75)
    assert scale["norm.weight"] == scale["head.weight"] == scale["head.bias"] == 1


@pytest.mark.parametrize("model", [ViT(**SIZES, num_classes=3), MAE(**SIZES, decoder_width=8, decoder_depth=1,
                                                                   decoder_heads=2)])
def test_groups_hold_every_trained_parameter_once_and_decay_matrices_alone(model):
    groups = livt.parameter_groups(model, 0.05, lambda name: 0.5)
    members = {id(p): group for group in groups for p in group["params"]}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert members.keys() == {id(p) for p in trained.values()}
    assert sum(len(group["params"]) for group in groups) == len(trained)
    for name, p in trained.items():
        matrix = name.endswith("weight") and "norm" not in name
        assert members[id(p)]["weight_decay"] == (0.05 if matrix else 0), name


def test_fine_tuning_starts_from_the_encoder_but_for_norm_and_classifier():
    torch.manual_seed(0)
    encoder = MAE(**SIZES, decoder_width=8, decoder_depth=1, decoder_heads=2).encoder
    torch.nn.init.normal_(encoder.norm.weight)
    state = encoder.state_dict()
    model = livt.pretrained_vit(SIZES, 5, 0.1, state)
    for name, value in model.state_dict().items():
        if not name.startswith(("norm", "head")):
            assert torch.equal(value, state[name]), name
    assert (model.norm.weight == 1).all() and model.positions.requires_grad

    larger = livt.pretrained_vit({**SIZES, "image_size": 12}, 5, 0.1, state)
    assert larger(torch.randn(1, 3, 12, 12))[0].shape == (1, 5)
    assert larger.positions.shape == (1, 37, 16)
    assert torch.equal(larger.positions[:, 0], model.positions[:, 0])


def test_recipes_are_the_paper_s_where_it_says_so_and_flags_win(tmp_path):
    settings = lambda *flags: livt.parse_args(list(flags))
    large = settings("--dataset", "imagenet_lt")
    assert (large.arch, large.image_size, large.patch_size, large.mask_ratio) == ("base", 224, 16, 0.75)
    assert (large.mgp_epochs, large.mgp_warmup_epochs, large.mgp_batch_size, large.mgp_lr) == (
        800, 40, 4096, 1.5e-4)
    assert (large.epochs, large.batch_size, large.lr, large.tau) == (100, 1024, 2.5e-4, 1.0)  # peak 1e-3
    assert (large.decoder_width, large.decoder_depth, large.decoder_heads) == (512, 8, 16)
    assert (large.mixup, large.cutmix, large.drop_path, large.weight_decay) == (0.8, 1.0, 0.1, 0.05)
    inat, places = (settings("--dataset", name) for name in ("inat18", "places_lt"))
    assert (inat.drop_path, inat.lr, places.epochs, places.tau) == (0.2, 1e-3, 30, 1.05)
    assert settings("--dataset", "places_lt", "--tau", "1").tau == 1
    assert settings("--dataset", "cifar100_lt").patch_size == 4

    small = settings("--dataset", tiny_npz(tmp_path / "own.npz"))
    sizes = livt.net_sizes(small)
    assert (small.recipe, sizes["image_size"] // sizes["patch_size"]) == ("small", 4)


# ---------------------------------------------------------------- stages

FILES = {"balanced-ce": "model_balanced-ce.pt", "ce": "model_ce.pt", "bce": "model_bce.pt",
         "balanced-bce": "model.pt"}  # the method last


def test_each_loss_minimises_its_own_and_is_scored_by_both_decodings(still):
    result = run(still, *PLAIN, "--lr", "0", "--label-smoothing", "0.1", "--tau", "1.05", "--save-logits",
                 "--loss", "balanced-bce", "bce", "ce", "balanced-ce", "--mgp-epochs", "1")
    rows = {f"{loss}{kind}": FILES[loss] for loss in FILES for kind in (", Bayes decoding", "")}
    assert [stage["name"] for stage in result["stages"]] == ["mgp", *rows]
    assert result["stages"][0]["all"] is None and result["stages"][0]["loss"] > 0
    stages = {stage["name"]: stage for stage in result["stages"]}
    images, ids = as_seen(still / "images.npz")
    counts, soft = ids.bincount(), 0.9 * F.one_hot(ids, 5) + 0.1 / 5
    for loss, file in FILES.items():
        model, saved = livt.load_model(still / "run" / file)
        assert (saved["loss"], saved["tau"], saved["augmentation"]) == (loss, 1.05, "standard")

        # the two epochs' losses, of nets that lr 0 keeps as they are
        slow = slow_balanced_bce if loss.endswith("bce") else slow_balanced_ce
        tau = 1.05 if loss.startswith("balanced") else 0.0
        for row in [row for row in log_rows(still / "run") if row["stage"] == loss]:
            draws = generator(0, loss, "sampling", row["epoch"] - 1)
            parts = torch.randperm(len(ids), generator=draws).split(16)
            parts = [*parts[:-2], torch.cat(parts[-2:])]  # the one image left over joins
            with torch.no_grad():
                losses = [slow(model(images[part])[0], soft[part], counts, tau) for part in parts]
            assert row["loss"] == pytest.approx(np.mean(losses), rel=1e-4)

        paper, bayes = (np.load(still / "run" / f"{loss}{kind}.npz") for kind in ("", "_Bayes_decoding"))
        assert np.allclose(bayes["logits"], livt.second_decoding(
            loss, torch.tensor(paper["logits"]), counts, 1.05), atol=1e-5)
        for name, row in ((loss, paper), (f"{loss}, Bayes decoding", bayes)):
            own = scores(torch.tensor(row["logits"]), torch.tensor(row["targets"]), counts)
            assert stages[name]["per_class_accuracy"] == own["per_class_accuracy"]
            assert stages[name]["confusion"] == row["confusion"].tolist()


def test_pre_training_sees_no_label(whole, tmp_path):
    folder, _ = whole("livt")
    arrays = dict(np.load(folder.parent / "images.npz"))
    arrays["y_train"] = np.random.default_rng(1).permutation(arrays["y_train"])
    np.savez(tmp_path / "images.npz", **arrays)
    run(tmp_path, "--stage", "mgp")
    assert same_weights(tmp_path / "run" / "mgp.pt", folder / "mgp.pt")


@pytest.mark.parametrize("name, flags, peak, decay", [
    ("mgp", ["--mgp-lr", "0.004", "--mgp-batch-size", "32"], 0.004 * 32 / 256, None),
    ("tuned", [], 0.01 * 16 / 256, 0.75), ("other", ["--layer-decay", "0.5"], 0.01 * 16 / 256, 0.5),
    ("scratch", ["--from-scratch"], 0.01 * 16 / 256, None)])
def test_lr_is_given_for_256_images_and_decays_from_layer_to_layer_but_from_scratch(
        name, flags, peak, decay, whole, tmp_path):
    if decay:
        flags = [*flags, "--mgp-checkpoint", str(whole("livt")[0] / "mgp.pt")]
    with pytest.raises(SystemExit):  # behind the first step
        run(tmp_path, "--lr", "0.01", "--time-limit", "0", "--warmup-epochs", "0", "--mgp-warmup-epochs", "0",
            *flags)
    state = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    found = {group["lr"] for group in state["optimizer"]["param_groups"]}
    layers = range(4) if decay else [0]  # embedding, two blocks, classifier
    assert sorted(found) == pytest.approx(sorted(peak * (decay or 1) ** layer for layer in layers), rel=1e-9)


def test_from_scratch_has_no_stage_one(tmp_path):
    result = run(tmp_path, "--from-scratch", "--loss", "ce", "--epochs", "1")
    assert [stage["name"] for stage in result["stages"]] == ["ce, from scratch, Bayes decoding",
                                                             "ce, from scratch"]
    saved = torch.load(tmp_path / "run" / "model.pt", weights_only=True)
    assert (saved["augmentation"], saved["loss"]) == ("strong", "ce")
    assert not (tmp_path / "run" / "mgp.pt").exists()


def test_a_larger_image_size_interpolates_the_checkpoint_s_positions(whole, tmp_path, capsys):
    result = run(tmp_path, "--mgp-checkpoint", str(whole("livt")[0] / "mgp.pt"), "--image-size", "12",
                 "--loss", "ce", "--epochs", "1")
    assert weights(tmp_path / "run" / "model.pt")["positions"].shape[1] == 10
    capsys.readouterr()
    again = run(tmp_path, "--evaluate", str(tmp_path / "run" / "model.pt"))
    assert again["all"] == result["all"]  # at the size of the net, not of the flag
    assert "Bayes" in capsys.readouterr().out  # the second decoding is shown, too


def test_class_counts_follow_the_names_of_the_classes(whole, tmp_path):
    saved = torch.load(whole("livt")[0] / "model.pt", weights_only=True)
    torch.save({**saved, "class_names": list("abc")}, tmp_path / "model.pt")
    moved = livt.load_model(tmp_path / "model.pt", list("cab"))[1]["class_counts"]
    assert moved == [saved["class_counts"][i] for i in (2, 0, 1)]  # of the Bayes decoding


def test_training_learns_colours_of_the_first_images_of_each_class(tmp_path):
    tiny_npz(tmp_path / "images.npz", (40, 12, 25, 5))
    result = run(tmp_path, "--images-per-class", "5", "--epochs", "30", "--lr", "0.1", "--patch-size", "2",
                 "--augment", "plain", "--loss", "balanced-bce", "--evaluate-every", "99")
    assert result["class_counts"] == [5] * 4 and result["all"] > 80


# ---------------------------------------------------------------- what is refused

@pytest.mark.parametrize("flags, words", [
    (["--patch-size", "3"], "multiple of the patch size"), (["--heads", "3"], "number of heads"),
    (["--mask-ratio", "1"], "mask ratio"), (["--mask-ratio", "0"], "mask ratio"),
    (["--mask-ratio", "0.9"], "keeps 0 of 4"), (["--drop-path", "1"], "drop path"),
    (["--decoder-heads", "3"], "number of heads"), (["--width", "18"], "multiple of 4"),
    (["--mgp-batch-size", "30", "--batch-size", "16", "--grad-accumulation", "4"], "multiple"),
    (["--stage", "bft"], "--mgp-checkpoint FILE"), (["--from-scratch", "--stage", "mgp"], "--from-scratch"),
    (["--from-scratch", "--mgp-checkpoint", "x.pt"], "--from-scratch"),
    (["--stage", "mgp", "--mgp-checkpoint", "x.pt"], "--stage mgp"), (["--mgp-checkpoint", ""], "empty"),
    (["--loss", "bce", "bce"], "twice"), (["--images-per-class", "12"], "class 1 has 11")])
def test_flags_that_cannot_work_are_refused(flags, words, tmp_path, capsys):
    assert words in refused(capsys, "livt", tmp_path, *flags)


@pytest.mark.parametrize("flags, words", [
    (["--width", "24"], "[1, 1, 16], not [1, 1, 24]"), (["--depth", "3"], "blocks.2.norm1.weight is missing"),
    (["--patch-size", "2"], "patch_embed.weight is [16, 48]"), (["--evaluate"], "goes to --mgp-checkpoint")])
def test_a_checkpoint_of_another_net_or_stage_is_refused_and_the_difference_named(
        flags, words, whole, tmp_path, capsys):
    mgp = str(whole("livt")[0] / "mgp.pt")
    flags = [*flags, mgp] if flags == ["--evaluate"] else [*flags, "--mgp-checkpoint", mgp]
    assert words in refused(capsys, "livt", tmp_path, *flags)
