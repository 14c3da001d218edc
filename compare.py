"""Compare runs in one table and picture: pruning runs, trainings, fine-tunings and validations, mixed.

python compare.py runs/train/exp runs/prune/exp runs/prune/exp2 runs/train/exp5 --names base 50% 70% tuned
"""

from utils.errors import run_script
from utils.flags import Argv, add_device, add_run, parser


def main(argv: Argv = None) -> None:
    p = parser(__doc__)
    p.add_argument("runs", nargs="+", metavar="RUN", help="folders of finished runs; the first is what the others are compared with")
    p.add_argument(
        "--names", nargs="+", default=[], metavar="NAME", help="labels of the runs, in their order; the folders' names if left out"
    )
    p.add_argument("--no-latency", action="store_true", help="measure nothing: show the latency that the runs wrote, if any")
    p.add_argument("--no-before", action="store_true", help="no rows for the networks that pruning runs began with")
    add_device(p, workers=False)
    add_run(p, "runs/compare")
    args = p.parse_args(argv)
    from engine.compare import CompareOptions, compare

    same = {key: getattr(args, key) for key in ("device", "project", "name", "exist_ok")}
    compare(CompareOptions(tuple(args.runs), tuple(args.names), not args.no_latency, not args.no_before, **same))


if __name__ == "__main__":
    run_script(main)
