"""detect.py: the files of a run, its lines, its flags, and what it refuses."""

from __future__ import annotations

import csv
import re
import time
from importlib import import_module
from pathlib import Path

import cv2
import numpy as np
import pytest

from engine.detect_files import DetectionFiles, Kept, folder_name
from models.checkpoint import load_model, save_model
from tests.test_detector import NAMES, checkpoint
from tests.test_sources import FakeCapture, camera, clip
from utils.errors import InputError, run_script
from utils.sources import Frame

__all__ = ["camera"]  # a fixture


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, and a folder `in` with two images of one stem, one of an ending OpenCV cannot write, and a video."""
    root = tmp_path_factory.mktemp("detect")
    checkpoint(root / "best.pt")
    rng = np.random.default_rng(0)
    for name in ("in/a.png", "in/a.jpg", "in/sub/b.png"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(root / name), rng.integers(0, 256, (48, 96, 3), dtype=np.uint8))
    (root / "in/sub/b.png").rename(root / "in/sub/b.mpo")
    clip(root / "in/clip.mp4", 3)
    return root


def detect(work: Path, *args: object, script: str = "detect") -> None:
    given = ["--weights", work / "best.pt", "--device", "cpu", "--project", work, *args]
    import_module(script).main([str(a) for a in given])


def test_a_run_writes_what_users_of_yolov5_expect(work: Path, capsys: pytest.CaptureFixture) -> None:
    detect(work, "--source", work / "in", "--save-txt", "--save-conf", "--save-crop", "--save-csv", "--name", "all")
    out, run = capsys.readouterr().out, work / "all"
    assert {p.name for p in run.iterdir()} == {"a.jpg", "a_2.png", "b.jpg", "clip.mp4", "labels", "crops", "predictions.csv"}
    assert cv2.imread(str(run / "a_2.png")).shape == (48, 96, 3)
    video = cv2.VideoCapture(str(run / "clip.mp4"))
    assert (video.get(cv2.CAP_PROP_FRAME_COUNT), video.get(cv2.CAP_PROP_FPS)) == (3, 5.0)

    lines = [line for line in out.splitlines() if line.startswith(("image", "video"))]
    assert re.fullmatch(rf"image 1/4 {work}/in/a\.jpg: 32x64 .+, \d+\.\dms", lines[0])
    assert re.match(rf"video 3/4 \(2/3\) {work}/in/clip\.mp4: 48x64 ", lines[3]) and len(lines) == 6
    assert re.search(r"Speed: \d.*ms pre-process, .*ms inference, .*ms NMS per image at shape \(1, 3, 64, 64\)", out)
    assert f"Results saved to {run}" in out and f"labels saved to {run / 'labels'}" in out

    labels = {p.stem: [line.split() for line in p.read_text().splitlines()] for p in (run / "labels").iterdir()}
    assert {"a", "a_2", "b"} <= labels.keys() and labels.keys() <= {"a", "a_2", "b", "clip_1", "clip_2", "clip_3"}
    assert all(len(row) == 6 and 0 <= float(v) <= 1 for rows in labels.values() for row in rows for v in row[1:])
    assert len(list((run / "crops").rglob("a*.jpg"))) <= len(labels["a"]) + len(labels["a_2"])
    assert {p.name for p in (run / "crops").iterdir()} <= set(NAMES)

    with (run / "predictions.csv").open() as file:
        header, *rows = csv.reader(file)
    assert header == ["Image Name", "Prediction", "Confidence"]
    assert [row[1] for row in rows if row[0] == "a.jpg"] == [NAMES[int(row[0])] for row in labels["a"]]
    assert [float(row[2]) for row in rows if row[0] == "a.jpg"] == pytest.approx([float(row[5]) for row in labels["a"]], abs=1e-4)


def test_nosave_leaves_only_what_was_asked_for(work: Path) -> None:
    detect(work, "--source", work / "in/a.jpg", "--nosave", "--save-txt", "--name", "bare", script="prune_detect")
    assert [p.name for p in (work / "bare").iterdir()] == ["labels"]
    before = (work / "bare/labels/a.txt").read_text()
    detect(work, "--source", work / "in/a.jpg", "--nosave", "--save-txt", "--name", "bare", "--exist-ok")
    assert (work / "bare/labels/a.txt").read_text() == before, "not appended to"


@pytest.mark.parametrize(("sizes", "seen"), [(["64"], "32x64"), (["48", "96"], "48x96"), (["90", "32"], "16x32"), (["32", "96"], "32x64")])
def test_imgsz_takes_a_side_or_height_and_width(sizes: list[str], seen: str, work: Path, capsys: pytest.CaptureFixture) -> None:
    """A 48x96 image, at a stride of 16: padded only to the next multiple."""
    detect(work, "--source", work / "in/a.jpg", "--imgsz", *sizes, "--nosave", "--name", "sizes")
    assert f"a.jpg: {seen} " in capsys.readouterr().out


def test_vid_stride(work: Path) -> None:
    detect(work, "--source", work / "in/clip.mp4", "--vid-stride", 2, "--save-txt", "--conf", 0.001, "--name", "every2")
    assert {p.name for p in (work / "every2/labels").iterdir()} == {"clip_1.txt", "clip_3.txt"}
    video = cv2.VideoCapture(str(work / "every2/clip.mp4"))
    assert (video.get(cv2.CAP_PROP_FRAME_COUNT), video.get(cv2.CAP_PROP_FPS)) == (2, 2.5)


def test_a_camera_is_saved_under_its_number(work: Path, camera: type[FakeCapture], capsys: pytest.CaptureFixture) -> None:
    camera.script = [10, 200]
    detect(work, "--source", 0, "--name", "camera", "--save-txt", "--conf", 0.001)
    assert (work / "camera/0.mp4").exists() and (work / "camera/labels/0_1.txt").exists()
    assert re.search(r"^0: \d+x\d+ ", capsys.readouterr().out, re.M)


def test_interrupting_a_stream_keeps_its_video_and_says_where(
    work: Path, camera: type[FakeCapture], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    class Endless(list):  # as a camera is, at 100 frames a second
        def pop(self, index: int) -> int:
            time.sleep(0.01)
            return 10

    camera.script = Endless([10])
    write, seen = DetectionFiles.write, []

    def interrupted(self: DetectionFiles, frame: Frame, boxes: np.ndarray, drawn: np.ndarray) -> None:
        write(self, frame, boxes, drawn)
        seen.append(frame)
        if len(seen) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(DetectionFiles, "write", interrupted)
    with pytest.raises(SystemExit) as ended:
        run_script(lambda: detect(work, "--source", 0, "--name", "ctrl-c"))
    assert ended.value.code == 130 and f"Results saved to {work / 'ctrl-c'}" in capsys.readouterr().out
    monkeypatch.undo()
    assert cv2.VideoCapture(str(work / "ctrl-c/0.mp4")).get(cv2.CAP_PROP_FRAME_COUNT) == 3


@pytest.mark.parametrize(("name", "safe"), [
    ("cat", "cat"), ("traffic light", "traffic light"), ("a/b", "a_b"), ("..", "class7"), ("", "class7"), (" .", "class7"), ("../../x", "_.._x"),
    ("a\\b:c", "a_b_c"), ("naïve 猫", "naïve 猫"), ("x" * 300, "x" * 100), ("\n\x00", "__"),
])  # fmt: skip
def test_a_class_names_folder_stays_below_crops(name: str, safe: str) -> None:
    assert folder_name(name, 7) == safe


def test_crops_never_leave_the_run_nor_hide_each_other(work: Path, tmp_path: Path) -> None:
    model = load_model(work / "best.pt")
    names = ("../../escaped", "..", "/abs")
    save_model(tmp_path / "odd.pt", type(model)(model.blocks, model.state, names, imgsz=64))
    detect(work, "--weights", tmp_path / "odd.pt", "--source", work / "in/a.jpg", "--save-crop", "--save-txt", "--project", tmp_path / "r")
    run = tmp_path / "r/exp"
    crops = list((run / "crops").rglob("*.jpg"))
    assert len(crops) == len((run / "labels/a.txt").read_text().splitlines()) > 0
    assert {p.name for p in (run / "crops").iterdir()} <= {"_.._escaped", "class1", "_abs"}
    assert {p.name for p in tmp_path.iterdir()} == {"odd.pt", "r"} and {p.name for p in run.iterdir()} == {"a.jpg", "labels", "crops"}

    files = DetectionFiles(tmp_path, ["x"], Kept(images=False, crops=True))
    image, box = np.zeros((40, 40, 3), np.uint8), [5, 5, 30, 30, 0.9, 0]
    files.write(Frame(image, Path("a.jpg")), np.array([box, box], np.float32), None)
    files.write(Frame(image, Path("a_2.jpg")), np.array([box], np.float32), None)
    assert {p.name for p in (tmp_path / "crops/x").iterdir()} == {"a.jpg", "a_2.jpg", "a_2_2.jpg"}


@pytest.mark.parametrize(("flags", "message"), [
    (["--view-img"], r"--view-img"), (["--classes", 5], r"--classes 5: this model has the classes 0\.\.2"), (["--conf", 1.5], "between 0 and 1"),
    (["--max-det", 0], "at least 1"), (["--vid-stride", 0], "--vid-stride 0"), (["--line-thickness", 0], "--line-thickness 0"),
    (["--imgsz", 1, 2, 3], r"--imgsz 1 2 3: give one size, or height and width"), (["--imgsz", 0], "--imgsz 0: a size is at least 1"),
    (["--device", "99"], "--device 99"), (["--source", 99], "--source 99: cannot be opened"),
])  # fmt: skip
def test_a_wrong_flag_is_one_line_and_writes_nothing(
    flags: list, message: str, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    with pytest.raises(SystemExit) as ended:
        run_script(lambda: detect(work, "--source", work / "in/a.jpg", "--project", tmp_path / "none", *flags))
    error = capsys.readouterr().err
    assert ended.value.code == 2 and re.search(message, error) and len(error.strip().splitlines()) == 1
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("script", ["val", "train", "slim_prune"])
def test_scripts_of_squares_refuse_two_sizes(script: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as ended:
        import_module(script).main(["--weights", "x.pt", "--imgsz", "480", "640"])
    assert ended.value.code == 2 and "--imgsz 480 640: give one size, the long side" in capsys.readouterr().err


def test_a_corrupt_image_among_good_ones_is_named_and_the_rest_is_done(work: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "bad.jpg").write_bytes(b"nothing")
    (tmp_path / "list.txt").write_text(f"./bad.jpg\n{work / 'in/a.jpg'}\n")
    detect(work, "--source", tmp_path / "list.txt", "--project", tmp_path, "--name", "run")
    assert "skipped: image" in capsys.readouterr().out and [p.name for p in (tmp_path / "run").iterdir()] == ["a.jpg"]
    with pytest.raises(InputError, match="none of its 1 files"):
        detect(work, "--source", tmp_path / "bad.jpg", "--project", tmp_path, "--name", "none")
    assert not (tmp_path / "none").exists()
