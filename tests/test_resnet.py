"""The room common/resnet.py: CIFAR and torchvision ResNets, cosine classifier; what needs torchvision."""
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

from common.resnet import (ARCHS, BasicBlock, CifarResNet, CosineClassifier, build_backbone, build_encoder,
                           fold_batch_norm, imagenet_weights, published_weights)

ROOT = Path(__file__).parent.parent


def parameters_of(module):
    return sum(p.numel() for p in module.parameters())


# ---------------------------------------------------------------- CIFAR ResNets

def test_resnet32_with_ten_classes_has_464154_parameters():
    assert parameters_of(CifarResNet(32)) + parameters_of(nn.Linear(64, 10)) == 464_154


@pytest.mark.parametrize("depth", [8, 14, 20, 32])
def test_a_cifar_resnet_has_as_many_weight_layers_as_its_name_says(depth):
    net = CifarResNet(depth)
    assert sum(isinstance(m, nn.Conv2d) for m in net.modules()) + 1 == depth  # and the classifier
    n = (depth - 2) // 6
    blocks = 9 * (2 * n * 16 * 16 + 16 * 32 + (2 * n - 1) * 32 * 32 + 32 * 64 + (2 * n - 1) * 64 * 64)
    norms = 2 * (16 + 2 * n * (16 + 32 + 64))
    assert parameters_of(net) == 27 * 16 + blocks + norms  # nothing in the shortcuts


@pytest.mark.parametrize("depth", [2, 0, -4, 7, 18, 33])
def test_another_depth_is_refused(depth):
    with pytest.raises(ValueError, match="6n"):
        CifarResNet(depth)


@pytest.mark.parametrize("in_channels, channels, stride", [(16, 32, 2), (32, 64, 2), (8, 8, 1)])
def test_the_shortcut_is_every_second_pixel_between_halves_of_zero_channels(in_channels, channels, stride):
    block = BasicBlock(in_channels, channels, stride)
    with torch.no_grad():
        block.bn2.weight.zero_()  # the residual is 0: what is left is the shortcut
    x = torch.rand(2, in_channels, 8, 8)
    out = block(x)
    half = (channels - in_channels) // 2
    assert torch.equal(out[:, half:half + in_channels], x[:, :, ::stride, ::stride])
    assert out.shape == (2, channels, 8 // stride, 8 // stride)
    assert not out[:, :half].any() and not out[:, half + in_channels:].any()
    assert parameters_of(block) == 9 * channels * (in_channels + channels) + 4 * channels


def test_a_cifar_resnet_computes_he_et_als_net():
    torch.manual_seed(0)
    net = CifarResNet(14).eval()
    for module in net.modules():  # statistics that are not 0 and 1, so that a misplaced norm shows
        if isinstance(module, nn.BatchNorm2d):
            for value, low in ((module.running_mean, -0.1), (module.running_var, 0.5), (module.weight, 0.5),
                               (module.bias, -0.1)):
                nn.init.uniform_(value, low, low + 1)
    state = net.state_dict()
    conv = F.conv2d

    def norm(x, name):
        mean, var, gamma, beta = (state[f"{name}.{key}"].view(-1, 1, 1)
                                  for key in ("running_mean", "running_var", "weight", "bias"))
        return (x - mean) / (var + 1e-5).sqrt() * gamma + beta

    images = torch.randn(3, 3, 32, 32)
    x = norm(conv(images, state["conv1.weight"], padding=1), "bn1").relu()
    for i in range(6):
        stride = 2 if i in (2, 4) else 1
        out = norm(conv(x, state[f"blocks.{i}.conv1.weight"], stride=stride, padding=1), f"blocks.{i}.bn1")
        out = norm(conv(out.relu(), state[f"blocks.{i}.conv2.weight"], padding=1), f"blocks.{i}.bn2")
        if stride == 2:
            x = x[:, :, ::2, ::2]
            zeros = torch.zeros_like(x[:, :x.shape[1] // 2])
            x = torch.cat([zeros, x, zeros], 1)
        x = (out + x).relu()
    assert x.shape == (3, 64, 8, 8)
    torch.testing.assert_close(net(images), x.mean((2, 3)), rtol=1e-4, atol=1e-4)


def test_cifar_features_are_64_and_not_negative():
    for arch in ("resnet14", "resnet20", "resnet32"):
        net = build_backbone(arch)
        features = net(torch.randn(2, 3, 32, 32))
        assert features.shape == (2, 64) and net.feature_dim == 64
        assert features.min() >= 0 and features.max() > 0
    assert build_backbone("resnet14")(torch.randn(2, 3, 28, 28)).shape == (2, 64)


def test_cifar_convolutions_start_kaiming_normal():
    torch.manual_seed(0)
    for name, weight in CifarResNet(14).named_parameters():
        if weight.ndim == 4:
            sigma = math.sqrt(2 / (weight.shape[1] * 9))
            tolerance = 5 / math.sqrt(2 * weight.numel())  # five sigma of an estimated standard deviation
            assert weight.std().item() == pytest.approx(sigma, rel=tolerance), name
            assert weight.abs().max() > 2.2 * sigma  # a normal, not a uniform distribution


# ---------------------------------------------------------------- torchvision's ResNets

BLOCKS = {"resnet10": [1, 1, 1, 1], "resnet18": [2, 2, 2, 2], "resnet34": [3, 4, 6, 3],
          "resnet50": [3, 4, 6, 3], "resnet101": [3, 4, 23, 3], "resnet152": [3, 8, 36, 3]}


def groups_of(net):
    return [net.layer1, net.layer2, net.layer3, net.layer4]


@pytest.mark.parametrize("arch", BLOCKS)
def test_imagenet_nets_have_their_blocks_and_feature_width(arch):
    with torch.device("meta"):  # shapes without memory or initialisation
        net = build_backbone(arch, 224)
        images = torch.empty(2, 3, 224, 224)
    assert [len(group) for group in groups_of(net)] == BLOCKS[arch]
    width = 512 if arch in ("resnet10", "resnet18", "resnet34") else 2048
    assert net.feature_dim == width and net(images).shape == (2, width)
    convolutions = [name for name, m in net.named_modules()
                    if isinstance(m, nn.Conv2d) and "downsample" not in name]
    assert len(convolutions) + 1 == int(arch.removeprefix("resnet"))
    if width == 2048:  # v1.5: the stride is on the 3x3 convolution
        assert net.layer2[0].conv1.stride == (1, 1) and net.layer2[0].conv2.stride == (2, 2)


def test_imagenet_nets_have_the_published_sizes():
    with torch.device("meta"):
        size = {arch: parameters_of(build_backbone(arch, 224)) for arch in BLOCKS}
    # torchvision's documentation, with its classifier over 1000 classes
    assert size["resnet18"] + 1000 * 513 == 11_689_512
    assert size["resnet34"] + 1000 * 513 == 21_797_672
    assert size["resnet50"] + 1000 * 2049 == 25_557_032
    assert size["resnet101"] + 1000 * 2049 == 44_549_160
    assert size["resnet152"] + 1000 * 2049 == 60_192_808
    # ResNet-10 is ResNet-18 without the second block of each group: two 3x3 convolutions and their norms
    assert size["resnet10"] == size["resnet18"] - sum(2 * 9 * w * w + 4 * w for w in (64, 128, 256, 512))


@pytest.mark.parametrize("arch", ["resnet10", "resnet18", "resnet50"])
def test_the_last_gamma_of_every_imagenet_block_starts_at_0(arch):
    net = build_backbone(arch, 32)
    for group in groups_of(net):
        for block in group:
            first, *_, last = [m for name, m in block.named_children() if name.startswith("bn")]
            assert not last.weight.any() and (first.weight == 1).all()


def shape_behind(net, group, side):
    """[C, H, W] that `group` hands on, for images of `side` pixels."""
    shapes = []
    group.register_forward_hook(lambda module, inputs, output: shapes.append(list(output.shape[1:])))
    net.eval()(torch.zeros(1, 3, side, side, device=net.conv1.weight.device))
    return shapes[0]


@pytest.mark.parametrize("arch, side, first, last", [
    ("resnet18", 32, 32, 4), ("resnet10", 64, 64, 8), ("resnet50", 32, 32, 4), ("resnet18", 65, 17, 3),
    ("resnet18", 224, 56, 7)])
def test_the_small_stem_keeps_the_map_of_images_up_to_64_pixels(arch, side, first, last):
    with torch.device("meta"):
        net = build_backbone(arch, side)
    assert shape_behind(net, net.layer1, side)[1:] == [first, first]
    assert shape_behind(net, net.layer4, side) == [net.feature_dim, last, last]
    assert net.conv1.kernel_size == ((3, 3) if side <= 64 else (7, 7))


def test_an_imagenet_net_gives_pooled_features_that_are_not_negative():
    features = build_backbone("resnet10", 32)(torch.randn(2, 3, 32, 32))
    assert features.shape == (2, 512) and features.min() >= 0 and features.max() > 0


def test_an_unknown_architecture_is_told_the_known_ones():
    with pytest.raises(ValueError, match="resnet99") as caught:
        build_backbone("resnet99")
    assert all(arch in str(caught.value) for arch in ARCHS)
    assert set(ARCHS) == {*(f"resnet{depth}" for depth in (14, 20, 32, 44, 56, 110)), *BLOCKS}


# ---------------------------------------------------------------- frozen encoders

def with_statistics(net):
    """The net with batch norms that do something."""
    generator = torch.Generator().manual_seed(0)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            for value, low in ((module.running_mean, -0.3), (module.running_var, 0.5),
                               (module.weight.data, 0.5), (module.bias.data, -0.3)):
                value.copy_(low + torch.rand(value.shape, generator=generator))
    return net.eval()


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
    state = {name: value.clone() for name, value in net.state_dict().items()}
    encoder, images = build_encoder(arch, state), torch.randn(2, 3, 64, 64)
    assert (encoder.feature_dim, encoder.stride) == ENCODERS[arch]
    with torch.no_grad():
        expected = before_pooling(images)
    for mode in (True, False):  # it has no training mode
        near = 1e-4 * expected.abs().max().item()
        assert torch.allclose(encoder.train(mode)(images), expected, rtol=1e-3, atol=near)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in encoder.modules())
    assert not any(p.requires_grad for p in encoder.parameters())
    wrapped = build_encoder(arch, {"state_dict": state})
    assert all(torch.equal(a, b) for a, b in zip(encoder.parameters(), wrapped.parameters()))


def test_folding_leaves_the_net_itself_alone():
    net = with_statistics(CifarResNet(8))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    folded, images = fold_batch_norm(net), torch.randn(2, 3, 16, 16)
    assert torch.allclose(folded(images), net(images), atol=1e-4)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert all(p.requires_grad for p in net.parameters())


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
    return tmp_path / "torch" / "hub" / "checkpoints"


def test_code_in_a_cached_file_of_a_published_name_does_not_run(cache, tmp_path):
    marker, file = tmp_path / "ran", cache / "resnet152-394f9c45.pth"
    cache.mkdir(parents=True)
    torch.save({"conv1.weight": Payload(marker)}, file)
    for ask in (lambda: imagenet_weights("resnet152"), lambda: build_encoder("resnet152", "ImageNet-1K"),
                lambda: build_backbone("resnet152", 224, pretrained=True)):
        with pytest.raises(ValueError, match=f"{file} is not the published file") as refused:
            ask()
        assert "https://download.pytorch.org/models/" in str(refused.value) and not marker.exists()
    pickle.loads(pickle.dumps(Payload(marker)))  # the payload is a live one
    assert marker.exists()


def test_nor_does_it_where_the_file_s_hash_is_right(cache, tmp_path):
    cache.mkdir(parents=True)
    torch.save({"conv1.weight": Payload(tmp_path / "ran")}, tmp_path / "file")
    digest = hashlib.sha256((tmp_path / "file").read_bytes()).hexdigest()
    (tmp_path / "file").rename(cache / f"net-{digest[:8]}.pth")
    with pytest.raises(ValueError, match="holds more than weights"):
        published_weights(f"https://nowhere.invalid/net-{digest[:8]}.pth")
    assert not (tmp_path / "ran").exists()


def test_a_cached_file_with_the_hash_of_its_name_is_read_and_without_one_there_is_advice(cache, tmp_path):
    with pytest.raises(ValueError, match=f"put net-0123abcd.pth from .* into {cache}"):
        published_weights("https://nowhere.invalid/net-0123abcd.pth")
    state = build_backbone("resnet18", 224).state_dict()
    torch.save(state, tmp_path / "file")
    digest = hashlib.sha256((tmp_path / "file").read_bytes()).hexdigest()
    (tmp_path / "file").rename(cache / f"net-{digest[:8]}.pth")
    read = published_weights(f"https://nowhere.invalid/net-{digest[:8]}.pth")
    assert read.keys() == state.keys() and all(torch.equal(read[name], state[name]) for name in state)


def test_a_backbone_starts_from_a_state_dict_and_says_what_does_not_fit():
    state = with_statistics(build_backbone("resnet18", 224)).state_dict()
    older = {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}
    classifier = {"fc.weight": torch.zeros(1000, 512), "fc.bias": torch.zeros(1000)}
    images = torch.randn(2, 3, 96, 96)
    nets = [build_backbone("resnet18", 224, last_relu, pretrained={**older, **classifier}).eval()
            for last_relu in (True, False)]
    assert torch.equal(nets[0](images), F.relu(nets[0](images)))
    assert nets[1](images).min() < 0
    for net in nets:
        assert torch.equal(net.layer1[0].conv1.weight, state["layer1.0.conv1.weight"])
    with pytest.raises(ValueError, match="not a resnet18's.*1 of another shape .conv1.weight.*7, 7"):
        build_backbone("resnet18", 32, pretrained=state)
    with pytest.raises(ValueError, match="not a resnet34's.*missing .layer1.2.conv1.weight"):
        build_backbone("resnet34", 224, pretrained=state)
    with pytest.raises(ValueError, match="not a resnet20's.*missing .blocks.*unexpected .layer1"):
        build_backbone("resnet20", pretrained=state)


@pytest.mark.parametrize("depth", [44, 56, 110])
def test_deeper_cifar_nets_are_known_by_name(depth):
    arch = f"resnet{depth}"
    net = build_backbone(arch, pretrained=CifarResNet(depth).state_dict())
    assert arch in ARCHS and len(net.blocks) == (depth - 2) // 2 and build_encoder(arch).feature_dim == 64


# ---------------------------------------------------------------- cosine classifier

def test_logits_are_scale_times_cosine_without_a_bias():
    torch.manual_seed(0)
    classifier = CosineClassifier(6, 4, scale=20)
    features = torch.randn(5, 6) * 10 ** torch.linspace(-2, 2, 5).view(-1, 1)
    logits = classifier(features)
    for n in range(5):
        for c in range(4):
            cosine = F.cosine_similarity(features[n], classifier.weight[c], dim=0)
            assert logits[n, c].item() == pytest.approx(20 * cosine.item(), abs=1e-4)
    assert logits.abs().max() <= 20 + 1e-4
    along = classifier(classifier.weight * 7)  # features along a class's weight reach the bound
    torch.testing.assert_close(along.diagonal(), torch.full((4,), 20.0))
    assert [name for name, _ in classifier.named_parameters()] == ["weight"]


def test_a_fixed_scale_is_kept_with_the_weights_and_a_learnt_one_is_trained():
    torch.manual_seed(0)
    fixed, learnt = CosineClassifier(6, 4, 20), CosineClassifier(6, 4, 16, learn_scale=True)
    assert sorted(fixed.state_dict()) == sorted(learnt.state_dict()) == ["scale", "weight"]
    assert fixed.scale.item() == 20 and learnt.scale.item() == 16
    features = torch.randn(3, 6)
    for classifier in (fixed, learnt):
        classifier(features)[:, 0].sum().backward()
        assert classifier.weight.grad.abs().sum() > 0
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
    classifier = CosineClassifier(64, 10, 20)
    features = torch.randn(8, 64)
    with torch.autocast("cpu", torch.bfloat16):
        logits, from_bf16 = classifier(features), classifier(features.bfloat16())
    assert logits.dtype == from_bf16.dtype == torch.float32
    assert torch.equal(logits, classifier(features))
    assert torch.equal(from_bf16, classifier(features.bfloat16().float()))


def test_a_net_in_float64_has_logits_in_float64():
    torch.manual_seed(0)
    classifier, features = CosineClassifier(6, 4, 20).double(), torch.randn(5, 6, dtype=torch.float64)
    expected = 20 * F.cosine_similarity(features[:, None], classifier.weight[None], dim=2)
    torch.testing.assert_close(classifier(features), expected, rtol=1e-12, atol=1e-12)


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
print("nets")
from common.data import load
from common.loader import Augmentation, Cut, make_loader
data = load("fashion_lt")
next(make_loader(data.train, data, Cut(8), "cpu", Augmentation("augmented")).batches(range(8)))
print("data")
import cbd
print("cbd")
try:
    cbd.parse_args(["--help"])
except SystemExit as stop:
    assert stop.code == 0
print("help", not [name for name in sys.modules if name.split(".")[0] in ("torchvision", "PIL")])
"""


def test_cifar_nets_the_embedded_set_cbd_and_help_need_no_torchvision(tmp_path):
    code = STAGES.replace("ROOT", repr(str(ROOT)))
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True,
                            timeout=300)
    assert result.returncode == 0, result.stdout[-500:] + result.stderr[-3000:]
    lines = result.stdout.splitlines()
    assert lines[:3] == ["nets", "data", "cbd"] and lines[-1] == "help True"
