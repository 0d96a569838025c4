"""Videos and contact sheets: what was written can be read back, and a broken run leaves nothing half-written."""

from __future__ import annotations

import re
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from ispa_deploy.errors import InputError, RunError
from ispa_deploy.media import sheet, video
from ispa_deploy.media.image import read_image
from ispa_deploy.media.sheet import Shown, contact_sheet
from ispa_deploy.media.video import VideoWriter, read_video

# Two roundings (limited-range YUV and back) and the encoder's own loss on flat colour; 2.5 measured.
COLOUR_TOLERANCE = 5
COLOURS = torch.tensor([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 1], [0, 0, 0], [0.5, 0.5, 0.5], [0.9, 0.5, 0.1]])


def flat(height: int, width: int, colours: Tensor = COLOURS) -> Tensor:
    """One frame of flat colour per row of `colours`: (F, 3, H, W)."""
    return colours[:, :, None, None].expand(-1, 3, height, width)


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """A disk that refuses files over `size` bytes, as a full one would."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("encoder", list(video.ENCODERS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_frames_size_rate_and_colour_survive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoder: str, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(video, "ENCODERS", {"no-such-encoder": {}, encoder: video.ENCODERS[encoder]})
    pixels = flat(40, 56).to(dtype)
    with VideoWriter(tmp_path / "v.mp4", fps=8, scale=2) as writer:
        writer.write(pixels[:3])
        writer.write(pixels[3:3])
        writer.write(pixels[3:])
    frames, fps = read_video(tmp_path / "v.mp4")
    assert frames.shape == (len(COLOURS), 80, 112, 3)
    assert fps == 8
    np.testing.assert_allclose(frames.mean(axis=(1, 2)), COLOURS * 255, atol=COLOUR_TOLERANCE)
    assert writer.frames == len(COLOURS)
    assert [entry.name for entry in tmp_path.iterdir()] == ["v.mp4"]


def test_odd_sizes_gain_one_repeated_row_and_column(tmp_path: Path) -> None:
    with VideoWriter(tmp_path / "v.mp4", fps=24.5) as writer:
        writer.write(flat(17, 33))
    frames, fps = read_video(tmp_path / "v.mp4")
    assert frames.shape == (len(COLOURS), 18, 34, 3)
    assert fps == 24.5
    np.testing.assert_allclose(frames[:, -1, -1], COLOURS * 255, atol=COLOUR_TOLERANCE)


def test_scale_repeats_pixels_in_place(tmp_path: Path) -> None:
    pixels = torch.zeros(1, 3, 2, 3)
    pixels[0, :, 1, 2] = 1
    with VideoWriter(tmp_path / "v.mp4", fps=8, scale=16) as writer:
        writer.write(pixels)
    frame = read_video(tmp_path / "v.mp4")[0][0]
    white = frame.mean(axis=2) > 127
    expected = np.zeros((32, 48), dtype=bool)
    expected[16:, 32:] = True
    np.testing.assert_array_equal(white, expected)


def test_values_outside_the_range_are_clamped(tmp_path: Path) -> None:
    with VideoWriter(tmp_path / "v.mp4", fps=8) as writer:
        writer.write(torch.stack([torch.full((3, 16, 16), -3.0), torch.full((3, 16, 16), 7.0)]))
    means = read_video(tmp_path / "v.mp4")[0].mean(axis=(1, 2, 3))
    np.testing.assert_allclose(means, [0, 255], atol=COLOUR_TOLERANCE)


def test_exception_removes_the_partial_and_keeps_the_old_video(tmp_path: Path) -> None:
    path = tmp_path / "v.mp4"
    path.write_bytes(b"old")

    def run_that_fails() -> None:
        with VideoWriter(path, fps=8) as writer:
            writer.write(flat(16, 16, torch.rand(200, 3)))  # more than the encoder looks ahead
            assert {entry.name for entry in tmp_path.iterdir()} == {"v.mp4", ".v.partial.mp4"}
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_that_fails()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_finish_names_the_video_at_once_and_for_good(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "v.mp4"

    def run() -> None:
        with VideoWriter(path, fps=8) as writer:
            writer.write(flat(16, 16))
            assert writer.finish() == path
            assert len(read_video(path)[0]) == len(COLOURS)
            assert writer.finish() == path
            raise error

    with pytest.raises(error):
        run()
    assert len(read_video(path)[0]) == len(COLOURS)


def test_ctrl_c_keeps_what_was_written(tmp_path: Path) -> None:
    def run() -> None:
        with VideoWriter(tmp_path / "v.mp4", fps=8) as writer:
            writer.write(flat(16, 16)[:4])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run()
    assert len(read_video(tmp_path / "v.mp4")[0]) == 4


def test_no_frames_no_file(tmp_path: Path) -> None:
    with VideoWriter(tmp_path / "v.mp4", fps=8) as writer:
        assert writer.finish() is None
    assert not list(tmp_path.iterdir())


def test_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path, rng: torch.Generator) -> None:
    noise = torch.rand(8, 3, 128, 128, generator=rng)

    def run() -> None:
        with VideoWriter(tmp_path / "v.mp4", fps=8) as writer:
            writer.write(noise)
            writer.finish()

    with largest_file(4096), pytest.raises(RunError, match=r"v\.mp4' could not be written: \S.*") as caught:
        run()
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())

    with largest_file(4096), pytest.raises(RunError, match="could not be written: "):
        contact_sheet([("noise", noise)], tmp_path / "s.png")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("v.avi", "expected '.mp4'"),
        ("v", "expected '.mp4'"),
        ("missing/v.mp4", "folder does not exist"),
        ("folder.mp4", "is a folder"),
        ("file/v.mp4", "folder does not exist"),
        ("n" * 300 + ".mp4", "File name too long"),
        ("n" * 244 + ".mp4", "File name too long"),  # while it is written, the name is longer
    ],
)
def test_bad_path_is_refused_before_any_frame(tmp_path: Path, name: str, says: str) -> None:
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=re.escape(says)):
        VideoWriter(tmp_path / name, fps=8)
    with pytest.raises(InputError, match=re.escape(says.replace("mp4", "png"))):
        contact_sheet([("row", flat(8, 8))], tmp_path / name.replace("mp4", "png"))


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a folder that refuses even root")
def test_read_only_folder_is_refused_before_any_frame() -> None:
    with pytest.raises(InputError, match="not writable"):
        VideoWriter("/proc/v.mp4", fps=8)


@pytest.mark.parametrize(("fps", "scale"), [(0, 1), (-8, 1), (float("nan"), 1), (float("inf"), 1), (8, 0)])
def test_bad_rate_and_scale_are_refused(tmp_path: Path, fps: float, scale: int) -> None:
    with pytest.raises(InputError, match="expected a"):
        VideoWriter(tmp_path / "v.mp4", fps=fps, scale=scale)


def test_pictures_of_a_tilted_telephone_are_upright(tmp_path: Path) -> None:
    """EXIF orientation 6: what is on top was written at the left."""
    seen = np.zeros((48, 64, 3), np.uint8)
    seen[:24], seen[:, :32, 2] = (200, 40, 40), 200
    tag = Image.Exif()
    tag[0x0112] = 6
    Image.fromarray(np.rot90(seen)).save(tmp_path / "i.jpg", quality=95, exif=tag)
    found = read_image(tmp_path / "i.jpg", 48, 64)
    torch.testing.assert_close(found, torch.from_numpy(seen).permute(2, 0, 1) / 255, atol=0.2, rtol=0)
    Image.fromarray(seen).save(tmp_path / "plain.jpg", quality=95)
    torch.testing.assert_close(read_image(tmp_path / "plain.jpg", 48, 64), found, atol=0.2, rtol=0)


def test_a_name_with_a_colon_is_a_file_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with VideoWriter("12:30.mp4", fps=8) as writer:
        writer.write(flat(16, 16))
    assert [entry.name for entry in tmp_path.iterdir()] == ["12:30.mp4"]
    assert len(read_video("12:30.mp4")[0]) == len(COLOURS)
    Image.new("RGB", (16, 16)).save("a:b.png")
    assert not read_image("a:b.png", 16, 16).any()
    with pytest.raises(InputError, match="No such file"):
        read_image("http://a.b/c.png", 16, 16)


@pytest.mark.parametrize("content", [None, b"", b"not a video"])
def test_unreadable_video_is_refused(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "v.mp4").write_bytes(content)
    with pytest.raises(InputError, match="cannot be read as a video"):
        read_video(tmp_path / "v.mp4")


def test_sheet_shows_evenly_spaced_frames_of_every_row(tmp_path: Path) -> None:
    greys = torch.linspace(0, 1, 9)[:, None].expand(-1, 3)
    rows = [("grey ramp", flat(20, 30, greys)), ("colours", flat(20, 30))]
    path = contact_sheet(rows, tmp_path / "s.png", columns=5, scale=3)
    with Image.open(path) as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    left = sheet.MARGIN + 45 + (90 + sheet.GAP) * np.arange(5)  # the middle of each picture
    top = sheet.MARGIN + 20 + 30
    below = top + 60 + 14 + sheet.MARGIN + 20
    for height, colours, shown in ((top, greys, [0, 2, 4, 6, 8]), (below, COLOURS, [0, 2, 3, 4, 6])):
        np.testing.assert_allclose(pixels[height, left], colours[shown] * 255, atol=1)
    gaps = left[:-1] + 45
    assert (pixels[top, gaps] == 255).all()
    assert (pixels[0] == 255).all()
    assert (pixels[sheet.MARGIN : sheet.MARGIN + 20] < 128).any(), "no label"
    assert [entry.name for entry in tmp_path.iterdir()] == ["s.png"]


def test_sheet_shrinks_large_pictures_and_long_labels(tmp_path: Path) -> None:
    path = contact_sheet([("a prompt that goes on " * 50, flat(480, 832)[:2])], tmp_path / "s.png")
    with Image.open(path) as picture:
        assert picture.width == 2 * sheet.MAX_TILE + sheet.GAP + 2 * sheet.MARGIN
        margin = np.asarray(picture.convert("L"))[:, -sheet.MARGIN :]
    assert (margin == 255).all(), "the label runs off the sheet"


def test_sheet_draws_the_number_of_each_frame(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[str] = []
    draw_text = ImageDraw.ImageDraw.text

    def spy(self: ImageDraw.ImageDraw, xy: tuple[float, float], text: str, **style: object) -> None:
        drawn.append(text)
        draw_text(self, xy, text, **style)  # type: ignore[arg-type]

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", spy)
    contact_sheet([("row", flat(8, 8))], tmp_path / "s.png", columns=3)
    assert drawn == ["row", "0", "3", "6"]


@pytest.mark.parametrize("chunks", [(1, 4, 4, 8, 12, 3), (32,), (1,) * 32])
@pytest.mark.parametrize("columns", [1, 5, 40])
def test_a_sheet_of_frames_as_they_come_is_that_of_the_video(
    tmp_path: Path, rng: torch.Generator, chunks: tuple[int, ...], columns: int
) -> None:
    pixels = torch.rand(32, 3, 8, 8, generator=rng)
    shown = Shown(32, columns)
    for chunk in pixels.split(chunks):
        shown.add(chunk)
        assert len(shown.numbers) <= columns + 1, "memory must not grow with the video"
    contact_sheet([("x", pixels)], tmp_path / "whole.png", columns=columns)
    contact_sheet([("x", shown.video())], tmp_path / "kept.png", columns=columns, numbers=shown.numbers)
    assert (tmp_path / "kept.png").read_bytes() == (tmp_path / "whole.png").read_bytes()


def test_a_sheet_of_a_video_that_ends_early_has_its_last_frame(rng: torch.Generator) -> None:
    pixels = torch.rand(20, 3, 8, 8, generator=rng)
    shown = Shown(101, 5)
    for chunk in pixels.split(10):
        shown.add(chunk)
    assert shown.numbers == (0, 19)
    assert torch.equal(shown.video(), pixels[[0, 19]])
    shown.add(torch.zeros(10, 3, 8, 8))
    assert shown.numbers == (0, 25, 29)


def test_sheet_refuses_no_columns(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="0 columns"):
        contact_sheet([("row", flat(8, 8))], tmp_path / "s.png", columns=0)
