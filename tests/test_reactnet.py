"""The room common/reactnet.py: sign, binary convolution, nets, counts, packing."""
import io

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from common.reactnet import BinaryConv2d, ReActNet18, ReActNetA, RPReLU, RSign, count_operations, pack, unpack

NETS = {"A": ReActNetA, "18": ReActNet18}


def randomise(net, seed=0):
    """Every learnable number and running statistic away from its start, so that a misplaced one shows."""
    torch.manual_seed(seed)
    for name, value in [*net.named_parameters(), *net.named_buffers()]:
        if name.endswith("running_var"):
            value.data.uniform_(0.5, 1.5)
        elif value.ndim == 1 or value.ndim == 4 and value.shape[0] == 1:
            value.data.add_(0.2 * torch.randn_like(value.float())).float()
    return net


# ---------------------------------------------------------------- sign

def test_sign_has_the_gradient_of_the_piecewise_polynomial():
    x = torch.tensor([-1.5, -1.0, -0.5, -0.25, 0.0, 0.5, 1.0, 1.5], requires_grad=True)
    sign = RSign(1)
    out = sign(x.view(1, 1, 1, -1))
    assert out.flatten().tolist() == [-1, -1, -1, -1, 0, 1, 1, 1]  # sign(0) = 0
    out.sum().backward()
    assert x.grad.tolist() == [0, 0, 1, 1.5, 2, 1, 0, 0]
    assert sign.bias.grad.item() == 5.5  # the same gradient, summed over the channel


def textbook_sign(x):
    """Bi-Real Net as it is usually written: sign forwards, the polynomial's graph backwards."""
    polynomial = torch.where(x < -1, -1.0, torch.where(x < 0, x * x + 2 * x,
                                                       torch.where(x < 1, 2 * x - x * x, torch.ones_like(x))))
    return x.sign().detach() - polynomial.detach() + polynomial


def test_rsign_is_the_textbook_s_and_thresholds_at_minus_b():
    torch.manual_seed(0)
    sign, x = RSign(3), 1.5 * torch.randn(4, 3, 5, 5)
    nn.init.normal_(sign.bias)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    weight, bias = torch.randn_like(x), sign.bias.detach().clone().requires_grad_()
    out, expected = sign(ours), textbook_sign(theirs + bias)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-6)
    (out * weight).sum().backward()
    (expected * weight).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)
    torch.testing.assert_close(sign.bias.grad, bias.grad, rtol=1e-4, atol=1e-4)
    assert torch.equal(out > 0, x > -sign.bias)
    assert torch.equal(RSign(3, binarize=False)(x), x)


def saved_numbers(function, x):
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        function(x)
    return sum(sizes)


def test_sign_saves_one_tensor_and_not_a_graph():
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    assert saved_numbers(RSign(3), x) == x.numel()
    assert saved_numbers(textbook_sign, x) > 3 * x.numel()


@pytest.mark.parametrize("make", [lambda: RSign(4), lambda: RPReLU(4)])
def test_pieces_keep_bf16(make):
    x = torch.randn(2, 4, 3, 3).bfloat16().requires_grad_()
    out = make()(x)
    out.float().sum().backward()
    assert out.dtype == x.grad.dtype == torch.bfloat16


def test_rprelu_moves_bends_and_moves():
    act = RPReLU(2)
    assert act(torch.tensor([-4.0, 3.0]).view(1, 2, 1, 1)).flatten().tolist() == [-1, 3]
    with torch.no_grad():
        act.before.copy_(torch.tensor([1.0, -5.0]).view(1, 2, 1, 1))
        act.slope.copy_(torch.tensor([0.25, 0.5]))
        act.after.copy_(torch.tensor([10.0, 20.0]).view(1, 2, 1, 1))
    x = torch.tensor([[-3.0, 1.0], [4.0, 7.0]]).view(1, 2, 1, 2)  # [1, 2 channels, 1, 2]
    assert act(x).flatten().tolist() == [-0.5 + 10, 2 + 10, -0.5 + 20, 2 + 20]


# ---------------------------------------------------------------- binary convolution

def binary_conv(kernel=3, stride=1, seed=0):
    torch.manual_seed(seed)
    conv = BinaryConv2d(4, 6, kernel, stride, kernel // 2)
    with torch.no_grad():
        conv.weight.mul_(8 / conv.weight.std() / 8)  # some |w| above 1
        conv.weight[2, 1] = 0
    return conv


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_rprelu_has_torch_s_gradients(memory_format):
    torch.manual_seed(0)
    act, x = RPReLU(3).double(), torch.randn(4, 3, 5, 5, dtype=torch.double)
    x[0, :, 0] = 0  # at 0 torch takes the slope
    x = x.contiguous(memory_format=memory_format).requires_grad_()
    weights = torch.randn_like(x)
    sources = (x, act.before, act.slope, act.after)
    ours = torch.autograd.grad((act(x) * weights).sum(), sources)
    textbook = F.prelu(x + act.before, act.slope) + act.after
    for a, b in zip(ours, torch.autograd.grad((textbook * weights).sum(), sources), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kernel, stride", [(3, 1), (3, 2), (1, 1)])
def test_a_binary_convolution_is_the_mean_size_times_the_sign_of_w(kernel, stride):
    conv, x = binary_conv(kernel, stride), torch.randn(2, 4, 6, 6).sign()
    weight = torch.empty_like(conv.weight)
    for o in range(6):
        scale = sum(abs(v) for v in conv.weight[o].flatten().tolist()) / conv.weight[o].numel()
        for i in range(4):
            for a in range(kernel):
                for b in range(kernel):
                    weight[o, i, a, b] = scale if conv.weight[o, i, a, b] >= 0 else -scale  # sign(0) = +1
    torch.testing.assert_close(conv(x), F.conv2d(x, weight, None, stride, kernel // 2))
    assert conv.bias is None


def test_its_gradient_is_a_convolution_s_masked_at_one_and_not_multiplied_by_the_mean_size():
    conv, x = binary_conv(), torch.randn(2, 4, 6, 6).sign()
    gradient = torch.randn(2, 6, 6, 6)
    (conv(x) * gradient).sum().backward()
    of_convolution = torch.nn.grad.conv2d_weight(x, conv.weight.shape, gradient, padding=1)
    passes = conv.weight.detach().abs() <= 1
    assert passes.any() and not passes.all()
    torch.testing.assert_close(conv.weight.grad, of_convolution * passes)
    small = binary_conv()
    with torch.no_grad():
        small.weight.mul_(0.01)
    (small(x) * gradient).sum().backward()
    torch.testing.assert_close(small.weight.grad, of_convolution)  # 100 times smaller weights, the same


def test_without_binarisation_it_is_a_convolution():
    for kind in (False, "activations"):
        conv = BinaryConv2d(3, 5, 3, 2, 1, binarize=kind)
        x = torch.randn(2, 3, 8, 8)
        assert torch.equal(conv(x), F.conv2d(x, conv.weight, None, 2, 1))
    torch.manual_seed(0)
    ours = BinaryConv2d(3, 5, 3).weight
    torch.manual_seed(0)
    assert torch.equal(ours, nn.Conv2d(3, 5, 3, bias=False).weight)  # starts as Conv2d does


# ---------------------------------------------------------------- sizes

SIZES = [  # net, classes, side, binary weights, real parameters, FLOPs / 1e6, BOPs / 1e9, OPs / 1e6
    ("A", 1000, 224, 28_253_184, 1_090_408, 11.86, 4.817, 87.1),
    ("A", 100, 224, 28_253_184, 167_908, 10.94, 4.817, 86.2),
    ("A", 100, 32, 28_253_184, 167_908, 0.99, 0.393, 7.1),
    ("18", 1000, 224, 10_985_472, 718_952, 137.8, 1.676, 164.0),
    ("18", 100, 32, 10_985_472, 249_572, 8.1, 0.547, 16.7)]


@pytest.mark.parametrize("arch, classes, side, binary, real, flops, bops, ops", SIZES)
def test_nets_have_the_published_sizes_and_operations(arch, classes, side, binary, real, flops, bops, ops):
    with torch.device("meta"):  # shapes without memory
        net = NETS[arch](classes, image_size=side)
    sizes = {True: 0, False: 0}
    for module in net.modules():
        for p in module.parameters(recurse=False):
            sizes[isinstance(module, BinaryConv2d)] += p.numel()
    assert (sizes[True], sizes[False]) == (binary, real)
    counts = count_operations(net, side)
    digits = lambda value, text: f"{value:.{len(str(text).split('.')[1])}f}" == str(text)
    assert digits(counts["flops"] / 1e6, flops) and digits(counts["bops"] / 1e9, bops)
    assert digits(counts["ops"] / 1e6, ops)
    assert counts["ops"] == counts["flops"] + counts["bops"] / 64


@pytest.mark.parametrize("arch, side, map_side", [
    ("A", 224, 7), ("A", 32, 2), ("18", 224, 7), ("18", 32, 4), ("A", 36, 3), ("18", 36, 5)])
def test_maps_have_their_width_and_side(arch, side, map_side):
    with torch.device("meta"):
        net = NETS[arch](10, width=0.25, image_size=side)
        images = torch.empty(2, 3, side, side)
        assert net.features(images).shape == (2, net.feature_dim, map_side, map_side)
        assert net.feature_dim == {"A": 256, "18": 128}[arch] and net(images).shape == (2, 10)


def test_counting_leaves_a_net_as_it_was():
    net = ReActNet18(5, 0.125, 32)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    real = count_operations(ReActNet18(5, 0.125, 32, binarize=False), 32)
    assert real["bops"] == 0 and real["flops"] == sum(count_operations(net, 32)[key]
                                                      for key in ("flops", "bops"))
    assert net.training and all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert not any(module._forward_hooks for module in net.modules())


@pytest.mark.parametrize("width", [0, -1, 0.001, float("nan"), float("inf")])
def test_a_width_without_channels_is_refused(width):
    for net in NETS.values():
        with pytest.raises(ValueError, match="width"):
            net(10, width)


# ---------------------------------------------------------------- nets, computed by hand from the state

def by_hand(state):
    norm = lambda x, name: F.batch_norm(x, state[f"{name}.running_mean"], state[f"{name}.running_var"],
                                        state[f"{name}.weight"], state[f"{name}.bias"])
    sign = lambda x, name: (x + state[f"{name}.bias"]).sign()

    def conv(x, name, stride=1):
        w = state[f"{name}.weight"]
        w = w.sign() * w.abs().mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, w, None, stride, w.shape[-1] // 2)

    def act(x, name):
        x = x + state[f"{name}.before"]
        return torch.where(x > 0, x, state[f"{name}.slope"].view(1, -1, 1, 1) * x) + state[f"{name}.after"]
    return norm, sign, conv, act


def test_reactnet_a_computes_its_blocks():
    net = randomise(ReActNetA(7, 0.125, 32)).eval()
    norm, sign, conv, act = by_hand(net.state_dict())
    images = torch.randn(1, 3, 32, 32)
    x = norm(F.conv2d(images, net.stem[0].weight, None, 1, 1), "stem.1")
    strides, doubles = (1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1), (0, 1, 3, 5, 11)
    for i, stride in enumerate(strides):
        b = f"blocks.{i}"
        u = norm(conv(sign(x, f"{b}.sign1"), f"{b}.conv1", stride), f"{b}.bn1")
        u = act(u + (F.avg_pool2d(x, 2) if stride == 2 else x), f"{b}.act1")
        v = sign(u, f"{b}.sign2")
        halves = 2 if i in doubles else 1
        x = act(torch.cat([norm(conv(v, f"{b}.conv2.{j}"), f"{b}.bn2.{j}") + u for j in range(halves)], 1),
                f"{b}.act2")
    assert x.shape == (1, 128, 2, 2)
    with torch.no_grad():
        torch.testing.assert_close(net.features(images), x, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(net(images), net.classifier(x.mean((2, 3))), rtol=1e-4, atol=1e-4)


def test_reactnet_18_computes_its_blocks():
    net = randomise(ReActNet18(7, 0.125, 224)).eval()
    state = net.state_dict()
    norm, sign, conv, act = by_hand(state)
    images = torch.randn(1, 3, 96, 96)
    x = norm(F.conv2d(images, state["stem.0.weight"], None, 2, 3), "stem.1")
    x = F.max_pool2d(x, 3, 2, 1)
    for i in range(16):
        b, stride = f"blocks.{i}", 2 if i in (4, 8, 12) else 1
        shortcut = x if stride == 1 else norm(F.conv2d(F.avg_pool2d(x, 2), state[f"{b}.shortcut.1.weight"]),
                                              f"{b}.shortcut.2")  # a real convolution
        x = act(norm(conv(sign(x, f"{b}.sign"), f"{b}.conv", stride), f"{b}.bn") + shortcut, f"{b}.act")
    assert x.shape == (1, 64, 3, 3)
    with torch.no_grad():
        torch.testing.assert_close(net.features(images), x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("arch", NETS)
def test_a_state_loads_strictly_into_every_kind_of_binarisation(arch):
    images, outputs = torch.randn(2, 3, 32, 32), []
    state = randomise(NETS[arch](5, 0.125, 32)).state_dict()
    for binarize in (True, "activations", False):
        net = NETS[arch](5, 0.125, 32, binarize).eval()
        net.load_state_dict(state, strict=True)
        signs = []
        for module in net.modules():
            if isinstance(module, BinaryConv2d):
                module.register_forward_hook(
                    lambda m, inputs, out: signs.append(set(inputs[0].unique().tolist())))
        outputs.append(net(images))
        assert all((values <= {-1, 0, 1}) == bool(binarize) for values in signs)
    assert not torch.allclose(outputs[0], outputs[1]) and not torch.allclose(outputs[1], outputs[2])


@pytest.mark.parametrize("arch", NETS)
def test_every_parameter_of_a_binary_net_gets_a_gradient(arch):
    torch.manual_seed(0)
    net = NETS[arch](5, 0.125, 32)
    F.cross_entropy(net(torch.randn(8, 3, 32, 32)), torch.arange(8) % 5).backward()
    for name, p in net.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.any(), name


# ---------------------------------------------------------------- packing

@pytest.mark.parametrize("arch", NETS)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
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
    for name, module in net.named_modules():  # and its weights are those signs, not the real ones
        if isinstance(module, BinaryConv2d):
            weight = deployed.get_submodule(name).weight
            assert torch.equal(weight >= 0, module.weight >= 0)
            assert (weight.abs() == weight.abs()[:, :1, :1, :1]).all()


def test_reactnet_a_packs_into_4_3_megabytes():
    file = io.BytesIO()
    torch.save(pack(ReActNetA(100)), file)
    assert 4.2e6 < file.tell() < 4.5e6


def test_a_net_of_real_weights_cannot_be_packed():
    with pytest.raises(ValueError, match="binary"):
        pack(ReActNet18(5, 0.125, 32, binarize=False))
