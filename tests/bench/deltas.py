"""`python -m tests.bench.deltas`: where the correction of an 8-bit layer is kept: error and latency of each way.

Shapes of the 1.3B model's `o`: a correction fitted to rows with loud and quiet directions, one thread, CPU time of the
process, the ways taking turns. Embedded model: real corrections of all layers, on the warm-up's last chunk. *Error* is
that of the layer's output against the corrected layer in float64; *left* is the share of the gap's energy that the
served output leaves, 1 without a correction.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from torch import Tensor, nn

import quant
from export.sources import load_source
from ispa_deploy.absorb.lowrank import Rank, truncate
from ispa_deploy.absorb.solve import Ridge, solve
from ispa_deploy.absorb.stats import Statistics
from ispa_deploy.delta import Delta
from ispa_deploy.demo.prompts import embed, parse_prompt
from ispa_deploy.evaluate.variants import demo_pairs
from ispa_deploy.options import StreamOptions, open_stream
from ispa_deploy.profile.environment import environment
from ispa_deploy.profile.files import write_json
from quant.linear import Int8Linear
from tests.bench.int8_linear import interleaved, median_ratio

WIDTH, ROWS, RANKS = 1536, (1560, 4680), (64, 256)
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


def planted(width: int, rows: int) -> tuple[Tensor, Statistics]:
    """Rows (R, I) whose directions fall off by a thousand, and the sums of a gap that half depends on them."""
    mix = torch.randn(width, width) * torch.logspace(0, -3, width)[:, None]
    local = torch.randn(rows, width) @ mix / 8
    gap = 0.3 * local @ torch.randn(width, width) / width**0.5
    gap += gap.std() * torch.randn(rows, width)
    stats = Statistics(torch.randn(width, width) / width**0.5)
    stats.update(local, gap)
    return local, stats


def ways(stats: Statistics) -> dict[str, tuple[Delta | None, str]]:
    """Name -> what the layer carries, and its mode."""
    solution = solve(stats, Ridge(relative=1e-2))
    assert solution.weight is not None
    made: dict[str, tuple[Delta | None, str]] = {"no correction": (None, "auto")}
    for name, dtype in HALF.items():
        made[f"side, {name}"] = Delta(solution.weight.to(dtype)), "side"
    for rank in RANKS:
        part = truncate(stats, solution, Rank(count=rank))
        assert part.weight is not None
        assert part.down is not None
        made[f"side, bf16, rank {rank}"] = Delta(part.weight.bfloat16(), None, part.down.bfloat16()), "side"
    made["requant"] = Delta(solution.weight.bfloat16()), "requant"
    made["fold, bf16"] = Delta(solution.weight.bfloat16()), "fold"
    return made


def wide(rounds: int) -> list[dict[str, Any]]:
    """One row per number of rows and way."""
    local, stats = planted(WIDTH, max(ROWS))
    linear = nn.Linear(WIDTH, WIDTH, bias=False)
    linear.weight.data.copy_(stats.weight)
    layers = {}
    for name, (delta, mode) in ways(stats).items():
        layers[name] = Int8Linear.from_float(linear)
        layers[name].set_delta(delta, mode)
    whole = layers["side, bf16"].delta
    assert whole is not None
    rows = []
    for count in ROWS:
        x = local[:count].bfloat16()
        exact = x.double() @ (linear.weight.double() + whole.weight.double()).T
        run: dict[str, Callable[[], Tensor]] = {
            name: (lambda layer=layer, x=x: layer(x)) for name, layer in layers.items()
        }  # fmt: skip
        seconds = interleaved(run, rounds)
        rows += [
            {
                "rows": count, "way": name, "ms": 1e3 * median(times),
                "over_no_correction": median_ratio(times, seconds["no correction"]),
                "error": float((run[name]().double() - exact).norm() / exact.norm()),
                "delta_bytes": layers[name].delta_nbytes(),
            }
            for name, times in seconds.items()
        ]  # fmt: skip
    return rows


def embedded(pairs: int) -> list[dict[str, Any]]:
    """One row per way: means over the embedded model's layers and some prompts."""
    model, _ = load_source("demo")
    quant.quantise_(model, quant.resolve("w8a8", "cpu")[0])
    found: dict[str, list[tuple[float, float]]] = {}
    fits: dict[str, dict[str, Any]] = {
        "": {},
        ", rank 8": {"delta_rank": Rank(count=8)},
        ", rank 32": {"delta_rank": Rank(count=32)},
        ", fitted on codes": {"quantisation_aware": True},
    }
    for pair in demo_pairs(pairs):
        text = embed(parse_prompt(pair.prompt)[None])
        exact: dict[int, Tensor] = {}
        for fit, more in fits.items():
            options = StreamOptions(frames=12, seed=pair.seed, ratio=1.0, share=1.0, **more)
            stream, rows = open_stream(model, text, options), dict[int, tuple[Tensor, Tensor]]()
            listen = stream.absorber._observe

            def observe(layer: int, local: Tensor, full: Tensor, rows: Any = rows, listen: Any = listen) -> None:
                rows[layer] = local[0].flatten(1).clone(), full[0].flatten(1).clone()
                listen(layer, local, full)

            stream.absorber._observe = observe  # type: ignore[method-assign]
            for _ in stream:
                pass
            for layer, delta in stream.absorber.deltas.items():
                target, (local, full) = model.layers()[layer].self_attn.o, rows[layer]
                wanted = full.double() @ target.reference_weight().double().T
                plain = local.double() @ target.reference_weight().double().T
                moved = 0.0 if delta.bias is None else delta.bias.double()
                if not fit:
                    exact[layer] = plain + local.double() @ delta.dense().double().T + moved
                for mode in ("side", "requant", "fold"):
                    target.set_delta(delta, mode)
                    got = target(local).double() - (0.0 if target.bias is None else target.bias.double())
                    target.set_delta(None)
                    error = float((got - exact[layer]).norm() / exact[layer].norm())
                    left = float((got - wanted).square().sum() / (plain - wanted).square().sum())
                    found.setdefault(mode + fit, []).append((error, left))
    return [
        {"way": name, "error": mean(e for e, _ in each), "left": mean(left for _, left in each), "layers": len(each)}
        for name, each in found.items()
    ]


@torch.inference_mode()
def main(argv: list[str] | None = None) -> int:
    """Print and write the rows; 1 where another way is faster than `auto`, which is `requant`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there as well")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--pairs", type=int, default=2)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    quant.tune_allocator()
    small = embedded(arguments.pairs)
    for row in small:
        print(json.dumps(row))
    large = wide(arguments.rounds)
    for row in large:
        print(json.dumps(row))
    document = {
        "schema_version": 1,
        "command": "python -m tests.bench.deltas",
        "env": environment(torch.device("cpu")),
        "o_1536": large,
        "embedded": small,
    }
    if arguments.json:
        write_json(arguments.json, document)
    served = [row for row in large if row["way"] != "no correction"]
    fastest = [min((r for r in served if r["rows"] == count), key=lambda r: r["ms"])["way"] for count in ROWS]
    print(f"fastest: {dict(zip(ROWS, fastest, strict=True))}")
    return 0 if set(fastest) == {"requant"} else 1


if __name__ == "__main__":
    raise SystemExit(main())
