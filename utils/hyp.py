"""Hyper-parameter files: YOLOv5's hyp yaml, with `nbs` (the nominal batch size) and a few more values.

`anchors`, rounded, asks for that many anchors per level, fitted to the labels; 0 keeps the model's own.
"""

from __future__ import annotations

import math
from pathlib import Path

import yaml

from utils.errors import InputError, did_you_mean

HYPS = Path(__file__).resolve().parent.parent / "data" / "hyps"
MOST_ANCHORS = 20  # per level; YOLOv5 searches from 2 to 10
DEFAULTS: dict[str, float] = {
    "lr0": 0.01, "lrf": 0.01, "momentum": 0.937, "weight_decay": 0.0005, "warmup_epochs": 3.0, "warmup_momentum": 0.8, "warmup_bias_lr": 0.1,
    "box": 0.05, "cls": 0.5, "cls_pw": 1.0, "obj": 1.0, "obj_pw": 1.0, "iou_t": 0.2, "anchor_t": 4.0, "anchors": 0.0, "fl_gamma": 0.0,
    "label_smoothing": 0.0, "hsv_h": 0.015, "hsv_s": 0.7, "hsv_v": 0.4, "degrees": 0.0, "translate": 0.1, "scale": 0.5, "shear": 0.0, "perspective": 0.0,
    "flipud": 0.0, "fliplr": 0.5, "mosaic": 1.0, "mixup": 0.0, "copy_paste": 0.0, "nbs": 64, "warmup_min_batches": 100, "gamma_init": 1.0,
}  # fmt: skip


def read_hyp(path: str | Path) -> dict[str, float]:
    """Read a hyp file (a path, or a name in `data/hyps`); keys it leaves out take the values of `hyp.scratch-low`.

    Raises `InputError` for a missing file, an unknown key (with near names) or a value that is no number.
    """
    path = Path(path)
    places = (path, HYPS / path.name) if path.name == str(path) else (path,)  # a bare name may be one that ships
    found = next((p for p in places if p.is_file()), None)
    if found is None:
        raise InputError(f"--hyp: no file {path}{did_you_mean(path.name, [p.name for p in HYPS.glob('*.yaml')])}")
    try:
        values = yaml.safe_load(found.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise InputError(f"{found}: not a readable yaml: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise InputError(f"{found}: expected key: value lines")
    for key, value in values.items():
        if key not in DEFAULTS:
            raise InputError(f"{found}: unknown hyper-parameter {key!r}{did_you_mean(str(key), DEFAULTS)}")
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise InputError(f"{found}: {key}={value!r} must be a number (yaml reads 1e-3 as text; write 0.001 or 1.0e-3)")
        if not math.isfinite(value):
            raise InputError(f"{found}: {key}={value} must be a finite number")
    if values.get("nbs", 1) < 1:
        raise InputError(f"{found}: nbs={values['nbs']} must be at least 1")
    anchors = values.get("anchors", 0)
    if anchors != 0 and not 1 <= round(anchors) <= MOST_ANCHORS:
        raise InputError(f"{found}: anchors={anchors} must be 1 to {MOST_ANCHORS} anchors per level, or 0 for the model's own")
    return DEFAULTS | values
