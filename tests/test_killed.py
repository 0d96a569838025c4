"""A process that is killed while it writes: no file under the name asked for, and nothing in the next one's way."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from export.bundle import open_bundle
from ispa_deploy.media.video import read_video

ROOT = Path(__file__).parents[1]
KILLED = """
import os, signal, sys
import cli
def die(*_): os.kill(os.getpid(), signal.SIGKILL)
{trap}
sys.argv[0] = "ispa-deploy"
cli.main()
"""
TRAPS = {
    "": "",
    "a rename": "os.replace = os.rename = die\nimport pathlib; pathlib.Path.rename = pathlib.Path.replace = die",
    "a shard": "import export.write as w; whole = w.write_tensors\n"
    "def half(path, *rest): path.write_bytes(b'half'); die()\nw.write_tensors = half",
    "a chunk": "from ispa_deploy.sampler import Sampler; step = Sampler.denoise\n"
    "Sampler.denoise = lambda self, chunk, *rest: die() if chunk == 2 else step(self, chunk, *rest)",
}


def command(trap: str, *arguments: object) -> int:
    code = KILLED.format(trap=TRAPS[trap])
    done = subprocess.run(
        [sys.executable, "-c", code, *(str(argument) for argument in arguments)], cwd=ROOT, capture_output=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True, check=False,
    )  # fmt: skip
    assert trap or done.returncode == 0, done.stderr
    return done.returncode


def names(folder: Path) -> list[str]:
    return sorted(item.name for item in folder.iterdir() if not item.name.startswith("."))


@pytest.mark.parametrize("trap", ["a shard", "a rename"])
def test_a_bundle_is_whole_or_not_there(tmp_path: Path, trap: str) -> None:
    arguments = ("quantize", "demo", "-o", tmp_path / "b")
    assert command(trap, *arguments) == -signal.SIGKILL
    assert names(tmp_path) == []
    assert command("", *arguments) == 0
    open_bundle(tmp_path / "b")
    assert [item.name for item in tmp_path.iterdir()] == ["b"], "what the killed one left is gone"


@pytest.mark.parametrize("trap", ["a chunk", "a rename"])
def test_a_stream_s_files_are_whole_or_not_there(tmp_path: Path, trap: str) -> None:
    command("", "quantize", "demo", "-o", tmp_path / "b")
    (tmp_path / "out").mkdir()
    files = [tmp_path / "out" / name for name in ("v.mp4", "l.safetensors", "d.safetensors", "s.json")]
    arguments = ("run", tmp_path / "b", "--frames", 15, "--threads", 1, "--allow-fallback")
    flags = [pair for flag in zip(("--out", "--latents", "--save-deltas", "--stats"), files) for pair in flag]  # noqa: B905
    assert command(trap, *arguments, *flags) == -signal.SIGKILL
    assert names(tmp_path / "out") == []
    assert command("", *arguments, *flags) == 0
    assert {item.name for item in tmp_path.joinpath("out").iterdir()} == {*(file.name for file in files), "v.png"}
    assert len(read_video(files[0])[0]) == load_file(files[1])["latents"].shape[1] == 15
