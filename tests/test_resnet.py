"""The room common/resnet.py: CIFAR and torchvision ResNets, encoders, weights, cosine classifier; what needs
torchvision. That a CIFAR ResNet computes He et al.'s is in test_benchmark.py, beside the peers' one."""
import hashlib
import math
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from common.resnet import (ARCHS, CifarResNet, CosineClassifier, build_backbone, build_encoder,
                           imagenet_weights, published_weights)

ROOT = Path(__file__).parent.parent


def parameters_of(module):
    return sum(p.numel() for p in module.parameters())


def with_statistics(net):
    """The net in eval mode, with batch norms that do something."""
    generator = torch.Generator().manual_seed(0)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            for value, low in ((module.running_mean, -0.3), (module.running_var, 0.5),
                               (module.weight.data, 0.5), (module.bias.data, -0.3)):
                value.copy_(low + torch.rand(value.shape, generator=generator))
    return net.eval()


# ---------------------------------------------------------------- backbones

def test_cifar_nets_have_as_many_weight_layers_as_their_names_say():
    for depth in (14, 20, 32, 44, 56, 110):
        with torch.device("meta"):  # shapes without memory or initialisation
            net = build_backbone(f"resnet{depth}")
        widths = [m.out_channels for m in net.modules() if isinstance(m, nn.Conv2d)]
        n = (depth - 2) // 6
        assert widths == [16] * (1 + 2 * n) + [32] * 2 * n + [64] * 2 * n  # and the classifier

    assert parameters_of(CifarResNet(32)) + parameters_of(nn.Linear(64, 10)) == 464_154

    for depth in (2, 0, -4, 7, 18, 33):
        with pytest.raises(ValueError, match="6n"):
            CifarResNet(depth)


def test_cifar_convolutions_start_kaiming_normal():
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
    sizes = {arch: parameters_of(net) + 1000 * (net.feature_dim + 1) for arch, net in nets.items()}
    # ResNet-10 is ResNet-18 without the second block of each group: two 3x3 convolutions and their norms
    resnet10 = 11_689_512 - sum(2 * 9 * w * w + 4 * w for w in (64, 128, 256, 512))
    assert sizes == {"resnet10": resnet10, "resnet18": 11_689_512, "resnet34": 21_797_672,
                     "resnet50": 25_557_032, "resnet101": 44_549_160, "resnet152": 60_192_808}


@pytest.mark.parametrize("arch, side, first, last", [
    ("resnet18", 32, 32, 4), ("resnet10", 64, 64, 8), ("resnet50", 32, 32, 4), ("resnet18", 65, 17, 3),
    ("resnet18", 224, 56, 7)])
def test_the_small_stem_keeps_the_map_of_images_up_to_64_pixels(arch, side, first, last):
    with torch.device("meta"):
        net, shapes = build_backbone(arch, side), []
        for group in (net.layer1, net.layer4):
            group.register_forward_hook(lambda module, inputs, output: shapes.append(output.shape[2:]))
        net(torch.empty(2, 3, side, side))

    assert shapes == [(first, first), (last, last)]
    assert net.conv1.kernel_size == ((3, 3) if side <= 64 else (7, 7))


@pytest.mark.parametrize("arch", ["resnet10", "resnet18", "resnet50"])
def test_the_last_gamma_of_every_imagenet_block_starts_at_0(arch):
    net = build_backbone(arch, 32)
    for block in (*net.layer1, *net.layer2, *net.layer3, *net.layer4):
        first, *_, last = [m for name, m in block.named_children() if name.startswith("bn")]
        assert not last.weight.any() and (first.weight == 1).all()


@pytest.mark.parametrize("arch, side", [("resnet14", 4), ("resnet18", 32), ("resnet50", 32)])
def test_weights_load_and_without_the_last_relu_features_are_those_before_it(arch, side):
    net = with_statistics(build_backbone(arch, 224))
    state = net.state_dict()
    older = {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}
    classifier = {"fc.weight": torch.zeros(1000, 512), "fc.bias": torch.zeros(1000)}

    images = torch.randn(2, 3, side, side)  # the last map is one pixel
    nets = [build_backbone(arch, 224, last_relu, pretrained={**older, **classifier})
            for last_relu in (True, False)]
    rectified, whole = (each.eval()(images) for each in nets)
    assert whole.min() < 0 < whole.max()
    assert torch.equal(rectified, F.relu(whole)) and torch.equal(rectified, net(images))


def test_what_does_not_fit_is_said():
    state = build_backbone("resnet18", 224).state_dict()
    for arch, side, words in (
            ("resnet18", 32, "not a resnet18's.*1 of another shape .conv1.weight.*7, 7"),
            ("resnet34", 224, "not a resnet34's.*missing .layer1.2.conv1.weight"),
            ("resnet20", 32, "not a resnet20's.*missing .blocks.*unexpected .layer1")):
        with pytest.raises(ValueError, match=words):
            build_backbone(arch, side, pretrained=state)

    for arch, side in (("resnet20", 224), ("resnet10", 224), ("resnet18", 64)):
        with pytest.raises(ValueError, match=f"no ImageNet weights for {arch} at {side} pixels"):
            build_backbone(arch, side, pretrained=True)
    with pytest.raises(ValueError, match=f"'resnet99'; known: {', '.join(ARCHS)}"):
        build_backbone("resnet99")


# ---------------------------------------------------------------- frozen encoders

# a map's width and stride; the pieces of torchvision's net before its pooling
ENCODERS = {"resnet14": (64, 4), "resnet18": (512, 32), "efficientnet_b0": (1280, 32),
            "mobilenet_v3_small": (576, 32), "regnet_x_400mf": (400, 32)}


@pytest.mark.parametrize("arch", ENCODERS)
def test_a_frozen_encoder_gives_the_net_s_last_map_with_batch_norm_folded(arch):
    torch.manual_seed(0)
    if arch == "resnet14":
        net = with_statistics(CifarResNet(14))
        before_pooling = lambda x: net.blocks(F.relu(net.bn1(net.conv1(x))))
    else:
        from torchvision.models import get_model
        net = with_statistics(get_model(arch))
        before_pooling = net.features if hasattr(net, "features") else \
            lambda x: nn.Sequential(*list(net.children())[:-2])(x)

    encoder, images = build_encoder(arch, {"state_dict": net.state_dict()}), torch.randn(2, 3, 64, 64)
    assert (encoder.feature_dim, encoder.stride) == ENCODERS[arch]
    with torch.no_grad():
        expected = before_pooling(images)
    near = 1e-4 * expected.abs().max().item()
    for mode in (True, False):  # it has no training mode
        torch.testing.assert_close(encoder.train(mode)(images), expected, rtol=1e-3, atol=near)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in encoder.modules())
    assert not any(p.requires_grad for p in encoder.parameters())


def test_an_encoder_s_weights_load_strictly_but_for_a_classifier():
    state = CifarResNet(14).state_dict()
    build_encoder("resnet14", {**state, "fc.weight": torch.zeros(9, 64), "fc.bias": torch.zeros(9)})

    short = {name: value for name, value in state.items() if name != "conv1.weight"}
    for bad in (short, {**state, "extra": torch.zeros(1)}, CifarResNet(20).state_dict()):
        with pytest.raises(ValueError, match="these weights are not a resnet14's"):
            build_encoder("resnet14", bad)
    for arch in ("resnet99", "vgg11", "vit_b_16", "lenet"):
        with pytest.raises(ValueError, match="unknown encoder"):
            build_encoder(arch)
    with pytest.raises(ValueError, match="no ImageNet weights for resnet14"):
        build_encoder("resnet14", "ImageNet-1K")


# ---------------------------------------------------------------- published weights

class Payload:
    """Creates a file when a reader runs what its pickle says."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """torch.hub's folder of weights, without a network."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))

    def offline(*args, **named):
        raise OSError("no network")
    monkeypatch.setattr("torch.hub.urlopen", offline)
    folder = tmp_path / "torch" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


def cached(cache, content):
    """The address of a file that lies in the cache, with the hash of its name."""
    torch.save(content, cache / "file")
    digest = hashlib.sha256((cache / "file").read_bytes()).hexdigest()
    (cache / "file").rename(cache / f"net-{digest[:8]}.pth")
    return f"https://nowhere.invalid/net-{digest[:8]}.pth"


def test_code_in_a_cached_file_of_a_published_name_does_not_run(cache, tmp_path):
    marker, file = tmp_path / "ran", cache / "resnet152-394f9c45.pth"
    torch.save({"conv1.weight": Payload(marker)}, file)
    for ask in (lambda: imagenet_weights("resnet152"), lambda: build_encoder("resnet152", "ImageNet-1K"),
                lambda: build_backbone("resnet152", 224, pretrained=True)):
        with pytest.raises(ValueError, match=f"{file} is not the published file.*"
                                             "https://download.pytorch.org/models/"):
            ask()

    with pytest.raises(ValueError, match="holds more than weights"):  # nor where its hash is right
        published_weights(cached(cache, {"conv1.weight": Payload(marker)}))
    assert not marker.exists()
    pickle.loads(pickle.dumps(Payload(marker)))  # the payload is a live one
    assert marker.exists()


def test_a_cached_file_with_the_hash_of_its_name_is_read_and_without_one_there_is_advice(cache):
    state = CifarResNet(8).state_dict()
    read = published_weights(cached(cache, state))
    assert read.keys() == state.keys() and all(torch.equal(read[name], state[name]) for name in state)

    with pytest.raises(ValueError, match=f"put net-0123abcd.pth from .* into {cache}"):
        published_weights("https://nowhere.invalid/net-0123abcd.pth")


# ---------------------------------------------------------------- cosine classifier

def test_logits_are_scale_times_cosine_without_a_bias():
    torch.manual_seed(0)
    classifier = CosineClassifier(6, 4, scale=20).double()
    features = torch.randn(5, 6, dtype=torch.double) * 10 ** torch.linspace(-2, 2, 5)[:, None]
    cosines = F.cosine_similarity(features[:, None], classifier.weight[None], dim=2)
    torch.testing.assert_close(classifier(features), 20 * cosines, rtol=1e-12, atol=1e-12)
    assert [name for name, _ in classifier.named_parameters()] == ["weight"]


def test_a_fixed_scale_is_kept_with_the_weights_and_a_learnt_one_is_trained():
    torch.manual_seed(0)
    fixed, learnt = CosineClassifier(6, 4, 20), CosineClassifier(6, 4, 16, learn_scale=True)
    features = torch.randn(3, 6)
    for classifier, scale in ((fixed, 20), (learnt, 16)):
        assert sorted(classifier.state_dict()) == ["scale", "weight"] and classifier.scale == scale
        classifier(features)[:, 0].sum().backward()
        assert classifier.weight.grad.any()

    assert not fixed.scale.requires_grad
    # d(scale * cos) / d scale = cos
    assert learnt.scale.grad.item() == pytest.approx((learnt(features)[:, 0].sum() / 16).item(), rel=1e-4)


def test_weights_start_glorot_uniform():
    torch.manual_seed(0)
    weight = CosineClassifier(64, 100, 20).weight
    bound = math.sqrt(6 / 164)
    assert 0.99 * bound < weight.abs().max() <= bound
    assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.03)


def test_logits_are_float32_under_bf16_autocast():
    classifier, features = CosineClassifier(64, 10, 20), torch.randn(8, 64)
    for given in (features, features.bfloat16()):
        with torch.autocast("cpu", torch.bfloat16):
            logits = classifier(given)
        assert logits.dtype == torch.float32 and torch.equal(logits, classifier(given.float()))


# ---------------------------------------------------------------- what needs torchvision

STAGES = """
import sys
class Refuse:  # torchvision is missing, and PIL with it
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torchvision", "PIL"):
            raise ImportError("no " + name)
sys.meta_path.insert(0, Refuse())
sys.path.insert(0, ROOT)
import torch
from common.resnet import build_backbone
build_backbone("resnet14")(torch.zeros(1, 3, 32, 32))
from common.data import load
from common.loader import Augmentation, Cut, make_loader
data = load("fashion_lt")
next(make_loader(data.train, data, Cut(8), "cpu", Augmentation("augmented")).batches(range(8)))
import cbd
try:
    cbd.parse_args(["--help"])
except SystemExit as stop:
    assert stop.code == 0
print("imported:", [name for name in sys.modules if name.split(".")[0] in ("torchvision", "PIL")])
"""


def test_cifar_nets_the_embedded_set_cbd_and_help_need_no_torchvision(tmp_path):
    code = STAGES.replace("ROOT", repr(str(ROOT)))
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True,
                            timeout=300)
    assert result.returncode == 0, result.stdout[-500:] + result.stderr[-3000:]
    assert result.stdout.endswith("imported: []\n")
