"""What `--source` can be."""

from __future__ import annotations

import http.server
import threading
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pytest

from utils import streams
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


def clip(path: Path, frames_: int = 4) -> Path:
    """A 64x48 video at 5 frames a second; frame i is grey 40 i."""
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), 5.0, (64, 48))
    for i in range(frames_):
        writer.write(np.full((48, 64, 3), 40 * i, np.uint8))
    writer.release()
    return path


def test_every_other_frame_of_a_video(tmp_path: Path) -> None:
    found = list(frames(str(clip(tmp_path / "clip.mp4", 5)), vid_stride=2))
    assert [f.frame for f in found] == [0, 2, 4] and [f.fps for f in found] == [2.5] * 3
    assert [int(f.image.mean()) for f in found] == pytest.approx([0, 80, 160], abs=4)
    assert found[1].label == f"video 1/1 (3/5) {tmp_path / 'clip.mp4'}"


def test_images_and_videos_of_a_folder_are_numbered_together(folder: Path) -> None:
    clip(folder / "b.mp4", 2)
    labels = [f.label for f in frames(str(folder))]
    assert labels == [
        f"image 1/4 {folder}/a.jpg", f"video 2/4 (1/2) {folder}/b.mp4", f"video 2/4 (2/2) {folder}/b.mp4", f"image 3/4 {folder}/b.png",
        f"image 4/4 {folder}/deep/c d.bmp",
    ]  # fmt: skip


def test_a_lists_lines_are_found_from_the_list_or_the_working_folder(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    here = tmp_path / "here"
    (here / "deep").mkdir(parents=True)
    cv2.imwrite(str(here / "a.jpg"), np.zeros((9, 9, 3), np.uint8))
    monkeypatch.chdir(here)
    (folder / "list.txt").write_text("# a comment\n./a.jpg\na.jpg\ndeep/c d.bmp\ngone.png\nnotes.md\n\n")
    found = [(f.path, f.image.shape[0]) for f in frames(str(folder / "list.txt"))]
    assert found == [(folder / "a.jpg", 20), (Path("a.jpg"), 9), (folder / "deep/c d.bmp", 20)]
    out = capsys.readouterr().out
    assert "names gone.png: no such file" in out and "names notes.md: has no known ending" in out and "comment" not in out
    (folder / "none.txt").write_text("gone.png\n")
    with pytest.raises(InputError, match=r"none\.txt: none of its 1 lines"):
        next(frames(str(folder / "none.txt")))


class FakeCapture:
    """A capture that gives `script`'s frames: a number is a grey value, None a drop. Opening it again goes on in the script."""

    script: list[int | None] = []
    opened: list[object] = []

    def __init__(self, source: object) -> None:
        FakeCapture.opened.append(source)
        self.open, self.value = bool(self.script), 0

    def isOpened(self) -> bool:
        return self.open

    def get(self, what: int) -> float:
        return {cv2.CAP_PROP_FPS: 10.0, cv2.CAP_PROP_FRAME_COUNT: -1.0}[what]

    def grab(self) -> bool:
        if not self.open or not self.script:
            return False
        value = self.script.pop(0)
        self.value = value or 0
        return value is not None

    def retrieve(self) -> tuple[bool, np.ndarray]:
        return True, np.full((6, 8, 3), self.value, np.uint8)

    def release(self) -> None:
        self.open = False


@pytest.fixture
def camera(monkeypatch: pytest.MonkeyPatch) -> type[FakeCapture]:
    FakeCapture.script, FakeCapture.opened = [], []
    monkeypatch.setattr(cv2, "VideoCapture", FakeCapture)
    monkeypatch.setattr(streams, "RETRY_SECONDS", 0.0)
    return FakeCapture


def test_a_camera_gives_its_newest_frame_and_is_opened_again_after_a_drop(camera: type[FakeCapture], capsys: pytest.CaptureFixture) -> None:
    camera.script = [10, 20, None, 30, 40]
    found = list(frames("0"))
    values = [int(f.image[0, 0, 0]) for f in found]
    assert values[-1] == 40 and values == sorted(set(values)) and set(values) <= {10, 20, 30, 40}
    assert [f.frame for f in found] == list(range(len(found))) and found[0].live and found[0].label == "0" and found[0].fps == 10.0
    assert camera.opened == [0] * 7, "once, after the drop, and five times at the end"
    out = capsys.readouterr().out
    assert "camera 0: no frame came; opening it again (1 of 5)" in out and "camera 0: no frame after 5 attempts; the stream is over" in out


def test_a_streams_password_is_neither_logged_nor_part_of_a_file_name(camera: type[FakeCapture], capsys: pytest.CaptureFixture) -> None:
    camera.script = [10, 20, 30, 40]
    found = list(frames("rtsp://me:secret@cam.local:554/one?token=abc", vid_stride=4))
    assert [int(f.image[0, 0, 0]) for f in found] == [10] and found[0].fps == 2.5
    assert found[0].path == Path("cam_local_554_one") and camera.opened[0] == "rtsp://me:secret@cam.local:554/one?token=abc"
    assert "secret" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("source", "message"), [("7", "--source 7: cannot be opened"), ("rtsp://a:pw@b/c", "--source rtsp://b/c: cannot be")]
)
def test_what_does_not_open_is_one_error(source: str, message: str, camera: type[FakeCapture]) -> None:
    with pytest.raises(InputError, match=message):
        next(frames(source))


def test_leaving_a_stream_early_stops_its_thread(camera: type[FakeCapture]) -> None:
    camera.script = [5] * 100000
    stream = frames("0")
    next(stream)
    stream.close()
    left = len(camera.script)
    assert left > 0 and not any(t.name.startswith("live") for t in threading.enumerate())


class _Server(http.server.SimpleHTTPRequestHandler):
    """Serves files, and under /live an endless picture stream as IP cameras do."""

    def log_message(self, *args: object) -> None:
        """Quiet."""

    def do_GET(self) -> None:
        if self.path != "/live":
            return super().do_GET()
        self.send_response(200)
        self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=frame")
        self.end_headers()
        for i in range(5):
            jpeg = cv2.imencode(".jpg", np.full((48, 64, 3), 40 * i, np.uint8))[1].tobytes()
            self.wfile.write(b"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: %d\r\n\r\n" % len(jpeg) + jpeg + b"\r\n")


def test_addresses_of_a_file_and_of_a_live_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clip(tmp_path / "clip.mp4", 4)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(streams, "RETRIES", 1)
    monkeypatch.setattr(streams, "RETRY_SECONDS", 0.0)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(_Server, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    try:
        if not cv2.VideoCapture(f"{address}/clip.mp4").isOpened():
            pytest.skip("this OpenCV reads no http")
        found = list(frames(f"{address}/clip.mp4"))
        assert [f.frame for f in found] == [0, 1, 2, 3] and not found[0].live and found[0].total == 4
        stream = frames(f"{address}/live")
        first = next(stream)
        assert first.live and first.image.shape == (48, 64, 3) and first.path.name == f"127_0_0_1_{server.server_port}_live"
        stream.close()
        with pytest.raises(InputError, match="cannot be opened"):
            next(frames(f"{address}/none.mp4"))
    finally:
        server.shutdown()
        server.server_close()
