"""`python -m tests.bench.kv`: keys and values in 8 bits against the same stream without: time, bytes and error.

Each form decodes its past; `int8+attention` reads it with 8-bit attention instead.

Time: steady chunks of the mid geometry with ISPA, of `--layers` layers, as all cost the same; one thread, CPU time of
the process, so that other processes on the machine do not count. The streams take turns and the result is the median
over rounds of the ratio of neighbours. Error: what 8 bits take from the embedded model's own keys and values, and from
its latents, chunk by chunk, same noise.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

import quant
from export.sources import load_source
from ispa_deploy.demo.prompts import embed, parse_prompt
from ispa_deploy.evaluate.variants import demo_pairs
from ispa_deploy.model import CausalWanDiT
from ispa_deploy.options import StreamOptions, open_stream
from ispa_deploy.profile.environment import environment
from ispa_deploy.profile.files import write_json
from ispa_deploy.profile.geometries import GEOMETRIES, random_model
from ispa_deploy.profile.steady import SteadyStream

FORMS = {
    "auto": StreamOptions(),
    "int8": StreamOptions(kv_dtype="int8"),
    "fp8": StreamOptions(kv_dtype="fp8"),
    "int8+attention": StreamOptions(kv_dtype="int8", attention_dtype="int8"),
}
CODED = tuple(FORMS)[1:]
LIMITS = {"auto": 1.0, "int8": 1.05, "fp8": 1.05, "int8+attention": 1.0}
"""Time of a chunk whose cache has 8 bits, over that of the same chunk without."""


def chunk_seconds(steady: SteadyStream) -> float:
    """CPU time of one steady chunk."""
    with steady.turn():
        start = time.process_time()
        steady.step()
        return time.process_time() - start


def times(model: CausalWanDiT, linears: str, rounds: int) -> list[dict[str, Any]]:
    """One row per form, on one model."""
    streams = {name: SteadyStream.open(model, options, rounds + 1) for name, options in FORMS.items()}
    for attention in filter(None, (each.stream.cache.coded_attention for each in streams.values())):
        attention.assert_will_run()
    seconds: dict[str, list[float]] = {name: [] for name in streams}
    for number in range(rounds + 1):
        order = list(streams)[number % len(streams) :] + list(streams)[: number % len(streams)]
        for name in order:
            seconds[name].append(chunk_seconds(streams[name]))
        print(
            f"{linears} round {number}: " + ", ".join(f"{name} {t[-1]:.2f} s" for name, t in seconds.items()),
            flush=True,
        )
    plain = streams["auto"].stream.cache
    return [
        {
            "linears": linears,
            "kv": name,
            "kernel": coded.kernel if (coded := stream.stream.cache.coded_attention) else None,
            "chunk_s": median(seconds[name][1:]),
            "over_auto": median(a / b for a, b in zip(seconds[name][1:], seconds["auto"][1:], strict=True)),
            "persistent_bytes": stream.stream.cache.persistent_bytes(),
            "bytes_over_auto": stream.stream.cache.persistent_bytes() / plain.persistent_bytes(),
            "scratch_bytes": stream.stream.cache.scratch_bytes(),
            "one_layer_bytes": plain.full_bytes() // plain.spec.layers,
        }
        for name, stream in streams.items()
    ]


def errors(pairs: int, frames: int) -> list[dict[str, Any]]:
    """One row per policy and form of 8 bits: relative L2 errors on the embedded model, the same layers local.

    In float32, which every kernel takes; the stored float16 none does.
    """
    model, _ = load_source("demo", dtype=torch.float32)
    rows = []
    for policy in ("full", "absorb"):
        latents: dict[str, list[Tensor]] = {name: [] for name in FORMS}
        told: dict[str, list[dict[str, float | None]]] = {name: [] for name in FORMS}
        for pair in demo_pairs(pairs):
            layers = None
            for name, form in FORMS.items():
                options = replace(form, frames=frames, seed=pair.seed, policy=policy, layers=layers)
                stream = open_stream(model, embed(parse_prompt(pair.prompt)[None]), options)
                latents[name].append(torch.cat([chunk.latents for chunk in stream], 1))
                told[name].append(stream.cache.errors())
                if (coded := stream.cache.coded_attention) is not None:
                    coded.assert_ran()
                layers = tuple(stream.absorber.local_layers()) or None
        exact = torch.cat(latents["auto"])
        for name in CODED:
            parts = zip((torch.cat(latents[name]) - exact).split(3, 1), exact.split(3, 1), strict=True)
            rows.append({
                "policy": policy, "kv": name, "pairs": pairs,
                **{kind: median(each[kind] or 0.0 for each in told[name]) for kind in ("keys", "values")},
                "latents_by_chunk": [float(lost.norm() / whole.norm()) for lost, whole in parts],
            })  # fmt: skip
            print(json.dumps(rows[-1]))
    return rows


def main(argv: list[str] | None = None) -> int:
    """Print and write the rows; 1 where 8 bits cost more time than their limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there as well")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--linears", choices=("float", "both"), default="both", help="float: no w8a8 rows")
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="float32 where a CPU has no bfloat16"
    )
    parser.add_argument("--pairs", type=int, default=2)
    parser.add_argument("--frames", type=int, default=24)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    quant.tune_allocator()
    wrong = errors(arguments.pairs, arguments.frames)
    model = random_model(replace(GEOMETRIES["mid"], layers=arguments.layers), getattr(torch, arguments.dtype))
    rows = times(model, arguments.dtype, arguments.rounds)
    if arguments.linears == "both":
        eight = copy.deepcopy(model)
        quant.quantise_(eight, quant.resolve("w8a8", "cpu")[0])
        rows += times(eight, "w8a8", arguments.rounds)
    document = {
        "schema_version": 1,
        "command": " ".join(["python -m tests.bench.kv", *(argv if argv is not None else sys.argv[1:])]),
        "env": environment(torch.device("cpu")),
        "times": rows,
        "errors": wrong,
    }
    if arguments.json:
        write_json(arguments.json, document)
    print(json.dumps(rows))
    return 0 if all(row["over_auto"] <= LIMITS[row["kv"]] for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
