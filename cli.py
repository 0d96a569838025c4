"""The command line: parse, compose, call, print. Nothing is computed here and `--help` imports no torch.

Every command ends with exit code 0 (done), 1 (the run failed), 2 (bad input, one line on stderr) or 130 (Ctrl-C: `run`
finishes its chunk, closes its files and reports `complete: false`). With `--json` stdout carries exactly one JSON
document; everything for people goes to stderr.
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ispa_deploy import __version__
from ispa_deploy.errors import InputError, IspaError
from ispa_deploy.flag_groups import (
    BundleArg,
    DeviceOpt,
    DtypeOpt,
    JsonOpt,
    LastPassOpt,
    Sections,
    SeedOpt,
    StatsOpt,
    ThreadsOpt,
    TuneOpt,
    grouped,
)
from ispa_deploy.flags import (
    check_deltas_to_come,
    device_of,
    dtype_of,
    make_folder,
    switch_of,
)
from ispa_deploy.printing import (
    describe_models,
    emit,
    print_mapping,
    print_models,
    print_profile,
    print_run,
    print_table,
    progress_bar,
    say,
    to_json,
    write_reports,
)
from ispa_deploy.quantize_flags import (
    BundleOutOpt,
    CalibrationFlags,
    CheckpointFlags,
    ConversionMachineFlags,
    OverwriteOpt,
    PrecisionFlags,
    SourceArg,
)
from ispa_deploy.run_flags import FileFlags, MachineFlags, NetworkFlags, PromptFlags, SceneFlags, StreamFlags

if TYPE_CHECKING:
    from export.bundle import Bundle
    from export.calibrate import Activations
    from export.profiling import Compared
    from ispa_deploy.avatar.stream import Scene
    from ispa_deploy.compiled import CompiledStages
    from ispa_deploy.graphs import PassGraphs
    from ispa_deploy.model import CausalWanDiT
    from ispa_deploy.options import StreamOptions
    from ispa_deploy.run import Outputs
    from ispa_deploy.specs import ModelSpec
    from ispa_deploy.stream import Stream

app = typer.Typer(
    name="ispa-deploy",
    help="Quantise, stream and profile autoregressive video models with parametric absorption of their history (ISPA).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

# What typer raises for a command line it cannot read; the base class has no public name in all of its versions.
UsageError: type[Any] = typer.BadParameter.__bases__[0]
INTERRUPTED = 130
MID_LAYERS = 6  # of the mid geometry that `profile` times: halves and thirds are whole, and the demo has minutes
MID_LAYERS_NARROW = 2  # without AVX512 bfloat16 is emulated: the same minutes are fewer layers


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        typer.echo(f"ispa-deploy {__version__}")
        raise typer.Exit


@app.command()
def models(json_only: JsonOpt = False) -> None:
    """List the known models: geometry, bytes, source, licence."""
    from ispa_deploy.specs import SPECS

    if json_only:
        typer.echo(to_json(describe_models(SPECS.values())))
        return
    print_models(SPECS.values())


@app.command(cls=Sections)
@grouped
def quantize(
    source: SourceArg,
    out: BundleOutOpt,
    checkpoint: CheckpointFlags,
    precision: PrecisionFlags,
    calibration: CalibrationFlags,
    machine: ConversionMachineFlags,
    overwrite: OverwriteOpt = False,
    json_only: JsonOpt = False,
    stats: StatsOpt = None,
) -> None:
    """Quantise weights to W8A8 and write a safetensors bundle."""
    if machine.threads is not None:
        import torch

        torch.set_num_threads(machine.threads)
    document = _quantise(
        source, out, precision.scheme, model=checkpoint.model, lora=checkpoint.lora, lora_alpha=checkpoint.lora_alpha,
        seed=checkpoint.seed, plan=precision.plan, skip=precision.skip or (), dtype=dtype_of(precision.dtype),
        activations=_activations(calibration, checkpoint.seed, machine.device), overwrite=overwrite,
    )  # fmt: skip
    emit(document, json_only, stats, lambda: typer.echo(f"bundle: {document['bundle']}"))


@app.command(cls=Sections)
@grouped
def run(
    bundle: BundleArg,
    prompts: PromptFlags,
    networks: NetworkFlags,
    scene: SceneFlags,
    stream: StreamFlags,
    files: FileFlags,
    machine: MachineFlags,
    json_only: JsonOpt = False,
    stats: StatsOpt = None,
) -> None:
    """Stream a video: warm up, absorb, go on with less memory."""
    from export.initial import with_still
    from export.manifest import read_manifest
    from export.scenes import read_scene
    from ispa_deploy.media.output import output_path
    from ispa_deploy.run import Outputs

    if files.out is not None:
        output_path(files.out, ".mp4", "video")
    options, spec = stream.options(), read_manifest(bundle).spec
    if machine.offload:
        options = replace(options, stats_device=options.stats_device or "cpu", offload=True)
    image = None if spec.audio_blocks else scene.image
    if image is not None:
        options = with_still(options)
    sounds = tuple(files.audio or ())
    if sounds and files.out is None and not spec.audio_blocks:
        raise InputError(f"--audio '{sounds[0]}' without a video: name one with --out VIDEO.mp4, or leave it out")
    timeline = _timeline(prompts, spec, options)
    opened = _accompanied(_open(bundle, machine, prompts.prompt_embeds), networks, machine.offload)
    sheet = files.out.with_suffix(".png") if files.sheet is None and files.out is not None else files.sheet
    outputs = Outputs(files.out, sheet, files.latents, opened.pixel_scale, timeline[0], sounds)
    given = read_scene(
        opened, options, image=None if image else scene.image, audio=sounds, audio_encoder=scene.audio_encoder,
        masks=scene.speaker_mask or (), pose=scene.pose,
    )  # fmt: skip
    kept = any((files.out, files.sheet, files.latents, files.save_deltas, stats, json_only))
    document = _run(
        opened, timeline, given, options, outputs, files, machine, live=prompts.live, initial=prompts.initial,
        image=image, kept=kept,
    )  # fmt: skip
    emit(document, json_only, stats, lambda: print_run(document))
    if not document["complete"]:
        raise typer.Exit(INTERRUPTED)


@app.command()
def profile(
    bundle: BundleArg,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Folder for report.html, .json and others.")] = None,
    rounds: Annotated[int, typer.Option(min=3, help="Steady chunks timed per configuration.")] = 7,
    ratio: Annotated[float, typer.Option(help="Share of layers that are local.")] = 0.5,
    recent_frames: Annotated[int, typer.Option(help="Recent frames that local layers also keep.")] = 0,
    also: Annotated[
        list[str] | None,
        typer.Option(
            help="One more run: POLICY, then :RATIO and :RECENT, +SCHEME, +int8-kv or +int8-attention, +compile or "
            "+cuda-graphs, each if wanted. For example absorb:1:3+w8a8, window:6, full+compile. Repeatable."
        ),
    ] = None,
    mid: Annotated[bool, typer.Option(help="Also profile the mid geometry (random weights), where 8 bits pay.")] = True,
    allow_fallback: Annotated[
        bool, typer.Option("--allow-fallback", help="Measure a scheme that is simulated here; do not fail.")
    ] = False,
    last_pass_bits: LastPassOpt = 16,
    device: DeviceOpt = "auto",
    dtype: DtypeOpt = "auto",
    threads: ThreadsOpt = None,
    tune_allocator: TuneOpt = True,
    json_only: JsonOpt = False,
    stats: StatsOpt = None,
) -> None:
    """Show where the time of a steady chunk goes.

    Attention, linear layers and overhead, several configurations side by side.
    """
    if out is not None:
        make_folder(out)
    from export.profiling import Compared

    asked = Compared(
        rounds=rounds, ratio=ratio, recent=recent_frames, also=tuple(also or ()), allow_fallback=allow_fallback,
        last_pass_bits=last_pass_bits,
    )  # fmt: skip
    asked.check()
    begun = time.perf_counter()
    machine = MachineFlags(
        allow_fallback=allow_fallback, device=device, dtype=dtype, threads=threads, tune_allocator=tune_allocator
    )
    opened = _open(bundle, machine)
    document = _profile(opened, asked, mid, load_ms=1e3 * (time.perf_counter() - begun))
    write_reports(document, out)
    emit(document, json_only, stats, lambda: print_profile(document))


@app.command()
def plan(
    model: Annotated[str, typer.Option(help="Model of the table of `models`.")],
    gpu: Annotated[str, typer.Option(help="H200, H100, A100, L40S, RTX 4090; measured: as the stored reports.")],
    ratio: Annotated[float, typer.Option(help="Share of layers that are local.")] = 0.5,
    recent_frames: Annotated[int, typer.Option(help="Recent frames that local layers also keep.")] = 0,
    window: Annotated[int | None, typer.Option(help="Window in frames; default: the model's.")] = None,
    reports: Annotated[
        Path | None, typer.Option(help="Reports to calibrate by: folder or report.json; default docs/results.")
    ] = None,
    json_only: JsonOpt = False,
    stats: StatsOpt = None,
) -> None:
    """Predict memory and latency before anything is downloaded."""
    from ispa_deploy.planner.plan import grid, sentences
    from ispa_deploy.planner.plan import plan as predicted

    document = predicted(model, gpu, reports=reports, ratio=ratio, recent=recent_frames, window=window)

    def show() -> None:
        head, *rows = (tuple(line) for line in grid(document))
        print_table(head, rows)
        for line in sentences(document):
            typer.echo(line)

    emit(document, json_only, stats, show)


@app.command()
def evaluate(
    bundle: BundleArg,
    pairs: Annotated[int, typer.Option(min=2, help="Prompt-seed pairs.")] = 24,
    frames: Annotated[int, typer.Option(min=1, help="Latent frames of each stream.")] = 24,
    readme: Annotated[
        Path | None, typer.Option(help="Replace the quality table between its markers in this file.")
    ] = None,
    threads: ThreadsOpt = None,
    json_only: JsonOpt = False,
    stats: StatsOpt = None,
) -> None:
    """Compare absorption with its alternatives on the demo model.

    The full cache, the same layers without absorption, no sink, random layers.
    """
    from export.manifest import read_manifest
    from ispa_deploy.evaluate.command import run_evaluation
    from ispa_deploy.evaluate.table import markdown

    name = read_manifest(bundle).spec.name
    if name != "demo":
        raise InputError(f"evaluate of '{name}': its metrics know the demo's scenes; expected a bundle of the demo")
    opened = _open(bundle, MachineFlags(device="cpu", dtype="float32", threads=threads))
    command = " ".join(["ispa-deploy", *sys.argv[1:]])
    document = run_evaluation(opened.model, count=pairs, frames=frames, readme=readme, command=command)
    emit(document, json_only, stats, lambda: typer.echo(markdown(document)))


@app.command()
def inspect(path: Annotated[Path, typer.Argument(help="A bundle, a delta file or any safetensors file.")],
            json_only: JsonOpt = False) -> None:  # fmt: skip
    """Look inside a bundle or delta file, no tensor loaded."""
    from export.inspect import describe

    document = describe(path)
    emit(document, json_only, None, lambda: print_mapping(document))


@app.command()
def export(
    source: Annotated[Path, typer.Argument(help="A bundle; with --from, a file in a dialect.", show_default=False)],
    out: Annotated[Path, typer.Option("-o", "--out", help="File (.safetensors) or folder to write.")],
    to: Annotated[
        str | None, typer.Option(help="bitsandbytes, comfyui, diffusers, diffusers-torchao, lightx2v or torchao.")
    ] = None,
    origin: Annotated[str | None, typer.Option("--from", help="Make a bundle from this dialect, or auto.")] = None,
    model: Annotated[str | None, typer.Option(help="With --from: the model of a file made elsewhere.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace what is there.")] = False,
    json_only: JsonOpt = False,
) -> None:
    """Write a bundle in another reader's dialect, or read one."""
    from export.dialects import export_bundle, import_dialect

    if to is not None and origin is None and model is None:
        written = export_bundle(source, to, out, overwrite=overwrite)
    elif origin is not None and to is None:
        written = import_dialect(source, origin, out, model=model, overwrite=overwrite)
    else:
        raise InputError("export needs one of --to DIALECT and --from DIALECT; --model goes with --from only")
    document = {"source": str(source), "dialect": to or origin, "path": str(written)}
    emit(document, json_only, None, lambda: typer.echo(f"written: {written}"))


@app.command()
def compare(
    before: Annotated[Path, typer.Argument(help="report.json to compare with.")],
    after: Annotated[Path, typer.Argument(help="report.json to judge.")],
    fail_on: Annotated[
        list[str] | None,
        typer.Option(help="METRIC:PERCENT%, e.g. latency:8%; latency, attention, linear, memory, kv; repeatable."),
    ] = None,
    json_only: JsonOpt = False,
) -> None:
    """Compare two profile reports.

    Exit code 1 when a metric grew by more than --fail-on allows.
    """
    from ispa_deploy.profile.diff import compared_models, difference, grid, load

    document = difference(load(before), load(after), fail_on or ())

    def show() -> None:
        head, *rows = grid(document)
        typer.echo("; ".join(compared_models(document)))
        print_table(head, rows)

    emit(document, json_only, None, show)
    for line in (*document["notes"], *(f"failed: {text}" for text in document["failed"])):
        say(line)
    if document["failed"]:
        raise typer.Exit(1)


@app.command()
def demo(
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for everything the demo makes.")] = Path("demo-out"),
    prompt: Annotated[str, typer.Option(help="What to show.")] = "a fast red ring over teal waves",
    frames: Annotated[int, typer.Option(min=1, help="Latent frames.")] = 48,
    seed: SeedOpt = 1,
    threads: ThreadsOpt = None,
    json_only: JsonOpt = False,
) -> None:
    """Quantise, stream and profile the embedded model.

    Leaves a video with the full cache and one with absorption, contact sheets and a latency report.
    """
    from ispa_deploy.demo.prompts import parse_prompt
    from ispa_deploy.options import StreamOptions, check_options
    from ispa_deploy.run import Outputs
    from ispa_deploy.specs import SPECS

    options = StreamOptions(frames=frames, seed=seed)
    check_options(SPECS["demo"], options)
    parse_prompt(prompt)
    make_folder(out)
    say("1/3  quantise the embedded model")
    quantised = _quantise("demo", out / "bundle", "w8a8-int8", overwrite=True)
    machine = MachineFlags(allow_fallback=True, device="cpu", threads=threads)
    opened = _open(out / "bundle", machine)
    say(f'2/3  stream "{prompt}" twice: full cache, then ISPA')
    runs = {}
    for policy in ("full", "absorb"):
        outputs = Outputs(
            video=out / f"{policy}.mp4", sheet=out / f"{policy}.png", scale=opened.pixel_scale, label=policy
        )
        chosen = replace(options, policy=policy)
        runs[policy] = _run(opened, (prompt, []), None, chosen, outputs, FileFlags(), machine)
        print_run(runs[policy], err=True)
        if not runs[policy]["complete"]:
            raise KeyboardInterrupt
    say("3/3  profile: where the time of a steady chunk goes")
    from export.profiling import Compared

    report = _profile(opened, Compared(rounds=9, allow_fallback=True), True)
    write_reports(report, out)
    document = {"quantize": quantised, "runs": runs, "profile": report}
    emit(document, json_only, out / "demo.json", lambda: print_profile(report))


# -- composing


def _activations(asked: CalibrationFlags, seed: int, device: str) -> Activations:
    """What calibration is told, its text encoder opened."""
    if asked.tokenizer is not None and asked.text_encoder is None:
        raise InputError("--tokenizer goes with --text-encoder PATH: add it")
    from export.calibrate import Activations
    from export.companions import reader_of

    place = device_of(device)
    reader = None if asked.text_encoder is None else reader_of(asked.text_encoder, asked.tokenizer, place)
    return Activations(
        prompts=asked.calibrate, frames=asked.calibrate_frames, seed=seed, device=place, smooth=asked.smooth,
        alpha=asked.smooth_alpha, keep_sensitive=asked.keep_sensitive, reader=reader, report=asked.report,
    )  # fmt: skip


def _quantise(source: str, out: Path, scheme: str, **choices: Any) -> dict[str, Any]:
    from export.convert import quantise_source
    from export.hub import fetch, is_repository
    from export.onestep import one_step, summary_tables
    from quant import SCHEMES, resolve
    from quant.schemes import W8A8

    if is_repository(source):
        say(f"{source}: from the cache, or downloaded")
        fetched = fetch(source)
        source, choices["lora"] = str(fetched.path), choices.get("lora") or fetched.lora
    chosen, line = resolve(scheme, "cpu")
    say(line)
    candidates = [SCHEMES[name] for name in W8A8] if scheme == "w8a8" else [chosen]
    folder, report = quantise_source(source, out, scheme=chosen, candidates=candidates, say=say, **choices)
    say(report.summary())
    if report.plan is not None:
        say(report.plan.summary())
        if report.plan.timings:
            print_table(*report.plan.table(), err=True)
    document = {"bundle": str(folder), "scheme": chosen.name, **report.as_dict()}
    if (errors := one_step(folder)) is not None:
        for table in summary_tables(errors):
            print_table(*table, err=True)
        document["one_step"] = errors
    return document


def _open(folder: Path, machine: MachineFlags, prompt_embeds: Path | None = None) -> Bundle:
    """A bundle on its device, with the process set up for it."""
    from quant import tune_allocator

    place = device_of(machine.device)
    if machine.tune_allocator and place.type == "cpu":
        tune_allocator()
    import torch

    if machine.threads is not None:
        torch.set_num_threads(machine.threads)
    from export.bundle import open_bundle

    return open_bundle(
        folder, device=place, dtype=dtype_of(machine.dtype), prompt_embeds=prompt_embeds,
        allow_fallback=machine.allow_fallback,
    )  # fmt: skip


def _accompanied(bundle: Bundle, networks: NetworkFlags, offload: bool) -> Bundle:
    """The bundle with the networks around it that the user named."""
    if networks.text_encoder is None and (networks.tokenizer or networks.prompt_cache):
        raise InputError("--tokenizer and --prompt-cache go with --text-encoder PATH: add it")
    if networks == NetworkFlags():
        return bundle
    from export.companions import accompany

    return accompany(
        bundle, text_encoder=networks.text_encoder, tokenizer=networks.tokenizer, prompt_cache=networks.prompt_cache,
        vae=networks.vae, decoder=networks.decoder, offload=offload,
    )  # fmt: skip


def _timeline(prompts: PromptFlags, spec: ModelSpec, options: StreamOptions) -> tuple[str, list[tuple[int, str]]]:
    """The first prompt and (frame, later prompt); options, and where each prompt lands, are checked before anything is
    loaded."""
    from ispa_deploy.options import check_options
    from ispa_deploy.prompts import cues, dropped, plan_prompts, read_prompts
    from ispa_deploy.stream import plan_chunks

    running = check_options(spec, options)
    later = [switch_of(text, options.frames) for text in prompts.at or ()]
    if prompts.prompts is not None:
        later += read_prompts(prompts.prompts, options.frames)
    opening = prompts.prompt if prompts.prompt_embeds is None else prompts.prompt_embeds.name
    first, later = plan_prompts(opening, later)
    planned = cues(first, later, plan_chunks(running, options.frames))
    for line in dropped(later, planned):
        say(f"note: {line}")
    return first, later


def _run(
    bundle: Bundle, timeline: tuple[str, list[tuple[int, str]]], scene: Scene | None, options: StreamOptions,
    outputs: Outputs, files: FileFlags, machine: MachineFlags, *, live: bool = False, initial: Path | None = None,
    image: Path | None = None, kept: bool = True,
) -> dict[str, Any]:  # fmt: skip
    from export.deltas import load_deltas, save_deltas_of
    from export.initial import read_start
    from ispa_deploy.media.output import output_path
    from ispa_deploy.prompts import LivePrompts, cues
    from ispa_deploy.run import run_stream, stop_on_interrupt
    from quant.audit import audit, slow_kernels

    save_deltas = files.save_deltas
    if save_deltas is not None:
        output_path(save_deltas, ".safetensors", "deltas")
        if outputs.latents is not None and save_deltas.absolute() == outputs.latents.absolute():
            raise InputError(f"--latents and --save-deltas are both '{save_deltas}': give them two names")
    first, later = timeline
    stored = load_deltas(files.deltas, base_sha256=bundle.base_sha256, spec=bundle.spec) if files.deltas else None
    start = read_start(initial, image, bundle, options, say)
    stream = bundle.stream(first, options, deltas=stored, switches=later, initial=start, scene=scene)
    if stream.cache.coded_attention and not machine.allow_fallback:
        stream.cache.coded_attention.assert_will_run()
    planned = cues(first, later, stream.chunks)
    if save_deltas is not None:
        check_deltas_to_come(stream)
    for cue in planned[1:]:
        say(cue.line(len(stream.chunks)))
    for line in (*slow_kernels(bundle.model), *_without_kernels(bundle.model)):
        say(f"note: {line}")
    if not kept:
        say("note: nothing of this run is kept: name --out VIDEO.mp4 or --latents FILE")
    typed = LivePrompts(sys.stdin.fileno(), bundle.text_rows, say) if live else None
    launched = _launched(stream, machine)
    with stop_on_interrupt() as stop, progress_bar() as show:
        border = (lambda index: typed.follow(stream, index)) if typed else (lambda _: None)
        document = run_stream(
            stream, outputs, on_progress=show, stop=stop, on_border=border, overlap=machine.overlap_decode
        )
    lines = _tell(launched)
    for note in document["absorption"]["notes"]:
        say(f"note: {note}")
    if save_deltas is not None and (stream.absorber.deltas or document["complete"]):
        save_deltas_of(save_deltas, stream.absorber, base_sha256=bundle.base_sha256)
        document["outputs"]["deltas"] = str(save_deltas)
    warnings = _ran(bundle, stream, machine.allow_fallback)
    return {
        "prompt": first,
        "prompts": [cue.to_dict() for cue in (*planned, *(typed.cues if typed else ()))],
        "seed": options.seed,
        "bundle": str(bundle.folder),
        **document,
        **lines,
        "audit": audit(bundle.model, {layer.name: layer.why for layer in bundle.manifest.layers}),
        "audit_warnings": warnings,
    }


def _ran(bundle: Bundle, stream: Stream, allow_fallback: bool) -> list[str]:
    """RunError where 8 bits were asked for and did not run; the lines, said as warnings, where that is allowed."""
    from quant.audit import assert_ran

    warnings = assert_ran(bundle.model, bundle.manifest.quantised, allow_fallback=allow_fallback)
    if stream.cache.coded_attention:
        warnings += stream.cache.coded_attention.assert_ran(allow_fallback=allow_fallback)
    for warning in warnings:
        say(f"warning: {warning}")
    return warnings


def _launched(stream: Stream, machine: MachineFlags) -> dict[str, CompiledStages | PassGraphs | None]:
    """How a stream's work reaches the device beyond one kernel at a time, by the names of the report."""
    from ispa_deploy.compiled import compile_
    from ispa_deploy.graphs import PassGraphs

    stream.graphs = PassGraphs.on(stream.cache) if machine.cuda_graphs else None
    return {"compiled": compile_(stream.model) if machine.compiled else None, "cuda_graphs": stream.graphs}


def _tell(launched: dict[str, CompiledStages | PassGraphs | None]) -> dict[str, str | None]:
    """Say what became of each, after the run; the same lines for the report."""
    lines = {name: None if how is None else how.describe() for name, how in launched.items()}
    for line in filter(None, lines.values()):
        say(line)
    return lines


def _profile(bundle: Bundle, asked: Compared, mid: bool, load_ms: float | None = None) -> dict[str, Any]:
    from export.profiling import profile_bundle, profile_geometry
    from ispa_deploy.profile.environment import wide_vectors

    command = " ".join(["ispa-deploy", *sys.argv[1:]])
    for line in _without_kernels(bundle.model):
        say(f"note: {line}")
    reports = [profile_bundle(bundle, asked, command=command, load_ms=load_ms)]
    if mid and bundle.spec.name == "demo":
        narrow = bundle.model.device.type == "cpu" and not wide_vectors()
        layers = MID_LAYERS_NARROW if narrow else MID_LAYERS
        say(f"the mid geometry, {layers} layers of random weights: wide enough for 8 bits to pay")
        for line in _without_kernels(bundle.model, "bfloat16"):
            say(f"note: {line}")
        fewer = replace(asked, rounds=3)
        reports.append(profile_geometry("mid", bundle.model.device, fewer, layers=layers, command=command))
    return {"command": command, "reports": reports}


def _without_kernels(model: CausalWanDiT, dtype: str | None = None) -> list[str]:
    """What a user should know who has no C compiler; `dtype`: of another model on the same device."""
    import torch

    from ispa_deploy.native import missed

    line = missed(model.device, model.dtype if dtype is None else getattr(torch, dtype))
    return [] if line is None else [line]


def main() -> None:
    """Entry point: what went wrong on purpose, or is the machine's, becomes one line and an exit code."""
    try:
        code = app(sys.argv[1:] or ["--help"], prog_name="ispa-deploy", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except Exception as error:
        told = _told(error)
        if told is None:
            raise
        code, line = told
        say(f"error: {' '.join(line.split())}")
    if code == INTERRUPTED:
        say("interrupted")
    sys.exit(code)


def _told(error: Exception) -> tuple[int, str] | None:
    """Exit code and line for an error that a user can act upon; None for our own slips."""
    if isinstance(error, IspaError):
        return error.exit_code, str(error)
    if isinstance(error, UsageError):
        where = error.ctx.command_path if error.ctx else "ispa-deploy"
        return 2, f"{error.format_message().rstrip('.')}; see `{where} --help`"
    if isinstance(error, OSError):
        return 1, f"{error.strerror or error}: {error.filename or 'an output'}"
    from ispa_deploy.run import out_of_memory

    if out_of_memory(error):
        reason = str(error).partition("\n")[0]
        return 1, f"out of memory ({reason}); 8 bits (quantize --scheme w8a8) hold the linears in half of bfloat16"
    return None


if __name__ == "__main__":
    main()
