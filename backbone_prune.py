"""Prune a backbone by its filters, a uniform share of each layer, and map it into a detector, whose trained neck is kept and sliced to fit.

python backbone_prune.py --weights runs/train/exp/weights/best.pt --data data/mine.yaml --method L1 --sparsity 0.25 --recalibrate 16
python backbone_prune.py --weights classifier.pt --into detector.pt --data data/mine.yaml --method FPGM      # its backbone, in a trained detector
python backbone_prune.py --weights classifier.pt --cfg models/yolov5s.yaml --data data/mine.yaml             # the same, in a fresh one
python backbone_prune.py --weights detector.pt --data data/mine.yaml --rounds 4 --sparsity 0.1 --epochs-per-round 5
python backbone_prune.py --resume runs/prune/exp                                                            # goes on with a run of --rounds
"""

from engine.options import TrainOptions
from engine.prune_flags import add_prune_flags, shared
from utils.errors import InputError, run_script
from utils.flags import Argv, parser, typed


def main(argv: Argv = None) -> None:
    p = parser(__doc__)
    add_prune_flags(p, required=False)
    p.add_argument("--method", default="L1", metavar="L1|L2|FPGM", help="what a filter is judged by: a norm, or its distance to the others")
    p.add_argument("--sparsity", type=float, default=0.25, help="share of each backbone layer's channels that goes")
    p.add_argument("--into", default="", metavar="DETECTOR.pt", help="trained detector that takes the pruned backbone of a classifier")
    p.add_argument(
        "--backbone-layers", type=int, metavar="N", help="the first N layers are the backbone (default: those before SPP or SPPF)"
    )
    p.add_argument("--min-filters", type=int, default=1, metavar="N", help="fewest channels that stay in any layer")
    p.add_argument("--rounds", type=int, metavar="N", help="prune and fine-tune N times, a share of what is left each time")
    p.add_argument(
        "--epochs-per-round", type=int, nargs="+", default=[10], metavar="E", help="fine-tuning; one number for all, or one each"
    )
    p.add_argument("--hyp", default="hyp.scratch-low.yaml", help="hyper-parameters of the fine-tuning")
    p.add_argument("--optimizer", default="SGD", choices=["SGD", "Adam", "AdamW"], help="of the fine-tuning")
    p.add_argument("--noautoanchor", action="store_true", help="keep the anchors as they are in the fine-tuning")
    p.add_argument("--seed", type=int, default=0, help="of the fine-tuning")
    p.add_argument("--resume", default="", metavar="RUN", help="go on with the run of --rounds in this folder")
    args = p.parse_args(argv)
    if not args.resume and not args.weights:
        raise InputError("--weights: give a detector, or a classifier whose backbone is to be pruned")
    idle = typed(p, argv) & {"epochs_per_round", "hyp", "optimizer", "noautoanchor"}
    if idle and args.rounds is None and not args.resume:
        raise InputError(f"--{min(idle).replace('_', '-')} is for the fine-tuning of --rounds; give --rounds too, or leave it out")
    from engine.backbone_rounds import RoundOptions, epochs_of, resume_rounds, run_rounds
    from engine.backbone_run import BackboneOptions, prune_backbone
    from engine.prune_run import PruneOptions

    if args.resume:
        resume_rounds(args.resume)
        return
    run = PruneOptions(prefix=f"backbone_{args.sparsity:g}_{args.method.upper()}_", **shared(args))
    options = BackboneOptions(run, args.method, args.sparsity, args.into, args.backbone_layers, args.min_filters)
    if args.rounds is None:
        prune_backbone(options)
        return
    training = TrainOptions(
        args.data, hyp=args.hyp, batch_size=args.batch_size, imgsz=args.imgsz or 640, device=args.device, workers=args.workers,
        optimizer=args.optimizer, noautoanchor=args.noautoanchor, seed=args.seed,
    )  # fmt: skip
    run_rounds(RoundOptions(options, epochs_of(args.rounds, tuple(args.epochs_per_round)), training))


if __name__ == "__main__":
    run_script(main)
