"""What a policy is: a frozen value that says what happens to the layers' caches after the warm-up. No tensors."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Policy:
    """`localises`: chosen layers keep only local frames after the warm-up; `absorbs`: with a correction of their output
    projection. `sink`: whether local frames include frame 0 (1) or not (0). `own_window`: another window length."""

    name: str
    summary: str
    localises: bool = False
    absorbs: bool = False
    sink: int = 1
    own_window: bool = False
