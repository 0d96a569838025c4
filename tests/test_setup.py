"""Set-up files agree with each other: make targets, pins, package metadata."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import ispa_deploy

ROOT = Path(__file__).resolve().parent.parent

# Target -> the command it must run with the interpreter it is given.
TARGETS = {
    "demo": "python3 -m cli demo -o demo-out",
    "test": "python3 -m pytest",
    "test-slow": "python3 -m pytest -m slow",
    "test-gpu": "python3 -m pytest -m gpu",
    "bench": "python3 -m tests.bench",
    "bench-gpu": "python3 -m tests.bench --suite gpu",
    "lint": "python3 -m mypy",
    "clean": "rm -rf demo-out build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache",
}


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    """pyproject.toml, parsed."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def pins() -> dict[str, str]:
    """constraints.txt as name -> version; every line must be an exact pin."""
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    found: dict[str, str] = {}
    for line in lines:
        match = re.fullmatch(r"([A-Za-z0-9._-]+)==([A-Za-z0-9.!]+)", line)
        assert match, f"not an exact pin without a build suffix: {line}"
        found[canonicalize_name(match[1])] = match[2]
    assert len(found) == len(lines), "a package is pinned twice"
    return found


def dry_run(*arguments: str) -> list[str]:
    """The commands that make would run, outside any surrounding make."""
    surrounding = ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "MAKEOVERRIDES", "PY", "PYTHON", "VENV")
    environment = {key: value for key, value in os.environ.items() if key not in surrounding}
    command = ["make", "--dry-run", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("without_venv", ["PY=python3", "VENV="])
def test_target_runs_its_command_without_a_venv(target: str, without_venv: str) -> None:
    commands = dry_run(target, without_venv)
    assert TARGETS[target] in commands
    assert not any("-m venv" in command or "pip install" in command for command in commands)


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_a_missing_venv_is_made_with_torch_first() -> None:
    commands = dry_run("test", "VENV=no-such-venv", "PYTHON=python3.12")
    text = "\n".join(commands)
    steps = [
        "python3.12 -m venv no-such-venv",
        "no-such-venv/bin/python -m pip install -c constraints.txt torch\n",
        "no-such-venv/bin/python -m pip install -c constraints.txt -e '.[dev]'",
        "no-such-venv/bin/python -m ruff check .",
        "no-such-venv/bin/python -m mypy",
        "no-such-venv/bin/python -m pytest",
    ]
    places = [text.find(step) for step in steps]
    assert -1 not in places, text
    assert places == sorted(places)


def test_every_base_and_dev_requirement_is_pinned_within_its_range(project: dict[str, Any]) -> None:
    pinned = pins()
    wanted = [*project["project"]["dependencies"], *project["project"]["optional-dependencies"]["dev"]]
    for requirement in map(Requirement, wanted):
        version = pinned.get(canonicalize_name(requirement.name))
        assert version is not None, f"{requirement.name} is not in constraints.txt"
        assert requirement.specifier.contains(version), f"{requirement} does not allow the pinned {version}"


def test_project_metadata(project: dict[str, Any]) -> None:
    metadata = project["project"]
    assert metadata["name"] == "ispa-deploy"
    assert metadata["scripts"] == {"ispa-deploy": "cli:main"}
    assert {"flash", "hopper", "bnb", "hf", "report", "dev"} <= set(metadata["optional-dependencies"])
    assert re.fullmatch(r"\d+\.\d+\.\d+", ispa_deploy.__version__)


def test_ci_runs_the_test_command() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert "make test" in script.read_text().splitlines()
