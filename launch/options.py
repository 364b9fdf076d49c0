"""What the commands share: options and how they become a Config, checks of their values, errors and help pages.

Loads neither torch nor Optuna, so that `--help` and usage errors appear without delay.
"""

from __future__ import annotations

import functools
import logging
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from forecasters import KEYS, ExpectedError
from forecasters.models import MODELS
from launch.output import say
from objectives.strategies import FORECASTING
from storage.commands import suggested_with
from storage.symbols import SymbolError, check_symbol
from studies import config as configuration
from studies.config import Config

BOTH = tuple(name for name, model in MODELS.items() if not model.by_name)  # what --models both means
HELP = {"help_option_names": ["-h", "--help"]}  # the context settings of every command
FILE = click.Path(dir_okay=False, path_type=Path)  # to write to; its metavar is FILE
version_option = click.version_option(package_name="forecast-studies", prog_name="forecast-studies")


class SectionedGroup(click.Group):
    """A group of commands that its help page lists under headings."""

    def __init__(self, *args: Any, sections: Mapping[str, Sequence[str]], **kwargs: Any) -> None:
        """sections: the names of the commands by heading."""
        super().__init__(*args, **kwargs)
        self.sections = sections

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        width = formatter.width - 6 - max(map(len, self.commands))
        for heading, names in self.sections.items():
            with formatter.section(heading):
                formatter.write_dl([(name, self.commands[name].get_short_help_str(width)) for name in names])


def shared(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of every command, pass them on as a Config, and print expected errors in one line."""

    @version_option
    @click.option("--config", "config_path", type=click.Path(path_type=Path), envvar="STUDIES_CONFIG",
                  show_envvar=True, metavar="FILE", help="TOML settings; 'demo' for the demonstration's.")  # fmt: skip
    @click.option("--storage", envvar=["STUDIES_STORAGE", "OPTUNA_STORAGE"], show_envvar=True, metavar="URL",
                  help="Database of the studies, postgresql://USER@HOST/DATABASE.  "
                  "[default: a private server]")  # fmt: skip
    @click.option("--data-dir", type=click.Path(path_type=Path), envvar="STUDIES_DATA_DIR", show_envvar=True,
                  metavar="FOLDER", help="Folder of the bars, with one CSV or Parquet file per symbol.")  # fmt: skip
    @click.option("--hyperparams-dir", type=click.Path(path_type=Path),
                  envvar=["STUDIES_HYPERPARAMS_DIR", "HYPERPARAM_ROOT"], show_envvar=True, metavar="FOLDER",
                  help="Folder of the promoted configurations.")  # fmt: skip
    @functools.wraps(command)
    def wrapped(
        config_path: Path | None,
        storage: str | None,
        data_dir: Path | None,
        hyperparams_dir: Path | None,
        **options: Any,
    ) -> None:
        given = {
            "storage": {"url": storage or None},
            "data": {"dir": data_dir},
            "hyperparams": {"dir": hyperparams_dir},
            "search": {"objective_pnl": options.pop("objective_pnl", None)},  # of the commands that have it
        }
        path = configuration.DEMO_PATH if config_path == Path("demo") else config_path
        with suggested_with(config_path), one_line_errors():
            command(config=configuration.load(path, given), **options)

    return wrapped


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Print an expected error in one line on stderr and exit with status 1; exit with status 130 after Ctrl-C."""
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(message)s")
    logging.getLogger("storage").setLevel(logging.INFO)
    try:
        yield
    except ExpectedError as error:
        say(f"error: {' '.join(str(error).split())}")
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


class Fraction(click.FloatRange):
    """A number within a range, which "nan" is not."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        return self.fail("nan is not a number", param, ctx) if math.isnan(number) else number


class Names(click.ParamType):
    """A comma-separated list of names; the option may also be repeated."""

    name = "A,B,.."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        names = tuple(part.strip() for part in value.split(",") if part.strip())
        return names or self.fail("the list is empty", param, ctx)


class Hold(click.ParamType):
    """How long a trade is held: until the close of its bar, or until its target for so many bars."""

    name = "day|target:N"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        word, _, count = value.partition(":")
        if value == "day":
            return 1
        if word == "target" and count.isdecimal() and int(count):
            return int(count)
        return self.fail(f"{value!r}; write day, or target:N with the number of bars", param, ctx)


class Numbers(Names):
    """A comma-separated list of natural numbers."""

    name = "0,1,.."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        names = super().convert(value, param, ctx)
        wrong = [name for name in names if isinstance(name, str) and not name.isdecimal()]
        if wrong:
            self.fail(f"{wrong[0]!r} is not a number", param, ctx)
        return tuple(int(name) for name in names)


def flat(lists: Sequence[Sequence[Any]]) -> tuple[Any, ...]:
    """The lists of a repeated option as one list in which each entry occurs once."""
    return tuple(dict.fromkeys(item for part in lists for item in part))


def check_devices(gpus: Sequence[Sequence[int]], cpus: int | None) -> None:
    """Raise a usage error if both options are given."""
    if gpus and cpus:
        raise click.UsageError("--gpus and --cpus exclude each other: start one command for each")


def checked_models(models: Sequence[Sequence[str]], config: Config) -> tuple[str, ...]:
    """The models of the option, by default those of the settings. Raises a usage error for an unknown model."""
    names = flat(models) or config.search.models
    if "both" in names:
        names = BOTH
    for name in names:
        if name not in MODELS:
            raise click.BadParameter(
                f"unknown model {name!r}; the models are {', '.join(MODELS)}", param_hint="--models"
            )
    return names


def checked_keys(keys: Sequence[Sequence[str]], config: Config) -> tuple[str, ...]:
    """The prices of the option, by default that of the settings. Raises a usage error for an unknown one."""
    names = flat(keys) or (config.search.key,)
    for name in names:
        if name not in KEYS:
            raise click.BadParameter(f"unknown key {name!r}; the keys are {', '.join(KEYS)}", param_hint="--keys")
    return names


def checked_symbols(symbols: Sequence[Sequence[str]]) -> tuple[str, ...]:
    """The symbols of the option. Raises a usage error for a name that cannot be a symbol."""
    try:
        return tuple(check_symbol(symbol) for symbol in flat(symbols))
    except SymbolError as error:
        raise click.BadParameter(str(error), param_hint="--symbols") from None


symbols_option = click.option("--symbols", type=Names(), multiple=True, help="Only these symbols.")
models_option = click.option(
    "--models",
    type=Names(),
    multiple=True,
    help=f"Only these models, of {','.join(MODELS)}; 'both' are {' and '.join(BOTH)}.  [default: both]",
)
keys_option = click.option(
    "--keys",
    type=Names(),
    multiple=True,
    metavar="A,B,..",
    help=f"Prices of a bar, of {','.join(KEYS)}.  [default: that of the settings, close]",
)
pnl_gate_option = click.option(
    "--pnl-gate",
    type=click.Choice(FORECASTING),
    metavar="STRATEGY",
    help="Keep the incumbent if with 95 % confidence it earns more.",
)


def objective_pnl_option(purpose: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Add --objective-pnl, which goes into the Config; purpose: its help."""
    return click.option("--objective-pnl", type=click.Choice(FORECASTING), metavar="STRATEGY", help=purpose)


gpus_option = click.option("--gpus", type=Numbers(), multiple=True, help="GPUs to use, with one worker each.")
cpus_option = click.option("--cpus", type=click.IntRange(min=1), help="Number of CPU workers, one core each.")
processes_option = click.option(
    "--cpus", type=click.IntRange(min=1), help="Number of CPU processes.  [default: one a core]"
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print the rows as JSON.")
profile_option = click.option("--profile", is_flag=True, help="Also print time, network operations and rate by stage.")


def devices_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add --gpus and --cpus of a command that measures in processes of its own."""
    return gpus_option(processes_option(command))
