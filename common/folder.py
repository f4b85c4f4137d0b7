"""What a run leaves on disk: its folder, log.jsonl, result.json, nets, checkpoints that outlive a crash."""
import json
import os
import platform
import subprocess
import sys
import time
import warnings
import zipfile
from itertools import count
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from common.ranks import (choose_device, derive_seed, fail, rank, ranks, reason_of, say, sum_ranks,
                          wait_for_ranks)

MAY_CHANGE = ("workers", "device", "compile", "time_limit", "resume", "out", "skip_bad_images", "recipe_why",
              "dataset", "data_dir", "train_list", "test_list")  # the fingerprint says whether it is the same


# ---------------------------------------------------------------- files

def atomic_write(path, write, keep=None):
    """Call write(file) on a new file that then takes the place of `path` in one step: a reader, or a crash,
    sees the old file or the new one. keep: where an undamaged old one stays. When it cannot be written, as on
    a full disk, the old one stays and the run ends by `fail`."""
    path = Path(path)
    part = path.with_name(path.name + ".part")

    try:
        part.unlink(missing_ok=True)
        with open(part, "xb") as file:  # x: a new file, never what a link of that name points to
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if keep and path.exists() and not damage_of(path):
            _link_or_copy(path, keep)
        os.replace(part, path)
    except (OSError, RuntimeError) as reason:  # torch.save turns the first into the second
        if part.is_file():
            part.unlink()
        _cannot_write(path, reason if isinstance(reason, OSError) else reason.__context__)


def _cannot_write(path, reason):
    why = reason_of(reason) if isinstance(reason, OSError) else "the disk is full, perhaps"
    fail(f"cannot write {path}: {why}; what was there before is still there: make room, then --resume",
         shared=False)


def _link_or_copy(path, keep):
    """Let `keep` be the file at `path` too; at every moment both names hold a whole file."""
    spare = keep.with_name(keep.name + ".part")
    spare.unlink(missing_ok=True)
    try:
        os.link(path, spare)
    except OSError:  # a file system without hard links
        spare.write_bytes(path.read_bytes())
    os.replace(spare, keep)


def damage_of(path):
    """What is wrong with a file that torch.save wrote, by the checksums that it holds (torch does not look at
    them); None where nothing is."""
    try:
        with zipfile.ZipFile(path) as archive:
            # a flipped bit can mark an entry as a folder (16): its checksum holds, but torch reads nothing
            folders = (entry.filename for entry in archive.infolist() if entry.external_attr & 16)
            bad = archive.testzip() or next(folders, None)
    except Exception as reason:  # zipfile raises its own, and others, for what is no archive
        return f"it is cut off or not a checkpoint ({type(reason).__name__})"
    return f"its part {bad} is damaged" if bad else None


def save_checkpoint(path, content):
    """Write tensors and plain values atomically. Rank 0 alone writes."""
    if rank() == 0:
        atomic_write(path, lambda file: torch.save(content, file))


def load_checkpoint(path):
    """Read what `save_checkpoint` wrote, onto the CPU; executes no code from the file. Raises ValueError."""
    if not Path(path).is_file():
        why = " is a folder; name a file in it, such as student.pt or model.pt" if Path(path).is_dir() else ""
        raise ValueError(f"no such checkpoint: {path}{why}")
    damage = damage_of(path)
    if damage:
        raise ValueError(f"cannot read the checkpoint {path}: {damage}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's are about what it then refuses
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as reason:  # torch and pickle each raise their own; their advice is to run what it holds
        raise ValueError(f"cannot read the checkpoint {path}: it holds more than tensors and plain values "
                         f"({type(reason).__name__})") from reason


# ---------------------------------------------------------------- nets

def save_net(path, method, model, data, **about):
    """Write a net with what rebuilds it, `model.settings`, and what its images must look like.

    about: what else belongs to it; "augmentation", say.
    """
    save_checkpoint(path, {
        "method": method, "kind": type(model).__name__, "settings": model.settings, "dataset": data.name,
        "class_names": data.class_names, "class_counts": data.class_counts.tolist(), "mean": data.mean,
        "std": data.std, "image_size": data.image_size, **about,
        "state_dict": {name: value.cpu() for name, value in model.state_dict().items()}})


def load_net(path, method, kinds, class_names=None, arch=None):
    """A net that `save_net` wrote, in eval mode, on the CPU, and what was saved with it.

    kinds: the classes that it may be of. class_names: those of the data set that it is to meet (None: any);
    the same names in another order are brought into that order. arch: refuse a net that has another. Raises
    ValueError.
    """
    saved = load_checkpoint(path)
    kinds = {kind.__name__: kind for kind in kinds}
    if not _is_net(saved) or saved["method"] != method or saved["kind"] not in kinds:
        raise ValueError(f"{path} is not a net that {method}.py saved ({' or '.join(kinds)})")

    if arch not in (None, saved["settings"].get("arch")):
        raise ValueError(f"{path} holds a {saved['settings'].get('arch')}, not a {arch} (--arch)")
    try:
        model = kinds[saved["kind"]](**saved["settings"])
        model.load_state_dict(saved["state_dict"])
    except (RuntimeError, TypeError, ValueError, KeyError, AttributeError) as reason:
        why = " ".join(str(reason).split())[:200]
        raise ValueError(f"{path}: its weights do not fit its net {saved['kind']}: {why}") from reason
    if not all(value.isfinite().all() for value in model.state_dict().values()):
        raise ValueError(f"{path}: its weights are not finite: the net has diverged")

    if class_names is not None:
        _order_classes(model, saved, list(class_names), path)
    return model.to(memory_format=torch.channels_last).eval(), saved


def _is_net(saved):
    """Whether a checkpoint holds what `save_net` writes, each entry of its type."""
    types = {"method": str, "kind": str, "settings": dict, "class_names": list, "class_counts": list,
             "mean": tuple, "std": tuple, "image_size": int, "state_dict": dict}
    if not holds(saved, types) or not 1 < saved["image_size"] < 2**15:
        return False
    return len(saved["mean"]) == len(saved["std"]) == 3 and \
        all(isinstance(value, float) for value in (*saved["mean"], *saved["std"])) and \
        len(saved["class_names"]) == len(saved["class_counts"])


def holds(content, types):
    """Whether an object is a dict that has these entries, each of its type."""
    return isinstance(content, dict) and all(isinstance(content.get(key), types[key]) for key in types)


def _is_state(state):
    """Whether a checkpoint holds what `Folder.save` writes, each entry of its type."""
    types = {"args": dict, "data": dict, "log_lines": int, "run_seconds": float}
    return holds(state, types) and holds(state["data"], {"fingerprint": str, "class_names": list}) and \
        all(isinstance(state.get(key, {}), dict) for key in ("done", "progress"))


def first_difference(there, here):
    """The first of the class names `there` that is not among those `here`, and the first of those here that
    is not among those there, in quotes; none for either where there is none."""
    found, known = set(here), set(there)
    return next((repr(name) for name in there if name not in found), "none"), \
        next((repr(name) for name in here if name not in known), "none")


def _order_classes(model, saved, names, path):
    """Bring the rows of a net's classifiers, and what was saved of the classes, into the order of `names`.
    Raises ValueError for other names."""
    have = list(saved["class_names"])
    if len(have) != len(names):
        raise ValueError(f"{path} knows {len(have)} classes, the data set has {len(names)}")
    if have == names:
        return
    there, here = first_difference(have, names)
    if there != here:
        raise ValueError(f"{path} knows other classes than the data set: {there} there, {here} here")

    order = torch.tensor([have.index(name) for name in names])
    for name, value in model.state_dict().items():
        if {"classifier", "known", "head"} & set(name.split(".")) and value.ndim > 0:  # not the scale of all
            value.copy_(value[order])
    saved["class_names"] = names
    saved["class_counts"] = [saved["class_counts"][i] for i in order]
    say(f"note: {path} knows the same classes in another order; they are matched by name")


# ---------------------------------------------------------------- the folder

class Folder:
    """The folder that a run writes: log.jsonl, last.pt, result.json and nets. Only rank 0 writes.

    path: where it is. state: what `save` last wrote, {} at a fresh start. data: the data set's "fingerprint"
    and "class_names".
    """

    def __init__(self, path, args, data):
        self.path, self.args, self.data, self.state = path, args, data, {}
        self.started, self.lock = time.time(), lock(path) if rank() == 0 else None

    def seconds(self):
        """Seconds that the run has taken so far, evaluation included, over all resumed parts."""
        return self.state.get("seconds_before", 0.0) + time.time() - self.started

    def log(self, **row):
        """Append one line to log.jsonl."""
        if rank() == 0:
            try:
                with open(self.path / "log.jsonl", "a") as file:
                    file.write(json.dumps(row) + "\n")
            except OSError as reason:  # which does not name the file where the disk is full
                _cannot_write(self.path / "log.jsonl", reason)

    def save(self, **state):
        """Write last.pt: `state` replaces what was there, which becomes previous.pt, and is `.state` from now
        on."""
        log = self.path / "log.jsonl"
        lines = log.read_bytes().count(b"\n") if rank() == 0 and log.exists() else 0
        before = self.state.get("seconds_before", 0.0)
        self.state = {**state, "args": vars(self.args), "data": self.data, "run_seconds": self.seconds(),
                      "seconds_before": before, "log_lines": lines}
        if rank() == 0:
            atomic_write(self.path / "last.pt", lambda file: torch.save(self.state, file),
                         keep=self.path / "previous.pt")

    def save_arrays(self, name, **tensors):
        """Write tensors as arrays of <name>.npz, the name without blanks and commas."""
        arrays = {key: tensor.cpu().numpy() for key, tensor in tensors.items()}
        path = self.path / ("_".join(name.replace(",", " ").split()) + ".npz")
        atomic_write(path, lambda file: np.savez_compressed(file, **arrays))

    # ------------------------------------------------------------ going on after an end

    def resume(self):
        """Take up what is in the folder, where there is something. Raises ValueError where it belongs to
        another run, or is damaged."""
        state = load_last(self.path)
        if not state:
            left = sorted(path.name for path in self.path.iterdir()
                          if path.suffix == ".pt" or path.name == "result.json")
            if left:
                raise ValueError(f"{self.path} holds {left[0]} but no last.pt to go on from; name another "
                                 f"--out")
            return

        saved, now = (json.loads(json.dumps(args)) for args in (state["args"], vars(self.args)))
        reasons = []
        differing = [key for key in now if key not in MAY_CHANGE and now[key] != saved.get(key)]
        if differing:
            reasons.append("other settings: " + ", ".join(
                f"--{key.replace('_', '-')} {saved.get(key)}, now {now[key]}" for key in differing)
                + "; give those of then, or name another --out")
        if state["data"] != self.data:
            was, here = first_difference(state["data"]["class_names"], self.data["class_names"])
            other = f"a class was {was}, now {here}" if was != here else \
                f"the images, labels or class names of {self.args.dataset} have changed"
            reasons.append(f"other data: {other}; bring it back, or name another --out")
        if reasons:  # both where defaults follow from the data
            raise ValueError(f"{self.path} was started with " + ", and with ".join(reasons))
        self.state = {**state, "seconds_before": state["run_seconds"]}

    def check_ranks_agree(self, device):
        """Raise ValueError where the ranks have resumed from different places."""
        progress = self.state.get("progress", {})
        done = sorted(self.state.get("done", {}))
        place = float(derive_seed(*map(progress.get, ("stage", "epoch", "step")), done) % 2**20)
        if sum_ranks(torch.tensor(place, device=device)).item() != ranks() * place:
            raise ValueError(f"ranks see different checkpoints in {self.path}: all machines must share the "
                             f"disk of --out")

    def start_log(self, method):
        """Write log.jsonl's first line; or after a resume cut off what is behind the checkpoint, and so will
        be written again."""
        log = self.path / "log.jsonl"
        lines = log.read_bytes().splitlines(keepends=True)[:self.state["log_lines"]] \
            if self.state and log.exists() else []
        if not lines:
            if self.state:
                say(f"note: {log} is gone; a new one begins here")
            header = {"argv": sys.argv, "method": method, "args": vars(self.args), "versions": versions(),
                      "device": device_name(self.args.device), "ranks": ranks(), "git_commit": git_commit()}
            lines = [(json.dumps(header) + "\n").encode()]
        atomic_write(log, lambda file: file.writelines(lines))

    # ------------------------------------------------------------ the end

    def finish(self, result):
        """Write result.json, let the folder go. Returns the result."""
        result = {**result, "seconds": self.seconds(), "args": vars(self.args), "versions": versions()}
        if rank() == 0:
            lines = (f" {json.dumps(key)}: {json.dumps(value)}" for key, value in result.items())
            text = "{\n" + ",\n".join(lines) + "\n}\n"
            atomic_write(self.path / "result.json", lambda file: file.write(text.encode()))
            for name in ("previous.pt", ".lock"):
                (self.path / name).unlink(missing_ok=True)
        self.close()
        return result

    def close(self):
        """Let other processes write to the folder."""
        if self.lock:
            self.lock.close()


def open_folder(args, method, data, device):
    """Make the run's folder, or open it again with --resume.

    Default runs/<method>_<dataset>_seed<seed>, with -2, -3, ... behind it when taken. A named --out that is
    taken is refused unless --resume, which continues there, or starts if nothing is there. Resuming with
    other settings, or other data, is refused. data: as in `Folder`. Returns a `Folder`. Raises ValueError,
    OSError.
    """
    default = default_folder(args, method)
    if args.out:
        check_free(Path(args.out), args.resume)
    wait_for_ranks()  # every rank has looked before rank 0 makes the folder
    names = [str(make_folder(args.out, default, args.resume)) if rank() == 0 else None]
    if ranks() > 1:
        dist.broadcast_object_list(names, 0)

    folder = Folder(Path(names[0]), args, data)
    if args.resume:
        folder.resume()
    folder.check_ranks_agree(device)
    if rank() == 0:
        folder.start_log(method)
    wait_for_ranks()
    return folder


def default_folder(args, method):
    """Where a run goes without --out, if that is free."""
    dataset = Path(args.dataset).stem if args.dataset.endswith(".npz") else args.dataset
    return Path(f"runs/{method}_{dataset}_seed{args.seed}")


def readable_cache(args):
    """Where it is remembered which image files can be read: beside --out, or for all runs without one."""
    return Path(f"{args.out or 'runs/files'}.readable.npy")


def check_free(path, resume):
    """Raise ValueError where a path cannot be a new folder, or with `resume` one to go on in."""
    if os.path.lexists(path) and not path.is_dir():
        kind = "a link that leads to no folder" if path.is_symlink() else "no folder"
        raise ValueError(f"{path} is {kind}; name another, or remove it")
    if path.is_dir() and any(path.iterdir()) and not resume:
        raise ValueError(f"{path} is taken; name another --out, or continue it with --resume")


def make_folder(out, default, resume):
    """The folder that --out names, or the default one, or the first free one behind that. Raises
    ValueError, OSError."""
    if out:
        Path(out).mkdir(parents=True, exist_ok=True)
        return Path(out)
    default.parent.mkdir(parents=True, exist_ok=True)
    if resume:
        check_free(default, resume)
        default.mkdir(exist_ok=True)
        return default
    for number in count(1):
        path = default if number == 1 else Path(f"{default}-{number}")
        if not os.path.lexists(path):
            try:
                path.mkdir()
                return path
            except FileExistsError:  # another run took it, a moment ago
                continue


def lock(folder):
    """Keep other processes from writing to a folder until the returned file is closed or the process ends
    (on Windows nothing does). Raises ValueError when one does, OSError."""
    try:
        import fcntl
    except ImportError:
        return None

    file = os.fdopen(os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666), "w")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as reason:
        raise ValueError(f"another process writes to {folder}; wait for its end, or name another --out") \
            from reason
    except OSError as reason:  # file systems without locks: some network disks
        say(f"note: {folder} cannot be locked ({reason_of(reason)}); start no second run in it")
    return file


def load_last(folder):
    """What `Folder.save` last wrote, or where that is damaged what it wrote before; {} where there is
    nothing. Raises ValueError when all is damaged."""
    damage = None
    for path in (folder / "last.pt", folder / "last.pt.part", folder / "previous.pt"):
        if path.exists():
            try:
                state = load_checkpoint(path)
            except ValueError as reason:
                damage = damage or reason
                continue
            if not _is_state(state):
                raise ValueError(f"{path} is not a run's checkpoint, or an older version's; name another "
                                 f"--out")
            if path.name != "last.pt":
                say(f"{damage or f'{folder}/last.pt is missing'}; going on from {path}")
            return state
    if damage and not (folder / "last.pt").exists() and not (folder / "previous.pt").exists():
        return {}  # the first save was cut off
    if damage:
        raise ValueError(f"{damage}, and there is no earlier one; train again, with another --out")
    return {}


def class_names_in(folder):
    """The class names of the data that the run in a folder began with; None where nothing says it."""
    for name in ("last.pt", "last.pt.part", "previous.pt"):
        try:
            state = load_checkpoint(Path(folder, name))
        except ValueError:  # `load_last` says what is wrong with it
            continue
        return state["data"]["class_names"] if _is_state(state) else None
    return None


# ---------------------------------------------------------------- what a number depends on

def versions():
    """What the numbers of a run may depend on: {"python", "torch", "numpy"}."""
    return {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}


def device_name(name):
    """The device's name, and on a CPU its threads."""
    device = choose_device(name)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = "unknown CPU"
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        model = models[0] if models else platform.machine()
    return f"{device.type}: {model}, {torch.get_num_threads()} threads"


def git_commit():
    """The commit this code is at, with "+" behind it when files differ from it; None outside a repository."""
    def git(*words):
        return subprocess.run(["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True,
                              check=True).stdout.strip()
    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
