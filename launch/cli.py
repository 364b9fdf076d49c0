"""The commands. Results go to stdout, everything else to stderr; an expected error is one line and exit status 1.

Loads torch only where a command reads a checkpoint, so that `promote --help` and `studies list` stay quick.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import click

from launch import learning, using
from launch.options import (
    FILE,
    HELP,
    Fraction,
    Names,
    SectionedGroup,
    check_devices,
    checked_models,
    checked_symbols,
    cpus_option,
    flat,
    gpus_option,
    json_option,
    models_option,
    objective_pnl_option,
    pnl_gate_option,
    profile_option,
    shared,
    symbols_option,
    version_option,
)
from launch.output import say, show, wide_console
from launch.places import artifacts_folder, open_storage, server_folder, shared_url
from storage import DatabaseUnavailable
from storage.commands import command
from studies.config import MAX_TRIALS, Config, ConfigError


@click.command(name="launch-workers", context_settings=HELP)
@gpus_option
@cpus_option
@click.option("--ray", metavar="ADDRESS", help="Run on the Ray cluster at HOST:PORT, with --gpus-total or --cpus.")
@click.option("--gpus-total", type=click.IntRange(min=1), help="With --ray: number of GPU workers, one GPU each.")
@symbols_option
@models_option
@click.option("--trials", type=click.IntRange(1, MAX_TRIALS), help="Number of trials per study, also existing ones.")
@click.option("--objective", type=click.Choice(["sampled", "exact"]),
              help="The exact objective has no sampling noise.  [default: sampled]")  # fmt: skip
@objective_pnl_option("Search the return of STRATEGY beside the MAE, in studies of their own; no trial is pruned.")
@click.option("--strict", is_flag=True, help="Refuse to begin if a symbol cannot be searched, instead of skipping it.")
@click.option("--retry-parked", is_flag=True, help="Try parked work again that was parked less than a day ago.")
@click.option("--plain", is_flag=True, help="Print lines of progress instead of the live table.")
@profile_option
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
    strict: bool,
    retry_parked: bool,
    plain: bool,
    profile: bool,
) -> None:
    """Search: continue the unfinished studies of the symbols and models, and open those that are missing.

    Without --gpus and --cpus, use every GPU, or every core of a machine without GPUs.

    \b
    launch-workers --gpus 0,1
    launch-workers --cpus 2 --symbols BTCUSD,AAPL --trials 100
    launch-workers --ray head.example:6379 --gpus-total 16
    """
    from launch import switches
    from launch.searching import search

    check_devices(gpus, cpus)
    given = {"trials": trials, "cpus": cpus, "models": models, "devices_given": bool(gpus or ray)}
    trials, cpus, models = switches.of_search(os.environ, **given)
    config = replace(
        config,
        search=replace(
            config.search,
            models=checked_models(models, config),
            trials=trials or config.search.trials,
            objective=objective or config.search.objective,
        ),
    )
    options = {"ray": ray, "gpus_total": gpus_total, "strict": strict, "retry_parked": retry_parked, "plain": plain}
    every = tuple(gpu for part in gpus for gpu in part)  # twice the same: two workers on it
    sys.exit(search(config, checked_symbols(symbols), every, cpus, **options, profile=profile))


@click.command(context_settings=HELP)
@click.option("--min-improvement", type=Fraction(0, 1, max_open=True),
              help="Promote if the MAE falls by more than this fraction.  [default: 0.01]")  # fmt: skip
@symbols_option
@models_option
@click.option("--force", is_flag=True, help="Promote even without an improvement or a comparison.")
@click.option("--require-test", is_flag=True, help="Keep the incumbent if the candidate is worse on the test windows.")
@click.option("--max-p", type=Fraction(0, 1), metavar="P",
              help="Keep the incumbent if the p-value of the improvement is above P.")  # fmt: skip
@click.option("--require-skill", is_flag=True, help='Promote nothing that does worse than "no change".')
@pnl_gate_option
@objective_pnl_option("Promote from the studies that search the return of STRATEGY too, by their MAE.")
@click.option("--on", "on", type=click.Choice(["pooled", "confirmation", "validation"]), default="pooled",
              show_default=True, help="What decides: the evidence of all symbols, or the symbol's own windows of "
              "confirmation, or those of the search, whose MAEs are biased.")  # fmt: skip
@click.option("--ensemble", is_flag=True, help="Also consider a weighted mean of the models' forecasts, by symbol.")
@click.option("--rollback", metavar="SYMBOL", help="Restore what the last promotion of SYMBOL replaced.")
@click.option("--dry-run", is_flag=True, help="Show the decisions without writing anything.")
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
    require_skill: bool,
    pnl_gate: str | None,
    on: str,
    ensemble: bool,
    rollback: str | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Copy each symbol's best configuration to hyperparams/best/SYMBOL.json if the improvement is large enough.

    \b
    promote --min-improvement 0.01
    promote --rollback BTCUSD
    """
    from launch.views import decisions, notes
    from storage import board, history
    from studies import promoting
    from studies import promotion_summary as summary

    if ensemble and on == "validation":
        raise ConfigError("--ensemble decides on windows of the confirmation; leave out --on validation")
    if rollback:
        (symbol,) = checked_symbols([[rollback]])
        restored = history.rollback(config.hyperparams.dir, symbol, dry_run=dry_run)
        if as_json:
            click.echo(json.dumps(asdict(restored), indent=2, default=str))
        else:
            decisions.show_rollback(symbol, restored, click.echo, dry_run=dry_run)
        return
    if line := decisions.WARNINGS.get(on):
        say(f"warning: {line}")
    storage = open_storage(config)
    if not dry_run:
        board.check_writable(storage)
    gates = {"require_test": require_test, "require_skill": require_skill, "max_p": max_p}
    rule = promoting.rule_of(config, min_improvement, force=force, on=on, **gates)
    asked = {"symbols": checked_symbols(symbols), "models": checked_models(models, config), "dry_run": dry_run}
    gate = learning.returns_gate(config, pnl_gate) if pnl_gate else None
    rows = promoting.promote(storage, config, rule, **asked, gate=gate, ensemble=ensemble)
    show(rows, partial(decisions.table, dry_run=dry_run), as_json=as_json)
    decisions.tell(rows, rule, dry_run=dry_run)
    if not dry_run:
        if path := summary.write(storage, config.promotion.results_dir, rows):
            say(f"summary in {path}")
        notes.record_decisions(storage, artifacts_folder(config), rows, say=say)
    if any(row.decision == "failed" for row in rows):
        sys.exit(1)


@click.group(
    cls=SectionedGroup,
    commands=(*using.COMMANDS, *learning.COMMANDS),
    context_settings=HELP,
    sections={
        "Look at and keep studies": ("list", "show", "report", "dashboard", "confirm", "retire"),
        "Use and watch": [str(one.name) for one in using.COMMANDS],
        "Learn": [str(one.name) for one in learning.COMMANDS],
        "The server and the machine": ("url", "stop", "demo-data", "verify-compile"),
    },
)
@version_option
def studies() -> None:
    """Look at studies, and manage the server that stores them."""


@studies.command(name="list")
@symbols_option
@click.option("--models", type=Names(), multiple=True, help="Only these models.")
@click.option("--newest", is_flag=True, help="Only the newest study of each symbol and model.")
@json_option
@shared
def list_command(
    config: Config, symbols: Sequence[Sequence[str]], models: Sequence[Sequence[str]], newest: bool, as_json: bool
) -> None:
    """List the studies with their progress, best trial and confirmed improvement.

    \b
    studies list --symbols BTCUSD,AAPL --newest --json
    """
    from launch.views import listing

    selection = listing.Selection(
        symbols=checked_symbols(symbols), models=checked_models(models, config) if models else (), newest=newest
    )
    listing.print_rows(open_storage(config), selection, as_json=as_json)


@studies.command(name="show")
@click.argument("name")
@json_option
@shared
def show_command(config: Config, name: str, as_json: bool) -> None:
    """Show a study: its best trials, confirmed configurations, parameter importance and parked work.

    \b
    studies show BTCUSD/toto@2026-03-19
    """
    from launch.views import listing
    from studies import retiring

    storage = open_storage(config)
    found = listing.details(storage, name, config.hyperparams.dir)
    if found is None:
        retired = retiring.retired_names(storage, name)
        see = command(f"studies show {retired[-1]}" if retired else "studies list")
        raise ConfigError(f"no study {name!r}; see: {see}")
    if as_json:
        click.echo(json.dumps(found.to_json(), indent=2))
        return
    console = wide_console()
    console.print(listing.render(found, console.width))


@studies.command()
@click.argument("name")
@gpus_option
@cpus_option
@shared
def confirm(config: Config, name: str, gpus: Sequence[Sequence[int]], cpus: int | None) -> None:
    """Confirm a study again, for promote to decide on. Measures its best trials and the incumbents anew.

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
        raise ConfigError(f"no study {name!r}; see: {command('studies list')}")
    defined = {"objective": study.definition["objective"], "objective_pnl": study.pnl}
    config = replace(config, search=replace(config.search, models=(study.model,), **defined))
    device_slots = devices.device_slots(flat(gpus) or None, cpus)[:1]  # a confirmation is one slot
    series, notes = read_series(config, [study.symbol])
    checkpoint = checkpoint_fingerprint(config, study.model)
    for note in (*notes, *studying.reconfirm(storage, config, series[0], study, checkpoint)):
        say(note)
    from launch.run import run_workers

    sys.exit(run_workers(config, storage, series, [study], device_slots, shown=[study]))


@studies.command()
@click.argument("name")
@click.option("--undo", is_flag=True, help="Bring a retired study back; by its first name the one retired last.")
@shared
def retire(config: Config, name: str, undo: bool) -> None:
    """Retire a study, so that launch-workers opens a new one. It keeps its trials.

    \b
    studies retire --undo BTCUSD/toto@2026-03-19
    """
    from studies import retiring

    try:
        click.echo((retiring.unretire if undo else retiring.retire)(open_storage(config), name))
    except KeyError:
        raise ConfigError(f"no study {name!r}; see: {command('studies list')}") from None


@studies.command()
@click.option("--export", is_flag=True, help='Print shell commands for eval "$(studies url --export)".')
@click.option("--host", metavar="HOST", help="Name of this machine for other hosts; [storage] listen must let them in.")
@shared
def url(config: Config, export: bool, host: str | None) -> None:
    """Print the storage's URL without its password.

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
        raise DatabaseUnavailable("the storage is a server of your own, not the private one; stop it yourself")
    folder = server_folder(config)
    click.echo("stopped" if folder.exists() and embedded.stop(folder) else "not running")


@studies.command(name="demo-data")
@click.option("--in-use", is_flag=True, help="Also put the configurations in use that the demonstration starts from, "
              "a weak one among them, where a symbol has none.")  # fmt: skip
@shared
def demo_data(config: Config, in_use: bool) -> None:
    """Write the bars of the demonstration.

    They are daily: the S&P 500 and NASDAQ 1999 to 2018, crude oil (WTI) 1986 to 2019 and the volatility index VIX 2014
    to 2019, the last two closes only.

    \b
    studies demo-data --config demo
    """
    from studies import demo

    for path in (*demo.demo_bars(config.data.dir), *(demo.demo_in_use(config.hyperparams.dir) if in_use else ())):
        click.echo(path)


@studies.command(name="verify-compile")
@symbols_option
@models_option
@click.option("--modes", type=Names(), multiple=True, help="Modes of torch.compile: default,reduce-overhead,"
              "max-autotune.  [default: default on a CPU, all on a GPU]")  # fmt: skip
@click.option("--dtypes", type=Names(), multiple=True, help="Also compare these with float32, on the windows of a "
              "confirmation, and not compiled unless --modes is given: bfloat16,int8.")  # fmt: skip
@click.option("--device", metavar="DEVICE", help="Such as cpu or cuda:0.  [default: the first GPU, or else the CPU]")
@click.option("--repeats", type=click.IntRange(min=2), default=5, show_default=True, help="Timed runs per mode.")
@click.option("--trials", type=click.IntRange(min=1), default=5, show_default=True, help="Parameter sets to compare.")
@json_option
@shared
def verify_compile(
    config: Config,
    symbols: Sequence[Sequence[str]],
    models: Sequence[Sequence[str]],
    modes: Sequence[Sequence[str]],
    dtypes: Sequence[Sequence[str]],
    device: str | None,
    repeats: int,
    trials: int,
    as_json: bool,
) -> None:
    """Compare compiled models with eager ones on your bars: the time, and whether the forecasts stay the same.

    Without --symbols, uses the folder's first symbol. Exits with status 1 if an MAE changes by more than 0.1 % (in
    another dtype: unless the 95 % interval of the change is within 0.1 %), if a graph breaks, is recompiled or cannot
    be a CUDA graph, or if compiling fails.

    \b
    studies verify-compile --models kronos --symbols BTCUSD --modes default
    studies verify-compile --models toto --dtypes float32,bfloat16,int8
    """
    from launch import verify

    asked = {"symbols": checked_symbols(symbols), "models": checked_models(models, config), "device": device}
    kinds = {"modes": flat(modes), "dtypes": flat(dtypes), "repeats": repeats, "trials": trials}
    sys.exit(verify.verify(config, **asked, **kinds, as_json=as_json))


@studies.command(name="dashboard")
@click.option("--host", default="127.0.0.1", show_default=True, metavar="ADDRESS", help="Address to listen on.")
@click.option("--port", default=8080, show_default=True, type=click.IntRange(0, 65535),
              help="Port to listen on; 0 for any free one.")  # fmt: skip
@click.option("--token-file", type=FILE, help="File with the token to ask for; needed where others can come in.")
@shared
def dashboard_command(config: Config, host: str, port: int, token_file: Path | None) -> None:
    """Serve optuna-dashboard with the studies. It shows trials, notes, plots and forecasts.

    \b
    studies dashboard --host 0.0.0.0 --token-file token.txt
    """
    from launch.views import dashboard

    door = dashboard.open_door(host, token_file)
    server = dashboard.bind(open_storage(config, start=True), artifacts_folder(config), door, port)
    dashboard.serve(server, door, say=say)


@studies.command(name="report")
@click.option("--output", default="report.html", show_default=True, type=FILE, help="File to write the page to.")
@click.option("--markdown", type=FILE, help="File to write the tables to as Markdown.")
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
    """Write an HTML page on the newest studies. It shows decisions, forecasts, errors and parameter importance.

    \b
    studies report --symbols BTCUSD --output btcusd.html --markdown btcusd.md
    """
    from launch.views import report as reporting

    symbol_names, model_names = checked_symbols(symbols), checked_models(models, config)
    made = reporting.make(open_storage(config), config, symbols=symbol_names, models=model_names)
    reporting.write(output, reporting.html(made))
    click.echo(output)
    if markdown is not None:
        reporting.write(markdown, reporting.markdown(made))
        click.echo(markdown)
