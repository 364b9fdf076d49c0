"""What the documents name exists: links, commands, options, settings, files, modules and functions."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from test_json_keys import commands

from launch import cli
from studies.config import DEFAULTS_PATH

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = sorted((ROOT / "docs").glob("*.md"))
RELIABILITY = ROOT / "docs" / "reliability.md"
SCRIPTS = ROOT / "docs" / "coming-from-the-scripts.md"
ARCHITECTURE = ROOT / "docs" / "architecture.md"
DOCUMENTS = [README, *PAGES, ROOT / "hyperparams" / "README.md"]
ROOMS = ("forecasters", "objectives", "studies", "storage", "launch")

COMMANDS = commands({"launch-workers": cli.launch_workers, "promote": cli.promote, "studies": cli.studies})
OPTIONS = {name: {option for param in command.params for option in param.opts} for name, command in COMMANDS.items()}
OF_OTHERS = {"--help", "--signal", "--artifact-dir"}  # click's own, Slurm's and optuna-dashboard's
SETTINGS = tomllib.loads(DEFAULTS_PATH.read_text())

each_document = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))


def prose(path: Path) -> str:
    """A document without its blocks of code; of the old scripts' tables only what takes a script's place."""
    text = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.M | re.S)
    if path != SCRIPTS:
        return text
    return "\n".join(cells(line)[-1] if line.startswith("|") else line for line in text.splitlines())


def cells(row: str) -> list[str]:
    """The cells of one row of a table."""
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]]


def spans(text: str) -> list[str]:
    """What stands in backticks, on one line or wrapped."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", text)]


def blocks(path: Path, kind: str = r"\w*") -> list[str]:
    """The fenced blocks of code in some language."""
    return re.findall(rf"^```{kind}\n(.*?)^```$", path.read_text(), flags=re.M | re.S)


def invocations(path: Path) -> list[tuple[str, str]]:
    """Every command that a document shows, and the rest of its line; an output such as `studies: 4 new` is none."""
    lines = [*spans(prose(path)), *(line for block in blocks(path) for line in block.splitlines())]
    start = r"(?:^|\$\(|; |/|command: \[)(studies (?=[a-z])[a-z-]+|promote|launch-workers)(?=[\s,)]|$)([^#;)|]*)"
    return [found for line in lines for found in re.findall(start, line)]


def defined(name: str, source: str) -> bool:
    """Whether a module's source defines a function, class, method or constant."""
    return all(re.search(rf"^\s*(?:def|class) {part}\b|^{part}\b.* = ", source, re.M) for part in name.split("."))


def anchors(path: Path) -> set[str]:
    """The anchors that GitHub gives a document's headings."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_document
def test_links_lead_somewhere(path: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if link.startswith("https://"):
            continue
        target, _, anchor = link.partition("#")
        found = path.parent / target if target else path
        assert found.exists(), link
        assert not anchor or anchor in anchors(found), link


@each_document
def test_commands_and_their_options_exist(path: Path) -> None:
    for name, rest in invocations(path):
        assert name in COMMANDS, name
        assert set(re.findall(r"--[a-z][a-z-]*", rest)) <= OPTIONS[name] | OF_OTHERS, f"{name} {rest}"


@each_document
def test_options_named_alone_exist(path: Path) -> None:
    known = set().union(*OPTIONS.values(), OF_OTHERS)
    alone = [span.split()[0] for span in spans(prose(path)) if span.startswith("--")]
    assert [option for option in alone if option not in known] == []


@each_document
def test_benchmarks_and_their_options_exist(path: Path) -> None:
    for module, rest in re.findall(r"python -m ([a-z_]+\.[a-z_]+)([^`\n#]*)", path.read_text()):
        source = (ROOT / f"{module.replace('.', '/')}.py").read_text()
        for option in re.findall(r"--[a-z-]+", rest):
            assert f'"{option}"' in source, f"{module} {option}"


@each_document
def test_settings_exist(path: Path) -> None:
    named = [
        found
        for span in spans(prose(path))
        if span != "[table] key"  # says how settings are written
        for found in re.findall(r"^\[([a-z]+)\](?: ([a-z_]+))?", span)
    ]
    named += [
        (table, key)
        for block in blocks(path, "toml")
        for table, settings in tomllib.loads(block).items()
        for key in settings
    ]
    for table, key in named:
        assert table in SETTINGS, f"[{table}]"
        assert not key or key in SETTINGS[table], f"[{table}] {key}"


@each_document
def test_files_exist(path: Path) -> None:
    """Paths with a folder and an extension; those of other machines and of any symbol are not looked for."""
    for span in spans(prose(path)):
        if re.fullmatch(r"[\w.-]+(?:/[\w.-]+)+\.(?:py|toml|md|json|png|txt|yml)", span):
            assert (ROOT / span).is_file(), span
        elif re.fullmatch(r"[a-z_]+(?:/[a-z_]+)*/", span) and path.parent == ROOT:
            assert (ROOT / span).is_dir() or span.startswith("hyperparams/"), span


def test_each_kind_of_error_has_a_test() -> None:
    rows = [cells(line) for line in RELIABILITY.read_text().splitlines() if line.startswith("| ") and "`test_" in line]
    assert len(rows) > 20
    sources = [path.read_text() for path in (ROOT / "tests").glob("test_*.py")]
    for *_, tests in rows:
        for name in spans(tests):
            assert any(f"\ndef {name}(" in source for source in sources), name


def test_documents_are_looked_at() -> None:
    """The checks above find what they are for."""
    everything = {name for path in DOCUMENTS for name, _ in invocations(path)}
    assert everything == set(COMMANDS)
    assert {rest for name, rest in invocations(ROOT / "docs" / "clusters.md") if name == "launch-workers"} >= {
        " --gpus 0,1",  # after systemd's ExecStart
        " --data-dir /shared/trainingdata",  # after Slurm's srun
        ', --gpus, "0", --data-dir, /bars]',  # in the list of a Kubernetes pod
    }
    assert len(re.findall(r"`\[[a-z]+\] [a-z_]+", SCRIPTS.read_text())) > 10


def test_readme_is_short_and_links_every_page_once() -> None:
    text = README.read_text()
    assert len(text.splitlines()) <= 170
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    assert {page.name: links.count(f"docs/{page.name}") for page in PAGES} == {page.name: 1 for page in PAGES}


def test_readme_has_every_command_and_its_options() -> None:
    rows = [
        cells(line) for line in README.read_text().splitlines() if line.startswith(("| `studies", "| `promote", "| `l"))
    ]
    named = {" ".join(spans(row[0])[0].split()[:2]): row[-1] for row in rows if len(row) == 3}
    assert set(named) == set(COMMANDS)
    for name, options in named.items():
        assert set(re.findall(r"--[a-z][a-z-]*", options)) <= OPTIONS[name], name


def test_every_module_is_on_the_map() -> None:
    modules = {
        str(module.relative_to(ROOT))
        for room in ROOMS
        for module in (ROOT / room).rglob("*.py")
        if module.stat().st_size
    }
    assert modules - set(spans(prose(ARCHITECTURE))) == set()


def test_a_newcomers_questions_are_answered() -> None:
    rows = [cells(line) for line in ARCHITECTURE.read_text().splitlines() if "? |" in line]
    assert len(rows) >= 10
    for question, where, what in rows:
        sources = {file: (ROOT / file).read_text() for file in spans(where)}
        names = spans(what)
        for name in names:
            assert any(defined(name, source) for source in sources.values()), f"{question} {name}"
        for file, source in sources.items():
            assert any(defined(name, source) for name in names), f"{question} {file}"
