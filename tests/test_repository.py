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

SCRIPTS = {method: importlib.import_module(method) for method in METHODS}
SOURCES = [*(ROOT / f"{name}.py" for name in METHODS), *sorted((ROOT / "common").rglob("*.py"))]
GENERATOR = torch.Generator().manual_seed(0)
(LOGITS, TEACHER), FEATURES = (torch.randn(2, 6, n, generator=GENERATOR) for n in (4, 8))
TARGETS, COUNTS = torch.tensor([0, 1, 2, 3, 0, 0]), torch.tensor([5, 4, 2, 1])
DRAWN = TARGETS, GENERATOR
PURE = {  # samplers, losses, schedules, and arguments for them
    "cbd": {"instance_indices": DRAWN, "class_balanced_indices": DRAWN, "feature_distillation_loss": FEATURES,
            "cbd_loss": (LOGITS, TARGETS, *FEATURES), "cosine_lr": (0.3, 0.1),
            "classifier_distillation_loss": (LOGITS, TARGETS, TEACHER)},
    "async_lt": {"progressive_probabilities": (COUNTS, 0.3), "margin_loss": (LOGITS, TARGETS, 2),
                 "weighted_indices": (TARGETS, torch.ones(4) / 4, GENERATOR), "cosine_lr": (0.3, 0.1),
                 "select_exemplars": (FEATURES[0], 3), "memory_retentive_loss": FEATURES,
                 "step_lr": (0.85, 0.1, [0.8, 0.9], 0.01)},
    "livt": {"instance_indices": DRAWN, "balanced_bce_loss": (LOGITS, TARGETS, COUNTS, 1.05),
             "balanced_ce_loss": (LOGITS, TARGETS, COUNTS, 1.05), "bayes_decode": (LOGITS, COUNTS, 1.05),
             "warmup_cosine_lr": (3.5, 10, 2, 0.1)},
    "candle": {"equal_class_indices": DRAWN, "distillation_kl": (LOGITS, TEACHER), "cosine_lr": (0.3, 0.1),
               "label_aware_smoothing_loss": (LOGITS, TARGETS, COUNTS, 0.3, 0.1),
               "feature_similarity_loss": FEATURES.view(2, 6, 2, 2, 2)}}
OPTIONAL = {"pretrained": {"timm", "safetensors", "huggingface_hub"}, "figure": {"matplotlib"}}
# room -> its floor: it may import rooms of lower floors alone. All others are on the first
FLOORS = {"builders": 2, "folder": 2, "pretrained": 2, "stop": 2, "summary": 2, "workers": 2, "data": 3,
          "loader": 3, "student": 3, "flags": 4, "predict": 5, "run": 5, "plot": 6}


def imported_modules(nodes):
    """The modules that statements import."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_a_source_imports_what_it_may_and_is_short_and_says_what_its_public_names_are(path):
    """Required are the card's five packages; others are imported only inside what needs them."""
    assert (ROOT / "requirements.txt").read_text().split() == "torch torchvision numpy tqdm pytest".split()
    is_method, is_room = path.stem in METHODS, path.parent.name == "common"
    text = path.read_text()
    tree, lines = ast.parse(text), text.splitlines()
    base = sys.stdlib_module_names | {"torch", "numpy", "tqdm", "common"}
    allowed = base | {"torchvision", "PIL"} | OPTIONAL.get(path.stem, set())  # PIL comes with torchvision
    modules = set(imported_modules(ast.walk(tree)))
    assert {module.split(".")[0] for module in modules} <= allowed - set(METHODS)
    assert {module.split(".")[0] for module in imported_modules(tree.body)} <= base
    rooms = {module.split(".")[1] for module in modules if module.startswith("common.")}
    assert not is_room or all(FLOORS.get(room, 1) < FLOORS.get(path.stem, 1) for room in rooms), rooms
    if is_method:
        assert len(lines) <= {"cbd": 380, "async_lt": 400, "livt": 400, "candle": 440}[path.stem]
        assert any(line.startswith(f"    python {path.name}") for line in lines[:12])

    assert not [i for i, line in enumerate(lines, 1) if len(line) > 110]
    classes = [node for node in ast.walk(tree) if isinstance(node, (ast.Module, ast.ClassDef))]
    for function in (node for owner in classes for node in owner.body if isinstance(node, ast.FunctionDef)):
        assert function.end_lineno - function.lineno < 60, function.name
        arguments = function.args
        names = [each.arg for each in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
        is_free = not is_room or path.stem in ("resnet", "reactnet", "vit")
        assert len({*names} - {"self"}) <= 7 or is_free, function.name

    assert ast.get_docstring(tree) or not text.strip()
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            assert ast.get_docstring(node) or node.name in ("main", "parse_args"), node.name


@pytest.mark.parametrize("method", METHODS)
def test_every_sampler_loss_and_schedule_runs_from_its_own_source_alone(method):
    own = [name for name, it in vars(SCRIPTS[method]).items() if getattr(it, "__module__", "") == method]
    endings = r"_(loss|indices|lr|adjusted|probabilities|exemplars|decode|kl)$"
    assert {name for name in own if re.search(endings, name)} == set(PURE[method])
    for name, arguments in PURE[method].items():
        function, namespace, found = getattr(SCRIPTS[method], name), {}, []
        imports = "import math\nimport torch\nimport torch.nn.functional as F\n"
        exec(imports + inspect.getsource(function), namespace)
        for each in (namespace[name], function):
            GENERATOR.manual_seed(0)
            found.append(torch.as_tensor(each(*arguments)))
        assert torch.equal(*found), name


def parsed(lines):
    """The settings of every command in a text that runs a method's script."""
    matches = [re.search(r"\b(cbd|async_lt|livt|candle)\.py\b(.*)", part.split("  #")[0])
               for line in lines for part in line.split("&&")]
    return [SCRIPTS[match[1]].parse_args(shlex.split(match[2])) for match in matches
            if match and "..." not in match[2]]


def test_commands_of_the_readme_and_the_docstrings_parse():
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    commands = "".join(blocks).splitlines()
    assert {f"pip install -r requirements.txt && {do}" for do in ("python cbd.py", "pytest")} <= {*commands}
    assert len(parsed(commands)) >= 8
    for method, script in SCRIPTS.items():
        text = script.__doc__.splitlines()
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
    epochs = SCRIPTS[method].RECIPES["imagenet_lt"]["epochs"]
    shown = (tmp_path / "help").read_text()
    assert "(default: imagenet_lt)" in shown and f"(default: {epochs})" in shown


def test_the_readme_s_snippets_run_behind_the_default_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = ["--epochs", "1", "--batch-size", "256", "--teachers", "1", "--arch", "resnet14"]
    SCRIPTS["cbd"].main(SCRIPTS["cbd"].parse_args(small))
    Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save("photo.jpg")
    snippets, names = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S), {}
    for snippet in snippets:
        exec(snippet, names)
    assert len(snippets) == 2 and names["probabilities"].shape == (1, 10) and names["loss"].isfinite()
    assert names["saved"]["class_names"][9] == "Ankle boot"
