"""Train a detector on your own data, as with YOLOv5.

python train.py --weights yolov5s.pt --data data/mine.yaml --img 640 --batch 16 --epochs 100
python train.py --weights '' --cfg models/yolov5n.yaml --data data/digits.yaml --hyp hyp.digits.yaml --img 128 --optimizer AdamW
"""

from engine.train_flags import add_train_flags, start, train_options
from utils.errors import run_script
from utils.flags import Argv, parser


def main(argv: Argv = None) -> None:
    p = parser(__doc__)
    add_train_flags(p, epochs=100)
    args = p.parse_args(argv)
    start(args, train_options(args))


if __name__ == "__main__":
    run_script(main)
