"""Public weights for our nets: reads the files that other people wrote and renames what is in them. Runs no
code from a file.

What a script calls (each raises ValueError, one line that says what the file holds and what is expected):

    encoder = load_encoder("resnet56", "resnet56-4bfd9763.th")   # frozen, down to its last map: a teacher
    encoder = load_encoder("resnet152", "ImageNet-1K")           # torchvision's own weights
    encoder = load_encoder("timm:tf_efficientnet_lite0", FILE)   # where timm is installed
    backbone = build_backbone("resnet50", 224, pretrained=backbone_weights(FILE, "resnet50"))
    encoder = vit_weights(FILE, sizes)                           # a ViT's or a masked autoencoder's; ours too

Files: what torch.save wrote, or .safetensors (where that package is installed); a state dict, or a dict that
has one under "state_dict", "model" or another usual name; behind `module.` too. Key names as in
- akamaster/pytorch_resnet_cifar10@d5489a9, LDAM-DRW@2536330, MiSLAS@0fc381e: CIFAR ResNets of option A;
- torchvision: its ResNets, EfficientNets and so on;
- facebookresearch/mae@efb2a80, LiVT@68546ef, timm's plain vision transformers.
"""
import argparse
import math
import pathlib
import re
import warnings
import zipfile

import numpy as np
import torch
import torch.nn as nn

from common.ranks import first_rank_first, say
from common.resnet import CIFAR_DEPTHS, build_encoder, load_weights
from common.vit import ViT, resize_positions

# where a state dict lies in what people save; the last is that of MiSLAS's encoder
NESTS = ("state_dict", "model", "model_state_dict", "net", "state_dict_model")
# what parallel training, torch.compile and wrapping classes put before every key
PREFIXES = ("module.", "_orig_mod.", "model.", "backbone.")

# what lies beside weights and can do no harm; whatever else torch does not know is refused
_scalar = np.float64(0).__reduce__()[0]  # makes a numpy number from a dtype and bytes
HARMLESS = [
    argparse.Namespace,
    np.dtype,
    *{type(np.dtype(code)) for code in "?" + np.typecodes["AllInteger"] + np.typecodes["AllFloat"]},
    (_scalar, "numpy.core.multiarray.scalar"),
    (_scalar, "numpy._core.multiarray.scalar"),
    *((pathlib.PurePosixPath, f"{module}.PosixPath") for module in ("pathlib", "pathlib._local")),
]


# ---------------------------------------------------------------- reading

def read_state_dict(path):
    """The tensors of a weights file, on the CPU: {name: tensor}, without the prefixes that all names share.

    path: see the top of this file. Entries beside the weights are left out. Raises ValueError where there is
    no such file, where it is damaged (the checksums of zip archives are looked at), where it holds anything
    but plain values (the entry's type is named, and not made), or no weights.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise ValueError(f"no such file: {path}")
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)

    state = content
    for _ in range(3):  # {"model": {"state_dict": ...}} too
        entries = state if isinstance(state, dict) else {}
        state = next((entries[name] for name in NESTS if isinstance(entries.get(name), dict)), state)

    entries = state if isinstance(state, dict) else {}
    tensors = {name: value for name, value in entries.items()
               if isinstance(name, str) and name.isprintable() and _is_plain(value)}
    if not tensors:
        raise ValueError(f"{path} holds {_described(content)}; expected is a state dict, or a dict that has "
                         f"one under {', '.join(NESTS)}")

    while prefix := next((p for p in PREFIXES if all(name.startswith(p) for name in tensors)), None):
        tensors = {name.removeprefix(prefix): value for name, value in tensors.items()}
    return tensors


def _is_plain(value):
    """Whether a value is a tensor that can be copied into a net: not sparse, quantised, complex or without
    numbers."""
    return torch.is_tensor(value) and value.layout is torch.strided and \
        not (value.is_quantized or value.is_complex() or value.is_meta)


def _described(content):
    """What a file holds, in some words."""
    if not isinstance(content, dict):
        return f"a {type(content).__name__}"
    names = [ascii(str(name))[1:-1][:40] for name in content]
    return f"a dict of {len(names)} entries ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"


def _read_torch(path):
    """What torch.save wrote, by its unpickler that knows only tensors, plain values and `HARMLESS`."""
    damaged = None
    try:
        if zipfile.is_zipfile(path):  # torch looks at no checksum, and reads nothing of a folder (16)
            with zipfile.ZipFile(path) as archive:
                folders = (entry.filename for entry in archive.infolist() if entry.external_attr & 16)
                damaged = archive.testzip() or next(folders, None)
        if damaged is None:
            with torch.serialization.safe_globals(HARMLESS), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch's are about what it then refuses
                return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as reason:
        raise ValueError(f"cannot read {path}: {reason.strerror}") from reason
    except Exception as reason:  # torch, zipfile and pickle each raise their own
        unknown = re.search(r"GLOBAL ([\w.]+)", str(reason))
        if unknown:
            raise ValueError(f"{path} holds a {unknown[1]}, which is code and was not run; save the net's "
                             "state_dict() alone") from reason
        raise ValueError(f"{path} is no file of torch.save, or is damaged") from reason

    raise ValueError(f"{path} is damaged: its part {damaged} is not what was written; get it again")


def _read_safetensors(path):
    """A .safetensors file: names, shapes and numbers, no code."""
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as reason:
        raise ValueError(f"{path} needs the package safetensors (pip install safetensors)") from reason
    try:
        return load_file(path)
    except SafetensorError as reason:
        raise ValueError(f"{path} is no .safetensors file, or is damaged") from reason


# ---------------------------------------------------------------- convolutional nets

def cifar_resnet_state(state):
    """A CIFAR ResNet's state dict under our names: (its arch, {name: tensor}).

    state: names layerG.I.*, as akamaster's, LDAM-DRW's and MiSLAS's, or our own blocks.N.*. A classifier, if
    there is one, is fc.*. Raises ValueError for another kind of net.
    """
    renamed, sizes = {}, [0, 0, 0]
    place = re.compile(r"layer([123])\.(\d+)\.((?:conv|bn)[12]\..+)")

    for name in state:
        if match := place.fullmatch(name):
            group = int(match[1]) - 1
            sizes[group] = max(sizes[group], int(match[2]) + 1)
    for name, value in state.items():
        if match := place.fullmatch(name):
            name = f"blocks.{sum(sizes[:int(match[1]) - 1]) + int(match[2])}.{match[3]}"
        renamed[re.sub(r"^linear\.", "fc.", name)] = value

    own = re.compile(r"(conv1|bn1|fc)\..+|blocks\.(\d+)\.(conv|bn)[12]\..+")
    strange = [name for name in renamed if not own.fullmatch(name)]
    blocks = {int(match[2]) for name in renamed if (match := own.fullmatch(name)) and match[2]}
    if strange or not blocks or len(blocks) % 3 or len(set(sizes)) > 1:
        why = f"{strange[0]} does not belong to one" if strange else f"its groups have {sizes} blocks"
        raise ValueError(f"these weights are not a CIFAR ResNet's with shortcuts without parameters: {why}")
    return f"resnet{2 * len(blocks) + 2}", renamed


def backbone_weights(weights, arch):
    """What `build_backbone(arch, ..., pretrained=...)` and `build_encoder(arch, ...)` start from.

    weights: a file, whose state dict is returned under our names; None and "ImageNet-1K" (torchvision's own),
    which those functions know, are returned as they are. arch: the net's name. Raises ValueError.
    """
    if weights in (None, "ImageNet-1K"):
        return weights
    state = read_state_dict(weights)
    if arch not in CIFAR_DEPTHS:
        return state

    try:
        found, renamed = cifar_resnet_state(state)
    except ValueError as reason:
        raise ValueError(f"{weights} is not a {arch}'s: it holds {_described(state)}; {reason}") from reason
    if found != arch:
        raise ValueError(f"{weights} holds a {found}, not a {arch}")
    return renamed


def load_encoder(arch, weights=None, affine=None):
    """A frozen encoder, images [N, 3, H, W] -> its last map [N, D, h, w]; D is `.feature_dim`, `.stride` the
    pixels of the image a pixel of the map.

    arch: a CIFAR ResNet, torchvision's name (`torchvision:NAME` too) or `timm:NAME`. weights: a file,
    "ImageNet-1K" (what torchvision publishes, or timm under that name), or None: random. affine: what
    `renormalise` returned, kept as `.affine`: the encoder then takes images as the data set's are. Raises
    ValueError.
    """
    library, _, name = arch.rpartition(":")
    if library not in ("", "torchvision", "timm"):
        raise ValueError(f"unknown encoder {arch!r}; known are torchvision's names and timm:NAME")
    build = timm_encoder if library == "timm" else build_encoder

    state = backbone_weights(weights, name)
    try:
        encoder = build(name, state)
        encoder = encoder if affine is None else _Renormalised(encoder, affine)
        encoder.affine = affine
        return encoder
    except ValueError as reason:
        if not isinstance(state, dict):
            raise
        raise ValueError(f"{weights} holds {_described(state)}; {reason}") from reason


def encoder_for(data, arch, weights, normalisation, smallest):
    """An encoder for a data set's images, which may be normalised otherwise than those that it learnt from.

    data: has mean and std. arch, weights: as `load_encoder`; "embedded": the repository's own small teacher.
    normalisation: mean and deviation, 6 numbers (None: as the file says, ImageNet's, or the data set's).
    smallest: side in pixels of the smallest images that it will see. Raises ValueError, also where these
    leave a map of one pixel.
    """
    if weights == "ImageNet-1K" and data.name == "imagenet_lt":
        say("warning: the teacher learnt these classes from all of ImageNet-1K")
    if weights == "embedded":
        weights = pathlib.Path(__file__).parent / "assets" / "fashion_teacher.pt"
    wanted = normalisation or normalisation_of(weights)
    with first_rank_first():  # it may download
        encoder = load_encoder(arch, weights, renormalise([*data.mean, *data.std], wanted))

    with torch.no_grad():
        side = encoder(torch.zeros(1, 3, smallest, smallest)).shape[-1]
    if side < 2:
        raise ValueError(f"--resolutions {smallest} leaves a map of one pixel, 2 x 2 are needed: the "
                         f"teacher's stride is {encoder.stride}")
    return encoder


def normalisation_of(weights):
    """Mean and deviation of the images that a net learnt from, 6 numbers for pixels in [0, 1]: those that its
    file holds as "mean" and "std", ImageNet's for "ImageNet-1K"; None where nothing says it. Raises
    ValueError where the file holds others."""
    if weights == "ImageNet-1K":
        return [0.485, 0.456, 0.406, 0.229, 0.224, 0.225]
    content = _read_torch(weights) if weights and pathlib.Path(weights).suffix != ".safetensors" else None
    if not isinstance(content, dict) or not {"mean", "std"} <= set(content):
        return None
    try:
        numbers = [*map(float, content["mean"]), *map(float, content["std"])]
    except (TypeError, ValueError):
        numbers = []
    if len(numbers) != 6:
        raise ValueError(f"{weights}: its mean and std must be 3 numbers each; give --teacher-normalisation")
    return numbers


def renormalise(given, wanted):
    """What turns images that are normalised by `given` into such that are normalised by `wanted`.

    Both: mean and deviation, 6 numbers; wanted None: unknown. Returns [3 factors, 3 shifts], or None where
    they are alike. Raises ValueError.
    """
    if wanted is None or list(wanted) == list(given):
        return None
    if min(*given[3:], *wanted[3:]) <= 0:
        raise ValueError(f"deviations must be positive, got {list(given)} and {list(wanted)}")
    factors = [std / own for std, own in zip(given[3:], wanted[3:])]
    return [factors, [(mean - own) / std for mean, own, std in zip(given[:3], wanted[:3], wanted[3:])]]


class _Renormalised(nn.Module):
    """An encoder behind a factor and a shift of each channel."""

    def __init__(self, encoder, affine):
        super().__init__()
        self.encoder, self.affine = encoder, affine
        self.feature_dim, self.stride = encoder.feature_dim, encoder.stride

    def forward(self, images):
        factor, shift = images.new_tensor(self.affine).view(2, 3, 1, 1)
        return self.encoder(images * factor + shift)


class _TimmEncoder(nn.Module):
    """A convolutional net of timm down to its last map, always in eval mode."""

    def __init__(self, net):
        super().__init__()
        self.net = net.requires_grad_(False)
        self.train(False)

    def forward(self, images):
        return self.net.forward_features(images)

    def train(self, mode=True):  # batch norm keeps its statistics, whatever the net around it does
        return super().train(False)


def timm_encoder(name, state=None):
    """A frozen encoder by timm's name, as `load_encoder` returns it; the package timm is needed here alone.

    state: a state dict with timm's names, with or without a classifier; "ImageNet-1K": the weights that timm
    publishes under this name, whatever they were trained on, as .safetensors; None: random. Raises
    ValueError, also for a net without a map [N, D, h, w], like a transformer.
    """
    try:
        import timm
    except ImportError as reason:
        raise ValueError(f"timm:{name} needs the package timm (pip install timm)") from reason
    try:
        net = timm.create_model(name, pretrained=False, num_classes=0)
    except RuntimeError as reason:  # an unknown name or tag
        raise ValueError(f"timm {timm.__version__} knows no {name!r}") from reason

    if state == "ImageNet-1K":
        state = _timm_weights(name, net.pretrained_cfg)
    if state is not None:
        load_weights(net, state, f"timm:{name}")

    encoder = _TimmEncoder(net)
    with torch.no_grad():
        shape = encoder(torch.zeros(1, 3, 224, 224)).shape
    if len(shape) != 4 or shape[1] != net.num_features:
        raise ValueError(f"timm:{name} does not end in a map [N, D, h, w] but in {list(shape)}")
    encoder.feature_dim, encoder.stride = shape[1], 224 // shape[2]
    return encoder


def _timm_weights(name, published):
    """The state dict that timm publishes under a name: always as .safetensors, which cannot hold code."""
    place = published.get("hf_hub_id")
    if not place:
        raise ValueError(f"timm publishes no weights of {name!r}; name a file of them")
    try:
        from huggingface_hub import hf_hub_download
        path = hf_hub_download(place, "model.safetensors")
    except Exception as reason:  # the hub's own, requests' or httpx's: no network, no such file
        raise ValueError(f"model.safetensors of https://huggingface.co/{place} could not be downloaded "
                         f"({type(reason).__name__}); get it there and name the file") from reason
    return read_state_dict(path)


# ---------------------------------------------------------------- vision transformers

def vit_state(state):
    """A ViT's state dict under the names of `common.vit.ViT`: {name: tensor}.

    state: names as facebookresearch/mae's, LiVT's and timm's (or ours). A decoder is left out; fc_norm, where
    it is, takes the place of norm, as ours is the norm behind the mean. Raises ValueError for what our ViT
    does not have (distillation tokens, layer scale, relative positions, ...).
    """
    ours = {"cls_token": "class_token", "pos_embed": "positions", "patch_embed.proj": "patch_embed",
            "attn.qkv": "qkv", "attn.proj": "project", "mlp.fc1": "mlp.0", "mlp.fc2": "mlp.2",
            "fc_norm": "norm"}
    known = re.compile(r"class_token|positions|(patch_embed|norm|head)\.(weight|bias)|"
                       r"blocks\.\d+\.(norm1|norm2|qkv|project|mlp\.0|mlp\.2)\.(weight|bias)")
    renamed = {}
    for name, value in state.items():
        if name.startswith("decoder_") or name == "mask_token" or \
                (name.startswith("norm.") and f"fc_{name}" in state):
            continue
        for theirs, our in ours.items():
            name = re.sub(rf"(^|\.){re.escape(theirs)}(?=\.|$)", rf"\g<1>{our}", name)
        if not known.fullmatch(name):
            raise ValueError(f"a {name} is not part of a plain vision transformer")
        if name == "patch_embed.weight" and value.ndim == 4:  # a convolution [D, 3, p, p]
            value = value.permute(0, 2, 3, 1).flatten(1)  # a patch's values are row, column, channel
        renamed[name] = value
    return renamed


def vit_weights(path, sizes, resize=False):
    """The encoder of a public ViT or masked autoencoder, or of ours, under the names of `common.vit.ViT`,
    without a classifier.

    path: see the top. sizes: image_size, patch_size, width, depth, heads of the net it is for (a file does
    not say its number of heads: that must be right). resize: positions of another grid are interpolated to
    image_size; else they stay as they are. Raises ValueError where the file is another net.
    """
    state = read_state_dict(path)
    try:
        renamed = {name: value for name, value in vit_state(state).items() if not name.startswith("head.")}
        with torch.device("meta"):  # shapes alone
            expected = ViT(**sizes).state_dict()
        _check_vit(renamed, expected)
    except ValueError as reason:
        expected = ", ".join(f"{name} {value}" for name, value in sizes.items())
        raise ValueError(f"{path} holds {_described(state)}; expected is a ViT of {expected}: {reason}") \
            from reason

    if resize:
        renamed["positions"] = resize_positions(renamed["positions"], expected["positions"].shape[1] - 1)
    return renamed


def _check_vit(state, expected):
    """Raise ValueError where names or shapes differ, but for positions of another square grid."""
    for name, value in expected.items():
        if name not in state:
            raise ValueError(f"{name} is missing")
        here, there = list(state[name].shape), list(value.shape)
        if name == "positions":
            side = math.isqrt(max(0, here[1] - 1)) if len(here) == 3 else 0
            if side and here == [1, 1 + side * side, there[2]]:
                continue
        if here != there:
            raise ValueError(f"{name} is {here}, not {there}")
    for name in state:
        if name not in expected:
            raise ValueError(f"{name} is left over")
