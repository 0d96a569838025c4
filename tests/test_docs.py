"""The documents keep their word: examples run, and what exists is documented."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COMMANDS = ("models", "quantize", "run", "profile", "plan", "compare", "evaluate", "inspect", "export", "demo")


def test_examples_of_the_api_page_run_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "api.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) >= 6
    scope: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "docs/api.md", "exec"), scope)  # our own text
    assert {path.name for path in tmp_path.iterdir()} >= {"demo-bundle", "deltas.safetensors", "disc.mp4", "disc.png"}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_in_the_readme_and_has_help_without_torch(command: str) -> None:
    assert f"ispa-deploy {command}" in (ROOT / "README.md").read_text(encoding="utf-8")
    code = (
        "import sys, cli\n"
        f"sys.argv = ['ispa-deploy', '{command}', '--help']\n"
        "try:\n    cli.main()\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        "assert 'torch' not in sys.modules, 'torch was imported for --help'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout


def test_every_policy_preset_scheme_and_model_is_documented() -> None:
    from ispa_deploy.absorb.presets import PRESETS
    from ispa_deploy.policies import POLICIES
    from ispa_deploy.specs import SPECS
    from quant.schemes import SCHEMES

    pages = "".join(path.read_text(encoding="utf-8") for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
    missing = [name for table in (PRESETS, POLICIES, SPECS, SCHEMES) for name in table if f"`{name}`" not in pages]
    assert not missing


def test_the_first_screen_of_the_readme_has_the_two_commands() -> None:
    first = "\n".join((ROOT / "README.md").read_text(encoding="utf-8").splitlines()[:40])
    assert "make demo" in first
    assert "make test" in first
