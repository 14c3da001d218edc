"""The flags of detect.py and prune_detect.py."""

from __future__ import annotations

import argparse
from typing import Any

from utils.flags import Parser, add_device, add_run, add_runnable, add_size


def add_detect_flags(p: Parser) -> None:
    """YOLOv5's detection flags."""
    add_runnable(p)
    p.add_argument("--source", required=True, help="image, video, folder, glob, .txt list of paths, camera number or stream address")
    add_size(p, None, sides=2)
    p.add_argument("--conf-thres", "--conf", type=float, default=0.25, help="smallest confidence")
    p.add_argument("--iou-thres", type=float, default=0.45, help="IoU above which a box suppresses another")
    p.add_argument("--max-det", type=int, default=1000, help="most detections per image")
    add_device(p, workers=False)
    p.add_argument("--view-img", action="store_true", help="show the results in a window")
    p.add_argument("--save-txt", action="store_true", help="save labels")
    p.add_argument("--save-conf", action="store_true", help="save confidences in the labels")
    p.add_argument("--save-csv", action="store_true", help="save predictions.csv: image name, class name, confidence")
    p.add_argument("--save-crop", action="store_true", help="save what the boxes enclose")
    p.add_argument("--nosave", action="store_true", help="do not save images or videos")
    p.add_argument("--classes", nargs="+", type=int, help="keep these classes only")
    p.add_argument("--agnostic-nms", action="store_true", help="let boxes of different classes suppress each other")
    p.add_argument("--augment", action="store_true", help="test-time augmentation: three views of every image")
    p.add_argument("--half", action="store_true", help="float16 on CUDA, bfloat16 on CPUs with the instructions for it")
    p.add_argument("--line-thickness", type=int, default=3, help="pixels")
    p.add_argument("--hide-labels", action="store_true")
    p.add_argument("--hide-conf", action="store_true")
    p.add_argument("--vid-stride", type=int, default=1, help="detect in every so many frames of a video or stream")
    add_run(p, "runs/detect")


def start(args: argparse.Namespace) -> None:
    """Detect as the flags say. (torch is imported only now: `--help` is instant.)"""
    from engine.detect_files import Drawing, Kept
    from engine.predict import PredictOptions, predict
    from engine.predictor import Limits

    same = "weights source cfg dialect dnn imgsz device half augment view_img vid_stride project name exist_ok"
    values: dict[str, Any] = {key: getattr(args, key) for key in same.split()}
    classes = tuple(args.classes) if args.classes else None
    predict(
        PredictOptions(
            **values,
            limits=Limits(args.conf_thres, args.iou_thres, args.max_det, classes, args.agnostic_nms),
            kept=Kept(not args.nosave, args.save_txt, args.save_conf, args.save_crop, args.save_csv),
            drawing=Drawing(args.line_thickness, args.hide_labels, args.hide_conf),
        )
    )
