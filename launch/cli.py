"""The commands. Results go to stdout, all else to stderr; an expected error is one line and exit 1.

Loads torch only where a checkpoint must be looked at, so `promote --help` and `studies list` stay quick.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import click

from launch.options import (
    Names,
    check_devices,
    checked_models,
    checked_symbols,
    cpus_option,
    flat,
    gpus_option,
    json_option,
    models_option,
    shared,
    symbols_option,
)
from launch.output import counted, say, show, wide_console
from launch.places import artifacts_folder, open_storage, server_folder, shared_url
from storage import DatabaseUnavailable
from studies.config import Config, ConfigError

# --- launch-workers -------------------------------------------------------------------------------------------


@click.command(name="launch-workers")
@gpus_option
@cpus_option
@click.option("--ray", metavar="ADDRESS", help="On the Ray cluster at HOST:PORT, with --gpus-total or --cpus.")
@click.option("--gpus-total", type=click.IntRange(min=1), help="With --ray: so many workers, one GPU each.")
@symbols_option
@models_option
@click.option("--trials", type=click.IntRange(min=1), help="Finished trials a study; more raises a study's budget.")
@click.option(
    "--objective", type=click.Choice(["sampled", "exact"]), help="exact: no sampling noise.  [default: sampled]"
)
@click.option("--plain", is_flag=True, help="Lines of progress in the place of the live table.")
@shared
def launch_workers(
    config: Config,
    gpus: Sequence[Sequence[int]],
    cpus: int | None,
    ray: str | None,
    gpus_total: int | None,
    symbols: Sequence[Sequence[str]],
    models: Sequence[Sequence[str]],
    trials: int | None,
    objective: str | None,
    plain: bool,
) -> None:
    """Search: go on with every unfinished study of the symbols and models, open those that are missing.

    Neither --gpus nor --cpus: every GPU, else every core.

    \b
    launch-workers --gpus 0,1
    launch-workers --cpus 2 --symbols BTCUSD,AAPL --trials 100
    launch-workers --ray head.example:6379 --gpus-total 16
    """
    from launch import devices, ray_cluster
    from launch.views import listing
    from storage import database
    from studies import study as studying
    from studies.evaluators import checkpoint_fingerprint
    from studies.series import read_series

    check_devices(gpus, cpus)
    ray_cluster.check_options(ray, gpus=bool(gpus), cpus=cpus, gpus_total=gpus_total)
    model_names, symbol_names = checked_models(models, config), checked_symbols(symbols)
    config = replace(
        config,
        search=replace(
            config.search,
            models=model_names,
            trials=trials or config.search.trials,
            objective=objective or config.search.objective,
        ),
    )
    device_slots = ray_cluster.device_slots(gpus_total, cpus) if ray else devices.device_slots(flat(gpus) or None, cpus)
    series, notes = read_series(config, symbol_names)
    checkpoints = {model: checkpoint_fingerprint(config, model) for model in model_names}
    cluster = None
    if ray:
        cluster = ray_cluster.connect(ray, gpus=gpus_total, cpus=cpus)
        host = database.parse_url(config.storage.url).host if config.storage.url else "127.0.0.1"
        ray_cluster.check_storage(cluster, host)
    # Everything the user can have got wrong is checked; from here on something is made.
    for note in notes:
        say(note)
    storage = open_storage(config, start=True)
    opened = studying.open_studies(storage, config, series, model_names, checkpoints)
    for item in opened:
        for note in item.notes:
            say(note)
    working = [item.study for item in opened if item.state != "finished"]
    if not working:
        say(f"nothing to do: {counted(len(opened), 'study')} finished at the newest bar")
        listing.print_rows(storage, [item.study.study_id for item in opened], plain=plain)
        return
    counts = {state: sum(item.state == state for item in opened) for state in ("new", "resumed", "raised", "finished")}
    say(f"studies: {', '.join(f'{count} {state}' for state, count in counts.items() if count)}")
    from launch.run import run_workers  # brings Plotly: not waited for where nothing is to do

    shown = [item.study.study_id for item in opened]
    sys.exit(run_workers(config, storage, series, working, device_slots, shown=shown, cluster=cluster, plain=plain))


# --- promote --------------------------------------------------------------------------------------------------


@click.command()
@click.option("--min-improvement", type=click.FloatRange(0, 1, max_open=True),
              help="The MAE must fall by more than this share.  [default: 0.01]")  # fmt: skip
@symbols_option
@models_option
@click.option("--force", is_flag=True, help="Promote also what is no improvement or not comparable.")
@click.option("--require-test", is_flag=True, help="Keep the incumbent where the new one is worse on test.")
@click.option("--max-p", type=click.FloatRange(0, 1), metavar="P",
              help="Keep the incumbent where the p-value of the gain is above P.")  # fmt: skip
@click.option("--on", "on", type=click.Choice(["confirmation", "validation"]), default="confirmation",
              show_default=True, help="The windows that decide; those of the search flatter.")  # fmt: skip
@click.option("--rollback", metavar="SYMBOL", help="Put back what the last promotion of SYMBOL replaced.")
@click.option("--dry-run", is_flag=True, help="Decide and show, write nothing.")
@json_option
@shared
def promote(
    config: Config,
    min_improvement: float | None,
    symbols: Sequence[Sequence[str]],
    models: Sequence[Sequence[str]],
    force: bool,
    require_test: bool,
    max_p: float | None,
    on: str,
    rollback: str | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Copy each symbol's best configuration to hyperparams/best/SYMBOL.json, if it is better by enough.

    \b
    promote --min-improvement 0.01
    promote --rollback BTCUSD
    """
    from launch.views import decisions, notes
    from storage import configs
    from studies import promoting
    from studies import promotion_summary as summary

    if rollback:
        (symbol,) = checked_symbols([[rollback]])
        restored = configs.rollback(config.hyperparams.dir, symbol, dry_run=dry_run)
        if as_json:
            click.echo(json.dumps(asdict(restored), indent=2, default=str))
            return
        for line in decisions.rollback_lines(symbol, restored, dry_run=dry_run):
            click.echo(line)
        decisions.say_rollback(symbol, restored, dry_run=dry_run)
        return
    if on == "validation":
        say(
            "warning: the windows of the search decide; where the incumbent was already the best, that rule promoted "
            "in 56 % of searches, and 82 % of those lost (README, What a promotion rests on)"
        )
    storage = open_storage(config)
    rule = promoting.Rule(
        min_improvement=config.promotion.min_improvement if min_improvement is None else min_improvement,
        force=force,
        require_test=require_test,
        max_p=max_p,
        on=cast(Any, on),
    )
    rows = promoting.promote(
        storage,
        config,
        rule,
        symbols=checked_symbols(symbols),
        models=checked_models(models, config),
        dry_run=dry_run,
    )
    show(rows, decisions.table, as_json=as_json)
    for row in rows:
        if row.next:
            say(f"{row.symbol}: {row.reason}; {row.next}")
    promoted = sum(row.decision == "promoted" for row in rows)
    written = "would be promoted" if dry_run else "promoted"
    say(f"{promoted} of {counted(len(rows), 'symbol')} {written}" if promoted else "nothing to promote")
    if not dry_run:
        if path := summary.write(storage, config.promotion.results_dir, rows):
            say(f"summary in {path}")
        notes.decided(storage, artifacts_folder(config), rows, say=say)


# --- studies --------------------------------------------------------------------------------------------------


@click.group()
def studies() -> None:
    """Look at the studies and at the server they live in."""


@studies.command(name="list")
@json_option
@shared
def list_command(config: Config, as_json: bool) -> None:
    """Every study: how far it is, its best and its incumbent.

    \b
    studies list --json
    """
    from launch.views import listing

    listing.print_rows(open_storage(config), as_json=as_json)


@studies.command(name="show")
@click.argument("name")
@json_option
@shared
def show_command(config: Config, name: str, as_json: bool) -> None:
    """One study: its definition, best trials, baselines and what was given up.

    \b
    studies show BTCUSD/toto@2026-03-19
    """
    from launch.views import listing

    found = listing.details(open_storage(config), name)
    if found is None:
        raise ConfigError(f"no study {name!r}; see: studies list")
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    console = wide_console()
    console.print(listing.as_text(found, console.width))


@studies.command()
@click.argument("name")
@gpus_option
@cpus_option
@shared
def confirm(config: Config, name: str, gpus: Sequence[Sequence[int]], cpus: int | None) -> None:
    """Measure a study's best trials and the configurations in use anew, for promote to decide on.

    \b
    studies confirm BTCUSD/toto@2026-03-19
    """
    from launch import devices
    from studies import study as studying
    from studies.evaluators import checkpoint_fingerprint
    from studies.series import read_series

    check_devices(gpus, cpus)
    storage = open_storage(config)
    study = next((study for study in studying.list_studies(storage) if study.name == name), None)
    if study is None:
        raise ConfigError(f"no study {name!r}; see: studies list")
    objective = study.definition["objective"]
    config = replace(config, search=replace(config.search, models=(study.model,), objective=objective))
    device_slots = devices.device_slots(flat(gpus) or None, cpus)[:1]  # one unit of work
    series, notes = read_series(config, [study.symbol])
    for note in (
        *notes,
        *studying.reconfirm(storage, config, series[0], study, checkpoint_fingerprint(config, study.model)),
    ):
        say(note)
    from launch.run import run_workers

    sys.exit(run_workers(config, storage, series, [study], device_slots, shown=[study.study_id]))


@studies.command()
@click.argument("name")
@shared
def retire(config: Config, name: str) -> None:
    """Set a study aside: it keeps its trials, and launch-workers opens a new one.

    \b
    studies retire BTCUSD/toto@2026-03-19
    """
    from studies import study as studying

    try:
        click.echo(studying.retire(open_storage(config), name))
    except KeyError:
        raise ConfigError(f"no study {name!r}; see: studies list") from None


@studies.command()
@click.option("--export", is_flag=True, help='As shell commands: eval "$(studies url --export)".')
@click.option("--host", metavar="HOST", help="How other hosts call this machine; [storage] listen must let them in.")
@shared
def url(config: Config, export: bool, host: str | None) -> None:
    """The storage's URL, without its password.

    \b
    eval "$(studies url --export)"; optuna-dashboard "$OPTUNA_STORAGE" --artifact-dir "$STUDIES_ARTIFACTS_DIR"
    """
    shown = shared_url(config, host)
    if not export:
        click.echo(shown)
        return
    click.echo(f"export OPTUNA_STORAGE={shlex.quote(shown)}")
    if not config.storage.url:
        click.echo(f"export PGPASSFILE={shlex.quote(os.environ['PGPASSFILE'])}")
    click.echo(f"export STUDIES_ARTIFACTS_DIR={shlex.quote(str(artifacts_folder(config).absolute()))}")


@studies.command()
@shared
def stop(config: Config) -> None:
    """Stop the private server; the next command starts it again.

    \b
    studies stop
    """
    from storage import embedded

    if config.storage.url:
        raise DatabaseUnavailable("the storage is a server of yours, not our private one; stop it where you started it")
    folder = server_folder(config)
    click.echo("stopped" if folder.exists() and embedded.stop(folder) else "not running")


@studies.command(name="demo-data")
@shared
def demo_data(config: Config) -> None:
    """Write the demonstration's bars: the S&P 500 and NASDAQ, daily, 1999 to 2018.

    \b
    studies demo-data --config demo
    """

    from studies.series import demo_bars

    for path in demo_bars(config.data.dir):
        click.echo(path)


@studies.command(name="verify-compile")
@symbols_option
@models_option
@click.option("--modes", type=Names(), multiple=True, help="Any of default,reduce-overhead,max-autotune.  "
              "[default: default on a CPU, else all]")  # fmt: skip
@click.option("--device", metavar="DEVICE", help="cpu or cuda:0.  [default: the first GPU, else the CPU]")
@click.option(
    "--repeats", type=click.IntRange(min=2), default=5, show_default=True, help="Number of timed runs of a mode."
)
@click.option("--trials", type=click.IntRange(min=1), default=5, show_default=True, help="Configurations compared.")
@json_option
@shared
def verify_compile(
    config: Config,
    symbols: Sequence[Sequence[str]],
    models: Sequence[Sequence[str]],
    modes: Sequence[Sequence[str]],
    device: str | None,
    repeats: int,
    trials: int,
    as_json: bool,
) -> None:
    """Compare compiled models with eager ones on your bars: the time, and whether forecasts stay the same.

    Without --symbols, uses the first symbol of the folder. Exits 1 where an MAE changes by more than 0.1 %, where a
    graph breaks, is recompiled or cannot be a CUDA graph, or where compilation fails.

    \b
    studies verify-compile --models kronos --symbols BTCUSD --modes default
    """
    from launch import devices, verify
    from studies.series import list_symbols, read_series

    device = device or ("cuda:0" if devices.visible_gpus() else "cpu")
    asked = verify.checked_modes(flat(modes), device)
    names = checked_symbols(symbols) or config.data.symbols or sorted(list_symbols(config.data.dir)[0])[:1]
    series, notes = read_series(config, names)
    for note in notes:
        say(note)
    jobs = verify.jobs(config, series, checked_models(models, config), device=device, trials=trials, repeats=repeats)
    rows = [row for job in jobs for row in verify.compare(job, asked)]
    show(rows, verify.table, as_json=as_json)
    if not all(row.passed for row in rows):
        say("compiled forecasts are not those of eager ones, or were not compiled once; see the rows")
        sys.exit(1)


# --- eyes -----------------------------------------------------------------------------------------------------


@studies.command(name="dashboard")
@click.option("--host", default="127.0.0.1", show_default=True, metavar="ADDRESS", help="Where to listen.")
@click.option("--port", default=8080, show_default=True, type=click.IntRange(0, 65535), help="0: any free one.")
@shared
def dashboard_command(config: Config, host: str, port: int) -> None:
    """Browse the studies with optuna-dashboard: trials, notes, plots and forecasts. There is no login.

    \b
    studies dashboard
    studies dashboard --port 8081
    """
    from launch.views import dashboard

    storage = open_storage(config, start=True)
    server = dashboard.bind(storage, artifacts_folder(config), host, port)
    dashboard.serve(server, host, say=say)


@studies.command(name="report")
@click.option("--output", default="report.html", show_default=True, type=click.Path(path_type=Path), metavar="FILE",
              help="The page.")  # fmt: skip
@click.option("--markdown", type=click.Path(path_type=Path), metavar="FILE", help="The tables as Markdown too.")
@symbols_option
@models_option
@shared
def report_command(
    config: Config,
    output: Path,
    markdown: Path | None,
    symbols: Sequence[Sequence[str]],
    models: Sequence[Sequence[str]],
) -> None:
    """Write a page on the newest studies: decisions, forecasts, errors, what mattered. It opens without a network.

    \b
    studies report
    studies report --symbols BTCUSD --output btcusd.html --markdown btcusd.md
    """
    from launch.views import report as reporting

    made = reporting.make(
        open_storage(config), config, symbols=checked_symbols(symbols), models=checked_models(models, config)
    )
    reporting.write(output, reporting.html(made))
    click.echo(output)
    if markdown is not None:
        reporting.write(markdown, reporting.markdown(made))
        click.echo(markdown)
