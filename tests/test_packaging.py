"""What a user installs: the wheel's files, one version, and pinned versions that fit the declared ranges."""

import importlib.metadata
import re
import shutil
import subprocess
import sys
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
FOLDERS = {"nsa_cli": "nsa_cli", "nsa_kernels": "kernels", "nsa_models": "models", "nsa_recipes": "recipes"}
DATA = {".c", ".h", ".yaml", ".jsonl", ".json", ".md", ".safetensors"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    """Built without a network from a copy of what the build reads, so that no stale build/ gets in."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, source)
    for folder in FOLDERS.values():
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    build = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    run = subprocess.run([sys.executable, "-c", build, str(target)], cwd=source, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    (file,) = target.glob("*.whl")
    with zipfile.ZipFile(file) as opened:
        yield opened


@pytest.fixture(scope="module")
def metadata(wheel):
    (name,) = (n for n in wheel.namelist() if n.endswith(".dist-info/METADATA"))
    return message_from_bytes(wheel.read(name))


def test_the_wheel_holds_every_module_and_data_file_and_nothing_else(wheel):
    expected = {
        f"{package}/{file.relative_to(ROOT / folder).as_posix()}"
        for package, folder in FOLDERS.items()
        for file in (ROOT / folder).rglob("*")
        if file.suffix in DATA | {".py"}
    }
    assert {"nsa_kernels/native.c", "nsa_kernels/native.h", "nsa_kernels/step.h", "nsa_recipes/__init__.py"} <= expected
    assert {n for n in wheel.namelist() if ".dist-info/" not in n} == expected


def test_the_wheel_carries_its_licences(wheel):
    for name in ("LICENSE", "NOTICE"):
        (found,) = (n for n in wheel.namelist() if n.endswith(f".dist-info/licenses/{name}"))
        assert wheel.read(found) == (ROOT / name).read_bytes()


def test_the_version_has_one_source(metadata):
    version = PROJECT["project"]["version"]
    assert metadata["Version"] == version == importlib.metadata.version("nsa")
    tracked = [file for folder in FOLDERS.values() for file in (ROOT / folder).rglob("*.py")]
    assert [f for f in tracked if re.search(rf"""["']{re.escape(version)}["']""", f.read_text("utf-8"))] == []


def test_the_command_is_installed(wheel):
    (name,) = (n for n in wheel.namelist() if n.endswith(".dist-info/entry_points.txt"))
    assert "nsa = nsa_cli.cli:main" in wheel.read(name).decode()


def applies(requirement: Requirement, python: str) -> bool:
    environment = default_environment() | {"python_version": python, "platform_system": "Linux"}
    return requirement.marker is None or requirement.marker.evaluate(environment)


def pinned(python: str) -> dict[str, str]:
    """constraints.txt as pip reads it under `python`: name -> version."""
    lines = [line.partition("#")[0].strip() for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines()]
    found = {}
    for requirement in map(Requirement, filter(None, lines)):
        if applies(requirement, python):
            (pin,) = requirement.specifier
            name = canonicalize_name(requirement.name)
            assert pin.operator == "==" and name not in found, f"{name} is pinned twice, or not to one version"
            found[name] = pin.version
    return found


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13"])
def test_the_pinned_versions_fit_the_declared_ranges(python):
    project, versions = PROJECT["project"], pinned(python)
    needed = [*project["dependencies"], *project["optional-dependencies"]["dev"], *PROJECT["build-system"]["requires"]]
    assert "torch" in versions
    for requirement in (r for r in map(Requirement, needed) if applies(r, python)):
        assert versions.get(canonicalize_name(requirement.name), "") in requirement.specifier, requirement


def test_what_is_installed_is_declared():
    """Every third-party module that the packages import comes from a declared dependency."""
    extras = PROJECT["project"]["optional-dependencies"]
    needed = [*PROJECT["project"]["dependencies"], *extras["train"], *extras["ray"]]
    declared = {canonicalize_name(Requirement(r).name) for r in needed}
    providers = importlib.metadata.packages_distributions()
    imported = set()
    for folder in FOLDERS.values():
        for file in (ROOT / folder).rglob("*.py"):
            imported |= set(re.findall(r"^\s*(?:from|import) (\w+)", file.read_text("utf-8"), re.M))
    third_party = {m for m in imported if m in providers and m not in FOLDERS and m not in sys.stdlib_module_names}
    assert "torch" in third_party
    assert {m for m in third_party if not declared & {canonicalize_name(p) for p in providers[m]}} == set()
