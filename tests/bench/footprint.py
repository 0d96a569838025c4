"""`python -m tests.bench.footprint`: bytes of a bundle on disk and in memory, against the same model in bfloat16.

Random weights of the real geometry: sizes do not depend on them. The bundle is opened in a process of its own, whose
resident memory is read before and after, and again after every layer has run: packed forms are made by then, and plain
codes that stayed beside them would show.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from export import open_bundle, quantise_source
from export.sources import shapes_of
from ispa_deploy.profile.environment import environment
from ispa_deploy.profile.files import write_json
from ispa_deploy.specs import spec_for
from quant import SCHEMES
from quant.linear import QuantisedLinear
from tests.bench.memory import resident

CASES: dict[str, tuple[tuple[str, ...], float]] = {
    "w8a8": ((), 0.52),
    "w8a8, o in bfloat16": ((r"self_attn\.o$",), 0.57),
}
"""What is kept in bfloat16, and the limit as a share of the whole model's bytes in bfloat16."""


def held() -> int:
    """Resident bytes, without what the allocator only keeps for later."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return resident()


def opened(folder: Path) -> dict[str, int]:
    """In this process: resident bytes that opening the bundle and running every layer once add."""
    torch.set_num_threads(1)
    warm = QuantisedLinear.__subclasses__()[0](64, 64)  # what a first product loads is the kernel's, not the model's
    warm(torch.randn(4, 64, dtype=torch.bfloat16))
    before = held()
    bundle = open_bundle(folder, verify=False)
    loaded = held() - before
    with torch.inference_mode():
        for module in bundle.model.modules():
            if isinstance(module, QuantisedLinear):
                module(torch.ones(2, module.in_features, dtype=torch.bfloat16))
    return {"loaded": loaded, "ran": held() - before}


def measure(model: str, case: str, home: Path) -> dict[str, Any]:
    """One bundle: its bytes, and those that a process of its own reports."""
    skip, limit = CASES[case]
    folder, _ = quantise_source(
        "random", home / "bundle", scheme=SCHEMES["w8a8-int8"], model=model, skip=skip, overwrite=True
    )  # fmt: skip
    gc.collect()
    whole = 2 * sum(torch.Size(shape).numel() for shape in shapes_of(spec_for(model)).values())
    disk = sum(path.stat().st_size for path in folder.iterdir())
    child = [sys.executable, "-m", "tests.bench.footprint", "--open", str(folder)]
    memory = json.loads(subprocess.run(child, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
    shares = {name: value / whole for name, value in (("disk", disk), *memory.items())}
    row = {"case": case, "bfloat16": whole, "disk": disk, **memory, "shares": shares, "limit": limit}
    print(f"{case}: " + ", ".join(f"{name} {value:.3f}" for name, value in shares.items()) + f" of bf16, limit {limit}")
    return row


def main(argv: list[str] | None = None) -> int:
    """Print the shares; 1 when one is above its limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there as well")
    parser.add_argument("--model", default="longlive-1.3b")
    parser.add_argument("--open", type=Path, metavar="FOLDER", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.open is not None:
        print(json.dumps(opened(arguments.open)))
        return 0
    with tempfile.TemporaryDirectory() as home:
        rows = [measure(arguments.model, case, Path(home)) for case in CASES]
    within = all(share <= row["limit"] for row in rows for share in row["shares"].values())
    document = {
        "schema_version": 1,
        "command": f"python -m tests.bench.footprint --model {arguments.model}",
        "env": environment(torch.device("cpu")),
        "model": arguments.model,
        "within": within,
        "cases": rows,
    }
    if arguments.json:
        write_json(arguments.json, document)
    return 0 if within else 1


if __name__ == "__main__":
    raise SystemExit(main())
