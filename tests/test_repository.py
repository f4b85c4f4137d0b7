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

import pytest

ROOT = Path(__file__).parent.parent
METHODS = [name for name in ("cbd", "async_lt", "livt", "candle") if (ROOT / f"{name}.py").exists()]
SOURCES = [*(ROOT / f"{name}.py" for name in METHODS), *sorted((ROOT / "common").rglob("*.py"))]
PURE = {  # samplers, losses, schedules: method -> names
    "cbd": ["instance_indices", "class_balanced_indices", "feature_distillation_loss", "cbd_loss",
            "classifier_distillation_loss", "logit_adjusted", "cosine_lr"],
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


def test_lines_and_scripts_keep_their_size():
    for path in SOURCES:
        long = [i for i, line in enumerate(path.read_text().splitlines(), 1) if len(line) > 110]
        assert not long, (path, long)
    for name in METHODS:
        tree = ast.parse((ROOT / f"{name}.py").read_text())
        lines = len((ROOT / f"{name}.py").read_text().splitlines())
        lines -= tree.body[0].end_lineno  # the docstring
        for node in tree.body:
            if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "RECIPES":
                lines -= node.end_lineno - node.lineno + 1
        assert lines <= 500, (name, lines)


@pytest.mark.parametrize("method, name", [(method, name) for method in METHODS for name in PURE[method]])
def test_a_sampler_loss_or_schedule_runs_from_its_own_source_alone(method, name):
    import torch
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
        "logit_adjusted": lambda: (logits[0], torch.tensor([0.4, 0.3, 0.2, 0.1]).log()),
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
            if match:
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


# a method's flags for a run of seconds
QUICKLY = {"async_lt": ["--phase-two-epochs", "1"], "livt": ["--mgp-epochs", "1"],
           "candle": ["--calibration-epochs", "1"]}


@pytest.mark.parametrize("method", METHODS)
def test_the_default_command_runs_without_torchvision_and_its_model_loads(method, tmp_path, monkeypatch):
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text("raise ImportError('broken')")
    command = [sys.executable, str(ROOT / f"{method}.py"), "--epochs", "1", "--batch-size", "256",
               *QUICKLY.get(method, [])]
    done = subprocess.run(command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path)}, text=True,
                          capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "many" in done.stdout and "few" in done.stdout
    assert len(list((tmp_path / "runs").glob("*/result.json"))) == 1
    if method == "cbd":  # the README's three lines, in the folder where the README's command ran
        import torch
        monkeypatch.chdir(tmp_path)
        snippet = re.search(r"```python\n(import cbd.*?)```", (ROOT / "README.md").read_text(), re.S)[1]
        names = {"images": torch.randint(0, 256, (5, 32, 32, 3), dtype=torch.uint8)}
        exec(snippet, names)
        assert names["logits"].shape == (5, 10) and names["features"].shape == (5, 64)
        assert names["saved"]["class_names"][9] == "Ankle boot"
