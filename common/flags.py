"""The flags that all four scripts share, with recipes as their defaults; a check stands at its flag."""
import argparse
import math
import sys

from common.builders import count_images, image_side
from common.data import count_readable
from common.folder import readable_cache
from common.ranks import cores, fail

BOOLEAN = argparse.BooleanOptionalAction
DATASETS = "fashion_lt (embedded), cifar10_lt, cifar100_lt, fashion_mnist_lt, imagenet_lt, places_lt, " \
    "inat18, inat17, caltech101_lt, cub200_lt, stanford_dogs_lt, stanford_cars_lt, fgvc_aircraft_lt, " \
    "dtd_lt, flowers102_lt, fruits360_lt, FILE.npz, or folder (with --data-dir)"


# ---------------------------------------------------------------- types: a flag's check stands at the flag

def text(value):
    """Words, not empty: an unset variable of the shell is no name."""
    return _checked(value, value.strip(), "must not be empty")


def count(value):
    """A whole number, at least 1."""
    return _checked(int(value), 1 <= int(value) < 2**31, "must be at least 1 and below 2^31")


def index(value):
    """A whole number, at least 0."""
    return _checked(int(value), 0 <= int(value) < 2**31, "must be at least 0 and below 2^31")


def number(value):
    """A number that is not negative."""
    holds = float(value) == 0 or 1e-12 <= float(value) <= 1e12
    return _checked(float(value), holds, "must be 0, or lie in 1e-12..1e12")


def positive(value):
    """A number above 0."""
    return _checked(float(value), 1e-12 <= float(value) <= 1e12, "must be positive, in 1e-12..1e12")


def fraction(value):
    """A number in [0, 1]."""
    return _checked(number(value), number(value) <= 1, "must lie in [0, 1]")


def part(value):
    """A number in [0, 1)."""
    return _checked(number(value), number(value) < 1, "must lie in [0, 1)")


def factor(value):
    """An imbalance factor, largest class / smallest class."""
    return _checked(float(value), 1 <= float(value) <= 1e12, "is max/min and must be at least 1")


def _checked(value, holds, what):
    if not holds:
        raise argparse.ArgumentTypeError(f"{what}, got {value!r}")
    return value


# ---------------------------------------------------------------- the parser

class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Help that shows a default only where there is one."""

    def _get_help_string(self, action):
        has_one = action.default is not None and action.default is not argparse.SUPPRESS
        return super()._get_help_string(action) if has_one else action.help


class Parser(argparse.ArgumentParser):
    """argparse with the shared flags. A script adds its own by `method(...)`, and adds a shared one again
    where it means something else by it. `parse_args` takes the chosen recipe's settings as defaults, so that
    flags win.

    doc: the script's docstring. recipes: {name: {flag with underscores: value, "quick": {...}}}; `quick`
    holds what --quick changes. Without --recipe it is the data set's own; `choose_recipe` says which where it
    has none.
    """

    def __init__(self, doc, recipes):
        super().__init__(
            usage="%(prog)s [flags]", description=doc.split("\n")[0], allow_abbrev=False,
            conflict_handler="resolve", formatter_class=_Help,
            epilog="Defaults come from the recipe of the data set, or from that which --recipe names: "
                   f"{', '.join(recipes)}.")
        self.recipes = recipes
        self.method = self.add_argument_group("method").add_argument  # the first group that --help shows
        self._add_data_flags(self.add_argument_group("data").add_argument)
        self._add_optimisation_flags(self.add_argument_group("optimisation").add_argument)
        self._add_run_flags(self.add_argument_group("run").add_argument)

    def _add_data_flags(self, add):
        add("--dataset", type=text, default="fashion_lt", help=DATASETS)
        add("--recipe", type=text, help="settings of another data set; wins over the data set's own")
        add("--data-dir", type=text, default="data", help="where data sets are, or are downloaded to")
        add("--train-list", type=text, metavar="FILE", help="lines `path label` of your own, relative to "
            "--data-dir")
        add("--test-list", type=text, metavar="FILE", help="likewise, for the images that are tested on")
        add("--imb-factor", type=factor, help="largest class / smallest class, at least 1")
        add("--subset-seed", type=index, default=0, help="which images are kept; 0 as in LDAM-DRW")
        add("--test-fraction", type=fraction, help="of each class of a folder or list without test images")
        add("--image-size", type=count, help="side in pixels that the nets see (own up to 64, else 224)")
        add("--evaluate-on", choices=["test", "val"], default="test", help="split that is scored")
        add("--workers", type=index, default=cores(), help="decoding processes for image files, a rank")
        add("--skip-bad-images", action=BOOLEAN, default=False, help="leave out what cannot be decoded")

    def _add_optimisation_flags(self, add):
        add("--epochs", type=count, help="of each stage without a flag of its own")
        add("--batch-size", type=count, help="global, over all ranks")
        add("--lr", type=number, help="at the first step, for the given batch size")
        add("--weight-decay", type=number, help="on all parameters")
        add("--grad-accumulation", type=count, default=1, help="parts that a rank's batch is cut into")
        add("--sync-bn", action=BOOLEAN, default=False, help="batch norm over all ranks (GPUs)")
        add("--amp", action=BOOLEAN, default=True, help="bf16 where the device computes it")
        add("--compile", action=BOOLEAN, default=False, help="torch.compile the trained net")

    def _add_run_flags(self, add):
        add("--seed", type=index, default=0, help="initialisation, sampling, augmentation")
        add("--quick", action=BOOLEAN, default=False, help="the same method on a short schedule")
        add("--evaluate", type=text, metavar="CHECKPOINT", help="score a saved model, train nothing")
        add("--save-logits", action=BOOLEAN, default=False, help="write logits and targets of the scored "
            "split as .npz, for what comes after training (tau-normalisation, logit adjustment, ...)")
        add("--evaluate-every", type=count, help="epochs between evaluations; the last is always evaluated")
        add("--device", type=text, default="auto", help="cpu, cuda, cuda:1, mps")
        add("--time-limit", type=number, metavar="MINUTES", help="stop after a step; --resume goes on")
        add("--resume", action=BOOLEAN, default=False, help="continue what is in --out, or start")
        add("--out", type=text, help="(runs/<method>_<dataset>_seed<seed>)")

    def error(self, message):
        fail(message)

    def parse_args(self, argv=None):
        argv = sys.argv[1:] if argv is None else argv
        wants_help = bool({"-h", "--help"} & set(argv))
        known, _ = self.parse_known_args([a for a in argv if a not in ("-h", "--help")])

        side = n = None
        if known.dataset not in self.recipes:
            side = image_side(known.dataset, known.data_dir, known.train_list)
            named = known.dataset, known.data_dir, known.train_list
            n = count_readable(*named, known.workers, readable_cache(known)) \
                if known.skip_bad_images and not wants_help else count_images(*named)
        name, why = choose_recipe(known.recipe, known.dataset, side or 32, n, self.recipes)
        if name not in self.recipes:
            fail(f"unknown recipe {name!r}; known: {', '.join(self.recipes)}")

        settings = dict(self.recipes[name])
        settings.update(settings.pop("quick") if known.quick else {})
        settings.pop("quick", None)
        if name.startswith("small") and n:
            # few images take as many steps as 2,500 would; those shown at 64 pixels as 1,250, as a step costs
            # four times as much, and a run of 231 is to end within minutes on two cores
            enough = 2500 if side and side <= 40 else 1250
            settings.update({key: math.ceil(value * max(1, enough / n)) for key, value in settings.items()
                             if key.endswith("epochs")})
        if name == "small" and side and side <= 40:
            settings["image_size"] = side if side % 4 == 0 else 32  # a ViT cuts it into 4 x 4 patches
        self.set_defaults(**settings, recipe=name, recipe_why=why)
        return super().parse_args(argv)


def choose_recipe(named, dataset, side, num_images, recipes):
    """A recipe's name, and what chose it: --recipe; the data set; or of other sets their images' side in
    pixels and their number (None: not known). `small` is for sets on which a paper's schedule would be a few
    steps of large batches: fewer than 5,000 images, or 20,000 above 64 pixels. It shows them at 64 pixels, or
    up to 40 as they are."""
    if named:
        return named, "--recipe"
    if dataset in recipes:
        return dataset, "the data set's own"
    looks = f"{num_images or 'an unknown number of'} images of {side} pixels"
    if num_images and num_images < (5000 if side <= 64 else 20000) and "small" in recipes:
        return "small", looks
    return "cifar100_lt" if side <= 64 else "imagenet_lt", looks
