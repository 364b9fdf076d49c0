"""What launch-workers does: check the user's input, open the studies, and run workers on the unfinished ones."""

from __future__ import annotations

from collections.abc import Sequence

from forecasters.models import MODELS
from forecasters.scaling import AUTO, LAST, RAW, too_low
from launch import devices, ray_cluster
from launch.output import counted, say
from launch.places import check_log_dir, open_storage
from launch.results import print_results
from objectives.bars import DataError
from storage import urls
from studies import candidates
from studies import space as spaces
from studies import study as studying
from studies.config import Config
from studies.evaluators import checkpoint_fingerprint
from studies.series import Series, oddities, read_series, read_usable_series

IN_USE = 2  # configurations of a symbol that a model can have in use: the promoted one and its own stored one


def search(
    config: Config,
    symbols: Sequence[str],
    gpus: Sequence[int],
    cpus: int | None,
    *,
    ray: str | None,
    gpus_total: int | None,
    strict: bool,
    retry_parked: bool,
    plain: bool,
    profile: bool = False,
) -> int:
    """Search until every study is finished. The options are those of the command. Returns the exit status.

    strict: refuse all where one symbol cannot be searched. Raises ExpectedError before anything is written, and
    ConfigError.
    """
    check_log_dir(config)
    ray_cluster.check_options(ray, gpus=bool(gpus), cpus=cpus, gpus_total=gpus_total)
    device_slots = ray_cluster.device_slots(gpus_total, cpus) if ray else devices.device_slots(gpus or None, cpus)
    if strict:
        series, notes = read_series(config, symbols)
        skipped: dict[str, str] = {}
    else:
        series, skipped, notes = read_usable_series(config, symbols)
    models = config.search.models
    checkpoints = {model: checkpoint_fingerprint(config, model) for model in models}
    cluster = None
    if ray:
        cluster = ray_cluster.connect(ray, gpus=gpus_total, cpus=cpus)
        host = urls.parse_url(config.storage.url).host if config.storage.url else "127.0.0.1"
        ray_cluster.check_storage(cluster, host)
    # All of the user's input has been checked; from here on the command writes.
    for note in (*notes, *low_prices(config, series)):
        say(note)
    storage = open_storage(config, start=True, write=True)
    refused = None if strict else skipped
    opened = studying.open_studies(
        storage, config, series, models, checkpoints, refused=refused, retry_parked=retry_parked
    )
    if not opened:
        raise DataError(next(iter(skipped.values())))
    for note in (*oddities(series), *(note for item in opened for note in item.notes)):
        say(note)
    if skipped:
        say(f"{counted(len(skipped), 'symbol')} skipped; the reasons come at the end")
    shown = [item.study for item in opened]
    unfinished = [item.study for item in opened if item.state not in ("finished", "parked")]
    states = ("new", "resumed", "raised", "finished", "parked")
    counts = {state: sum(item.state == state for item in opened) for state in states}
    if not unfinished:
        left = f", {counts['parked']} but for parked work" if counts["parked"] else ""
        say(f"nothing to do: {counted(len(opened), 'study')} finished at the newest bar{left}")
        return print_results(storage, shown, skipped, plain=plain)
    say(f"studies: {', '.join(f'{count} {state}' for state, count in counts.items() if count)}")
    models_left = {study.model for study in unfinished}
    say(confirmation_cost(config, [model for model in models if model in models_left]))
    from launch.run import run_workers  # here: nothing of it is needed where there is nothing to do

    return run_workers(
        config,
        storage,
        series,
        unfinished,
        device_slots,
        shown=shown,
        skipped=skipped,
        cluster=cluster,
        plain=plain,
        profile=profile,
    )


def low_prices(config: Config, series: Sequence[Series]) -> list[str]:
    """Of which symbols a published model reads prices that are too low for it, and what is done: one line a model."""
    found = []
    for model in config.search.models:
        least, asked = MODELS[model].least_deviation, getattr(config.models[model], "scale", (LAST,))
        low = [each.symbol for each in series if too_low(each.bars.close, least)]
        if not low or asked == (LAST,):
            continue
        what = (
            f'ask for [{model}] scale = "{AUTO}"' if RAW in asked else "these are read as multiples of their last close"
        )
        lost = f"{model}: closes with a standard deviation below {least:.2g} are lost on it as published"
        found.append(f"{lost}; {what}: {', '.join(low)}")
    return found


def confirmation_cost(config: Config, models: Sequence[str]) -> str:
    """What the confirmation of a study with each of these models asks of its network at most, in one line."""
    counts = config.windows
    windows = counts.confirmation + counts.test + counts.validation
    parts = []
    for model in models:
        front = bool(config.search.objective_pnl)
        most = candidates.most_encodings(spaces.make(model, config), in_use=IN_USE, front=front)
        parts.append(f"{windows} x {most} = {windows * most} encodings with {model}")
    return f"each confirmation needs at most {', '.join(parts)}"
