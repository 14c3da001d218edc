"""What an exported model says about itself beside its numbers: class names, stride, image size. Text to text, whatever the file's format.

ONNX keeps the pairs of strings as its metadata, OpenVINO's folder in `metadata.yaml`, TorchScript in its extra file `config.txt` (JSON).
YOLOv5's own exports say `names` and `stride` alone, `names` as a Python literal; these are read too.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from utils.errors import InputError

_KINDS = {".onnx": "ONNX", ".xml": "OpenVINO", ".torchscript": "TorchScript"}


def exported_kind(path: str | Path) -> str | None:
    """What kind of exported model `path` is, by its ending (a folder with an .xml in it: OpenVINO's); None for anything else."""
    path = Path(path)
    if path.name.endswith(".torchscript.pt"):  # how YOLOv5 v6.0 called them
        return "TorchScript"
    if path.is_dir():
        return "OpenVINO" if any(path.glob("*.xml")) else None
    return _KINDS.get(path.suffix.lower())


@dataclass(frozen=True)
class Metadata:
    """`imgsz`: (height, width) in pixels, the size that the file was made at. `dynamic`: batch and size are free. `batch`: the fixed batch
    where they are not. `nms`: the file ends with final detections, at most `max_det`, by the thresholds `conf` and `iou`. `task`: detect or
    classify."""

    names: tuple[str, ...]
    stride: int
    imgsz: tuple[int, int]
    channels: int = 3
    batch: int = 1
    dynamic: bool = False
    nms: bool = False
    conf: float = 0.25
    iou: float = 0.45
    max_det: int = 1000
    task: str = "detect"

    def to_props(self) -> dict[str, str]:
        """As pairs of strings. `names` is JSON of {index: name}, everything else JSON of its value, but for `task`."""
        plain = {
            k: json.dumps(getattr(self, k)) for k in ("stride", "imgsz", "channels", "batch", "dynamic", "nms", "conf", "iou", "max_det")
        }
        names = json.dumps({str(i): name for i, name in enumerate(self.names)}, ensure_ascii=False)
        return {"names": names, **plain, "task": self.task, "description": "YOLO detector" if self.task == "detect" else "classifier"}

    @classmethod
    def from_props(cls, props: Mapping[str, str], imgsz: tuple[int, int], what: str) -> Metadata:
        """Read the pairs of a file; `imgsz` is that of its input, for files that do not say. Raise `InputError`, which begins with `what`, for a
        missing or unreadable `names` or `stride`."""
        values = {key: _value(props[key], f"{what}: its metadata {key}") for key in _READ & props.keys()}
        for key in ("names", "stride"):
            if key not in values:
                raise InputError(f"{what}: has no {key} in its metadata; export the model with export.py")
        names = values.pop("names")
        if isinstance(names, Mapping):
            names = [names[k] for k in sorted(names, key=int)]
        try:
            size = values.pop("imgsz", imgsz)
            height, width = (size, size) if isinstance(size, int) else size
            return cls(
                tuple(map(str, names)), int(values.pop("stride")), (int(height), int(width)), task=props.get("task", "detect"), **values
            )
        except (TypeError, ValueError) as error:
            raise InputError(f"{what}: its metadata cannot be understood ({error}); export the model with export.py") from None


_READ = {"names", "stride", "imgsz", "channels", "batch", "dynamic", "nms", "conf", "iou", "max_det"}


def _value(text: object, where: str) -> object:
    """JSON, or a literal of Python; nothing is executed."""
    if not isinstance(text, str):
        return text
    try:
        return json.loads(text)
    except ValueError:
        pass
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        raise InputError(f"{where}={text[:60]!r} cannot be read; export the model with export.py") from None
