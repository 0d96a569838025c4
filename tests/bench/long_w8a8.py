"""`python -m tests.bench.long_w8a8`: the demo model over 100 chunks in 8 bits and in floating point, judged by itself.

Trajectories part within a few chunks, so nothing is compared frame by frame: each video is measured against its own
warm-up and the demo's known world, and the means over prompt-seed pairs are compared. A metric's verdict is `within`
where the 95 % interval of the difference (bootstrap over pairs) lies inside the margin, 2 % of the mean in floating
point; `worse` or `better` where it lies beyond 0 on one side and not inside; else `open`: too few pairs to say.

Long runs go in pieces: with `--parts FOLDER` every batch's metrics are kept there and not made again, by another recipe
neither, and `--stop-after SECONDS` ends after the batch at hand (exit 3), to go on with the same command.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from export import open_bundle, quantise_source
from export.calibrate import Activations
from export.sources import load_source
from ispa_deploy.demo.codec import BlockCodec
from ispa_deploy.demo.metrics import scene_report
from ispa_deploy.demo.prompts import embed, parse_prompt
from ispa_deploy.evaluate.aggregate import bootstrap, mean
from ispa_deploy.evaluate.variants import Pair, demo_pairs
from ispa_deploy.model import CausalWanDiT
from ispa_deploy.options import StreamOptions, open_stream
from ispa_deploy.precision import BITS
from ispa_deploy.profile.environment import environment
from ispa_deploy.profile.files import write_json
from quant import SCHEMES, assert_ran
from quant.schemes import Scheme
from quant.smooth import MODES

Rows = list[dict[str, float]]

WARMUP, MARGIN = 12, 0.02
FULL = "float32"
# Metrics of which more is worse; for the others less is.
_COSTS = ("flicker",)
_SHOWN = ("background_psnr", "flicker", "present", "shape", "shape_iou", "speed")


def videos(model: CausalWanDiT, pairs: list[Pair], options: StreamOptions) -> Tensor:
    """(B, F, 3, 40, 40): one stream of all pairs at once."""
    rows = torch.cat([embed(parse_prompt(pair.prompt)[None]) for pair in pairs])
    stream = open_stream(model, rows, options)
    latents = torch.cat([chunk.latents for chunk in stream], 1)
    return torch.stack([BlockCodec().decode(one) for one in latents])


def report(model: CausalWanDiT, pairs: list[Pair], frames: int, bits: int) -> Rows:
    """Every pair's metrics: of all frames after the warm-up, and under `late_` of the last fifth."""
    rows, late = [], frames - frames // 5
    options = StreamOptions(frames=frames, policy="full", seed=pairs[0].seed, last_pass_bits=bits)
    for pair, pixels in zip(pairs, videos(model, pairs, options), strict=True):
        attributes = parse_prompt(pair.prompt)
        whole = scene_report(pixels[WARMUP:], attributes, pixels[:WARMUP])
        end = scene_report(pixels[late:], attributes, pixels[:WARMUP])
        rows.append({name: whole[name] for name in _SHOWN} | {f"late_{name}": end[name] for name in _SHOWN})
    return rows


@dataclass
class Arm:
    """One model's videos, batch by batch, and where their metrics are kept."""

    name: str
    settings: dict[str, Any]
    make: Callable[[], CausalWanDiT]
    parts: Path | None
    model: CausalWanDiT | None = None

    def rows(self, pairs: list[Pair], frames: int, first: int, draw: int) -> Rows:
        """Of the batch that starts with pair `first` of a draw."""
        kept = self.parts and self.parts / f"{self.name}-{draw}-{first:05}.json"
        asked = self.settings | {"first": first, "batch": len(pairs), "frames": frames, "seed": pairs[0].seed}
        if kept and kept.exists():
            found = json.loads(kept.read_text())
            if found["settings"] != asked:
                raise SystemExit(f"{kept}: made with {found['settings']}, expected {asked}; choose another --parts")
            return list(found["rows"])
        if self.model is None:
            self.model = self.make()
        rows = report(self.model, pairs, frames, self.settings.get("last_pass_bits", BITS[0]))
        if self.name != FULL:
            assert_ran(self.model)
        if kept:
            write_json(kept, {"settings": asked, "rows": rows})
        return rows


def run(
    arms: tuple[Arm, Arm], draws: dict[int, list[Pair]], frames: int, batch: int, seconds: float
) -> tuple[Rows, Rows] | None:
    """Both arms' rows; None where the time was over first."""
    began, rows, whole = time.monotonic(), ([], []), sum(map(len, draws.values()))  # type: tuple[float, tuple[Rows, Rows], int]
    for draw, pairs in draws.items():
        for first in range(0, len(pairs), batch):
            for arm, got in zip(arms, rows, strict=True):
                if time.monotonic() - began > seconds:
                    return None
                got += arm.rows(pairs[first : first + batch], frames, first, draw)
                print(f"{arm.name}: {len(got)} of {whole} videos", file=sys.stderr, flush=True)
    return rows


def judged(name: str, floating: list[float], eight: list[float]) -> dict[str, Any]:
    """Means, the interval of the paired difference, and the verdict."""
    base = sum(floating) / len(floating)
    difference = bootstrap([b - a for a, b in zip(floating, eight, strict=True)], mean)
    margin = MARGIN * abs(base)
    verdict = "open"
    if -margin <= difference.low and difference.high <= margin:
        verdict = "within"
    elif difference.low > 0 or difference.high < 0:
        verdict = "worse" if (difference.low > 0) == name.removeprefix("late_").startswith(_COSTS) else "better"
    eight_mean = sum(eight) / len(eight)
    return {"full": base, "w8a8": eight_mean, "difference": difference._asdict(), "margin": margin, "verdict": verdict}


def quantised(scheme: Scheme, skip: list[str], activations: Activations) -> CausalWanDiT:
    """The demo model as `ispa-deploy quantize demo` makes it."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "bundle"
        quantise_source("demo", out, scheme=scheme, skip=skip, activations=activations)
        return open_bundle(out).model


def arguments_of(argv: list[str] | None) -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there as well")
    parser.add_argument("--chunks", type=int, default=100)
    parser.add_argument("--pairs", type=int, default=48, help="prompts and seeds of a draw")
    parser.add_argument("--draws", type=int, nargs="+", default=[5], metavar="SEED", help="judged together")
    parser.add_argument("--first", type=int, metavar="N", help="of each draw, run and judge the first N alone")
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--scheme", choices=[name for name in SCHEMES if name != "none"], default="w8a8-int8")
    parser.add_argument("--skip", action="append", default=[], metavar="REGEX", help="as in `quantize`")
    parser.add_argument("--smooth", choices=MODES, default="none", help="as in `quantize`")
    parser.add_argument("--keep-sensitive", type=float, default=0.0, metavar="SHARE", help="as in `quantize`")
    parser.add_argument("--last-pass-bits", type=int, choices=BITS, default=16, help="as in `run`")
    parser.add_argument(
        "--parts", type=Path, metavar="FOLDER", help="keep each batch's metrics there, take what is there"
    )
    parser.add_argument("--stop-after", type=float, default=math.inf, metavar="SECONDS", help="of work; exit 3")
    return parser.parse_args(argv)


def arms_of(arguments: argparse.Namespace) -> tuple[Arm, Arm]:
    """In floating point, and in 8 bits as asked."""
    common = {"pairs": arguments.pairs, "threads": 1, "torch": torch.__version__}
    asked_for = ("scheme", "skip", "smooth", "keep_sensitive", "last_pass_bits")
    recipe = {name: getattr(arguments, name) for name in asked_for}
    slug = re.sub(r"[^\w.]+", "-", "-".join(str(value) for value in recipe.values() if value))
    asked = Activations(smooth=arguments.smooth, keep_sensitive=arguments.keep_sensitive)
    return (
        Arm(FULL, common, lambda: load_source("demo", dtype=torch.float32)[0], arguments.parts),
        Arm(
            slug, common | recipe, lambda: quantised(SCHEMES[arguments.scheme], arguments.skip, asked), arguments.parts
        ),
    )


def main(argv: list[str] | None = None) -> int:
    """Print the table; 1 where a metric is worse, 3 where `--stop-after` ended it first."""
    arguments = arguments_of(argv)
    torch.set_num_threads(1)
    draws = {draw: list(demo_pairs(arguments.pairs, seed=draw))[: arguments.first] for draw in arguments.draws}
    arms = arms_of(arguments)
    rows = run(arms, draws, 3 * arguments.chunks, arguments.batch, arguments.stop_after)
    if rows is None:
        return 3
    full, ours = rows
    metrics = {
        name: judged(name, [row[name] for row in full], [row[name] for row in ours]) for name in full[0]
    }  # fmt: skip
    document = {
        "schema_version": 1,
        "command": " ".join(["python -m tests.bench.long_w8a8", *(argv if argv is not None else sys.argv[1:])]),
        "env": environment(torch.device("cpu")),
        "scheme": arguments.scheme,
        "skip": arguments.skip,
        "smooth": arguments.smooth,
        "keep_sensitive": arguments.keep_sensitive,
        "last_pass_bits": arguments.last_pass_bits,
        "chunks": arguments.chunks,
        "draws": list(draws),
        "pairs": len(full),
        "margin": MARGIN,
        "metrics": metrics,
    }
    for name, row in metrics.items():
        low, high = row["difference"]["low"], row["difference"]["high"]
        print(f"{name:20} {row['full']:9.4f} {row['w8a8']:9.4f}  difference [{low:+.4f}, {high:+.4f}] of "
              f"±{row['margin']:.4f}: {row['verdict']}")  # fmt: skip
    if arguments.json:
        write_json(arguments.json, document)
    print(json.dumps({name: row["verdict"] for name, row in metrics.items()}))
    return 1 if any(row["verdict"] == "worse" for row in metrics.values()) else 0


if __name__ == "__main__":
    raise SystemExit(main())
