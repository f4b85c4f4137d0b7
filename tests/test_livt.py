"""livt.py: losses and their theory, decodings, schedule, both stages, resuming, bad input."""
import argparse
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import livt
from common.augment import normalise
from common.data import load
from common.evaluate import scores
from common.vit import MAE, VIT_SIZES, ViT
from tests.tiny import log_rows, one_error, same_weights, tiny_npz, weights

COUNTS = torch.tensor([500, 120, 30, 9])
NET = ("--image-size", "8", "--patch-size", "2", "--width", "16", "--depth", "2", "--heads", "2",
       "--decoder-width", "8", "--decoder-depth", "1", "--decoder-heads", "2")
SHORT = ("--mgp-epochs", "3", "--mgp-warmup-epochs", "1", "--mgp-batch-size", "32", "--epochs", "3",
         "--warmup-epochs", "1", "--batch-size", "16", "--lr", "0.01", "--evaluate-every", "2")
FP32 = ("--device", "cpu", "--no-amp")
CLASS_COUNTS = (40, 12, 25, 5)


def run(folder, *flags, name="run"):
    path = folder / "tiny.npz"
    if not path.exists():
        tiny_npz(path, CLASS_COUNTS)
    return livt.main(livt.parse_args(["--dataset", str(path), "--recipe", "cifar100_lt", *NET, *SHORT, *FP32,
                                      "--out", str(folder / name), *flags]))


# ---------------------------------------------------------------- identities of the losses

def odds(counts, tau=1.0):
    pi = counts.double() / counts.sum()
    return tau * (pi / (1 - pi)).log()


def test_balanced_ce_is_theorem_1_and_does_not_change_with_the_size_of_the_data_set():
    z, y = 3 * torch.randn(50, 4, dtype=torch.float64), torch.randint(4, (50,))
    log_pi = (COUNTS / COUNTS.sum()).double().log()
    expected = 0
    for row, target in zip(z, y):
        others = [j for j in range(4) if j != target]
        expected += torch.log(1 + sum(((row[j] + log_pi[j]) - (row[target] + log_pi[target])).exp()
                                      for j in others)) / 50
    assert livt.balanced_ce_loss(z, y, COUNTS).item() == pytest.approx(expected.item(), rel=1e-5)
    assert livt.balanced_ce_loss(z, y, 7 * COUNTS).item() == pytest.approx(expected.item(), rel=1e-5)


def test_balanced_bce_is_theorem_2_summed_over_classes():
    z, y = 3 * torch.randn(50, 4, dtype=torch.float64), torch.randint(4, (50,))
    pi = COUNTS.double() / COUNTS.sum()
    p = pi * z.exp() / (pi * z.exp() + (1 - pi))
    expected = -sum((p[i, c].log() if c == y[i] else (1 - p[i, c]).log())
                    for i in range(50) for c in range(4))
    assert livt.balanced_bce_loss(z, y, COUNTS).item() == pytest.approx(expected.item() / 50, rel=1e-5)


def test_sigmoid_of_the_shifted_logit_is_theorem_2_in_both_precisions():
    z = torch.linspace(-30, 30, 601, dtype=torch.float64)[:, None]
    pi = torch.logspace(-9, math.log10(0.9), 50, dtype=torch.float64)[None]
    exact = pi * z.exp() / (pi * z.exp() + (1 - pi))
    bias = pi.log() - (1 - pi).log()
    assert ((z + bias).sigmoid() - exact).abs().max() < 1e-12
    assert ((z.float() + bias.float()).sigmoid() - exact).abs().max() < 5e-7


@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0, 1.05])
def test_tau_scales_the_whole_bias_and_zero_is_the_plain_loss(tau):
    z, y = torch.randn(9, 4), torch.randint(4, (9,))
    one_hot = F.one_hot(y, 4).float()
    bce = F.binary_cross_entropy_with_logits(z + odds(COUNTS, tau).float(), one_hot, reduction="sum") / 9
    assert livt.balanced_bce_loss(z, y, COUNTS, tau).item() == pytest.approx(bce.item(), rel=1e-5)
    ce = F.cross_entropy(z + tau * (COUNTS / COUNTS.sum()).log(), y)
    assert livt.balanced_ce_loss(z, y, COUNTS, tau).item() == pytest.approx(ce.item(), rel=1e-5)


def test_a_uniform_prior_leaves_ce_alone_and_shifts_bce_by_log_c_minus_1():
    z, y, uniform = torch.randn(9, 4), torch.randint(4, (9,)), torch.tensor([5, 5, 5, 5])
    plain = F.cross_entropy(z, y).item()
    assert livt.balanced_ce_loss(z, y, uniform).item() == pytest.approx(plain, rel=1e-6)
    shifted = livt.balanced_bce_loss(z - math.log(3), y, uniform, tau=0.0)
    assert livt.balanced_bce_loss(z, y, uniform).item() == pytest.approx(shifted.item(), rel=1e-5)


def test_the_bce_bias_is_not_shift_invariant_and_antisymmetric_for_two_classes():
    z, y = torch.zeros(1, 2), torch.tensor([0])
    counts = torch.tensor([90, 10])
    # b_0 = -b_1 = log 9: the loss is 2 log(1 + 1/9)
    assert livt.balanced_bce_loss(z, y, counts).item() == pytest.approx(2 * math.log(10 / 9), rel=1e-5)
    other = F.binary_cross_entropy_with_logits(counts.float().log()[None], torch.tensor([[1.0, 0]]),
                                               reduction="sum")
    assert other.item() > 2


@pytest.mark.parametrize("name, C, expected, plain", [("imagenet_lt", 1000, 7.4165, 693.1),
                                                       ("inat18", 8142, 9.0803, 5643.6)])
def test_the_loss_starts_at_the_prior_s_entropy_plus_about_one(name, C, expected, plain):
    # tests/class_count_histograms.json: [images, classes with that many] of the published training lists
    histogram = json.loads((Path(__file__).parent / "class_count_histograms.json").read_text())[name]
    counts = torch.tensor([images for images, classes in histogram for _ in range(classes)])
    assert len(counts) == C
    pi = counts.double() / counts.sum()
    # a batch with targets of the training prior: the loss is linear in them
    loss = livt.balanced_bce_loss(torch.zeros(1, C), pi[None], counts)
    assert loss.item() == pytest.approx(expected, abs=5e-4)
    entropy = -(pi * pi.log()).sum() - ((1 - pi) * (1 - pi).log()).sum()
    assert loss.item() == pytest.approx(entropy.item(), rel=5e-5)
    assert livt.balanced_bce_loss(torch.zeros(1, C), pi[None], counts, 0.0).item() == pytest.approx(
        plain, abs=0.06)


def test_the_gradient_at_zero_logits_is_the_prior_minus_the_target():
    z = torch.zeros(1, 4, requires_grad=True)
    livt.balanced_bce_loss(z, torch.tensor([2]), COUNTS).backward()
    expected = COUNTS / COUNTS.sum() - torch.tensor([0, 0, 1.0, 0])
    assert torch.allclose(z.grad[0], expected, atol=1e-6)


def test_a_balanced_loss_of_shifted_logits_is_the_plain_loss():
    z, y = torch.randn(20, 4), torch.randint(4, (20,))
    bias = odds(COUNTS).float()
    assert livt.balanced_bce_loss(z - bias, y, COUNTS).item() == pytest.approx(
        livt.balanced_bce_loss(z, y, COUNTS, tau=0.0).item(), rel=1e-5)
    log_pi = (COUNTS / COUNTS.sum()).log()
    assert livt.balanced_ce_loss(z - log_pi, y, COUNTS).item() == pytest.approx(
        livt.balanced_ce_loss(z, y, COUNTS, tau=0.0).item(), rel=1e-5)


@pytest.mark.parametrize("loss", [livt.balanced_bce_loss, livt.balanced_ce_loss])
def test_losses_are_linear_in_soft_targets_and_take_ids_for_one_hot(loss):
    z, a, b = torch.randn(9, 4), torch.randint(4, (9,)), torch.randint(4, (9,))
    one_hot = lambda y: F.one_hot(y, 4).float()
    mixed = loss(z, 0.3 * one_hot(a) + 0.7 * one_hot(b), COUNTS)
    expected = 0.3 * loss(z, a, COUNTS) + 0.7 * loss(z, b, COUNTS)
    assert mixed.item() == pytest.approx(expected.item(), rel=1e-5)
    assert loss(z, one_hot(a), COUNTS).item() == pytest.approx(loss(z, a, COUNTS).item(), rel=1e-6)


def test_rare_and_dominant_classes_stay_finite_also_from_bf16():
    counts = torch.tensor([437512, 1])
    loss = livt.balanced_bce_loss(torch.zeros(1, 2, dtype=torch.bfloat16), torch.tensor([1]), counts)
    # b = +-log 437512: the loss is 2 log(1 + 437512); a float32 prior would give 2.0016 log(...)
    assert loss.item() == pytest.approx(2 * math.log(437513), rel=1e-6) and loss.dtype == torch.float32


@pytest.mark.parametrize("loss, counts", [
    (livt.balanced_bce_loss, [5, 0, 3, 1]), (livt.balanced_bce_loss, [0, 0, 0, 9]),
    (livt.balanced_ce_loss, [5, 0, 3, 1]), (livt.balanced_bce_loss, [5, 3]), (livt.balanced_ce_loss, [5, 3])])
def test_classes_without_images_or_with_all_and_one_class_alone_are_refused(loss, counts):
    with pytest.raises(ValueError):
        loss(torch.zeros(2, 4), torch.tensor([0, 1]), torch.tensor(counts))
    with pytest.raises(ValueError, match="two classes"):
        livt.balanced_bce_loss(torch.zeros(2, 1), torch.tensor([0, 0]), torch.tensor([7]))
    with pytest.raises(ValueError, match="two classes"):
        livt.bayes_decode(torch.zeros(2, 1), torch.tensor([7]))


@pytest.mark.parametrize("loss", [livt.balanced_bce_loss, livt.balanced_ce_loss])
@pytest.mark.parametrize("logits, targets, tau", [
    (torch.zeros(4), torch.zeros(4).long(), 1.0), (torch.zeros(2, 4), torch.zeros(3).long(), 1.0),
    (torch.zeros(2, 4), torch.zeros(2, 3), 1.0), (torch.zeros(2, 4), torch.zeros(2).long(), -0.1)])
def test_losses_refuse_bad_shapes_and_tau(loss, logits, targets, tau):
    with pytest.raises(ValueError):
        loss(logits, targets, COUNTS, tau)


# ---------------------------------------------------------------- decodings, on Gaussians

MEANS = 1.6 * torch.stack([torch.tensor([math.cos(a), math.sin(a)])
                           for a in torch.arange(5) * 2 * math.pi / 5]).double()
TRAIN_COUNTS = torch.tensor([5000, 1581, 500, 158, 50])


def log_density(x, means=MEANS):
    """log p(x | c) of unit Gaussians, up to a constant. x: [n, 2]. Returns [n, C]."""
    return -0.5 * ((x[:, None] - means[None]) ** 2).sum(2)


def balanced_accuracy(predictions, targets):
    return sum((predictions[targets == c] == c).double().mean().item() for c in range(5)) / 5


def gaussian_samples(counts, seed):
    generator = torch.Generator().manual_seed(seed)
    targets = torch.repeat_interleave(torch.arange(5), counts)
    return MEANS[targets] + torch.randn(len(targets), 2, generator=generator, dtype=torch.float64), targets


def fit(loss):
    """A quadratic classifier at the minimum of loss(logits, targets). Returns x -> logits."""
    quadratic = lambda x: torch.stack([torch.ones(len(x)).double(), x[:, 0], x[:, 1], x[:, 0] ** 2,
                                       x[:, 1] ** 2, x[:, 0] * x[:, 1]], 1)
    x, y = gaussian_samples(TRAIN_COUNTS, 0)
    features, weight = quadratic(x), torch.zeros(6, 5, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight], max_iter=60, tolerance_grad=1e-5, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        value = loss(features @ weight, y)
        value.backward()
        return value
    optimizer.step(closure)
    return lambda x: (quadratic(x) @ weight).detach()


def test_on_gaussians_balanced_bce_beats_bce_and_ce_and_the_wrong_sign_loses_to_bce():
    x, y = gaussian_samples(torch.tensor([4000] * 5), 1)
    bias = odds(TRAIN_COUNTS)
    losses = {
        "bce": lambda z, y: livt.balanced_bce_loss(z, y, TRAIN_COUNTS, 0.0),
        "ce": lambda z, y: livt.balanced_ce_loss(z, y, TRAIN_COUNTS, 0.0),
        "balanced-bce": lambda z, y: livt.balanced_bce_loss(z, y, TRAIN_COUNTS),
        "wrong sign": lambda z, y: livt.balanced_bce_loss(z - 2 * bias, y, TRAIN_COUNTS)}
    logits = {name: fit(loss)(x) for name, loss in losses.items()}
    accuracy = {name: balanced_accuracy(z.argmax(1), y) for name, z in logits.items()}
    assert accuracy["balanced-bce"] > accuracy["bce"] + 0.08
    assert accuracy["balanced-bce"] > accuracy["ce"] + 0.08
    assert accuracy["wrong sign"] < accuracy["bce"]
    bayes = balanced_accuracy(log_density(x).argmax(1), y)
    for name in ("bce", "balanced-bce", "ce"):  # the second decoding gains, of whatever loss the net is
        second = balanced_accuracy(livt.second_decoding(name, logits[name], TRAIN_COUNTS).argmax(1), y)
        assert accuracy[name] < second < bayes + 0.01, name


@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0, 1.05])
def test_at_the_population_optimum_bayes_decode_is_the_bayes_classifier_and_the_paper_s_is_not(tau):
    x = 6 * torch.rand(4000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 3
    pi = TRAIN_COUNTS.double() / TRAIN_COUNTS.sum()
    posterior = (log_density(x) + pi.log()).softmax(1)  # p(c | x) under the training prior
    optimum = posterior.logit() - odds(TRAIN_COUNTS, tau)  # of (Bal-)BCE: sigmoid(z + tau b) = p(c | x)
    bayes = log_density(x).argmax(1)
    assert (livt.bayes_decode(optimum, TRAIN_COUNTS, tau).argmax(1) == bayes).all()
    assert (optimum.argmax(1) != bayes).double().mean() > 0.05
    # the score itself: log p(x | c) up to a constant of x
    difference = livt.bayes_decode(optimum, TRAIN_COUNTS, tau) - log_density(x)
    assert (difference - difference[:, :1]).abs().max() < 1e-6


def test_for_two_classes_the_paper_s_decoding_is_the_bayes_classifier():
    means, counts = MEANS[:2], torch.tensor([1000, 10])
    x = 6 * torch.rand(2000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 3
    posterior = (log_density(x, means) + (counts / counts.sum()).double().log()).softmax(1)
    optimum = posterior.logit() - odds(counts)
    assert (optimum.argmax(1) == log_density(x, means).argmax(1)).all()


def test_the_optimum_of_ties_goes_to_the_head():
    # equal densities of all five classes: a one-vs-rest score prefers the frequent ones
    pi = TRAIN_COUNTS.double() / TRAIN_COUNTS.sum()
    two_win = torch.tensor([[0.0, -3, -3, -3, 0.0]]).double()  # log densities: head and tail tie
    posterior = (two_win + pi.log()).softmax(1)
    assert (posterior.logit() - odds(TRAIN_COUNTS)).argmax(1).item() == 0


def test_the_second_decoding_of_each_loss_is_the_bayes_classifier_at_its_optimum():
    x = 4 * torch.rand(500, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 2
    pi = TRAIN_COUNTS.double() / TRAIN_COUNTS.sum()
    posterior = (log_density(x) + pi.log()).softmax(1)
    bayes = log_density(x).argmax(1)
    optima = {"ce": posterior.log(), "balanced-ce": posterior.log() - 1.05 * pi.log(),
              "bce": posterior.logit(), "balanced-bce": posterior.logit() - odds(TRAIN_COUNTS, 1.05)}
    assert set(optima) == set(livt.LOSSES)
    for name, z in optima.items():
        assert (livt.second_decoding(name, z, TRAIN_COUNTS, 1.05).argmax(1) == bayes).all(), name
    z = torch.randn(5, 5).double()
    assert torch.allclose(livt.second_decoding("balanced-ce", z, TRAIN_COUNTS), z)


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


def test_groups_hold_every_trained_parameter_once_and_decay_matrices_alone():
    for model in (ViT(8, 2, 16, 2, 2, num_classes=3), MAE(8, 2, 16, 2, 2, 8, 1, 2)):
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
    sizes = dict(image_size=8, patch_size=2, width=16, depth=2, heads=2)
    encoder = MAE(**sizes, decoder_width=8, decoder_depth=1, decoder_heads=2).encoder
    torch.nn.init.normal_(encoder.norm.weight)
    state = encoder.state_dict()
    model = livt.pretrained_vit(sizes, 5, 0.1, state)
    for name, value in model.state_dict().items():
        if not name.startswith(("norm", "head")):
            assert torch.equal(value, state[name]), name
    assert (model.norm.weight == 1).all() and model.positions.requires_grad
    larger = livt.pretrained_vit({**sizes, "image_size": 12}, 5, 0.1, state)
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
    assert (settings("--dataset", "inat18").drop_path, settings("--dataset", "inat18").lr) == (0.2, 1e-3)
    places = settings("--dataset", "places_lt")
    assert (places.epochs, places.tau) == (30, 1.05)
    assert settings("--dataset", "places_lt", "--tau", "1").tau == 1
    assert settings("--dataset", "cifar100_lt").patch_size == 4
    small = settings("--dataset", tiny_npz(tmp_path / "own.npz"))
    sizes = livt.net_sizes(small)
    assert (small.recipe, sizes["image_size"] // sizes["patch_size"]) == ("small", 4)
    assert settings("--dataset", "cifar100_lt", "--quick", "--epochs", "3").epochs == 3


# ---------------------------------------------------------------- stages

@pytest.fixture(scope="module")
def full(tmp_path_factory):
    folder = tmp_path_factory.mktemp("livt")
    result = run(folder, "--loss", "balanced-bce", "bce", "ce", "balanced-ce")
    return folder, result


def test_one_run_trains_every_loss_from_one_pre_training(full):
    folder, result = full
    losses = ["balanced-ce", "ce", "bce", "balanced-bce"]  # the method last
    assert {path.name for path in (folder / "run").glob("m*.pt")} == {
        "mgp.pt", "model.pt", "model_bce.pt", "model_ce.pt", "model_balanced-ce.pt"}
    assert [stage["name"] for stage in result["stages"]] == [
        "mgp", *(name for loss in losses for name in (f"{loss}, Bayes decoding", loss))]
    assert result["stages"][0]["all"] is None and result["stages"][0]["loss"] > 0
    assert [row["stage"] for row in log_rows(folder / "run")] == [
        name for name in ("mgp", *losses) for _ in range(3)]


def test_scores_are_those_of_the_saved_nets_by_both_decodings(full):
    folder, result = full
    data = load(str(folder / "tiny.npz"))
    images = normalise(torch.from_numpy(data.test.images).permute(0, 3, 1, 2), data.mean, data.std)
    targets, stages = torch.from_numpy(data.test.targets), {s["name"]: s for s in result["stages"]}
    for loss, file in (("balanced-bce", "model.pt"), ("bce", "model_bce.pt"), ("ce", "model_ce.pt"),
                       ("balanced-ce", "model_balanced-ce.pt")):
        model, saved = livt.load_model(folder / "run" / file)
        assert saved["loss"] == loss and not model.training
        with torch.no_grad():
            logits = model(images)[0]
        expected = scores(logits, targets, data.class_counts)
        assert stages[loss]["per_class_accuracy"] == expected["per_class_accuracy"]
        assert stages[loss]["ece"] == pytest.approx(expected["ece"], abs=1e-2)
        second = scores(livt.second_decoding(loss, logits, data.class_counts), targets, data.class_counts)
        assert stages[f"{loss}, Bayes decoding"]["per_class_accuracy"] == second["per_class_accuracy"]
        for name, expected in ((loss, expected), (f"{loss}, Bayes decoding", second)):
            confusion = torch.tensor(stages[name]["confusion"])
            accuracy = 100 * confusion.diag() / confusion.sum(1)
            assert accuracy.tolist() == pytest.approx(expected["per_class_accuracy"], abs=1e-4), name


def test_a_checkpoint_of_stage_one_gives_the_same_nets_and_stages_can_run_apart(full, tmp_path):
    folder, _ = full
    tiny_npz(tmp_path / "tiny.npz", CLASS_COUNTS)
    first = run(tmp_path, "--stage", "mgp", name="first")
    assert [stage["name"] for stage in first["stages"]] == ["mgp"] and first["all"] is None
    assert same_weights(tmp_path / "first" / "mgp.pt", folder / "run" / "mgp.pt")
    second = run(tmp_path, "--stage", "bft", "--mgp-checkpoint", str(tmp_path / "first" / "mgp.pt"),
                 "--loss", "ce", name="second")
    assert same_weights(tmp_path / "second" / "model.pt", folder / "run" / "model_ce.pt")
    assert [stage["name"] for stage in second["stages"]] == ["ce, Bayes decoding", "ce"]


def test_pre_training_sees_no_label(full, tmp_path):
    folder, _ = full
    data = dict(np.load(folder / "tiny.npz"))
    data["y_train"] = np.random.default_rng(1).permutation(data["y_train"])
    np.savez(tmp_path / "tiny.npz", **data)
    run(tmp_path, "--stage", "mgp")
    assert same_weights(tmp_path / "run" / "mgp.pt", folder / "run" / "mgp.pt")


def first_step(folder, *flags):
    """last.pt of a run that is stopped behind its first step."""
    with pytest.raises(SystemExit) as stopped:
        run(folder, "--time-limit", "0", "--warmup-epochs", "0", "--mgp-warmup-epochs", "0", *flags,
            name="cut")
    assert stopped.value.code == 0
    return torch.load(folder / "cut" / "last.pt", weights_only=True)


def test_lr_is_given_for_256_images_and_decays_from_layer_to_layer_but_from_scratch(full, tmp_path):
    mgp, bft = ["--mgp-lr", "0.004", "--mgp-batch-size", "32"], ["--lr", "0.01", "--batch-size", "16"]
    tuned = ["--mgp-checkpoint", str(full[0] / "run" / "mgp.pt")]
    for name, flags, peak, factors in (
            ("mgp", mgp, 0.004 * 32 / 256, {0}),
            ("tuned", [*bft, *tuned], 0.01 * 16 / 256, {0, 1, 2, 3}),  # embedding, two blocks, classifier
            ("other", [*bft, *tuned, "--layer-decay", "0.5"], 0.01 * 16 / 256, {0, 1, 2, 3}),
            ("scratch", [*bft, "--from-scratch"], 0.01 * 16 / 256, {0})):
        (tmp_path / name).mkdir()
        groups = first_step(tmp_path / name, *flags)["optimizer"]["param_groups"]
        decay = 0.5 if name == "other" else 0.75
        expected = sorted(peak * decay ** factor for factor in factors)
        assert sorted({group["lr"] for group in groups}) == pytest.approx(expected, rel=1e-9), name


def test_from_scratch_has_no_stage_one(tmp_path):
    result = run(tmp_path, "--from-scratch", "--augment", "plain", "--loss", "ce")
    assert [stage["name"] for stage in result["stages"]] == ["ce, from scratch, Bayes decoding",
                                                          "ce, from scratch"]
    saved = torch.load(tmp_path / "run" / "model.pt", weights_only=True)
    assert (saved["augmentation"], saved["loss"]) == ("standard", "ce")
    assert not (tmp_path / "run" / "mgp.pt").exists()


def test_a_larger_image_size_interpolates_the_checkpoint_s_positions(full, tmp_path, capsys):
    folder, _ = full
    tiny_npz(tmp_path / "tiny.npz", CLASS_COUNTS)
    result = run(tmp_path, "--mgp-checkpoint", str(folder / "run" / "mgp.pt"), "--image-size", "12",
                 "--loss", "ce")
    assert result["all"] is not None
    model, _ = livt.load_model(tmp_path / "run" / "model.pt")
    assert model.positions.shape[1] == 37
    capsys.readouterr()
    again = livt.main(livt.parse_args(["--dataset", str(tmp_path / "tiny.npz"), *FP32, "--evaluate",
                                       str(tmp_path / "run" / "model.pt")]))
    assert again["all"] == result["all"]  # at the size of the net, not of the recipe
    assert "Bayes" in capsys.readouterr().out  # the second decoding is shown, too


def test_class_counts_follow_the_names_of_the_classes(full, tmp_path):
    saved, order = torch.load(full[0] / "run" / "model.pt", weights_only=True), [2, 0, 3, 1]
    torch.save({**saved, "class_names": list("abcd")}, tmp_path / "model.pt")
    moved = livt.load_model(tmp_path / "model.pt", list("bdac"))[1]["class_counts"]
    assert [moved[i] for i in order] == list(CLASS_COUNTS)  # of the Bayes decoding


def test_training_learns_colours_of_the_first_images_of_each_class(tmp_path):
    result = run(tmp_path, "--images-per-class", "5", "--epochs", "40", "--loss", "balanced-bce",
                 "--augment", "plain", "--lr", "0.1")
    assert result["class_counts"] == [5] * 4 and result["all"] > 80


# ---------------------------------------------------------------- bad input

@pytest.mark.parametrize("flags, words", [
    (["--patch-size", "3"], "multiple of the patch size"), (["--heads", "3"], "number of heads"),
    (["--mask-ratio", "1"], "mask ratio"), (["--mask-ratio", "0"], "mask ratio"),
    (["--mask-ratio", "nan"], "--mask-ratio"), (["--mask-ratio", "0.99"], "keeps 0 of 16"),
    (["--tau", "-1"], "--tau"), (["--label-smoothing", "1.1"], "--label-smoothing"),
    (["--layer-decay", "-1"], "--layer-decay"), (["--drop-path", "1"], "drop path"),
    (["--decoder-heads", "3"], "number of heads"), (["--width", "18"], "multiple of 4"),
    (["--mgp-batch-size", "30", "--batch-size", "16", "--grad-accumulation", "4"], "multiple"),
    (["--stage", "bft"], "--mgp-checkpoint FILE"), (["--from-scratch", "--stage", "mgp"], "--from-scratch"),
    (["--from-scratch", "--mgp-checkpoint", "x.pt"], "--from-scratch"),
    (["--stage", "mgp", "--mgp-checkpoint", "x.pt"], "--stage mgp"), (["--mgp-checkpoint", ""], "empty"),
    (["--loss", "bce", "bce"], "twice"),
    (["--images-per-class", "6"], "class 3 has 5"), (["--images-per-class", "0"], "at least 1"),
    (["--image-size", "0"], "--image-size")])
def test_bad_input_is_one_error_line_and_writes_nothing(tmp_path, capsys, flags, words):
    assert words in one_error(run, capsys, tmp_path, *flags)


# ---------------------------------------------------------------- checkpoints of stage one, ours and public

def public_names(encoder, patch_size):
    """An encoder's weights as facebookresearch/mae and timm name and lay them out."""
    state = {}
    for name, value in encoder.items():
        if name == "patch_embed.weight":  # [D, p, p, 3] -> a convolution's [D, 3, p, p]
            value = value.reshape(-1, patch_size, patch_size, 3).permute(0, 3, 1, 2)
        for ours, theirs in (("class_token", "cls_token"), ("positions", "pos_embed"),
                             ("patch_embed.", "patch_embed.proj."), (".qkv.", ".attn.qkv."),
                             (".project.", ".attn.proj."), (".mlp.0.", ".mlp.fc1."),
                             (".mlp.2.", ".mlp.fc2.")):
            name = name.replace(ours, theirs)
        state[name] = value.contiguous()
    return state


def test_a_public_encoder_gives_the_net_that_ours_gives(full, tmp_path):
    folder, _ = full
    tiny_npz(tmp_path / "tiny.npz", CLASS_COUNTS)
    state = public_names(weights(folder / "run" / "mgp.pt"), patch_size=2)
    args = argparse.Namespace(lr=1e-3, model="mae_vit_base_patch16")
    mae = {**state, "mask_token": torch.zeros(1, 1, 8), "decoder_pred.weight": torch.zeros(12, 8)}
    timm = {**state, "head.weight": torch.zeros(1000, 16), "head.bias": torch.zeros(1000)}
    for name, content in (("mae", {"model": mae, "args": args, "epoch": 799}), ("timm", timm)):
        torch.save(content, tmp_path / f"{name}.pth")
        run(tmp_path, "--mgp-checkpoint", str(tmp_path / f"{name}.pth"), "--loss", "ce", name=name)
        assert same_weights(tmp_path / name / "model.pt", folder / "run" / "model_ce.pt"), name


@pytest.mark.parametrize("spoil, words", [
    (lambda state: {k: v for k, v in state.items() if k != "blocks.1.qkv.bias"}, "qkv.bias is missing"),
    (lambda state: {**state, "blocks.1.gamma_1": torch.ones(16)}, "blocks.1.gamma_1"),
    (lambda state: {**state, "patch_embed.bias": torch.ones(17)}, "patch_embed.bias is [17], not [16]"),
    (lambda state: {**state, "positions": torch.ones(1, 18, 16)}, "positions is [1, 18, 16]")])
def test_a_spoilt_checkpoint_of_stage_one_is_one_error_line(full, tmp_path, capsys, spoil, words):
    saved = torch.load(full[0] / "run" / "mgp.pt", weights_only=True)
    torch.save({**saved, "state_dict": spoil(saved["state_dict"])}, tmp_path / "spoilt.pt")
    torch.save(spoil(saved["state_dict"]), tmp_path / "plain.pt")
    for file in ("plain.pt", "spoilt.pt"):
        error = one_error(run, capsys, tmp_path, "--mgp-checkpoint", str(tmp_path / file))
        assert words in error, error


def test_a_checkpoint_of_another_net_or_stage_is_refused_and_the_difference_named(full, tmp_path, capsys):
    mgp = str(full[0] / "run" / "mgp.pt")
    for flags, words in ((["--mgp-checkpoint", mgp, "--width", "24"], "[1, 1, 16], not [1, 1, 24]"),
                         (["--mgp-checkpoint", mgp, "--depth", "3"], "blocks.2.norm1.weight is missing"),
                         (["--mgp-checkpoint", mgp, "--patch-size", "4"], "patch_embed.weight is [16, 12]"),
                         (["--evaluate", mgp], "goes to --mgp-checkpoint")):
        assert words in one_error(run, capsys, tmp_path, *flags)
