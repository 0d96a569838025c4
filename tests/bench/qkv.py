"""`python -m tests.bench.qkv`: three projections of one input: apart, with one quantisation, and as one product.

CPU milliseconds of one thread, medians over interleaved rounds. The three forms give the same bits in 8 bits.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ispa_deploy.linear import Linear, shared_input
from quant.linear import Int8Linear

# Width and rows of a chunk: demo, mid, 1.3B.
SHAPES = ((128, 75), (768, 1170), (1536, 4680))
Form = Callable[[Tensor], list[Tensor]]


def forms(width: int) -> dict[str, Form]:
    """Every way to compute q, k and v, by name."""
    linears = [Linear(width, width, dtype=torch.bfloat16) for _ in range(3)]
    whole = Linear(width, 3 * width, dtype=torch.bfloat16)
    whole.load_state_dict({name: torch.cat([one.state_dict()[name] for one in linears]) for name in ("weight", "bias")})
    eight, eight_whole = [Int8Linear.from_float(one) for one in linears], Int8Linear.from_float(whole)

    def shared(x: Tensor) -> list[Tensor]:
        rows = shared_input(x, eight)
        return [layer(rows) for layer in eight]

    return {
        "int8 apart": lambda x: [layer(x) for layer in eight],
        "int8 shared": shared,
        "int8 fused": lambda x: list(eight_whole(x).split(width, -1)),
        "bf16 apart": lambda x: [F.linear(x, one.weight, one.bias) for one in linears],
        "bf16 fused": lambda x: list(F.linear(x, whole.weight, whole.bias).split(width, -1)),
    }


@torch.inference_mode()
def measure(width: int, rows: int, rounds: int) -> dict[str, float]:
    """Median CPU milliseconds by form."""
    made, x = forms(width), torch.randn(rows, width, dtype=torch.bfloat16)
    want = made["int8 apart"](x)
    for name in ("int8 shared", "int8 fused"):
        assert all(torch.equal(a, b) for a, b in zip(made[name](x), want, strict=True)), name
    taken: dict[str, list[float]] = {name: [] for name in made}
    repeats = max(1, 2 * 10**9 // (rows * width * width))
    for _ in range(rounds):
        for name, form in made.items():
            start = time.process_time()
            for _ in range(repeats):
                form(x)
            taken[name].append((time.process_time() - start) / repeats)
    return {name: 1e3 * statistics.median(values) for name, values in taken.items()}


def main(argv: list[str] | None = None) -> int:
    """Print a line for every shape."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for width, rows in SHAPES:
        ms = measure(width, rows, arguments.rounds)
        print(f"{rows} x {width}: " + ", ".join(f"{name} {value:.3f} ms" for name, value in ms.items()), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
