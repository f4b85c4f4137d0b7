"""The house's own rules: layout, imports, sizes, losses that copy out, README commands that parse."""
import ast
import importlib
import inspect
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.tiny import METHODS, noise_npz, tiny_flags

ROOT = Path(__file__).parent.parent
SOURCES = [*(ROOT / f"{name}.py" for name in METHODS), *sorted((ROOT / "common").rglob("*.py"))]
PURE = {  # samplers, losses, schedules: method -> names
    "cbd": ["instance_indices", "class_balanced_indices", "feature_distillation_loss", "cbd_loss",
            "classifier_distillation_loss", "cosine_lr"],
    "async_lt": ["progressive_probabilities", "weighted_indices", "select_exemplars", "memory_retentive_loss",
                 "margin_loss", "step_lr", "cosine_lr"],
    "livt": ["instance_indices", "balanced_bce_loss", "balanced_ce_loss", "bayes_decode", "warmup_cosine_lr"],
    "candle": ["equal_class_indices", "label_aware_smoothing_loss", "distillation_kl",
               "feature_similarity_loss", "cosine_lr"],
}


def imported_modules(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


def module_level_imports(path):
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


def test_requirements_are_the_card_s_five_packages():
    required = (ROOT / "requirements.txt").read_text().split()
    assert required == ["torch", "torchvision", "numpy", "tqdm", "pytest"]


def test_sources_import_only_the_card_s_packages():
    card = sys.stdlib_module_names | {"torch", "torchvision", "numpy", "tqdm", "common"}
    for path in SOURCES:
        optional = {"pretrained": {"timm", "safetensors", "huggingface_hub"},
                    "figure": {"matplotlib"}}.get(path.stem, set())
        allowed = card | optional
        for module in imported_modules(path):
            assert module.split(".")[0] in allowed | {"PIL"}, (path, module)  # PIL comes with torchvision


# room -> its floor: it may import rooms of lower floors alone. All others are on the first
FLOORS = {"builders": 2, "folder": 2, "pretrained": 2, "stop": 2, "summary": 2, "workers": 2, "data": 3,
          "loader": 3, "plot": 3, "student": 3, "flags": 4, "predict": 5, "run": 5}


def test_rooms_import_no_method_and_only_lower_floors():
    for path in SOURCES:
        modules = set(imported_modules(path))
        tops = {module.split(".")[0] for module in modules}
        assert not tops & {"cbd", "async_lt", "livt", "candle"}, path
        if path.parent.name == "common":
            rooms = {module.split(".")[1] for module in modules if module.startswith("common.")}
            assert all(FLOORS.get(room, 1) < FLOORS.get(path.stem, 1) for room in rooms), (path, rooms)


def test_torchvision_is_imported_only_inside_what_needs_it():
    for path in SOURCES:
        assert not any(m.split(".")[0] in ("torchvision", "PIL", "timm", "safetensors", "huggingface_hub",
                                          "matplotlib")
                       for m in module_level_imports(path)), path


def test_lines_are_at_most_110_columns():
    for path in SOURCES:
        long = [i for i, line in enumerate(path.read_text().splitlines(), 1) if len(line) > 110]
        assert not long, (path, long)


@pytest.mark.parametrize("method, lines", [("cbd", 380), ("async_lt", 400), ("livt", 400), ("candle", 440)])
def test_a_script_is_short_and_begins_with_its_commands(method, lines):
    text = (ROOT / f"{method}.py").read_text().splitlines()
    assert len(text) <= lines
    assert any(line.startswith(f"    python {method}.py") for line in text[:12])


def functions(path):
    """(name, parameters without self, lines) of every function in a file; a class's __init__ has its name."""
    for node in ast.walk(ast.parse(path.read_text())):
        for inner in getattr(node, "body", []) if isinstance(node, (ast.Module, ast.ClassDef)) else []:
            if isinstance(inner, ast.FunctionDef):
                arguments = inner.args
                names = [each.arg for each in
                         (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
                owner = f"{node.name}." if isinstance(node, ast.ClassDef) else ""
                yield owner + inner.name, [name for name in names if name != "self"], \
                    inner.end_lineno - inner.lineno + 1


def test_no_function_is_longer_than_60_lines():
    for path in SOURCES:
        assert not [name for name, _, lines in functions(path) if lines > 60], path


STILL = {"longtail.Dataset.__init__", "run.Run.epochs", "run.Epoch.__init__"}  # to become shorter


def test_no_function_of_common_takes_more_than_7_parameters_but_for_nets():
    rooms = [path for path in SOURCES if path.parent.name == "common"]
    many = {f"{path.stem}.{name}" for path in rooms if path.stem not in ("resnet", "reactnet", "vit")
            for name, parameters, _ in functions(path) if len(parameters) > 7}
    assert many == STILL


@pytest.mark.parametrize("method, name", [(method, name) for method in METHODS for name in PURE[method]])
def test_a_sampler_loss_or_schedule_runs_from_its_own_source_alone(method, name):
    function = getattr(importlib.import_module(method), name)
    namespace = {}
    imports = "import math\nimport torch\nimport torch.nn.functional as F\n"
    exec(imports + inspect.getsource(function), namespace)
    torch.manual_seed(0)
    logits, features, targets = torch.randn(2, 6, 4), torch.randn(2, 6, 8), torch.tensor([0, 1, 2, 3, 0, 0])
    generator = lambda: torch.Generator().manual_seed(0)
    arguments = {
        "instance_indices": lambda: (targets, generator()),
        "class_balanced_indices": lambda: (targets, generator()),
        "equal_class_indices": lambda: (targets, generator()),
        "feature_distillation_loss": lambda: tuple(features),
        "cbd_loss": lambda: (logits[0], targets, *features),
        "classifier_distillation_loss": lambda: (logits[0], targets, logits[1]),
        "cosine_lr": lambda: (0.3, 0.1),
        "progressive_probabilities": lambda: (torch.tensor([5, 3, 1]), 0.3),
        "weighted_indices": lambda: (targets, torch.ones(4) / 4, generator()),
        "select_exemplars": lambda: (features[0], 3),
        "memory_retentive_loss": lambda: tuple(features),
        "margin_loss": lambda: (logits[0], targets, 2),
        "step_lr": lambda: (0.85, 0.1, [0.8, 0.9], 0.01),
        "balanced_bce_loss": lambda: (logits[0], targets, torch.tensor([5, 4, 2, 1]), 1.05),
        "balanced_ce_loss": lambda: (logits[0], targets, torch.tensor([5, 4, 2, 1]), 1.05),
        "bayes_decode": lambda: (logits[0], torch.tensor([5, 4, 2, 1]), 1.05),
        "warmup_cosine_lr": lambda: (3.5, 10, 2, 0.1),
        "label_aware_smoothing_loss": lambda: (logits[0], targets, torch.tensor([5, 4, 2, 1]), 0.3, 0.1),
        "distillation_kl": lambda: tuple(logits),
        "feature_similarity_loss": lambda: tuple(features.view(2, 6, 2, 2, 2))}[name]
    alone, ours = namespace[name](*arguments()), function(*arguments())
    assert torch.equal(torch.as_tensor(alone), torch.as_tensor(ours))


def test_every_loss_sampler_and_schedule_is_in_the_test_above():
    for method in METHODS:
        module = importlib.import_module(method)
        own = [name for name, value in vars(module).items() if getattr(value, "__module__", "") == method]
        endings = r"_(loss|indices|lr|adjusted|probabilities|exemplars|decode|kl)$"
        pure = {name for name in own if re.search(endings, name)}
        assert pure == set(PURE[method])


def test_every_public_name_has_a_docstring():
    for path in SOURCES:
        tree = ast.parse(path.read_text())
        assert ast.get_docstring(tree) or not path.read_text().strip(), path
        for node in tree.body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                assert ast.get_docstring(node) or node.name in ("main", "parse_args"), (path, node.name)


def readme_commands():
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    return [line for block in blocks for line in block.splitlines() if line.strip()]


def script_commands(text):
    """(method, flags) of every command in a text that runs a method's script."""
    for line in text:
        for part in line.split("&&"):
            match = re.search(r"\b(cbd|async_lt|livt|candle)\.py\b(.*)", part.split("  #")[0])
            if match and "..." not in match[2]:
                yield match[1], shlex.split(match[2])


def test_readme_commands_parse():
    commands = readme_commands()
    assert "pip install -r requirements.txt && python cbd.py" in commands
    assert "pip install -r requirements.txt && pytest" in commands
    parsed = [importlib.import_module(m).parse_args(flags) for m, flags in script_commands(commands)]
    assert len(parsed) >= 8


def test_commands_in_the_scripts_docstrings_parse():
    for method in METHODS:
        text = importlib.import_module(method).__doc__.splitlines()
        lines = [line for line in text if line.startswith("    ")]
        parsed = [importlib.import_module(m).parse_args(flags) for m, flags in script_commands(lines)]
        assert len(parsed) >= 3, method


@pytest.mark.parametrize("method", METHODS)
def test_help_works_without_torchvision_and_shows_the_recipe(method, tmp_path):
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text("raise ImportError('broken')")
    command = [sys.executable, str(ROOT / f"{method}.py"), "--dataset", "imagenet_lt", "--help"]
    shown = subprocess.run(command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path)}, text=True,
                           capture_output=True)
    assert shown.returncode == 0, shown.stderr
    epochs = importlib.import_module(method).RECIPES["imagenet_lt"]["epochs"]
    assert "(default: imagenet_lt)" in shown.stdout and f"(default: {epochs})" in shown.stdout


@pytest.mark.parametrize("method", METHODS)
def test_a_run_needs_no_torchvision(method, tmp_path):
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text("raise ImportError('broken')")
    noise_npz(tmp_path)
    command = [sys.executable, str(ROOT / f"{method}.py"), *tiny_flags(method), "--epochs", "1",
               *["--augment", "plain"] * (method == "livt")]
    done = subprocess.run(command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path)}, text=True,
                          capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "many" in done.stdout and "few" in done.stdout
    assert len(list((tmp_path / "runs").glob("*/result.json"))) == 1


def test_the_readme_s_snippets_run_behind_the_default_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module("cbd")
    module.main(module.parse_args(["--epochs", "1", "--batch-size", "256"]))
    Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save("photo.jpg")
    snippets = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    names = {}
    for snippet in snippets:
        exec(snippet, names)
    assert len(snippets) == 2 and names["probabilities"].shape == (1, 10) and names["loss"].isfinite()
    assert names["saved"]["class_names"][9] == "Ankle boot"
