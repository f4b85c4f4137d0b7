"""The room common/pretrained.py: public weights for our nets, from files that run no code."""
import argparse
import pickle
import re
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
from torchvision.models import VisionTransformer, resnet18
from torchvision.models.resnet import BasicBlock, ResNet

from common.pretrained import (backbone_weights, cifar_resnet_state, load_encoder, normalisation_of,
                               read_state_dict, vit_state, vit_weights)
from common.resnet import CifarResNet, build_backbone, build_encoder
from common.vit import MAE, ViT, patchify
from tests.peers import net_of, resnet_block

TEACHERS = Path(__file__).parent.parent / "data" / "teachers"
WEIGHTS = {"conv1.weight": torch.arange(6.0).view(2, 3), "fc.bias": torch.tensor([1.0, 2.0])}
NEED_TEACHERS = pytest.mark.skipif(not TEACHERS.is_dir(), reason="needs public weights under data/teachers")
SIZES = dict(image_size=16, patch_size=4, width=16, depth=2, heads=4)


class Payload(type(Path())):
    """A path that a reader creates when it runs what the path's pickle says."""

    def __reduce__(self):
        return Path.touch, (Path(self),)


def saved(path, content, **how):
    torch.save(content, path, **how)
    return path


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("content", [
    WEIGHTS, {"state_dict": WEIGHTS, "epoch": 3}, {"model": WEIGHTS}, {"model": {"state_dict": WEIGHTS}},
    {"state_dict": {f"module.{name}": value for name, value in WEIGHTS.items()}},
    {f"module._orig_mod.{name}": value for name, value in WEIGHTS.items()},
    {"state_dict_model": WEIGHTS, "state_dict_classifier": {"fc.weight": torch.zeros(1)}},
    {"model": WEIGHTS, "optimizer": torch.optim.SGD([torch.zeros(1)], 0.1).state_dict(), "best": None},
    {"model": WEIGHTS, "args": argparse.Namespace(lr=0.1, out=Path("runs"), device=torch.device("cpu"))},
    {"model": WEIGHTS, "accuracy": np.float64(93.1), "n": np.int64(3), "dtype": np.dtype("float32")}])
@pytest.mark.parametrize("zipped", [True, False])
def test_weights_are_found_in_what_people_save_whose_types_are_harmless_only_here(tmp_path, content, zipped):
    before = set(torch.serialization.get_safe_globals())
    path = saved(tmp_path / "x.pt", content, _use_new_zipfile_serialization=zipped)
    assert same(read_state_dict(path), WEIGHTS) and same(read_state_dict(str(path)), WEIGHTS)
    assert set(torch.serialization.get_safe_globals()) == before


def refuse(path, words):
    """Reading it raises one line with these words."""
    with pytest.raises(ValueError, match=words) as refused:
        read_state_dict(path)
    assert "\n" not in str(refused.value)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")  # of the bare pickle
@pytest.mark.parametrize("zipped", [True, False])
def test_no_code_of_a_file_runs_and_its_type_is_named(tmp_path, zipped):
    payload, touch = Payload(tmp_path / "ran"), r"x.pt holds a pathlib.Path.touch|x.pt holds a \S*getattr"
    for content, words in (*(({"state_dict": WEIGHTS, "extra": entry}, touch)
                             for entry in (payload, {"args": payload}, [payload])),
                           (nn.Linear(2, 2), "holds a torch.nn.modules.linear.Linear, which is code")):
        refuse(saved(tmp_path / "x.pt", content, _use_new_zipfile_serialization=zipped), words)
    (tmp_path / "bare.pt").write_bytes(pickle.dumps(payload))
    refuse(tmp_path / "bare.pt", "bare.pt")
    assert not payload.exists()


def test_flipped_bits_and_cut_ends_are_seen(tmp_path):
    whole = (path := saved(tmp_path / "x.pt", WEIGHTS)).read_bytes()
    number, mark = whole.index(WEIGHTS["conv1.weight"].numpy().tobytes()), whole.rindex(b"x/data/0") - 8
    for place in (number, mark):  # the second says that this entry is a folder
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 16]) + whole[place + 1:])
        assert "conv1.weight" in torch.load(path, weights_only=True)  # torch itself takes it
        refuse(path, "x.pt is damaged: its part .*data/0 is not what was written")
    for length in (0, 10, len(whole) // 2, len(whole) - 5):
        path.write_bytes(whole[:length])
        refuse(path, "x.pt")


@pytest.mark.filterwarnings("ignore:Validating sparse")
def test_what_holds_no_weights_is_described_and_what_is_no_plain_tensor_counts_as_missing(tmp_path):
    cycle = {}
    cycle["model"] = cycle
    for content, words in (([1, 2], "holds a list"), (None, "holds a NoneType"), (cycle, "1 entries .model."),
                           ({"a": 1, "b\n": 2, "c": 3, "d": 4}, r"4 entries \(a, b.n, c, ...\)")):
        refuse(saved(tmp_path / "x.pt", content), f"{words}.*expected is a state dict")
    (tmp_path / "text.pt").write_text("not weights")
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("a.txt", "a")
    for name in ("text.pt", "other.zip"):
        refuse(tmp_path / name, f"{name} is no file of torch.save")
    for name in ("nowhere.pt", ""):
        refuse(tmp_path / name, "no such file")

    state = CifarResNet(14).state_dict()
    plain = state["conv1.weight"]
    for value in (plain.to_sparse(), plain.to("meta"), plain.to(torch.complex64), 3, None):
        with pytest.raises(ValueError, match=r"1 missing \(conv1.weight\)"):
            load_encoder("resnet14", saved(tmp_path / "x.pt", {**state, "conv1.weight": value}))


def test_safetensors_are_read_where_the_package_is(tmp_path):
    library = pytest.importorskip("safetensors.torch")
    library.save_file(WEIGHTS, tmp_path / "x.safetensors")
    assert same(read_state_dict(tmp_path / "x.safetensors"), WEIGHTS)
    (tmp_path / "x.safetensors").write_bytes(b"not weights")
    refuse(tmp_path / "x.safetensors", "is no .safetensors file")


@pytest.mark.parametrize("blocks, classifier, prefix, wrap, file", [
    (3, "linear", "module.", "state_dict", None), (5, "fc", "", "state_dict_model", None),
    (2, "linear", "", None, None),
    pytest.param(3, "linear", "", None, "resnet20-12fca82f.th", marks=NEED_TEACHERS),
    pytest.param(9, "linear", "", None, "resnet56-4bfd9763.th", marks=NEED_TEACHERS)])
@torch.no_grad()
def test_a_public_cifar_resnet_computes_the_textbook_s(tmp_path, blocks, classifier, prefix, wrap, file):
    torch.manual_seed(0)
    textbook = net_of(resnet_block, [16] * (blocks + 1) + [32] * blocks + [64] * blocks, 10, nn.ReLU())
    textbook(3 * torch.randn(8, 3, 32, 32))  # so that its statistics show
    textbook.eval()
    with torch.device("meta"):  # akamaster/pytorch_resnet_cifar10 has torchvision's names
        names = [name for name in ResNet(BasicBlock, [blocks] * 4).state_dict()
                 if not re.search("downsample|layer4|fc", name)]
    names += [f"{classifier}.weight", f"{classifier}.bias"]
    state = dict(zip((prefix + name for name in names), textbook.state_dict().values(), strict=True))
    state = {wrap: state, "best_prec1": 91.7} if wrap else state
    path = TEACHERS / file if file else saved(tmp_path / "net.th", state)

    state, images, arch = read_state_dict(path), torch.randn(3, 3, 32, 32), f"resnet{6 * blocks + 2}"
    assert state.keys() | {name for name in names if "num_batches_tracked" in name} == set(names)
    own = zip(textbook.state_dict(), names, strict=True)
    textbook.load_state_dict({ours: state[name] for ours, name in own if name in state})
    features = textbook[:-1](images)
    found, ours = cifar_resnet_state(state)
    assert found == arch
    torch.testing.assert_close(build_backbone(arch, pretrained=ours).eval()(images), features)
    assert all(torch.equal(ours[f"fc.{name}"], state[f"{classifier}.{name}"]) for name in ("weight", "bias"))
    encoder = load_encoder(arch, path)
    torch.testing.assert_close(encoder(images).mean((2, 3)), features)
    assert not any(p.requires_grad for p in encoder.parameters())


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


@torch.no_grad()
def test_a_file_with_torchvision_s_names_is_a_start_and_a_teacher(tmp_path):
    torch.manual_seed(0)
    theirs, images = resnet18(num_classes=7).eval(), torch.randn(2, 3, 96, 96)
    state = {f"module.{name}": value for name, value in theirs.state_dict().items()}
    path = saved(tmp_path / "net.pth", {"arch": "resnet18", "state_dict": state})
    net = build_backbone("resnet18", 96, pretrained=backbone_weights(path, "resnet18")).eval()
    torch.testing.assert_close(theirs.fc(net(images)), theirs(images))
    for arch in ("resnet18", "torchvision:resnet18"):
        logits = theirs.fc(load_encoder(arch, path)(images).mean((2, 3)))
        torch.testing.assert_close(logits, theirs(images), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="net.pth holds a dict of 122 entries .*not a resnet34's"):
        load_encoder("resnet34", path)


def test_a_stored_normalisation_is_returned_and_one_that_is_none_refused_by_name(tmp_path):
    path = saved(tmp_path / "teacher.pth", {"state_dict": {}, "mean": torch.ones(3), "std": (0.2, 0.25, 0.5)})
    assert normalisation_of(path) == [1, 1, 1, 0.2, 0.25, 0.5]
    for mean in (None, "abc", 0.5, [0.5], [0.5, 0.5, 0.5, 0.5], ["a", "b", "c"]):
        saved(path, {"state_dict": {}, "mean": mean, "std": [0.2, 0.2, 0.2]})
        with pytest.raises(ValueError, match="teacher.pth: its mean and std must be 3 numbers each"):
            normalisation_of(path)


def test_names_that_mean_no_file_pass_and_encoders_that_are_not_to_be_had_are_refused(monkeypatch):
    assert backbone_weights(None, "resnet18") is None
    assert backbone_weights("ImageNet-1K", "resnet18") == "ImageNet-1K"
    assert load_encoder("resnet14").feature_dim == build_encoder("resnet14").feature_dim == 64
    monkeypatch.setitem(sys.modules, "timm", None)  # as if it were not installed
    for arch, weights, words in (
            ("resnet20", "ImageNet-1K", "no ImageNet weights for resnet20"),
            ("lenet", None, "unknown encoder 'lenet'"), ("keras:resnet50", None, "known are torchvision's"),
            ("timm:resnet50", None, r"timm:resnet50 needs the package timm \(pip install timm\)")):
        with pytest.raises(ValueError, match=words):
            load_encoder(arch, weights)


NAMES = {  # in torchvision's vision transformer: in that of facebookresearch/mae, LiVT and timm
    "class_token": "cls_token", "conv_proj": "patch_embed.proj", "encoder.pos_embedding": "pos_embed",
    "encoder.layers.encoder_layer_": "blocks.", "encoder.ln": "norm", "ln_": "norm",
    "self_attention.in_proj_": "attn.qkv.", "self_attention.out_proj": "attn.proj", "mlp.0": "mlp.fc1",
    "mlp.3": "mlp.fc2", "heads.head": "head"}


def public_vit():
    """torchvision's net with random weights, and these under public names."""
    net, state = VisionTransformer(16, 4, 2, 4, 16, 64, num_classes=5).eval(), {}
    for name, value in net.state_dict().items():
        value.copy_(torch.randn(value.shape) / 4 + ("ln" in name))
        for theirs, public in NAMES.items():
            name = name.replace(theirs, public)
        state[name] = value
    return net, state


@torch.no_grad()
def test_public_vits_have_the_same_logits_and_tokens_under_our_names(tmp_path):
    torch.manual_seed(0)
    (net, state), images = public_vit(), torch.randn(3, 3, 16, 16)
    x = net.conv_proj(images).flatten(2).transpose(1, 2)
    x = torch.cat([net.class_token.expand(3, -1, -1), x], 1) + net.encoder.pos_embedding
    tokens = net.encoder.layers(x)  # before the last norm

    # fine-tuned as MAE and LiVT do: the last norm is that of the mean of the patch tokens
    tuned = {name.replace("norm.", "fc_norm."): value for name, value in state.items()}
    path = saved(tmp_path / "vit.pth", {"model": tuned, "args": argparse.Namespace(lr=1e-3)})
    ours = ViT(**SIZES, num_classes=5).eval()
    ours.load_state_dict(vit_state(read_state_dict(path)))
    expected = net.heads(net.encoder.ln(tokens[:, 1:].mean(1)))
    torch.testing.assert_close(ours(images)[0], expected, rtol=1e-4, atol=1e-4)

    # pre-trained, beside a decoder
    decoder = {"mask_token": torch.zeros(1, 1, 8), "decoder_pos_embed": torch.zeros(1, 17, 8),
               "decoder_blocks.0.attn.qkv.weight": torch.zeros(24, 8), "decoder_pred.bias": torch.zeros(48)}
    path = saved(tmp_path / "mae.pth", {"model": {**state, **decoder}, "epoch": 800})
    ours = ViT(**SIZES).eval()
    ours.load_state_dict(vit_weights(path, SIZES))  # without the head
    found = ours.tokens(patchify(images, 4))
    torch.testing.assert_close(found, tokens, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.norm(found), net.encoder.ln(tokens), rtol=1e-4, atol=1e-4)


def test_our_own_vit_is_read_positions_are_resized_if_asked_and_other_vits_are_refused(tmp_path):
    own = MAE(**SIZES, decoder_width=8, decoder_depth=1, decoder_heads=2).encoder.state_dict()
    assert same(vit_weights(saved(tmp_path / "mgp.pt", {"what": "mgp", "state_dict": own}), SIZES), own)
    theirs, larger = public_vit()[1], {**SIZES, "image_size": 32}
    path, positions = saved(tmp_path / "vit.pth", theirs), theirs["pos_embed"]
    for sizes, resize in ((larger, False), (SIZES, True)):
        assert torch.equal(vit_weights(path, sizes, resize)["positions"], positions)
    resized = vit_weights(path, larger, resize=True)
    assert resized["positions"].shape == (1, 65, 16)
    assert torch.equal(resized["positions"][:, 0], positions[:, 0])
    ViT(**larger).load_state_dict(resized)

    for sizes, words in ((dict(width=24), r"class_token is \[1, 1, 16\], not \[1, 1, 24\]"),
                         (dict(depth=3), "blocks.2.* missing"), (dict(depth=1), "blocks.1.* left over"),
                         (dict(patch_size=8), r"patch_embed.weight is .*48\], not .*192\]")):
        with pytest.raises(ValueError, match=f"vit.pth holds a dict of .*a ViT of image_size.*{words}"):
            vit_weights(path, {**SIZES, **sizes})
    for name in ("dist_token", "blocks.0.ls1.gamma", "blocks.0.attn.q_bias", "norm_pre.weight",
                 "blocks.0.attn.relative_position_bias_table"):
        with pytest.raises(ValueError, match=f"a {name} is not part of a plain vision transformer"):
            vit_state({**theirs, name: torch.zeros(3)})


@torch.no_grad()
def test_a_timm_encoder_ends_in_its_map_and_stays_in_eval_mode(tmp_path):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    theirs = timm.create_model("tf_efficientnet_lite0", num_classes=7).eval()
    path, images = saved(tmp_path / "lite0.pth", theirs.state_dict()), torch.randn(2, 3, 64, 64)
    encoder = load_encoder("timm:tf_efficientnet_lite0", path)
    assert (encoder.feature_dim, encoder.stride) == (1280, 32)
    nn.ModuleDict({"teacher": encoder}).train()
    torch.testing.assert_close(theirs.classifier(encoder(images).mean((2, 3))), theirs(images))
    assert encoder(images).shape == (2, 1280, 2, 2) and not any(p.requires_grad for p in encoder.parameters())
    for arch, weights, words in (("resnet18", path, "lite0.pth holds .* not a timm:resnet18's"),
                                 ("vit_tiny_patch16_224", None, "does not end in a map"),
                                 ("resnet_of_mine", None, "knows no 'resnet_of_mine'")):
        with pytest.raises(ValueError, match=words):
            load_encoder(f"timm:{arch}", weights)
