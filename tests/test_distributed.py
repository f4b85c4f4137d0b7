"""Two processes under torchrun give one process's numbers."""
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parent.parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def images_npz(path, num_images=37, num_test=11):
    generator = np.random.default_rng(0)
    targets = np.concatenate([[0, 1, 2], generator.integers(0, 3, num_images - 3)])
    images = generator.integers(0, 256, (num_images, 8, 8, 3), dtype=np.uint8)
    np.savez(path, x_train=images, y_train=targets, x_test=images[:num_test],
             y_test=targets[:num_test])


def train(tmp_path, name, processes, method, *flags):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)] \
        if processes > 1 else []
    command = [sys.executable, *launcher, str(ROOT / "tests" / "run_without_batch_norm.py"), method,
               "--dataset", str(tmp_path / "images.npz"), "--epochs", "2", "--lr", "0.003", "--no-amp",
               "--device", "cpu", "--evaluate-every", "1", "--out", str(tmp_path / name), *flags]
    subprocess.run(command, check=True, env=ENVIRONMENT, timeout=300)
    lines = [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()[1:]]
    file = "student.pt" if method == "cbd" else "model.pt"
    weights = torch.load(tmp_path / name / file, weights_only=True)["state_dict"]
    return lines, weights, json.loads((tmp_path / name / "result.json").read_text())


FLAGS = {"cbd": ["--teachers", "2", "--arch", "resnet14"],
         # without the losses that look at all of a rank's part of a batch
         "async_lt": ["--arch", "resnet14", "--phase-two-epochs", "2", "--phase-one-classes", "2",
                      "--memory-per-class", "3", "--no-retentive", "--no-margin", "--no-plain"],
         # without what each rank draws for itself
         "livt": ["--width", "16", "--depth", "2", "--heads", "2", "--patch-size", "4", "--image-size", "8",
                  "--from-scratch", "--augment", "plain", "--drop-path", "0", "--loss", "balanced-bce"]}


# 37 images: the last batch holds 5 (3 and 2 a rank), or 1 (fewer than there are ranks)
# 12 = 2 ranks x 3 parts x 2
@pytest.mark.parametrize("method, batch_size, accumulation", [
    ("cbd", "8", "1"), ("cbd", "12", "3"), ("async_lt", "12", "3"), ("livt", "12", "3")])
def test_two_ranks_give_one_process_losses_weights_and_scores(tmp_path, method, batch_size, accumulation):
    images_npz(tmp_path / "images.npz")
    flags = [method, *FLAGS[method], "--batch-size", batch_size]
    lines, weights, result = train(tmp_path, "one", 1, *flags)
    lines2, weights2, result2 = train(tmp_path, "two", 2, *flags, "--grad-accumulation", accumulation)
    assert [line["stage"] for line in lines] == [line["stage"] for line in lines2]
    for one, two in zip(lines, lines2):
        assert one["loss"] == pytest.approx(two["loss"], abs=1e-5)
        assert one["per_class_accuracy"] == two["per_class_accuracy"]
    for name in weights:
        assert torch.allclose(weights[name], weights2[name], atol=1e-5), name
    for stage, stage2 in zip(result["stages"], result2["stages"]):
        assert stage["all"] == stage2["all"] and stage.get("ncm") == pytest.approx(stage2.get("ncm"))
        assert stage["ece"] == pytest.approx(stage2["ece"], abs=1e-3)


def test_every_stage_of_livt_and_async_lt_ends_on_two_ranks_that_share_one_test_image(tmp_path):
    images_npz(tmp_path / "images.npz", num_test=1)
    flags = [flag for flag in FLAGS["livt"] if flag != "--from-scratch"]
    _, _, result = train(tmp_path, "livt", 2, "livt", *flags, "--mgp-epochs", "1", "--mgp-batch-size", "8",
                         "--decoder-width", "16", "--decoder-depth", "1", "--decoder-heads", "2")
    assert [stage["name"] for stage in result["stages"]] == ["mgp", "balanced-bce, Bayes decoding",
                                                             "balanced-bce"]
    flags = [flag for flag in FLAGS["async_lt"] if not flag.startswith("--no-")]
    _, _, result = train(tmp_path, "async_lt", 2, "async_lt", *flags)
    assert len(result["stages"]) == 3 and all(0 <= stage["all"] <= 100 for stage in result["stages"])


def test_ranks_that_end_right_after_a_transfer_end_well(tmp_path):
    # where gloo's threads still hold a tensor, one end in ten aborted, or hung, on a busy machine
    script = tmp_path / "script.py"
    script.write_text(f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import torch
from common import ranks
ranks.start_ranks("cpu")
for i in range(300):
    total = ranks.sum_ranks(torch.ones(1000))
sys.exit(int(total[0]) - 2)
""")
    for _ in range(3):
        subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node",
                        "2", str(script)], check=True, env=ENVIRONMENT, timeout=60)
