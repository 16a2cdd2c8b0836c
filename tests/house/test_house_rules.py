"""Rules that no linter checks: lengths, docstrings, examples, reasons, versions, licences."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil
import re
import warnings
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
PACKAGES = ("cif", "plora", "kd_losses", "speech_adapters", "blspkd")
PROJECTS = [ROOT / "pyproject.toml", *sorted(ROOT.glob("src/*/pyproject.toml"))]
SOURCES = sorted([*ROOT.glob("src/**/*.py"), *ROOT.glob("cli/**/*.py")])
SCRIPTS = sorted(
    path for folder in ("tests", "benchmarks", "recipes") for path in ROOT.glob(f"{folder}/**/*.py")
)


def module_names() -> list[str]:
    names = []
    for package in PACKAGES:
        found = importlib.import_module(package)
        names.append(package)
        names += [
            info.name
            for info in pkgutil.walk_packages(found.__path__, f"{package}.")
            # importing it is running it; what imports triton needs triton
            if not info.name.endswith("__main__") and "triton" not in info.name
        ]
    return names


def test_the_sources_are_found():
    assert len(PROJECTS) == 5
    assert len(SOURCES) > 30


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_stay_short(path):
    text = path.read_text("utf-8")
    kernel = re.search(r"^\s*(import triton|from triton)", text, re.MULTILINE)
    lines, limit = len(text.splitlines()), 400 if kernel else 300
    assert lines <= limit, "split the file by meaning"


@pytest.mark.parametrize("name", module_names())
def test_public_names_are_documented(name):
    module = importlib.import_module(name)
    assert inspect.getdoc(module), f"{name} has no docstring"
    public = getattr(module, "__all__", [])
    assert sorted(public) == sorted(set(public))
    for symbol in public:
        value = getattr(module, symbol)
        if not (inspect.isclass(value) or inspect.isroutine(value)):
            continue
        doc = value.__doc__ or ""
        # a dataclass without a docstring documents itself with its signature
        assert doc.strip(), f"{name}.{symbol} has no docstring"
        assert not doc.startswith(f"{symbol}("), f"{name}.{symbol} has no docstring"


@pytest.mark.parametrize("name", PACKAGES[:-1])
def test_the_pieces_say_what_is_public(name):
    assert importlib.import_module(name).__all__


@pytest.mark.parametrize("name", module_names())
def test_examples_in_docstrings_run(name):
    module = importlib.import_module(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = doctest.testmod(module, extraglobs={"torch": importlib.import_module("torch")})
    assert result.failed == 0


@pytest.mark.parametrize("path", SOURCES + SCRIPTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_ignore_and_skip_carries_its_reason(path):
    """A comment behind the ignore or in the line above it; `reason=` in a skip."""
    if path == Path(__file__):
        return
    wrong, lines = [], path.read_text("utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        above = lines[number - 2].strip() if number > 1 else ""
        marker = re.search(r"# (?:type: ignore|noqa)(\[[^]]*\]|: ?[A-Z0-9, ]+)?(.*)", line)
        explained = marker and ("# " in marker[2] or above.startswith("# "))
        if marker and not (marker[1] and explained):
            wrong.append(f"{number}: {line.strip()}")
        skips = re.search(r"\b(mark\.(skip|skipif|xfail)|pytest\.(skip|xfail))\b", line)
        if skips and not re.search(r"reason=|skip\(.", "".join(lines[number - 1 : number + 5])):
            wrong.append(f"{number}: {line.strip()}")
    assert wrong == []


def declared(projects) -> list[Requirement]:
    return [
        Requirement(text)
        for project in projects.values()
        for text in [
            *project["project"]["dependencies"],
            *(
                t
                for extra in project["project"].get("optional-dependencies", {}).values()
                for t in extra
            ),
            *(t for group in project.get("dependency-groups", {}).values() for t in group),
        ]
    ]


def test_one_version_for_all_five(projects):
    version = importlib.import_module("blspkd").__version__
    assert {project["project"]["version"] for project in projects.values()} == {version}
    for package in PACKAGES:
        assert getattr(importlib.import_module(package), "__version__", version) == version, package
    siblings = [r for r in declared(projects) if r.name.startswith("blspkd-")]
    assert len(siblings) == 5
    assert {str(sibling.specifier) for sibling in siblings} == {f"=={version}"}
    assert f"\n## {version}" in (ROOT / "CHANGELOG.md").read_text("utf-8")


def test_the_licences_are_equal():
    licences = [project.parent / "LICENSE" for project in PROJECTS]
    assert not any(path.is_symlink() for path in licences)
    assert len({path.read_bytes() for path in licences}) == 1
    assert "Apache License" in licences[0].read_text("utf-8")


def test_versions_that_make_installs_lie_in_the_declared_ranges(projects):
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    pins: dict[str, list[str]] = {}
    for requirement in (Requirement(line) for line in lines if not line.startswith("#")):
        (pin,) = requirement.specifier
        assert pin.operator == "=="
        pins.setdefault(requirement.name, []).append(pin.version)
    for requirement in declared(projects):
        if requirement.name.startswith("blspkd-"):
            continue
        assert requirement.name in pins, f"constraints.txt has no version of {requirement}"
        assert all(requirement.specifier.contains(pin) for pin in pins[requirement.name])
