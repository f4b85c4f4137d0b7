"""The room common/pretrained.py: public weights for our nets, from files that run no code."""
import argparse
import pickle
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torchvision.models import VisionTransformer, resnet18
from torchvision.models.resnet import BasicBlock

from common.pretrained import (backbone_weights, cifar_resnet_state, load_encoder, normalisation_of,
                               read_state_dict, vit_state, vit_weights)
from common.resnet import CifarResNet, build_backbone, build_encoder
from common.vit import MAE, ViT, patchify

TEACHERS = Path(__file__).parent.parent / "data" / "teachers"


class Payload:
    """Creates a file when a reader runs what its pickle says."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def saved(path, content, **how):
    torch.save(content, path, **how)
    return path


WEIGHTS = {"conv1.weight": torch.arange(6.0).view(2, 3), "fc.bias": torch.tensor([1.0, 2.0])}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---------------------------------------------------------------- reading

@pytest.mark.parametrize("content", [
    WEIGHTS, {"state_dict": WEIGHTS, "epoch": 3}, {"model": WEIGHTS}, {"model": {"state_dict": WEIGHTS}},
    {"state_dict": {f"module.{name}": value for name, value in WEIGHTS.items()}},
    {f"module._orig_mod.{name}": value for name, value in WEIGHTS.items()},
    {"state_dict_model": WEIGHTS, "state_dict_classifier": {"fc.weight": torch.zeros(1)}},
    {"model": WEIGHTS, "optimizer": torch.optim.SGD([torch.zeros(1)], 0.1).state_dict(), "best": None},
    {"model": WEIGHTS, "args": argparse.Namespace(lr=0.1, out=Path("runs"), device=torch.device("cpu"))},
    {"model": WEIGHTS, "accuracy": np.float64(93.1), "n": np.int64(3), "dtype": np.dtype("float32")}])
@pytest.mark.parametrize("zipped", [True, False])
def test_weights_are_found_in_what_people_save(tmp_path, content, zipped):
    path = saved(tmp_path / "x.pt", content, _use_new_zipfile_serialization=zipped)
    assert same(read_state_dict(path), WEIGHTS) and same(read_state_dict(str(path)), WEIGHTS)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")  # of the bare pickle
@pytest.mark.parametrize("zipped", [True, False])
def test_no_code_of_a_file_runs_and_its_type_is_named(tmp_path, zipped):
    marker = tmp_path / "ran"
    for entry in (Payload(marker), {"args": Payload(marker)}, [Payload(marker)]):
        path = saved(tmp_path / "x.pt", {"state_dict": WEIGHTS, "extra": entry},
                     _use_new_zipfile_serialization=zipped)
        with pytest.raises(ValueError, match=r"x.pt holds a pathlib.Path.touch|x.pt holds a \S*getattr"):
            read_state_dict(path)
        assert not marker.exists()
    with pytest.raises(ValueError, match="holds a torch.nn.modules.linear.Linear, which is code"):
        read_state_dict(saved(tmp_path / "net.pt", nn.Linear(2, 2), _use_new_zipfile_serialization=zipped))
    (tmp_path / "bare.pt").write_bytes(pickle.dumps(Payload(marker)))
    with pytest.raises(ValueError, match="bare.pt"):
        read_state_dict(tmp_path / "bare.pt")
    assert not marker.exists()


def test_harmless_types_are_harmless_only_while_a_file_is_read(tmp_path):
    before = torch.serialization.get_safe_globals()
    read_state_dict(saved(tmp_path / "x.pt", {"model": WEIGHTS, "args": argparse.Namespace(a=1)}))
    assert set(torch.serialization.get_safe_globals()) == set(before)


def test_flipped_bits_are_seen(tmp_path):
    path = saved(tmp_path / "x.pt", WEIGHTS)
    whole = path.read_bytes()
    number, mark = whole.index(WEIGHTS["conv1.weight"].numpy().tobytes()), whole.rindex(b"x/data/0") - 8
    for place in (number, mark):  # the second says that this entry is a folder
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 16]) + whole[place + 1:])
        assert "conv1.weight" in torch.load(path, weights_only=True)  # torch itself takes it
        with pytest.raises(ValueError, match="x.pt is damaged: its part .*data/0 is not what was written"):
            read_state_dict(path)
    for length in (0, 10, len(whole) // 2, len(whole) - 5):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="x.pt"):
            read_state_dict(path)


def test_what_holds_no_weights_is_described(tmp_path):
    cycle = {}
    cycle["model"] = cycle
    for content, words in (([1, 2], "holds a list"), (None, "holds a NoneType"), (cycle, "1 entries .model."),
                           ({"a": 1, "b\n": 2, "c": 3, "d": 4}, r"4 entries \(a, b.n, c, ...\)")):
        with pytest.raises(ValueError, match=f"{words}.*expected is a state dict") as refused:
            read_state_dict(saved(tmp_path / "x.pt", content))
        assert "\n" not in str(refused.value)
    for path in (tmp_path / "nowhere.pt", tmp_path):
        with pytest.raises(ValueError, match="no such file"):
            read_state_dict(path)
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("a.txt", "a")
    (tmp_path / "text.pt").write_text("not weights")
    for name in ("other.zip", "text.pt"):
        with pytest.raises(ValueError, match=f"{name} is no file of torch.save"):
            read_state_dict(tmp_path / name)


@pytest.mark.filterwarnings("ignore:Validating sparse")
@pytest.mark.parametrize("value", [
    torch.zeros(16, 3, 3, 3).to_sparse(), torch.zeros(16, 3, 3, 3, device="meta"), 3, None,
    torch.zeros(16, 3, 3, 3, dtype=torch.complex64)])
def test_what_is_no_plain_tensor_counts_as_missing(tmp_path, value):
    path = saved(tmp_path / "x.pt", {**CifarResNet(14).state_dict(), "conv1.weight": value})
    with pytest.raises(ValueError, match=r"1 missing \(conv1.weight\)"):
        load_encoder("resnet14", path)


def test_safetensors_are_read_where_the_package_is(tmp_path):
    library = pytest.importorskip("safetensors.torch")
    library.save_file(WEIGHTS, tmp_path / "x.safetensors")
    assert same(read_state_dict(tmp_path / "x.safetensors"), WEIGHTS)
    (tmp_path / "x.safetensors").write_bytes(b"not weights")
    with pytest.raises(ValueError, match="is no .safetensors file"):
        read_state_dict(tmp_path / "x.safetensors")


# ---------------------------------------------------------------- CIFAR ResNets

def shortcut(x):
    """Every second pixel, between halves of zero channels."""
    half = x.shape[1] // 2
    return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, half, half))


class TextbookResNet(nn.Module):
    """The net of akamaster/pytorch_resnet_cifar10 under its names, of torchvision's blocks, with statistics
    that show. Images -> features [N, 64]."""

    def __init__(self, blocks, classifier="linear"):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        for group, width in enumerate((16, 32, 64), 1):
            first = BasicBlock(width // 2, width, 2, shortcut) if group > 1 else BasicBlock(16, 16)
            others = [BasicBlock(width, width) for _ in range(blocks - 1)]
            setattr(self, f"layer{group}", nn.Sequential(first, *others))
        setattr(self, classifier, nn.Linear(64, 10))
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.running_mean, -0.1, 0.1)
                nn.init.uniform_(module.running_var, 0.5, 1.5)

    def forward(self, images):
        x = self.bn1(self.conv1(images)).relu()
        return self.layer3(self.layer2(self.layer1(x))).mean((2, 3))


def assert_computes_the_textbook_s(path, blocks, classifier="linear"):
    """Our net and our encoder of a file give the features of its net, and keep its classifier."""
    state, images, arch = read_state_dict(path), torch.randn(3, 3, 32, 32), f"resnet{6 * blocks + 2}"
    theirs = TextbookResNet(blocks, classifier).eval()
    theirs.load_state_dict(state)
    found, ours = cifar_resnet_state(state)
    assert found == arch
    torch.testing.assert_close(build_backbone(arch, pretrained=ours).eval()(images), theirs(images))
    assert torch.equal(ours["fc.weight"], state[f"{classifier}.weight"])
    assert torch.equal(ours["fc.bias"], state[f"{classifier}.bias"])

    encoder = load_encoder(arch, path)
    torch.testing.assert_close(encoder(images).mean((2, 3)), theirs(images))
    assert not any(p.requires_grad for p in encoder.parameters())


@pytest.mark.parametrize("blocks, classifier, prefix, wrap", [
    (3, "linear", "module.", "state_dict"), (5, "fc", "", "state_dict_model"), (2, "linear", "", None)])
@torch.no_grad()
def test_a_public_cifar_resnet_computes_the_same_under_our_names(tmp_path, blocks, classifier, prefix, wrap):
    torch.manual_seed(0)
    state = TextbookResNet(blocks, classifier).state_dict()
    state = {prefix + name: value for name, value in state.items()}
    path = saved(tmp_path / "net.th", {wrap: state, "best_prec1": 91.7} if wrap else state)
    assert_computes_the_textbook_s(path, blocks, classifier)


@pytest.mark.skipif(not TEACHERS.is_dir(), reason="needs public weights under data/teachers")
@pytest.mark.parametrize("blocks, file", [(3, "resnet20-12fca82f.th"), (9, "resnet56-4bfd9763.th")])
@torch.no_grad()
def test_akamaster_s_files_compute_what_a_textbook_net_computes(blocks, file):
    assert_computes_the_textbook_s(TEACHERS / file, blocks)


def test_our_own_names_stay_and_other_nets_are_refused(tmp_path):
    own = CifarResNet(20).state_dict()
    assert cifar_resnet_state(own)[0] == "resnet20" and same(cifar_resnet_state(own)[1], own)
    path = saved(tmp_path / "own.pt", {"arch": "resnet20", "state_dict": own})
    assert same(backbone_weights(path, "resnet20"), own)
    with pytest.raises(ValueError, match="own.pt holds a resnet20, not a resnet56"):
        backbone_weights(path, "resnet56")
    for state, words in (({**own, "layer1.0.shortcut.0.weight": torch.zeros(1)}, "shortcut.0.weight"),
                         (build_backbone("resnet18").state_dict(), "layer2.0.downsample.0.weight"),
                         ({"conv1.weight": torch.zeros(1)}, "blocks")):
        with pytest.raises(ValueError, match=f"other.pt is not a resnet20's: it holds .*{words}"):
            backbone_weights(saved(tmp_path / "other.pt", state), "resnet20")


# ---------------------------------------------------------------- torchvision's names

def test_a_file_with_torchvision_s_names_is_a_start_and_a_teacher(tmp_path):
    torch.manual_seed(0)
    theirs, images = resnet18(num_classes=7).eval(), torch.randn(2, 3, 96, 96)
    path = saved(tmp_path / "net.pth", {"arch": "resnet18", "state_dict": {
        f"module.{name}": value for name, value in theirs.state_dict().items()}})
    net = build_backbone("resnet18", 96, pretrained=backbone_weights(path, "resnet18")).eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs.fc(net(images)), theirs(images))
        for arch in ("resnet18", "torchvision:resnet18"):
            encoder = load_encoder(arch, path)
            torch.testing.assert_close(theirs.fc(encoder(images).mean((2, 3))), theirs(images),
                                       rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="net.pth holds a dict of 122 entries .*not a resnet34's"):
        load_encoder("resnet34", path)


@pytest.mark.parametrize("mean", [None, "abc", 0.5, [0.5], [0.5, 0.5, 0.5, 0.5], ["a", "b", "c"]])
def test_a_stored_normalisation_that_is_none_is_refused_by_name(mean, tmp_path):
    path = tmp_path / "teacher.pth"
    torch.save({"state_dict": {}, "mean": mean, "std": [0.2, 0.2, 0.2]}, path)
    with pytest.raises(ValueError, match="teacher.pth: its mean and std must be 3 numbers each"):
        normalisation_of(path)
    torch.save({"state_dict": {}, "mean": torch.ones(3), "std": (0.2, 0.25, 0.5)}, path)
    assert normalisation_of(path) == [1, 1, 1, 0.2, 0.25, 0.5]


def test_names_that_mean_no_file_pass_and_unknown_encoders_are_refused():
    assert backbone_weights(None, "resnet18") is None
    assert backbone_weights("ImageNet-1K", "resnet18") == "ImageNet-1K"
    with pytest.raises(ValueError, match="no ImageNet weights for resnet20"):
        load_encoder("resnet20", "ImageNet-1K")
    for arch, words in (("lenet", "unknown encoder 'lenet'"), ("keras:resnet50", "known are torchvision's")):
        with pytest.raises(ValueError, match=words):
            load_encoder(arch)
    assert load_encoder("resnet14").feature_dim == build_encoder("resnet14").feature_dim == 64


# ---------------------------------------------------------------- vision transformers

SIZES = dict(image_size=16, patch_size=4, width=16, depth=2, heads=4)
NAMES = {  # in torchvision's vision transformer: in that of facebookresearch/mae, LiVT and timm
    "class_token": "cls_token", "conv_proj": "patch_embed.proj", "encoder.pos_embedding": "pos_embed",
    "encoder.layers.encoder_layer_": "blocks.", "ln_": "norm", "self_attention.in_proj_": "attn.qkv.",
    "self_attention.out_proj": "attn.proj", "mlp.0": "mlp.fc1", "mlp.3": "mlp.fc2", "heads.head": "head"}


def public_vit(norm="norm"):
    """torchvision's net with random weights, and these under public names. norm: "norm", over all tokens, or
    "fc_norm", over the mean of the patch tokens."""
    net, state = VisionTransformer(16, 4, 2, 4, 16, 64, num_classes=5).eval(), {}
    for name, value in net.state_dict().items():
        value.copy_(torch.randn(value.shape) / 4 + ("ln" in name))
        for theirs, public in {**NAMES, "encoder.ln": norm}.items():
            name = name.replace(theirs, public)
        state[name] = value
    return net, state


def tokens_of(net, images):
    """torchvision's tokens [N, 17, D] before the last norm."""
    x = net.conv_proj(images).flatten(2).transpose(1, 2)
    x = torch.cat([net.class_token.expand(len(x), -1, -1), x], 1)
    return net.encoder.layers(x + net.encoder.pos_embedding)


@torch.no_grad()
def test_a_fine_tuned_mae_has_the_same_logits_under_our_names(tmp_path):
    torch.manual_seed(0)
    (net, state), images = public_vit("fc_norm"), torch.randn(3, 3, 16, 16)
    path = saved(tmp_path / "vit.pth", {"model": state, "args": argparse.Namespace(lr=1e-3)})
    ours = ViT(**SIZES, num_classes=5).eval()
    ours.load_state_dict(vit_state(read_state_dict(path)))
    expected = net.heads(net.encoder.ln(tokens_of(net, images)[:, 1:].mean(1)))
    torch.testing.assert_close(ours(images)[0], expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_encoder_of_a_pre_trained_mae_has_the_same_tokens_under_our_names(tmp_path):
    torch.manual_seed(0)
    (net, state), images = public_vit(), torch.randn(3, 3, 16, 16)
    decoder = {"mask_token": torch.zeros(1, 1, 8), "decoder_pos_embed": torch.zeros(1, 17, 8),
               "decoder_blocks.0.attn.qkv.weight": torch.zeros(24, 8), "decoder_pred.bias": torch.zeros(48)}
    path = saved(tmp_path / "mae.pth", {"model": {**state, **decoder}, "epoch": 800})
    ours = ViT(**SIZES).eval()
    ours.load_state_dict(vit_weights(path, SIZES))  # without the head
    tokens, expected = ours.tokens(patchify(images, 4)), tokens_of(net, images)
    torch.testing.assert_close(tokens, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.norm(tokens), net.encoder.ln(expected), rtol=1e-4, atol=1e-4)


def test_our_own_encoder_is_read(tmp_path):
    own = MAE(**SIZES, decoder_width=8, decoder_depth=1, decoder_heads=2).encoder.state_dict()
    assert same(vit_weights(saved(tmp_path / "mgp.pt", {"what": "mgp", "state_dict": own}), SIZES), own)


def test_positions_of_another_grid_are_resized_only_if_asked(tmp_path):
    theirs = public_vit()[1]
    path, larger = saved(tmp_path / "vit.pth", theirs), {**SIZES, "image_size": 32}
    assert torch.equal(vit_weights(path, larger)["positions"], theirs["pos_embed"])
    resized = vit_weights(path, larger, resize=True)["positions"]
    assert resized.shape == (1, 65, 16) and torch.equal(resized[:, 0], theirs["pos_embed"][:, 0])
    ViT(**larger).load_state_dict(vit_weights(path, larger, resize=True))
    assert torch.equal(vit_weights(path, SIZES, resize=True)["positions"], theirs["pos_embed"])


@pytest.mark.parametrize("sizes, words", [
    (dict(width=24), r"class_token is \[1, 1, 16\], not \[1, 1, 24\]"), (dict(depth=3), "blocks.2.* missing"),
    (dict(depth=1), "blocks.1.* left over"),
    (dict(patch_size=8), r"patch_embed.weight is .*48\], not .*192\]")])
def test_a_vit_of_other_sizes_is_refused(tmp_path, sizes, words):
    path = saved(tmp_path / "vit.pth", public_vit()[1])
    with pytest.raises(ValueError, match=f"vit.pth holds a dict of .*a ViT of image_size.*{words}"):
        vit_weights(path, {**SIZES, **sizes})


@pytest.mark.parametrize("name", ["dist_token", "blocks.0.ls1.gamma", "blocks.0.attn.q_bias",
                                  "norm_pre.weight", "blocks.0.attn.relative_position_bias_table"])
def test_what_is_no_plain_vit_is_refused_by_name(name):
    with pytest.raises(ValueError, match=f"a {name} is not part of a plain vision transformer"):
        vit_state({**public_vit()[1], name: torch.zeros(3)})


# ---------------------------------------------------------------- timm

@torch.no_grad()
def test_a_timm_encoder_ends_in_its_map_and_stays_in_eval_mode(tmp_path):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    theirs = timm.create_model("tf_efficientnet_lite0", num_classes=7).eval()
    images = torch.randn(2, 3, 64, 64)
    path = saved(tmp_path / "lite0.pth", theirs.state_dict())
    encoder = load_encoder("timm:tf_efficientnet_lite0", path)
    assert (encoder.feature_dim, encoder.stride) == (1280, 32)
    nn.ModuleDict({"teacher": encoder}).train()
    torch.testing.assert_close(theirs.classifier(encoder(images).mean((2, 3))), theirs(images))
    assert encoder(images).shape == (2, 1280, 2, 2) and not any(p.requires_grad for p in encoder.parameters())
    with pytest.raises(ValueError, match="lite0.pth holds .* not a timm:resnet18's"):
        load_encoder("timm:resnet18", path)
    with pytest.raises(ValueError, match="does not end in a map"):
        load_encoder("timm:vit_tiny_patch16_224")
    with pytest.raises(ValueError, match="knows no 'resnet_of_mine'"):
        load_encoder("timm:resnet_of_mine")


def test_without_timm_one_line_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)  # as if it were not installed
    with pytest.raises(ValueError, match=r"timm:resnet50 needs the package timm \(pip install timm\)"):
        load_encoder("timm:resnet50")
