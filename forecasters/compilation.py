"""When and how a forecaster's network is compiled: the policy, the shared cache of kernels, one graph a shape.

Forecasters hand over functions of tensors together with a key that names their shapes. A new key is compiled, whole
(`fullgraph`) and for these shapes only; a key that was seen is run and never compiled again. A function that cannot be
compiled is run as it is, with one warning, and `Graphs.state` says so. Knows nothing of models, windows or studies.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import resource
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from filelock import FileLock, Timeout
from torch import Tensor
from torch.utils._pytree import tree_map_only

from forecasters import BY_DEFAULT, COMPILE_MODES, GraphCounts, Running, SettingError

log = logging.getLogger(__name__)

INDUCTOR = "torch_inductor"  # the folder of kernels within the cache's, as before
CACHE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"  # torch writes its default into it as soon as anything asks
_OURS = "STUDIES_KERNELS"  # says that the variable's value is ours; in the environment, for the children
ERROR_CHARACTERS = 200  # of a compiler's message, in the one warning
MOST_GRAPHS = 256  # of one function; torch's own limit of 8 is meant for shapes that nobody planned

Result = TypeVar("Result")

_TRUE, _FALSE = ("1", "true", "yes", "on"), ("0", "false", "no", "off", "")


@dataclass(frozen=True, kw_only=True)
class Policy:
    """What was decided for one model on one device."""

    mode: str  # "off" or a mode of torch.compile
    backend: str
    folder: Path  # of the kernels, and of the locks of those who compile them

    @property
    def captures(self) -> bool:
        """Whether the mode records CUDA graphs, whose answers the next run overwrites."""
        return self.backend == "inductor" and self.mode in ("reduce-overhead", "max-autotune")


def decide(
    model: str, *, device: str, running: Running = BY_DEFAULT, environ: Mapping[str, str] = os.environ
) -> Policy:
    """The policy for a model ("toto") on a device ("cuda:0"); the environment goes before the settings.

    As for the storage's URL, so that one run can differ from the settings that all runs share. Of the environment, for
    MODEL = TOTO, KRONOS or CHRONOS2: MODEL_DISABLE_COMPILE=1 or MODEL_COMPILE=0 turns off; MODEL_COMPILE_MODE names the
    mode, MODEL_COMPILE_BACKEND the backend; MODEL_COMPILE=1 turns on where the settings say auto or off, and
    MODEL_USE_TORCH_COMPILE is the predecessor's name for it; its TORCH_COMPILE_MODE names the mode of what is compiled.
    auto: off on a CPU, where compiling gains 1.0 to 1.3 times for minutes of work, reduce-overhead on CUDA.
    Raises SettingError naming the variable or the setting.
    """
    prefix = model.upper()

    def truth(name: str) -> bool | None:
        value = environ.get(name)
        if value is None:
            return None
        if value.strip().lower() not in (*_TRUE, *_FALSE):
            raise SettingError(f"{name}={value}: expected 1 or 0")
        return value.strip().lower() in _TRUE

    asked, disabled = truth(f"{prefix}_COMPILE"), truth(f"{prefix}_DISABLE_COMPILE")
    asked = truth(f"{prefix}_USE_TORCH_COMPILE") if asked is None else asked
    mode, where = running.compile_mode, "[compile] mode"
    if named := environ.get(f"{prefix}_COMPILE_MODE"):
        mode, where = named, f"{prefix}_COMPILE_MODE"
    if mode not in COMPILE_MODES:
        raise SettingError(f"{where} = {mode}: expected one of {', '.join(COMPILE_MODES)}")
    backend, where = running.compile_backend, "[compile] backend"
    if named := environ.get(f"{prefix}_COMPILE_BACKEND"):
        backend, where = named, f"{prefix}_COMPILE_BACKEND"
    on_cuda = torch.device(device).type == "cuda"
    if disabled or asked is False:
        mode = "off"
    elif asked and mode in ("auto", "off"):
        mode = "reduce-overhead" if on_cuda else "default"
    elif mode == "auto":
        mode = "reduce-overhead" if on_cuda else "off"
    if mode != "off" and not environ.get(f"{prefix}_COMPILE_MODE") and (named := environ.get("TORCH_COMPILE_MODE")):
        if named not in COMPILE_MODES[2:]:
            raise SettingError(f"TORCH_COMPILE_MODE = {named}: expected one of {', '.join(COMPILE_MODES[2:])}")
        mode = named
    if mode != "off" and backend not in (known := torch.compiler.list_backends(None)):
        raise SettingError(f"{where} = {backend}: torch has no such backend; expected one of {', '.join(known)}")
    return Policy(mode=mode, backend=backend, folder=Path(running.compile_dir))


OFF = Policy(mode="off", backend="inductor", folder=Path("compiled_models"))


class Graphs(GraphCounts):
    """The compiled functions of one forecaster, and the buffers that they write into. For one thread."""

    def __init__(self, policy: Policy, *, device: torch.device, identity: str) -> None:
        """identity: names what else decides the kernels: the network's sizes and dtype.

        Raises SettingError where the cache's folder cannot be written.
        """
        super().__init__()
        self.policy = policy
        self.on = policy.mode != "off"
        self.state = policy.mode  # "off", a mode, or "MODE failed: why", which runs eagerly
        self._device = device
        self._compiled: dict[Callable[..., Any], Callable[..., Any]] = {}
        self._warm: set[Hashable] = set()
        self._buffers: dict[Hashable, Tensor] = {}
        if not self.on:
            return
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        self._place = f"{torch.__version__} {name} {policy.mode} {policy.backend} {identity}"
        try:
            (policy.folder / INDUCTOR).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SettingError(f"[compile] dir = {policy.folder}: {error.strerror}; name a folder to write") from None
        _keep_kernels_in((policy.folder / INDUCTOR).resolve())
        torch._dynamo.config.recompile_limit = MOST_GRAPHS

    @property
    def _captured(self) -> bool:
        return self.policy.captures and self._device.type == "cuda"

    def run(self, function: Callable[..., Result], key: Hashable, /, *arguments: Any) -> Result:
        """function(*arguments), compiled where the policy says so.

        key: names all sizes and numbers of the arguments that are not values of tensors. What comes back stays as it
        is when the next call is made.
        """
        if not self.on:
            return function(*arguments)
        whole = (function, key)
        if whole in self._warm:
            before = _graphs_made()
            result = self._call(function, arguments)
            if _graphs_made() > before:
                self.recompilations += 1
                log.warning("%s was compiled again for %s, which should not happen", function.__qualname__, key)
            return result
        began = time.perf_counter()
        try:
            with self._turn(function, key):
                result = self._call(function, arguments)
                if self._captured:  # it is recorded at the second call and replayed from the third one on
                    self._call(function, arguments)
                    result = self._call(function, arguments)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # the root of all that torch's compilers raise
            if isinstance(error.__cause__, torch.OutOfMemoryError):
                raise error.__cause__ from error
            self._give_up(error)
            return function(*arguments)
        self._warm.add(whole)
        self.count += 1
        self.warmup_s += time.perf_counter() - began
        return result

    def buffer(self, name: str, shape: Sequence[int], *, like: Tensor) -> Tensor:
        """Room on the device and of the dtype of `like`: zeros at first, then whatever was left there.

        Where graphs are compiled a name has one buffer a shape, which lives as long as they do: a CUDA graph refers
        to it where it is. What is not written yet must be masked by whoever reads.
        """
        if not self.on:
            return like.new_zeros(shape)
        key = (name, tuple(shape), like.dtype)
        if key not in self._buffers:
            self._buffers[key] = like.new_zeros(shape)
            torch._dynamo.mark_static_address(self._buffers[key])
        return self._buffers[key]

    def release(self) -> None:
        """Let go of the buffers, where memory ran out."""
        self._buffers.clear()

    def _call(self, function: Callable[..., Result], arguments: tuple[Any, ...]) -> Result:
        compiled = self._compiled.get(function)
        if compiled is None:
            mode = None if self.policy.backend != "inductor" or self.policy.mode == "default" else self.policy.mode
            compiled = torch.compile(function, fullgraph=True, dynamic=False, backend=self.policy.backend, mode=mode)
            self._compiled[function] = compiled
        if not self._captured:
            return compiled(*arguments)
        torch.compiler.cudagraph_mark_step_begin()
        return tree_map_only(Tensor, torch.clone, compiled(*arguments))

    def _give_up(self, error: Exception) -> None:
        text = " ".join(str(error).split()).split(" Set TORCHDYNAMO_VERBOSE")[0][:ERROR_CHARACTERS]
        self.on, self.state = False, f"{self.policy.mode} failed: {type(error).__name__}: {text}"
        log.warning("compiling (%s) failed, going on without: %s: %s", self.policy.mode, type(error).__name__, text)

    @contextlib.contextmanager
    def _turn(self, function: Callable[..., Any], key: Hashable) -> Iterator[None]:
        """One process compiles a graph while the others wait; then they load its kernels, at the same time.

        The kernel drops the lock of a process that dies, whatever killed it, and the next one compiles.
        """
        code = Path(function.__code__.co_filename).read_bytes()
        identity = f"{self._place} {function.__qualname__} {key} {hashlib.sha256(code).hexdigest()}"
        name = hashlib.sha256(identity.encode()).hexdigest()[:32]
        done, lock_path = self.policy.folder / f"{name}.done", self.policy.folder / f"{name}.lock"
        if done.exists():
            yield
            return
        lock = FileLock(lock_path, fallback_to_soft=False)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            log.info("waiting for another worker that compiles the same")
            lock.acquire()
        try:
            if not done.exists():
                yield
                done.touch()
                return
        finally:
            lock.release()
        yield  # another worker has compiled it while we waited


def _keep_kernels_in(folder: Path) -> None:
    """Inductor reads the variable at each compilation; what the user set stays, what torch or we set does not."""
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    if " " in str(folder):
        log.warning("%s has a space, which torch's call of the compiler cannot take; kernels go elsewhere", folder)
        return
    now = os.environ.get(CACHE_VARIABLE)
    if now is None or now == default_cache_dir() or os.environ.get(_OURS) == now:
        os.environ[CACHE_VARIABLE] = os.environ[_OURS] = str(folder)


def fixed_length(patches: int) -> int:
    """The length, in patches, that this many are padded to: two lengths a power of 2, so that few graphs serve all."""
    power = 1 << (patches - 1).bit_length()  # the least power of 2 that holds them
    return patches if patches < 3 else power * 3 // 4 if patches <= power * 3 // 4 else power


def graph_breaks() -> int:
    """Of this process."""
    return sum(_counters()["graph_break"].values())


def cuda_graph_skips() -> int:
    """Graphs of this process that were to be CUDA graphs and are not; 0 on a CPU."""
    return _counters()["inductor"]["cudagraph_skips"]


def start_peak(device: torch.device | str) -> None:
    """Begin a new measurement of `peak_mib`; a CPU has one only, since the process began."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_mib(device: torch.device | str) -> float:
    """The most memory in use: of the device's allocator, or of this process on a CPU."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # KiB on Linux


def _graphs_made() -> int:
    return _counters()["stats"]["unique_graphs"]


def _counters() -> Any:
    from torch._dynamo.utils import counters  # late: it takes a second that a run without graphs need not spend

    return counters
