"""Settings of an absorption, with the paper's and ours as presets."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from ispa_deploy.absorb.solve import Ridge
from ispa_deploy.errors import InputError, known_names
from ispa_deploy.specs import ModelSpec

RANKINGS = ("epsilon", "heldout", "random")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How statistics are collected, solved and ranked.

    `warmup` frames are watched before the transition, then so many denoising passes of the next chunk, `ahead`: their
    history is the very window that local layers are about to lose (docs/log.md). `half_life` (frames) lets older rows
    fade, None keeps all equal. `all_rows` also counts chunks that have no history yet, whose gap is exactly zero.
    `ranking`: `epsilon` is the error on the rows of the fit, `heldout` the error on what came last, from the last
    warm-up chunk on, of a fit to the chunks before. `rows_per_width`: rows are subsampled by a stride that keeps at
    least this many times the layer's width; None keeps every row.
    `share`: how much of ΔW and bias is applied. A fit to the warm-up overstates what holds for the next chunk: a little
    less of it is closer to the full run (docs/log.md).
    `quantisation_aware`: rows are fitted as an 8-bit layer multiplies them, Q(a) in place of a.
    """

    warmup: int = 12
    ahead: int = 1
    ridge: Ridge = field(default_factory=lambda: Ridge(relative=1e-2))
    half_life: float | None = 3.0
    intercept: bool = True
    all_rows: bool = False
    ranking: str = "heldout"
    share: float = 0.7
    rows_per_width: int | None = 8
    double: bool = False
    quantisation_aware: bool = False

    def passes_ahead(self, spec: ModelSpec) -> int:
        """`ahead` of that model; none of speech to video, where each pass of a chunk has a ring of its own."""
        return 0 if spec.audio_blocks else self.ahead

    def begun(self, spec: ModelSpec) -> int:
        """Frames of the chunks that have begun when layers become local."""
        return self.warmup + (spec.chunk_frames if self.passes_ahead(spec) else 0)

    def check(self, chunk: int, first: int) -> None:
        """InputError unless the warm-up holds the chunks this kind of fit needs."""
        if self.ranking not in RANKINGS:
            raise known_names("ranking", self.ranking, RANKINGS)
        if not 0 <= self.share <= 1:
            raise InputError(f"share {self.share} of the solution: expected a number between 0 and 1")
        needed = first + (2 if self.ranking == "heldout" else 1) * chunk
        if self.warmup < needed or (self.warmup - first) % chunk:
            raise InputError(
                f"warm-up of {self.warmup} frames: ranking '{self.ranking}' needs at least {needed} frames in whole "
                f"chunks ({first} + a multiple of {chunk})"
            )


PRESETS: dict[str, Settings] = {
    "paper": Settings(
        ahead=0,
        ridge=Ridge(absolute=1e-3),
        half_life=None,
        intercept=False,
        all_rows=True,
        ranking="epsilon",
        share=1.0,
        rows_per_width=None,
    ),
    "tuned": Settings(),
}


def settings_for(preset: str, **changes: Any) -> Settings:
    """A preset with some fields replaced (None leaves a field alone); an unknown preset lists the known ones."""
    if preset not in PRESETS:
        raise known_names("preset", preset, PRESETS)
    return replace(PRESETS[preset], **{key: value for key, value in changes.items() if value is not None})
