"""The baseline of LDAM-DRW: its schedule, its net, and a run that is cut and goes on."""
import json
import os

import pytest
import torch

from tests import anchor
from tests.tiny import tiny_npz


def run(folder, name, *flags):
    return anchor.main(anchor.parse_args(["--dataset", str(folder / "tiny.npz"), "--epochs", "2", "--resume",
                                          "--out", str(folder / name), *flags]))


def test_learning_rates_and_the_net_are_ldam_drw_s():
    expected = {1: 0.02, 2: 0.04, 5: 0.1, 6: 0.1, 160: 0.1, 161: 1e-3, 180: 1e-3, 181: 1e-5, 200: 1e-5}
    assert {epoch: anchor.step_lr(epoch) for epoch in expected} == pytest.approx(expected)
    assert sum(p.numel() for p in anchor.build_net(10).parameters()) == 464_154
    torch.manual_seed(0)
    assert anchor.build_net(100)[1].weight.var().item() == pytest.approx(2 / 64, rel=0.1)  # Kaiming normal


def test_a_run_cut_at_each_of_its_writes_ends_as_an_unbroken_one_and_is_left_alone(tmp_path, monkeypatch):
    tiny_npz(tmp_path / "tiny.npz", counts=(8, 100, 3, 30, 12), size=4)  # two batches, the second one smaller
    whole, replace = run(tmp_path, "whole"), os.replace
    assert whole["all"] == whole["stages"][0]["all"] and whole["epoch"] == 2
    # before epoch 1 is saved; before its line is in the log; before epoch 2 is saved; before the result
    for number in (1, 2, 1, 3):
        left = iter([replace] * (number - 1))
        with monkeypatch.context() as patch, pytest.raises(StopIteration):
            patch.setattr(os, "replace", lambda *paths: next(left)(*paths))
            run(tmp_path, "cut")
    run(tmp_path, "cut")
    folders = tmp_path / "whole", tmp_path / "cut"
    nets = [torch.load(folder / "last.pt", weights_only=True)["net"] for folder in folders]
    assert all(torch.equal(nets[0][key], nets[1][key]) for key in nets[0])
    logs = [[*map(json.loads, (folder / "log.jsonl").read_text().splitlines())] for folder in folders]
    for log in logs:
        assert all(row.pop("seconds") > 0 for row in log[1:])
        assert [row.get("lr") for row in log] == [None, 0.02, 0.04]
    assert logs[0][1:] == logs[1][1:]
    for flags in (["--no-resume"], ["--seed", "1"]):
        with pytest.raises(ValueError, match="holds a run of"):
            run(tmp_path, "cut", *flags)
