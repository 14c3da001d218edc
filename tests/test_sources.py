"""What `--source` can be."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from utils.errors import InputError
from utils.sources import frames


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b.png", "a.jpg", "deep/c d.bmp"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        cv2.imwrite(str(path), np.full((20, 30, 3), 90, np.uint8))
    (tmp_path / "notes.md").write_text("no image")
    return tmp_path


def test_file_folder_glob_and_list(folder: Path) -> None:
    names = lambda source: [f.path.name for f in frames(str(source))]  # noqa: E731
    assert names(folder / "b.png") == ["b.png"]
    assert names(folder) == ["a.jpg", "b.png", "c d.bmp"]
    assert names(folder / "*.png") == ["b.png"]
    (folder / "list.txt").write_text(f"{folder / 'b.png'}\n\n{folder / 'a.jpg'}\n")
    assert names(folder / "list.txt") == ["b.png", "a.jpg"]


def test_a_corrupt_image_is_skipped_and_named(folder: Path, capsys: pytest.CaptureFixture) -> None:
    (folder / "b.png").write_bytes(b"broken")
    assert [f.path.name for f in frames(str(folder))] == ["a.jpg", "c d.bmp"]
    assert "b.png" in capsys.readouterr().out


def test_video_frames_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), 5.0, (64, 48))
    for i in range(4):
        writer.write(np.full((48, 64, 3), 40 * i, np.uint8))
    writer.release()
    found = list(frames(str(path)))
    assert [f.frame for f in found] == [0, 1, 2, 3]
    assert found[0].image.shape == (48, 64, 3) and found[0].fps == 5.0


@pytest.mark.parametrize(
    ("make", "message"), [("missing.png", "no such file"), ("empty", "no images or videos"), ("nothing*.png", "no images or videos")]
)
def test_a_source_with_nothing_in_it_is_named(tmp_path: Path, make: str, message: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=message):
        next(frames(str(tmp_path / make)))
