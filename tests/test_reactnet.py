"""The room common/reactnet.py: sign, binary convolution, nets, counts, packing. That ReActNet-18 computes the
textbook's net, gradients too, is in test_benchmark.py, beside the peers' one."""
import io

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from common.reactnet import BinaryConv2d, ReActNet18, ReActNetA, RPReLU, RSign, count_operations, pack, unpack

NETS = {"A": ReActNetA, "18": ReActNet18}


def randomise(net):
    """Every learnable number and running statistic away from its start, so that a misplaced one shows."""
    torch.manual_seed(0)
    for name, value in [*net.named_parameters(), *net.named_buffers()]:
        if name.endswith("running_var"):
            value.data.uniform_(0.5, 1.5)
        elif value.is_floating_point() and (value.ndim == 1 or len(value) == 1):
            value.data.add_(0.2 * torch.randn_like(value))
    return net


# ---------------------------------------------------------------- pieces

def test_sign_thresholds_at_minus_b_with_the_gradient_of_the_piecewise_polynomial():
    x = torch.tensor([-1.5, -1.0, -0.5, -0.25, 0.0, 0.5, 1.0, 1.5])
    for b in (0.0, 0.25):
        sign, shifted = RSign(1), (x - b).requires_grad_()
        nn.init.constant_(sign.bias, b)
        out = sign(shifted.view(1, 1, 1, -1))
        assert out.flatten().tolist() == [-1, -1, -1, -1, 0, 1, 1, 1]  # sign(0) = 0
        out.sum().backward()
        assert shifted.grad.tolist() == [0, 0, 1, 1.5, 2, 1, 0, 0]
        assert sign.bias.grad.item() == 5.5  # the same gradient, summed over the channel

    without = RSign(3, binarize=False)
    nn.init.normal_(without.bias)
    images = torch.randn(2, 3, 4, 4)
    assert torch.equal(without(images), images + without.bias)


def test_sign_saves_one_tensor_and_not_a_graph():
    x, sizes = torch.randn(2, 3, 4, 4, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        RSign(3)(x)
    assert sizes == [x.numel()]


@pytest.mark.parametrize("piece", [RSign(4), RPReLU(4)])
def test_pieces_keep_bf16(piece):
    x = torch.randn(2, 4, 3, 3).bfloat16().requires_grad_()
    out = piece(x)
    out.float().sum().backward()
    assert out.dtype == x.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_rprelu_moves_bends_and_moves_with_torch_s_gradients(memory_format):
    assert RPReLU(2)(torch.tensor([-4.0, 3.0]).view(1, 2, 1, 1)).flatten().tolist() == [-1, 3]

    act = randomise(RPReLU(3)).double()
    x = torch.randn(4, 3, 5, 5, dtype=torch.double)
    x[0, :, 0] = -act.before.detach()[0, :, 0]  # moved to 0, where torch takes the slope
    x = x.contiguous(memory_format=memory_format).requires_grad_()
    textbook = F.prelu(x + act.before, act.slope) + act.after
    assert torch.equal(act(x), textbook)

    weights, sources = torch.randn_like(x), (x, act.before, act.slope, act.after)
    ours, theirs = (torch.autograd.grad((out * weights).sum(), sources) for out in (act(x), textbook))
    torch.testing.assert_close(ours, theirs)


def test_without_binarisation_it_is_a_convolution():
    for kind in (False, "activations"):
        conv, x = BinaryConv2d(3, 5, 3, 2, 1, binarize=kind), torch.randn(2, 3, 8, 8)
        assert torch.equal(conv(x), F.conv2d(x, conv.weight, None, 2, 1))

    weights = []
    for kind in (BinaryConv2d, nn.Conv2d):  # starts as Conv2d does
        torch.manual_seed(0)
        weights.append(kind(3, 5, 3).weight)
    assert torch.equal(*weights)


# ---------------------------------------------------------------- sizes

SIZES = [  # net, classes, side, the last map's side, binary weights, real parameters; FLOPs, BOPs, OPs / 1e6
    ("A", 1000, 224, 7, 28_253_184, 1_090_408, ("11.86", "4817", "87.1")),
    ("A", 100, 224, 7, 28_253_184, 167_908, ("10.94", "4817", "86.2")),
    ("A", 100, 32, 2, 28_253_184, 167_908, ("0.99", "393", "7.1")),
    ("18", 1000, 224, 7, 10_985_472, 718_952, ("137.8", "1676", "164.0")),
    ("18", 100, 32, 4, 10_985_472, 249_572, ("8.1", "547", "16.7"))]


@pytest.mark.parametrize("arch, classes, side, map_side, binary, real, published", SIZES)
def test_nets_have_the_published_sizes_and_operations(arch, classes, side, map_side, binary, real, published):
    with torch.device("meta"):  # shapes without memory
        net = NETS[arch](classes, image_size=side)
        images = torch.empty(2, 3, side, side)
    assert net.features(images).shape == (2, net.feature_dim, map_side, map_side)

    sizes = {True: 0, False: 0}
    for module in net.modules():
        for p in module.parameters(recurse=False):
            sizes[isinstance(module, BinaryConv2d)] += p.numel()
    assert sizes == {True: binary, False: real}

    counts = count_operations(net, side)
    for key, number in zip(("flops", "bops", "ops"), published):
        digits = len(number.partition(".")[2])
        assert f"{counts[key] / 1e6:.{digits}f}" == number
    assert counts["ops"] == counts["flops"] + counts["bops"] / 64


@pytest.mark.parametrize("arch, width, map_side", [("A", 256, 3), ("18", 128, 5)])
def test_narrow_nets_take_images_of_an_odd_side(arch, width, map_side):
    net = NETS[arch](10, width=0.25, image_size=36)  # whose map gets a side of 9, and then of 5
    assert net.features(torch.randn(1, 3, 36, 36)).shape == (1, width, map_side, map_side)
    assert net.feature_dim == width


def test_counting_leaves_a_net_as_it_was():
    net = ReActNet18(5, 0.125, 32)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    counts, real = (count_operations(each, 32) for each in (net, ReActNet18(5, 0.125, 32, binarize=False)))
    assert real["bops"] == 0 and real["flops"] == counts["flops"] + counts["bops"]
    assert net.training and all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert not any(module._forward_hooks for module in net.modules())


@pytest.mark.parametrize("width", [0, -1, 0.001, float("nan"), float("inf"), 2.0**31])
def test_a_width_without_channels_is_refused(width):
    for net in NETS.values():
        with pytest.raises(ValueError, match="width"):
            net(10, width)


# ---------------------------------------------------------------- nets

def test_reactnet_18_starts_large_images_as_resnet_18_does():
    stem, images = randomise(ReActNet18(7, 0.125)).eval().stem, torch.randn(1, 3, 17, 17)
    x = stem[1](F.conv2d(images, stem[0].weight, None, stride=2, padding=3))
    assert torch.equal(stem(images), F.max_pool2d(x, 3, 2, 1))


def test_reactnet_a_computes_its_blocks():
    net = randomise(ReActNetA(7, 0.125, 32)).eval()
    state, images = net.state_dict(), torch.randn(1, 3, 32, 32)
    sign = lambda x, name: (x + state[f"{name}.bias"]).sign()

    def norm(x, name):
        return F.batch_norm(x, *(state[f"{name}.{key}"]
                                 for key in ("running_mean", "running_var", "weight", "bias")))

    def conv(x, name, stride=1):
        w = state[f"{name}.weight"]
        w = w.sign() * w.abs().mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, w, None, stride, w.shape[-1] // 2)

    def act(x, name):
        x = x + state[f"{name}.before"]
        return torch.where(x > 0, x, state[f"{name}.slope"].view(1, -1, 1, 1) * x) + state[f"{name}.after"]

    x = norm(F.conv2d(images, state["stem.0.weight"], None, 1, 1), "stem.1")
    strides, doubles = (1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1), (0, 1, 3, 5, 11)
    for i, stride in enumerate(strides):
        b = f"blocks.{i}"
        u = norm(conv(sign(x, f"{b}.sign1"), f"{b}.conv1", stride), f"{b}.bn1")
        u = act(u + (F.avg_pool2d(x, 2) if stride == 2 else x), f"{b}.act1")
        v = sign(u, f"{b}.sign2")
        halves = range(2 if i in doubles else 1)
        x = act(torch.cat([norm(conv(v, f"{b}.conv2.{j}"), f"{b}.bn2.{j}") + u for j in halves], 1),
                f"{b}.act2")

    with torch.no_grad():
        torch.testing.assert_close(net.features(images), x, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(net(images), net.classifier(x.mean((2, 3))), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("arch", NETS)
def test_a_state_loads_strictly_into_every_kind_of_binarisation(arch):
    images, outputs = torch.randn(2, 3, 32, 32), []
    state = randomise(NETS[arch](5, 0.125, 32)).state_dict()
    for binarize in (True, "activations", False):
        net, inputs = NETS[arch](5, 0.125, 32, binarize).eval(), []
        net.load_state_dict(state, strict=True)
        for module in net.modules():
            if isinstance(module, BinaryConv2d):
                module.register_forward_pre_hook(lambda m, given: inputs.append(given[0]))
        outputs.append(net(images))
        assert all(torch.equal(x, x.sign()) == bool(binarize) for x in inputs)
    assert not torch.allclose(outputs[0], outputs[1]) and not torch.allclose(outputs[1], outputs[2])


def test_every_parameter_of_reactnet_a_gets_a_gradient():
    torch.manual_seed(0)
    net = ReActNetA(5, 0.125, 32)
    F.cross_entropy(net(torch.randn(8, 3, 32, 32)), torch.arange(8) % 5).backward()
    for name, p in net.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.any(), name


# ---------------------------------------------------------------- packing

@pytest.mark.parametrize("arch, memory_format", [("A", torch.channels_last), ("18", torch.contiguous_format)])
def test_a_packed_net_gives_the_same_logits_bit_for_bit(arch, memory_format):
    net = randomise(NETS[arch](7, 0.25, 32)).to(memory_format=memory_format).eval()
    with torch.no_grad():
        next(m for m in net.modules() if isinstance(m, BinaryConv2d)).weight[0, :2] = 0  # sign(0) = +1
    file = io.BytesIO()
    torch.save(pack(net), file)
    file.seek(0)

    deployed = NETS[arch](7, 0.25, 32, "activations").to(memory_format=memory_format).eval()
    deployed.load_state_dict(unpack(torch.load(file, weights_only=True)), strict=True)
    images = torch.randn(5, 3, 32, 32).contiguous(memory_format=memory_format)
    with torch.no_grad():
        assert torch.equal(net(images), deployed(images))


def test_reactnet_a_packs_into_4_3_megabytes():
    file = io.BytesIO()
    torch.save(pack(ReActNetA(100)), file)
    assert 4.2e6 < file.tell() < 4.5e6


def test_a_net_of_real_weights_cannot_be_packed():
    with pytest.raises(ValueError, match="binary"):
        pack(ReActNet18(5, 0.125, 32, binarize=False))
