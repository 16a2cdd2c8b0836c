"""What is shipped: every sdist builds its wheel, and each wheel works alone in a fresh venv.

The venv sees no package of this repository and no library but those that the wheel asks for: they
are linked in one by one from this environment, and pip resolves the rest from the built wheels.
An import that is not declared therefore fails here.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
# import name -> folder of the distribution
PROJECTS = {
    "cif": ROOT / "src/cif",
    "plora": ROOT / "src/plora",
    "kd_losses": ROOT / "src/kd_losses",
    "speech_adapters": ROOT / "src/adapters",
    "blspkd": ROOT,
}
DISTRIBUTIONS = {
    "cif": "blspkd-cif",
    "plora": "blspkd-plora",
    "kd_losses": "blspkd-kd-losses",
    "speech_adapters": "blspkd-adapters",
    "blspkd": "blspkd",
}
NEEDS = {"speech_adapters": {"cif"}, "blspkd": {"cif", "plora", "kd_losses", "speech_adapters"}}
EMBEDDED_LIMIT = 16e6  # bytes


def run(*command: str | Path, cwd: Path) -> str:
    clean = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("PYTHON", "PIP_", "VIRTUAL_ENV"))
    }
    clean["OMP_NUM_THREADS"] = "1"
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=clean, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="session")
def dist(tmp_path_factory):
    """All five sdists, and the wheels built from them, not from the working tree."""
    out = tmp_path_factory.mktemp("dist")
    for folder in PROJECTS.values():
        run(
            sys.executable,
            "-m",
            "build",
            "--no-isolation",
            "--outdir",
            out,
            folder,
            cwd=out,
        )
    return out


def archive(dist: Path, package: str, suffix: str) -> Path:
    name = DISTRIBUTIONS[package].replace("-", "_")
    (path,) = dist.glob(f"{name}-[0-9]*{suffix}")
    return path


def tree(package: str) -> set[str]:
    """Every file of a package's folder, as the path that it must have in the archives."""
    folder = PROJECTS[package] / ("cli" if package == "blspkd" else "")
    return {
        str(path.relative_to(folder))
        for path in (folder / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".pyc"
    }


@pytest.mark.parametrize("package", PROJECTS)
def test_wheel_holds_the_package_and_nothing_else(dist, package):
    with zipfile.ZipFile(archive(dist, package, ".whl")) as wheel:
        names = set(wheel.namelist())
    inside = {name for name in names if ".dist-info/" not in name}
    assert inside == tree(package)
    assert f"{package}/py.typed" in inside
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


@pytest.mark.parametrize("package", PROJECTS)
def test_sdist_holds_the_package_its_licence_and_its_readme(dist, package):
    with tarfile.open(archive(dist, package, ".tar.gz")) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    prefix = "cli/" if package == "blspkd" else ""
    assert {"LICENSE", "README.md", "pyproject.toml", "PKG-INFO"} <= names
    assert {prefix + name for name in tree(package)} <= names
    assert not any(name.startswith(("tests/", ".git/", ".venv/")) for name in names)


def test_embedded_recipe_stays_small(dist):
    with zipfile.ZipFile(archive(dist, "blspkd", ".whl")) as wheel:
        sizes = {i.filename: i.file_size for i in wheel.infolist()}
    embedded = {name: size for name, size in sizes.items() if not name.endswith(".py")}
    assert sum(embedded.values()) <= EMBEDDED_LIMIT, embedded


def closure(requirements: list[str]) -> dict[str, importlib.metadata.Distribution]:
    """The installed third-party distributions that a list of requirements needs, by name."""
    found: dict[str, importlib.metadata.Distribution] = {}
    queue = [(Requirement(text), "") for text in requirements]
    while queue:
        requirement, extra = queue.pop()
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        if requirement.name in DISTRIBUTIONS.values():
            continue
        try:
            distribution = importlib.metadata.distribution(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            # `python -m pip check` tells what is missing; a wheel that needs it fails below
            continue
        new = requirement.name not in found
        found[requirement.name] = distribution
        wanted = [*requirement.extras, *([""] if new else [])]
        queue += [(Requirement(r), e) for e in wanted for r in distribution.requires or []]
    return found


def fresh_venv(folder: Path, requirements: list[str]) -> Path:
    """An environment that holds the closure of the requirements, as links; returns its python."""
    venv.create(folder, symlinks=True)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
    for distribution in closure(requirements).values():
        for top in {Path(file).parts[0] for file in distribution.files or []}:
            target = Path(str(distribution.locate_file(top)))
            if top != ".." and top != "__pycache__" and not (site / top).exists():
                (site / top).symlink_to(target)
    return folder / "bin" / "python"


def requirements(wheels: list[Path]) -> list[str]:
    found = []
    for path in wheels:
        with zipfile.ZipFile(path) as wheel:
            (metadata,) = (n for n in wheel.namelist() if n.endswith(".dist-info/METADATA"))
            found += re.findall(
                r"^Requires-Dist: (.*)$", wheel.read(metadata).decode(), re.MULTILINE
            )
    return found


@pytest.fixture(scope="session")
def environments(dist, tmp_path_factory):
    """package -> the python of a venv in which pip installed that package's wheel."""
    made: dict[str, Path] = {}

    def make(package: str) -> Path:
        if package not in made:
            needed = [package, *sorted(NEEDS.get(package, ()))]
            wheels = [archive(dist, name, ".whl") for name in needed]
            folder = tmp_path_factory.mktemp(f"venv-{package}")
            python = fresh_venv(folder / "venv", requirements(wheels))
            run(
                sys.executable,
                "-m",
                "pip",
                "--python",
                python,
                "install",
                "--quiet",
                "--no-index",
                "--find-links",
                dist,
                DISTRIBUTIONS[package],
                cwd=folder,
            )
            made[package] = python
        return made[package]

    return make


@pytest.mark.parametrize("package", PROJECTS)
def test_wheel_works_alone_and_runs_its_readme(environments, tmp_path, package):
    python = environments(package)
    readme = (PROJECTS[package] / "README.md").read_text("utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", readme, re.DOTALL | re.MULTILINE)
    assert blocks or package == "blspkd", "a piece shows how it is used"
    code = (
        "import importlib.util\n"
        f"import {package}\n"
        f"print({package}.__file__)\n"
        f"print(*[n for n in {sorted(PROJECTS)} if importlib.util.find_spec(n)])\n"
        f"for block in {blocks!r}:\n"
        "    exec(compile(block, 'README.md', 'exec'), {'__name__': '__main__'})\n"
    )
    where, importable, *_ = run(python, "-I", "-c", code, cwd=tmp_path).splitlines()
    assert Path(where).is_relative_to(python.parents[1])
    assert set(importable.split()) == {package, *NEEDS.get(package, ())}


def test_the_command_runs_from_the_wheels(environments, tmp_path):
    command = environments("blspkd").with_name("blspkd")
    version = importlib.metadata.version("blspkd")
    assert version in run(command, "--version", cwd=tmp_path)
    assert "train" in run(command, "--help", cwd=tmp_path)
