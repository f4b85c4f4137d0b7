"""livt.py: losses as the paper's theorems, decodings, schedule, nets, both stages, what it refuses."""
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
from common.vit import MAE, ViT, resize_positions
from tests.tiny import as_seen, log_rows, refused, run, same_weights, tiny_npz, weights

COUNTS = torch.tensor([500, 120, 30, 9])
SIZES = dict(image_size=8, patch_size=2, width=16, depth=2, heads=2)
DECODER = dict(decoder_width=8, decoder_depth=1, decoder_heads=2)


def slow_loss(name, z, targets, counts, tau):
    """Theorem 1, or 2 summed over the classes, in its probabilities. targets: [N, C]."""
    z, targets, pi = z.double(), targets.double(), counts.double() / counts.sum()
    if name.endswith("bce"):
        odds = (pi / (1 - pi)) ** tau * z.exp()
        losses = -targets * (odds / (1 + odds)).log() - (1 - targets) * (1 / (1 + odds)).log()
    else:
        ratios = (pi / pi[:, None]) ** tau * (z[:, None] - z[:, :, None]).exp()  # [N, own class, other]
        losses = targets * ratios.sum(2).log()
    return losses.sum(1).mean().item()


@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0, 1.05])
@pytest.mark.parametrize("name, loss", [("ce", livt.balanced_ce_loss), ("bce", livt.balanced_bce_loss)])
def test_losses_are_the_theorems_of_ids_and_soft_targets_whatever_the_size_of_the_data_set(name, loss, tau):
    generator = torch.Generator().manual_seed(0)
    z, ids = 3 * torch.randn(20, 4, generator=generator), torch.randint(4, (20,), generator=generator)
    one_hot = F.one_hot(ids, 4).float()
    soft = 0.7 * one_hot + 0.3 * one_hot.flip(0)
    for targets, table in ((ids, one_hot), (one_hot, one_hot), (soft, soft)):
        expected = pytest.approx(slow_loss(name, z, table, COUNTS, tau), rel=1e-5)
        assert loss(z, targets, COUNTS, tau).item() == expected == loss(z, targets, 7 * COUNTS, tau).item()
    assert loss(z, ids, COUNTS) == loss(z, ids, COUNTS, 1.0)


def test_balanced_bce_starts_at_the_prior_s_entropy_plus_about_one_and_is_exact_for_rare_classes_in_bf16():
    # class_count_histograms.json: [images, classes with that many] of the published training lists
    histograms = json.loads((Path(__file__).parent / "class_count_histograms.json").read_text())
    for name, C, expected in (("imagenet_lt", 1000, 7.4165), ("inat18", 8142, 9.0803)):
        counts = torch.tensor([images for images, classes in histograms[name] for _ in range(classes)])
        pi = counts.double() / counts.sum()  # as targets: the loss is linear in them
        loss = livt.balanced_bce_loss(torch.zeros(1, C), pi[None], counts)  # of C classes, or refused
        assert loss.item() == pytest.approx(expected, abs=5e-4)

    z = torch.zeros(1, 2, dtype=torch.bfloat16)
    loss = livt.balanced_bce_loss(z, torch.tensor([1]), torch.tensor([437512, 1]))
    # b = +-log 437512: the loss is 2 log(1 + 437512); a float32 prior would give 2.0016 log(...)
    assert loss.item() == pytest.approx(2 * math.log(437513), rel=1e-6) and loss.dtype == torch.float32


def test_losses_and_decoding_refuse_bad_input():
    z, ids, one = torch.zeros(2, 4), torch.zeros(2).long(), torch.zeros(2, 1)
    for loss in (livt.balanced_ce_loss, livt.balanced_bce_loss):
        for bad in ((z[0], z[0].long(), COUNTS), (z, z[0, :3].long(), COUNTS), (z, z[:, :3], COUNTS),
                    (z, ids, COUNTS, -0.1), (z, ids, [5, 0, 3, 1]), (z, ids, [0, 0, 0, 9]), (z, ids, [5, 3])):
            with pytest.raises(ValueError):
                loss(*bad)
    for function, arguments in ((livt.balanced_bce_loss, (one, ids, [7])), (livt.bayes_decode, (one, [7]))):
        with pytest.raises(ValueError, match="two classes"):
            function(*arguments)


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


def test_lr_warms_up_linearly_falls_to_its_smallest_and_by_layer_and_groups_hold_every_parameter_once():
    at = lambda epoch: livt.warmup_cosine_lr(epoch, 100, 5, 2.0, 1e-6)
    assert (at(0), at(2.5), at(5)) == (0, 1, 2) and at(100) == pytest.approx(1e-6)
    assert at(52.5) == pytest.approx(1 + 5e-7) and at(5 + 95 / 3) == pytest.approx(1.5, abs=1e-5)
    assert livt.warmup_cosine_lr(0, 10, 0, 2.0) == 2.0
    assert livt.warmup_cosine_lr(1.5, 2, 3, 2.0) == 1.0  # shorter than its warm-up

    above = {"class_token": 3, "positions": 3, "patch_embed": 3, "blocks.0": 2, "blocks.1": 1}  # else 0
    for model, layer_decay in ((MAE(**SIZES, **DECODER), 1), (ViT(**SIZES, num_classes=3), 0.75)):
        groups = livt.parameter_groups(model, 0.05, lambda name: livt.layer_lr_scale(name, 2, layer_decay))
        group_of = {id(p): group for group in groups for p in group["params"]}
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        assert group_of.keys() == {id(p) for p in trained.values()}
        assert sum(len(group["params"]) for group in groups) == len(trained)
        for name, p in trained.items():
            layers = sum(above[start] for start in above if name.startswith(start))
            is_matrix = name.endswith("weight") and "norm" not in name
            assert group_of[id(p)]["weight_decay"] == (0.05 if is_matrix else 0), name
            assert group_of[id(p)]["scale"] == pytest.approx(layer_decay ** layers), name
    assert round(livt.layer_lr_scale("patch_embed.weight", 12, 0.75), 4) == 0.0238  # of a ViT-B


def test_recipes_are_the_paper_s_where_it_says_so_and_flags_win(tmp_path):
    large = dict(arch="base", image_size=224, patch_size=16, mask_ratio=0.75, mgp_epochs=800, mgp_lr=1.5e-4,
                 mgp_warmup_epochs=40, mgp_batch_size=4096, epochs=100, batch_size=1024, lr=2.5e-4,
                 decoder_width=512, decoder_depth=8, decoder_heads=16, mixup=0.8, cutmix=1.0, drop_path=0.1,
                 weight_decay=0.05, tau=1.0)
    for flags, values in (
            (["imagenet_lt"], large), (["inat18"], dict(drop_path=0.2, lr=1e-3)),
            (["places_lt"], dict(epochs=30, tau=1.05)), (["places_lt", "--tau", "1"], dict(tau=1)),
            (["cifar100_lt"], dict(patch_size=4)), ([tiny_npz(tmp_path / "own.npz")], dict(recipe="small"))):
        args = livt.parse_args(["--dataset", *flags])
        assert vars(args).items() >= values.items(), flags
    sizes = livt.net_sizes(args)
    assert sizes["image_size"] // sizes["patch_size"] == 4


def test_each_loss_minimises_its_own_and_is_scored_by_both_decodings(still):
    flags = ("--no-amp --augment plain --drop-path 0 --lr 0 --label-smoothing 0.1 --tau 1.05 --save-logits "
             "--mgp-epochs 1 --loss balanced-bce bce ce balanced-ce")
    mgp, *rows = run("livt", still, *flags.split())["stages"]
    assert (mgp["name"], mgp["all"]) == ("mgp", None) and mgp["loss"] > 0
    files = {"balanced-ce": "model_balanced-ce.pt", "ce": "model_ce.pt", "bce": "model_bce.pt",
             "balanced-bce": "model.pt"}  # the method last
    kinds = ", Bayes decoding", ""
    assert [row["name"] for row in rows] == [f"{loss}{kind}" for loss in files for kind in kinds]
    images, ids = as_seen(still / "images.npz")
    counts, soft = ids.bincount(), 0.9 * F.one_hot(ids, 5) + 0.1 / 5
    for (loss, file), *own in zip(files.items(), rows[::2], rows[1::2]):
        model, saved = livt.load_model(still / "run" / file)
        assert (saved["loss"], saved["tau"], saved["augmentation"]) == (loss, 1.05, "standard")
        # the two epochs' losses, of nets that lr 0 keeps as they are
        tau = 1.05 if loss.startswith("balanced") else 0.0
        for line in (line for line in log_rows(still / "run") if line["stage"] == loss):
            draws = generator(0, loss, "sampling", line["epoch"] - 1)
            *parts, last, left = torch.randperm(len(ids), generator=draws).split(16)
            losses = [slow_loss(loss, model(images[part])[0].detach(), soft[part], counts, tau)
                      for part in (*parts, torch.cat([last, left]))]  # the one image left over joins
            assert line["loss"] == pytest.approx(np.mean(losses), rel=1e-4)

        bayes, paper = (np.load(still / "run" / f"{loss}{kind}.npz") for kind in ("_Bayes_decoding", ""))
        decoded = livt.second_decoding(loss, torch.tensor(paper["logits"]), counts, 1.05)
        assert np.allclose(bayes["logits"], decoded, atol=1e-5)
        for row, kept in zip(own, (bayes, paper)):
            found = scores(torch.tensor(kept["logits"]), torch.tensor(kept["targets"]), counts)
            assert row["per_class_accuracy"] == found["per_class_accuracy"]
            assert row["confusion"] == kept["confusion"].tolist()


def test_pre_training_sees_no_label(whole, tmp_path):
    folder, _ = whole("livt")
    arrays = dict(np.load(folder.parent / "images.npz"))
    arrays["y_train"] = np.random.default_rng(1).permutation(arrays["y_train"])
    np.savez(tmp_path / "images.npz", **arrays)
    run("livt", tmp_path, "--stage", "mgp")
    assert same_weights(tmp_path / "run" / "mgp.pt", folder / "mgp.pt")


@pytest.mark.parametrize("flags, stage, peak, decay", [
    ("--mgp-lr 0.004 --mgp-batch-size 32", "mgp", 0.004 * 32 / 256, None),
    ("--mgp-checkpoint {mgp}", "bce", 0.01 * 16 / 256, 0.75),
    ("--mgp-checkpoint {mgp} --layer-decay 0.5", "bce", 0.01 * 16 / 256, 0.5),
    ("--from-scratch --loss ce", "ce, from scratch", 0.01 * 16 / 256, None)])
def test_the_first_stage_s_lr_is_given_for_256_images_and_decays_from_layer_to_layer_but_from_scratch(
        flags, stage, peak, decay, whole, tmp_path):
    flags = f"--lr 0.01 --time-limit 0 --warmup-epochs 0 --mgp-warmup-epochs 0 {flags}"
    with pytest.raises(SystemExit):  # behind the first step
        run("livt", tmp_path, *flags.format(mgp=whole("livt")[0] / "mgp.pt").split())
    state = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    assert state["stage"] == stage and not state["done"]
    found = {group["lr"] for group in state["optimizer"]["param_groups"]}
    layers = range(4) if decay else [0]  # embedding, two blocks, classifier
    assert sorted(found) == pytest.approx(sorted(peak * (decay or 1) ** layer for layer in layers), rel=1e-9)


def test_fine_tuning_starts_from_an_encoder_at_any_size_but_for_norm_and_classifier(whole, tmp_path, capsys):
    encoder, path = weights(whole("livt")[0] / "mgp.pt"), tmp_path / "run" / "model.pt"
    flags = f"--mgp-checkpoint {whole('livt')[0]}/mgp.pt --image-size 12 --loss ce --epochs 1 --lr 0"
    result, (model, saved) = run("livt", tmp_path, *flags.split()), livt.load_model(path)
    encoder["positions"] = resize_positions(encoder["positions"], 9)
    for name, value in saved["state_dict"].items():
        assert torch.equal(value, encoder.get(name, value)) == (not name.startswith("norm.")), name
    assert (model.norm.weight == 1).all() and model.positions.requires_grad
    assert saved["augmentation"] == "strong"
    capsys.readouterr()
    again = run("livt", tmp_path, "--evaluate", str(path))
    assert again["all"] == result["all"]  # at the size of the net, not of the flag
    assert "Bayes" in capsys.readouterr().out  # the second decoding is shown, too
    torch.save({**saved, "class_names": list("abc")}, path)
    moved = livt.load_model(path, list("cab"))[1]["class_counts"]
    assert moved == [saved["class_counts"][i] for i in (2, 0, 1)]  # of the Bayes decoding


def test_training_learns_colours_of_the_first_images_of_each_class(tmp_path):
    tiny_npz(tmp_path / "images.npz", (40, 12, 25, 5))
    flags = "--epochs 30 --lr 0.1 --patch-size 2 --augment plain --loss balanced-bce --evaluate-every 99"
    result = run("livt", tmp_path, *flags.split(), "--images-per-class", "5")
    assert result["class_counts"] == [5] * 4 and result["all"] > 80


@pytest.mark.parametrize("flags, words", [
    ("--patch-size 3", "multiple of the patch size"), ("--stage mgp --mgp-checkpoint x.pt", "--stage mgp"),
    ("--heads 3", "number of heads"), ("--mgp-checkpoint {mgp} --width 24", "[1, 1, 16], not [1, 1, 24]"),
    ("--mask-ratio 1", "mask ratio"), ("--mask-ratio 0", "mask ratio"), ("--mask-ratio 0.9", "keeps 0 of 4"),
    ("--drop-path 1", "drop path"), ("--mgp-checkpoint {mgp} --depth 3", "blocks.2.norm1.weight is missing"),
    ("--decoder-heads 3", "number of heads"), ("--stage bft", "--mgp-checkpoint FILE"),
    ("--width 18", "multiple of 4"), ("--mgp-checkpoint=", "empty"),
    ("--mgp-batch-size 30 --batch-size 16 --grad-accumulation 4", "multiple"),
    ("--from-scratch --stage mgp", "--from-scratch"), ("--evaluate {mgp}", "goes to --mgp-checkpoint"),
    ("--from-scratch --mgp-checkpoint x.pt", "--from-scratch"), ("--images-per-class 12", "class 1 has 11"),
    ("--loss bce bce", "twice"), ("--mgp-checkpoint {mgp} --patch-size 2", "patch_embed.weight is [16, 48]")])
def test_flags_and_checkpoints_that_cannot_work_are_refused(flags, words, whole, tmp_path, capsys):
    flags = flags.format(mgp=whole("livt")[0] / "mgp.pt").split()
    assert words in refused(capsys, "livt", tmp_path, *flags)
