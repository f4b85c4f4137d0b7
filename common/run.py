"""What a script runs in: its data set, device, loaders and folder, and epochs that can be cut off anywhere.

    with bad_input():                       # what is wrong is found before anything is written
        run = Run("cbd", args)
        run.open()
    with run:
        for epoch in run.epochs("student", "student.pt", model, optimizer, 200):
            for images, targets, share, ends_step in epoch.batches(indices):
                ...                         # forward, backward, and where ends_step the optimiser's step
            if epoch.is_scored:
                epoch.log(**run.scores(model))
        run.add("student", run.scores(model))
    run.finish()

Never `break` out of these two loops: what stands behind their `yield` runs when the next round is asked for.
"""
import contextlib
import copy
import textwrap
import time
from functools import cached_property
from pathlib import Path

import torch
from tqdm import tqdm

from common.data import leave_out_unreadable, load, write_lists
from common.evaluate import Diverged, class_sums, gradient_norms, predict, scores, shot_groups, table
from common.files import escape_unprintable
from common.folder import (class_names_in, default_folder, device_name, holds, load_checkpoint, open_folder,
                           readable_cache, save_net)
from common.loader import (Augmentation, Cut, UnreadableImage, count_steps, decoded, every_image,
                           make_loader)
from common.longtail import ImageFiles, fingerprint
from common.ranks import (autocast, average_buffers, bad_input, derive_seed, fail, first_rank_first,
                          gather_ranks, generator, peak_memory, rank, ranks, say, start_ranks, sum_gradients,
                          sum_ranks, supports_bf16)
from common.stop import Stop
from common.workers import LostWorker

FEW_STEPS = 500
REFRESH = 1.0  # seconds between two looks at the loss, each of which waits for the device
FEW_FILES = 20_000  # up to 64 pixels so many are decoded once, 250 MB at the most
FILES = {"result.json": "all scores", "log.jsonl": "a line an epoch", "last.pt": "for --resume"}
UNTRAINED = {"best_all": None, "seconds": None, "images_per_second": None}  # of a stage that trains nothing


class Run:
    """One call of a script: `args`, `data`, `device`, and after `open` its `folder`; from there on a context
    that ends in one line where a net diverges, an image cannot be read, or the system refuses something.
    Raises ValueError for what cannot be had."""

    def __init__(self, method, args):
        self.method, self.args, self.stages = method, args, []
        self.folder = self.last_outputs = self.bar = None
        escape_unprintable()
        self.device = start_ranks(args.device)
        self.autocast = autocast(self.device, args.amp)
        if args.sync_bn and (self.device.type != "cuda" or ranks() == 1):
            raise ValueError("--sync-bn needs GPUs and torchrun: torch's SyncBatchNorm has no CPU version")
        Cut(args.batch_size, rank(), ranks(), args.grad_accumulation)  # raises if it cannot be

        with first_rank_first():
            begun_with = class_names_in(args.out or default_folder(args, method)) if args.resume else None
            self.data = load(args.dataset, args.data_dir, args.imb_factor, args.subset_seed,
                             train_list=args.train_list, test_list=args.test_list,
                             test_fraction=args.test_fraction, class_names=begun_with)
            if args.skip_bad_images:
                self.data = leave_out_unreadable(self.data, args.workers, readable_cache(args))
            self.listed = self.data
            if isinstance(self.data.train, ImageFiles) and (args.image_size or 224) <= 64 and \
                    len(self.data.train) < FEW_FILES:
                self.data = decoded(self.data, args.image_size)
        self.data.image_size = args.image_size or self.data.image_size
        self.data.split(args.evaluate_on)

    # ---------------------------------------------------------------- what a method asks for

    @property
    def targets(self):
        """Class ids of the training images, int64 [n], on the CPU."""
        return torch.from_numpy(self.data.train.targets)

    @property
    def class_counts(self):
        """Training images per class, int64 [C], on the CPU."""
        return torch.from_numpy(self.data.class_counts)

    @cached_property
    def train_images(self):
        """A loader of the training images as they are, not augmented."""
        return self.loader(self.data.train, Cut(256))

    @cached_property
    def test_images(self):
        """A loader of the split that --evaluate-on names."""
        return self.loader(self.data.split(self.args.evaluate_on), Cut(256))

    def loader(self, split, cut, augmentation=Augmentation()):
        """What `make_loader` makes with this run's flags."""
        return make_loader(split, self.data, cut, self.device, augmentation, self.args.workers)

    def seed(self, *parts):
        """A seed of its own for anything that is named, from --seed."""
        return derive_seed(self.args.seed, *parts)

    def place(self, model):
        """The net on the device, in channels_last, with --sync-bn."""
        if self.args.sync_bn:
            model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
        return model.to(self.device, memory_format=torch.channels_last)

    def compiled(self, model):
        """The net, or with --compile one of the same weights that torch.compile has sped up: its backbone,
        where it has one. (Fused with a cosine classifier on a CPU, bf16 gradients are NaN in torch 2.14.)"""
        if not self.args.compile:
            return model
        if not hasattr(model, "backbone"):
            return torch.compile(model)
        twin = copy.copy(model)
        twin._modules = {**model._modules, "backbone": torch.compile(model.backbone)}
        return twin

    def sum_gradients(self, model):
        """Under torchrun: the sum of the ranks' gradients, which with `share` is the global batch's."""
        sum_gradients([p for p in model.parameters() if p.requires_grad])

    def normalise_as(self, *saved, paths=()):
        """Show images as these saved nets saw them. Raises ValueError where they saw different ones."""
        for each in saved:
            if (each["mean"], each["std"]) != (saved[0]["mean"], saved[0]["std"]):
                raise ValueError(f"{' and '.join(paths)} were trained on differently normalised images")
            self.data.mean, self.data.std = each["mean"], each["std"]

    # ---------------------------------------------------------------- scores, over all ranks

    def outputs(self, model):
        """(logits [N, C], features [N, D], targets [N]) of every test image."""
        images = every_image(self.test_images, rank(), ranks())
        self.last_outputs = [gather_ranks(part) for part in predict(model, images, self.autocast)]
        return self.last_outputs

    def scores(self, model):
        """all, many, medium, few, ece, mce, ... of a net."""
        logits, _, targets = self.outputs(model)
        return scores(logits, targets, self.data.class_counts)

    def class_means(self, model):
        """The mean unit feature of every class's training images, [C, D]."""
        images = every_image(self.train_images, rank(), ranks())
        sums = sum_ranks(class_sums(model, images, self.data.num_classes, self.autocast))
        return sums / self.class_counts.to(sums.device)[:, None]

    @torch.no_grad()
    def features(self, model, indices):
        """Features [n, D] of the training images at `indices`, not augmented, their targets [n] and indices
        [n], by index. On the CPU; every rank computes a part, all get all."""
        model.eval()
        mine, rows = indices[rank()::ranks()], []
        for images, targets, *_ in self.train_images.batches(mine if len(mine) else indices[:1]):
            with self.autocast():
                features = model(images)[1].float()
            kept = slice(None if len(mine) else 0)
            rows.append((features[kept], targets[kept]))

        parts = (*map(torch.cat, zip(*rows)), mine.to(self.device))
        features, targets, read = (gather_ranks(part).cpu() for part in parts)
        order = read.argsort()
        return features[order], targets[order], read[order]

    def gradient_norms(self, model, classes, head):
        """`gradient_norms` of the classes `head` among `classes`: on those of 512 training images, the same
        each time, that are of `classes`."""
        probe = torch.randperm(len(self.targets), generator=generator(self.args.seed, "probe"))[:512]
        probe = probe[torch.isin(self.targets[probe], classes.cpu())]
        return gradient_norms(model, self.train_images.batches(probe), head.to(self.device), self.autocast)

    def evaluate(self, load_model, assess):
        """--evaluate: the scores of a saved net, printed and returned. load_model(path, class_names) -> (net,
        what was saved with it); assess(run, net) -> scores."""
        model, saved = load_model(self.args.evaluate, self.data.class_names)
        self.normalise_as(saved)
        self.data.image_size = saved["image_size"]
        self.stages = [{"name": self.args.evaluate, **assess(self, model.to(self.device))}]
        self.report()
        return {"method": self.method, "dataset": self.data.name, **self.stages[0]}

    # ---------------------------------------------------------------- folder, stages, end

    def open(self, epochs=()):
        """Make the run's folder, or go on in it with --resume. epochs: of each stage that the run trains, in
        their order, for its bar. Raises ValueError."""
        args, data, self.planned = self.args, self.data, list(epochs)
        known_by = {"fingerprint": fingerprint(data), "class_names": list(data.class_names)}
        self.folder = open_folder(args, self.method, known_by, self.device)
        self.stop = Stop(args.time_limit, self.device)
        if args.test_fraction and rank() == 0:  # so that other scripts can share the split
            write_lists(self.listed, self.folder.path)

        sizes = shot_groups(data.class_counts)
        groups = ", ".join(f"{int(members.sum())} {group}" for group, members in sizes.items())
        precision = "bf16" if args.amp and supports_bf16(self.device) else "fp32"
        say_wrapped(f"{device_name(args.device)}, {precision}; {data.name}: {len(data.train):,} training "
                    f"images, {data.num_classes} classes ({groups})")
        say_wrapped(f"settings of the recipe {args.recipe} ({args.recipe_why}), images shown at "
                    f"{data.image_size} pixels; writing {self.folder.path}")

    def __enter__(self):
        self.guard = bad_input(UnreadableImage, LostWorker, Diverged)
        self.guard.__enter__()
        return self

    def __exit__(self, *reason):
        if self.bar:
            self.bar.close()
        return self.guard.__exit__(*reason)

    def add(self, name, result, outputs=None):
        """An entry of result.json's stages; the last one is the run's own. result: the scores of the net that
        was scored last, or nothing but None. outputs: what these are scores of, where it is not the net's own
        (logits, features, targets)."""
        done = self.folder.state.get("done", {}) if self.folder else {}
        self.stages.append({"name": name, **result, **done.get(name, UNTRAINED)})

        outputs, self.last_outputs = outputs or self.last_outputs, None
        if outputs is not None:
            (logits, _, targets), C = outputs, self.data.num_classes
            confusion = torch.bincount(targets * C + logits.argmax(1), minlength=C * C).view(C, C).cpu()
            if C <= 1000:
                self.stages[-1]["confusion"] = confusion.tolist()  # [true class][predicted class]
            if self.args.save_logits and self.folder and rank() == 0:
                self.folder.save_arrays(name, logits=logits, targets=targets, confusion=confusion,
                                        class_counts=self.class_counts)

    def finish(self):
        """Write result.json, print the table. Returns result.json's content."""
        result = self.folder.finish({
            "method": self.method, "dataset": self.data.name, "seed": self.args.seed, **self.stages[-1],
            "class_counts": self.data.class_counts.tolist(), "stages": self.stages})
        self.stop.close()
        self.report()
        names = sorted(path.name for path in self.folder.path.iterdir())
        files = ", ".join(f"{name} ({FILES[name]})" if name in FILES else name for name in names)
        say_wrapped(f"wrote {self.folder.path} in {tqdm.format_interval(result['seconds'])}: {files}")
        return result

    def report(self):
        """Print the table of the stages."""
        name = (lambda path: Path(path).name) if self.args.evaluate else str  # a path would not fit
        say(table([(name(stage["name"]), stage) for stage in self.stages]))

    def epochs(self, name, file, model, optimizer, epochs, augmentation="standard", batch_size=None, **about):
        """The epochs of a stage that are still to be done: all; those behind where a resumed run was cut off;
        none, where it had finished: then `model` is loaded from `file`, which is written behind the last one.

        model: the net, or (net, parts) where more is trained than the net that `file` is to hold. optimizer:
        one, or a list. about: saved in `file` beside what rebuilds the net.
        """
        model, parts = model if isinstance(model, tuple) else (model, model)
        done, path = self.folder.state.get("done", {}), self.folder.path / file
        if name in done:
            self._load_finished(name, path, model)
            return

        batch_size = batch_size or self.args.batch_size
        cut = Cut(batch_size, rank(), ranks(), self.args.grad_accumulation)
        loader = self.loader(self.data.train, cut, Augmentation(
            augmentation, self.seed(name, "augmentation"), getattr(self.args, "noise", 0.01)))
        state = self._open_stage(name, parts, optimizer)
        self._warn_of_few_steps(name, epochs, batch_size)
        if state["epoch"] or state["step"]:
            say(f"{name}: goes on after epoch {state['epoch']} of {epochs}, step {state['step']}")
        self.bar = self._bar(name, len(done), state["epoch"], epochs)
        peak_memory(self.device)  # from here on
        for number in range(state["epoch"], epochs):
            epoch = Epoch(self, number, epochs, loader, parts, optimizer, state)
            yield epoch
            epoch.close()
        self.bar.close()

        stats = {"best_all": state["best_all"], "seconds": state["seconds"],
                 "images_per_second": state["images"] / state["seconds"],
                 "peak_memory_mb": peak_memory(self.device), **state["means"]}
        save_net(path, self.method, model, self.data, augmentation=augmentation, **about)
        self.folder.save(done={**done, name: stats})

    def _bar(self, name, stage, done, epochs):
        """A bar of the whole run's epochs, on a terminal alone, anew for each stage. The time left is the
        run's, as if an epoch of the later stages took as long as this stage's do."""
        planned = self.planned or [epochs]
        self.epochs_before = sum(planned[:stage])  # of the finished stages
        return tqdm(desc=f"{name} ({stage + 1} of {len(planned)})", initial=self.epochs_before + done,
                    total=sum(planned), leave=False, smoothing=0, miniters=0, mininterval=REFRESH,
                    disable=None if rank() == 0 else True, dynamic_ncols=True,
                    bar_format="{desc} {percentage:3.0f}%|{bar}| {remaining} left{postfix}")

    def _warn_of_few_steps(self, name, epochs, batch_size):
        """Say where a stage is too short, or a batch too large, to learn anything."""
        n = len(self.data.train)
        steps = epochs * count_steps(n, batch_size)
        if steps < FEW_STEPS:
            larger = f" (larger than the {n:,} training images)" if batch_size > n else ""
            say_wrapped(f"note: {name} takes only {steps} steps in batches of {batch_size}{larger}; nets "
                        f"that start from nothing want thousands: more epochs, or a smaller --batch-size")

    def _load_finished(self, name, path, model):
        """The weights of a stage that a resumed run has finished."""
        with _fits(f"{name} is finished", path):
            model.load_state_dict(load_checkpoint(path)["state_dict"])

    def _open_stage(self, name, parts, optimizer):
        """What is saved of a stage besides these two, at its start; or what was saved in its middle, after
        loading these two. step, losses [terms, step]: of the epoch in progress; means: the last epoch's
        losses; best_all: percent, None before any score; seconds: of training."""
        fresh = {"stage": name, "epoch": 0, "step": 0, "losses": torch.zeros(0), "means": {},
                 "best_all": None, "seconds": 0.0, "images": 0}
        if self.folder.state.get("stage") != name:
            return fresh
        with _fits(f"{name} is begun", self.folder.path / "last.pt"):  # by an earlier version, say
            types = {key: type(value) for key, value in fresh.items() if value is not None}
            progress = self.folder.state["progress"]
            if not holds(progress, types) or progress["losses"].shape[-1:] != (progress["step"],):
                raise ValueError("its progress is no such stage's")
            parts.load_state_dict(self.folder.state["model"])
            saved = self.folder.state["optimizer"]
            for each, its in zip(optimizer, saved) if isinstance(optimizer, list) else [(optimizer, saved)]:
                each.load_state_dict(its)
            return progress

    def save_stage(self, state, parts, optimizer):
        """Write last.pt in the middle of a stage."""
        losses = sum_ranks(state["losses"].clone())
        optimizer = [each.state_dict() for each in optimizer] if isinstance(optimizer, list) else \
            optimizer.state_dict()
        self.folder.save(stage=state["stage"], progress={**state, "losses": losses}, model=parts.state_dict(),
                         optimizer=optimizer, done=self.folder.state.get("done", {}))


@contextlib.contextmanager
def _fits(what, path):
    """End the run where the file at `path` is not of the net that it is read into."""
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as reason:
        fail(f"{what}, but {path} cannot be used ({str(reason)[:200]}); bring it back, or train again with "
             f"another --out")


def say_wrapped(text):
    """`say` of a sentence, over lines of a terminal's 80 characters."""
    say(textwrap.fill(text, 80, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False))


class Epoch:
    """One epoch of a stage. number: from 0. state: as `Run._open_stage` has it. generator: for the sampler.
    now: how many epochs are done, 3.25 say; progress: the same in [0, 1]. is_scored: every --evaluate-every
    epochs, and the last."""

    def __init__(self, run, number, epochs, loader, parts, optimizer, state):
        self.run, self.number, self.epochs, self.stage = run, number, epochs, state["stage"]
        self.loader, self.parts, self.optimizer, self.state = loader, parts, optimizer, state
        self.generator = generator(run.args.seed, self.stage, "sampling", number)
        self.is_scored = (number + 1) % run.args.evaluate_every == 0 or number + 1 == epochs
        self.now, self.row, self.losses = float(number), {}, None

    @property
    def progress(self):
        return self.now / self.epochs

    def batches(self, indices):
        """This rank's batches of the training images at `indices`: (images, targets, share, ends_step).
        Behind a step the run may stop, with a checkpoint. At the end `row` holds the means of what `track`
        got."""
        run, state, bar = self.run, self.state, self.run.bar
        self.steps = count_steps(len(indices), self.loader.cut.batch_size)
        started, first, starts_step = time.time() - state["seconds"], state["step"], True
        if first > 0:  # cut off in this epoch, by as many ranks or by others
            losses = state["losses"] / ranks()
            self.losses = torch.nn.functional.pad(losses, (0, self.steps - first)).to(run.device)
            bar.n = bar.initial = run.epochs_before + self.number + first / self.steps

        for batch in self.loader.batches(indices, self.number, first):
            if starts_step:  # for what draws from torch's own generators: masks, mixing, drop path
                torch.manual_seed(run.seed(self.stage, "noise", self.number, state["step"], rank()))
            self.now = self.number + state["step"] / self.steps
            yield batch
            starts_step = batch.ends_step
            if batch.ends_step:
                state["step"] += 1
                done = run.epochs_before + self.number + state["step"] / self.steps
                if bar.update(done - bar.n):  # it is shown anew
                    loss = ranks() * self.losses[0, :state["step"]].mean().item()
                    bar.set_postfix_str(f"epoch {self.number + 1}/{self.epochs}, loss {loss:.3g}")
                if run.stop.wanted():
                    state.update(losses=self.losses[:, :state["step"]], seconds=time.time() - started)
                    self._check_finite(state["losses"])
                    run.save_stage(state, self.parts, self.optimizer)
                    run.stop.end(run.folder.path)

        average_buffers(self.parts)
        losses = self.step_losses = self._check_finite(self.losses)
        state.update(seconds=time.time() - started, images=state["images"] + len(indices),
                     means=dict(zip(state["terms"], losses.mean(1).tolist())))
        self.row = dict(state["means"])

    def track(self, **terms):
        """Add these losses, the one that is minimised first, to those of the step; without waiting for the
        device. With accumulation and ranks they are shares, whose sum is the step's."""
        values = torch.stack([value.detach().float() for value in terms.values()])
        if self.losses is None:
            self.state["terms"], self.losses = list(terms), values.new_zeros(len(values), self.steps)
        self.losses[:, self.state["step"]] += values

    def curve(self, term, points=50):
        """A tracked term at no more than so many of the epoch's steps, evenly spaced: a list to draw."""
        values = self.step_losses[self.state["terms"].index(term)].tolist()
        return [round(value, 5) for value in values[::-(-len(values) // points)]]

    def log(self, **row):
        """Add to the epoch's line of log.jsonl."""
        self.row.update(row)
        scored = [value for value in (self.state["best_all"], row.get("all")) if value is not None]
        self.state["best_all"] = max(scored, default=None)

    def close(self):
        """Write log.jsonl's line and a checkpoint; then print."""
        run, state = self.run, self.state
        state.update(epoch=self.number + 1, step=0, losses=torch.zeros(0))
        run.folder.log(stage=self.stage, epoch=self.number + 1, seconds=state["seconds"], **self.row)
        run.save_stage(state, self.parts, self.optimizer)

        if self.is_scored:
            say(f"{self.stage}, epoch {self.number + 1} of {self.epochs}: " + ", ".join(
                f"{key} {self.row[key]:.3g}" for key in (*state["terms"], "all") if key in self.row))

    def _check_finite(self, losses):
        """The losses [terms, steps] summed over the ranks, on the CPU; the epoch's one wait for the device.
        Ends the run where one of them, or a weight, is not finite: nothing of it is saved."""
        losses = sum_ranks(losses.clone()).cpu()
        bad = (~losses.isfinite()).any(0).nonzero().flatten().tolist()
        weights = [value for value in self.parts.state_dict().values() if value.is_floating_point()]
        if not bad and torch.stack([value.isfinite().all() for value in weights]).all():
            return losses

        what = f"the loss became {losses[0, bad[0]].item()} at step {bad[0] + 1}" if bad else \
            "the weights are no longer finite at the end"
        last = self.run.folder.path / "last.pt"
        fail(f"{self.stage} diverged: {what} of epoch {self.number + 1}; train again with a smaller learning "
             f"rate and another --out (--resume keeps a run's settings); last good checkpoint: "
             f"{last if last.exists() else 'none yet'}")
