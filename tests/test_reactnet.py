"""The room common/reactnet.py. That ReActNet-18 computes the textbook's net is in test_benchmark.py."""
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


def binary_convolutions(net):
    return [module for module in net.modules() if isinstance(module, BinaryConv2d)]


def test_sign_thresholds_at_minus_b_with_the_gradient_of_the_piecewise_polynomial():
    x = torch.tensor([-1.5, -1.0, -0.5, -0.25, 0.0, 0.5, 1.0, 1.5]).view(1, 1, 1, -1)
    for b in (0.0, 0.25):
        sign, shifted, saved = RSign(1), (x - b).requires_grad_(), []
        nn.init.constant_(sign.bias, b)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
            out = sign(shifted)
        assert saved == [x.numel()]  # one tensor and not a graph
        assert out.flatten().tolist() == [-1, -1, -1, -1, 0, 1, 1, 1]  # sign(0) = 0
        out.sum().backward()
        assert shifted.grad.flatten().tolist() == [0, 0, 1, 1.5, 2, 1, 0, 0]
        assert sign.bias.grad.item() == 5.5  # the same gradient, summed over the channel

    without, images = RSign(3, binarize=False), torch.randn(2, 3, 4, 4)
    nn.init.normal_(without.bias)
    assert torch.equal(without(images), images + without.bias)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_rprelu_moves_bends_and_moves_with_torch_s_gradients(memory_format):
    assert RPReLU(2)(torch.tensor([-4.0, 3.0]).view(1, 2, 1, 1)).flatten().tolist() == [-1, 3]
    act, x = randomise(RPReLU(3)).double(), torch.randn(4, 3, 5, 5, dtype=torch.double)
    x[0, :, 0] = -act.before.detach()[0, :, 0]  # moved to 0, where torch takes the slope
    x = x.contiguous(memory_format=memory_format).requires_grad_()
    textbook = F.prelu(x + act.before, act.slope) + act.after
    assert torch.equal(act(x), textbook)
    weights, sources = torch.randn_like(x), (x, act.before, act.slope, act.after)
    ours, theirs = (torch.autograd.grad((out * weights).sum(), sources) for out in (act(x), textbook))
    torch.testing.assert_close(ours, theirs)


def test_pieces_keep_bf16():
    for piece in (RSign(4), RPReLU(4)):
        x = torch.randn(2, 4, 3, 3).bfloat16().requires_grad_()
        out = piece(x)
        out.float().sum().backward()
        assert out.dtype == x.grad.dtype == torch.bfloat16


def test_a_convolution_starts_as_torch_s_and_is_one_or_has_weights_mean_w_sign_w():
    for kind in (True, "activations", False):
        torch.manual_seed(0)
        conv, x = BinaryConv2d(3, 5, 3, 2, 1, binarize=kind), torch.randn(2, 3, 8, 8)
        w = conv.weight
        binary = w.sign() * w.abs().mean((1, 2, 3), keepdim=True)
        assert torch.equal(conv(x), F.conv2d(x, binary if kind is True else w, None, 2, 1))
    torch.manual_seed(0)
    assert torch.equal(w, nn.Conv2d(3, 5, 3).weight)


@pytest.mark.parametrize("arch, classes, side, map_side, binary, real, published", [
    # net, classes, side, the last map's side, binary weights, real parameters; FLOPs, BOPs, OPs / 1e6
    ("A", 1000, 224, 7, 28_253_184, 1_090_408, ("11.86", "4817", "87.1")),
    ("A", 100, 224, 7, 28_253_184, 167_908, ("10.94", "4817", "86.2")),
    ("A", 100, 32, 2, 28_253_184, 167_908, ("0.99", "393", "7.1")),
    ("18", 1000, 224, 7, 10_985_472, 718_952, ("137.8", "1676", "164.0")),
    ("18", 100, 32, 4, 10_985_472, 249_572, ("8.1", "547", "16.7"))])
def test_nets_have_the_published_sizes_and_operations(arch, classes, side, map_side, binary, real, published):
    with torch.device("meta"):  # shapes without memory
        net = NETS[arch](classes, image_size=side)
        assert net.features(torch.empty(2, 3, side, side)).shape == (2, net.feature_dim, map_side, map_side)
    weights = sum(module.weight.numel() for module in binary_convolutions(net))
    assert (weights, sum(p.numel() for p in net.parameters()) - weights) == (binary, real)
    counts = count_operations(net, side)
    for key, number in zip(("flops", "bops", "ops"), published):
        assert f"{counts[key] / 1e6:.{len(number.partition('.')[2])}f}" == number
    assert counts["ops"] == counts["flops"] + counts["bops"] / 64


@pytest.mark.parametrize("arch, width, map_side", [("A", 256, 3), ("18", 128, 5)])
def test_narrow_nets_take_odd_sides_and_keep_a_channel_and_counting_leaves_them(arch, width, map_side):
    net, twin = (NETS[arch](10, 0.25, 36, binarize) for binarize in (True, False))
    before = {key: value.clone() for key, value in net.state_dict().items()}
    counts, real = (count_operations(each, 36) for each in (net, twin))
    assert real["bops"] == 0 and real["flops"] == counts["flops"] + counts["bops"]
    assert net.training and all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert not any(module._forward_hooks for module in net.modules())
    shape = net.features(torch.randn(1, 3, 36, 36)).shape  # through maps with a side of 9, and then of 5
    assert shape == (1, width, map_side, map_side) and net.feature_dim == width
    for nothing in (0, -1, 0.001, float("nan"), float("inf"), 2.0**31):
        with pytest.raises(ValueError, match="width"):
            NETS[arch](10, nothing)


def test_reactnet_18_starts_large_images_as_resnet_18_does():
    stem, images = randomise(ReActNet18(7, 0.125)).eval().stem, torch.randn(1, 3, 17, 17)
    x = stem[1](F.conv2d(images, stem[0].weight, None, stride=2, padding=3))
    assert torch.equal(stem(images), F.max_pool2d(x, 3, 2, 1))


def test_reactnet_a_computes_its_blocks_and_all_of_it_learns():
    net, images = randomise(ReActNetA(7, 0.125, 32)).eval(), torch.randn(8, 3, 32, 32)
    x = net.stem[1](F.conv2d(images, net.stem[0].weight, None, 1, 1))
    strides = (1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1)
    for i, (block, stride) in enumerate(zip(net.blocks, strides, strict=True)):
        u = block.bn1(block.conv1(block.sign1(x))) + (F.avg_pool2d(x, 2) if stride == 2 else x)
        u, halves = block.act1(u), range(2 if i in (0, 1, 3, 5, 11) else 1)
        v = block.sign2(u)
        x = block.act2(torch.cat([block.bn2[j](block.conv2[j](v)) + u for j in halves], 1))
    torch.testing.assert_close(net.features(images), x, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(net(images), net.classifier(x.mean((2, 3))), rtol=1e-4, atol=1e-4)

    fresh = ReActNetA(5, 0.125, 32)
    F.cross_entropy(fresh(images), torch.arange(8) % 5).backward()
    for name, p in fresh.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.any(), name


@pytest.mark.parametrize("arch, memory_format", [("A", torch.channels_last), ("18", torch.contiguous_format)])
@torch.no_grad()
def test_a_state_fits_every_kind_and_a_packed_one_gives_the_same_logits_bit_for_bit(arch, memory_format):
    net, file = randomise(NETS[arch](7, 0.25, 32)), io.BytesIO()
    binary_convolutions(net)[0].weight[0, :2] = 0  # sign(0) = +1
    torch.save(pack(net.to(memory_format=memory_format)), file)
    file.seek(0)
    images, outputs = torch.randn(5, 3, 32, 32).contiguous(memory_format=memory_format), []
    state, unpacked = net.state_dict(), unpack(torch.load(file, weights_only=True))
    for kind, state in ((True, state), ("activations", unpacked), ("activations", state), (False, state)):
        twin, inputs = NETS[arch](7, 0.25, 32, kind).to(memory_format=memory_format).eval(), []
        twin.load_state_dict(state, strict=True)
        for module in binary_convolutions(twin):
            module.register_forward_pre_hook(lambda m, given: inputs.append(given[0]))
        outputs.append(twin(images))
        assert all(torch.equal(x, x.sign()) == bool(kind) for x in inputs)
    binary, deployed, activations, real = outputs
    assert torch.equal(deployed, binary)
    assert not torch.allclose(binary, activations) and not torch.allclose(activations, real)


def test_reactnet_a_packs_into_4_3_megabytes_and_a_net_of_real_weights_cannot_be_packed():
    file = io.BytesIO()
    torch.save(pack(ReActNetA(100)), file)
    assert 4.2e6 < file.tell() < 4.5e6
    with pytest.raises(ValueError, match="binary"):
        pack(ReActNet18(5, 0.125, 32, binarize=False))
