"""`python -m tests.bench.conversion --model krea-14b`: what `quantize` holds in memory while it converts a checkpoint.

Random weights of the real shapes, in the published layouts: a folder of shards, one file, one torch file, and with
`--lora` an adapter beside it. A file is written tensor by tensor and deleted after its turn, so that a model larger
than memory needs disk space for one copy and its bundle. The figure is the peak of anonymous resident memory of the
command's own process, everything in it counted; pages of mapped files are not. Linux only.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from export.sources import shapes_of
from export.tensors import Entry, Shape, write_tensors
from export.write import SHARD_BYTES
from ispa_deploy.profile.environment import environment
from ispa_deploy.profile.files import write_json
from ispa_deploy.specs import SPECS, ModelSpec, spec_for

DTYPE = torch.bfloat16
UPSTREAM_SHARD_BYTES = 9_970_000_000
TENSORS = 4
"""The bound: this many of the largest tensor, and a shard."""
LORA_RANK = {"longlive-1.3b": 256, "liveavatar-14b": 128}
_POOL = 16_000_057  # numbers that are drawn; no tensor's size divides it, so no two rows are alike


class Weights:
    """Random tensors by name, made when they are asked for."""

    def __init__(self, shapes: Mapping[str, Shape]) -> None:
        self.shapes = dict(shapes)
        self._numbers = torch.empty(_POOL, dtype=DTYPE).normal_(generator=torch.Generator().manual_seed(0))
        self._scaled: dict[int, Tensor] = {}

    @property
    def largest(self) -> int:
        """Bytes of the largest tensor."""
        return max(map(self.nbytes, self.shapes))

    def nbytes(self, name: str) -> int:
        """Bytes of one tensor."""
        return torch.Size(self.shapes[name]).numel() * DTYPE.itemsize

    def read(self, name: str) -> Tensor:
        """One tensor: normal numbers with variance 1 / fan-in, or ones and zeros as norms and biases start."""
        shape = self.shapes[name]
        if len(shape) == 1:
            return torch.full(shape, float("norm" in name and name.endswith("weight")), dtype=DTYPE)
        fan_in, count = torch.Size(shape[1:]).numel(), torch.Size(shape).numel()
        if fan_in not in self._scaled:
            self._scaled[fan_in] = self._numbers * fan_in**-0.5
        pool = self._scaled[fan_in]
        start = (31 * len(name) + fan_in) % _POOL
        return pool.repeat(-(-(start + count) // _POOL))[start : start + count].view(shape)

    def entries(self, prefix: str = "") -> dict[str, Entry]:
        """As `write_tensors` wants them."""
        return {f"{prefix}{name}": Entry(DTYPE, shape, self._reader(name)) for name, shape in self.shapes.items()}

    def _reader(self, name: str) -> Callable[[], Tensor]:
        return lambda: self.read(name)


def write_folder(weights: Weights, home: Path) -> Path:
    """Shards with an index and plain names, as diffusers saves them."""
    folder = home / "folder"
    folder.mkdir()
    shards: list[list[str]] = [[]]
    for name in weights.shapes:
        if sum(map(weights.nbytes, [*shards[-1], name])) > UPSTREAM_SHARD_BYTES:
            shards.append([])
        shards[-1].append(name)
    where, entries = {}, weights.entries()
    for number, names in enumerate(shards, 1):
        file = f"diffusion_pytorch_model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_tensors(folder / file, {name: entries[name] for name in names}, {"format": "pt"})
        where.update(dict.fromkeys(names, file))
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return folder


def write_file(weights: Weights, home: Path) -> Path:
    """One safetensors file, names with the prefix `model.`."""
    path = home / "model.safetensors"
    write_tensors(path, weights.entries("model."), {"format": "pt"})
    return path


def write_torch(weights: Weights, home: Path) -> Path:
    """One torch file, `{"generator": {"model.<name>": tensor}}`, saved without its numbers, then filled with them."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    path = home / "model.pt"
    with FakeTensorMode(), torch.serialization.skip_data(materialize_fake_tensors=True):
        fakes = {f"model.{name}": torch.empty(shape, dtype=DTYPE) for name, shape in weights.shapes.items()}
        torch.save({"generator": fakes}, path)
    with path.open("r+b") as file:
        for name, (start, size) in zip(weights.shapes, list(_records(path)), strict=True):
            assert size == weights.nbytes(name), f"{name} is not where it should be"
            file.seek(start)
            file.write(weights.read(name).reshape(-1).view(torch.uint8).numpy().data)
    return path


def _records(path: Path) -> Iterator[tuple[int, int]]:
    """Offset and bytes of every storage in a torch file, in the order they were saved."""
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        records = [entry for entry in archive.infolist() if "/data/" in entry.filename]
        for entry in sorted(records, key=lambda entry: int(entry.filename.rpartition("/")[2])):
            file.seek(entry.header_offset + 26)  # a local header: 30 bytes, of which the last 4 are two lengths
            name, extra = (int.from_bytes(file.read(2), "little") for _ in range(2))
            yield entry.header_offset + 30 + name + extra, entry.file_size


CONTAINERS: dict[str, Callable[[Weights, Path], Path]] = {
    "folder": write_folder, "safetensors": write_file, "pt": write_torch,
}  # fmt: skip


def write_adapter(spec: ModelSpec, home: Path) -> Path:
    """A LoRA on every linear that the published one is on, under PEFT's names."""
    rank, pairs = LORA_RANK[spec.name], {}
    for name, shape in shapes_of(spec).items():
        module = name.removesuffix(".weight")
        inner = module.startswith(("blocks.", "audio_injector.injector."))
        if inner and len(shape) == 2 and name != module and "norm" not in name:
            pairs[f"base_model.model.{module}.lora_A.default.weight"] = (rank, shape[1])
            pairs[f"base_model.model.{module}.lora_B.default.weight"] = (shape[0], rank)
    path = home / "lora.safetensors"
    write_tensors(path, Weights(pairs).entries(), {"format": "pt"})
    return path


def watched(command: list[str], every: float = 0.005) -> tuple[int, float]:
    """Runs a command; the most anonymous resident bytes its process held, and the seconds it took."""
    start, peak = time.monotonic(), 0
    process = subprocess.Popen(command)
    try:
        while process.poll() is None:
            peak = max(peak, _anonymous(process.pid))
            time.sleep(every)
    except BaseException:
        process.kill()
        raise
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}: exit code {process.returncode}")
    return peak, time.monotonic() - start


def _anonymous(process: int) -> int:
    status = Path(f"/proc/{process}/status").read_text()
    lines = [line for line in status.splitlines() if line.startswith("RssAnon")]
    return int(lines[0].split()[1]) * 1024 if lines else 0  # it has just ended


def measure(model: str, container: str, lora: bool, home: Path) -> dict[str, Any]:
    """One conversion, its peak and its bound."""
    spec = spec_for(model)
    weights = Weights(shapes_of(spec))
    path = CONTAINERS[container](weights, home)
    size = sum(file.stat().st_size for file in (path.iterdir() if path.is_dir() else [path]))
    bundle = home / "bundle"
    command = [sys.executable, "-m", "cli", "quantize", str(path), "-o", str(bundle), "--model", model]
    command += ["--scheme", "w8a8-int8", "--threads", "1", "--stats", str(home / "stats.json")]
    if lora:
        command += ["--lora", str(write_adapter(spec, home))]
    largest = weights.largest
    del weights
    peak, seconds = watched(command)
    written = sum(file.stat().st_size for file in bundle.iterdir())
    bound = TENSORS * largest + SHARD_BYTES
    for left in (path, bundle):
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    row = {
        "container": container, "lora": lora, "source_bytes": size, "bundle_bytes": written, "largest_tensor": largest,
        "shard_bytes": SHARD_BYTES, "bound": bound, "peak": peak, "within": peak <= bound, "seconds": round(seconds, 1),
    }  # fmt: skip
    print(
        f"{container}{' + LoRA' if lora else ''}, {size / 1e9:.1f} GB: peak {peak / 1e9:.2f} GB, bound "
        f"{bound / 1e9:.2f} GB, {seconds:.0f} s",
        flush=True,
    )
    return row


def main(argv: list[str] | None = None) -> int:
    """Print each peak beside its bound; 1 when one is above it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there as well")
    parser.add_argument("--model", choices=sorted(SPECS), default="krea-14b")
    parser.add_argument("--containers", nargs="+", choices=sorted(CONTAINERS), default=list(CONTAINERS))
    parser.add_argument("--lora", action="store_true", help="merge an adapter of the published size")
    parser.add_argument("--work", type=Path, metavar="FOLDER", help="disk with room for the files; default: temporary")
    arguments = parser.parse_args(argv)
    if arguments.lora and arguments.model not in LORA_RANK:
        parser.error(f"--lora: expected one of {', '.join(LORA_RANK)}, whose adapters are published")
    command = f"python -m tests.bench.conversion --model {arguments.model}{' --lora' if arguments.lora else ''}"
    if arguments.containers != list(CONTAINERS):
        command += f" --containers {' '.join(arguments.containers)}"
    document: dict[str, Any] = {
        "schema_version": 1, "command": command, "env": environment(torch.device("cpu")), "model": arguments.model,
        "within": True, "cases": [],
    }  # fmt: skip
    with tempfile.TemporaryDirectory(dir=arguments.work) as home:
        for name in arguments.containers:
            document["cases"].append(measure(arguments.model, name, arguments.lora, Path(home)))
            document["within"] = all(row["within"] for row in document["cases"])
            if arguments.json:  # each takes minutes: what is measured is kept
                write_json(arguments.json, document)
    return 0 if document["within"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
