"""The framework that Keras uses in this process. Import this before anything imports Keras."""

import contextlib
import ctypes
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from utils.settings import require

Tensor = Any  # a tensor of any Keras backend

# Ask a framework, in a process of its own, whether it sees an accelerator; the fastest first:
# on an H100, a step of 4,096 tokens at 65,536 latents took 14 ms on PyTorch (commit 9d51c65), and
# 48 ms on JAX (d597169).
PROBES = {
    "torch": "import torch; print(torch.cuda.is_available() or torch.backends.mps.is_available())",
    "jax": "import jax; print(jax.default_backend() != 'cpu')",
    "tensorflow": "import tensorflow as tf; print(bool(tf.config.list_physical_devices('GPU')))",
}
OUT_OF_MEMORY = (  # in the errors of each framework
    "out of memory", "DefaultCPUAllocator", "CUBLAS_STATUS_ALLOC_FAILED", "RESOURCE_EXHAUSTED",
    "OOM when allocating",
)  # fmt: skip
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h
CGROUP = Path("/sys/fs/cgroup")  # a container's own limits
FASTEST_ON_CPU = ("torch", "tensorflow", "jax")  # first; measured by tests/benchmarks


def use_backend(name: str, keep_memory: bool = False, huge_pages: bool = False) -> str:
    """Make Keras use a backend, before Keras is imported; returns its name.

    Args:
        name: ``"tensorflow"``, ``"jax"``, ``"torch"``, or ``"auto"``: the first installed one that
            sees an accelerator, else the installed one that is fastest on a CPU.
        keep_memory: Where PyTorch computes on a CPU, on Linux, keep what is freed. Gradients and
            pre-activations are large arrays that are made anew in each step, and the kernel would
            clear their memory each time: 7% of a training step of 18,432 latents, a third of
            analysing 65,536.
        huge_pages: Have PyTorch ask Linux for pages of 2 MB. On a CPU a training step of 18,432
            latents takes a tenth less time; the smaller arrays of a language model get slower.

    Raises:
        InputError: The backend is not installed.
    """
    chosen = _best_backend() if name == "auto" else name
    require(_installed(chosen), f"BACKEND {chosen} is not installed: pip install {chosen}.")
    os.environ["KERAS_BACKEND"] = chosen
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")
    if keep_memory and chosen == "torch" and not _may_have_accelerator():
        _keep_freed_memory()
    if huge_pages:
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    if chosen != "tensorflow" and "tensorflow" not in sys.modules:
        # Keras would import TensorFlow only to save a model, which takes seconds and GPU memory.
        sys.modules["tensorflow"] = None
    return chosen


def _keep_freed_memory() -> None:
    """Have the C library, where it is glibc, give back only what is beyond 2 GiB at its end."""
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "mallopt"):
        library.mallopt(M_MMAP_MAX, 0)
        library.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def cpu_computes_bfloat16() -> bool:
    """Whether PyTorch multiplies bfloat16 by this CPU's own instructions.

    Without them it is emulated, several times slower than float32. ``ATEN_CPU_CAPABILITY=avx2``
    makes any machine one without.
    """
    import torch

    supported = torch.cpu._is_avx512_bf16_supported()
    return supported and torch.backends.cpu.get_cpu_capability().startswith("AVX512")


def peak_memory() -> dict[str, float]:
    """The most memory that this process has used, on the host and on the accelerator, in GB."""
    status = Path("/proc/self/status")
    if status.exists():  # on Linux getrusage may count the parent process
        host = int(re.search(r"VmHWM:\s*(\d+) kB", status.read_text())[1]) * 1024
    else:
        import resource  # does not exist on Windows

        unit = 1 if sys.platform == "darwin" else 1024
        host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {"peak_memory_gb": host / 1e9, "peak_accelerator_memory_gb": _accelerator_peak() / 1e9}


def torch_device() -> str | None:
    """Where PyTorch computes, ``"cuda"`` or ``"cpu"``; None if Keras uses another backend."""
    if os.environ.get("KERAS_BACKEND") != "torch":
        return None
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


@contextlib.contextmanager
def quick_products() -> Iterator[None]:
    """While open, PyTorch multiplies float32 matrices on a GPU in TF32, several times as fast.

    It rounds their numbers to 10 bits of mantissa, and sums in float32. JAX and TensorFlow do so
    always.
    """
    if torch_device() != "cuda":
        yield
        return
    import torch

    earlier = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(earlier)


def free_memory(device: str | None = None) -> int | None:
    """Bytes that are free, on a GPU for ``"cuda"``, else on the host; None if that is unknown.

    In a container those that it may still take.
    """
    if device == "cuda":
        import torch

        return torch.cuda.mem_get_info()[0]
    known = Path("/proc/meminfo")
    if not known.exists():  # not Linux
        return None
    free = int(re.search(r"MemAvailable:\s*(\d+) kB", known.read_text())[1]) * 1024
    limit, used = (CGROUP / name for name in ("memory.max", "memory.current"))
    if limit.exists() and (most := limit.read_text().strip()) != "max":
        free = min(free, int(most) - int(used.read_text()))
    return free


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether an error of any framework says that memory ran out."""
    return isinstance(error, MemoryError) or any(words in str(error) for words in OUT_OF_MEMORY)


def first_line(error: BaseException) -> str:
    """Of what a framework's error says, which may be many; its class where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _accelerator_peak() -> int:
    backend = os.environ["KERAS_BACKEND"]
    if backend == "torch":
        import torch

        return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    if backend == "jax":
        import jax

        memory = jax.local_devices()[0].memory_stats() or {}
        return memory.get("peak_bytes_in_use", 0)
    import tensorflow as tf

    gpus = tf.config.list_logical_devices("GPU")
    return tf.config.experimental.get_memory_info(gpus[0].name)["peak"] if gpus else 0


def _best_backend() -> str:
    installed = [name for name in FASTEST_ON_CPU if _installed(name)]
    if _may_have_accelerator():
        for name in PROBES:
            if name in installed and _sees_accelerator(name):
                return name
    return installed[0] if installed else "torch"


def _installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def _may_have_accelerator() -> bool:
    return sys.platform == "darwin" or any(
        Path(device).exists() for device in ("/dev/nvidia0", "/dev/nvidiactl", "/dev/kfd")
    )


def _sees_accelerator(name: str) -> bool:
    answer = subprocess.run(
        [sys.executable, "-c", PROBES[name]], capture_output=True, text=True, check=False
    )
    return answer.stdout.strip().endswith("True")
