"""Imports: what ``import pullback`` loads, and that modules only import what lies below them."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "pullback"
FILES = sorted(PACKAGE.rglob("*.py"))
HEAVY = (
    "matplotlib",
    "captum",
    "skimage",
    "scipy",
    "transformers",
    "typer",
    "pandas",
    "sklearn",
    "jinja2",
    "ray",
)

# from the top down; the same number may import one another
LEVELS = {
    "cli": 0, "__main__": 0, "commands": 0, "demo": 0, "demo_report": 0, "doctor": 0, "": 1, "dataset_attribution": 2, "api": 2,
    "steering": 3, "evaluation": 3, "testing": 3, "attribution": 4, "labels": 5, "pipelines": 5, "result": 5, "dataset_result": 5, "inspection": 5,
    "storage": 6, "records": 6, "fingerprints": 6, "workers": 6, "process_workers": 6, "ray_workers": 6, "version": 6, "core": 7,
}  # fmt: skip
LEAVES = ("viz", "datasets")


def name_of(file: Path) -> str:
    """The part of the package a file belongs to: "core", "api", "" for the package itself."""
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    return "" if parts == ("__init__",) else parts[0]


def imports(file: Path, inside_functions: bool) -> Iterator[tuple[str, int]]:
    """Absolute names of what a file imports, with lines: at module level, or inside functions."""
    package = ("pullback", *file.relative_to(PACKAGE).parts[:-1])

    def walk(node: ast.AST, within: bool) -> Iterator[tuple[str, int]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            if within == inside_functions:
                if isinstance(child, ast.Import):
                    yield from ((alias.name, child.lineno) for alias in child.names)
                elif isinstance(child, ast.ImportFrom):
                    base = package[: len(package) - child.level + 1] if child.level else ()
                    module = ".".join([*base, *([child.module] if child.module else [])])
                    if module == "pullback":
                        yield from ((f"pullback.{alias.name}", child.lineno) for alias in child.names)
                    else:
                        yield module, child.lineno
            yield from walk(
                child, within or isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            )

    yield from walk(ast.parse(file.read_text()), False)


def every_import(file: Path) -> list[tuple[str, int]]:
    return [*imports(file, False), *imports(file, True)]


def part(module: str) -> str | None:
    """The part of pullback that a module name means, or None for other packages."""
    names = module.split(".")
    if names[0] != "pullback":
        return None
    if len(names) == 1:
        return ""
    exists = (PACKAGE / names[1]).is_dir() or (PACKAGE / f"{names[1]}.py").exists()
    return names[1] if exists else ""


def test_import_loads_nothing_heavy() -> None:
    code = f"import sys; import pullback; print(sorted(name for name in {HEAVY!r} if name in sys.modules))"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent
    )
    assert result.stdout.strip() == "[]"


def test_every_part_has_a_level() -> None:
    assert {name_of(file) for file in FILES} <= {*LEVELS, *LEAVES}


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_point_down(file: Path) -> None:
    own = name_of(file)
    wrong = []
    for module, line in every_import(file):
        other = part(module)
        if other is None or other == own:
            continue
        if own in LEAVES:
            # leaves may read results, the core and storage, nothing above
            bad = other not in LEAVES and LEVELS[other] < LEVELS["result"]
        elif other in LEAVES:
            continue
        else:
            bad = LEVELS[other] < LEVELS[own]
        if bad:
            wrong.append(f"{file.name}:{line} imports {module}")
    assert wrong == []


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_leaves_are_imported_inside_functions(file: Path) -> None:
    own = name_of(file)
    if own in LEAVES or LEVELS[own] == 0:
        return
    wrong = [
        f"{file.name}:{line} imports {module}"
        for module, line in imports(file, False)
        if part(module) in LEAVES
    ]
    assert wrong == []


@pytest.mark.parametrize("file", sorted((PACKAGE / "core").rglob("*.py")), ids=lambda file: file.name)
def test_core_imports_torch_and_the_standard_library_only(file: Path) -> None:
    for module, line in imports(file, False):
        top = module.split(".")[0]
        assert top in {"torch", "pullback"} or top in sys.stdlib_module_names, (
            f"{file.name}:{line} imports {module}"
        )
        assert part(module) in (None, "core"), f"{file.name}:{line} imports {module}"
    for module, line in imports(file, True):
        top = module.split(".")[0]
        lazy = {"tqdm"} if file.name == "progress.py" else set()
        assert top in {"torch", "pullback", *lazy} or top in sys.stdlib_module_names, (
            f"{file.name}:{line} imports {module}"
        )


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_heavy_packages_are_imported_inside_functions(file: Path) -> None:
    allowed = {"typer"} if LEVELS.get(name_of(file)) == 0 else set()
    wrong = [
        f"{module} at {line}"
        for module, line in imports(file, False)
        if module.split(".")[0] in {*HEAVY} - allowed
    ]
    assert wrong == []


def test_the_checks_see_a_wrong_import(tmp_path: Path) -> None:
    """The walk finds relative, lazy and nested imports, and leaves TYPE_CHECKING alone."""
    file = PACKAGE / "core" / "imaginary.py"
    source = (
        "from ..attribution import cam\nif TYPE_CHECKING:\n    import pandas\n"
        "def f():\n    from .. import viz\n    import scipy.stats\n"
    )

    class Given:
        def relative_to(self, other: Path) -> Path:
            return file.relative_to(other)

        def read_text(self) -> str:
            return source

    assert list(imports(Given(), False)) == [("pullback.attribution", 1)]  # type: ignore[arg-type]
    assert [name for name, _ in imports(Given(), True)] == ["pullback.viz", "scipy.stats"]  # type: ignore[arg-type]
