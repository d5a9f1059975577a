"""The layers of the package, read from its import statements."""

import ast
from pathlib import Path

import salun_sd

FOLDER = Path(salun_sd.__file__).parent


def imports(module: str) -> set[str]:
    """Modules of salun_sd that a module imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse((FOLDER / f"{module}.py").read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "salun_sd":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("salun_sd."):
            found.add(node.module.split(".")[1])
    return found


MODULES = {p.stem for p in FOLDER.glob("*.py")} - {"__init__", "__main__"}


def reaches(module: str) -> set[str]:
    seen, queue = set(), [module]
    while queue:
        for other in imports(queue.pop()) & MODULES - seen:
            seen.add(other)
            queue.append(other)
    return seen


def test_the_ground_floor_stands_on_errors_alone():
    for module in ("errors", "ranks", "memory", "stats", "protocols", "fidelity"):
        assert imports(module) == set(), module
    for module in ("files", "prompts", "diffusion", "mask", "tensors", "layout", "images", "cache"):
        assert imports(module) <= {"errors", "ranks"}, module
    assert imports("data") == {"diffusion"}  # both sides encode prompts by it


def test_nobody_imports_the_command_line():
    assert not [m for m in MODULES if "cli" in imports(m)]


def test_editing_and_auditing_meet_on_disk_only():
    edit_side = {"sources", "plan", "saliency", "mask", "erase", "patch"}
    audit_side = {"sample", "generate", "detect", "classify", "features", "quality", "measure", "report", "page"}
    audit_side |= {"gate", "markdown", "compare", "examine"}
    for module in edit_side:
        assert not reaches(module) & (audit_side | {"audit"}), module
    for module in audit_side:
        assert not reaches(module) & (edit_side - {"mask"} | {"edit", "drawn", "examples"}), module
    assert "edit" not in reaches("audit") and "audit" not in reaches("edit")


def test_the_maths_knows_no_paths_and_prints_nothing():
    for module in ("diffusion", "saliency", "mask", "erase"):
        tree = ast.parse((FOLDER / f"{module}.py").read_text())
        names = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
        assert not names & {"Path", "open", "print", "tqdm"}, module


def test_only_the_command_line_knows_typer():
    assert {m for m in MODULES if "import typer" in (FOLDER / f"{m}.py").read_text()} == {"cli", "options"}
