"""Who imports whom: the arrows of the architecture, and what each command may load."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ALLOWED = {
    "launch": {"launch", "studies", "objectives", "forecasters", "storage"},
    "studies": {"studies", "objectives", "forecasters", "storage"},
    "objectives": {"objectives", "forecasters"},
    "forecasters": {"forecasters"},
    "storage": {"storage", "forecasters"},
}
ONLY_IN = {
    "torch": {"forecasters"},
    "optuna": {"studies", "storage"},
    "sqlalchemy": {"storage"},
    "click": {"launch"},
    "rich": {"launch"},
    "safetensors": {"forecasters"},
    "huggingface_hub": {"forecasters"},
}
MODULES = sorted(path for package in ALLOWED for path in (ROOT / package).rglob("*.py"))


def imported(path: Path) -> set[tuple[str, str]]:
    """(top package, whole dotted name) of every import in a file, at any depth."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {(name.split(".")[0], name) for name in names}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    for top, name in imported(path):
        if top in ALLOWED:
            assert top in ALLOWED[package], f"{package} imports {name}"
        if top in ONLY_IN:
            assert package in ONLY_IN[top], f"{package} imports {name}"
        if package == "objectives" and top == "forecasters":
            module = ROOT / "forecasters" / f"{name.split('.')[1]}.py"
            assert not module.exists(), f"objectives imports {name}, more than the contract"


def test_every_package_is_walked() -> None:
    assert {path.relative_to(ROOT).parts[0] for path in MODULES} == set(ALLOWED)
    assert len(MODULES) > 15


@pytest.mark.parametrize(
    "code",
    [
        "import forecasters, objectives.evaluation, objectives.windows, objectives.aggregation",
        "import studies.config, studies.space, studies.promotion, studies.study",
        "import storage.database, storage.slots, storage.embedded, storage.history",
        "import launch.cli, launch.supervisor, launch.worker, studies.promoting, launch.views.listing",
    ],
)
def test_loads_no_torch(code: str) -> None:
    check = f"{code}\nimport sys\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", check], check=True, cwd=ROOT)


SLOW = ("matplotlib", "plotly", "arch", "scipy", "pandas", "huggingface_hub", "torch._dynamo")  # to import


@pytest.mark.parametrize(
    ("code", "slow"),
    [
        ("import launch.cli, launch.searching, launch.run, launch.supervisor", ("torch", *SLOW)),
        ("import forecasters; forecasters.inspect('toto', checkpoint='toto-tiny')", ("torch", *SLOW)),
        ("import forecasters; forecasters.inspect('kronos', checkpoint='kronos-tiny')", ("torch", *SLOW)),
        (
            "from launch.views import decisions, listing, notes; from storage import board, history\n"
            "from studies import promoting, promotion_summary",
            ("torch", *SLOW),
        ),
        ("import launch.worker, forecasters; forecasters.load('toto', checkpoint='toto-tiny')", SLOW),
    ],
)
def test_loads_nothing_slow_that_it_does_not_use(code: str, slow: tuple[str, ...]) -> None:
    check = f"{code}\nimport sys\nassert not (found := [name for name in {slow} if name in sys.modules]), found"
    subprocess.run([sys.executable, "-c", check], check=True, cwd=ROOT)


@pytest.mark.parametrize(
    ("script", "arguments"),
    [("launch_workers", ["--help"]), ("promote", ["--help"]), ("studies", ["--help"]), ("studies", ["list", "--help"])],
)
def test_help_loads_neither_torch_nor_optuna(script: str, arguments: list[str]) -> None:
    check = (
        f"import sys\nfrom launch.cli import {script} as command\n"
        f"command({arguments!r}, standalone_mode=False)\n"
        "assert not {'torch', 'optuna', 'sqlalchemy'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", check], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
