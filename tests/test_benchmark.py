"""tests/benchmark.py: the peers' nets compute what ours compute, and every row is measured and written."""
import json
import time

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from common.data import load
from common.reactnet import ReActNet18, count_operations
from common.resnet import CifarResNet
from common.vit import MAE, ViT, random_masking
from tests import benchmark, peers

SIZES = dict(image_size=16, patch_size=4, width=24, depth=2, heads=3)
DECODER = dict(decoder_width=16, decoder_depth=1, decoder_heads=2)


@pytest.fixture(scope="module")
def npz(tmp_path_factory):
    path = tmp_path_factory.mktemp("benchmark") / "small.npz"
    benchmark.make_npz(path, counts=[2] * 100, num_test=100)
    return str(path)


def as_peer(peer, values):
    """Our weights, in the order of the peer's, in the peer's net; a patch's pixels have channels last."""
    for name, value in zip(peer.state_dict(), values, strict=True):
        target = peer.state_dict()[name]
        if name == "embed.weight":
            value = value.view(len(value), *target.shape[2:], 3).permute(0, 3, 1, 2)
        assert value.shape == target.shape, name
        target.copy_(value)
    return peer.double()


def assert_same(ours, theirs, images):
    """The same output, and the same gradient for the images."""
    ours_in, theirs_in = images.clone().requires_grad_(), images.clone().requires_grad_()
    out, expected = ours(ours_in), theirs(theirs_in)
    torch.testing.assert_close(out, expected, rtol=1e-8, atol=1e-8)
    weights = torch.randn_like(out)
    (out * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(ours_in.grad, theirs_in.grad, rtol=1e-6, atol=1e-8)
    assert ours_in.grad.abs().max() > 0


@pytest.fixture
def images():
    torch.manual_seed(0)
    return torch.randn(3, 3, 16, 16, dtype=torch.float64)


def test_the_peer_s_resnet_is_ours(images):
    net = nn.Sequential(CifarResNet(32), nn.Linear(64, 7))
    peer = as_peer(peers.ResNet32(7), net.state_dict().values())
    assert_same(net.double(), peer, images)


def test_the_peer_s_binary_net_is_ours(images):
    net = ReActNet18(7, image_size=32)
    for parameter in net.parameters():  # signs' thresholds and activations' shifts start at 0
        if parameter.ndim == 4 and len(parameter) == 1:
            nn.init.normal_(parameter, std=0.2)
    peer = as_peer(peers.TextbookReActNet18(7), net.state_dict().values())
    assert_same(net.double(), peer, images)


def test_the_peer_s_vit_is_ours(images):
    net = ViT(**SIZES, num_classes=7)
    nn.init.normal_(net.head.weight)
    peer = as_peer(peers.TextbookViT(**SIZES, num_classes=7), net.state_dict().values())
    net.double()
    assert_same(lambda x: net(x)[0], peer, images)


def test_the_peer_s_autoencoder_is_ours(images):
    net = MAE(**SIZES, **DECODER)
    state = {name.removeprefix("encoder."): value for name, value in net.state_dict().items()}
    first = ["class_token", "positions", "mask_token", "decoder_positions"]
    peer = as_peer(peers.TextbookMAE(**SIZES, **DECODER),
                   [state.pop(name) for name in first] + list(state.values()))
    net.double()

    def seeded(loss):  # the same masks
        torch.manual_seed(1)
        return loss().view(1)
    keep_restore = lambda: random_masking(3, 16, 0.75)[:2]
    assert_same(lambda x: seeded(lambda: F.mse_loss(*net(x, *keep_restore()))),
                lambda x: seeded(lambda: peer(x)), images)


def test_the_peer_s_loader_crops_flips_and_normalises(npz):
    data = load(npz)
    data.train.images[:] = np.arange(len(data.train), dtype=np.uint8)[:, None, None, None]  # one grey each
    indices = torch.tensor([5, 0, 199, 7])
    for workers, augmentation in ((2, "standard"), (0, "resized")):
        loader = peers.pil_loader(data, 3, indices, workers, augmentation)
        images, targets = (torch.cat(parts) for parts in zip(*loader))
        assert targets.tolist() == [2, 0, 99, 3] and images.shape == (4, 3, 32, 32)
        pixels = images[:, :, 16, 16] * torch.tensor(data.std) + torch.tensor(data.mean)
        torch.testing.assert_close(255 * pixels, indices[:, None].expand(4, 3).float(), rtol=0, atol=1e-3)


def test_the_first_step_is_not_timed():
    def epoch(steps):
        for step in range(steps):
            time.sleep(1.0 if step == 0 else 0.05)
            yield 10
    assert 40 < benchmark.images_per_second(epoch, 4, torch.device("cpu")) <= 200


def test_rows_are_measured_and_written(tmp_path, capsys):
    out = tmp_path / "benchmark.json"
    out.write_text(json.dumps({"cuda": "stays"}))
    rows = benchmark.main(["--quick", "--only", "resnet32", "data", "--rounds", "2", "--no-memory",
                           "--out", str(out)])
    written = json.loads(out.read_text())
    assert written["cuda"] == "stays" and written["cpu"]["rows"] == json.loads(json.dumps(rows))
    goals = [(name, len(benchmark.WORKLOADS[name].goals)) for name in ("resnet32", "data")]
    assert [(name, sum(row["name"] == name for row in rows)) for name, _ in goals] == goals
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert len(lines) == 1 + len(rows) == 5
    for row, line in zip(rows, lines[1:]):
        low, high = row["ratio_range"]
        assert 0 < low <= row["ratio"] <= high and f"{row['ratio']:.2f}" in line and row["workload"] in line
        peer, ours = row["rounds"].values()
        assert len(peer) == len(ours) == 2
        assert sorted(row["ratio_range"]) == pytest.approx(sorted(b / a for a, b in zip(peer, ours)))
        assert row["reached"]["ratio"] == (row["ratio"] >= row["to_reach"]["ratio"])
        assert row["name"] == "data" or all(0 < share < 2 for share in row["share_of_floor"])
    net = nn.Sequential(CifarResNet(32), nn.Linear(64, 100))
    macs, first = count_operations(net, 32)["flops"], 3 * 16 * 9 * 32 * 32
    # forwards, and backwards for weights and inputs, but for the images
    assert rows[0]["gflop_per_image"][0] == pytest.approx(2 * (3 * macs - first) / 1e9, rel=1e-6)
    assert rows[0]["gflop_per_image"][1] == pytest.approx(rows[0]["gflop_per_image"][0], rel=1e-3)


def test_peak_memory_is_that_of_the_steps_alone(npz):
    how = (benchmark.peak_memory, "resnet32", "ours, fp32", npz, "cpu")
    small, large = (benchmark.in_new_process(*how, size) for size in (8, 56))
    # 31 times a convolution's output, its norm's and (half of them) a ReLU's: at least 16 x 32 x 32 floats of
    # an image in the first third, half and a quarter of that in the others
    activations = 48 * 4 * 16 * 32 * 32 * 10 * (1 + 1 / 2 + 1 / 4) * 2 / 2**20
    assert large - small > 0.8 * activations and small < 400


def test_a_whole_schedule_is_a_run_of_cbd(npz):
    row, = benchmark.schedule(npz, torch.device("cpu"), epochs=1, peer_steps=1, flags=["--no-compile"])
    assert 0 < row["seconds"] < row["whole_run_seconds"] and row["reached"]["seconds"]
    peer, ours = row["images_per_second"]
    assert row["ratio"] == pytest.approx(ours / peer) and ours == pytest.approx(200 / row["seconds"])
    assert "training" in benchmark.table_line(row)


@pytest.mark.parametrize("flags", [["--rounds", "0"], ["--only", "schedule"], ["--only", "unknown"],
                                   ["--out", "no/such/folder.json"]])
def test_bad_flags_are_refused(flags, capsys):
    with pytest.raises(SystemExit) as stopped:
        benchmark.main(flags)
    assert stopped.value.code == 2 and capsys.readouterr().err.startswith("error: ")
