"""What a detection run leaves in its folder: annotated images and videos, labels, crops and `predictions.csv`."""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from utils.boxes import label_text
from utils.errors import InputError
from utils.files import OwnNames, make_folder
from utils.plots import draw_boxes
from utils.sources import Frame

CSV_HEADER = ("Image Name", "Prediction", "Confidence")


@dataclass(frozen=True)
class Kept:
    """Which files are written."""

    images: bool = True
    txt: bool = False
    conf: bool = False
    crops: bool = False
    csv: bool = False


@dataclass(frozen=True)
class Drawing:
    """How boxes are drawn. `line_thickness` in pixels."""

    line_thickness: int = 3
    hide_labels: bool = False
    hide_conf: bool = False

    def __post_init__(self) -> None:
        if self.line_thickness < 1:
            raise InputError(f"--line-thickness {self.line_thickness}: must be at least 1")

    def __call__(self, image: np.ndarray, boxes: np.ndarray, names: Sequence[str]) -> np.ndarray:
        return draw_boxes(image, boxes, names, self.line_thickness, self.hide_labels, self.hide_conf)


class DetectionFiles:
    """Writes what `kept` asks for, frame by frame. Each source keeps its own name; a second one of that name gets a number."""

    def __init__(self, folder: Path, names: Sequence[str], kept: Kept) -> None:
        self.folder, self.names, self.kept = folder, names, kept
        self.labels = 0
        self._own = OwnNames()
        self._crops: set[Path] = set()
        self._video: cv2.VideoWriter | None = None
        self._video_size = (0, 0)
        self._csv: Any = (folder / "predictions.csv").open("w", newline="", encoding="utf-8") if kept.csv else None
        if self._csv is not None:
            csv.writer(self._csv).writerow(CSV_HEADER)

    def write(self, frame: Frame, boxes: np.ndarray, drawn: np.ndarray | None) -> None:
        """Write the files of one frame; `drawn` is its annotated image where images are kept."""
        stem = self._own.stem(frame.path)
        part = stem if frame.frame is None else f"{stem}_{frame.frame + 1}"
        if self.kept.txt and len(boxes):
            text = label_text(boxes, frame.image.shape[:2], self.kept.conf)
            (make_folder(self.folder / "labels") / f"{part}.txt").write_text(text, encoding="utf-8")
            self.labels += 1
        if self.kept.crops:
            self._write_crops(frame.image, boxes, part)
        if self._csv is not None:
            csv.writer(self._csv).writerows([frame.path.name, self.names[int(c)], f"{conf:.5f}"] for *_, conf, c in boxes)
        if self.kept.images and drawn is not None:
            if frame.frame is None:
                write_image(self.folder / f"{stem}{frame.path.suffix}", drawn)
            else:
                self._write_frame(self.folder / f"{stem}.mp4", frame, drawn)

    def _write_crops(self, image: np.ndarray, boxes: np.ndarray, stem: str) -> None:
        height, width = image.shape[:2]
        for x1, y1, x2, y2, _, c in boxes:
            grow_x, grow_y = (x2 - x1) * 0.01 + 5, (y2 - y1) * 0.01 + 5  # 1.02 times as large, plus 10 px
            left, top = max(int(x1 - grow_x), 0), max(int(y1 - grow_y), 0)
            crop = image[top : min(int(y2 + grow_y), height), left : min(int(x2 + grow_x), width)]
            if crop.size:
                folder = make_folder(self.folder / "crops" / folder_name(self.names[int(c)], int(c)))
                path, n = folder / f"{stem}.jpg", 2
                while path in self._crops:
                    path, n = folder / f"{stem}_{n}.jpg", n + 1
                self._crops.add(path)
                write_image(path, crop)

    def _write_frame(self, path: Path, frame: Frame, drawn: np.ndarray) -> None:
        if self._video is None or frame.frame == 0:
            self._close_video()
            self._video_size = (drawn.shape[1], drawn.shape[0])
            self._video = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), frame.fps, self._video_size)
            if not self._video.isOpened():
                raise InputError(f"{path}: this OpenCV cannot write mp4 videos; use --nosave --save-txt")
        if (drawn.shape[1], drawn.shape[0]) != self._video_size:  # a stream that came back in another size
            drawn = cv2.resize(drawn, self._video_size)
        self._video.write(drawn)

    def _close_video(self) -> None:
        if self._video is not None:
            self._video.release()
        self._video = None

    def close(self) -> None:
        """Finish the open video and the csv."""
        self._close_video()
        if self._csv is not None:
            self._csv.close()


def folder_name(name: str, index: int) -> str:
    """A class name as the name of one folder: what could lead out of the parent, or is no file name somewhere, is replaced."""
    safe = re.sub(r'[\x00-\x1f/\\:*?"<>|]', "_", name).strip(" .")[:100]
    return safe or f"class{index}"


def write_image(path: Path, image: np.ndarray) -> Path:
    """Save a BGR image under `path`, as `.jpg` where OpenCV cannot write its ending; return the path it got."""
    path = path if cv2.haveImageWriter(str(path)) else path.with_name(f"{path.stem}.jpg")
    if not cv2.imwrite(str(path), image):
        raise InputError(f"{path}: cannot be written; is the disk full?")
    return path
