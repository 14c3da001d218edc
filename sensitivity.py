"""Measure what each layer can lose before anything is pruned: mAP@.5 against the ratio, one layer at a time.

python sensitivity.py --weights runs/train/exp/weights/last.pt --data data/mine.yaml --img 640 --ratios 0.25 0.5 0.75 --images 200
python sensitivity.py --resume runs/sensitivity/exp                   # a run that was cut short; with --drop 0.02: another config of a finished one
python slim_prune.py --weights runs/train/exp/weights/last.pt --data data/mine.yaml --config runs/sensitivity/exp/sensitivity.json
"""

from engine.prune_flags import add_prune_flags, add_scoring_flags
from utils.errors import InputError, run_script
from utils.flags import Argv, parser, typed


def main(argv: Argv = None) -> None:
    p = parser(__doc__)
    add_prune_flags(p, "runs/sensitivity", required=False)
    p.add_argument(
        "--ratios", nargs="+", type=float, default=[0.1, 0.3, 0.5, 0.7], metavar="X", help="shares of a layer's channels to remove"
    )
    add_scoring_flags(p, "union")
    p.add_argument(
        "--images", type=int, default=0, metavar="N", help="evaluate on N evenly spaced images of the validation split; 0: on all"
    )
    p.add_argument("--drop", type=float, default=0.01, help="mAP@.5 that a layer alone may cost in the config that is written")
    p.add_argument("--resume", default="", metavar="RUN", help="go on with the run in this folder, with its options")
    args = p.parse_args(argv)
    names = "weights data cfg dialect imgsz batch_size criterion normalize calibration_batches seed recalibrate images drop device workers"
    values = {name: getattr(args, name) for name in names.split()}
    values |= {"ratios": tuple(args.ratios), "exclude": tuple(args.exclude), "equalize": args.equalize or "union"}
    if not args.resume and not args.weights:
        raise InputError("--weights: give a checkpoint, or --resume with the folder of a run that was cut short")
    from engine.sensitivity import SensitivityOptions, resume, run

    if args.resume:
        resume(args.resume, {name: values[name] for name in typed(p, argv) & values.keys()})
    else:
        run(SensitivityOptions(**values), args.project, args.name, args.exist_ok, args.dry_run)


if __name__ == "__main__":
    run_script(main)
