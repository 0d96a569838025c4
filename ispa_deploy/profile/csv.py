"""A report as CSV: one line per run, one column per number."""

from __future__ import annotations

import csv as writer
import io
from typing import Any

from ispa_deploy.regions import FAMILIES, ROWS

_RUN = ("policy", "ratio", "recent", "scheme", "delta")
_NUMBERS = (
    "wall_ms", "unattributed_ms", "instrumented_over_plain", "speedup", "attention_speedup", "linear_speedup",
    "kv_percent",
)  # fmt: skip
_CHUNK = ("median", "p90", "p99", "min", "spread", "n")
_MEMORY = ("weights", "kv_persistent", "kv_scratch", "deltas", "statistics", "peak")
_FPS = ("dit", "with_vae", "wall")


def csv(document: dict[str, Any]) -> str:
    """Runs x components of all reports: times in ms, memory in bytes; what was not measured is an empty cell."""
    lines = [_line(report, run) for report in document["reports"] for run in report["runs"]]
    text = io.StringIO()
    table = writer.DictWriter(text, fieldnames=list(lines[0]) if lines else [], lineterminator="\n")
    table.writeheader()
    table.writerows(lines)
    return text.getvalue()


def _line(report: dict[str, Any], run: dict[str, Any]) -> dict[str, Any]:
    model, env = report["model"], report["env"]
    return {
        "model": model["name"],
        "dtype": model["dtype"],
        "window": model["window"],
        "hardware": env["gpu"] or env["cpu"],
        "threads": env["threads"],
        "torch": env["torch"],
        "clock": env.get("clock"),
        "run": run["name"],
        **{name: run[name] for name in _RUN},
        **{f"chunk_ms.{name}": run["chunk_ms"].get(name) for name in _CHUNK},
        **{name: run[name] for name in _NUMBERS},
        **{family: run["families"][family] for family in FAMILIES},
        **{row: run["components"].get(row, 0.0) for row in ROWS},
        **{f"memory.{name}": run["memory"][name] for name in _MEMORY},
        **{f"fps.{name}": run["fps"][name] for name in _FPS},
    }
