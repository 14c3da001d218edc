"""Train a detector on your own data, as with YOLOv5.

python train.py --weights yolov5s.pt --data data/mine.yaml --img 640 --batch 16 --epochs 100
python train.py --weights '' --cfg models/yolov5n.yaml --data data/digits.yaml --hyp hyp.digits.yaml --img 128 --optimizer AdamW
"""

from argparse import Namespace
from dataclasses import fields

from engine.train_flags import add_train_flags, start, train_options
from utils.errors import InputError, run_script
from utils.flags import Argv, parser, typed
from utils.log import LOGGER


def main(argv: Argv = None) -> None:
    p = parser(__doc__)
    add_train_flags(p, epochs=100)
    p.add_argument("--one-shot", action="store_true", help="apply the --recipe at once, without training: prune, and calibrate on --data")
    args = p.parse_args(argv)
    if args.one_shot:
        start_one_shot(args, typed(p, argv))
    else:
        start(args, train_options(args))


def start_one_shot(args: Namespace, given: set[str]) -> None:
    """What of the flags counts where nothing is trained; `given`: those that were typed, since training's defaults mean nothing here."""
    from engine.one_shot import OneShotOptions, one_shot

    if args.cfg or args.resume:
        raise InputError("--one-shot: takes the checkpoint of --weights as it is; leave out --cfg and --resume")
    names = {f.name for f in fields(OneShotOptions)}
    idle = sorted(given - names - {"one_shot"})
    if idle:
        LOGGER.info(f"--one-shot: nothing is trained, so nothing reads {', '.join('--' + name.replace('_', '-') for name in idle)}")
    one_shot(OneShotOptions(**{name: getattr(args, name) for name in given & names | {"weights", "recipe"}}))


if __name__ == "__main__":
    run_script(main)
