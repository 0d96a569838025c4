"""The flags of `quantize`, in groups. Does not import torch by itself."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from ispa_deploy.flag_groups import DtypeOpt, ThreadsOpt

SourceArg = Annotated[
    str, typer.Argument(help="`demo`, `random`, a checkpoint (.safetensors, .pt, a folder), org/name to download.")
]
BundleOutOpt = Annotated[Path, typer.Option("-o", "--out", help="The bundle's folder.")]
OverwriteOpt = Annotated[bool, typer.Option(help="Replace an existing bundle.")]


@dataclass(frozen=True)
class CheckpointFlags:
    """What the weights are."""

    model: Annotated[str | None, typer.Option(help="Model of the table; default: as the checkpoint looks.")] = None
    lora: Annotated[Path | None, typer.Option(help="LoRA file (.pt, .safetensors) to merge first.")] = None
    lora_alpha: Annotated[
        float | None, typer.Option(help="Its alpha; default: the published one (LiveAvatar 64, others their rank).")
    ] = None
    seed: Annotated[int, typer.Option(help="Seed of `random` weights and of calibration's noise.")] = 0


@dataclass(frozen=True)
class PrecisionFlags:
    """How they are stored and multiplied."""

    scheme: Annotated[
        str,
        typer.Option(
            help="w8a8 (int8 where it runs), w8a8-int8, w8a8-int8-static, w8a16-int8, w8a8-fp8, bnb-int8 or none."
        ),
    ] = "w8a8"
    plan: Annotated[
        str, typer.Option(help="auto: per layer the fastest here that keeps its error small; FILE: that plan; none.")
    ] = "none"
    skip: Annotated[list[str] | None, typer.Option(help="Regex of linears to keep in floating point; repeatable.")] = (
        None
    )
    dtype: DtypeOpt = "auto"


@dataclass(frozen=True)
class CalibrationFlags:
    """Calibration."""

    calibrate: Annotated[
        Path | None, typer.Option(help="Prompts, one per line, to measure activations with; or a prompt-embeds file.")
    ] = None
    calibrate_frames: Annotated[
        int | None, typer.Option(min=1, help="Latent frames of each calibration stream; default: two windows.")
    ] = None
    smooth: Annotated[
        str, typer.Option(help="SmoothQuant: none; fold, where it is exact and free; all, also where layers multiply.")
    ] = "none"
    smooth_alpha: Annotated[float, typer.Option(help="Its strength: 0 balances nothing, 1 all for activations.")] = 0.5
    keep_sensitive: Annotated[
        float, typer.Option(help="Share of the weights to keep in floating point, where 8 bits harm the output most.")
    ] = 0.0
    report: Annotated[
        bool, typer.Option("--report", help="Measure the bundle against the original, one step at a time.")
    ] = False
    text_encoder: Annotated[
        Path | None, typer.Option(help="UMT5-XXL that reads the prompts of a checkpoint's calibration.")
    ] = None
    tokenizer: Annotated[Path | None, typer.Option(help="Its tokenizer's folder; default: beside it.")] = None


@dataclass(frozen=True)
class ConversionMachineFlags:
    """Machine."""

    device: Annotated[str, typer.Option(help="Where calibration and --report run: auto, cpu, cuda or cuda:N.")] = "cpu"
    threads: ThreadsOpt = None
