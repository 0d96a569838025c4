"""What is said when memory runs out: true by the prediction, and of the machine that is there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from ispa_deploy.advice import advise, all_smaller, memory_errors, smaller
from ispa_deploy.avatar.cache import AvatarCache
from ispa_deploy.budget import Setup, predict
from ispa_deploy.cache import KVCache
from ispa_deploy.errors import RunError
from ispa_deploy.specs import SPECS
from tests.tiny import SPEC, tiny_model, tiny_stream

GIB = 2**30
LONGLIVE, KREA = SPECS["longlive-1.3b"], SPECS["krea-14b"]
BIG = Setup(scheme="none", vae=True)


def test_every_change_alone_needs_less_and_all_of_them_least() -> None:
    for spec in (LONGLIVE, KREA):
        needed = predict(spec, BIG).peak
        peaks = {flags: predict(*changed).peak for flags, *changed in smaller(spec, BIG)}
        assert {flags.split(" ")[0] for flags in peaks} == {
            "quantize", "--policy", "--stats-device", "--kv-dtype", "--height", "--offload",
        }  # fmt: skip
        windows = {flags for flags in peaks if "window" in flags and spec is KREA}  # it has the shortest already
        assert all(peak < needed for flags, peak in peaks.items() if flags not in windows)
        assert predict(*all_smaller(spec, BIG)).peak < min(peaks.values())


def test_speech_to_video_is_told_what_it_can_do() -> None:
    """Its rings are not coded; they rest in host memory, which is most of what there is."""
    avatar = SPECS["liveavatar-14b"]
    peaks = {flags: predict(*changed).peak for flags, *changed in smaller(avatar, BIG)}
    names = {"quantize", "--policy", "--stats-device", "--height", "--offload"}
    assert {flags.split(" ")[0] for flags in peaks} == names
    rings = 40 * 4 * 12 * 1056 * 5120 * 2 * 2
    assert predict(avatar, BIG).peak - peaks["--offload"] > rings
    for flags, spec, changed in smaller(avatar, BIG):
        kept = changed.window if changed.window is not None else spec.window_frames
        AvatarCache(replace(spec, window_frames=kept), device="meta")  # each can be had
        assert "kv-dtype" not in flags
    assert predict(*all_smaller(avatar, BIG)).peak < min(peaks.values())


def test_the_line_tells_what_fits_this_machine_and_what_does_not() -> None:
    line = advise(KREA, BIG, 40 * GIB)
    assert re.match(
        r"this stream needs about \d+\.\d GiB \(weights 26\.6 GiB, KV cache 7\.1 GiB, .*\) of 40\.0 GiB", line
    )
    fitting = line.partition("would fit: ")[2]
    peaks = [float(count) for count in re.findall(r"\((\d+\.\d) GiB\)", fitting)]
    assert peaks
    assert all(peak <= 40 for peak in peaks)
    assert peaks == sorted(peaks)
    hopeless = advise(KREA, BIG, GIB)
    assert "would fit" not in hopeless
    assert "together" in hopeless
    assert "quantize --scheme w8a8" in hopeless
    halved = replace(KREA, latent_height=KREA.latent_height // 2, latent_width=KREA.latent_width // 2)
    assert "--height 240 --width 416" in hopeless
    together = predict(halved, all_smaller(KREA, BIG)[1]).peak
    assert hopeless.endswith(f"need {together / GIB:.1f} GiB")
    already = replace(BIG, scheme="w8a8", policy="full", kv_dtype="int8", vae=False)
    assert not re.search(r"quantize|--ratio|--kv-dtype|--offload|--stats", advise(LONGLIVE, already, 80 * GIB))


def test_caches_that_cannot_be_allocated_are_told_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """The allocator's own words, from the allocator."""
    model = tiny_model()
    with pytest.raises(RunError, match=r"out of memory while the caches are allocated: .* of \d"):
        tiny_stream(model, frames=15, policy="window", window=3 * 10**13)
    assert SPEC.window_frames == 12


def test_other_errors_pass() -> None:
    def fail() -> Iterator[None]:
        raise RuntimeError("shapes do not fit")
        yield

    with (
        pytest.raises(RuntimeError, match="shapes do not fit"),
        memory_errors(SPEC, Setup, torch.device("cpu"), lambda: ""),
    ):
        next(fail())
    assert KVCache(SPEC).persistent_bytes() > 0
