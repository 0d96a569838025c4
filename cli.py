"""The command line: parse, compose, call, print. Nothing is computed here and `--help` imports no torch.

Every command ends with exit code 0 (done), 1 (the run failed) or 2 (bad input, one line on stderr). With `--json`
stdout carries exactly one JSON document; everything for people goes to stderr.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ispa_deploy import __version__
from ispa_deploy.errors import InputError, IspaError

if TYPE_CHECKING:
    import torch

    from export.bundle import Bundle
    from ispa_deploy.options import StreamOptions
    from ispa_deploy.run import Progress

app = typer.Typer(
    name="ispa-deploy",
    help="Quantise, stream and profile autoregressive video models with parametric absorption of their history (ISPA).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

MID_LAYERS = 4  # layers of the mid geometry that `profile` times: each costs the same, and the demo has minutes

BundleArg = Annotated[Path, typer.Argument(help="Folder written by `quantize`.", show_default=False)]
JsonOpt = Annotated[bool, typer.Option("--json", help="One JSON document on stdout; progress goes to stderr.")]
StatsOpt = Annotated[Path | None, typer.Option("--stats", help="Also write the JSON document to this file.")]
DeviceOpt = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
DtypeOpt = Annotated[str, typer.Option(help="auto, bfloat16, float16 or float32: what is not quantised runs in it.")]
ThreadsOpt = Annotated[int | None, typer.Option(min=1, help="CPU threads; default: torch's own choice.")]
TuneOpt = Annotated[bool, typer.Option(help="On glibc, keep freed memory for reuse: faster, larger resident set.")]


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        typer.echo(f"ispa-deploy {__version__}")
        raise typer.Exit


@app.command()
def models(json_only: JsonOpt = False) -> None:
    """List the models this version knows: geometry, window, source and licence note."""
    from ispa_deploy.specs import SPECS

    if json_only:
        _print_json([spec.to_dict() for spec in SPECS.values()])
        return
    rows = [
        (
            spec.name,
            f"{spec.layers} x {spec.dim}",
            f"{spec.heads} x {spec.head_dim}",
            str(spec.frame_tokens),
            f"{spec.window_frames} / {spec.sink_frames} / {spec.chunk_frames}",
            spec.rope,
        )
        for spec in SPECS.values()
    ]
    _print_table(("model", "layers", "heads", "tokens/frame", "window/sink/chunk", "rope"), rows)
    for spec in SPECS.values():
        typer.echo(f"{spec.name}: {spec.source} ({spec.licence})")


@app.command()
def quantize(
    source: Annotated[str, typer.Argument(help="`demo`, `random`, or a checkpoint: .safetensors, .pt, a folder.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="The bundle's folder.")],
    model: Annotated[str | None, typer.Option(help="Model of the table; default: as the checkpoint looks.")] = None,
    scheme: Annotated[str, typer.Option(help="w8a8 (best here), w8a8-int8 or none.")] = "w8a8",
    skip: Annotated[
        list[str] | None, typer.Option(help="Regex of linears to keep in floating point; repeatable.")
    ] = None,
    lora: Annotated[Path | None, typer.Option(help="LoRA file (.pt, .safetensors) to merge first.")] = None,
    lora_alpha: Annotated[
        float | None, typer.Option(help="Its alpha; default: the published one (LiveAvatar 64, others their rank).")
    ] = None,
    dtype: DtypeOpt = "auto",
    seed: Annotated[int, typer.Option(help="Seed of `random` weights.")] = 0,
    overwrite: Annotated[bool, typer.Option(help="Replace an existing bundle.")] = False,
    json_only: JsonOpt = False,
    stats: StatsOpt = None,
) -> None:
    """Apply W8A8 post-training quantisation and write a safetensors bundle."""
    from export.convert import quantise_source
    from quant import resolve

    chosen, line = resolve(scheme, "cpu")
    _say(line)
    folder, report = quantise_source(
        source, out, scheme=chosen, model=model, skip=skip or (), lora=lora, lora_alpha=lora_alpha,
        dtype=_dtype(dtype), seed=seed, overwrite=overwrite, say=_say,
    )  # fmt: skip
    _say(report.summary())
    document = {"bundle": str(folder), "scheme": chosen.name, **report.as_dict()}
    _emit(document, json_only, stats, lambda: typer.echo(f"bundle: {folder}"))


@app.command()
def run(
    bundle: BundleArg,
    prompt: Annotated[str, typer.Option(help="What to show.")] = "a fast red ring over teal waves",
    prompt_embeds: Annotated[
        Path | None, typer.Option(help="Text rows from a safetensors file, for models without a text encoder here.")
    ] = None,
    at: Annotated[list[str] | None, typer.Option(help="FRAME:PROMPT, a later prompt; repeatable.")] = None,
    frames: Annotated[int, typer.Option(min=1, help="Latent frames, a multiple of the chunk.")] = 21,
    seed: Annotated[int, typer.Option(help="Same seed, same video, on one device.")] = 0,
    policy: Annotated[str, typer.Option(help="absorb, full, window, sink-local (no absorb), no-sink.")] = "absorb",
    preset: Annotated[str, typer.Option(help="tuned or paper.")] = "tuned",
    ratio: Annotated[float, typer.Option(help="Share of layers that become local.")] = 0.5,
    layers: Annotated[str | None, typer.Option(help="Exactly these layers become local, e.g. 0,3,7.")] = None,
    warmup: Annotated[int | None, typer.Option(help="Warm-up in frames (T_warm).")] = None,
    recent_frames: Annotated[int, typer.Option(help="Recent frames that local layers also keep.")] = 0,
    window: Annotated[int | None, typer.Option(help="Window in frames, with --policy window.")] = None,
    ridge_absolute: Annotated[float | None, typer.Option(help="λ itself (the paper's 0.001).")] = None,
    ridge_relative: Annotated[float | None, typer.Option(help="ρ in λ = ρ · tr(G) / D.")] = None,
    ranking: Annotated[str | None, typer.Option(help="epsilon, heldout or random.")] = None,
    delta: Annotated[str, typer.Option(help="auto, side, requant or fold.")] = "auto",
    save_deltas: Annotated[Path | None, typer.Option(help="Write the stream's deltas here (.safetensors).")] = None,
    deltas: Annotated[Path | None, typer.Option(help="Start with stored deltas, without a warm-up.")] = None,
    stats_device: Annotated[
        str | None, typer.Option(help="Where statistics are summed; `cpu` saves GPU memory.")
    ] = None,
    attention: Annotated[str, typer.Option(help="Attention backend; auto is the best that runs here.")] = "auto",
    out: Annotated[Path | None, typer.Option(help="Video (.mp4).")] = None,
    sheet: Annotated[Path | None, typer.Option(help="Contact sheet (.png); default: beside the video.")] = None,
    latents: Annotated[Path | None, typer.Option(help="Latents (.safetensors).")] = None,
    device: DeviceOpt = "auto",
    dtype: DtypeOpt = "auto",
    threads: ThreadsOpt = None,
    tune_allocator: TuneOpt = True,
    json_only: JsonOpt = False,
    stats: StatsOpt = None,
) -> None:
    """Stream a video from a bundle: warm up, absorb, go on with less memory."""
    from ispa_deploy.options import StreamOptions
    from ispa_deploy.run import Outputs

    options = StreamOptions(
        frames=frames, seed=seed, policy=policy, preset=preset, ratio=ratio, layers=_integers(layers), warmup=warmup,
        recent_frames=recent_frames, window=window, ridge_absolute=ridge_absolute, ridge_relative=ridge_relative,
        ranking=ranking, delta=delta, stats_device=stats_device, backend=attention,
    )  # fmt: skip
    opened = _open(bundle, device, dtype, threads, tune_allocator, prompt_embeds)
    if sheet is None and out is not None:
        sheet = out.with_suffix(".png")
    outputs = Outputs(video=out, sheet=sheet, latents=latents, scale=opened.pixel_scale, label=prompt)
    document = _run(opened, prompt, options, outputs, at or [], deltas, save_deltas)
    _emit(document, json_only, stats, lambda: _print_run(document))


@app.command()
def profile(
    bundle: BundleArg,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Folder for report.json and report.md.")] = None,
    rounds: Annotated[int, typer.Option(min=3, help="Steady chunks timed per configuration.")] = 7,
    ratio: Annotated[float, typer.Option(help="Share of layers that are local.")] = 0.5,
    recent_frames: Annotated[int, typer.Option(help="Recent frames that local layers also keep.")] = 0,
    mid: Annotated[bool, typer.Option(help="Also profile the mid geometry (random weights), where 8 bits pay.")] = True,
    device: DeviceOpt = "auto",
    dtype: DtypeOpt = "auto",
    threads: ThreadsOpt = None,
    tune_allocator: TuneOpt = True,
    json_only: JsonOpt = False,
    stats: StatsOpt = None,
) -> None:
    """Break a steady chunk's latency into attention, linear and overhead, configurations side by side."""
    opened = _open(bundle, device, dtype, threads, tune_allocator, None)
    document = _profile(opened, rounds, ratio, recent_frames, mid)
    _write_reports(document, out)
    _emit(document, json_only, stats, lambda: _print_profile(document))


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
    """Compare absorption with full cache, no absorption, no sink and random layers on the demo model."""
    from ispa_deploy.evaluate.command import run_evaluation
    from ispa_deploy.evaluate.table import markdown

    opened = _open(bundle, "cpu", "float32", threads, True, None)
    command = " ".join(["ispa-deploy", *sys.argv[1:]])
    document = run_evaluation(opened.model, count=pairs, frames=frames, readme=readme, command=command)
    _emit(document, json_only, stats, lambda: typer.echo(markdown(document)))


@app.command()
def inspect(path: Annotated[Path, typer.Argument(help="A bundle, a delta file or any safetensors file.")],
            json_only: JsonOpt = False) -> None:  # fmt: skip
    """Look inside a bundle or a delta file without loading its tensors."""
    from export.inspect import describe

    document = describe(path)
    _emit(document, json_only, None, lambda: _print_mapping(document))


@app.command()
def export(
    source: Annotated[Path, typer.Argument(help="A bundle; with --from, a file in a dialect.", show_default=False)],
    out: Annotated[Path, typer.Option("-o", "--out", help="File (.safetensors) or folder to write.")],
    to: Annotated[
        str | None, typer.Option(help="bitsandbytes, torchao, comfyui, diffusers (a folder) or lightx2v.")
    ] = None,
    origin: Annotated[str | None, typer.Option("--from", help="Make a bundle from this dialect, or auto.")] = None,
    model: Annotated[str | None, typer.Option(help="With --from: the model of a file made elsewhere.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace what is there.")] = False,
    json_only: JsonOpt = False,
) -> None:
    """Write a bundle in another reader's dialect, or a bundle from one."""
    from export.dialects import export_bundle, import_dialect

    if to is not None and origin is None and model is None:
        written = export_bundle(source, to, out, overwrite=overwrite)
    elif origin is not None and to is None:
        written = import_dialect(source, origin, out, model=model, overwrite=overwrite)
    else:
        raise InputError("export needs one of --to DIALECT and --from DIALECT; --model goes with --from only")
    document = {"source": str(source), "dialect": to or origin, "path": str(written)}
    _emit(document, json_only, None, lambda: typer.echo(f"written: {written}"))


@app.command()
def demo(
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for everything the demo makes.")] = Path("demo-out"),
    prompt: Annotated[str, typer.Option(help="What to show.")] = "a fast red ring over teal waves",
    frames: Annotated[int, typer.Option(min=1, help="Latent frames.")] = 48,
    seed: Annotated[int, typer.Option(help="Same seed, same video.")] = 1,
    threads: ThreadsOpt = None,
    json_only: JsonOpt = False,
) -> None:
    """Quantise, stream with absorption and profile the embedded model: video, contact sheet and latency report."""
    from ispa_deploy.options import StreamOptions
    from ispa_deploy.run import Outputs

    out.mkdir(parents=True, exist_ok=True)
    _say("1/3  quantise the embedded model")
    quantize("demo", out / "bundle", overwrite=True, json_only=json_only, stats=out / "quantize.json")
    opened = _open(out / "bundle", "cpu", "auto", threads, True, None)
    _say(f'2/3  stream "{prompt}" twice: full cache, then ISPA')
    runs = {}
    for policy in ("full", "absorb"):
        outputs = Outputs(
            video=out / f"{policy}.mp4", sheet=out / f"{policy}.png", scale=opened.pixel_scale, label=policy
        )
        options = StreamOptions(frames=frames, seed=seed, policy=policy)
        runs[policy] = _run(opened, prompt, options, outputs, [], None, None)
        _print_run(runs[policy], err=True)
    _say("3/3  profile: where the time of a steady chunk goes")
    report = _profile(opened, 9, 0.5, 0, True)
    _write_reports(report, out)
    document = {"runs": runs, "profile": report}
    _emit(document, json_only, out / "demo.json", lambda: _print_profile(report))


# -- composing


def _open(folder: Path, device: str, dtype: str, threads: int | None, tune: bool, prompt_embeds: Path | None) -> Bundle:
    """A bundle on its device, with the process set up for it."""
    from quant import tune_allocator

    place = _device(device)
    if tune and place.type == "cpu":
        tune_allocator()
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
    from export.bundle import open_bundle

    return open_bundle(folder, device=place, dtype=_dtype(dtype), prompt_embeds=prompt_embeds)


def _run(
    bundle: Bundle, prompt: str, options: StreamOptions, outputs: Any, later: list[str],
    deltas: Path | None, save_deltas: Path | None,
) -> dict[str, Any]:  # fmt: skip
    from export.deltas import load_deltas, save_deltas_of
    from ispa_deploy.media.output import output_path
    from ispa_deploy.run import run_stream, stop_on_interrupt
    from quant.audit import audit

    if save_deltas is not None:
        output_path(save_deltas, ".safetensors", "deltas")
    stored = load_deltas(deltas, base_sha256=bundle.base_sha256, spec=bundle.spec) if deltas else None
    switches = [_switch(text) for text in later]
    stream = bundle.stream(prompt, options, deltas=stored, switches=switches)
    with stop_on_interrupt() as stop, _progress_bar() as show:
        document = run_stream(stream, outputs, on_progress=show, stop=stop)
    for note in document["absorption"]["notes"]:
        _say(f"note: {note}")
    if save_deltas is not None:
        save_deltas_of(save_deltas, stream.absorber, base_sha256=bundle.base_sha256)
        document["outputs"]["deltas"] = str(save_deltas)
    return {
        "prompt": prompt,
        "seed": options.seed,
        "bundle": str(bundle.folder),
        **document,
        "audit": audit(bundle.model),
    }


def _profile(bundle: Bundle, rounds: int, ratio: float, recent: int, mid: bool) -> dict[str, Any]:
    from export.profiling import profile_bundle, profile_geometry

    command = " ".join(["ispa-deploy", *sys.argv[1:]])
    reports = [profile_bundle(bundle, rounds=rounds, ratio=ratio, recent=recent, command=command)]
    if mid and bundle.spec.name == "demo":
        _say(f"the mid geometry, {MID_LAYERS} layers of random weights: wide enough for 8 bits to pay")
        reports.append(
            profile_geometry(
                "mid", bundle.model.device, rounds=3, layers=MID_LAYERS, ratio=ratio, recent=recent, command=command
            )
        )
    return {"command": command, "reports": reports}


def _switch(text: str) -> tuple[int, str]:
    frame, colon, prompt = text.partition(":")
    if not colon or not frame.strip().isdigit():
        raise InputError(f"--at '{text}': expected FRAME:PROMPT, for example 24:a blue square")
    return int(frame), prompt.strip()


def _integers(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise InputError(f"--layers '{text}': expected numbers with commas, for example 0,3,7") from None


def _device(name: str) -> torch.device:
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"device '{name}': expected auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device '{name}': this torch sees no GPU; use --device cpu or install a CUDA build of torch")
    return device


def _dtype(name: str) -> torch.dtype | None:
    """None for auto: the bundle decides."""
    import torch

    known = {"auto": None, "bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
    if name not in known:
        raise InputError(f"dtype '{name}': expected one of {', '.join(known)}")
    return known[name]


# -- printing


def _say(line: str) -> None:
    typer.echo(line, err=True)


def _print_json(document: Any) -> None:
    typer.echo(json.dumps(document, indent=1, default=str))


def _emit(document: dict[str, Any], json_only: bool, stats: Path | None, show: Callable[[], None]) -> None:
    if stats is not None:
        from ispa_deploy.media.output import write_text

        write_text(stats, json.dumps(document, indent=1, default=str) + "\n")
    if json_only:
        _print_json(document)
    else:
        show()


def _print_table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(*header)
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def _print_mapping(document: dict[str, Any]) -> None:
    for key, value in document.items():
        typer.echo(f"{key}: {json.dumps(value, default=str) if isinstance(value, (dict, list)) else value}")


def _print_run(document: dict[str, Any], *, err: bool = False) -> None:
    fps, kv, absorption = document["fps"], document["kv"], document["absorption"]
    lines = [
        f"{document['pixel_frames']} pixel frames in {document['wall_s']:.1f} s: {fps['dit']:.2f} FPS DiT only, "
        f"{fps['with_vae']:.2f} with decoding, {fps['wall']:.2f} wall",
        f"KV cache {kv['persistent_bytes'] / 2**20:.2f} MiB, {kv['percent']:.1f} % of full; "
        f"local layers {absorption['local_layers'] or 'none'}",
        *(f"{name}: {path}" for name, path in document["outputs"].items()),
    ]
    for line in lines:
        typer.echo(line, err=err)


def _print_profile(document: dict[str, Any]) -> None:
    from rich.console import Console

    from ispa_deploy.profile.table import terminal

    for report in document["reports"]:
        Console().print(terminal(report))


def _write_reports(document: dict[str, Any], folder: Path | None) -> None:
    if folder is None:
        return
    from ispa_deploy.media.output import write_text
    from ispa_deploy.profile.table import markdown

    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "report.json", json.dumps(document, indent=1, default=str) + "\n")
    write_text(folder / "report.md", "\n\n".join(markdown(report) for report in document["reports"]) + "\n")


@contextmanager
def _progress_bar() -> Iterator[Callable[[Progress], None] | None]:
    """Chunk number, FPS, ETA, KV bytes and state on a terminal; nothing elsewhere."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("chunk"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.description}"))
    with Bar(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("warm-up", total=None)

        def show(at: Progress) -> None:
            text = f"{at.fps:.1f} FPS  ETA {at.eta:.0f} s  KV {at.kv_bytes / 2**20:.1f} MiB  {at.state}"
            bar.update(task, completed=at.chunk, total=at.chunks, description=text)

        yield show


def main() -> None:
    """Entry point: errors become one line and an exit code, never a traceback."""
    try:
        app()
    except IspaError as error:
        _say(f"error: {error}")
        sys.exit(error.exit_code)
    except MemoryError as error:
        _say(f"error: out of memory ({error}); try --scheme w8a8, --ratio 1 --recent-frames 3, or fewer pixels")
        sys.exit(1)
    except KeyboardInterrupt:
        _say("interrupted")
        sys.exit(130)
    except OSError as error:
        _say(f"error: {error.strerror or error}: {error.filename or 'an output'}; nothing half-written was left")
        sys.exit(1)


if __name__ == "__main__":
    main()
