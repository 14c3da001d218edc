"""Measure the mAP of a checkpoint or an exported model by YOLOv5's protocol; a classifier's accuracy (--data: a folder with val/CLASS/*.jpg).

python val.py --weights runs/train/exp/weights/best.pt --data data/mine.yaml --img 640
"""

from utils.errors import run_script
from utils.flags import Argv, add_device, add_run, add_runnable, add_size, parser


def main(argv: Argv = None) -> None:
    p = parser(__doc__)
    add_runnable(p)
    p.add_argument("--data", default="data/digits.yaml", help="dataset .yaml, or Darknet .data")
    add_size(p, None)
    p.add_argument("--batch-size", "--batch", type=int, default=32)
    p.add_argument("--conf-thres", "--conf", type=float, default=0.001, help="smallest confidence")
    p.add_argument("--iou-thres", type=float, default=0.6, help="IoU above which a box suppresses another")
    p.add_argument("--max-det", type=int, default=300, help="most detections per image")
    p.add_argument(
        "--task", default="val", choices=["train", "val", "test", "speed"], help="which split; speed: times the val split at fixed shape"
    )
    add_device(p)
    p.add_argument("--single-cls", action="store_true", help="treat all classes as one")
    p.add_argument("--augment", action="store_true", help="test-time augmentation: three views of every image")
    p.add_argument("--verbose", action="store_true", help="a row per class (always for fewer than 50 classes)")
    p.add_argument("--save-txt", action="store_true", help="save detections as labels")
    p.add_argument("--save-conf", action="store_true", help="save confidences in the labels")
    p.add_argument("--save-json", action="store_true", help="save detections in COCO's format, judged by pycocotools")
    p.add_argument("--half", action="store_true", help="float16 on CUDA, bfloat16 on CPUs that accelerate it")
    add_run(p, "runs/val")
    args = p.parse_args(argv)
    from engine.val_run import ValOptions, validate

    validate(ValOptions(**vars(args)))


if __name__ == "__main__":
    run_script(main)
