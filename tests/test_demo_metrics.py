"""The demo's own measures, judged on videos whose truth is known because they were drawn."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ispa_deploy.demo.codec import BlockCodec
from ispa_deploy.demo.metrics import scene_report
from ispa_deploy.demo.prompts import OPEN
from ispa_deploy.demo.scene import Scene, background, centres, make_scenes, random_attributes, render
from ispa_deploy.errors import InputError

WARM_UP, FRAMES, COUNT = 12, 36, 48


@pytest.fixture(scope="module")
def drawn() -> tuple[Scene, Tensor]:
    generator = torch.Generator().manual_seed(21)
    scene = make_scenes(random_attributes(COUNT, generator), generator)
    return scene, render(scene, torch.arange(FRAMES).expand(COUNT, -1))


def report(drawn: tuple[Scene, Tensor], row: int, pixels: Tensor | None = None) -> dict[str, float]:
    scene, video = drawn
    later = video[row, WARM_UP:] if pixels is None else pixels
    return scene_report(later, scene.attributes[row], video[row, :WARM_UP])


def test_the_truth_scores_full_marks(drawn: tuple[Scene, Tensor]) -> None:
    for row in range(COUNT):
        found = report(drawn, row)
        assert found["present"] == 1
        assert found["shape"] >= 0.9
        assert found["shape_iou"] > 0.8
        assert found["background_psnr"] > 40
        assert found["flicker"] < 0.2


def test_speed_and_path_are_those_of_the_drawn_centre(drawn: tuple[Scene, Tensor]) -> None:
    scene, _ = drawn
    moved = centres(scene, torch.arange(WARM_UP, FRAMES).expand(COUNT, -1)).diff(dim=1).norm(dim=2)
    for row in range(COUNT):
        found = report(drawn, row)
        assert found["speed"] == pytest.approx(float(moved[row].mean()), rel=0.1)
        assert found["path"] == pytest.approx(float(moved[row].sum()), rel=0.1)
        assert found["speed"] == pytest.approx(float(scene.velocity[row].norm()), rel=0.1)  # bounces cost little


def test_the_codec_costs_little(drawn: tuple[Scene, Tensor]) -> None:
    codec = BlockCodec()
    scene, video = drawn
    coded = codec.decode(codec.encode(video))
    reports = [scene_report(coded[row, WARM_UP:], scene.attributes[row], coded[row, :WARM_UP]) for row in range(COUNT)]
    mean = {name: sum(found[name] for found in reports) / COUNT for name in reports[0]}
    assert mean["present"] == 1
    assert mean["shape"] > 0.9
    assert mean["background_psnr"] > 38


def test_a_frozen_video_does_not_move(drawn: tuple[Scene, Tensor]) -> None:
    _, video = drawn
    found = report(drawn, 3, video[3, WARM_UP:][:1].expand(20, -1, -1, -1))
    assert found["speed"] == found["path"] == found["flicker"] == 0
    assert found["present"] == 1


def test_a_single_frame_has_no_motion(drawn: tuple[Scene, Tensor]) -> None:
    found = report(drawn, 3, drawn[1][3, -1:])
    assert found["speed"] == found["path"] == found["flicker"] == 0


def test_without_a_sprite_nothing_is_present(drawn: tuple[Scene, Tensor]) -> None:
    scene, _ = drawn
    for row in range(8):
        found = report(drawn, row, background(scene)[row].expand(6, -1, -1, -1))
        assert found["present"] == found["shape"] == found["speed"] == 0
        assert found["background_psnr"] > 40


def test_another_shape_of_the_same_colour_is_told_apart(drawn: tuple[Scene, Tensor]) -> None:
    scene, _ = drawn
    for row in range(8):
        for other in range(1, 4):
            asked = scene.attributes[row].clone()
            asked[2] = (asked[2] + other) % 4
            found = scene_report(drawn[1][row, WARM_UP:], asked, drawn[1][row, :WARM_UP])
            assert found["shape"] <= 0.1
            assert found["shape_iou"] < report(drawn, row)["shape_iou"]


def test_another_colour_is_not_the_prompted_sprite(drawn: tuple[Scene, Tensor]) -> None:
    scene, video = drawn
    for row in range(8):
        other = scene.attributes[row : row + 1].clone()
        other[:, 1] = (other[:, 1] + 3) % 6
        changed = Scene(**{name: value[row : row + 1] for name, value in vars(scene).items()} | {"attributes": other})
        pixels = render(changed, torch.arange(WARM_UP, FRAMES)[None])[0]
        assert scene_report(pixels, scene.attributes[row], video[row, :WARM_UP])["present"] == 0


def test_background_psnr_of_a_known_shift(drawn: tuple[Scene, Tensor]) -> None:
    """A constant 0.02 on every pixel is 20 * log10(1 / 0.02) = 34 dB, and does not flicker."""
    found = report(drawn, 5, drawn[1][5, WARM_UP:] + 0.02)
    assert found["background_psnr"] == pytest.approx(33.98, abs=0.2)
    assert found["flicker"] == pytest.approx(report(drawn, 5)["flicker"], abs=0.05)


def test_flicker_of_a_known_blink(drawn: tuple[Scene, Tensor]) -> None:
    blink = torch.where(torch.arange(24) % 2 == 0, 0.0, 4 / 255)[:, None, None, None]
    found = report(drawn, 5, drawn[1][5, WARM_UP:] + blink)
    assert found["flicker"] == pytest.approx(4, abs=0.1)


def test_a_flooded_frame_is_no_background(drawn: tuple[Scene, Tensor]) -> None:
    scene, video = drawn
    row = int((scene.attributes[:, 2] != 3).nonzero()[0])  # a ring has no colour in its centre
    centre = centres(scene, torch.full((COUNT, 1), WARM_UP))[row, 0].long()
    colour = video[row, WARM_UP, :, centre[1], centre[0]]
    found = report(drawn, row, colour[None, :, None, None].expand(4, -1, 40, 40))
    assert found["present"] == 0
    assert found["background_psnr"] < 15


def test_an_open_shape_is_met_by_any(drawn: tuple[Scene, Tensor]) -> None:
    asked = drawn[0].attributes[2].clone()
    asked[[0, 2, 3, 4]] = OPEN
    found = scene_report(drawn[1][2, WARM_UP:], asked, drawn[1][2, :WARM_UP])
    assert found["shape"] == found["present"] == 1


def test_what_cannot_be_judged_is_refused(drawn: tuple[Scene, Tensor]) -> None:
    scene, video = drawn
    asked = scene.attributes[0].clone()
    asked[1] = OPEN
    with pytest.raises(InputError, match="colour"):
        scene_report(video[0], asked, video[0])
    with pytest.raises(InputError, match="warm-up"):
        scene_report(video[0], scene.attributes[0], video[0, :0])
    with pytest.raises(InputError, match=r"expected \(frames, 3, 40, 40\)"):
        scene_report(video[0, :, :, :32], scene.attributes[0], video[0])
