"""A speech-to-video stream: the streaming loop with audio for each chunk and a condition instead of a first frame.

There is no clean pass. The condition is prefilled before the first chunk, after a prompt switch, and, with `online`,
once more after the first clip, when the first generated frame takes the reference's place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from ispa_deploy.avatar.absorb import PerStepAbsorber
from ispa_deploy.avatar.audio import LEAD_FRAMES
from ispa_deploy.avatar.cache import AvatarCache
from ispa_deploy.avatar.condition import Distance, drawn_distance
from ispa_deploy.avatar.model import CausalS2V, Guidance
from ispa_deploy.errors import InputError
from ispa_deploy.specs import ModelSpec
from ispa_deploy.stream import Stream


@dataclass(frozen=True)
class Scene:
    """What a speech-to-video stream is given beside its prompt. B videos, A speakers, F frames, c latent channels.

    `states`: hidden states of the speech model (A, N, K, P), 25 steps a second; silence follows when they end.
    `reference`: latents of the image (B, 1, c, H, W). `motion`: latents before the stream, oldest first; None: the
    reference, standing still. `pose`: latents (B, F, c, H, W) of a driving video or None. `mask`: who speaks where,
    (A, rows, columns) of tokens in [0, 1], for more than one speaker. `moved` makes the motion latents that go with a
    new reference from the first clip's latents (B, F, c, H, W); None: they stay.
    """

    states: Tensor
    reference: Tensor
    motion: Tensor | None = None
    pose: Tensor | None = None
    mask: Tensor | None = None
    moved: Callable[[Tensor], Tensor] | None = None

    def check(self, spec: ModelSpec) -> None:
        """InputError naming what does not fit the model."""
        states, reference = tuple(self.states.shape), tuple(self.reference.shape)
        if len(states) != 4 or states[1:3] != (spec.audio_states, spec.audio_dim):
            raise InputError(
                f"speech features of shape {states}: '{spec.name}' expects (speakers, {spec.audio_states}, "
                f"{spec.audio_dim}, steps); use its own speech model"
            )
        if len(reference) != 5 or reference[1:] != (1, *spec.latent_shape):
            raise InputError(f"reference latents of shape {reference}: expected (1, 1, {spec.latent_shape})")
        if len(self.states) > 1 and (self.mask is None or tuple(self.mask.shape) != (len(self.states), *spec.grid)):
            raise InputError(f"{len(self.states)} speakers: expected a mask of {spec.grid} tokens for each of them")


def stand_in_scene(spec: ModelSpec, frames: int) -> Scene:
    """Noise to hear and to look at, for random weights: good for measuring speed, meaningless otherwise."""
    generator = torch.Generator().manual_seed(0)
    steps = frames * spec.temporal_stride
    states = torch.randn(1, spec.audio_states, spec.audio_dim, steps, generator=generator)
    shown = torch.randn(1, 1, *spec.latent_shape, generator=generator)
    return Scene(states, shown, shown.expand(-1, LEAD_FRAMES, -1, -1, -1))


@dataclass
class AvatarStream(Stream):
    """A stream of `CausalS2V`. `scene` is needed; `distance` draws how far ahead the reference stands.

    `online`: after the first clip the first generated frame is the reference. The sink changes, so the warm-up of an
    absorption starts there.
    """

    scene: Scene | None = None
    distance: Distance = field(default_factory=lambda: drawn_distance(0))
    online: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        assert self.scene is not None
        assert isinstance(self.model, CausalS2V)
        assert isinstance(self.cache, AvatarCache)
        if self.initial is not None:
            raise InputError("a speech-to-video stream starts from an image: expected no initial latents")
        self._network, self._memory = self.model, self.cache
        self._reference = self.scene.reference
        motion = self.scene.motion
        self._motion = self._reference.expand(-1, LEAD_FRAMES, -1, -1, -1) if motion is None else motion
        self._steps = {timestep: step for step, timestep in enumerate(self.sampler.schedule.timesteps)}
        self._guidance: Guidance | None = None
        self._clip: list[Tensor] = []

    def _follow_prompt(self, start: int) -> None:
        super()._follow_prompt(start)
        if start == 0:
            self.prefill()

    def _recache(self, start: int) -> None:
        """The condition agrees with the new prompt."""
        self.prefill()

    @torch.inference_mode()
    def prefill(self) -> None:
        """Keys and values of the condition, without corrections: no history is missing that they could stand for."""
        with self._memory.condition(), self.absorber.resting():
            tokens = self._network.condition_tokens(self._reference, self._motion)
            self._network.prefill(tokens, self._condition(0.0), self.text, self._memory)

    @torch.inference_mode()
    def _latents(self, index: int, start: int, count: int) -> Tensor:
        self._guidance = self._guide(start, count)
        return super()._latents(index, start, count)

    def _guide(self, start: int, count: int) -> Guidance:
        scene, stride = self.scene, self.model.spec.temporal_stride
        assert scene is not None
        heard = scene.states[..., start * stride : (start + count) * stride]
        heard = F.pad(heard, (0, count * stride - heard.shape[-1]))
        pose = None if scene.pose is None else scene.pose[:, start : start + count]
        mask = None if scene.mask is None else scene.mask.flatten(1)[:, None, :, None]
        return self._network.guide(heard, mask, pose)

    def _velocity(self, x: Tensor, timestep: float) -> Tensor:
        step = self._steps[timestep]
        self._memory.begin_pass(step, self.distance(self._memory.start, step))
        if isinstance(self.absorber, PerStepAbsorber):
            self.absorber.use(step)
        flow = self._network(x, self._condition(timestep), self.text, self._memory, guidance=self._guidance)
        self.absorber.after_pass()
        return flow

    def _commit(self, latents: Tensor, start: int) -> None:
        """Nothing to commit: history is what the passes left behind. After the first clip, the sink moves on."""
        clip, end = self.model.spec.window_frames, start + latents.shape[1]
        if not self.online or start >= clip:
            return
        self._clip.append(latents)
        if end >= clip:
            self._move(torch.cat(self._clip, 1))
            self._clip = []
            self.absorber.recalibrate(end)
            self.prefill()

    @torch.inference_mode()
    def _move(self, clip: Tensor) -> None:
        """The first generated frame is the reference from now on."""
        assert self.scene is not None
        self._reference = clip[:, :1]
        if self.scene.moved is not None:
            self._motion = self.scene.moved(clip)
