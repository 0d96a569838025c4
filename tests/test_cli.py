"""The commands as a user meets them: results, exit codes, one line for every mistake, nothing half-written left."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import cli
import export.bundle
import export.write
from export.convert import quantise_source
from export.deltas import HEADER_KEY
from export.manifest import MANIFEST, file_digest
from ispa_deploy import __version__
from ispa_deploy.attention_int8 import kernels
from ispa_deploy.demo.codec import BlockCodec
from ispa_deploy.media.video import read_video
from ispa_deploy.sampler import Sampler
from ispa_deploy.specs import SPECS
from quant.schemes import SCHEMES
from tests.pages import undocumented, unreal
from tests.tiny import SPEC

ROOT = Path(__file__).resolve().parent.parent
SHARD = "model-00001-of-00001.safetensors"
# Tuning malloc or the threads would outlive the test.
RUN = ("--no-tune-allocator", "--threads", "1")


@dataclass(frozen=True)
class Result:
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        """All of stdout as one strict JSON document."""
        assert self.code == 0, self.err

        def refuse(word: str) -> None:
            raise AssertionError(f"{word} is no JSON")

        return json.loads(self.out, parse_constant=refuse)


def command(*arguments: object) -> Result:
    """The CLI in this process, as its console script calls it."""
    out, err, argv = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["ispa-deploy", *map(str, arguments)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as exited:
            cli.main()
    finally:
        sys.argv = argv
    return Result(int(exited.value.code or 0), out.getvalue(), err.getvalue())


def stream(bundle: Path, *arguments: object, frames: int = 15) -> Result:
    return command("run", bundle, "--frames", frames, "--json", *RUN, *arguments)


def files(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones too."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(result: Result, *parts: str, code: int = 2) -> None:
    """One line on stderr that holds `parts`, nothing on stdout."""
    assert result.code == code, result.err
    assert result.out == ""
    lines = result.err.splitlines()
    assert len(lines) == 1, result.err
    assert lines[0].startswith("error: ")
    for part in parts:
        assert part in lines[0]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cli")


@pytest.fixture(scope="module")
def demo(home: Path) -> Path:
    """The embedded model, quantised by the command."""
    done = command("quantize", "demo", "-o", home / "demo", "--json")
    assert done.document["scheme"] == "w8a8-int8"
    return home / "demo"


def tiny_bundle(folder: Path, scheme: str) -> Path:
    quantise_source("random", folder, scheme=SCHEMES[scheme], model=SPEC, dtype=torch.float32)
    return folder


@pytest.fixture(scope="module")
def tiny(home: Path) -> Path:
    """Random weights that stream in milliseconds; no decoder."""
    return tiny_bundle(home / "tiny", "w8a8-int8")


@pytest.fixture(scope="module")
def floating(home: Path) -> Path:
    return tiny_bundle(home / "floating", "none")


# -- the whole path, on the embedded model


def test_quantise_run_store_and_start_from_stored_deltas(demo: Path, tmp_path: Path) -> None:
    names = {"out": "v.mp4", "latents": "l.safetensors", "save-deltas": "d.safetensors", "stats": "s.json"}
    done = stream(demo, *(part for flag, name in names.items() for part in (f"--{flag}", tmp_path / name)), frames=15)
    document = done.document
    assert done.err == "", "no progress where stderr is no terminal"
    assert sorted(files(tmp_path)) == ["d.safetensors", "l.safetensors", "s.json", "v.mp4", "v.png"]
    assert json.loads((tmp_path / "s.json").read_text()) == document
    pictures, rate = read_video(tmp_path / "v.mp4")
    assert pictures.shape == (15, 320, 320, 3)
    assert rate == SPECS["demo"].fps
    latents = load_file(tmp_path / "l.safetensors")["latents"]
    assert latents.shape == (1, 15, *SPECS["demo"].latent_shape)
    assert (tmp_path / "v.png").read_bytes().startswith(b"\x89PNG")

    assert (document["frames"], document["chunks"], document["complete"]) == (15, 5, True)
    absorption = document["absorption"]
    assert absorption["state"] == "absorbed"
    local = absorption["local_layers"]
    assert len(local) == 5
    for index, layer in enumerate(absorption["layers"]):
        assert layer["kind"] == ("L" if index in local else "F")
        assert layer["status"] == "ok"
        assert layer["score"] > 0
        assert layer["condition"] > 1
        assert 0 < layer["residual"] < layer["gap"]
    assert max(absorption["layers"][i]["score"] for i in local) <= min(
        layer["score"] for i, layer in enumerate(absorption["layers"]) if i not in local
    )
    full = document["kv"]["full_bytes"]
    assert document["kv"]["per_chunk_bytes"][:3] == [full] * 3
    assert document["kv"]["percent"] == pytest.approx(100 * (1 - 0.5 * 11 / 12))

    again = stream(demo, "--deltas", tmp_path / "d.safetensors", frames=3).document
    assert again["absorption"]["state"] == "absorbed"
    assert again["absorption"]["local_layers"] == local
    assert again["kv"]["per_chunk_bytes"] == [document["kv"]["persistent_bytes"]], "no warm-up: small from the start"
    assert again["statistics_bytes"] == 0

    looked = command("inspect", tmp_path / "d.safetensors", "--json").document
    assert (looked["kind"], looked["layers"]) == ("deltas", sorted(local))
    assert command("inspect", demo, "--json").document["intact"] is True


def test_keys_and_values_in_eight_bits(demo: Path) -> None:
    plain, coded = (stream(demo, "--kv-dtype", form, frames=6).document["kv"] for form in ("auto", "int8"))
    assert (plain["dtype"], plain["error"], coded["dtype"]) == ("auto", {}, "int8")
    assert coded["persistent_bytes"] * 128 == plain["persistent_bytes"] * (32 + 2), "float32, heads of 32"
    assert all(0 < coded["error"][name] < 0.02 for name in ("keys", "values"))
    refused(stream(demo, "--kv-dtype", "int4"), "unknown KV dtype 'int4'", "auto, fp8, int8")


def test_attention_in_eight_bits(demo: Path) -> None:
    flags = "--kv-dtype", "int8", "--attention-dtype", "int8"
    done = stream(demo, *flags, "--allow-fallback", frames=6).document
    assert done["kv"]["attention"]["kernel"] in kernels()
    assert done["kv"]["attention"]["calls"] > 0
    simulated = stream(demo, *flags, "--dtype", "float16", frames=6)
    refused(simulated, "no kernel runs on cpu", "float16", "--allow-fallback simulates", "--attention-dtype", code=1)
    allowed = stream(demo, *flags, "--dtype", "float16", "--allow-fallback", frames=6).document
    assert "8-bit attention was simulated" in allowed["audit_warnings"][-1]
    one_chunk = stream(demo, *flags, "--allow-fallback", frames=3).document
    assert "8-bit attention never ran" in one_chunk["audit_warnings"][-1]
    if allowed["kv"]["attention"]["kernel"] != done["kv"]["attention"]["kernel"]:
        idle = stream(demo, *flags, frames=3)
        assert (idle.code, idle.out) == (1, "")
        assert "8-bit attention never ran" in idle.err
    refused(stream(demo, *flags[2:]), "--attention-dtype int8 with --kv-dtype auto", "--kv-dtype int8")


@pytest.mark.parametrize("which", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_finishes_the_chunk_and_closes_the_video(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, which: signal.Signals
) -> None:
    decode, calls = BlockCodec.decode, []

    def interrupted(self: BlockCodec, latents: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), which)
        return decode(self, latents)

    monkeypatch.setattr(BlockCodec, "decode", interrupted)
    before = signal.getsignal(which)  # ignored where the tests run in a shell's background
    done = stream(demo, "--out", tmp_path / "v.mp4", "--save-deltas", tmp_path / "d.safetensors", frames=15)
    assert done.code == 130
    document = json.loads(done.out)
    assert (document["complete"], document["chunks"], document["frames"]) == (False, 2, 6)
    assert len(read_video(tmp_path / "v.mp4")[0]) == 6
    assert sorted(files(tmp_path)) == ["v.mp4", "v.png"], "no deltas from half a warm-up"
    assert signal.getsignal(which) is before


def test_the_demo_command_says_one_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its last step, which takes a minute, has tests of its own."""
    monkeypatch.setattr(cli, "_profile", lambda *_: {"reports": []})
    document = command("demo", "-o", tmp_path / "new" / "out", "--frames", 3, "--json", "--threads", 1).document
    assert [run["absorption"]["policy"] for run in document["runs"].values()] == ["full", "absorb"]
    made = set(files(tmp_path / "new" / "out"))
    assert {"full.mp4", "full.png", "absorb.mp4", "absorb.png", "demo.json", "report.json", "report.md"} <= made
    (tmp_path / "file").write_text("")
    refused(command("demo", "-o", tmp_path / "file"), "cannot be made")


@pytest.mark.parametrize(
    ("flags", "said"), [(("--frames", 50), "nearest is 51"), (("--prompt", "a cat"), "no word the demo model knows")]
)
def test_the_demo_is_refused_before_it_quantises(tmp_path: Path, flags: tuple[str, object], said: str) -> None:
    refused(command("demo", "-o", tmp_path / "out", *flags), said)
    assert not files(tmp_path)


# -- flags reach the stream


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ((), {"options.ranking": "heldout", "options.ridge.relative": 1e-2, "options.intercept": True}),
        (("--preset", "paper"), {"options.ridge.absolute": 1e-3, "options.all_rows": True, "options.half_life": None}),
        (("--policy", "full"), {"absorption.policy": "full", "kv.percent": 100, "absorption.state": "full"}),
        (("--policy", "window", "--window", "6"), {"options.window": 6, "absorption.local_layers": []}),
        (("--policy", "sink-local"), {"absorption.policy": "sink-local", "delta_bytes": 0, "delta_modes": []}),
        (("--policy", "no-sink", "--ratio", "1"), {"absorption.policy": "no-sink", "kv.percent": 0}),
        (("--ratio", "0.25"), {"options.ratio": 0.25, "kv.percent": 100 * (1 - 0.25 * 11 / 12)}),
        (("--ratio", "0"), {"absorption.local_layers": [], "kv.percent": 100, "statistics_bytes": 0}),
        (("--layers", "3,1"), {"absorption.local_layers": [1, 3]}),
        (("--ranking", "epsilon"), {"options.ranking": "epsilon"}),
        (("--ranking", "random"), {"options.ranking": "random", "absorption.layers.0.score?": True}),
        (("--warmup", "9"), {"options.warmup": 9}),
        (("--last-pass-bits", "8"), {"options.wide_in_last_pass": 0}),
        ((), {"options.wide_in_last_pass": 16}),
        (("--recent-frames", "3"), {"options.recent_frames": 3, "kv.percent": 100 * (1 - 0.5 * 8 / 12)}),
        (("--ridge-absolute", "0.5"), {"options.ridge.absolute": 0.5, "options.ridge.relative": 0}),
        (("--ridge-relative", "0.5"), {"options.ridge.absolute": 0, "options.ridge.relative": 0.5}),
        (("--ahead", "0"), {"options.ahead": 0, "options.half_life": 3.0}),
        (("--delta", "side"), {"delta_modes": ["side"]}),
        (("--delta", "fold"), {"delta_modes": ["fold"]}),
        (("--delta", "requant"), {"delta_modes": ["requant"]}),
        (("--attention", "reference"), {"options.attention": "reference"}),
        (("--dtype", "bfloat16"), {"options.dtype": "bfloat16"}),
        (("--infinity",), {"options.rope": "window"}),
        (("--sink", "3"), {"options.sink_frames": 3}),
        (("--stats-device", "cpu", "--device", "cpu"), {"options.device": "cpu"}),
        (("--seed", "-7"), {"seed": -7}),
    ],
)
def test_flags_reach_the_stream(tiny: Path, flags: tuple[str, ...], expected: dict[str, Any]) -> None:
    document = stream(tiny, *flags).document
    for path, value in expected.items():
        found = document
        for part in path.removesuffix("?").split("."):
            found = found[int(part)] if isinstance(found, list) else found[part]
        if not path.endswith("?"):
            assert found == (pytest.approx(value) if isinstance(value, float) else value), path


@pytest.mark.parametrize("flags", [(), ("--delta-rank", "4"), ("--kv-dtype", "int8", "--policy", "full")])
def test_every_field_of_a_run_is_documented_and_real(tiny: Path, flags: tuple[str, ...]) -> None:
    document = stream(tiny, *flags).document
    del document["audit"]  # its fields are those of a report
    assert not undocumented(document, "`run --json`")
    assert unreal(document, "`run --json`") == {"audit[]"}


# -- how the work is launched


def _latents(bundle: Path, path: Path, *flags: str, frames: int = 18) -> tuple[Tensor, dict[str, Any]]:
    """Latents (1, F, C, H, W) of a run, and its document."""
    document = stream(bundle, *flags, "--latents", path, frames=frames).document
    return load_file(path)["latents"], document


def test_decoding_while_the_next_chunk_is_generated_gives_the_same_files(demo: Path, tmp_path: Path) -> None:
    made = {}
    for name, flags in {"in turn": (), "overlapped": ("--overlap-decode",)}.items():
        folder = tmp_path / name
        folder.mkdir()
        outputs = ("--out", str(folder / "v.mp4"), "--sheet", str(folder / "s.png"))
        _, document = _latents(demo, folder / "l.safetensors", *flags, *outputs, frames=9)
        assert document["complete"]
        made[name] = files(folder)
    assert made["in turn"] == made["overlapped"]
    assert set(made["in turn"]) == {"v.mp4", "s.png", "l.safetensors"}


def test_a_spread_solve_switches_a_chunk_later(tiny: Path, tmp_path: Path) -> None:
    once, first = _latents(tiny, tmp_path / "o.safetensors")
    later, second = _latents(tiny, tmp_path / "s.safetensors", "--spread-solve", "2")
    assert torch.equal(once[:, :12], later[:, :12])
    assert not torch.equal(once[:, 12:15], later[:, 12:15])
    shrunk = [[held < kv["full_bytes"] for held in kv["per_chunk_bytes"]] for kv in (first["kv"], second["kv"])]
    assert shrunk == [[False] * 4 + [True] * 2, [False] * 5 + [True]]
    assert first["absorption"]["local_layers"] == second["absorption"]["local_layers"]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("gcc") is None, reason="no C compiler")
def test_compiled_layers_give_the_same_video(floating: Path, tmp_path: Path) -> None:
    eager, plain = _latents(floating, tmp_path / "e.safetensors", "--policy", "full")
    compiled, document = _latents(floating, tmp_path / "c.safetensors", "--policy", "full", "--compile")
    assert plain["compiled"] is None
    assert document["compiled"].startswith("layers compiled with inductor")
    torch.testing.assert_close(compiled, eager, rtol=1e-3, atol=1e-3)


def test_a_later_prompt_restarts_the_warm_up(tiny: Path) -> None:
    document = stream(tiny, "--at", "15:another", frames=30).document
    full = document["kv"]["full_bytes"]
    absorbed = [held < full for held in document["kv"]["per_chunk_bytes"]]
    assert absorbed == [False] * 4 + [True] + [False] * 4 + [True]
    assert document["absorption"]["state"] == "absorbed"


def test_another_process_gives_the_same_latents_and_another_seed_others(tiny: Path, tmp_path: Path) -> None:
    arguments = ["run", str(tiny), "--frames", "15", "--json", "--latents", str(tmp_path / "b.safetensors"), *RUN]
    done = subprocess.run(
        [sys.executable, "-m", "cli", *arguments], cwd=ROOT, capture_output=True, text=True, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    json.loads(done.stdout)
    latents = {}
    for name, seed in {"a": 0, "c": 1, "d": -1}.items():
        assert stream(tiny, "--latents", tmp_path / f"{name}.safetensors", "--seed", seed).code == 0
        latents[name] = load_file(tmp_path / f"{name}.safetensors")["latents"]
    assert torch.equal(latents["a"], load_file(tmp_path / "b.safetensors")["latents"])
    assert not torch.equal(latents["a"], latents["c"])
    assert not torch.equal(latents["c"], latents["d"])


def test_models_and_version() -> None:
    assert command("--version").out == f"ispa-deploy {__version__}\n"
    rows = command("models", "--json").document
    assert [row["name"] for row in rows] == list(SPECS)
    assert [rows[0]["bytes"][name]["weights"] // 10**6 for name in ("full", "ispa-0.5+w8a8")] == [2837, 1450]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "80")
        listed = command("models").out
    table = listed.split("layers x width")[0]
    assert all(name in table for name in SPECS), "whole names, to be copied"
    assert len(table.splitlines()) == 4 + len(SPECS), "one line each"
    overview = command().out
    assert "quantize" in overview, "no arguments: the help"
    assert "..." not in overview.split("Commands:")[1], "every command in a whole sentence"


def test_a_plans_table_cuts_no_heading_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    table = command("plan", "--model", "longlive-1.3b", "--gpu", "H100").out.split("Rates:")[0]
    assert "…" not in table
    assert table.count("w8a8") == 3


def test_on_a_terminal_a_bar_shows_chunk_speed_bytes_and_state(tiny: Path) -> None:
    main_end, child_end = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120", "OMP_NUM_THREADS": "1"}
    arguments = ["run", str(tiny), "--frames", "15", "--json", *RUN]
    with subprocess.Popen(
        [sys.executable, "-m", "cli", *arguments], cwd=ROOT, stderr=child_end, stdout=subprocess.PIPE, env=environment
    ) as process:
        os.close(child_end)
        shown = b""
        with contextlib.suppress(OSError):  # Linux ends a terminal that nobody holds open with EIO
            while part := os.read(main_end, 65536):
                shown += part
        assert process.stdout is not None
        json.loads(process.stdout.read())
    os.close(main_end)
    text = shown.decode()
    for word in ("5/5", " FPS ", "ETA 0 s", "KV 0.1 MiB", "absorbed (2/4)"):
        assert word in text, text


# -- bad input

BAD_RUNS: list[tuple[tuple[str, ...], tuple[str, ...]]] = [
    (("--policy", "sparse"), ("policy 'sparse'", "absorb, full")),
    (("--preset", "best"), ("preset 'best'", "paper, tuned")),
    (("--ranking", "luck"), ("ranking 'luck'", "epsilon")),
    (("--delta", "merge"), ("delta mode 'merge'", "requant")),
    (("--dtype", "int4"), ("dtype 'int4'", "bfloat16")),
    (("--device", "tpu"), ("device 'tpu'", "cuda:N")),
    (("--device", "meta"), ("device 'meta'", "cuda:N")),
    (("--stats-device", "disk"), ("device 'disk'", "cuda:N")),
    (("--attention", "sage"), ("attention backend 'sage'", "reference")),
    (("--attention", "flash-attn-2"), ("flash-attn-2", "use 'auto'")),
    (("--ratio", "1.5"), ("ratio 1.5", "between 0 and 1")),
    (("--ratio", "nan"), ("ratio nan",)),
    (("--ratio", "half"), ("--ratio", "run --help")),
    (("--warmup", "6"), ("warm-up of 6", "at least 9")),
    (("--warmup", "10"), ("warm-up of 10", "whole chunks")),
    (("--frames", "20"), ("20 frames", "multiple of 3", "nearest is 21")),
    (("--frames", "0"), ("--frames", "run --help")),
    (("--recent-frames", "2"), ("2", "recent")),
    (("--recent-frames", "-3"), ("-3", "recent")),
    (("--recent-frames", "12"), ("12", "recent")),
    (("--ridge-absolute", "1", "--ridge-relative", "1"), ("--ridge-absolute and --ridge-relative",)),
    (("--ridge-absolute", "-1"), ("--ridge-absolute -1.0", "0 or more")),
    (("--ridge-relative", "nan"), ("--ridge-relative nan",)),
    (("--layers", "1,9"), ("[9]", "0 to 3")),
    (("--layers", "-1"), ("[-1]", "0 to 3")),
    (("--layers", "1,1"), ("(1, 1)", "once")),
    (("--layers", "first"), ("--layers 'first'", "0,3,7")),
    (("--layers", ""), ("--layers ''", "0,3,7")),
    (("--at", "soon"), ("--at 'soon'", "FRAME:PROMPT")),
    (("--at", "²:red"), ("--at '²:red'", "FRAME:PROMPT")),
    (("--at", "99:red"), ("--at '99:red'", "--frames 15")),
    (("--window", "6"), ("--window", "--policy window")),
    (("--window", "2", "--policy", "window"), ("window 2",)),
    (("--out", "v.mp4"), ("no decoder", "--latents")),
    (("--out", "."), ("video '.'", "expected '.mp4'")),
    (("--latents", f"{'n' * 240}.safetensors"), ("File name too long", "another name")),
    (("--latents", "l.pt"), ("'.pt'", "'.safetensors'")),
    (("--latents", "missing/l.safetensors"), ("does not exist", "create")),
    (("--latents", "/proc/l.safetensors"), ("not writable", "choose another")),
    (("--stats", "missing/s.json"), ("does not exist", "create")),
    (("--save-deltas", "missing/d.safetensors"), ("does not exist", "create")),
    (("--save-deltas", "d.safetensors", "--policy", "full"), ("--policy full", "absorbs")),
    (("--save-deltas", "d.safetensors", "--frames", "9"), ("warm-up of 12", "--frames")),
    (("--save-deltas", "d.safetensors", "--at", "6:red"), ("warm-up of 12", "--frames")),
    (("--save-deltas", "kept.safetensors"), ("kept.safetensors", "two names")),
    (("--deltas", "none.safetensors"), ("'none.safetensors'", "does not exist")),
    (("--prompt-embeds", "none.safetensors"), ("'none.safetensors'", "does not exist")),
    (("--seed", "99999999999"), ("--seed", "4294967296")),
    (("--frames", "1026"), ("1026 frames", "1024 absolute positions", "--infinity")),
    (("--spread-solve", "-1"), ("--spread-solve", "run --help")),
    (("--cuda-graphs", "--device", "cpu"), ("--cuda-graphs on cpu", "expected a CUDA device")),
    (("--sink", "-1"), ("--sink -1", "0 or more")),
    (("--sink", "10"), ("window 12", "sink 10")),
    (("--sink-dtype", "int4"), ("sink dtype 'int4'", "float32")),
    (("--audio", "a.wav"), ("--audio 'a.wav'", "--out")),
    (("--nonsense",), ("--nonsense", "run --help")),
]


@pytest.mark.parametrize(("flags", "parts"), BAD_RUNS, ids=[" ".join(flags) for flags, _ in BAD_RUNS])
def test_a_bad_flag_is_one_line_and_leaves_no_file(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...], parts: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    refused(command("run", tiny, "--frames", 15, "--latents", "kept.safetensors", "--json", *RUN, *flags), *parts)
    assert not files(tmp_path)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--ratio", "1.5"), "ratio 1.5"),
        (("--warmup", "4"), "warm-up of 4"),
        (("--frames", "14"), "nearest is 15"),
        (("--at", "14:late"), "last chunk begins at frame 12"),
        (("--layers", "1,9"), "0 to 3"),
        (("--kv-dtype", "int4"), "int4"),
        (("--per-step",), "expected a speech-to-video model"),
    ],
)
def test_options_are_refused_before_anything_is_loaded(
    tiny: Path, tmp_path: Path, flags: tuple[str, ...], said: str
) -> None:
    """The manifest is enough: the weights, and encoders that do not exist, would be told next."""
    shutil.copytree(tiny, tmp_path / "b")
    (tmp_path / "b" / SHARD).unlink()
    around = ("--text-encoder", "nowhere", "--vae", "nowhere")
    refused(command("run", tmp_path / "b", "--frames", 15, "--json", *RUN, *around, *flags), said)
    refused(command("run", tmp_path / "b", "--frames", 15, "--json", *RUN, *around), "is missing: the bundle lists it")


def test_a_run_that_keeps_nothing_says_so(tiny: Path, tmp_path: Path) -> None:
    bare = ("run", tiny, "--frames", 3, *RUN, "--policy", "full")
    assert command(*bare).err == "note: nothing of this run is kept: name --out VIDEO.mp4 or --latents FILE\n"
    for flags in (("--json",), ("--stats", tmp_path / "s.json"), ("--latents", tmp_path / "l.safetensors")):
        assert command(*bare, *flags).err == ""


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there(tiny: Path) -> None:
    refused(stream(tiny, "--device", "cuda"), "device 'cuda'", "no GPU", "--device cpu")


def test_requant_needs_a_quantised_layer(floating: Path, tmp_path: Path) -> None:
    done = stream(floating, "--delta", "requant", "--latents", tmp_path / "l.safetensors")
    refused(done, "'requant'", "side or fold")
    assert not files(tmp_path)


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (("--prompt", "a dragon"), ("'a dragon'", "red")),
        (("--at", "6:"), ("no word the demo model knows",)),
        (("--out", "v.avi"), ("'.avi'", "'.mp4'")),
        (("--out", "missing/v.mp4"), ("create 'missing'",)),
        (("--out", "/proc/v.mp4"), ("not writable",)),
        (("--out", "v.mp4", "--sheet", "s.jpg"), ("'.jpg'", "'.png'")),
    ],
)
def test_bad_flags_on_the_embedded_model(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...], parts: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    refused(stream(demo, *flags), *parts)
    assert not files(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("demo", "--scheme", "w4a4"), ("scheme 'w4a4'", "w8a8")),
        (("random", "--model", "sora"), ("'sora'", "longlive-1.3b")),
        (("random",), ("--model", "longlive-1.3b")),
        (("demo", "--model", "krea-14b"), ("krea-14b", "demo")),
        (("none.safetensors",), ("none.safetensors",)),
        (("demo", "--dtype", "int8"), ("dtype 'int8'", "bfloat16")),
        (("demo", "--skip", "("), ("'('",)),
        (("demo", "--lora", "none.safetensors"), ("none.safetensors",)),
    ],
)
def test_quantise_refuses_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], parts: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    done = command("quantize", *arguments, "-o", "bundle", "--json")
    last = done.err.splitlines()[-1] + "\n"  # the chosen scheme is told before
    refused(replace(done, err=last), *parts)
    assert not list(tmp_path.iterdir())


def test_quantise_calibrates_smooths_and_reports(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a fast red ring over teal waves\n")
    done = command(
        "quantize", "demo", "-o", tmp_path / "b", "--scheme", "w8a8-int8-static", "--calibrate",
        tmp_path / "prompts.txt", "--calibrate-frames", 3, "--smooth", "fold", "--report", "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    document = json.loads(done.out)
    assert document["calibration"]["prompts"] == 1
    assert document["calibration"]["smooth"] == "fold"
    assert document["one_step"]["model"]["chunks"][0]["cosine"] > 0.995
    assert len(document["one_step"]["layers"]) == 100
    for shown in ("calibrated on 1 prompts of 3 frames", "one step against float32", "worst layers"):
        assert shown in done.err
    again = command("quantize", "demo", "-o", tmp_path / "c", "--calibrate-frames", 3, "--json")
    assert again.code == 2
    assert "--calibrate-frames with nothing to calibrate" in again.err


def test_quantise_never_replaces_what_is_no_bundle(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    for flags in ((), ("--overwrite",)):
        done = command("quantize", "demo", "-o", tmp_path / "mine", *flags)
        assert done.code == 2
        assert "is no bundle" in done.err.splitlines()[-1]
    assert files(tmp_path) == {"mine/thesis.txt": b"years of work"}
    done = command("quantize", "demo", "-o", tiny)
    assert done.code == 2
    assert "exists" in done.err.splitlines()[-1]


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), MemoryError("8 GiB"), OSError(28, "No space left on device")])
def test_a_quantise_that_is_cut_short_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException
) -> None:
    def fail(path: Path, *_: Any) -> None:
        path.write_bytes(b"half")
        raise failure

    monkeypatch.setattr(export.write, "write_tensors", fail)
    done = command("quantize", "demo", "-o", tmp_path / "bundle", "--json")
    assert done.code == (130 if isinstance(failure, KeyboardInterrupt) else 1)
    assert done.out == ""
    said = {KeyboardInterrupt: "interrupted", MemoryError: "out of memory (8 GiB)", OSError: "No space left on device"}
    assert said[type(failure)] in done.err.splitlines()[-1]
    assert not list(tmp_path.iterdir())


# -- damaged bundles and deltas


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Change a bundle's tensors and mend its digests, as somebody else's writer would."""
    tensors = load_file(folder / SHARD)
    change(tensors)
    save_file(tensors, folder / SHARD, {"format": "pt"})
    manifest = json.loads((folder / MANIFEST).read_text())
    digest = file_digest(folder / SHARD)
    manifest["files"][SHARD] = {"sha256": digest.sha256, "bytes": digest.bytes}
    (folder / MANIFEST).write_text(json.dumps(manifest))


def plant(name: str, value: float) -> Callable[[Path], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[name].view(-1)[3] = value

    return lambda folder: rewrite(folder, change)


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-100] ^= 1
    path.write_bytes(raw)


def with_field(name: str, value: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / MANIFEST
        path.write_text(json.dumps({**json.loads(path.read_text()), name: value}))

    return change


@pytest.mark.parametrize(
    ("damage", "parts"),
    [
        (shutil.rmtree, ("is no bundle", "quantize")),
        (lambda folder: (folder / MANIFEST).unlink(), ("is no bundle", "quantize")),
        (lambda folder: (folder / MANIFEST).write_text("{"), ("is not JSON",)),
        (lambda folder: (folder / "config.json").unlink(), ("config.json' is missing", "copy it again")),
        (lambda folder: (folder / SHARD).unlink(), ("is missing", "copy it again")),
        (lambda folder: os.truncate(folder / SHARD, 5000), ("5000 bytes", "copy it again")),
        (lambda folder: flip(folder / SHARD), ("sha256", "copy it again")),
        (with_field("schema_version", 99), ("schema_version 99", "upgrade")),
        (with_field("scheme", "w2a2"), ("scheme 'w2a2'", "w8a8-int8")),
        (plant("head.head.weight", float("nan")), ("head.head.weight", "1 NaN or Inf")),
        (plant("blocks.1.self_attn.o.weight_scale", float("inf")), ("blocks.1.self_attn.o.weight_scale", "NaN or Inf")),
        (lambda folder: rewrite(folder, lambda t: t.pop("head.head.bias")), ("head.head.bias", "missing")),
    ],
)
def test_a_damaged_bundle_is_refused_by_name(
    tiny: Path, tmp_path: Path, damage: Callable[[Path], Any], parts: tuple[str, ...]
) -> None:
    shutil.copytree(tiny, tmp_path / "bundle")
    damage(tmp_path / "bundle")
    before = files(tmp_path)
    refused(stream(tmp_path / "bundle", "--latents", tmp_path / "l.safetensors"), *parts)
    assert files(tmp_path) == before


def test_deltas_are_for_one_bundle_and_whole(tiny: Path, floating: Path, tmp_path: Path) -> None:
    stored = tmp_path / "d.safetensors"
    assert stream(tiny, "--save-deltas", stored).code == 0
    refused(stream(floating, "--deltas", stored), str(stored), "one base only")
    refused(stream(tiny, "--deltas", stored, "--policy", "no-sink"), "--policy absorb")
    refused(stream(tiny, "--deltas", stored, "--recent-frames", "3"), "--recent-frames 0")
    cut, foreign = tmp_path / "cut.safetensors", tmp_path / "foreign.safetensors"
    cut.write_bytes(stored.read_bytes()[:-40])
    refused(stream(tiny, "--deltas", cut), str(cut), "again")
    save_file({"x": torch.zeros(1)}, foreign, {"format": "pt"})
    refused(stream(tiny, "--deltas", foreign), str(foreign), "--save-deltas")
    save_file({"x": torch.zeros(1)}, foreign, {HEADER_KEY: "{"})
    refused(stream(tiny, "--deltas", foreign), str(foreign), "damaged")


# -- runs that fail


def test_activations_that_overflow_end_the_run_in_one_line(floating: Path, tmp_path: Path) -> None:
    """Every weight is finite: it is the product that is not."""
    shutil.copytree(floating, tmp_path / "bundle")
    rewrite(tmp_path / "bundle", lambda tensors: tensors["head.head.weight"].fill_(3e38))
    before = files(tmp_path)
    done = stream(tmp_path / "bundle", "--latents", tmp_path / "l.safetensors")
    refused(done, "chunk 1 of 5", "NaN or Inf", "--dtype float32", code=1)
    assert files(tmp_path) == before


@pytest.mark.parametrize(
    "failure",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ],
)
def test_out_of_memory_says_what_would_fit(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: Exception
) -> None:
    denoise = Sampler.denoise

    def fail(self: Sampler, chunk: int, *rest: Any) -> Tensor:
        if chunk == 2:
            raise failure
        return denoise(self, chunk, *rest)

    monkeypatch.setattr(Sampler, "denoise", fail)
    done = stream(tiny, "--latents", tmp_path / "l.safetensors")
    refused(
        done, "out of memory in chunk 3 of 5 (warm-up)", "this stream needs about", "statistics", "would fit",
        "--policy window --window 4 (", "--ratio 1 ", "--stats-device cpu (", "--kv-dtype int8 (", "--height", code=1,
    )  # fmt: skip
    assert not files(tmp_path)


def test_weights_that_do_not_fit_say_what_would(floating: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(export.bundle, "_tensor", fail)
    parts = ("out of memory while the weights are loaded: this stream needs about", "quantize --scheme w8a8 (")
    refused(stream(floating), *parts, code=1)


FULL_DISK = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (600, resource.RLIM_INFINITY))
import cli
cli.main()
"""


def on_a_full_disk(*arguments: object) -> Result:
    """The CLI in a process of its own, where no file may grow beyond 600 bytes: the writer's own calls fail.

    Not in this process: what pytest itself writes, to a log perhaps, would fail as well.
    """
    command = [sys.executable, "-B", "-c", FULL_DISK, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return Result(done.returncode, done.stdout, done.stderr)


@pytest.mark.parametrize(("flag", "name"), [("--out", "v.mp4"), ("--latents", "l.safetensors"), ("--sheet", "s.png")])
def test_a_full_disk_is_one_line_and_no_file(demo: Path, tmp_path: Path, flag: str, name: str) -> None:
    done = on_a_full_disk("run", demo, "--frames", 3, "--json", *RUN, flag, tmp_path / name, "--policy", "full")
    refused(done, name, "could not be written", code=1)
    assert not files(tmp_path)


def test_a_full_disk_under_deltas_and_bundles(tiny: Path, tmp_path: Path) -> None:
    deltas = tmp_path / "d.safetensors"
    done = on_a_full_disk("run", tiny, "--frames", 15, "--json", *RUN, "--save-deltas", deltas)
    refused(done, "could not write deltas", code=1)
    done = on_a_full_disk("quantize", "demo", "-o", tmp_path / "bundle", "--json")
    assert (done.code, done.out) == (1, "")
    assert "could not write bundle" in done.err.splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_help_lists_every_flag_of_run_under_its_group() -> None:
    shown = command("run", "--help").out
    titles = [line[:-1] for line in shown.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert titles[:3] == ["Arguments", "What the video shows", "Networks around the model"]
    assert {"Absorption", "Cache and attention", "Files", "Machine"} < set(titles)
    absorption = shown.split("\nAbsorption:\n")[1].split("\n\n")[0]
    assert "--ratio" in absorption
    assert "--infinity" not in absorption
    assert shown.count("--kv-dtype") == 1
