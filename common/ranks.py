"""Device, precision, seeds, torchrun, and bad input as one line."""
import atexit
import contextlib
import ctypes
import datetime
import hashlib
import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm


# ---------------------------------------------------------------- bad input

def fail(message, shared=True):
    """End the run: one line `error: ...` on standard error, exit code 2. shared: every rank meets this error,
    so that the first one of a machine alone prints it."""
    if os.environ.get("LOCAL_RANK", "0") == "0" or not shared:
        with contextlib.suppress(OSError):  # where nobody can read it, the exit code still says it
            print(f"error: {' '.join(str(message).split())}", file=sys.stderr, flush=True)
    sys.exit(2)


@contextlib.contextmanager
def bad_input(*kinds, shared=True):
    """Inside, exceptions of these kinds (none named: ValueError, which all functions here raise on bad input)
    end the run by `fail`, and so does what the system refuses, and a package that is missing or broken.
    shared: as in `fail`; an exception with a true `.one_rank` is not."""
    try:
        yield
    except kinds or ValueError as reason:
        fail(reason, shared and not getattr(reason, "one_rank", False))
    except OSError as reason:
        fail(reason_of(reason), shared=False)
    except ImportError as reason:
        fail(f"{reason}; pip install -r requirements.txt")


def reason_of(error):
    """What an OSError says, with the path that it is about."""
    paths = [os.fspath(path) for path in (error.filename, error.filename2) if isinstance(path, (str, bytes))]
    return ": ".join([error.strerror or str(error) or type(error).__name__, *map(os.fsdecode, paths)])


# ---------------------------------------------------------------- device and precision

def choose_device(name="auto"):
    """The device to run on. "auto": this rank's GPU, else Apple's, else the CPU. Raises ValueError."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else \
            "mps" if torch.backends.mps.is_available() and ranks() == 1 else "cpu"
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda", "mps"):
            raise RuntimeError("known: cpu, cuda, mps")
        if device.type == "cuda":
            device = torch.device("cuda", _from_torchrun("LOCAL_RANK", device.index or 0))
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
    return max(1, allowed // _from_torchrun("LOCAL_WORLD_SIZE", 1, least=1))


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

def _from_torchrun(name, otherwise, least=0):
    """A whole number that torchrun sets. Ends the run where it is none."""
    text = os.environ.get(name, str(otherwise))
    if not text.isdecimal() or int(text) < least:
        fail(f"the environment's {name} must be a whole number as torchrun sets it, it is {text!r}",
             shared=False)
    return int(text)


def rank():
    """This process's number among all that torchrun started, 0 without torchrun."""
    return _from_torchrun("RANK", 0)


def ranks():
    """How many processes torchrun started on all nodes, 1 without torchrun."""
    return _from_torchrun("WORLD_SIZE", 1, least=1)


def start_ranks(device_name):
    """Join the other processes when torchrun started this one. Returns the device."""
    with bad_input(shared=False):
        if rank() >= ranks():
            raise ValueError(f"the environment's RANK, {rank()}, must be below its WORLD_SIZE, {ranks()}: "
                             f"start by torchrun, or unset both")
        device = choose_device(device_name)
    if ranks() > 1:
        die_with_parent(signal.SIGTERM)
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
    local = _from_torchrun("LOCAL_RANK", 0)
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
    """Print, on rank 0, without cutting a progress bar. A screen that is gone (a closed pipe, a full disk
    behind it) ends no run."""
    if rank() != 0 or sys.stdout is None:
        return
    try:
        tqdm.write(text)
        sys.stdout.flush()
    except OSError:
        # what is still in its buffer goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def die_with_parent(number, parent=None):
    """Let the system send this process a signal when the one that started it has ended, so that none trains
    on alone (Linux; elsewhere nothing does). parent: the id of that one (None: who it is now)."""
    if sys.platform == "linux":
        parent = parent or os.getppid()
        ctypes.CDLL(None).prctl(1, number, 0, 0, 0)  # 1: PR_SET_PDEATHSIG
        if os.getppid() != parent:
            os.kill(os.getpid(), number)


def wait_for_ranks():
    """Return once every rank is here."""
    if ranks() > 1:
        dist.barrier()
