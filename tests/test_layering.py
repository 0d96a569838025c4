"""The arrows cli -> export -> quant -> ispa_deploy, enforced on every import statement in the tree."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# What each top-level name may import of ours, itself included; a longer name covers everything under it.
MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "cli": ("cli", "export", "quant", "ispa_deploy"),
    "export": ("export", "quant", "ispa_deploy"),
    "quant": (
        "quant",
        *(f"ispa_deploy.{name}" for name in ("errors", "regions", "delta", "linear", "specs", "native")),
        *("ispa_deploy.passes", "ispa_deploy.triton_passes"),  # which products begin in and end in codes of
    ),
    "ispa_deploy": ("ispa_deploy",),
}
OURS = (*MAY_IMPORT, "tests")
WITHOUT_TORCH = ("cli", "ispa_deploy.specs", "ispa_deploy.errors")


def sources(root: Path) -> list[Path]:
    """Every source file of the four layers."""
    return sorted(path for layer in MAY_IMPORT for path in [*root.glob(f"{layer}.py"), *root.glob(f"{layer}/**/*.py")])


def imported(path: Path, root: Path) -> Iterator[tuple[int, str]]:
    """(line, full dotted name) of everything `path` imports, at any depth of its code, relative names resolved."""
    package = path.relative_to(root).parent.parts
    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            case ast.Import():
                yield from ((node.lineno, alias.name) for alias in node.names)
            case ast.ImportFrom():
                base = package[: len(package) - node.level + 1] if node.level else ()
                module = (*base, *([node.module] if node.module else []))
                yield from ((node.lineno, ".".join((*module, alias.name))) for alias in node.names)
            case ast.Call(
                func=ast.Name(id=name) | ast.Attribute(attr=name), args=[ast.Constant(value=str(target)), *_]
            ):
                if name in ("import_module", "__import__"):
                    yield node.lineno, target


def violations(root: Path) -> list[str]:
    """`file:line imports name` for every import against the arrows."""
    found = []
    for path in sources(root):
        layer = path.relative_to(root).parts[0].removesuffix(".py")
        for line, name in imported(path, root):
            inside = any(f"{name}.".startswith(f"{allowed}.") for allowed in MAY_IMPORT[layer])
            if name.split(".")[0] in OURS and not inside:
                found.append(f"{path.relative_to(root)}:{line} imports {name}")
    return found


def test_imports_follow_the_arrows() -> None:
    assert len(sources(ROOT)) > 5
    assert not violations(ROOT)


@pytest.mark.parametrize(
    ("file", "line", "name"),
    [
        ("ispa_deploy/a.py", "import quant", "quant"),
        ("ispa_deploy/a.py", "import quant.linear as q", "quant.linear"),
        ("ispa_deploy/b/c.py", "def f():\n    from export.bundle import write", "export.bundle.write"),
        ("ispa_deploy/b/c.py", "class A:\n  if 1:\n    import cli", "cli"),
        ("ispa_deploy/a.py", "import importlib\nimportlib.import_module('quant.x')", "quant.x"),
        ("ispa_deploy/a.py", "from tests import reference", "tests.reference"),
        ("quant/a.py", "from ispa_deploy import model", "ispa_deploy.model"),
        ("quant/a.py", "import ispa_deploy", "ispa_deploy"),
        ("quant/a.py", "from ispa_deploy.linear2 import x", "ispa_deploy.linear2.x"),
        ("quant/a.py", "def f():\n    import export", "export"),
        ("quant/a.py", "from ..export import bundle", "export.bundle"),
        ("export/a.py", "from cli import main", "cli.main"),
        ("export/b/c.py", "from ...cli import main", "cli.main"),
    ],
)
def test_a_planted_violation_is_found(tmp_path: Path, file: str, line: str, name: str) -> None:
    planted = tmp_path / file
    planted.parent.mkdir(parents=True)
    planted.write_text(line)
    assert violations(tmp_path) == [f"{file}:{line.count(chr(10)) + 1} imports {name}"]


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("ispa_deploy/a.py", "from . import model\nfrom .linear import Linear\nimport ispa_deploy.absorb.stats, torch"),
        ("ispa_deploy/b/c.py", "from ..errors import InputError\nfrom .. import specs"),
        ("quant/a.py", "from ispa_deploy.delta import Delta\nfrom ispa_deploy import regions\nfrom . import linear"),
        ("export/a.py", "import quant\nfrom ispa_deploy.model import x\nfrom .manifest import y"),
        ("cli.py", "import export.bundle\nfrom quant import schemes\nimport ispa_deploy"),
    ],
)
def test_an_import_along_the_arrows_passes(tmp_path: Path, file: str, line: str) -> None:
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text(line)
    assert not violations(tmp_path)


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_light_modules_do_not_import_torch(module: str) -> None:
    """In a fresh interpreter, so what the module imports in turn counts too."""
    code = f"import {module}, sys; print('torch' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["False", "False"]


def test_no_command_waits_for_the_compiler() -> None:
    """Torch's compiler takes a second to load, and sympy half of one: only what compiles may pay for them."""
    code = (
        "import cli, export.profiling, ispa_deploy.run, sys; from export.sources import SPECS, empty; "
        "empty(SPECS['demo']); "
        "print([name for name in ('torch._dynamo', 'sympy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("[]\n", "")
