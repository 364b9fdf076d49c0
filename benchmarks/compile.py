"""`python -m benchmarks.compile`: compiled networks against eager ones, on this machine's GPU or else its CPU.

The bundled tiny checkpoints and random weights at the published sizes (Toto-Open-Base-1.0, Kronos-base), 30 windows of
a random walk, horizons of 1, 7 and 64 bars. Each mode runs in processes of its own with an empty cache of kernels: the
first compiles, the second shows what the kernels on disk save. All modes of a row answer the same params with the same
seeds (launch/verify.py). Shares of a ceiling are of what this device reaches on one large matrix product and one large
copy, measured in the same process: arithmetic of the network's products over the first, weights read once a forward
over the second; the larger one says what binds. Lastly two workers share the device, started together.
"""

from __future__ import annotations

import multiprocessing
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

import forecasters
from benchmarks import recording
from benchmarks.random_models import random_bars, random_checkpoints
from forecasters.low_precision import INT8, PRODUCT, weight_mib
from forecasters.work import count_flop
from launch import verify
from objectives.evaluation import Evaluator
from objectives.windows import split
from studies import config as configuration
from studies import evaluators
from studies.config import Config

WINDOWS, TOTO_CONTEXT, KRONOS_CONTEXT = 30, 512, 192
SAMPLES = {1: 256, 7: 64, 64: 64}  # Kronos' paths of a window, by horizon; Toto draws four times as many
MATMUL = {"cuda": 8192, "cpu": 2048}
COPY_BYTES = {"cuda": 4 << 30, "cpu": 256 << 20}
COLUMNS = {
    "size": "size", "model": "model", "horizon": "P", "dtype": "dtype", "mode": "mode", "warmup_s": "warm-up s",
    "second_warmup": "second / first", "mean_s": "mean s", "std_s": "std s", "speedup": "speedup",
    "difference": "max difference / std", "moved": "changed samples", "mae_change": "MAE change", "graphs": "graphs",
    "recompilations": "recompilations", "breaks": "graph breaks", "skips": "skipped CUDA graphs",
    "of_matmul": "of matmul", "of_copy": "of copy", "peak_mib": "peak MiB", "compilation": "compilation",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Extra:
    """What this benchmark measures beside `verify.measure`."""

    flop: float  # of one answer
    forwards: int
    weight_bytes: int
    matmul_flop_s: float
    copy_bytes_s: float


def job_of(model: str, config: Config, device: str, horizon: int, repeats: int) -> verify.VerifyJob:
    """Thirty windows and three sets of params, of which only the sampling changes."""
    walk = random_bars(TOTO_CONTEXT + WINDOWS + 2 * horizon + 60)
    kept = split(walk, symbol="WALK", horizon=horizon, validation=WINDOWS, test=1).validation
    count = SAMPLES.get(horizon, 64)
    if model == "toto":
        trials = [
            {"context_length": TOTO_CONTEXT, "num_samples": n, "aggregate": aggregate}
            for n, aggregate in ((4 * count, "median"), (2 * count, "mean"), (count, "quantile_0.30"))
        ]
    else:
        base = {"max_context": KRONOS_CONTEXT, "clip": 2.0}
        trials = [
            {**base, "temperature": 0.3, "top_k": 24, "top_p": 1.0, "sample_count": count},
            {**base, "temperature": 0.2, "top_k": 0, "top_p": 0.8, "sample_count": count // 2},
            {**base, "temperature": 0.4, "top_k": 48, "top_p": 1.0, "sample_count": count},
        ]
    return verify.VerifyJob(
        config=config,
        model=model,
        device=device,
        windows=kept,
        trials=trials,
        repeats=repeats,
    )


def fresh(function: Callable[..., Any], *arguments: Any) -> Any:
    """function(*arguments) in a process of its own."""
    with ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def measured(job: verify.VerifyJob, mode: str, threads: int) -> tuple[verify.ModeMeasurement, Extra]:
    torch.set_num_threads(threads)
    extras: list[Extra] = []

    def inspect(forecaster: Any, evaluator: Evaluator) -> None:
        before = forecaster.forwards
        # Counted as run, fixed shapes and all, but outside of the graphs, where nothing can be seen.
        with torch.compiler.set_stance("force_eager"):
            flop = count_flop(lambda: evaluator.samples(job.windows, job.trials[0]))
        extras.append(
            Extra(
                flop=flop,
                forwards=forecaster.forwards - before,
                weight_bytes=int(weight_mib(forecaster) * 2**20),
                matmul_flop_s=matmul_rate(job.device, job.dtype),
                copy_bytes_s=copy_rate(job.device),
            )
        )

    return verify.measure(job, mode, inspect=inspect), extras[0]


def best_seconds(work: Callable[[], object], device: str, repeats: int = 5) -> float:
    taken = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        work()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - began)
    return min(taken[1:])


def matmul_rate(device: str, dtype: str) -> float:
    """Operations a second of a large product in this dtype."""
    size = MATMUL[device.split(":")[0]]
    a, b = (100 * torch.rand(2, size, size, device=device)).to(getattr(torch, dtype))
    product = PRODUCT if dtype == INT8 else torch.mm
    return 2 * size**3 / best_seconds(lambda: product(a, b), device)


def copy_rate(device: str) -> float:
    """Bytes read and written a second by a large copy."""
    source = torch.empty(COPY_BYTES[device.split(":")[0]], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / best_seconds(lambda: target.copy_(source), device)


def with_kernels(job: verify.VerifyJob, folder: Path) -> verify.VerifyJob:
    """The job with compiled kernels kept in this folder."""
    return replace(job, config=replace(job.config, compile=replace(job.config.compile, dir=folder)))


def rows_of(
    size: str, job: verify.VerifyJob, modes: Sequence[str], threads: int, cache: Path, *, once: bool = False
) -> list[dict[str, Any]]:
    """once: no second process that finds the kernels on disk."""
    extras: dict[str, Extra] = {}
    second: dict[str, float] = {}

    def run(job: verify.VerifyJob, mode: str) -> verify.ModeMeasurement:
        job = with_kernels(job, cache / mode)
        shutil.rmtree(cache / mode, ignore_errors=True)
        result, extras[mode] = fresh(measured, job, mode, threads)
        if mode != verify.EAGER and not once:
            again, _ = fresh(measured, job, mode, threads)
            second[mode] = again.warmup_s / result.warmup_s
        return result

    rows = []
    for row in verify.compare(job, modes, run=run):
        extra = extras[row.mode]
        rows.append(
            {
                "size": size,
                **asdict(row),
                "second_warmup": second.get(row.mode),
                "of_matmul": extra.flop / row.mean_s / extra.matmul_flop_s,
                "of_copy": extra.forwards * extra.weight_bytes / row.mean_s / extra.copy_bytes_s,
                "matmul_tflop_s": extra.matmul_flop_s / 1e12,
                "copy_gb_s": extra.copy_bytes_s / 1e9,
            }
        )
    return rows


def worker(job: verify.VerifyJob, mode: str, threads: int, barrier: Any, results: Any) -> None:
    """One of several that share a device: warm up, wait for the others, answer again and again."""
    torch.set_num_threads(threads)
    forecaster = evaluators.load_forecaster(job.in_mode(mode), job.model, device=job.device)
    evaluator = evaluators.evaluator_of(job.config, forecaster, cache_bytes=0, keep=False)
    evaluator.samples(job.windows, job.trials[0])
    barrier.wait()
    began = time.perf_counter()
    for _ in range(job.repeats):
        evaluator.samples(job.windows, job.trials[0])
    results.put((time.perf_counter() - began, forecaster.graphs.recompilations, forecaster.compilation))


def together(job: verify.VerifyJob, mode: str, count: int, threads: int, cache: Path) -> dict[str, Any]:
    """Answers per second of several workers at once on one device."""
    job = with_kernels(job, cache / mode)
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(count), context.Queue()
    workers = [context.Process(target=worker, args=(job, mode, threads, barrier, results)) for _ in range(count)]
    for each in workers:
        each.start()
    ended = [results.get() for _ in workers]
    for each in workers:
        each.join()
    return {
        "model": job.model,
        "horizon": job.windows.horizon,
        "dtype": job.dtype,
        "mode": mode,
        "workers": count,
        "answers a second": count * job.repeats / max(seconds for seconds, _, _ in ended),
        "recompilations": sum(again for _, again, _ in ended),
        "compilation": ended[0][2],
    }


def main() -> None:
    on_gpu = torch.cuda.is_available()
    parser = recording.parser("compile", __doc__)
    parser.add_argument("--device", default="cuda:0" if on_gpu else "cpu")
    parser.add_argument("--sizes", nargs="+", choices=["tiny", "published"], default=["tiny", "published"])
    parser.add_argument("--models", nargs="+", choices=["toto", "kronos"], default=["toto", "kronos"])
    parser.add_argument("--horizons", nargs="+", type=int, default=[1, 7, 64])
    parser.add_argument("--modes", nargs="+", default=["reduce-overhead", "max-autotune"] if on_gpu else ["default"])
    parser.add_argument("--dtypes", nargs="+", choices=forecasters.DTYPES, default=["float32"])
    parser.add_argument("--once", action="store_true", help="without the second process, which finds kernels on disk")
    parser.add_argument("--repeats", type=recording.at_least_one, default=5)
    parser.add_argument("--threads", type=int, default=1, help="of a process, on the CPU")
    parser.add_argument("--workers", type=int, default=2, help="that share the device at the end; 0: none")
    args = parser.parse_args()
    print(", ".join(f"{name} {value}" for name, value in recording.machine(args.device).items()), flush=True)
    rows, shared = [], []
    with tempfile.TemporaryDirectory() as scratch:
        cache = Path(scratch) / "kernels"
        checkpoints = {"tiny": {model: f"{model}-tiny" for model in args.models}}
        if "published" in args.sizes:
            checkpoints["published"] = fresh(random_checkpoints, Path(scratch))
        # Short horizons of every model first, and a results file after each: a run that is ended early has the most.
        kinds = [(size, dtype, P, model) for size in args.sizes for dtype in args.dtypes for P in args.horizons
                 for model in args.models]  # fmt: skip
        for size, dtype, horizon, model in kinds:
            settings = {model: {"checkpoint": checkpoints[size][model]}, "compile": {"dtype": dtype}}
            job = job_of(model, configuration.load(overrides=settings), args.device, horizon, args.repeats)
            place = cache / f"{size}-{model}-{dtype}-{horizon}"
            found = rows_of(size, job, args.modes, args.threads, place, once=args.once)
            show(f"{size} {model}, {horizon} bars, {dtype}", COLUMNS, found)
            rows += found
            if args.workers and horizon == args.horizons[0]:  # on the kernels that were just compiled
                for mode in ("off", args.modes[0]):
                    for count in (1, args.workers):
                        shared.append({"size": size, **together(job, mode, count, args.threads, place)})
            recording.write(args, {"rows": rows, "workers": shared}, device=args.device)
    if shared:
        names = (
            "size",
            "model",
            "horizon",
            "dtype",
            "mode",
            "workers",
            "answers a second",
            "recompilations",
            "compilation",
        )
        show("workers on one device", {name: name for name in names}, shared)


def show(title: str, columns: dict[str, str], rows: Sequence[dict[str, Any]]) -> None:
    """columns: headings by key."""
    recording.table(title, list(columns.values()), [[row[key] for key in columns] for row in rows])


if __name__ == "__main__":
    main()
