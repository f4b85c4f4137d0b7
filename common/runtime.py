"""Device, seeds, torchrun, checkpoints, run folder: nothing that a paper says."""
import argparse
import atexit
import contextlib
import datetime
import hashlib
import json
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm


# ---------------------------------------------------------------- bad input

class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line `error: ...` on standard error, with exit code 2."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter, **kwargs)

    def error(self, message):
        fail(message)


def fail(message, shared=True):
    """End the run: one line `error: ...` on standard error, exit code 2. shared: every rank meets this error,
    so that the first one of a machine alone prints it."""
    if int(os.environ.get("LOCAL_RANK", 0)) == 0 or not shared:
        print(f"error: {' '.join(str(message).split())}", file=sys.stderr, flush=True)
    sys.exit(2)


@contextlib.contextmanager
def bad_input(kind=ValueError, shared=True):
    """Inside, an exception of that kind (all functions here raise ValueError on bad input) ends the run by
    `fail`, and so does a package that is missing or broken. One with a true `.one_rank` is not shared."""
    try:
        yield
    except kind as reason:
        fail(reason, shared and not getattr(reason, "one_rank", False))
    except ImportError as reason:
        fail(f"{reason}; pip install -r requirements.txt")


def parse_with_recipe(parser, recipes, image_side, argv=None):
    """Parse argv with the chosen recipe's settings as the defaults, so that flags win.

    recipes: {name: {flag with underscores: value, "quick": {...}}}; `quick` holds what --quick changes.
    Without --recipe it is the data set's own; if it has none, cifar100_lt up to 64 pixels, else imagenet_lt.
    image_side(dataset, data_dir): side of a data set's images in pixels, None where that is not known yet.
    """
    first = [a for a in (sys.argv[1:] if argv is None else argv) if a not in ("-h", "--help")]
    known, _ = parser.parse_known_args(first)
    name = known.recipe or known.dataset
    if not known.recipe and name not in recipes:
        name = "cifar100_lt" if (image_side(name, known.data_dir) or 32) <= 64 else "imagenet_lt"
    if name not in recipes:
        fail(f"unknown recipe {name!r}; known: {', '.join(recipes)}")
    settings = dict(recipes[name])
    quick = settings.pop("quick")
    parser.set_defaults(**{**settings, **(quick if known.quick else {}), "recipe": name})
    return parser.parse_args(argv)


def check_flags(args, device):
    """Refuse whole numbers below 1 (but seeds) and others that are negative or not finite. Raises
    ValueError."""
    for name, value in vars(args).items():
        flag = "--" + name.replace("_", "-")
        if type(value) is int and value < 1 and name not in ("seed", "subset_seed", "workers"):
            raise ValueError(f"{flag} must be at least 1, got {value}")
        if type(value) is float and not 0 <= value < float("inf"):
            raise ValueError(f"{flag} must be a number that is not negative, got {value}")
    if args.workers < 0:
        raise ValueError(f"--workers must not be negative, got {args.workers}")
    if args.sync_bn and (device.type != "cuda" or ranks() == 1):
        raise ValueError("--sync-bn needs GPUs and torchrun: torch's SyncBatchNorm has no CPU version")


# ---------------------------------------------------------------- device and precision

def choose_device(name="auto"):
    """The device to run on. "auto": this rank's GPU, else Apple's, else the CPU. Raises ValueError."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else \
            "mps" if torch.backends.mps.is_available() and ranks() == 1 else "cpu"
    try:
        device = torch.device(name)
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", device.index or 0)))
            torch.cuda.set_device(device)
            torch.backends.cudnn.benchmark = True
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as reason:
        raise ValueError(f"cannot use the device {name!r}: {str(reason).splitlines()[0]}") from reason
    return device


def supports_bf16(device):
    """Whether bf16 products run in hardware there, and so pay: Ampere or later; AVX512-BF16, AMX or Arm
    BF16."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu" and Path("/proc/cpuinfo").exists():
        words = set(Path("/proc/cpuinfo").read_text().split())
        return bool(words & {"avx512_bf16", "amx_bf16", "bf16"})
    return False


def cores():
    """CPU cores for each of this machine's ranks, at least 1."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, allowed // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def autocast(device, enabled):
    """A function that returns a fresh bf16 autocast context, or one that does nothing where bf16 does not
    pay."""
    enabled = enabled and supports_bf16(device)
    return lambda: torch.autocast(device.type, torch.bfloat16) if enabled \
        else contextlib.nullcontext()


def peak_memory(device):
    """The most memory in MiB since the last call, which it starts anew: of a GPU's tensors; on Linux of this
    process with all it imported; None elsewhere."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device) / 2**20
        torch.cuda.reset_peak_memory_stats(device)
        return peak
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not os.access(reset, os.W_OK):
        return None
    peak = [line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM")]
    reset.write_text("5")
    return int(peak[0]) / 1024 if peak else None


def derive_seed(*parts):
    """A 48-bit seed from anything printable: unlike for unlike parts, the same on every machine and
    version."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=6).digest(), "big")


def generator(*parts):
    """A CPU random generator seeded by `derive_seed(*parts)`."""
    return torch.Generator().manual_seed(derive_seed(*parts))


# ---------------------------------------------------------------- torchrun

def rank():
    """This process's number among all that torchrun started, 0 without torchrun."""
    return int(os.environ.get("RANK", 0))


def ranks():
    """How many processes torchrun started on all nodes, 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", 1))


def start_ranks(device_name):
    """Join the other processes when torchrun started this one. Returns the device."""
    with bad_input(shared=False):
        device = choose_device(device_name)
    if ranks() > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo",
                                timeout=datetime.timedelta(minutes=30))
        if dist.get_backend() == "gloo":
            # Its threads need Python's lock to let go of the last tensors: without this pause Python's end
            # may abort them, and so the process; destroy_process_group, which holds that lock, may hang
            atexit.register(time.sleep, 0.5)
    return device


@contextlib.contextmanager
def first_rank_first():
    """What is inside runs on one rank of each machine before the others: it may download files."""
    local = int(os.environ.get("LOCAL_RANK", 0))
    if local > 0:
        wait_for_ranks()
    yield
    if local == 0:
        wait_for_ranks()


def sum_gradients(parameters):
    """Add up the ranks' gradients, in one transfer. With each rank's loss scaled by its batch's `share`, the
    sum is the gradient of the mean over the global batch, for uneven last batches too."""
    if ranks() == 1:
        return
    grads = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.reshape(-1) for g in grads])
    dist.all_reduce(flat)
    for grad, total in zip(grads, flat.split([g.numel() for g in grads])):
        grad.copy_(total.view_as(grad))


def sum_ranks(tensor):
    """The sum of a tensor over all ranks, in place."""
    if ranks() > 1:
        dist.all_reduce(tensor)
    return tensor


def average_buffers(model):
    """Make batch norm's running statistics the ranks' mean, so that every rank holds one and the same
    model."""
    for buffer in model.buffers():
        if ranks() > 1 and buffer.is_floating_point():
            dist.all_reduce(buffer)
            buffer /= ranks()


def gather_ranks(tensor):
    """The ranks' tensors [n_r, ...], n_r of any size, put one behind the other: [sum n_r, ...], on every
    rank."""
    if ranks() == 1:
        return tensor
    sizes = torch.zeros(ranks(), dtype=torch.int64, device=tensor.device)
    sizes[rank()] = len(tensor)
    sizes = sum_ranks(sizes).tolist()
    padded = tensor.new_zeros(max(sizes), *tensor.shape[1:])
    padded[:len(tensor)] = tensor
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return torch.cat([part[:size] for part, size in zip(parts, sizes)])


def say(text):
    """Print, on rank 0, without cutting a progress bar."""
    if rank() == 0:
        tqdm.write(text)


def wait_for_ranks():
    """Return once every rank is here."""
    if ranks() > 1:
        dist.barrier()


# ---------------------------------------------------------------- files

def atomic_write(path, write, keep=None):
    """Call write(file) on a new file that then takes the place of `path` in one step: a reader, or a crash,
    sees the old file or the new one. keep: where the old one is moved to. When it cannot be written, as on a
    full disk, the old one stays and the run ends by `fail`."""
    path = Path(path)
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as reason:  # torch.save turns the first into the second
        part.unlink(missing_ok=True)
        why = reason.strerror if isinstance(reason, OSError) else str(reason).split("\n")[0]
        fail(f"cannot write {path}: {why}; what was there before is still there: make room, then --resume",
             shared=False)
    if keep and path.exists():
        os.replace(path, keep)
    os.replace(part, path)


def save_checkpoint(path, content):
    """Write tensors and plain values atomically. Rank 0 alone writes."""
    if rank() == 0:
        atomic_write(path, lambda file: torch.save(content, file))


def load_checkpoint(path):
    """Read what `save_checkpoint` wrote, onto the CPU; executes no code from the file. Raises ValueError."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as reason:  # torch, zipfile and pickle each raise their own
        why = (str(reason) or type(reason).__name__).splitlines()[0]
        raise ValueError(f"cannot read the checkpoint {path}: {why}") from reason


def load_net(path, method, num_classes=None, arch=None):
    """What a method's script saved of a net: its "state_dict", "arch", "class_names", "mean", "std", ...

    method, arch, num_classes: refuse a net of another script, architecture or number of classes. Raises
    ValueError.
    """
    if not Path(path).is_file():
        raise ValueError(f"no such checkpoint: {path}")
    saved = load_checkpoint(path)
    if not isinstance(saved, dict) or saved.get("method") != method:
        raise ValueError(f"{path} is not a net that {method}.py saved")
    if arch not in (None, saved["arch"]):
        raise ValueError(f"{path} holds a {saved['arch']}, not a {arch} (--arch)")
    if num_classes not in (None, len(saved["class_names"])):
        raise ValueError(f"{path} knows {len(saved['class_names'])} classes, the data set has {num_classes}")
    return saved


class Run:
    """The folder that a run writes: log.jsonl, last.pt, result.json and the final weights.

    Opened by `open_run`. `.state` is what `save` last wrote ({} at a fresh start). Only rank 0 writes. From
    here on SIGTERM and SIGINT are remembered, for `must_stop`; a second one ends the process at once.
    """

    def __init__(self, folder, args, state, lock=None):
        self.folder, self.args, self.state, self.started = folder, args, state, time.time()
        self.steps = 0  # in this process
        self.device = choose_device(args.device)
        self.seconds_before = state.get("run_seconds", 0.0)
        self.lock, self.signal, self.handlers = lock, None, {}
        if threading.current_thread() is threading.main_thread():  # Python allows handlers there alone
            self.handlers = {number: signal.signal(number, self._remember)
                             for number in (signal.SIGTERM, signal.SIGINT)}

    def _remember(self, number, frame):
        self.signal = number
        for each in self.handlers:
            signal.signal(each, signal.SIG_DFL)

    def close(self):
        """Give back the signals' handlers and the folder."""
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        if self.lock:
            self.lock.close()

    def seconds(self):
        """Seconds that the run has taken so far, evaluation included, over all resumed parts."""
        return self.seconds_before + time.time() - self.started

    def open_stage(self, name, model, optimizer):
        """What is saved of a stage besides these two, at its start; or what was saved in its middle, after
        loading these two. step, losses: of the epoch in progress; best_all: percent; seconds: of training."""
        if self.state.get("stage") != name:
            return {"stage": name, "epoch": 0, "step": 0, "losses": torch.zeros(0), "best_all": 0.0,
                    "seconds": 0.0}
        model.load_state_dict(self.state["model"])
        optimizer.load_state_dict(self.state["optimizer"])
        return self.state["progress"]

    def save_stage(self, state, model, optimizer):
        """Write last.pt in the middle of a stage. state: as `open_stage` returned it, brought up to date."""
        losses = sum_ranks(state["losses"].clone()) / ranks()  # summed again at the epoch's end
        self.save(stage=state["stage"], progress={**state, "losses": losses}, model=model.state_dict(),
                  optimizer=optimizer.state_dict(), done=self.state.get("done", {}))

    def must_stop(self):
        """Whether the run must end after this step: a signal has come, or --time-limit (minutes since this
        process's start) has passed. Under torchrun the ranks agree on it in every 16th call."""
        self.steps += 1
        if ranks() > 1 and self.steps % 16:
            return False
        limit = self.args.time_limit
        stops = self.signal is not None or limit is not None and time.time() - self.started > 60 * limit
        return stops if ranks() == 1 else \
            bool(sum_ranks(torch.tensor(float(stops), device=self.device)).item())

    def stop(self):
        """End the process, after `save`: exit code 0 for --time-limit, 128 + the signal's number else."""
        self.close()
        reason = "--time-limit" if self.signal is None else signal.Signals(self.signal).name
        say(f"stopped by {reason}; the same command with --resume --out {self.folder} goes on")
        sys.exit(0 if self.signal is None else 128 + self.signal)

    def check_losses(self, losses, stage, epoch, lr_at):
        """The mean of an epoch's losses [steps], each summed over the ranks. Ends the run when one is not
        finite, naming the step and its lr, lr_at(step). It is an epoch's one wait for the device."""
        losses = sum_ranks(losses).cpu()
        bad = (~losses.isfinite()).nonzero().flatten().tolist()
        if bad:
            last = self.folder / "last.pt"
            fail(f"the loss of {stage} became {losses[bad[0]].item()} at step {bad[0] + 1} of epoch "
                 f"{epoch + 1}, lr {lr_at(bad[0]):g}; try a smaller learning rate; last good checkpoint: "
                 f"{last if last.exists() else 'none yet'}")
        return losses.mean().item()

    def log(self, **row):
        """Append one line to log.jsonl."""
        if rank() == 0:
            path = self.folder / "log.jsonl"
            try:
                with open(path, "a") as file:
                    file.write(json.dumps(row) + "\n")
            except OSError as reason:
                fail(f"cannot write {path}: {reason.strerror}; make room, then --resume", shared=False)

    def save(self, **state):
        """Write last.pt: `state` replaces what was there, which becomes previous.pt, and is `.state` from now
        on."""
        lines = (self.folder / "log.jsonl").read_bytes().count(b"\n") if rank() == 0 else 0
        self.state = {**state, "args": vars(self.args), "run_seconds": self.seconds(),
                      "log_lines": lines}
        if rank() == 0:
            atomic_write(self.folder / "last.pt", lambda file: torch.save(self.state, file),
                         keep=self.folder / "previous.pt")

    def finish(self, method, data, stages):
        """Write result.json: the last of `stages` is the run's own. Returns its content."""
        result = {"method": method, "dataset": data.name, "seed": self.args.seed, **stages[-1],
                  "class_counts": data.class_counts.tolist(), "stages": stages, "seconds": self.seconds(),
                  "args": vars(self.args), "versions": versions()}
        if rank() == 0:
            text = json.dumps(result, indent=1)
            atomic_write(self.folder / "result.json", lambda file: file.write(text.encode()))
            (self.folder / "previous.pt").unlink(missing_ok=True)
            (self.folder / ".lock").unlink(missing_ok=True)
        self.close()
        return result


def report_bad_images(loaders):
    """Name and count, on every rank, the image files that --skip-bad-images left out there."""
    reasons = sorted(set().union(*(loader.bad_images for loader in loaders)))
    for reason in reasons:
        tqdm.write(f"left out by --skip-bad-images: {reason}")
    if reasons:
        tqdm.write(f"--skip-bad-images left out {len(reasons)} files (rank {rank()})")


def lock_folder(folder):
    """Keep other processes from writing to a folder until the returned file is closed or the process ends
    (on Windows nothing does). Raises ValueError when one does."""
    try:
        import fcntl
    except ImportError:
        return None
    file = open(folder / ".lock", "w")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as reason:
        raise ValueError(f"another process writes to {folder}; wait for its end, or name another --out") \
            from reason
    return file


def load_last(folder):
    """What `Run.save` last wrote, or what it wrote before where that is damaged; {} where there is nothing.
    Raises ValueError when all is damaged."""
    damage = None
    for path in (folder / "last.pt", folder / "previous.pt"):
        if path.exists():
            try:
                state = load_checkpoint(path)
                if damage:
                    say(f"{damage}; going on from {path}")
                return state
            except ValueError as reason:
                damage = reason
    if damage:
        raise ValueError(f"{damage}, and there is no earlier one; train again, with another --out")
    return {}


MAY_CHANGE = ("workers", "device", "compile", "time_limit", "resume", "out", "data_dir", "skip_bad_images")


def open_run(args, method):
    """Make the run's folder, or open it again with --resume.

    Default runs/<method>_<dataset>_seed<seed>, with -2, -3, ... behind it when taken. A named --out that is
    taken is refused unless --resume, which continues there, or starts if nothing is there. Resuming with
    other settings is refused. Returns a `Run`. Raises ValueError.
    """
    dataset = Path(args.dataset).stem if args.dataset.endswith(".npz") else args.dataset
    default = f"runs/{method}_{dataset}_seed{args.seed}"
    folder, number = Path(args.out or default), 2
    if args.out and folder.exists() and (not folder.is_dir() or any(folder.iterdir())) and not args.resume:
        raise ValueError(f"{folder} is taken; name another --out, or continue it with --resume")
    wait_for_ranks()  # every rank has looked before rank 0 makes the folder
    try:
        while rank() == 0:
            try:
                folder.mkdir(parents=True, exist_ok=bool(args.out or args.resume))
                break
            except FileExistsError:  # taken, perhaps a moment ago by another run
                folder, number = Path(f"{default}-{number}"), number + 1
    except OSError as reason:
        raise ValueError(f"cannot make the folder {folder}: {reason.strerror}") from reason
    if ranks() > 1:
        names = [str(folder)]
        dist.broadcast_object_list(names, 0)
        folder = Path(names[0])
    lock = lock_folder(folder) if rank() == 0 else None
    state = load_last(folder) if args.resume else {}
    if state:
        saved = json.loads(json.dumps(state["args"]))
        now = json.loads(json.dumps(vars(args)))
        differing = [key for key in now if key not in MAY_CHANGE and now[key] != saved.get(key)]
        if differing:
            raise ValueError(f"{folder} was started with other settings: " + ", ".join(
                f"--{key.replace('_', '-')} {saved.get(key)}, now {now[key]}" for key in differing))
    progress = state.get("progress", {})
    place = derive_seed(*map(progress.get, ("stage", "epoch", "step")), sorted(state.get("done", {})))
    place = float(place % 2**20)
    if sum_ranks(torch.tensor(place, device=choose_device(args.device))).item() != ranks() * place:
        raise ValueError(f"ranks see different checkpoints in {folder}: all machines must share --out's disk")
    if rank() == 0:
        log = folder / "log.jsonl"
        if state:  # lines behind the checkpoint will be written again
            lines = log.read_bytes().splitlines(keepends=True)[:state["log_lines"]]
            atomic_write(log, lambda file: file.writelines(lines))
        else:
            header = {"argv": sys.argv, "method": method, "args": vars(args), "versions": versions(),
                      "device": device_name(args.device), "ranks": ranks(), "git_commit": git_commit()}
            atomic_write(log, lambda file: file.write((json.dumps(header) + "\n").encode()))
    wait_for_ranks()
    return Run(folder, args, state, lock)


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
