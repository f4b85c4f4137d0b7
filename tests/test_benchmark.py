"""tests/benchmark.py: the peers' nets compute what ours compute, and every row is measured and written."""
import json
import time
from concurrent.futures import ProcessPoolExecutor

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
from tests.tiny import FORK

CPU = torch.device("cpu")
SIZES = dict(image_size=16, patch_size=4, width=24, depth=2, heads=3)
DECODER = dict(decoder_width=16, decoder_depth=1, decoder_heads=2)
NETS = {  # ours and the peer's
    "ResNet-32": lambda: (nn.Sequential(CifarResNet(32), nn.Linear(64, 7)), peers.resnet32(7)),
    "ReActNet-18": lambda: (ReActNet18(7, 0.125, image_size=32), peers.reactnet18(7, width=8)),
    "ViT": lambda: (ViT(**SIZES, num_classes=7), peers.TextbookViT(**SIZES, num_classes=7)),
    "MAE": lambda: (MAE(**SIZES, **DECODER), peers.TextbookMAE(**SIZES, **DECODER))}


@pytest.fixture(scope="module")
def npz(tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmark")
    return benchmark.make_npz(folder / "small.npz", counts=[2] * 100, num_test=100)


def output(net, images):
    """Logits, or an autoencoder's loss under seeded masks."""
    torch.manual_seed(1)
    if isinstance(net, MAE):
        return F.mse_loss(*net(images, *random_masking(len(images), 16, 0.75)[:2]))
    return net(images)[0] if isinstance(net, ViT) else net(images)


@pytest.mark.parametrize("name", NETS)
def test_the_peer_s_net_is_ours(name):
    """The same output, and the same gradients for the images and for every weight."""
    torch.manual_seed(0)
    net, peer = (each.double() for each in NETS[name]())
    for parameter in net.parameters():  # nothing at its start; some binary weights above 1
        parameter.data += 0.3 * torch.randn_like(parameter)
    # in the order of the peer's state, which has kernels where ours has rows of a patch's pixels
    state = net.state_dict()
    names = sorted(state, key=lambda key: key not in ("encoder.class_token", "encoder.positions"))
    kernel = lambda key, x: x.view(-1, 4, 4, 3).permute(0, 3, 1, 2) if key == "embed.weight" else x
    pairs = dict(zip(peer.state_dict(), names, strict=True))
    peer.load_state_dict({key: kernel(key, state[own]) for key, own in pairs.items()})

    images = torch.randn(3, 3, 16, 16, dtype=torch.float64)
    inputs = [images.clone().requires_grad_() for _ in range(2)]
    outputs = [output(each, given) for each, given in zip((net, peer), inputs)]
    torch.testing.assert_close(*outputs, rtol=1e-8, atol=1e-8)
    weights = torch.randn_like(outputs[0])
    for each in outputs:
        (each * weights).sum().backward()
    learnt = [(key, weight) for key, weight in peer.named_parameters() if weight.requires_grad]
    ours = [inputs[0].grad, *(kernel(key, net.get_parameter(pairs[key]).grad) for key, _ in learnt)]
    theirs = [inputs[1].grad, *(weight.grad for _, weight in learnt)]
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)
    assert inputs[0].grad.any()


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


def test_rows_are_measured_and_written(tmp_path, capsys):
    out = tmp_path / "benchmark.json"
    out.write_text(json.dumps({"cuda": "stays"}))
    rows = benchmark.main(["--quick", "--only", "resnet32", "data", "--rounds", "2", "--out", str(out)])
    written = json.loads(out.read_text())
    assert written["cuda"] == "stays" and written["cpu"]["rows"] == json.loads(json.dumps(rows))
    expected = [name for name in ("resnet32", "data") for _ in benchmark.WORKLOADS[name].goals]
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [row["name"] for row in rows] == expected and len(lines) == 1 + len(rows) == 5
    for row, line in zip(rows, lines[1:]):
        low, high = row["ratio_range"]
        assert 0 < low <= row["ratio"] <= high and f"{row['ratio']:.2f}" in line and row["workload"] in line
        peer, ours = row["rounds"].values()
        assert len(peer) == len(ours) == 2
        assert sorted(row["ratio_range"]) == pytest.approx(sorted(b / a for a, b in zip(peer, ours)))
        assert row["reached"]["ratio"] == (row["ratio"] >= row["to_reach"]["ratio"])
        assert row["name"] == "data" or all(0 < share < 2 for share in row["share_of_floor"])
    macs = count_operations(nn.Sequential(CifarResNet(32), nn.Linear(64, 100)), 32)["flops"]
    # forwards, and backwards for weights and inputs, but for the images
    flops = 2 * (3 * macs - 3 * 16 * 9 * 32 * 32) / 1e9
    assert rows[0]["gflop_per_image"] == [pytest.approx(flops, rel=1e-6), pytest.approx(flops, rel=1e-3)]


def test_speed_is_without_the_first_step_and_peak_memory_that_of_the_steps_alone(npz):
    def epoch(steps):
        for step in range(steps):
            time.sleep(1.0 if step == 0 else 0.05)
            yield 10
    assert 40 < benchmark.images_per_second(epoch, 4, CPU) <= 200
    with ProcessPoolExecutor(1, FORK) as pool:
        peak = pool.submit(benchmark.peak_memory, "resnet32", "ours, fp32", npz, "cpu", 56).result()
    # 31 times a convolution's output, its norm's and (half of them) a ReLU's: at least 16 x 32 x 32 floats of
    # an image in the first third, half and a quarter of that in the others
    activations = 56 * 4 * 16 * 32 * 32 * 10 * (1 + 1 / 2 + 1 / 4) * 2 / 2**20
    assert activations < peak < 3 * activations  # imports alone are more


def test_a_whole_schedule_is_a_run_of_cbd(npz):
    row, = benchmark.schedule(npz, CPU, epochs=1, peer_steps=1, flags=["--no-compile"])
    assert 0 < row["seconds"] < row["whole_run_seconds"] and row["reached"]["seconds"]
    peer, ours = row["images_per_second"]
    assert row["ratio"] == pytest.approx(ours / peer) and ours == pytest.approx(200 / row["seconds"])
    assert "training" in benchmark.table_line(row)


def test_bad_flags_are_refused(capsys):
    for flags in ("--rounds 0", "--only schedule", "--only unknown", "--out no/such/folder.json"):
        with pytest.raises(SystemExit) as stopped:
            benchmark.main(flags.split())
        assert stopped.value.code == 2 and capsys.readouterr().err.startswith("error: "), flags
