"""The demo world, its codec and its language: laws with references of their own."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ispa_deploy.demo import codec
from ispa_deploy.demo.codec import BlockCodec
from ispa_deploy.demo.prompts import OPEN, TEXT_DIM, TEXT_LEN, VOCABULARY, embed, parse_prompt, prompt_text
from ispa_deploy.demo.scene import (
    ATTRIBUTES,
    COLOURS,
    SPEEDS,
    Scene,
    background,
    centres,
    make_scenes,
    random_attributes,
    render,
    sprite_mask,
)
from ispa_deploy.errors import InputError


def scenes(count: int, seed: int = 0) -> Scene:
    generator = torch.Generator().manual_seed(seed)
    return make_scenes(random_attributes(count, generator), generator)


def clip(count: int, frames: int = 12, seed: int = 0) -> tuple[Scene, Tensor]:
    scene = scenes(count, seed)
    return scene, render(scene, torch.arange(frames).expand(count, -1))


# ---- scene


def test_frames_are_float32_pixels_of_the_documented_shape() -> None:
    _, pixels = clip(6, frames=4)
    assert pixels.shape == (6, 4, 3, 40, 40)
    assert pixels.dtype == torch.float32
    assert 0 <= pixels.min() <= pixels.max() <= 1


def test_a_frame_depends_on_its_time_alone() -> None:
    scene, pixels = clip(8)
    assert torch.allclose(render(scene, torch.full((8, 1), 7))[:, 0], pixels[:, 7], atol=1e-6)


def test_a_scene_depends_on_its_own_row_alone() -> None:
    scene, pixels = clip(8)
    alone = Scene(**{name: value[5:6] for name, value in vars(scene).items()})
    assert torch.allclose(render(alone, torch.arange(12)[None]), pixels[5:6], atol=1e-6)


def test_the_generator_fixes_everything() -> None:
    assert torch.equal(clip(4, seed=9)[1], clip(4, seed=9)[1])
    assert not torch.equal(clip(4, seed=9)[1], clip(4, seed=10)[1])


def test_a_bounce_comes_back_after_its_period() -> None:
    scene = scenes(16)
    scene = replace(scene, velocity=torch.full((16, 2), 1.25))  # both axes in step: one period for the pair
    period = 2 * (40 - 2 * (scene.radius + 0.5)) / 1.25
    times = torch.arange(10.0).expand(16, -1)
    assert torch.allclose(render(scene, times), render(scene, times + period[:, None]), atol=1e-4)


def test_the_centre_agrees_with_a_stepped_ball() -> None:
    scene = scenes(32)
    low, high = scene.radius[:, None] + 0.5, 39.5 - scene.radius[:, None]
    fine = 200
    position, velocity = low + scene.start * (high - low), scene.velocity / fine
    expected = [position]
    for _ in range(30):
        for _ in range(fine):
            position = position + velocity
            velocity = torch.where((position < low) | (position > high), -velocity, velocity)
            position = torch.where(position < low, 2 * low - position, position)
            position = torch.where(position > high, 2 * high - position, position)
        expected.append(position)
    found = centres(scene, torch.arange(31).expand(32, -1))
    assert (found - torch.stack(expected, 1)).abs().max() < 0.01


@pytest.mark.parametrize(("speed", "bounds"), list(enumerate(SPEEDS.values())))
def test_speeds_keep_to_their_word(speed: int, bounds: tuple[float, float]) -> None:
    generator = torch.Generator().manual_seed(1)
    attributes = random_attributes(500, generator)
    attributes[:, 0] = speed
    found = make_scenes(attributes, generator).velocity.norm(dim=1)
    assert bounds[0] - 1e-5 <= found.min() <= found.max() <= bounds[1] + 1e-5
    assert found.max() - found.min() > 0.9 * (bounds[1] - bounds[0])


def test_the_sprite_is_its_colour_and_the_rest_is_background() -> None:
    scene, pixels = clip(40)
    mask = sprite_mask(scene, torch.arange(12).expand(40, -1))
    colour = torch.tensor(list(COLOURS.values()))[scene.attributes[:, 1]]
    for row in range(40):
        inside, outside = mask[row] > 0.95, mask[row] < 0.001
        assert (pixels[row].movedim(1, -1)[inside] - colour[row]).abs().max() < 0.05
        still = background(scene)[row].movedim(0, -1).expand(12, -1, -1, -1)
        assert (pixels[row].movedim(1, -1)[outside] - still[outside]).abs().max() < 0.002


@pytest.mark.parametrize(
    ("shape", "area"),
    list(enumerate((math.pi, 1.7**2, 1.8**2 / 0.866 / 2, math.pi * (1.02**2 - 0.42**2)))),
    ids=ATTRIBUTES[2],
)
def test_sprites_have_the_area_of_their_outline(shape: int, area: float) -> None:
    generator = torch.Generator().manual_seed(2)
    attributes = random_attributes(60, generator)
    attributes[:, 2] = shape
    scene = make_scenes(attributes, generator)
    drawn = (sprite_mask(scene, torch.arange(4).expand(60, -1)) > 0.5).sum((2, 3)) / scene.radius.square()[:, None]
    assert float(drawn.mean()) == pytest.approx(area, rel=0.02)


def test_attributes_are_drawn_evenly() -> None:
    drawn = random_attributes(6000, torch.Generator().manual_seed(3))
    for row, words in enumerate(ATTRIBUTES):
        share = drawn[:, row].bincount(minlength=len(words)) / 6000
        assert (share - 1 / len(words)).abs().max() < 0.03


# ---- codec


def test_stored_constants_are_what_fitting_gives() -> None:
    mean, scale = codec.fit(torch.Generator().manual_seed(0))
    stored = BlockCodec()
    assert torch.allclose(stored.mean.flatten(), mean, atol=6e-5)
    assert torch.allclose(stored.scale.flatten(), scale, atol=6e-5)


def test_round_trip_keeps_the_picture() -> None:
    _, pixels = clip(64)
    fixed = BlockCodec()
    error = (fixed.decode(fixed.encode(pixels)) - pixels).square().mean((1, 2, 3, 4))
    assert (-10 * error.log10()).mean() >= 32


def test_latents_survive_decoding_where_nothing_clips() -> None:
    fixed = BlockCodec()
    latents = fixed.encode(torch.full((2, 3, 3, 40, 40), 0.5))
    latents = latents + 0.2 * torch.randn(latents.shape, generator=torch.Generator().manual_seed(4))
    pixels = fixed.decode(latents)
    assert 0 < pixels.min() < pixels.max() < 1  # the law below would not hold otherwise
    assert torch.allclose(fixed.encode(pixels), latents, atol=2e-4)


def test_latents_have_unit_variance_and_the_documented_layout() -> None:
    _, pixels = clip(128, frames=3, seed=5)
    latents = BlockCodec().encode(pixels)
    assert latents.shape == (128, 3, 40, 5, 5)
    assert latents.dtype == torch.float32
    assert abs(float(latents.std()) - 1) < 0.05
    assert abs(float(latents.mean())) < 0.05


def test_a_latent_cell_is_its_own_block() -> None:
    fixed = BlockCodec()
    pixels = torch.full((1, 3, 40, 40), 0.5)
    changed = pixels.clone()
    changed[..., 8:16, 24:32] = 0.8
    touched = (fixed.encode(changed) != fixed.encode(pixels)).any(1)[0]
    assert touched.nonzero().tolist() == [[1, 3]]


def test_first_channel_is_mean_luma() -> None:
    pixels = torch.rand(2, 3, 40, 40, generator=torch.Generator().manual_seed(6))
    fixed = BlockCodec()
    luma = torch.einsum("c,fchw->fhw", torch.tensor([0.299, 0.587, 0.114]), pixels - 0.5)
    expected = 8 * torch.nn.functional.avg_pool2d(luma, 8)  # an orthonormal 8x8 DCT: the DC is eight times the mean
    found = fixed.encode(pixels)[:, 0] * fixed.scale[0] + fixed.mean[0]
    assert torch.allclose(found, expected, atol=1e-5)


def test_leading_dimensions_are_free_and_low_precision_is_widened() -> None:
    fixed = BlockCodec()
    _, pixels = clip(2, frames=2)
    assert torch.allclose(fixed.encode(pixels[1]), fixed.encode(pixels)[1], atol=1e-5)
    half = pixels.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fixed.encode(half), BlockCodec().encode(half.float()))


@pytest.mark.parametrize("shape", [(3, 40, 40), (2, 3, 40, 48), (2, 1, 40, 40)])
def test_wrong_pixels_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"expected \(\.\.\., frames, 3, 40, 40\)"):
        BlockCodec().encode(torch.zeros(shape))


def test_wrong_latents_are_refused() -> None:
    with pytest.raises(InputError, match=r"expected \(\.\.\., frames, 40, 5, 5\)"):
        BlockCodec().decode(torch.zeros(2, 16, 5, 5))


# ---- prompts


def test_the_vocabulary_is_21_words() -> None:
    assert len(VOCABULARY) == len(set(VOCABULARY)) == 21
    assert len(VOCABULARY) <= TEXT_DIM


def test_prompts_round_trip() -> None:
    for row in random_attributes(300, torch.Generator().manual_seed(7)):
        assert parse_prompt(prompt_text(row)).equal(row)


def test_open_attributes_round_trip() -> None:
    generator = torch.Generator().manual_seed(8)
    for row in random_attributes(300, generator):
        left = row.where(torch.rand(5, generator=generator) < 0.5, OPEN)
        if (left != OPEN).any():
            assert parse_prompt(prompt_text(left)).equal(left)


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("a fast red ring over teal waves", [1, 0, 3, 3, 3]),
        ("A SLOW, White-Disc!", [0, 5, 0, -1, -1]),
        ("stripes behind something blue that glows", [-1, 2, -1, -1, 1]),
        ("red ring, very red", [-1, 0, 3, -1, -1]),
        ("a grey ground", [-1, -1, -1, 0, -1]),
    ],
)
def test_prompts_are_read_from_free_text(text: str, ids: list[int]) -> None:
    assert parse_prompt(text).tolist() == ids


def test_the_written_prompt() -> None:
    assert prompt_text(torch.tensor([1, 0, 3, 3, 3])) == "a fast red ring over teal waves"


@pytest.mark.parametrize("text", ["", "   ", "a cat on a reddish mat"])
def test_a_prompt_without_a_known_word_lists_them(text: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_prompt(text)
    assert all(word in str(caught.value) for word in VOCABULARY)
    assert "\n" not in str(caught.value)


def test_two_words_for_one_attribute_are_refused_by_name() -> None:
    with pytest.raises(InputError, match="two colours, 'red' and 'blue'"):
        parse_prompt("a red and blue disc")


def test_embedding_is_one_hot_in_the_vocabulary() -> None:
    texts = ("a fast red ring over teal waves", "a blue thing with checks")
    rows = embed(torch.stack([parse_prompt(text) for text in texts]))
    assert rows.shape == (2, TEXT_LEN, TEXT_DIM)
    assert rows.dtype == torch.float32
    words = [[VOCABULARY[i] for i in row.nonzero()[:, 1]] for row in rows]
    assert words == [["fast", "red", "ring", "teal", "waves"], ["blue", "checks"]]
    assert rows.sum(2).tolist() == [[1, 1, 1, 1, 1, 0, 0, 0], [0, 1, 0, 0, 1, 0, 0, 0]]
