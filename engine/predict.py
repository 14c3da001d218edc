"""A detection run: any source in, annotated copies, labels and crops out."""

from __future__ import annotations

import os
import sys
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from engine.detect_files import DetectionFiles, Drawing, Kept
from engine.predictor import Detections, Limits, Predictor, check_classes, open_predictor
from utils.errors import InputError
from utils.files import make_folder, run_folder
from utils.log import LOGGER
from utils.sources import Frame, frames


@dataclass(frozen=True)
class PredictOptions:
    """A detection run. `imgsz`: one side, or height and width; None: the size the checkpoint was trained at, or the file exported for.
    `dnn`: in OpenCV, a `.onnx` or a Darknet pair."""

    weights: str
    source: str
    cfg: str = ""
    imgsz: tuple[int, ...] | None = None
    limits: Limits = Limits()
    kept: Kept = Kept()
    drawing: Drawing = Drawing()
    device: str = ""
    half: bool = False
    augment: bool = False
    view_img: bool = False
    vid_stride: int = 1
    project: str = "runs/detect"
    name: str = "exp"
    exist_ok: bool = False
    dialect: str = "auto"
    dnn: bool = False

    def __post_init__(self) -> None:
        if self.vid_stride < 1:
            raise InputError(f"--vid-stride {self.vid_stride}: must be at least 1")


def predict(options: PredictOptions) -> Path:
    """Detect in every frame of `options.source`; return the run folder. Nothing is written before the first frame was read."""
    if options.view_img:
        _check_windows()
    o = options
    predictor, names = open_predictor(o.weights, o.cfg, o.imgsz, o.device, o.half, o.augment, o.dialect, o.dnn)
    check_classes(options.limits.classes, names, "--classes")
    with closing(frames(options.source, options.vid_stride)) as source:
        first = next(source)
        folder = make_folder(run_folder(options.project, options.name, options.exist_ok))
        run = _Run(predictor, names, options, DetectionFiles(folder, names, options.kept))
        try:
            run.take(first)
            for frame in source:
                run.take(frame)
        except KeyboardInterrupt:  # how a live stream is ended
            run.finish()
            raise
        finally:
            run.files.close()
    run.finish()
    return folder


class _Run:
    """Takes the frames one by one: detects, logs, draws, writes."""

    def __init__(self, predictor: Predictor, names: tuple[str, ...], options: PredictOptions, files: DetectionFiles) -> None:
        self.predictor, self.names, self.options, self.files = predictor, names, options, files
        self.count, self.ms = 0, np.zeros(3)

    def take(self, frame: Frame) -> None:
        o = self.options
        found = self.predictor([frame.image], o.limits)[0]
        self.count, self.ms = self.count + 1, self.ms + found.ms
        LOGGER.info(log_line(frame.label, found, self.names))
        drawn = o.drawing(frame.image, found.boxes, self.names) if o.kept.images or o.view_img else None
        if o.view_img:
            _show(drawn, frame)
        self.files.write(frame, found.boxes, drawn)

    def finish(self) -> None:
        """Say how long it took and where the results are."""
        pre, inference, nms = self.ms / max(self.count, 1)
        shape = (1, self.predictor.network.channels, *self.predictor.imgsz)
        LOGGER.info(f"Speed: {pre:.1f}ms pre-process, {inference:.1f}ms inference, {nms:.1f}ms NMS per image at shape {shape}")
        labels = f"\n{self.files.labels} labels saved to {self.files.folder / 'labels'}" if self.options.kept.txt else ""
        LOGGER.info(f"{self.count} image{'' if self.count == 1 else 's'}\nResults saved to {self.files.folder}{labels}")


def log_line(label: str, found: Detections, names: tuple[str, ...]) -> str:
    """YOLOv5's line of one image: what it is, the network's input as height x width, what was found, milliseconds of inference."""
    height, width = found.input_shape
    return f"{label}: {height}x{width} {found.counts(names)}, {found.ms[1]:.1f}ms"


def _check_windows() -> None:
    """Raise `InputError` where OpenCV cannot open a window: the headless wheel, or no display (which would end the process)."""
    display = sys.platform != "linux" or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    try:
        if display:
            cv2.namedWindow("detections", cv2.WINDOW_NORMAL)
            return
    except cv2.error:
        raise InputError(
            "--view-img needs OpenCV with windows: pip install opencv-python in the place of opencv-python-headless (Debian: also libgl1)"
        ) from None
    raise InputError("--view-img: this machine has no display; leave the flag out and look at the saved images")


def _show(image: np.ndarray, frame: Frame) -> None:
    cv2.imshow("detections", image)
    cv2.waitKey(1 if frame.frame is not None else 1000)  # a still image stays for a second
