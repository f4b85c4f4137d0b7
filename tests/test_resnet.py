"""The room common/resnet.py. That a CIFAR ResNet computes He et al.'s is in test_benchmark.py."""
import hashlib
import math
import pickle
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torchvision.models import get_model

import cbd
from common.data import load
from common.loader import Augmentation, Cut, make_loader
from common.resnet import (ARCHS, CifarResNet, CosineClassifier, build_backbone, build_encoder,
                           imagenet_weights, published_weights)

CLASSIFIER = {"fc.weight": torch.zeros(9, 64), "fc.bias": torch.zeros(9)}


def with_statistics(net):
    """The net in eval mode, with batch norms that do something."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            for value, low in ((module.running_mean, -0.3), (module.running_var, 0.5), (module.weight, 0.5),
                               (module.bias, -0.3)):
                nn.init.uniform_(value, low, low + 1)
    return net.eval()


def test_cifar_nets_have_as_many_weight_layers_as_their_names_say_and_start_kaiming_normal():
    for n, arch in ((2, "resnet14"), (3, "resnet20"), (5, "resnet32"), (7, "resnet44"), (9, "resnet56"),
                    (18, "resnet110")):
        with torch.device("meta"):  # shapes without memory or initialisation
            widths = [m.out_channels for m in build_backbone(arch).modules() if isinstance(m, nn.Conv2d)]
        assert widths == [16] * (1 + 2 * n) + [32] * 2 * n + [64] * 2 * n  # and the classifier
    with_classifier = nn.ModuleList([CifarResNet(32), nn.Linear(64, 10)])
    assert sum(p.numel() for p in with_classifier.parameters()) == 464_154

    torch.manual_seed(0)
    for name, weight in CifarResNet(14).named_parameters():
        if weight.ndim == 4:
            sigma = math.sqrt(2 / (weight.shape[1] * 9))
            tolerance = 5 / math.sqrt(2 * weight.numel())  # five sigma of an estimated standard deviation
            assert weight.std().item() == pytest.approx(sigma, rel=tolerance), name
            assert weight.abs().max() > 2.2 * sigma  # a normal, not a uniform distribution


def test_imagenet_nets_have_the_published_sizes():
    with torch.device("meta"):
        nets = {arch: build_backbone(arch, 224) for arch in ARCHS[-6:]}
        for net in nets.values():
            assert net(torch.empty(2, 3, 224, 224)).shape == (2, net.feature_dim)
    # torchvision's documentation, with its classifier over 1000 classes
    sizes = {arch: 1000 * (net.feature_dim + 1) + sum(p.numel() for p in net.parameters())
             for arch, net in nets.items()}
    # ResNet-10 is ResNet-18 without the second block of each group: two 3x3 convolutions and their norms
    resnet10 = 11_689_512 - sum(2 * 9 * w * w + 4 * w for w in (64, 128, 256, 512))
    assert sizes == {"resnet10": resnet10, "resnet18": 11_689_512, "resnet34": 21_797_672,
                     "resnet50": 25_557_032, "resnet101": 44_549_160, "resnet152": 60_192_808}


@pytest.mark.parametrize("arch, side, first, last", [
    ("resnet18", 32, 32, 4), ("resnet10", 64, 64, 8), ("resnet50", 32, 32, 4), ("resnet18", 65, 17, 3),
    ("resnet18", 224, 56, 7)])
def test_imagenet_nets_keep_the_map_up_to_64_pixels_and_start_each_last_gamma_at_0(arch, side, first, last):
    net, shapes = build_backbone(arch, side), []
    for group in (net.layer1, net.layer4):
        group.register_forward_hook(lambda module, inputs, output: shapes.append(output.shape[2:]))
    net.eval()(torch.zeros(1, 3, side, side))
    assert shapes == [(first, first), (last, last)]
    assert net.conv1.kernel_size == ((3, 3) if side <= 64 else (7, 7))
    for block in (*net.layer1, *net.layer2, *net.layer3, *net.layer4):
        gamma, *_, last_gamma = [m.weight for name, m in block.named_children() if name.startswith("bn")]
        assert not last_gamma.any() and (gamma == 1).all()


@pytest.mark.parametrize("arch, side", [("resnet14", 4), ("resnet10", 32), ("resnet18", 32),
                                        ("resnet50", 32)])
def test_weights_load_and_without_the_last_relu_features_are_those_before_it(arch, side):
    torch.manual_seed(0)
    net = with_statistics(build_backbone(arch, 224))
    images = torch.randn(2, 3, side, side)  # the last map is one pixel
    older = {name: value for name, value in net.state_dict().items() if "num_batches_tracked" not in name}
    rectified, whole = (build_backbone(arch, 224, last_relu, {**older, **CLASSIFIER}).eval()(images)
                        for last_relu in (True, False))
    assert whole.min() < 0 < whole.max()
    assert torch.equal(rectified, F.relu(whole)) and torch.equal(rectified, net(images))


def test_what_does_not_fit_is_said():
    large, state = build_backbone("resnet18", 224).state_dict(), CifarResNet(14).state_dict()
    build_encoder("resnet14", {**state, **CLASSIFIER})
    short = {name: value for name, value in state.items() if name != "conv1.weight"}
    long, deep = {**state, "extra": torch.zeros(1)}, CifarResNet(20).state_dict()
    refused = {
        CifarResNet: [((depth,), "6n") for depth in (2, 0, -4, 7, 18, 33)],
        build_backbone: [
            (("resnet18", 32, True, large), "not a resnet18's.*1 of another shape .conv1.weight.*7, 7"),
            (("resnet34", 224, True, large), "not a resnet34's.*missing .layer1.2.conv1.weight"),
            (("resnet20", 32, True, large), "not a resnet20's.*missing .blocks.*unexpected .layer1"),
            *(((arch, side, True, True), f"no ImageNet weights for {arch} at {side} pixels")
              for arch, side in (("resnet20", 224), ("resnet10", 224), ("resnet18", 64))),
            (("resnet99",), f"'resnet99'; known: {', '.join(ARCHS)}")],
        build_encoder: [
            *((("resnet14", bad), "these weights are not a resnet14's") for bad in (short, long, deep)),
            *(((arch,), "unknown encoder") for arch in ("resnet99", "vgg11", "vit_b_16", "lenet")),
            (("resnet14", "ImageNet-1K"), "no ImageNet weights for resnet14")]}
    for build, cases in refused.items():
        for arguments, words in cases:
            with pytest.raises(ValueError, match=words):
                build(*arguments)


@pytest.mark.parametrize("arch, width, stride", [
    ("resnet14", 64, 4), ("resnet18", 512, 32), ("efficientnet_b0", 1280, 32),
    ("mobilenet_v3_small", 576, 32), ("regnet_x_400mf", 400, 32)])
@torch.no_grad()
def test_a_frozen_encoder_gives_the_net_s_last_map_with_batch_norm_folded(arch, width, stride):
    torch.manual_seed(0)
    net = with_statistics(CifarResNet(14) if arch == "resnet14" else get_model(arch))
    encoder, images = build_encoder(arch, {"state_dict": net.state_dict()}), torch.randn(2, 3, 64, 64)
    assert (encoder.feature_dim, encoder.stride) == (width, stride)
    pieces = [net.conv1, net.bn1, nn.ReLU(), net.blocks] if arch == "resnet14" else list(net.children())[:-2]
    expected = nn.Sequential(*pieces)(images)  # before the pooling
    for mode in (True, False):  # it has no training mode
        near = 1e-4 * expected.abs().max().item()
        torch.testing.assert_close(encoder.train(mode)(images), expected, rtol=1e-3, atol=near)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in encoder.modules())
    assert not any(p.requires_grad for p in encoder.parameters())


class Payload(type(Path())):
    """A path that a reader creates when it runs what the path's pickle says."""

    def __reduce__(self):
        return Path.touch, (Path(self),)


def test_a_cached_file_is_read_if_its_hash_is_that_of_its_name_and_no_code_of_it_runs(tmp_path, monkeypatch):
    marker, folder = Payload(tmp_path / "ran"), tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.urlopen", Mock(side_effect=OSError("no network")))

    def cached(content):
        """The address of a file in torch.hub's cache with the hash of its name."""
        torch.save(content, folder / "file")
        digest = hashlib.sha256((folder / "file").read_bytes()).hexdigest()
        return "https://nowhere.invalid/" + (folder / "file").rename(folder / f"net-{digest[:8]}.pth").name

    torch.save({"conv1.weight": marker}, folder / "resnet152-394f9c45.pth")
    for ask in (lambda: imagenet_weights("resnet152"), lambda: build_encoder("resnet152", "ImageNet-1K"),
                lambda: build_backbone("resnet152", 224, pretrained=True)):
        with pytest.raises(ValueError, match=f"{folder}/resnet152-394f9c45.pth is not the published file.*"
                                             "https://download.pytorch.org/models/"):
            ask()
    with pytest.raises(ValueError, match="holds more than weights"):  # nor where its hash is right
        published_weights(cached({"conv1.weight": marker}))
    assert not marker.exists()
    pickle.loads(pickle.dumps(marker))  # the payload is a live one
    assert marker.exists()

    state = CifarResNet(8).state_dict()
    read = published_weights(cached(state))
    assert read.keys() == state.keys() and all(torch.equal(read[name], state[name]) for name in state)
    with pytest.raises(ValueError, match=f"put net-0123abcd.pth from .* into {folder}"):
        published_weights("https://nowhere.invalid/net-0123abcd.pth")


def test_logits_are_scale_times_cosine_in_float32_and_weights_start_glorot_uniform():
    torch.manual_seed(0)
    features = torch.randn(5, 6, dtype=torch.double) * 10 ** torch.linspace(-2, 2, 5)[:, None]
    for scale, learnt in ((20, False), (16, True)):
        classifier = CosineClassifier(6, 4, scale, learnt).double()
        cosines = F.cosine_similarity(features[:, None], classifier.weight[None], dim=2)
        logits = classifier(features)
        torch.testing.assert_close(logits, scale * cosines, rtol=1e-12, atol=1e-12)
        assert sorted(classifier.state_dict()) == ["scale", "weight"] and classifier.scale == scale
        assert [name for name, _ in classifier.named_parameters()] == ["weight", "scale"][:1 + learnt]
        logits[:, 0].sum().backward()
        assert classifier.weight.grad.any()
    assert classifier.scale.grad.item() == pytest.approx(cosines[:, 0].sum().item(), rel=1e-4)

    classifier, features, bound = CosineClassifier(64, 100, 20), torch.randn(8, 64), math.sqrt(6 / 164)
    assert 0.99 * bound < classifier.weight.abs().max() <= bound
    assert classifier.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.03)
    for given in (features, features.bfloat16()):
        with torch.autocast("cpu", torch.bfloat16):
            logits = classifier(given)
        assert logits.dtype == torch.float32 and torch.equal(logits, classifier(given.float()))


def test_cifar_nets_the_embedded_set_cbd_and_help_need_no_torchvision(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] in ("torchvision", "PIL")]:
        monkeypatch.setitem(sys.modules, name, None)  # so that its import fails
    build_backbone("resnet14")(torch.zeros(1, 3, 32, 32))
    data = load("fashion_lt")
    next(make_loader(data.train, data, Cut(8), "cpu", Augmentation("augmented")).batches(range(8)))
    with pytest.raises(SystemExit, match="^0$"):
        cbd.parse_args(["--help"])
