"""`python -m benchmarks.start_up`: what each command costs before it does anything, beside `import torch`.

CPU seconds (user and system) of a process that imports what the command imports and does what it does first: the
supervisor and its workers with random weights at the published sizes, fingerprints and loading included, `promote` and
`studies list` up to their first question to the storage. A worker inherits from its supervisor the digests of files
that did not change; `on its own` reads them itself, as one on another machine does. The best of several repetitions,
all processes one after the other. --before measures an older checkout in turns with this one.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks import private, recording
from benchmarks.random_models import random_checkpoints

HERE = Path(__file__).parents[1]
CONFIG = (
    "from studies import config as configuration, evaluators\n"
    "weights = {{'toto': {{'checkpoint': '{toto}'}}, 'kronos': {{'checkpoint': '{kronos}'}}}}\n"
    "config = configuration.load(overrides=weights)\n"
)
WORKER = CONFIG + "import launch.worker\nevaluators.load_forecaster(config, '{model}', device='cpu')"
TORCH = "import torch"
STARTS = {
    TORCH: "import torch",
    "launch-workers": CONFIG + "import launch.cli, launch.searching, launch.run\n"
    "for model in ('toto', 'kronos'): evaluators.checkpoint_fingerprint(config, model)\n"
    "import os; print(os.environ.get('STUDIES_DIGESTS', '{{}}'))",
    "worker, toto": WORKER.replace("{model}", "toto"),
    "worker, kronos": WORKER.replace("{model}", "kronos"),
    "worker, toto, on its own": WORKER.replace("{model}", "toto"),
    "promote": "import launch.cli\nfrom launch.views import decisions, notes\nfrom storage import board, history\n"
    "from studies import promoting, promotion_summary",
    "studies list": "import launch.cli\nfrom launch.views import listing",
}


def cpu_seconds(script: str, checkout: Path, digests: str) -> tuple[float, str]:
    """Of a process that runs this script in this checkout, and what it prints."""

    def spent() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1", "STUDIES_DIGESTS": digests}
    before = spent()
    # Safe path: the folder that the benchmark runs in is not searched for modules.
    command = [sys.executable, "-P", "-c", script]
    ended = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return spent() - before, ended.stdout.strip()


def measure(checkout: Path, checkpoints: dict[str, str]) -> dict[str, float]:
    """CPU seconds of every start, once."""
    found, inherited = {}, "{}"
    for name, script in STARTS.items():
        own = not name.startswith("worker") or "on its own" in name
        text = script.format(**checkpoints)
        found[name], printed = cpu_seconds(text, checkout, "{}" if own else inherited)
        inherited = printed or inherited
    return found


def main() -> None:
    parser = recording.parser("start_up", __doc__)
    parser.add_argument("--repeats", type=recording.at_least_one, default=5)
    parser.add_argument("--tiny", action="store_true", help="the bundled tiny checkpoints")
    parser.add_argument("--before", type=Path, metavar="FOLDER", help="an older checkout to compare with")
    options = parser.parse_args()
    checkouts = {"after": HERE, **({"before": options.before.resolve()} if options.before else {})}
    best: dict[str, dict[str, float]] = {}
    with private.folder() as folder:
        tiny = {"toto": "toto-tiny", "kronos": "kronos-tiny"}
        checkpoints = tiny if options.tiny else random_checkpoints(folder / "weights")
        for _ in range(options.repeats):
            for when, checkout in checkouts.items():
                for name, seconds in measure(checkout, checkpoints).items():
                    kept = best.setdefault(name, {})
                    kept[when] = min(seconds, kept.get(when, seconds))
    torch = best[TORCH]["after"]
    figures: dict[str, dict[str, Any]] = {name: {**one, "of torch": one["after"] / torch} for name, one in best.items()}
    rows = [
        (
            name,
            one.get("before"),
            one["after"],
            one["before"] / one["after"] if "before" in one else None,
            one["of torch"],
        )
        for name, one in figures.items()
    ]
    recording.table(
        f"CPU seconds, best of {options.repeats}",
        ("start", "before, s", "now, s", "before / now", "now, of import torch"),
        rows,
    )
    recording.write(options, figures)


if __name__ == "__main__":
    main()
