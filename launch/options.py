"""The options that commands share: how they are read, checked and made a Config; and how errors are told.

Loads neither torch nor Optuna: `--help` and a usage error need not wait for them.
"""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from forecasters import ExpectedError
from forecasters.models import MODELS
from launch.output import say
from storage.symbols import SymbolError, check_symbol
from studies import config as configuration
from studies.config import Config

BOTH = tuple(name for name, model in MODELS.items() if not model.baseline)  # what --models both means


def shared(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of every command, resolved to a Config; and its errors as one line."""

    @click.option("--config", "config_path", type=click.Path(path_type=Path), envvar="STUDIES_CONFIG",
                  show_envvar=True, metavar="FILE", help="TOML settings; 'demo': the demonstration's.")  # fmt: skip
    @click.option("--storage", envvar=["STUDIES_STORAGE", "OPTUNA_STORAGE"], show_envvar=True, metavar="URL",
                  help="postgresql://USER@HOST/DATABASE; none: a private server.")  # fmt: skip
    @click.option("--data-dir", type=click.Path(path_type=Path), envvar="STUDIES_DATA_DIR", show_envvar=True,
                  metavar="FOLDER", help="One CSV or Parquet file of bars a symbol.")  # fmt: skip
    @click.option("--hyperparams-dir", type=click.Path(path_type=Path),
                  envvar=["STUDIES_HYPERPARAMS_DIR", "HYPERPARAM_ROOT"], show_envvar=True, metavar="FOLDER",
                  help="Where promoted files are.")  # fmt: skip
    @functools.wraps(command)
    def wrapped(
        config_path: Path | None,
        storage: str | None,
        data_dir: Path | None,
        hyperparams_dir: Path | None,
        **options: Any,
    ) -> None:
        overrides: dict[str, dict[str, Any]] = {"storage": {}, "data": {}, "hyperparams": {}}
        if storage:
            overrides["storage"]["url"] = storage
        if data_dir:
            overrides["data"]["dir"] = str(data_dir)
        if hyperparams_dir:
            overrides["hyperparams"]["dir"] = str(hyperparams_dir)
        if config_path == Path("demo"):
            config_path = configuration.DEMO_PATH
        with one_line_errors():
            command(config=configuration.load(config_path, overrides), **options)

    return wrapped


class one_line_errors:  # noqa: N801 - reads as a statement
    """What a user can mend is one line on stderr and exit 1."""

    def __enter__(self) -> None:
        logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(message)s")
        logging.getLogger("storage").setLevel(logging.INFO)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if kind is None:
            return
        if isinstance(error, ExpectedError):
            say(f"error: {' '.join(str(error).split())}")
            sys.exit(1)
        if isinstance(error, KeyboardInterrupt):
            sys.exit(130)


class Names(click.ParamType):
    """A comma-separated list; the option may be repeated too."""

    name = "A,B,.."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        names = tuple(part.strip() for part in value.split(",") if part.strip())
        return names or self.fail("names nothing", param, ctx)


class Numbers(Names):
    name = "0,1,.."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        names = super().convert(value, param, ctx)
        wrong = [name for name in names if isinstance(name, str) and not name.isdecimal()]
        if wrong:
            self.fail(f"{wrong[0]!r} is no number", param, ctx)
        return tuple(int(name) for name in names)


def flat(lists: Sequence[Sequence[Any]]) -> tuple[Any, ...]:
    """Repeated lists as one, each entry once."""
    return tuple(dict.fromkeys(item for part in lists for item in part))


def check_devices(gpus: Sequence[Sequence[int]], cpus: int | None) -> None:
    """Usage error for what does not go together."""
    if gpus and cpus:
        raise click.UsageError("--gpus and --cpus exclude each other: start one command for each")


def checked_models(models: Sequence[Sequence[str]], config: Config) -> tuple[str, ...]:
    """The models asked for. Usage error for an unknown one."""
    names = flat(models) or config.search.models
    if "both" in names:
        names = BOTH
    for name in names:
        if name not in MODELS:
            raise click.BadParameter(
                f"unknown model {name!r}; the models are {', '.join(MODELS)}", param_hint="--models"
            )
    return names


def checked_symbols(symbols: Sequence[Sequence[str]]) -> tuple[str, ...]:
    """The symbols asked for. Usage error for what cannot be one."""
    try:
        return tuple(check_symbol(symbol) for symbol in flat(symbols))
    except SymbolError as error:
        raise click.BadParameter(str(error), param_hint="--symbols") from None


symbols_option = click.option("--symbols", type=Names(), multiple=True, help="Only these symbols.")
models_option = click.option(
    "--models",
    type=Names(),
    multiple=True,
    help=f"Of {','.join(MODELS)}; 'both' are {' and '.join(BOTH)}.  [default: both]",
)
gpus_option = click.option("--gpus", type=Numbers(), multiple=True, help="One worker on each of these GPUs.")
cpus_option = click.option("--cpus", type=click.IntRange(min=1), help="So many CPU workers, one core each.")
json_option = click.option("--json", "as_json", is_flag=True, help="The same rows as JSON.")
