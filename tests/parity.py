"""Replay of recorded upstream runs: `python -m tests.parity FIXTURE.safetensors [MORE ...] [--json]`.

A fixture is a `.safetensors` of tensors with a `.json` of the run's configuration and calls beside it. It is replayed
twice: call by call on the recorded inputs, and free-running through the real `Stream` from the recorded noise. Every
recorded tensor that our implementation also has is compared: |d| <= 1e-5 * (1 + |ref|). What a fixture does not hold is
not compared. Exit 0: within tolerance; 1: above it; 2: a fixture that cannot be replayed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from export.lora import Lora, merge_lora_
from ispa_deploy.absorb.absorber import Absorber
from ispa_deploy.cache import KVCache
from ispa_deploy.errors import InputError
from ispa_deploy.model import CausalWanDiT
from ispa_deploy.policies.full import FULL
from ispa_deploy.sampler import Sampler, Schedule, denoise_by_renoising, sigma_table
from ispa_deploy.specs import ModelSpec
from ispa_deploy.stream import Stream
from tests import parity_avatar, parity_krea

TOLERANCE = 1e-5
RECACHE = "recache"
GLOBAL_FRAMES = 21  # the buffer of a model without a window
UPSTREAMS = ("longlive", "self_forcing", "reward_forcing")

# Recorded activation -> (module, whether its input or its output was recorded).
LAYER_TRACES = {
    "self_attn_in": ("self_attn.q", "in"),
    "q_normed": ("self_attn.norm_q", "out"),
    "k_normed": ("self_attn.norm_k", "out"),
    "attn_out_pre_o": ("self_attn.o", "in"),
    "self_attn_out": ("self_attn.o", "out"),
    "cross_attn_out": ("cross_attn.o", "out"),
    "ffn_out": ("ffn.2", "out"),
    "block_out": ("", "out"),
}
MODEL_TRACES = {
    "time_embedding": ("time_embedding.2", "out"),
    "time_projection": ("time_projection.1", "out"),
    "head_out": ("head.head", "out"),
}


class Worst:
    """The worst error of each kind of tensor, |d| / (1 + |ref|); NaN or a wrong shape counts as infinite."""

    def __init__(self) -> None:
        self.by_kind: dict[str, float] = {}
        self.tolerances: dict[str, float] = {}

    def tolerance(self, kind: str) -> float:
        """That of the longest known prefix of a kind's name."""
        known = [prefix for prefix in self.tolerances if kind.startswith(prefix)]
        return self.tolerances[max(known, key=len)] if known else TOLERANCE

    def see(self, kind: str, ours: Tensor, reference: Tensor) -> None:
        ours, reference = ours.double(), reference.double()
        error = torch.inf
        if ours.shape == reference.shape:
            error = float(((ours - reference).abs() / (1 + reference.abs())).max().nan_to_num(nan=torch.inf))
        self.by_kind[kind] = max(self.by_kind.get(kind, 0.0), error)

    @property
    def ok(self) -> bool:
        return bool(self.by_kind) and all(error <= self.tolerance(kind) for kind, error in self.by_kind.items())


@dataclass(frozen=True)
class Fixture:
    """One recorded run: configuration, calls in order, tensors by name."""

    name: str
    config: dict[str, Any]
    calls: list[dict[str, Any]]
    tensors: dict[str, Tensor]

    @staticmethod
    def load(path: Path) -> Fixture:
        """Read FIXTURE.safetensors and FIXTURE.json; InputError for a run that is not of this family."""
        description = path.with_suffix(".json")
        for needed in (path, description):
            if not needed.is_file():
                raise InputError(f"{needed}: no such file; expected a fixture's .safetensors with its .json beside it")
        try:
            fields, tensors = json.loads(description.read_text()), load_file(path)
        except (json.JSONDecodeError, SafetensorError) as error:
            raise InputError(f"{path}: damaged fixture ({error}); record it again") from None
        _refuse_unsupported(path, fields)
        return Fixture(path.stem, fields["config"], fields["calls"], tensors)

    @property
    def batch(self) -> int:
        return int(self.tensors["input/noise"].shape[0])

    @property
    def initial(self) -> Tensor | None:
        return self.tensors.get("input/initial_latent")

    def spec(self) -> ModelSpec:
        """Our description of the recorded model."""
        config, model = self.config, self.config["model"]
        window = model.get("local_attn_size", -1)
        reward = config["upstream"] == "reward_forcing"
        sink = model.get("sink_size", 0)
        alpha = model.get("compression_alpha", config.get("compression_alpha", 0.999))
        return ModelSpec(
            name=self.name,
            dim=model["dim"],
            ffn_dim=model["ffn_dim"],
            heads=model["num_heads"],
            layers=model["num_layers"],
            freq_dim=model["freq_dim"],
            text_dim=model["text_dim"],
            text_len=model["text_len"],
            latent_channels=model["in_dim"],
            latent_height=config["latent"]["height"],
            latent_width=config["latent"]["width"],
            patch=tuple(model.get("patch_size", (1, 2, 2))),
            eps=model.get("eps", 1e-6),
            rope="window" if reward or config.get("variant") == "infinity" else "absolute",
            chunk_frames=config["num_frame_per_block"],
            first_chunk_frames=1 if config.get("independent_first_frame") else 0,
            window_frames=GLOBAL_FRAMES if window == -1 else window,
            sink_frames=sink,
            ema_sink=alpha if reward and sink else None,
            rolls=window != -1,
            recaches=config.get("variant") == "interactive",
            renews_sink=not config.get("global_sink", True),
            context_timestep=float(config.get("context_noise", 0)),
            shift=config["timestep_shift"],
        )

    def model(self) -> CausalWanDiT:
        model = CausalWanDiT(self.spec())
        weights = {name.removeprefix("weights/"): t for name, t in self.tensors.items() if name.startswith("weights/")}
        model.load_state_dict({name.removeprefix("model."): tensor for name, tensor in weights.items()})
        lora = self.config.get("lora")
        if lora:
            adapter = {name.removeprefix("lora/"): t for name, t in self.tensors.items() if name.startswith("lora/")}
            merge_lora_(model, Lora.of(adapter, self.name, lora["alpha"]))
        return model.eval()

    def schedule(self) -> Schedule:
        """The chunk's timesteps and noise levels; unwarped steps are timesteps, their level is the nearest one's."""
        steps, shift = tuple(self.config["denoising_step_list"]), self.config["timestep_shift"]
        if self.config.get("warp_denoising_step", True) and 0 not in steps:
            return Schedule.few_step(steps, shift)
        sigmas = sigma_table(shift)
        times = sigmas * 1000
        if self.config.get("warp_denoising_step", True):
            wanted = [float(torch.cat([times, torch.zeros(1)])[1000 - step]) for step in steps]
        else:
            wanted = [float(step) for step in steps]
        return Schedule(tuple(wanted), tuple(float(sigmas[(times - t).abs().argmin()]) for t in wanted))

    def text_rows(self, prompt: str) -> Tensor:
        """(B, L, text_dim) of a call's prompt: one for all samples, or one for each."""
        names = sorted((n for n in self.tensors if n.startswith("input/prompt")), key=lambda n: (len(n), n))
        own = self.tensors.get(f"input/{prompt}", self.tensors[names[0]])
        if own.dim() == 2 and len(names) == self.batch > 1 and not self.switches():
            return torch.stack([self.tensors[name] for name in names])
        return own.expand(self.batch, -1, -1)

    def switches(self) -> list[tuple[int, str]]:
        """(first frame, prompt) of every chunk whose prompt differs from the one before."""
        chunks = [calls[0] for calls in self.blocks()]
        pairs = pairwise(chunks)
        return [(now["start_frame"], now["prompt"]) for before, now in pairs if now["prompt"] != before["prompt"]]

    def call_tensors(self, call: dict[str, Any]) -> dict[str, Tensor]:
        prefix = f"call{call['index']:03d}/"
        return {name[len(prefix) :]: t for name, t in self.tensors.items() if name.startswith(prefix)}

    def blocks(self) -> list[list[dict[str, Any]]]:
        """Calls of each chunk, in order; passes over the past at a prompt switch belong to none."""
        grouped: dict[int, list[dict[str, Any]]] = defaultdict(list)
        for call in (call for call in self.calls if call["kind"] != RECACHE):
            grouped[call["start_frame"]].append(call)
        return [grouped[start] for start in sorted(grouped)]


def _refuse_unsupported(path: Path, fields: dict[str, Any]) -> None:
    config = fields.get("config", {})
    upstream = config.get("upstream", "another family")
    if upstream not in UPSTREAMS:
        raise InputError(f"{path}: recorded from {upstream}: expected a run of {', '.join(UPSTREAMS)}")


# -- comparisons


def replay_calls(fixture: Fixture, model: CausalWanDiT, worst: Worst) -> None:
    """Every call on its recorded inputs: velocity, x0, caches, recorded activations."""
    cache = KVCache(fixture.spec(), batch=fixture.batch)
    texts = {call["prompt"]: model.encode_text(fixture.text_rows(call["prompt"])) for call in fixture.calls}
    start = None
    for call in fixture.calls:
        tensors = fixture.call_tensors(call)
        again = call["kind"] == RECACHE
        if call["start_frame"] != start and not again:
            start = call["start_frame"]
            cache.begin(start, call["num_frames"])
        if "noisy_input" not in tensors:
            raise InputError(f"{fixture.name}: call {call['index']} holds no input: use a fixture with every call's")
        past = cache.again(call["start_frame"], call["num_frames"]) if again else nullcontext()
        with _traced(model, tensors) as traces, past:
            condition = model.condition(tensors["timestep"].float())
            flow = model(tensors["noisy_input"], condition, texts[call["prompt"]], cache)
        _compare_call(fixture, call, tensors, flow, worst)
        for name, ours in traces.items():
            worst.see("trace", ours.reshape(tensors[name].shape), tensors[name])
        compare_caches(cache, call, {n: t for n, t in tensors.items() if n.startswith("kv/")}, worst, "cache")
        _compare_norms(cache, call, worst)


def _compare_call(
    fixture: Fixture, call: dict[str, Any], tensors: dict[str, Tensor], flow: Tensor, worst: Worst
) -> None:
    if "flow_pred" in tensors:
        worst.see("flow", flow, tensors["flow_pred"])
    if "x0_pred" in tensors:
        schedule, step = fixture.schedule(), call["step"]
        level = Schedule((schedule.timesteps[step],), (schedule.sigmas[step],))
        x0 = denoise_by_renoising(lambda x, t: flow, lambda _: tensors["noisy_input"], level)
        worst.see("x0", x0, tensors["x0_pred"])
        worst.see("timestep", torch.tensor(level.timesteps).expand_as(tensors["timestep"]), tensors["timestep"])


def compare_caches(cache: KVCache, call: dict[str, Any], recorded: dict[str, Tensor], worst: Worst, kind: str) -> None:
    """Keys and values in temporal order; upstream's buffer is zero behind its local end."""
    for name, reference in recorded.items():
        layer = int(name.split("layer")[1].split("/")[0])
        _, keys, values = cache.temporal(layer)
        ours = (keys if name.endswith("/k") else values).flatten(1, 2)
        worst.see(kind, ours, reference[:, : call["local_end_tokens"]])


def _compare_norms(cache: KVCache, call: dict[str, Any], worst: Worst) -> None:
    """Norms of every layer's cache, recorded after each call. They sum in another order than ours."""
    for layer, norms in enumerate(call.get("kv_l2") or ()):
        _, keys, values = cache.temporal(layer)
        ours = torch.stack([keys.double().norm(), values.double().norm()])
        worst.see("cache norm", ours, torch.tensor(norms, dtype=torch.float64))


@contextmanager
def _traced(model: CausalWanDiT, tensors: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Collect the activations that were recorded for this call."""
    found: dict[str, Tensor] = {}
    handles = []
    for name in tensors:
        _, _, trace = name.partition("trace/")
        where = _module_of(model, trace)
        if where is not None:
            handles.append(where[0].register_forward_hook(_keep(found, name, where[1])))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _module_of(model: CausalWanDiT, trace: str) -> tuple[nn.Module, str] | None:
    if trace in MODEL_TRACES:
        path, side = MODEL_TRACES[trace]
        return model.get_submodule(path), side
    layer, _, name = trace.removeprefix("layer").partition("/")
    if name not in LAYER_TRACES:
        return None
    path, side = LAYER_TRACES[name]
    return model.blocks[int(layer)].get_submodule(path), side


def _keep(found: dict[str, Tensor], name: str, side: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
    def hook(_: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        found[name] = inputs[0] if side == "in" else output

    return hook


def free_run(fixture: Fixture, model: CausalWanDiT, worst: Worst) -> None:
    """The whole loop from the recorded noise: velocities, output latents and the caches it leaves."""
    passes = iter(fixture.calls)

    def compare_flow(_: nn.Module, __: tuple[Any, ...], flow: Tensor) -> None:
        recorded = fixture.call_tensors(next(passes))
        if "flow_pred" in recorded:
            worst.see("free-running flow", flow, recorded["flow_pred"])

    stream = open_recorded(fixture, model)
    handle = model.register_forward_hook(compare_flow)
    try:
        latents = torch.cat([chunk.latents for chunk in stream], 1)
    finally:
        handle.remove()
    worst.see("free-running output", latents, fixture.tensors["output/latents"])
    final = {name: tensor for name, tensor in fixture.tensors.items() if name.startswith("final_kv/")}
    compare_caches(stream.cache, fixture.calls[-1], final, worst, "free-running cache")
    _compare_norms(stream.cache, fixture.calls[-1], worst)


def open_recorded(fixture: Fixture, model: CausalWanDiT) -> Stream:
    """The fixture's stream: recorded noise, prompt, given latents and schedule."""
    spec, blocks = fixture.spec(), fixture.blocks()
    cache = KVCache(spec, batch=fixture.batch)
    absorber = Absorber(targets=[block.self_attn.o for block in model.blocks], cache=cache, policy=FULL)
    given = 0 if fixture.initial is None else fixture.initial.shape[1]

    def noise(chunk: int, count: int, step: int) -> Tensor:
        calls = blocks[chunk]
        start = calls[0]["start_frame"] - given
        if step == 0:
            return fixture.tensors["input/noise"][:, start : start + count]
        return fixture.call_tensors(calls[step - 1])["eps"].unflatten(0, (fixture.batch, count))

    return Stream(
        model,
        cache,
        absorber,
        fixture.text_rows(fixture.calls[0]["prompt"]),
        frames=sum(calls[0]["num_frames"] for calls in blocks),
        noise=noise,
        sampler=Sampler(fixture.schedule()),
        switches=[(frame, fixture.text_rows(name)) for frame, name in fixture.switches()],
        initial=fixture.initial,
        commit_last=fixture.calls[-1]["kind"] == "clean",
        full_commit=True,  # the recorded velocity of a clean pass is compared, too
    )


def replay_file(path: Path) -> Worst:
    """Worst error of each kind over everything a fixture holds, whichever family recorded it."""
    family = next((module for module in (parity_krea, parity_avatar) if module.recognises(path)), None)
    if family is None:
        return replay(Fixture.load(path))
    worst = Worst()
    family.replay(path, worst)
    return worst


def replay(fixture: Fixture) -> Worst:
    """Worst error of each kind over both replays."""
    worst, model = Worst(), fixture.model()
    shift = fixture.config["timestep_shift"]
    if "scheduler/sigmas" in fixture.tensors:
        worst.see("scheduler", sigma_table(shift), fixture.tensors["scheduler/sigmas"].float())
    if "scheduler/timesteps" in fixture.tensors:
        worst.see("scheduler", sigma_table(shift) * 1000, fixture.tensors["scheduler/timesteps"].float())
    with torch.inference_mode():
        if all(f"call{call['index']:03d}/noisy_input" in fixture.tensors for call in fixture.calls):
            replay_calls(fixture, model, worst)
        free_run(fixture, model, worst)
    return worst


def _tolerances(worst: Worst) -> str:
    return " / ".join(f"{value:g}" for value in sorted({worst.tolerance(kind) for kind in worst.by_kind}))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.parity", description="replay recorded upstream runs")
    parser.add_argument("fixtures", nargs="+", type=Path, metavar="FIXTURE.safetensors")
    parser.add_argument("--json", action="store_true", help="one JSON document instead of text")
    options = parser.parse_args(arguments)
    results = []
    for path in options.fixtures:
        try:
            worst = replay_file(path)
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)
            return error.exit_code
        results.append({"fixture": path.stem, "ok": worst.ok, "worst": worst.by_kind})
        if not options.json:
            print(f"{path.stem}: {'within' if worst.ok else 'ABOVE'} {_tolerances(worst)}")
            for kind, error in worst.by_kind.items():
                print(f"  {kind:<20} {error:.2e}")
    if options.json:
        print(json.dumps({"tolerance": TOLERANCE, "fixtures": results}, indent=2))
    return 0 if all(result["ok"] for result in results) else 1


if __name__ == "__main__":
    raise SystemExit(main())
