"""Fine-tune a pruned model, from its cfg + weights pair or from the .pt alone; with a teacher, distil.

python finetune_pruned.py --weights runs/prune/exp/pruned.pt --data data/mine.yaml --epochs 50
python finetune_pruned.py --cfg pruned.cfg --weights pruned.pt --data data/mine.yaml --distill --t_weight runs/train/exp/weights/best.pt
"""

from engine.train_flags import add_train_flags, start, train_options
from utils.errors import InputError, run_script
from utils.flags import Argv, parser


def main(argv: Argv = None) -> None:
    p = parser(__doc__)
    add_train_flags(p, epochs=100)
    p.add_argument("--distill", action="store_true", help="pull the outputs to those of the teacher in --t_weight")
    p.add_argument("--distill-weight", type=float, default=1.0, help="weight of the distillation term")
    args = p.parse_args(argv)
    if not args.resume and not args.weights:
        raise InputError("--weights: give the pruned .pt that a pruning script wrote")
    if args.distill and not args.t_weight:
        raise InputError("--distill needs a teacher: --t_weight runs/train/exp/weights/best.pt")
    start(args, train_options(args, strict=True, distill=args.distill, distill_weight=args.distill_weight))


if __name__ == "__main__":
    run_script(main)
