"""Trim recorded upstream runs to what `tests/data` ships: `ISPA_PARITY_DIR=DIR python -m tests.make_fixtures`.

A stream is causal, so its first chunks are a recording of their own. Kept: weights, prompt, noise, every renoise draw,
the output, three velocities, the sampler's table, the last chunk's caches where the run was not cut short. Dropped:
activations, inputs of single calls (the free-running replay makes them), snapshots. fp32, nothing is recomputed: the
same input gives the same bytes. One exception: LiveAvatar's convolutions over the frames before the stream, which show
a still image, are summed over time, since a third of the recording would be theirs.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save
from torch import Tensor

DATA = Path(__file__).parent / "data"
# One run of each kind of memory, cut after the chunk behind the first that rolls the window.
CHUNKS = {
    "longlive_tiny": 5,
    "longlive_infinity_tiny": 5,
    "reward_forcing_alpha_tiny": 5,
    "self_forcing_i2v_tiny": 2,
}
AVATAR, AVATAR_CHUNKS = "liveavatar_tiny", 4

KREA = "krea_tiny"


def trim(fields: dict[str, Any], tensors: dict[str, Tensor], chunks: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Description and tensors of the first `chunks` chunks."""
    calls = [call for call in fields["calls"] if call["block"] < chunks]
    whole = len(calls) == len(fields["calls"])
    end = calls[-1]["start_frame"] + calls[-1]["num_frames"]
    given = tensors["input/initial_latent"].shape[1] if "input/initial_latent" in tensors else 0
    kept = {name: t for name, t in tensors.items() if name.startswith(("weights/", "input/", "scheduler/"))}
    kept["input/noise"] = tensors["input/noise"][:, : end - given]
    kept["output/latents"] = tensors["output/latents"][:, :end]
    for call in calls:
        name = f"call{call['index']:03d}/eps"
        if name in tensors:
            kept[name] = tensors[name]
    for call in (calls[0], calls[-5], calls[-1]):
        name = f"call{call['index']:03d}/flow_pred"
        kept[name] = tensors[name]
    if whole:
        filled = calls[-1]["local_end_tokens"]
        kept |= {name: t[:, :filled] for name, t in tensors.items() if name.startswith("final_kv/")}
    about = {key: fields[key] for key in ("config", "upstream_commit", "derived", "torch")}
    return {**about, "calls": calls}, {name: t.contiguous() for name, t in sorted(kept.items())}


def trim_krea(fields: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The server's loop past its first sliding context and prompt switch, and a context of two chunks on its own."""
    calls = [call for call in fields["calls"] if call["scenario"] == "server_k3" and call["block"] < 4]
    chunk = len(tensors["server_k3/timestep_list"]) - 1
    kept = {name: t for name, t in tensors.items() if name.startswith(("weights/", "server_k3/prompt/"))}
    kept["server_k3/initial_noise"] = tensors["server_k3/initial_noise"][:, :12]
    names = ["timestep_list", "block3/latents", "reencoded_first_frame/block2", "reencoded_first_frame/block3"]
    names += [f"draw/{number:03d}" for number in range(1, 1 + 4 * chunk)]
    kept |= {name: tensors[name] for name in (f"server_k3/{name}" for name in names)}
    pair = [call for call in fields["calls"] if call["scenario"] == "server_k6_keep" and call["call"] in (9, 10)]
    names = ["timestep_list", "prompt/0"]
    names += [f"call{call['call']:03d}/{which}" for call in pair for which in ("x", "timestep", "flow_pred")]
    kept |= {name: tensors[name] for name in (f"server_k6_keep/{name}" for name in names)}
    scenarios = [scenario for scenario in fields["scenarios"] if scenario["name"] in ("server_k3", "server_k6_keep")]
    about = {key: fields[key] for key in ("what", "upstream", "torch", "model_config", "latent_hw")}
    tidy = {name: t.contiguous() for name, t in sorted(kept.items())}
    return {**about, "scenarios": scenarios, "calls": calls + pair}, tidy


def trim_avatar(fields: dict[str, Any], tensors: dict[str, Tensor], chunks: int) -> tuple[dict[str, Any], Any]:
    """Description and tensors of the first `chunks` chunks of the first scenario, which shows a still image."""
    scenario = dict(fields["scenarios"][0])
    name, per_clip = scenario["name"], scenario["blocks_per_clip"]
    still = tensors[f"{name}/input/motion_latents/0"]
    assert bool((still == tensors[f"{name}/input/ref_latents/0"]).all())
    tokens = chunks * scenario["num_frame_per_block"] * scenario["tokens_per_latent_frame"]
    calls = [call for call in fields["calls"] if call["scenario"] == name and call["current_start"] < tokens]
    scenario["clips"] = -(-chunks // per_clip)
    wanted = {value for call in calls for value in call["inputs"].values() if "motion" not in value}
    wanted |= {f"{name}/timesteps"} | {f"{name}/block{chunk}/latents" for chunk in range(chunks)}
    wanted |= {f"{name}/clip{clip}/noise" for clip in range(scenario["clips"])}
    kept = {key: t for key, t in tensors.items() if key in wanted or key.startswith("weights/")}
    for key in ("proj_2x", "proj_4x"):
        kept[f"weights/frame_packer.{key}.weight"] = kept[f"weights/frame_packer.{key}.weight"].sum(2, keepdim=True)
    about = {key: fields[key] for key in ("what", "upstream", "model_config", "torch")}
    return {**about, "scenarios": [scenario], "calls": calls}, {key: t.contiguous() for key, t in sorted(kept.items())}


def main() -> None:
    source = Path(os.environ["ISPA_PARITY_DIR"])
    DATA.mkdir(exist_ok=True)
    for name, chunks in CHUNKS.items():
        _write(name, *trim(*_read(source, name), chunks))
    _write(KREA, *trim_krea(*_read(source, KREA)))
    _write(AVATAR, *trim_avatar(*_read(source, AVATAR), AVATAR_CHUNKS))


def _read(source: Path, name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    return json.loads((source / f"{name}.json").read_text()), load_file(source / f"{name}.safetensors")


def _write(name: str, fields: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    (DATA / f"{name}.safetensors").write_bytes(save(tensors))
    (DATA / f"{name}.json").write_text(json.dumps(fields, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
