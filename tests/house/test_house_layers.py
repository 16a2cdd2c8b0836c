"""The floor plan: who may import whom. No arrow runs back up, and none goes round."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PACKAGES = {
    "cif": ROOT / "src/cif/cif",
    "plora": ROOT / "src/plora/plora",
    "kd_losses": ROOT / "src/kd_losses/kd_losses",
    "speech_adapters": ROOT / "src/adapters/speech_adapters",
    "blspkd": ROOT / "cli/blspkd",
}
PIECES = [name for name in PACKAGES if name != "blspkd"]
MAY_IMPORT_PACKAGE = {
    "cif": set(),
    "plora": set(),
    "kd_losses": set(),
    "speech_adapters": {"cif"},
    "blspkd": set(PIECES),
}
MAY_IMPORT_SUBPACKAGE = {
    "blspkd.__main__": {"blspkd.commands"},
    "blspkd.commands": {"blspkd.training", "blspkd.evaluation", "blspkd.data", "blspkd.model"},
    # the trainer measures held-out clips at intervals with the meters of `eval`
    "blspkd.training": {"blspkd.evaluation", "blspkd.data", "blspkd.model", *PIECES},
    "blspkd.evaluation": {"blspkd.data", "blspkd.model", *PIECES},
    "blspkd.data": {"blspkd.model", *PIECES},
    "blspkd.model": set(PIECES),
    # the embedded recipe: files, and at most a module that says where they lie
    "blspkd.tiny": set(),
}
# Each may be missing on a machine that runs the rest, so one file alone knows of it.
ONE_FILE_ONLY = ("triton",)


def modules(package: str) -> dict[str, Path]:
    """Dotted name -> file of every module of a package."""
    folder = PACKAGES[package]
    found = {}
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(name: str, path: Path) -> Iterator[str]:
    """Dotted names that a module imports, relative ones made absolute, late ones included.

    `from a.b import c` gives `a.b.c`: c may be a module or a name in a.b.
    """
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([base] if base else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


ALL_IMPORTS = [
    (package, name, target)
    for package in PACKAGES
    for name, path in modules(package).items()
    for target in imports(name, path)
]


def test_the_imports_are_found():
    """Or the tests below would pass on an empty list."""
    assert ("speech_adapters", "speech_adapters.cformer", "cif.CIF") in ALL_IMPORTS
    assert ("blspkd", "blspkd.__main__", "click") in ALL_IMPORTS
    for package, folder in PACKAGES.items():
        assert len(modules(package)) == len(list(folder.rglob("*.py"))) > 1


def test_packages_import_no_sibling_but_those_allowed():
    wrong = [
        f"{name} imports {target}"
        for package, name, target in ALL_IMPORTS
        if (sibling := target.split(".")[0]) in PACKAGES
        and sibling != package
        and sibling not in MAY_IMPORT_PACKAGE[package]
    ]
    assert wrong == []


def area(dotted: str) -> str:
    """`blspkd.model.audio` -> `blspkd.model`; `cif.functional` -> `cif`."""
    parts = dotted.split(".")
    return ".".join(parts[:2]) if parts[0] == "blspkd" else parts[0]


def test_every_subpackage_has_its_row():
    folders = {area(name) for name in modules("blspkd") if name != "blspkd" and "." in name}
    assert folders <= set(MAY_IMPORT_SUBPACKAGE)


def test_no_arrow_runs_back_up():
    wrong = []
    for _, name, target in ALL_IMPORTS:
        source, sink = area(name), area(target)
        known = sink in PIECES or sink in MAY_IMPORT_SUBPACKAGE
        allowed = {source, *MAY_IMPORT_SUBPACKAGE.get(source, {sink})}
        if known and sink not in allowed:
            wrong.append(f"{name} imports {target}")
    assert wrong == []


@pytest.mark.parametrize("package", PACKAGES)
def test_no_arrow_goes_round(package):
    files = modules(package)
    graph: dict[str, set[str]] = {name: set() for name in files}
    for _, name, target in (row for row in ALL_IMPORTS if row[0] == package):
        # a package's __init__ gathers what lies below it; taking a name from it is no loop
        module = target if target in files else target.rpartition(".")[0]
        if module in files and module != name and files[module].name != "__init__.py":
            graph[name].add(module)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"modules import each other in a circle: {' -> '.join(error.args[1])}")


@pytest.mark.parametrize("package", PACKAGES)
def test_every_import_is_declared(package, projects):
    """What a package imports, its own pyproject.toml asks for; dependencies' are not enough."""
    project = projects[package]["project"]
    extras = project.get("optional-dependencies", {}).values()
    texts = [*project["dependencies"], *(text for extra in extras for text in extra)]
    declared = {canonicalize_name(Requirement(text).name) for text in texts}
    assert "torch" in declared
    owners = importlib.metadata.packages_distributions()
    wrong = []
    for _, name, target in (row for row in ALL_IMPORTS if row[0] == package):
        top = target.split(".")[0]
        if top in {package, "__future__", *sys.stdlib_module_names, *ONE_FILE_ONLY}:
            continue
        # an editable install does not list the packages that it offers
        found = [projects[top]["project"]["name"]] if top in projects else owners.get(top, [top])
        names = {canonicalize_name(owner) for owner in found}
        if not names & declared:
            wrong.append(f"{name} imports {target}")
    assert wrong == []


@pytest.mark.parametrize("optional", ONE_FILE_ONLY)
@pytest.mark.parametrize("package", PACKAGES)
def test_what_may_be_missing_is_imported_in_one_file(package, optional):
    files = {
        name
        for row, name, target in ALL_IMPORTS
        if row == package and target.split(".")[0] == optional
    }
    assert len(files) <= 1, files


def test_nothing_private_of_torch_or_transformers_is_used():
    wrong = []
    for package in PACKAGES:
        for name, path in modules(package).items():
            roots = {"torch", "transformers"}
            tree = ast.parse(path.read_text("utf-8"))
            for node in ast.walk(tree):
                if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in roots:
                    roots |= {a.asname or a.name for a in node.names if not a.name[0].isupper()}
            for target in imports(name, path):
                private = any(part.startswith("_") for part in target.split("."))
                if private and target.split(".")[0] in {"torch", "transformers"}:
                    wrong.append(f"{name} imports {target}")
            for node in ast.walk(tree):
                chain = []
                while isinstance(node, ast.Attribute):
                    chain.append(node.attr)
                    node = node.value
                rooted = isinstance(node, ast.Name) and node.id in roots
                if rooted and any(re.match(r"_(?!_)", part) for part in chain):
                    wrong.append(f"{name} uses {node.id}.{'.'.join(reversed(chain))}")
    assert wrong == []


def test_only_safetensors_are_read():
    """Loading a pickle runs what its author wrote."""
    wrong = [
        f"{name} imports {target}"
        for _, name, target in ALL_IMPORTS
        if target.split(".")[0] in {"pickle", "joblib", "dill", "cloudpickle"}
    ]
    for package in PACKAGES:
        for name, path in modules(package).items():
            wrong += [
                f"{name} calls {ast.unparse(node)}"
                for node in ast.walk(ast.parse(path.read_text("utf-8")))
                if isinstance(node, ast.Call)
                and (
                    ast.unparse(node.func) == "torch.load"
                    or any(k.arg == "allow_pickle" for k in node.keywords)
                )
            ]
    assert wrong == []
