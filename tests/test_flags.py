"""common/flags.py: a check at each flag, recipes as defaults, a help that one reads."""
import argparse
import importlib

import numpy as np
import pytest

from common import flags
from tests.tiny import METHODS

GOOD = {"text": ["a", " a b "], "count": ["1", "2147483647"], "index": ["0", "7"],
        "number": ["0", "-0.0", "1e-12", "0.5", "1e12"], "positive": ["1e-12", "20"],
        "fraction": ["0", "1", "0.4"], "factor": ["1", "100"]}
BAD = {"text": ["", " ", "\t"], "count": ["0", "-1", "2147483648", "1.5", "two", "", "nan"],
       "index": ["-1", "2147483648", "x"], "number": ["-1", "nan", "inf", "1e39", "1e-320", "x", ""],
       "positive": ["0", "-1", "nan", "1e-320", "1e308"], "fraction": ["1.1", "-0.1", "nan"],
       "factor": ["0.99", "0", "-5", "nan", "inf"]}


@pytest.mark.parametrize("kind", GOOD)
def test_a_flag_s_type_takes_what_makes_sense_and_nothing_else(kind):
    check = getattr(flags, kind)
    for value in GOOD[kind]:
        assert check(value) == (value if kind == "text" else float(value))
    for value in BAD[kind]:
        with pytest.raises((ValueError, argparse.ArgumentTypeError)):
            check(value)


def parse(recipes, *argv):
    parser = flags.Parser("A method.", recipes)
    parser.method("--alpha", type=flags.number, help="a factor")
    return parser.parse_args(list(argv))


RECIPES = {"cifar100_lt": dict(epochs=200, alpha=0.4, quick=dict(epochs=30)),
           "imagenet_lt": dict(epochs=90, alpha=0.1, quick=dict(epochs=5))}


def test_a_recipe_is_the_data_set_s_own_or_the_named_one_and_flags_win():
    own = parse(RECIPES, "--dataset", "imagenet_lt")
    assert (own.recipe, own.epochs, own.alpha) == ("imagenet_lt", 90, 0.1)
    named = parse(RECIPES, "--dataset", "imagenet_lt", "--recipe", "cifar100_lt", "--alpha", "3")
    assert (named.recipe, named.dataset) == ("cifar100_lt", "imagenet_lt")
    assert (named.epochs, named.alpha) == (200, 3.0)
    assert parse(RECIPES, "--dataset", "imagenet_lt", "--quick").epochs == 5
    assert parse(RECIPES, "--dataset", "imagenet_lt", "--quick", "--epochs", "7").epochs == 7


@pytest.mark.parametrize("n, side, epochs", [(250, 32, 200), (250, 40, 200), (250, 64, 100), (2400, 32, 21),
                                             (2500, 32, 20), (4000, 32, 20)])
def test_a_small_set_is_seen_as_often_as_gives_the_steps_of_a_larger_one(n, side, epochs, tmp_path):
    np.savez_compressed(tmp_path / "mine.npz", x_train=np.zeros((n, side, side, 3), np.uint8))
    recipes = {**RECIPES, "small": dict(epochs=20, warmup_epochs=1, lr=0.1, quick=dict(epochs=5))}
    args = parse(recipes, "--dataset", str(tmp_path / "mine.npz"))
    assert (args.recipe, args.epochs, args.warmup_epochs) == ("small", epochs, -(-epochs // 20))
    assert parse(recipes, "--dataset", str(tmp_path / "mine.npz"), "--epochs", "3").epochs == 3


@pytest.mark.parametrize("argv, words", [
    (["--recipe", "imagenet"], "unknown recipe 'imagenet'; known: cifar100_lt, imagenet_lt"),
    (["--alph", "1"], "unrecognized arguments"), (["--alpha", "-1"], "argument --alpha: must be"),
    (["--epochs", "0"], "argument --epochs: must be at least 1"), (["--out", ""], "must not be empty"),
    (["--evaluate-on", "train"], "invalid choice"), (["--epochs"], "expected one argument")])
def test_a_wrong_flag_is_one_line(argv, words, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(RECIPES, "--dataset", "cifar100_lt", *argv)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1 and words in error


@pytest.mark.parametrize("method", METHODS)
def test_every_recipe_of_a_script_sets_flags_that_it_has_and_is_whole(method):
    module = importlib.import_module(method)
    for name, recipe in module.RECIPES.items():
        args = module.parse_args(["--dataset", "cifar100_lt", "--recipe", name])
        assert not recipe.keys() - vars(args).keys() - {"quick"}, name
        assert not recipe["quick"].keys() - vars(args).keys(), name
        assert args.epochs >= 1 and args.batch_size >= 1 and args.lr > 0, name
        quick = module.parse_args(["--dataset", "cifar100_lt", "--recipe", name, "--quick"])
        assert quick.epochs <= args.epochs


@pytest.mark.parametrize("method", METHODS)
def test_help_begins_with_the_method_s_flags_names_data_sets_and_shows_no_none(method, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(method).parse_args(["--help"])
    lines = capsys.readouterr().out.splitlines()
    shown = " ".join(" ".join(lines).split())
    assert max(map(len, lines)) <= 80
    assert stop.value.code == 0 and "(default: None)" not in shown
    if method == "livt":  # whose nets it reads
        assert "facebookresearch/mae, of LiVT's authors, or a plain ViT of timm" in shown
    assert shown.index("method:") < shown.index("data:") < shown.index("optimisation:") < shown.index("run:")
    for words in ("fashion_lt (embedded)", "cifar100_lt", "FILE.npz", "Defaults come from the recipe"):
        assert words in shown, words
    for flag in ("--dataset", "--epochs", "--resume", "--out", "--evaluate", "--time-limit"):
        assert flag in shown, flag


@pytest.mark.parametrize("program", ["data", "plot", "predict", "summary"])
def test_help_of_the_other_commands_fits_80_columns_too(program, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(f"common.{program}").main(["--help"])
    lines = capsys.readouterr().out.splitlines()
    assert stop.value.code == 0 and lines[0].startswith(f"usage: python -m common.{program}")
    assert max(map(len, lines)) <= 80
