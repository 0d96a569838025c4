"""`python -m tests.bench.int8_linear`: int8 against bfloat16 and float32 `nn.Linear` at the sizes of the 1.3B model.

One thread and the CPU time of the process, so that other processes on the machine do not count; the layers take turns
within each round and the result is the median over rounds of the ratio of neighbours. Activations are Gaussian with
channels 1 to 4 times as loud; a second error, which decides nothing, is for one channel in sixteen 5 times as loud,
where one scale per token hurts.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ispa_deploy.delta import Delta
from ispa_deploy.profile.environment import environment
from ispa_deploy.profile.files import write_json
from quant.kernels_cpu import accelerate, compile_note
from quant.layers import WideInt8Linear
from quant.linear import Int8Linear
from quant.memory import tune_allocator

ROWS = 1560
SHAPES = ((1536, 1536), (1536, 8960), (8960, 1536))
SLICE = 64  # rows whose error is taken against float64


def interleaved(candidates: dict[str, Callable[[], Tensor]], rounds: int) -> dict[str, list[float]]:
    """CPU seconds of every candidate, one call each per round, after two rounds unmeasured."""
    for run in candidates.values():
        run(), run()
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, run in candidates.items():
            start = time.process_time()
            run()
            seconds[name].append(time.process_time() - start)
    return seconds


def median_ratio(a: list[float], b: list[float]) -> float:
    """Median over rounds of a / b."""
    return statistics.median(x / y for x, y in zip(a, b, strict=True))


def relative_error(layer: nn.Module, original: nn.Linear, x: Tensor) -> float:
    """Of the layer's output against the original weights in float64."""
    exact = x.double() @ original.weight.double().t() + original.bias.double()
    return float((layer(x).double() - exact).norm() / exact.norm())


def measure(rows: int, features: int, outputs: int, rounds: int) -> dict[str, Any]:
    """One row of the table: times, ratios and errors of one shape, and the delta modes relative to bfloat16."""
    narrow = nn.Linear(features, outputs, dtype=torch.bfloat16)
    wide = nn.Linear(features, outputs)
    wide.load_state_dict(narrow.state_dict())
    layers = {mode: Int8Linear.from_float(narrow) for mode in ("none", "requant", "side", "fold")}
    fine = WideInt8Linear.from_float(narrow)
    delta = Delta((torch.randn(outputs, features) * 0.01).bfloat16())
    for mode, layer in layers.items():
        layer.set_delta(None if mode == "none" else delta, "auto" if mode == "none" else mode)
    x = (torch.randn(rows, features) * (1 + 3 * torch.rand(features))).bfloat16()
    loud = (torch.randn(SLICE, features) * (1 + 4 * (torch.arange(features) % 16 == 0))).bfloat16()
    x32 = x.float()
    candidates: dict[str, Callable[[], Tensor]] = {
        "bf16": lambda: narrow(x),
        "fp32": lambda: wide(x32),
        "int8": lambda: layers["none"](x),
        "int8 fp32 in, out": lambda: layers["none"](x32),
        "int8, 16-bit rows": lambda: fine(x),
        **{f"int8 + {mode} delta": (lambda layer=layers[mode]: layer(x)) for mode in ("requant", "side", "fold")},
    }
    seconds = interleaved(candidates, rounds)
    error = {
        "bf16": relative_error(narrow, narrow, x[:SLICE]),
        "int8": relative_error(layers["none"], narrow, x[:SLICE]),
        "int8, 16-bit rows": relative_error(fine, narrow, x[:SLICE]),
        "int8, loud channels": relative_error(layers["none"], narrow, loud),
    }
    return {
        "rows": rows, "features": features, "outputs": outputs, "kernel": layers["none"].kernel_name,
        "ms": {name: 1e3 * statistics.median(values) for name, values in seconds.items()},
        "over_bf16": {name: median_ratio(values, seconds["bf16"]) for name, values in seconds.items()},
        "over_fp32": {"int8": median_ratio(seconds["int8"], seconds["fp32"])},
        "relative_error": error,
    }  # fmt: skip


def table(results: list[dict[str, Any]]) -> str:
    """Plain text: one line per shape and candidate."""
    lines = [f"{'M, K, N':>18}  {'layer':<20}{'ms':>9}{'x bf16':>9}{'error':>10}"]
    for result in results:
        shape = "{rows}, {features}, {outputs}".format(**result)
        for name, ms in result["ms"].items():
            error = result["relative_error"].get(name)
            tail = f"{error:10.1e}" if error is not None else ""
            lines.append(f"{shape:>18}  {name:<20}{ms:>9.1f}{result['over_bf16'][name]:>9.2f}{tail}")
        lines.append(f"{shape:>18}  {'int8, loud channels':<38}{result['relative_error']['int8, loud channels']:10.1e}")
    return "\n".join(lines)


def _command(arguments: argparse.Namespace) -> str:
    """What makes these numbers; where they are written is nobody's business."""
    flags = [f"--rounds {arguments.rounds}", *([f"--rows {arguments.rows}"] if arguments.rows != ROWS else [])]
    flags += [f"--{name.replace('_', '-')}" for name in ("eager", "no_mallopt") if getattr(arguments, name)]
    return " ".join(["python -m tests.bench.int8_linear", *flags])


@torch.no_grad()
def main() -> None:
    """Print the table and one JSON line; exit 1 when int8 is not faster than both or errs by more than 2 %."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there as well")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--eager", action="store_true", help="compile for large inputs only")
    parser.add_argument("--no-mallopt", action="store_true", help="leave the allocator as it is")
    arguments = parser.parse_args()
    tuned = not arguments.no_mallopt and tune_allocator()
    if not arguments.eager:
        accelerate()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    results = [measure(arguments.rows, k, n, arguments.rounds) for k, n in SHAPES]
    document = {
        "schema_version": 1, "command": _command(arguments), "env": environment(torch.device("cpu")),
        "processor": torch.backends.cpu.get_cpu_capability(), "threads": 1, "rounds": arguments.rounds,
        "mallopt": tuned, "eager": arguments.eager, "compile_note": compile_note(), "results": results,
    }  # fmt: skip
    print(table(results))
    print(json.dumps(document))
    if arguments.json:
        write_json(arguments.json, document)
    good = all(
        r["over_bf16"]["int8"] < 1 and r["over_fp32"]["int8"] < 1 and r["relative_error"]["int8"] <= 0.02
        for r in results
    )
    raise SystemExit(0 if good else 1)


if __name__ == "__main__":
    main()
