"""A report as one HTML page that needs nothing else: no script, no font, no address; light and dark, wide and narrow.

The first screen answers four questions for somebody who never saw this project: how much faster, where that comes from,
what limits it, and on which hardware; what speaks against the numbers stands beside them.
"""

from __future__ import annotations

from html import escape
from importlib import resources
from typing import Any

from ispa_deploy.profile.charts import stacked_bars
from ispa_deploy.profile.details import base_run, best_run, hardware, model_line, section, span, title
from ispa_deploy.profile.grids import milliseconds
from ispa_deploy.profile.paper import FIGURE_RUNS, PUBLISHED
from ispa_deploy.regions import FAMILIES

Report = dict[str, Any]
Run = dict[str, Any]

SAME = 1.03
"""Below this (and above its inverse) two times are called the same."""


def html(document: dict[str, Any]) -> str:
    """The page of what `profile` writes: `{"command", "reports"}`."""
    style = (resources.files("ispa_deploy.profile") / "assets" / "report.css").read_text(encoding="utf-8")
    reports: list[Report] = document["reports"]
    cards = "".join(_card(report, number) for number, report in enumerate(reports))
    sections = "".join(section(report, number) for number, report in enumerate(reports))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Latency report</title>\n<style>\n{style}</style></head>\n<body><main>\n"
        "<h1>How fast is this video model, and why not faster?</h1>\n"
        "<p>The model makes a video in chunks of a few frames. <b>ISPA</b> makes some of its layers local: they forget "
        "old frames, and what those contributed is absorbed into the weights, so attention has less to read. "
        "<b>W8A8</b> computes the linear layers in 8 bits. The <b>full cache</b> does neither. Below: what each does "
        "to the time of one chunk.</p>\n"
        f'<div class="cards">{cards}</div>\n{sections}\n</main></body></html>\n'
    )


# -- the first screen


def _card(report: Report, number: int) -> str:
    base, best = base_run(report), best_run(report)
    if best is None:
        big, line, origin = "Baseline only", f"{milliseconds(base['chunk_ms']['median'])} ms per chunk", "-"
    else:
        big = _headline(best["speedup"])
        line = _times(report, base, best)
        origin = _origin(base, best)
    facts = {
        "Where it comes from": origin,
        "What limits it": _limit(report, best or base),
        "Memory": _memory(base, best or base),
        "Measured on": escape(hardware(report)),
    }
    pairs = "".join(f"<dt>{name}</dt><dd>{text}</dd>" for name, text in facts.items())
    return (
        f'<div class="card"><p class="eyebrow">{escape(model_line(report))}</p><p class="big">{big}</p><p>{line}</p>'
        f"{_caution(report, number)}<dl>{pairs}</dl><h3>Time of one chunk</h3>"
        f"{stacked_bars(report['runs'], [title(run) for run in report['runs']])}"
        '<p class="soft small">Attention: reading this chunk, frames before it and the prompt. Linear: matrix products '
        "with the model's weights. Overhead: everything else, from norms to Python. Bars: a chunk with every step "
        "timed. Speed-ups: chunks timed as a whole.</p></div>"
    )


def _headline(speedup: float) -> str:
    if 1 / SAME < speedup < SAME:
        return f"{speedup:.2f}× <small>as fast as before</small>"
    return f"{speedup:.2f}× <small>the speed of the full cache</small>"


def _times(report: Report, base: Run, best: Run) -> str:
    """What a chunk takes with and without, and what that is in video."""
    text = (
        f"{escape(title(best))} takes {span(best)} for a chunk of {report['model']['chunk_frames']} latent frames, "
        f"{escape(title(base)).lower()} {span(base)}: {_fps(best)} frames of video per second, not {_fps(base)}."
    )
    published = next((run for run in report["runs"] if run["name"] == PUBLISHED), None)
    if published is None:
        return text
    gain = f"{best['speedup_published']:.2f}×"
    return f"{text} That is {gain} the speed of the published loop in plain PyTorch, {span(published)}."


def _fps(run: Run) -> str:
    """Frames of video per second: with decoding where it was timed."""
    return f"{run['fps']['with_vae'] or run['fps']['dit']:.3g}"


def _origin(base: Run, run: Run) -> str:
    """What each family gained or lost, as recorded; the largest gain first."""
    recorded = base["wall_ms"] / run["wall_ms"]
    if (recorded - 1) * (run["speedup"] - 1) < 0 and max(recorded, 1 / recorded) > SAME:
        return f"unclear: by the recorded chunks the speed-up would be {recorded:.2f}×; measure on a quiet machine"
    saved = {family: base["families"][family] - run["families"][family] for family in FAMILIES}
    parts = [
        f"{milliseconds(abs(ms))} ms {'less' if ms > 0 else 'more'}: {_means(family, run)}"
        for family, ms in sorted(saved.items(), key=lambda pair: -pair[1])
        if abs(ms) > 0.005 * base["wall_ms"]
    ]
    return "<br>".join(parts) or "nothing changed by more than 0.5 % of the chunk"


def _means(family: str, run: Run) -> str:
    """What this run did to a family, in words for somebody who knows none of them."""
    if family == "attention" and run["ratio"]:
        return "attention reads fewer frames"
    if family == "linear" and run["scheme"] != "none":
        return "linear layers in 8 bits"
    return {"attention": "attention", "linear": "linear layers"}.get(family, "everything else")


def _limit(report: Report, run: Run) -> str:
    law = report["amdahl"]
    largest = max(FAMILIES, key=run["families"].__getitem__)
    share = 100 * run["families"][largest] / run["wall_ms"]
    text = f"{largest.capitalize()} is {share:.0f} % of what is left. "
    if law["attention_ceiling"] == 1:
        return text
    ispa = next(run for run in report["runs"] if run["name"] == FIGURE_RUNS["overall"])
    return text + (
        f"With {100 * ispa['ratio']:.0f} % of the layers local (ISPA), self-attention gets "
        f"{law['attention_ceiling']:.2f}× faster at most; it is {100 * law['attention_share']:.0f} % of the full "
        f"cache's chunk, so that alone makes the chunk {law['ceiling']:.2f}× faster at most."
    )


def _memory(base: Run, run: Run) -> str:
    weights = 100 * run["memory"]["weights"] / base["memory"]["weights"]
    return f"Keys and values: {run['kv_percent']:.0f} % of the full cache. Weights: {weights:.0f} % of the baseline's."


def _caution(report: Report, number: int) -> str:
    found = report["warnings"]
    if not found:
        return ""
    count = "A warning stands" if len(found) == 1 else f"{len(found)} warnings stand"
    return (
        f'<div class="warnings"><strong>{count} against these numbers</strong>{escape(found[-1])}. '
        f'<a href="#warnings-{number}">All of them</a></div>'
    )
