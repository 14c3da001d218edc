"""The Python API: `load` a checkpoint, call it with pictures, read boxes, names and annotated pictures off the results."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from engine.detect_files import write_image
from engine.predict import log_line
from engine.predictor import Detections, Limits, Predictor, check_classes, open_predictor
from utils.errors import InputError
from utils.files import OwnNames, make_folder, run_folder
from utils.labels import load_image
from utils.log import LOGGER
from utils.plots import draw_boxes

_COLUMNS = ("xmin", "ymin", "xmax", "ymax", "confidence", "class", "name")


def load(
    weights: str | Path, cfg: str | Path = "", device: str = "", conf: float = 0.25, iou: float = 0.45, imgsz: int | tuple[int, int] | None = None,
    classes: Sequence[int] | None = None, max_det: int = 1000, agnostic: bool = False, half: bool = False, augment: bool = False,
    dialect: str = "auto", dnn: bool = False,
) -> Detector:  # fmt: skip
    """Load any checkpoint (ours, a pruned one, a YOLOv5 `.pt`; with `cfg` a pair) or an exported model for detection.

    `imgsz`: side, or (height, width), that a picture is letterboxed into; None: the size it was trained at. `device`: "cpu", "0", or ""
    for CUDA where there is one. `augment`: with test-time augmentation. `dialect`: whose cfg it is,
    told by its keys if "auto". `dnn`: in OpenCV, a `.onnx` or a Darknet pair. Raises `InputError` for whatever does not fit, naming it.
    """
    sides = (imgsz,) if isinstance(imgsz, int) else tuple(imgsz) if imgsz is not None else None
    detector = Detector(*open_predictor(weights, cfg, sides, device, half, augment, dialect, dnn))
    detector.conf, detector.iou, detector.max_det, detector.agnostic = conf, iou, max_det, agnostic
    detector.classes = classes
    detector.limits()
    return detector


class Detector:
    """Call it with a picture or a list of them. `conf`, `iou`, `classes`, `max_det` and `agnostic` may be set at any time.

    `names`: {class: name}. `imgsz`: the (height, width) that pictures are letterboxed into.
    """

    def __init__(self, predictor: Predictor, names: Sequence[str]) -> None:
        self._predictor = predictor
        self.names = dict(enumerate(names))
        self.conf, self.iou, self.max_det, self.agnostic = 0.25, 0.45, 1000, False
        self.classes: Sequence[int] | None = None

    @property
    def imgsz(self) -> tuple[int, int]:
        return self._predictor.imgsz

    def limits(self) -> Limits:
        """The thresholds as they are now; raises `InputError` where one is impossible."""
        check_classes(self.classes, tuple(self.names.values()), "classes")
        return Limits(self.conf, self.iou, self.max_det, None if self.classes is None else tuple(self.classes), self.agnostic)

    def __call__(self, pictures: Any) -> Results:
        """Detect in one picture or a list of them: paths, arrays (H, W, 3) or (H, W) uint8 in **RGB**, PIL images, in any mixture.

        Pictures that are letterboxed to one shape go through the network in batches. Raises `InputError` for what is no picture.
        """
        many = pictures if isinstance(pictures, (list, tuple)) else [pictures]
        read = [_read(picture, i) for i, picture in enumerate(many)]
        found = self._predictor([image for image, _ in read], self.limits())
        return Results([Result(image, path, d, self.names) for (image, path), d in zip(read, found)])


@dataclass(frozen=True, eq=False)
class Result:
    """What was found in one picture. `image`: (H, W, 3) BGR uint8, as read. `path`: its file, or `image0.jpg`, ... for others."""

    image: np.ndarray
    path: Path
    detections: Detections
    names: dict[int, str]

    @property
    def boxes(self) -> np.ndarray:
        """(n, 6) float32: x1, y1, x2, y2 in pixels of the picture, confidence, class; best first."""
        return self.detections.boxes

    def __len__(self) -> int:
        return len(self.boxes)

    def __str__(self) -> str:
        return log_line(str(self.path), self.detections, tuple(self.names.values()))

    def plot(self, line_thickness: int = 3, hide_labels: bool = False, hide_conf: bool = False) -> np.ndarray:
        """The picture with its boxes: (H, W, 3) **RGB** uint8."""
        drawn = draw_boxes(self.image, self.boxes, self.names, line_thickness, hide_labels, hide_conf)
        return np.ascontiguousarray(drawn[..., ::-1])

    def to_dicts(self) -> list[dict[str, Any]]:
        """A dict per box: xmin, ymin, xmax, ymax, confidence, class, name."""
        return [dict(zip(_COLUMNS, (*map(float, row[:5]), int(row[5]), self.names[int(row[5])]))) for row in self.boxes]


class Results(Sequence[Result]):
    """The results of a call, in the order of its pictures. Printed, a line for each."""

    def __init__(self, results: Sequence[Result]) -> None:
        self._results = list(results)

    def __len__(self) -> int:
        return len(self._results)

    def __getitem__(self, index: Any) -> Any:
        return Results(self._results[index]) if isinstance(index, slice) else self._results[index]

    def __iter__(self) -> Iterator[Result]:
        return iter(self._results)

    def __str__(self) -> str:
        n = len(self)
        return "\n".join(f"image {i}/{n} {result}" for i, result in enumerate(self._results, 1))

    @property
    def xyxy(self) -> list[np.ndarray]:
        """The boxes of every picture, as `Result.boxes`."""
        return [result.boxes for result in self._results]

    def print(self) -> None:
        """Log what `str` gives."""
        LOGGER.info(str(self))

    def render(self) -> list[np.ndarray]:
        """Every picture with its boxes, as `Result.plot` gives it."""
        return [result.plot() for result in self._results]

    def pandas(self) -> SimpleNamespace:
        """`.xyxy`: a DataFrame per picture with the columns of `Result.to_dicts`."""
        from pandas import DataFrame

        return SimpleNamespace(xyxy=[DataFrame(result.to_dicts(), columns=list(_COLUMNS)) for result in self._results])

    def save(self, folder: str | Path | None = None) -> Path:
        """Save the annotated pictures under their own names in `folder`, by default the next runs/detect/exp*; return the folder."""
        target = make_folder(run_folder("runs/detect", "exp") if folder is None else Path(folder))
        own = OwnNames()
        for i, result in enumerate(self._results):
            # A path names its file; the same file given twice is two pictures.
            stem = own.stem(result.path.parent / str(i) / result.path.name)
            write_image(target / f"{stem}{result.path.suffix}", result.plot()[..., ::-1])
        return target


def _read(picture: Any, number: int) -> tuple[np.ndarray, Path]:
    """A picture as (H, W, 3) BGR uint8, and a path to call it by."""
    if isinstance(picture, (str, Path)):
        if Path(picture).is_dir():
            raise InputError(f"{picture} is a folder; give its pictures as a list: sorted(Path({str(picture)!r}).glob('*.jpg'))")
        return load_image(picture), Path(picture)
    path = Path(f"image{number}.jpg")
    if hasattr(picture, "convert"):  # PIL
        from PIL import ImageOps

        path = Path(getattr(picture, "filename", "") or path)
        picture = np.asarray(ImageOps.exif_transpose(picture).convert("RGB"))
    if not isinstance(picture, np.ndarray):
        raise InputError(f"picture {number}: a {type(picture).__name__}; give a path, a NumPy array (H, W, 3) in RGB, or a PIL image")
    if picture.ndim == 2:
        picture = np.repeat(picture[..., None], 3, 2)
    if picture.ndim != 3 or picture.shape[2] != 3 or picture.dtype != np.uint8 or not picture.size:
        raise InputError(
            f"picture {number}: an array {picture.shape} of {picture.dtype}; it must be (H, W, 3) RGB or (H, W) grey, of uint8"
        )
    return np.ascontiguousarray(picture[..., ::-1]), path
