"""The report of a bundle's errors against the model that it was made from, pass by pass and linear by linear."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from export.bundle import open_bundle
from export.calibrate import Activations, Known, default_frames
from export.prompts import text_rows
from export.sources import Say
from ispa_deploy.evaluate.onestep import one_step_errors
from ispa_deploy.media.output import replace_text
from ispa_deploy.model import CausalWanDiT
from quant.smooth import smooth_

ONE_STEP = "one-step.json"
# Of the layers, worst first, that a summary shows.
SHOWN_LAYERS = 5
# As many are enough for errors of a step: each gives a hundred and more passes.
PROMPTS = 2


def report_errors(folder: Path, original: CausalWanDiT, known: Known, request: Activations, say: Say) -> dict[str, Any]:
    """One-step errors of the bundle in `folder` against `original`, written into it as `one-step.json`.

    The file belongs to no identity: the bundle is the same with and without it. The noise is not that of calibration.
    """
    place = torch.device(request.device)
    bundle = open_bundle(folder, device=place, verify=False, allow_fallback=True)
    smooth_(original, known.smooth.folded())  # the cache holds the smoothed values; the outputs are the same bits
    original.to(place, bundle.model.dtype)
    texts, _ = text_rows(bundle.spec, bundle.manifest.source.kind, request.prompts, request.reader)
    frames = request.frames or default_frames(bundle.spec)
    document = one_step_errors(original, bundle.model, texts[:PROMPTS], frames=frames, seed=request.seed + 1000)
    weights = {layer.name: layer.sqnr_db for layer in bundle.manifest.layers}
    for row in document["layers"]:
        row["weight_sqnr_db"] = weights[row["name"]]
    document = {"scheme": bundle.manifest.scheme, "smooth": request.smooth, **document}
    replace_text(folder / ONE_STEP, json.dumps(document, indent=1, allow_nan=False) + "\n")
    pooled, worst = document["model"]["pooled"], "no linear in 8 bits"
    if document["layers"]:
        first = document["layers"][0]
        worst = f"worst linear {first['name']}, {first['pooled']['sqnr_db']:.1f} dB"
    say(
        f"one step against {document['dtype']}: relative L2 {pooled['relative_l2']:.4f}, cosine "
        f"{pooled['cosine']:.5f}; {worst}; all in {folder / ONE_STEP}"
    )
    return document


def one_step(folder: Path) -> dict[str, Any] | None:
    """`one-step.json` of a bundle without its tables by pass; None where it was not asked for."""
    if not (folder / ONE_STEP).is_file():
        return None
    document: dict[str, Any] = json.loads((folder / ONE_STEP).read_text(encoding="utf-8"))
    model = {name: document["model"][name] for name in ("pooled", "chunks")}
    layers = [
        {"name": row["name"], "weight_sqnr_db": row["weight_sqnr_db"], **row["pooled"]} for row in document["layers"]
    ]
    rest = {name: value for name, value in document.items() if name != "passes"}
    return {**rest, "model": model, "layers": layers}


def summary_tables(summary: dict[str, Any]) -> list[tuple[tuple[str, ...], list[tuple[str, ...]]]]:
    """For a terminal: header and rows of the whole model by chunk, and of the worst layers."""
    chunks: list[tuple[str, ...]] = [
        (str(row["chunk"]), f"{row['relative_l2']:.4f}", f"{row['cosine']:.5f}") for row in summary["model"]["chunks"]
    ]
    layers: list[tuple[str, ...]] = [
        (row["name"], _decibels(row["weight_sqnr_db"]), _decibels(row["sqnr_db"]), f"{row['relative_l2']:.4f}")
        for row in summary["layers"][:SHOWN_LAYERS]
    ]
    return [
        (("chunk", "one-step relative L2", "cosine"), chunks),
        (("worst layers", "weight dB", "output dB", "relative L2"), layers),
    ]


def _decibels(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"
