"""What the documents name is there: commands, options, settings, files."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from test_json_keys import commands

from launch import cli
from studies.config import DEFAULTS_PATH

ROOT = Path(__file__).parents[1]
SCRIPTS = ROOT / "docs" / "coming-from-the-scripts.md"
COMMANDS = commands({"launch-workers": cli.launch_workers, "promote": cli.promote, "studies": cli.studies})
SETTINGS = tomllib.loads(DEFAULTS_PATH.read_text())


def here() -> list[str]:
    """The last cell of every row: what takes a script's place."""
    rows = [line for line in SCRIPTS.read_text().splitlines() if line.startswith("|")]
    return [re.split(r"(?<!\\)\|", row)[-2] for row in rows]


def test_every_option_is_one_of_ours() -> None:
    options = {option for command in COMMANDS.values() for param in command.params for option in param.opts}
    named = set(re.findall(r"--[a-z][a-z-]*", " ".join(here())))
    assert named - options == set()
    assert len(named) > 8


def test_every_setting_is_one_of_ours() -> None:
    settings = re.findall(r"`\[([a-z]+)\](?: ([a-z_]+))?[` ]", SCRIPTS.read_text())
    assert len(settings) > 10
    for table, key in settings:
        if table == "table":  # says how settings are written
            continue
        assert table in SETTINGS
        assert not key or key in SETTINGS[table], f"[{table}] {key}"


def test_every_command_is_one_of_ours() -> None:
    text = SCRIPTS.read_text()
    for line in re.findall(r"`((?:studies|promote|launch-workers)[^`]*)`", text):
        name = " ".join(line.split()[:2]) if line.startswith("studies") else line.split()[0]
        assert name in COMMANDS, line
        for option in re.findall(r"--[a-z-]+", line):
            assert any(option in param.opts for param in COMMANDS[name].params), line
    for module in re.findall(r"python -m ([a-z_.]+)", text):
        assert (ROOT / f"{module.replace('.', '/')}.py").is_file()


@pytest.mark.parametrize("path", [SCRIPTS, ROOT / "README.md"], ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    for link in re.findall(r"\]\(([^)#:]+)\)", path.read_text()):
        assert (path.parent / link).exists(), link
