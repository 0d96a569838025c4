"""What the transition frees leaves the process, also while the allocator is told to keep large blocks."""

from __future__ import annotations

import json
import platform
import subprocess
import sys

import pytest

CODE = """
import gc, json, torch
from dataclasses import replace
from ispa_deploy.options import StreamOptions, open_stream
from ispa_deploy.profile.geometries import random_model
from quant import tune_allocator
from tests.peak import anonymous
from tests.tiny import SPEC
assert tune_allocator()
torch.set_num_threads(1)
spec = replace(SPEC, dim=192, heads=6, layers=6, latent_height=36, latent_width=32, steps=(1000,))
model = random_model(spec)
text = torch.randn(1, spec.text_len, spec.text_dim)
stream = open_stream(model, text, StreamOptions(frames=18, ratio=1.0))
readings = []
for chunk in stream:
    gc.collect()
    readings.append((stream.absorber.state, anonymous(), stream.cache.persistent_bytes()))
print(json.dumps(readings))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library keeps other things")
def test_freed_caches_leave_the_process() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    readings = json.loads(done.stdout.splitlines()[-1])
    after = next(index for index, (state, _, _) in enumerate(readings) if state == "absorbed")
    (_, full_rss, full), (_, local_rss, local) = readings[after - 1], readings[after]
    assert full - local > 20 << 20  # most of the cache
    assert full_rss - local_rss >= 0.8 * (full - local)
