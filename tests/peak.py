"""Peak anonymous memory of a conversion: `python -m tests.peak FILE OUT MODEL.json SHARD_BYTES`, printed in bytes.

Run as a process of its own, so that nothing but the conversion is in the figure. Pages of mapped files do not count.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path

import torch

from export.convert import convert_checkpoint
from ispa_deploy.specs import ModelSpec
from quant.schemes import SCHEMES


def anonymous() -> int:
    """Resident anonymous bytes of this process."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def main() -> None:
    torch.set_num_threads(1)
    source, out, spec, shard = sys.argv[1:]
    start = peak = anonymous()
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, anonymous())
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        convert_checkpoint(
            source, out, spec=ModelSpec.from_dict(json.loads(Path(spec).read_text())), scheme=SCHEMES["w8a8-int8"],
            shard_bytes=int(shard),
        )  # fmt: skip
    finally:
        done.set()
        watcher.join()
    print(peak - start)


if __name__ == "__main__":
    main()
