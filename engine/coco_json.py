"""`val.py --save-json`: detections as COCO results, and pycocotools' judgement of them."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from utils.boxes import clip_boxes, denormalise, xywh_to_xyxy
from utils.errors import InputError
from utils.labels import LabelSet
from utils.log import LOGGER

# COCO's 80 classes keep the ids of its 91: these are the gaps.
_COCO_GAPS = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}
COCO_IDS = tuple(i for i in range(1, 91) if i not in _COCO_GAPS)
MISSING = "pycocotools, which judges it, is not installed: pip install pycocotools"


def category_ids(names: Sequence[str]) -> tuple[int, ...]:
    """The category id of every class: COCO's own for its 80 classes (from person to toothbrush), otherwise the class number."""
    coco = len(names) == len(COCO_IDS) and (names[0], names[-1]) == ("person", "toothbrush")
    return COCO_IDS if coco else tuple(range(len(names)))


def image_ids(paths: Sequence[Path]) -> dict[Path, int | str]:
    """The id of every image: its stem, as a number where all stems are numbers, as COCO's are; its path where two stems are equal.

    One kind for all: pycocotools sorts the ids.
    """
    paths = tuple(dict.fromkeys(paths))
    stems = [path.stem for path in paths]
    choices: list[list[int | str]] = [stems, [str(path) for path in paths]]
    if all(stem.isdecimal() for stem in stems):
        choices.insert(0, [int(stem) for stem in stems])
    return dict(zip(paths, next(ids for ids in choices if len(set(ids)) == len(paths))))


def result_rows(image_id: int | str, found: np.ndarray, categories: Sequence[int]) -> list[dict[str, Any]]:
    """One image's detections (n, 6), corners in its pixels, as COCO results: box left, top, width, height."""
    return [
        {
            "image_id": image_id,
            "category_id": categories[int(c)],
            "bbox": [round(v, 3) for v in (x1, y1, x2 - x1, y2 - y1)],
            "score": round(conf, 5),
        }
        for x1, y1, x2, y2, conf, c in found.tolist()
    ]


def ground_truth(labels: LabelSet, ids: dict[Path, int | str], names: Sequence[str], single_cls: bool = False) -> dict[str, Any]:
    """The labels as a COCO annotation file; an annotation's area is that of its box."""
    categories = category_ids(names)
    images, annotations = [], []
    for path, rows, (width, height) in zip(labels.images, labels.labels, labels.sizes.tolist()):
        images.append({"id": ids[path], "file_name": path.name, "width": width, "height": height})
        boxes = clip_boxes(xywh_to_xyxy(denormalise(rows[:, 1:].astype(float), (height, width))), (height, width))
        for c, (x1, y1, x2, y2) in zip(rows[:, 0].astype(int).tolist(), boxes.tolist()):
            box = [x1, y1, x2 - x1, y2 - y1]
            annotations.append({
                "id": len(annotations) + 1, "image_id": ids[path], "category_id": categories[0 if single_cls else c],
                "bbox": box, "area": box[2] * box[3], "iscrowd": 0,
            })  # fmt: skip
    return {"images": images, "annotations": annotations, "categories": [{"id": i, "name": n} for i, n in zip(categories, names)]}


def annotation_file(sources: Sequence[Path]) -> Path | None:
    """COCO's own annotations of a split, `annotations/instances_<split>.json` beside its list or above its folder of images, if there."""
    for source in sources:
        for base in (source.parent, source.parent.parent):
            path = base / "annotations" / f"instances_{source.stem}.json"
            if path.is_file():
                return path
    return None


def official_truth(sources: Sequence[Path], ids: Sequence[int | str], names: Sequence[str]) -> tuple[Path, dict[str, Any]] | None:
    """COCO's own annotations of a split and their file, if the classes are COCO's and the file knows the images `ids`.

    They also tell crowds and the areas of masks, which labels do not.
    """
    path = annotation_file(sources) if category_ids(names) == COCO_IDS else None
    if path is None:
        return None
    content = _read(path)
    unknown = set(ids) - {image["id"] for image in content["images"]}
    if unknown:
        LOGGER.warning(f"{path}: has no image {min(unknown, key=str)}; the predictions are judged by the labels")
        return None
    return path, content


def judge(truth: dict[str, Any], predictions: Path, ids: Sequence[int | str]) -> dict[str, float] | None:
    """pycocotools' mAP@.5:.95 and mAP@.5 of a results file on the images `ids`: {"map", "map50"}; None, with a line, where it is missing."""
    try:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    except ImportError:
        LOGGER.warning(f"--save-json: {predictions} is written, but {MISSING}")
        return None
    rows = json.loads(predictions.read_text(encoding="utf-8"))
    if not rows:
        return {"map": 0.0, "map50": 0.0}
    with contextlib.redirect_stdout(io.StringIO()):
        reference = COCO()
        reference.dataset = truth
        reference.createIndex()
        evaluation = COCOeval(reference, reference.loadRes(rows), "bbox")
        evaluation.params.imgIds = list(ids)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    # pycocotools says -1 where there is nothing to find.
    return {"map": max(float(evaluation.stats[0]), 0.0), "map50": max(float(evaluation.stats[1]), 0.0)}


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not a COCO annotation file ({error})") from None
    if not isinstance(content, dict) or not {"images", "annotations", "categories"} <= content.keys():
        raise InputError(f"{path}: not a COCO annotation file; expected images, annotations and categories")
    return content
