"""Replay of recorded LiveAvatar runs, for `python -m tests.parity`.

A fixture holds scenarios, each a list of calls on recorded inputs, of which some are whole loops from recorded noise.
Both are replayed with upstream's 16-bit table of rotations, to 1e-5, and with the exact one, to 1e-3 (keys 2e-3). The
calls of all scenarios but the prefills carry the reference's drawn distance. The latents that a VAE made between two
clips are fed as given.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ispa_deploy.absorb.absorber import Absorber
from ispa_deploy.avatar.cache import AvatarCache
from ispa_deploy.avatar.model import CausalS2V, Guidance
from ispa_deploy.avatar.stream import AvatarStream, Scene
from ispa_deploy.errors import InputError
from ispa_deploy.policies.full import FULL
from ispa_deploy.sampler import Sampler
from ispa_deploy.specs import ModelSpec

TABLES = {"fp16 table": True, "exact table": False}
TOLERANCES = {"fp16 table": 1e-5, "exact table": 1e-3, "exact table key": 2e-3}
"""By the longest prefix of a kind's name."""

Tensors = dict[str, Tensor]
Call = dict[str, Any]


@dataclass(frozen=True)
class AvatarFixture:
    """One recording: the model's configuration, scenarios, calls in order, tensors by name."""

    name: str
    config: dict[str, Any]
    scenarios: list[dict[str, Any]]
    calls: list[Call]
    tensors: Tensors

    @staticmethod
    def load(path: Path) -> AvatarFixture:
        """InputError where the tensors are missing or damaged."""
        fields = json.loads(path.with_suffix(".json").read_text())
        try:
            tensors = load_file(path)
        except (OSError, SafetensorError) as error:
            raise InputError(f"{path}: damaged fixture ({error}); record it again") from None
        return AvatarFixture(path.stem, fields["model_config"], fields["scenarios"], fields["calls"], tensors)

    def spec(self, scenario: dict[str, Any]) -> ModelSpec:
        """Our description of the recorded model in one scenario."""
        config = self.config
        prefix = f"{scenario['name']}/"
        height, width = self.tensors[f"{prefix}input/ref_latents/0"].shape[-2:]
        weights = "weights/casual_audio_encoder.weights"
        return ModelSpec(
            name=self.name,
            dim=config["dim"],
            ffn_dim=config["ffn_dim"],
            heads=config["num_heads"],
            layers=config["num_layers"],
            freq_dim=config["freq_dim"],
            text_dim=config["text_dim"],
            text_len=config["text_len"],
            latent_channels=config["in_dim"],
            latent_height=height,
            latent_width=width,
            patch=tuple(config["patch_size"]),
            eps=config["eps"],
            chunk_frames=scenario.get("num_frame_per_block", 3),
            window_frames=scenario["kv_cache_frames"],
            sink_frames=0,
            sampling="euler",
            steps=tuple(range(scenario.get("denoising_steps", 4))),
            shift=3.0,
            fps=25,
            max_frames=45_000,
            audio_blocks=tuple(config["audio_inject_layers"]),
            audio_states=self.tensors[weights].shape[1],
            audio_dim=config["audio_dim"],
            audio_tokens=config["num_audio_token"],
        )

    def model(self, spec: ModelSpec) -> CausalS2V:
        model = CausalS2V(spec)
        weights = {n.removeprefix("weights/"): t for n, t in self.tensors.items() if n.startswith("weights/")}
        for name, own in model.state_dict().items():
            if own.dim() == 5 and weights[name].shape[2] < own.shape[2]:  # a shipped one, for a still image
                weights[name] = nn.functional.pad(weights[name], (0, 0, 0, 0, 0, own.shape[2] - weights[name].shape[2]))
        model.load_state_dict(weights)
        return model.eval()

    def of_scenario(self, name: str) -> list[Call]:
        return [call for call in self.calls if call["scenario"] == name]

    def recorded(self, call: Call) -> Tensors:
        prefix = f"{call['scenario']}/call{call['call']:03d}/"
        return {name[len(prefix) :]: t for name, t in self.tensors.items() if name.startswith(prefix)}

    def given(self, call: Call, name: str) -> Tensor | None:
        return self.tensors.get(call["inputs"].get(name, ""))

    def needed(self, call: Call, name: str) -> Tensor:
        found = self.given(call, name)
        assert found is not None, f"call {call['call']} of {call['scenario']} has no {name}"
        return found

    def text_rows(self, call: Call) -> Tensor:
        rows = self.needed(call, "context")
        return nn.functional.pad(rows, (0, 0, 0, self.config["text_len"] - len(rows)))[None]


def recognises(path: Path) -> bool:
    """Whether a fixture was recorded from LiveAvatar's code."""
    try:
        fields = json.loads(path.with_suffix(".json").read_text())
    except (OSError, json.JSONDecodeError):
        return False
    return isinstance(fields, dict) and fields.get("model_config", {}).get("model_type") == "s2v"


def replay(path: Path, worst: Any) -> None:
    """Every scenario, with each table of rotations."""
    fixture = AvatarFixture.load(path)
    worst.tolerances = TOLERANCES
    for scenario in fixture.scenarios:
        spec = fixture.spec(scenario)
        model = fixture.model(spec)
        for label, half in TABLES.items():
            seen = _Labelled(worst, label)
            with torch.inference_mode():
                _replay_calls(fixture, scenario["name"], model, half, seen)
                if f"{scenario['name']}/clip0/noise" in fixture.tensors:
                    _free_run(fixture, scenario, model, half, seen)


class _Labelled:
    """A worst list for one table of rotations; keys have a tolerance of their own."""

    def __init__(self, worst: Any, label: str):
        self.worst, self.label = worst, label

    def see(self, kind: str, ours: Tensor, reference: Tensor) -> None:
        self.worst.see(f"{self.label} {kind}", ours, reference)


def _frames_first(latents: Tensor) -> Tensor:
    return latents.transpose(1, 2)


def _replay_calls(fixture: AvatarFixture, name: str, model: CausalS2V, half: bool, seen: _Labelled) -> None:
    calls = fixture.of_scenario(name)
    cache = AvatarCache(model.spec, half_table=half)
    steps = {ring: index for index, ring in enumerate(sorted({str(call["cache"]) for call in calls}))}
    start = None
    for call in calls:
        recorded = fixture.recorded(call)
        if "t" not in recorded or (not call["prefill"] and "x" not in recorded):
            continue  # a trimmed recording: the loop below makes these inputs
        text = model.encode_text(fixture.text_rows(call))
        condition = model.condition(recorded["t"].float())
        with _traced(model, recorded) as traces:
            if call["prefill"]:
                _prefill(fixture, call, model, text, cache)
            else:
                first = call["current_start"] // cache.frame_tokens
                if first != start:
                    start = first
                    cache.begin(start, recorded["x"].shape[1])
                cache.begin_pass(steps[str(call["cache"])], call["reference_distance"])
                x = _frames_first(recorded["x"][None])
                guidance = _guidance(fixture, call, model, recorded, seen)
                seen.see("out", _frames_first(model(x, condition, text, cache, guidance=guidance))[0], recorded["out"])
        for trace, ours in traces.items():
            seen.see("trace", ours.reshape(recorded[trace].shape), recorded[trace])
        _compare_caches(cache, recorded, seen)


def _prefill(fixture: AvatarFixture, call: Call, model: CausalS2V, text: Any, cache: AvatarCache) -> None:
    reference, motion = (_frames_first(fixture.needed(call, n)) for n in ("ref_latents", "motion_latents"))
    tokens = model.condition_tokens(reference, motion)
    assert tokens.shape[1] == call["cond_tokens"] == cache.condition_tokens
    with cache.condition():
        model.prefill(tokens, model.condition(torch.zeros(1, 1)), text, cache)


def _guidance(fixture: AvatarFixture, call: Call, model: CausalS2V, recorded: Tensors, seen: _Labelled) -> Guidance:
    mask, pose = fixture.given(call, "mask"), fixture.needed(call, "cond_states")
    states = fixture.needed(call, "audio_input")
    if "audio_emb" in recorded:
        local, heard = model.casual_audio_encoder(states)
        seen.see("audio", local, recorded["audio_emb"])
        seen.see("audio", heard, recorded["audio_emb_global"])
    return model.guide(states, None if mask is None else mask.flatten(2, 3), _frames_first(pose))


def _compare_caches(cache: AvatarCache, recorded: Tensors, seen: _Labelled) -> None:
    for name, reference in recorded.items():
        layer, _, what = name.removeprefix("layer").partition("/")
        if what in ("cond_k", "cond_v"):
            seen.see(_kind(what), cache.conditioned(int(layer))[what == "cond_v"], reference)
        if what in ("cache_k", "cache_v"):
            frames, keys, values = cache.temporal(int(layer))
            slots = [frame % cache.spec.window_frames for frame in frames]
            held = reference.unflatten(1, (cache.spec.window_frames, -1))[:, slots]
            seen.see(_kind(what), values if what == "cache_v" else keys, held)


def _kind(what: str) -> str:
    return "key" if what.endswith("_k") else "value"


@contextmanager
def _traced(model: CausalS2V, recorded: Tensors) -> Iterator[Tensors]:
    """Collect the activations that were recorded for this call."""
    found: Tensors = {}
    handles = []
    for name in recorded:
        head, _, what = name.partition("/")
        if what == "block_out":
            handles.append(model.blocks[int(head.removeprefix("layer"))].register_forward_hook(_keep(found, name)))
        elif what == "attn_before_o":
            block = model.layers()[int(head.removeprefix("layer"))]
            handles.append(block.self_attn.o.register_forward_pre_hook(_keep(found, name)))
        elif what == "audio_residual":
            injector = model.audio_injector.injector[int(head.removeprefix("injector"))]
            handles.append(injector.register_forward_hook(_keep(found, name)))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _keep(found: Tensors, name: str) -> Any:
    """A hook that keeps a module's output, or before its call, its input."""

    def hook(_: nn.Module, inputs: tuple[Tensor, ...], *output: Tensor) -> None:
        found[name] = output[0] if output else inputs[0]

    return hook


def _free_run(fixture: AvatarFixture, scenario: dict[str, Any], model: CausalS2V, half: bool, seen: _Labelled) -> None:
    """The whole loop from the recorded noise of each clip."""
    stream = open_recorded_avatar(fixture, scenario, model, half)
    if f"{scenario['name']}/timesteps" in fixture.tensors:
        times = torch.tensor(stream.sampler.schedule.timesteps)
        seen.see("timestep", times, fixture.tensors[f"{scenario['name']}/timesteps"])
    for chunk in stream:
        name = f"{scenario['name']}/block{chunk.index}/latents"
        if name in fixture.tensors:
            seen.see("free-running output", chunk.latents, _frames_first(fixture.tensors[name]))


def open_recorded_avatar(
    fixture: AvatarFixture, scenario: dict[str, Any], model: CausalS2V, half: bool
) -> AvatarStream:
    """The stream of a scenario: recorded noise, audio, pose, conditions and distances."""
    name, spec = scenario["name"], model.spec
    calls = fixture.of_scenario(name)
    prefills = [call for call in calls if call["prefill"]]
    chunks: dict[int, list[Call]] = {}
    for call in calls:
        if not call["prefill"]:
            chunks.setdefault(call["current_start"], []).append(call)
    first = [chunks[start][0] for start in sorted(chunks)]
    noise = torch.cat([fixture.tensors[f"{name}/clip{c}/noise"] for c in range(scenario["clips"])], 1)
    noise = _frames_first(noise[None])
    distances = {(i * spec.chunk_frames, s): call["reference_distance"]
                 for i, start in enumerate(sorted(chunks)) for s, call in enumerate(chunks[start])}  # fmt: skip
    scene = Scene(
        states=torch.cat([fixture.needed(call, "audio_input") for call in first], -1),
        reference=_frames_first(fixture.needed(prefills[0], "ref_latents")),
        motion=None if (motion := fixture.given(prefills[0], "motion_latents")) is None else _frames_first(motion),
        pose=_frames_first(torch.cat([fixture.needed(call, "cond_states") for call in first], 2)),
        moved=lambda _: _frames_first(fixture.needed(prefills[-1], "motion_latents")),
    )
    cache = AvatarCache(spec, half_table=half)
    return AvatarStream(
        model,
        cache,
        Absorber(targets=[block.self_attn.o for block in model.layers()], cache=cache, policy=FULL),
        fixture.text_rows(calls[0]),
        frames=len(first) * spec.chunk_frames,
        noise=lambda chunk, count, step: noise[:, chunk * count : (chunk + 1) * count],
        sampler=Sampler.of(spec),
        scene=scene,
        distance=lambda start, step: distances[start, step],
        online=scenario["online"],
    )
