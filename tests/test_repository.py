"""The house's own rules: layout, imports, sizes, losses that copy out, README commands that parse."""
import ast
import importlib
import inspect
import re
import shlex
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from tests.tiny import METHODS, ROOT, ended, start

SOURCES = [*(ROOT / f"{name}.py" for name in METHODS), *sorted((ROOT / "common").rglob("*.py"))]
GENERATOR = torch.Generator().manual_seed(0)
LOGITS, FEATURES = (torch.randn(2, 6, n, generator=GENERATOR) for n in (4, 8))
TARGETS, COUNTS = torch.tensor([0, 1, 2, 3, 0, 0]), torch.tensor([5, 4, 2, 1])
MAPS = FEATURES.view(2, 6, 2, 2, 2)
PURE = {  # samplers, losses, schedules, and arguments for them
    "cbd": {
        "instance_indices": (TARGETS, GENERATOR), "class_balanced_indices": (TARGETS, GENERATOR),
        "feature_distillation_loss": FEATURES, "cbd_loss": (LOGITS[0], TARGETS, *FEATURES),
        "classifier_distillation_loss": (LOGITS[0], TARGETS, LOGITS[1]), "cosine_lr": (0.3, 0.1)},
    "async_lt": {
        "progressive_probabilities": (COUNTS, 0.3), "margin_loss": (LOGITS[0], TARGETS, 2),
        "weighted_indices": (TARGETS, torch.ones(4) / 4, GENERATOR), "select_exemplars": (FEATURES[0], 3),
        "memory_retentive_loss": FEATURES, "step_lr": (0.85, 0.1, [0.8, 0.9], 0.01),
        "cosine_lr": (0.3, 0.1)},
    "livt": {
        "instance_indices": (TARGETS, GENERATOR), "balanced_bce_loss": (LOGITS[0], TARGETS, COUNTS, 1.05),
        "balanced_ce_loss": (LOGITS[0], TARGETS, COUNTS, 1.05), "bayes_decode": (LOGITS[0], COUNTS, 1.05),
        "warmup_cosine_lr": (3.5, 10, 2, 0.1)},
    "candle": {
        "equal_class_indices": (TARGETS, GENERATOR), "distillation_kl": LOGITS,
        "label_aware_smoothing_loss": (LOGITS[0], TARGETS, COUNTS, 0.3, 0.1),
        "feature_similarity_loss": MAPS, "cosine_lr": (0.3, 0.1)},
}


def imported_modules(path, everywhere=True):
    """The modules that a file imports, or that it imports at its top."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree) if everywhere else tree.body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


OPTIONAL = {"pretrained": {"timm", "safetensors", "huggingface_hub"}, "figure": {"matplotlib"}}


def test_required_are_the_card_s_five_packages_and_others_are_imported_only_inside_what_needs_them():
    required = (ROOT / "requirements.txt").read_text().split()
    assert required == ["torch", "torchvision", "numpy", "tqdm", "pytest"]
    base = sys.stdlib_module_names | {"torch", "numpy", "tqdm", "common"}
    for path in SOURCES:
        allowed = base | {"torchvision", "PIL"} | OPTIONAL.get(path.stem, set())  # PIL comes with torchvision
        assert {module.split(".")[0] for module in imported_modules(path)} <= allowed, path
        assert {module.split(".")[0] for module in imported_modules(path, everywhere=False)} <= base, path


# room -> its floor: it may import rooms of lower floors alone. All others are on the first
FLOORS = {"builders": 2, "folder": 2, "pretrained": 2, "stop": 2, "summary": 2, "workers": 2, "data": 3,
          "loader": 3, "student": 3, "flags": 4, "predict": 5, "run": 5, "plot": 6}


def test_rooms_import_no_method_and_only_lower_floors():
    for path in SOURCES:
        modules = set(imported_modules(path))
        tops = {module.split(".")[0] for module in modules}
        assert not tops & {"cbd", "async_lt", "livt", "candle"}, path
        if path.parent.name == "common":
            rooms = {module.split(".")[1] for module in modules if module.startswith("common.")}
            assert all(FLOORS.get(room, 1) < FLOORS.get(path.stem, 1) for room in rooms), (path, rooms)


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


def test_no_line_is_longer_than_110_columns_and_no_function_than_60_lines():
    for path in SOURCES:
        long = [i for i, line in enumerate(path.read_text().splitlines(), 1) if len(line) > 110]
        assert not long, (path, long)
        assert not [name for name, _, lines in functions(path) if lines > 60], path


def test_no_function_of_common_takes_more_than_7_parameters_but_for_nets():
    rooms = [path for path in SOURCES if path.parent.name == "common"]
    many = {f"{path.stem}.{name}" for path in rooms if path.stem not in ("resnet", "reactnet", "vit")
            for name, parameters, _ in functions(path) if len(parameters) > 7}
    assert not many


@pytest.mark.parametrize("method, name", [(method, name) for method in METHODS for name in PURE[method]])
def test_a_sampler_loss_or_schedule_runs_from_its_own_source_alone(method, name):
    function = getattr(importlib.import_module(method), name)
    namespace = {}
    imports = "import math\nimport torch\nimport torch.nn.functional as F\n"
    exec(imports + inspect.getsource(function), namespace)
    found = []
    for each in (namespace[name], function):
        GENERATOR.manual_seed(0)
        found.append(torch.as_tensor(each(*PURE[method][name])))
    assert torch.equal(*found)


def test_every_loss_sampler_and_schedule_is_in_the_test_above():
    for method in METHODS:
        names = vars(importlib.import_module(method)).items()
        own = [name for name, value in names if getattr(value, "__module__", "") == method]
        endings = r"_(loss|indices|lr|adjusted|probabilities|exemplars|decode|kl)$"
        assert {name for name in own if re.search(endings, name)} == set(PURE[method])


def test_every_public_name_has_a_docstring():
    for path in SOURCES:
        tree = ast.parse(path.read_text())
        assert ast.get_docstring(tree) or not path.read_text().strip(), path
        for node in tree.body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                assert ast.get_docstring(node) or node.name in ("main", "parse_args"), (path, node.name)


def parsed(lines):
    """The settings of every command in a text that runs a method's script."""
    settings = []
    for part in (part for line in lines for part in line.split("&&")):
        match = re.search(r"\b(cbd|async_lt|livt|candle)\.py\b(.*)", part.split("  #")[0])
        if match and "..." not in match[2]:
            settings.append(importlib.import_module(match[1]).parse_args(shlex.split(match[2])))
    return settings


def test_commands_of_the_readme_and_the_docstrings_parse():
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    commands = "".join(blocks).splitlines()
    assert "pip install -r requirements.txt && python cbd.py" in commands
    assert "pip install -r requirements.txt && pytest" in commands
    assert len(parsed(commands)) >= 8
    for method in METHODS:
        text = importlib.import_module(method).__doc__.splitlines()
        assert len(parsed(line for line in text if line.startswith("    "))) >= 3, method


def without_torchvision():
    sys.modules["torchvision"] = None  # so that its import fails


@pytest.mark.parametrize("method", METHODS)
def test_a_run_and_the_help_need_no_torchvision(method, tmp_path):
    plain = ["--augment", "plain"] * (method == "livt")
    run = start(method, tmp_path, "--epochs", "1", *plain, prepare=without_torchvision)
    assert ended(run) == 0, (tmp_path / "err").read_text()
    shown = (tmp_path / "out").read_text()
    assert "many" in shown and "few" in shown
    assert len(list((tmp_path / "runs").glob("*/result.json"))) == 1

    help = start(method, tmp_path, "--dataset", "imagenet_lt", "--help", prepare=without_torchvision,
                 out="help", environment={"COLUMNS": "200"})
    assert ended(help) == 0
    epochs = importlib.import_module(method).RECIPES["imagenet_lt"]["epochs"]
    shown = (tmp_path / "help").read_text()
    assert "(default: imagenet_lt)" in shown and f"(default: {epochs})" in shown


def test_the_readme_s_snippets_run_behind_the_default_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module("cbd")
    small = ["--epochs", "1", "--batch-size", "256", "--teachers", "1", "--arch", "resnet14"]
    module.main(module.parse_args(small))
    Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save("photo.jpg")
    snippets = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    names = {}
    for snippet in snippets:
        exec(snippet, names)
    assert len(snippets) == 2 and names["probabilities"].shape == (1, 10) and names["loss"].isfinite()
    assert names["saved"]["class_names"][9] == "Ankle boot"
