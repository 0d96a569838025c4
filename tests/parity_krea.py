"""Replay of recorded Krea runs: several scenarios in one fixture, each call by call and free-running.

A scenario is a run of the server's loop (a context pass before every chunk but the first), of the rolling loop (a
window that evicts, a clean pass behind every chunk), or one context pass and one call under an attention bias.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ispa_deploy.absorb.absorber import Absorber
from ispa_deploy.cache import KVCache
from ispa_deploy.context import Context
from ispa_deploy.errors import InputError
from ispa_deploy.model import CausalWanDiT
from ispa_deploy.policies.full import FULL
from ispa_deploy.sampler import Sampler, Schedule, even_steps, sigma_table
from ispa_deploy.specs import ModelSpec
from ispa_deploy.stream import Stream

GLOBAL_FRAMES = 21  # the buffer of a loop without a window
# Recorded activation -> (module, whether its input or its output was recorded).
LAYER_TRACES = {"attn_before_o": ("self_attn.o", "in"), "out": ("", "out")}

Call = dict[str, Any]


class Judge(Protocol):
    def see(self, kind: str, ours: Tensor, reference: Tensor) -> None: ...


@dataclass(frozen=True)
class Run:
    """One scenario: its description, its calls in order, its tensors by name."""

    name: str
    config: dict[str, Any]
    geometry: ModelSpec
    calls: list[Call]
    tensors: dict[str, Tensor]

    @property
    def server(self) -> bool:
        return "kv_cache_num_frames" in self.config

    @property
    def noise(self) -> Tensor:
        return self.tensors["initial_noise"]

    @property
    def batch(self) -> int:
        return len(next(t for name, t in self.tensors.items() if name == "initial_noise" or name.endswith("/x")))

    def spec(self) -> ModelSpec:
        chunk = self.config["num_frame_per_block"]
        fields = {"chunk_frames": chunk, "max_frames": 1024}
        if self.server:
            window = self.config["kv_cache_num_frames"] + chunk
            return replace(self.geometry, window_frames=window, sink_frames=1, rope="window", reencodes=True, **fields)
        window = self.config["local_attn_size"]
        return replace(
            self.geometry,
            window_frames=GLOBAL_FRAMES if window == -1 else window,
            sink_frames=self.config["sink_size"],
            rolls=window != -1,
            context_timestep=float(self.config.get("context_noise", 0)),
            **fields,
        )

    def schedule(self) -> Schedule:
        """Recorded timesteps; x0 and fresh noise take the nearest level, each of its own table."""
        timesteps = self.tensors["timestep_list"].float()

        def nearest(shift: float) -> tuple[float, ...]:
            table = sigma_table(shift)
            return tuple(float(table[(table * 1000 - t).abs().argmin()]) for t in timesteps)

        asked, own = self.shifts
        return Schedule(tuple(timesteps.tolist()), nearest(own), nearest(asked) if asked != own else None)

    @property
    def shifts(self) -> tuple[float, float]:
        """Of the timesteps that were asked for, and of the levels that x0 is taken at."""
        own = self.config.get("x0_scheduler_shift", 5.0)
        return self.config.get("timestep_shift", own), own

    def planned(self) -> Schedule:
        """The same timesteps as our own sampler makes them."""
        if self.server:
            steps = even_steps(self.config["num_denoising_steps"], self.config.get("strength", 1.0))
        else:
            steps = tuple(self.config["denoising_step_list"])
        warped = Schedule.few_step(steps, self.shifts[0])
        return warped if self.config.get("warp", True) else Schedule(tuple(map(float, steps)), warped.sigmas)

    def blocks(self) -> list[list[Call]]:
        """Calls of every chunk."""
        grouped: dict[int, list[Call]] = {}
        for call in self.calls:
            grouped.setdefault(call["block"], []).append(call)
        return [grouped[block] for block in sorted(grouped)]

    def denoising(self, block: list[Call]) -> list[Call]:
        """Those that denoise: behind the context pass, before the clean one."""
        calls = [call for call in block if not call["uses_block_mask"]]
        return calls[: len(self.tensors["timestep_list"])]

    def of(self, call: Call) -> dict[str, Tensor]:
        prefix = f"call{call['call']:03d}/"
        return {name[len(prefix) :]: t for name, t in self.tensors.items() if name.startswith(prefix)}

    def rows(self, call: Call) -> Tensor:
        """(B, L, text_dim) of a call's prompt."""
        return self.tensors[call["prompt"].removeprefix(f"{self.name}/")].expand(self.batch, -1, -1)

    def draws(self) -> list[Tensor]:
        """Fresh noise in the order it was drawn, (B * F, C, H, W) each; the first draw of the server is the start."""
        found = [self.tensors[name] for name in sorted(name for name in self.tensors if name.startswith("draw/"))]
        return found[1:] if found and found[0].shape == self.noise.shape else found

    def reencoded(self, block: int) -> Tensor | None:
        """(B, 1, C, H, W): the window's first frame as the recorded VAE encoded it."""
        found = self.tensors.get(f"reencoded_first_frame/block{block}")
        if found is None:
            return None
        found = found if found.ndim == 5 else found[None]
        return found.transpose(1, 2).expand(self.batch, -1, -1, -1, -1)


def recognises(path: Path) -> bool:
    """Whether a fixture was recorded from Krea's code."""
    try:
        fields = json.loads(path.with_suffix(".json").read_text())
    except (OSError, json.JSONDecodeError):
        return False
    return isinstance(fields, dict) and "krea" in (fields.get("upstream") or ()) and "scenarios" in fields


def load(path: Path) -> tuple[CausalWanDiT, list[Run]]:
    """The model of a fixture, and its scenarios."""
    fields = json.loads(path.with_suffix(".json").read_text())
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: damaged fixture ({error}); record it again") from None
    config = fields["model_config"]
    height, width = fields["latent_hw"]
    spec = ModelSpec(
        name=path.stem, dim=config["dim"], ffn_dim=config["ffn_dim"], heads=config["num_heads"],
        layers=config["num_layers"], freq_dim=config["freq_dim"], text_dim=config["text_dim"],
        text_len=config["text_len"], latent_channels=config["in_dim"], latent_height=height, latent_width=width,
        patch=tuple(config["patch_size"]), eps=config["eps"],
    )  # fmt: skip
    model = CausalWanDiT(spec)
    weights = {name.removeprefix("weights/"): t for name, t in tensors.items() if name.startswith("weights/")}
    model.load_state_dict({name.removeprefix("model."): tensor for name, tensor in weights.items()})
    runs = []
    for scenario in fields["scenarios"]:
        name = scenario["name"]
        geometry = spec
        if "latent_hw" in scenario:
            high, wide = scenario["latent_hw"]
            geometry = replace(spec, latent_height=high, latent_width=wide)
        mine = {key.removeprefix(f"{name}/"): t for key, t in tensors.items() if key.startswith(f"{name}/")}
        runs.append(Run(name, scenario, geometry, [c for c in fields["calls"] if c["scenario"] == name], mine))
    return model.eval(), runs


@torch.inference_mode()
def replay(path: Path, judge: Judge) -> None:
    """Every scenario of a fixture; the judge sees each recorded tensor beside ours."""
    model, runs = load(path)
    for run in runs:
        if "values" in run.config:
            _replay_bias(run, model, judge)
            continue
        judge.see("schedule", torch.tensor(run.planned().timesteps), run.tensors["timestep_list"].float())
        if run.server or all("x" in run.of(call) for call in run.calls):
            _replay_calls(run, model, judge)
        if "initial_noise" in run.tensors:
            _free_run(run, model, judge)


def _replay_calls(run: Run, model: CausalWanDiT, judge: Judge) -> None:
    """Every call on its recorded inputs: velocity, x0, caches, recorded activations.

    The server's caches depend on the chunk alone, so calls may be missing there.
    """
    cache, spec = KVCache(run.spec(), batch=run.batch), run.spec()
    texts = {call["prompt"]: model.encode_text(run.rows(call)) for call in run.calls}
    schedule, blocks = run.schedule(), {block[0]["block"]: block for block in run.blocks()}
    for number in range(max(blocks) + 1):
        start = number * spec.chunk_frames
        cache.begin(start, spec.chunk_frames)
        context = Context(spec).frames(start) if run.server else ()
        for call in blocks.get(number, ()):
            recorded = run.of(call)
            if "x" not in recorded:
                continue
            ours = torch.tensor(cache.position(start) * cache.frame_tokens)
            judge.see("position", ours, torch.tensor(call["current_start"]))
            past = cache.encoding(context) if call["uses_block_mask"] else nullcontext()
            with _traced(model, recorded) as traces, past:
                condition = model.condition(recorded["timestep"].float())
                flow = model(recorded["x"], condition, texts[call["prompt"]], cache)
            judge.see("flow", flow, recorded["flow_pred"])
            _compare_x0(run, schedule, blocks[number], call, flow, judge)
            for name, ours in traces.items():
                judge.see("trace", ours.reshape(recorded[name].shape), recorded[name])
            _compare_cache(cache, recorded, judge, "cache")


def _compare_x0(run: Run, schedule: Schedule, block: list[Call], call: Call, flow: Tensor, judge: Judge) -> None:
    recorded = run.of(call)
    t = recorded["timestep"].float()
    table = sigma_table(run.shifts[1])
    sigma = table[(table * 1000 - t.unsqueeze(-1)).abs().argmin(-1)].double()[..., None, None, None]
    if "x0_pred" in recorded:
        judge.see("x0", recorded["x"].double() - sigma * flow.double(), recorded["x0_pred"])
    if call in (steps := run.denoising(block)):
        wanted = torch.full_like(t, schedule.timesteps[steps.index(call)])
        judge.see("timestep", wanted, t)


def _compare_cache(cache: KVCache, recorded: dict[str, Tensor], judge: Judge, kind: str) -> None:
    """Keys and values in temporal order, as far as upstream's buffer was filled."""
    for name, reference in recorded.items():
        layer, _, which = name.partition("/")
        if which in ("cache_k", "cache_v"):
            _, keys, values = cache.temporal(int(layer.removeprefix("layer")))
            ours = (keys if which == "cache_k" else values).flatten(1, 2)
            judge.see(kind, ours[:, : reference.shape[1]], reference)


@contextmanager
def _traced(model: CausalWanDiT, recorded: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Collect the activations that were recorded for this call."""
    found: dict[str, Tensor] = {}
    handles = []
    for name in recorded:
        layer, _, which = name.partition("/")
        if which in LAYER_TRACES:
            path, side = LAYER_TRACES[which]
            module = model.blocks[int(layer.removeprefix("layer"))].get_submodule(path)
            handles.append(module.register_forward_hook(_keep(found, name, side)))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _keep(found: dict[str, Tensor], name: str, side: str) -> Any:
    def hook(_: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        found[name] = inputs[0] if side == "in" else output

    return hook


def _free_run(run: Run, model: CausalWanDiT, judge: Judge) -> None:
    """The whole loop from the recorded noise: velocities of every pass, and what it puts out."""
    passes = iter(run.calls)

    def compare(_: nn.Module, __: tuple[Any, ...], flow: Tensor) -> None:
        call = next(passes)
        recorded = run.of(call)
        if "flow_pred" in recorded:
            judge.see("free-running flow", flow, recorded["flow_pred"])
        _compare_cache(stream.cache, recorded, judge, "free-running cache")

    stream = open_recorded(run, model)
    handle = model.register_forward_hook(compare)
    try:
        for chunk in stream:
            if f"block{chunk.index}/latents" in run.tensors:
                judge.see("free-running output", chunk.latents, run.tensors[f"block{chunk.index}/latents"])
    finally:
        handle.remove()
    assert next(passes, None) is None, f"{run.name}: upstream made more passes"


def open_recorded(run: Run, model: CausalWanDiT) -> Stream:
    """The scenario's stream: recorded noise, prompts, re-encoded frames and schedule."""
    spec, blocks = run.spec(), run.blocks()
    cache = KVCache(spec, batch=run.batch)
    absorber = Absorber(targets=[block.self_attn.o for block in model.layers()], cache=cache, policy=FULL)
    draws, shape = iter(run.draws()), (run.batch, spec.chunk_frames)

    def noise(chunk: int, count: int, step: int) -> Tensor:
        start = chunk * count
        return run.noise[:, start : start + count] if step == 0 else next(draws).unflatten(0, shape)

    made = iter(frame for frame in (run.reencoded(n) for n in range(len(blocks))) if frame is not None)
    reencodes = run.server and any(run.reencoded(n) is not None for n in range(len(blocks)))
    prompts = [run.denoising(block)[0] for block in blocks]
    return Stream(
        model, cache, absorber, run.rows(prompts[0]),
        frames=len(blocks) * spec.chunk_frames,
        noise=noise,
        sampler=Sampler(run.schedule()),
        decoder=(lambda latents: latents.new_zeros(len(latents), 4 * latents.shape[1], 3, 1, 1)) if reencodes else None,
        switches=[
            (n * spec.chunk_frames, run.rows(call))
            for n, call in enumerate(prompts)
            if n and call["prompt"] != prompts[n - 1]["prompt"]
        ],
        full_commit=True,
        commit_last=len(blocks[-1]) > len(run.denoising(blocks[-1])),
        encoder=(lambda _: next(made)) if reencodes else None,
    )  # fmt: skip


def _replay_bias(run: Run, model: CausalWanDiT, judge: Judge) -> None:
    """One context pass and one denoising call, for each strength of the bias."""
    context, x = run.tensors["context_frames"], run.tensors["x"]
    chunk, past = run.config.get("num_frame_per_block", x.shape[1]), context.shape[1]
    spec = replace(
        run.geometry, chunk_frames=chunk, window_frames=past + chunk, sink_frames=1, rope="window", reencodes=True
    )
    text = model.encode_text(run.tensors["prompt"].expand(len(x), -1, -1))
    for call in run.calls:
        cache = KVCache(spec, batch=len(x), past_bias=call["bias"])
        for start in range(0, past + 1, chunk):
            cache.begin(start, chunk)
        with cache.encoding(Context(spec).frames(past)):
            model(context, model.condition(torch.zeros(1, 1)), text, cache)
        flow = model(x, model.condition(torch.tensor([[call["timestep"]]])), text, cache)
        judge.see("biased flow", flow, run.tensors[f"bias_{call['bias']}/flow_pred"])
