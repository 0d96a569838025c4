"""`python -m ispa_deploy.evaluate`: the quality table of the demo model."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from ispa_deploy.errors import InputError, IspaError
from ispa_deploy.evaluate.command import run_evaluation
from ispa_deploy.evaluate.table import terminal_table
from ispa_deploy.evaluate.variants import VARIANTS, Pair, Variant
from ispa_deploy.model import CausalWanDiT
from ispa_deploy.specs import SPECS

_SHIPPED = Path(__file__).parent.parent / "demo" / "weights.safetensors"


def main() -> int:
    """Exit code: 0, or that of the error, after one line on stderr."""
    arguments = _parser().parse_args()
    torch.set_num_threads(arguments.threads)
    try:
        _evaluate(arguments)
    except IspaError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def load_demo(weights: Path) -> CausalWanDiT:
    """The demo model in float32 from a safetensors file."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    model = CausalWanDiT(SPECS["demo"])
    try:
        model.load_state_dict({name: tensor.float() for name, tensor in load_file(weights).items()})
    except (OSError, SafetensorError) as error:
        raise InputError(f"weights '{weights}': not a readable safetensors file ({error})") from None
    except RuntimeError:
        raise InputError(f"weights '{weights}': their names or shapes are not those of the demo model") from None
    return model.eval()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m ispa_deploy.evaluate", description=__doc__)
    parser.add_argument("--weights", type=Path, help="safetensors of the demo model (default: the ones of the package)")
    parser.add_argument("--pairs", type=int, default=24)
    parser.add_argument("--frames", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--readme", type=Path)
    return parser


def _evaluate(arguments: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.progress import Progress

    model = load_demo(arguments.weights or _SHIPPED)
    weights = f"--weights {arguments.weights.name} " if arguments.weights else ""
    options = f"--pairs {arguments.pairs} --frames {arguments.frames} --seed {arguments.seed}"
    command = f"python -m ispa_deploy.evaluate {weights}{options}"
    terminal = Console(stderr=True)
    with Progress(console=terminal, transient=True, disable=not terminal.is_terminal) as progress:
        task = progress.add_task("evaluate", total=arguments.pairs * len(VARIANTS))

        def finished(pair: Pair, variant: Variant) -> None:
            progress.update(task, advance=1, description=f"{variant.name}, seed {pair.seed}")

        document = run_evaluation(
            model, count=arguments.pairs, frames=arguments.frames, seed=arguments.seed, output=arguments.output,
            readme=arguments.readme, command=command, finished=finished,
        )  # fmt: skip
    Console().print(terminal_table(document))


if __name__ == "__main__":
    sys.exit(main())
