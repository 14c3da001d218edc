"""Detection on images and videos: annotated copies, labels, crops."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
import torch

from models.checkpoint import load_model
from models.network import Network, fuse
from utils.augment import letterbox
from utils.boxes import label_text, scale_boxes
from utils.decode import decode
from utils.device import Precision, select_device
from utils.errors import InputError
from utils.files import make_folder, run_folder
from utils.flags import multiple
from utils.log import LOGGER
from utils.nms import non_max_suppression
from utils.planes import to_planes
from utils.plots import draw_boxes
from utils.sources import Frame, frames


@dataclass(frozen=True)
class PredictOptions:
    """A detection run. `imgsz` None: the size the checkpoint was trained at."""

    weights: str
    source: str
    cfg: str = ""
    imgsz: int | None = None
    conf_thres: float = 0.25
    iou_thres: float = 0.45
    max_det: int = 1000
    device: str = ""
    view_img: bool = False
    save_txt: bool = False
    save_conf: bool = False
    save_crop: bool = False
    nosave: bool = False
    classes: tuple[int, ...] | None = None
    agnostic_nms: bool = False
    half: bool = False
    line_thickness: int = 3
    hide_labels: bool = False
    hide_conf: bool = False
    project: str = "runs/detect"
    name: str = "exp"
    exist_ok: bool = False


class Predictor:
    """A fused network that turns a BGR image into detections."""

    def __init__(self, network: Network, imgsz: int, precision: Precision, options: PredictOptions) -> None:
        self.network = fuse(network).to(precision.device, memory_format=torch.channels_last)
        self.imgsz, self.precision, self.options = imgsz, precision, options
        self.anchors = network.anchors.to(precision.device)

    @torch.no_grad()
    def __call__(self, image: np.ndarray) -> np.ndarray:
        """(H, W, 3) BGR uint8 -> (n, 6): corners in pixels of the image, confidence, class; best first."""
        o = self.options
        boxed, gain, pad = letterbox(image, (self.imgsz, self.imgsz), auto_stride=self.network.max_stride)
        planes = torch.from_numpy(to_planes(boxed, self.network.channels))[None]
        with self.precision.autocast():
            maps = self.network(self.precision.images(planes))
        predictions = decode(maps, self.anchors, self.network.strides)
        found = non_max_suppression(predictions, o.conf_thres, o.iou_thres, o.classes, o.agnostic_nms, max_det=o.max_det)[0].cpu()
        return torch.cat([scale_boxes(found[:, :4], gain, pad, image.shape[:2]), found[:, 4:]], 1).numpy()


def predict(options: PredictOptions) -> Path:
    """Detect in every frame of `options.source`; return the run folder."""
    model = load_model(options.weights, options.cfg or None)
    device = select_device(options.device)
    network = model.network()
    unknown = [c for c in options.classes or () if not 0 <= c < len(model.names)]
    if unknown:
        raise InputError(f"--classes {unknown[0]}: this model has the classes 0..{len(model.names) - 1}")
    precision = Precision(device, torch.float16 if options.half and device.type == "cuda" else None)
    predictor = Predictor(network, multiple(options.imgsz or model.imgsz, network.max_stride), precision, options)
    source = frames(options.source)
    first = next(source)
    writer = _Writer(make_folder(run_folder(options.project, options.name, options.exist_ok)), model.names, options)
    try:
        writer.take(first, *_timed(predictor, first))
        for frame in source:
            writer.take(frame, *_timed(predictor, frame))
    finally:
        writer.close()
    LOGGER.info(f"{writer.count} images, {writer.total_ms / max(writer.count, 1):.1f} ms each\nresults saved to {writer.folder}")
    return writer.folder


def _timed(predictor: Predictor, frame: Frame) -> tuple[np.ndarray, float]:
    start = time.perf_counter()
    found = predictor(frame.image)
    return found, (time.perf_counter() - start) * 1e3


@dataclass
class _Writer:
    """Writes what the flags ask for, frame by frame."""

    folder: Path
    names: Sequence[str]
    options: PredictOptions
    count: int = 0
    total_ms: float = 0.0
    video: cv2.VideoWriter | None = None
    used: dict[str, str] = field(default_factory=dict)

    def take(self, frame: Frame, found: np.ndarray, ms: float) -> None:
        o = self.options
        self.count, self.total_ms = self.count + 1, self.total_ms + ms
        position = "" if frame.frame is None else f" ({frame.frame + 1}/{frame.total or '?'})"
        LOGGER.info(f"{frame.path}{position}: {frame.image.shape[0]}x{frame.image.shape[1]} {self._counts(found)}, {ms:.1f}ms")
        name = self._name(frame)
        if o.save_txt:
            self._write_txt(frame, found, name)
        if o.save_crop:
            self._write_crops(frame, found, name)
        if o.nosave and not o.view_img:
            return
        drawn = draw_boxes(frame.image, found, self.names, o.line_thickness, o.hide_labels, o.hide_conf)
        if o.view_img:
            _show(drawn)
        if not o.nosave:
            self._write_image(frame, drawn, name)

    def _name(self, frame: Frame) -> str:
        """The file name to save under; a second source of one stem (another folder or ending) gets a number."""
        stem, n = frame.path.stem, 2
        while self.used.get(stem, str(frame.path)) != str(frame.path):
            stem, n = f"{frame.path.stem}_{n}", n + 1
        self.used[stem] = str(frame.path)
        return stem + frame.path.suffix

    def _counts(self, found: np.ndarray) -> str:
        classes, counts = np.unique(found[:, 5].astype(int), return_counts=True)
        parts = [f"{n} {self.names[c]}{'s' if n > 1 else ''}" for c, n in zip(classes, counts)]
        return ", ".join(parts) or "(no detections)"

    def _write_txt(self, frame: Frame, found: np.ndarray, name: str) -> None:
        stem = Path(name).stem if frame.frame is None else f"{Path(name).stem}_{frame.frame}"
        if len(found):
            text = label_text(found, frame.image.shape[:2], self.options.save_conf)
            (make_folder(self.folder / "labels") / f"{stem}.txt").write_text(text, encoding="utf-8")

    def _write_crops(self, frame: Frame, found: np.ndarray, name: str) -> None:
        height, width = frame.image.shape[:2]
        for i, (x1, y1, x2, y2, _, c) in enumerate(found):
            grow_x, grow_y = (x2 - x1) * 0.01 + 5, (y2 - y1) * 0.01 + 5  # 1.02 times as large, plus 10 px
            left, top = max(int(x1 - grow_x), 0), max(int(y1 - grow_y), 0)
            crop = frame.image[top : min(int(y2 + grow_y), height), left : min(int(x2 + grow_x), width)]
            if crop.size:
                folder = make_folder(self.folder / "crops" / self.names[int(c)].replace("/", "_"))
                part = "" if frame.frame is None else f"_{frame.frame}"
                cv2.imwrite(str(folder / f"{Path(name).stem}{part}{'' if i == 0 else f'_{i + 1}'}.jpg"), crop)

    def _write_image(self, frame: Frame, drawn: np.ndarray, name: str) -> None:
        if frame.frame is None:
            path = self.folder / name
            path = path if cv2.haveImageWriter(str(path)) else path.with_suffix(".jpg")
            if not cv2.imwrite(str(path), drawn):
                raise InputError(f"{path}: cannot be written; is the disk full or the ending unknown to OpenCV?")
            return
        path = (self.folder / name).with_suffix(".mp4")
        if self.video is None or frame.frame == 0:
            self.close()
            self.video = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), frame.fps, (drawn.shape[1], drawn.shape[0]))
            if not self.video.isOpened():
                raise InputError(f"{path}: this OpenCV cannot write mp4 videos; use --nosave --save-txt")
        self.video.write(drawn)

    def close(self) -> None:
        if self.video is not None:
            self.video.release()
        self.video = None


def _show(image: np.ndarray) -> None:
    try:
        cv2.imshow("detections", image)
        cv2.waitKey(1)
    except cv2.error:
        raise InputError(
            "--view-img needs OpenCV with windows: pip install opencv-python in the place of opencv-python-headless (Debian: also libgl1)"
        ) from None
