"""The house: which package may import from which, read from the import statements."""

import ast
import logging
import subprocess
import sys
from pathlib import Path

import pytest

import salun_sd

FOLDER = Path(salun_sd.__file__).parent
FLOORS = [  # from the top; a package imports only from the floors below its own
    {"__main__"},
    {"cli"},
    {"under_attack"},
    {"edit", "audit", "attacks", "classifier", "pocket"},
    {"draw", "methods", "report"},
    {"checkpoint", "core"},
    {"runtime"},
    {"errors"},
    {"__init__"},
]
FLOOR = {package: n for n, floor in enumerate(FLOORS) for package in floor}
FILES = sorted(FOLDER.rglob("*.py"))


def place(file: Path) -> str:
    """The package of a file, or the file's own name at the top."""
    return file.relative_to(FOLDER).with_suffix("").parts[0]


def imports(file: Path) -> set[str]:
    """Modules of salun_sd, with dots, that a file imports anywhere in it."""
    modules = {".".join(p.relative_to(FOLDER.parent).with_suffix("").parts) for p in FILES}
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "salun_sd":
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found.add(whole if whole in modules else node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] == "salun_sd"}
    return found


def test_every_package_has_a_floor():
    assert {place(file) for file in FILES} == set(FLOOR)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(FOLDER)))
def test_no_import_runs_upwards_or_across(file):
    own = place(file)
    for module in imports(file):
        other = module.split(".")[1] if "." in module else "__init__"
        assert other == own or FLOOR[other] > FLOOR[own], f"{file.relative_to(FOLDER)} imports {module}"


def test_no_module_imports_itself_in_a_circle():
    graph = {".".join(f.relative_to(FOLDER.parent).with_suffix("").parts): imports(f) for f in FILES}
    done: set[str] = set()

    def walk(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " > ".join([*path, module])
        if module not in done:
            for other in graph.get(module, ()):
                walk(other, (*path, module))
            done.add(module)

    for module in graph:
        walk(module, ())


def names_in(file: Path) -> set[str]:
    return {n.id for n in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if isinstance(n, ast.Name)}


def test_the_maths_knows_no_path_and_no_bar():
    for file in [*(FOLDER / "core").glob("*.py"), *(FOLDER / "methods").glob("*.py")]:
        assert not names_in(file) & {"Path", "open", "tqdm", "Bar"}, file


def test_only_the_commands_print_and_know_typer():
    for file in FILES:
        if place(file) not in ("cli", "pocket"):
            text = file.read_text(encoding="utf-8")
            assert "print" not in names_in(file) and "import typer" not in text, file


def test_the_library_speaks_through_its_log(tmp_path, caplog, capsys):
    with caplog.at_level(logging.INFO, logger="salun_sd"):
        salun_sd.erase("pocket", "a photo of a sneaker", "a photo of a bag", out=tmp_path / "out", dry_run=True)
    assert any("Stable Diffusion" in line for line in caplog.messages) and capsys.readouterr().out == ""


def test_importing_the_package_waits_for_no_library():
    code = "import sys, salun_sd; sys.exit(bool({'torch', 'diffusers', 'typer'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
