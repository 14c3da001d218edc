"""Detect objects in images and videos.

python detect.py --weights runs/train/exp/weights/best.pt --source images/
"""

from engine.detect_flags import add_detect_flags, start
from utils.errors import run_script
from utils.flags import Argv, parser


def main(argv: Argv = None) -> None:
    p = parser(__doc__)
    add_detect_flags(p)
    start(p.parse_args(argv))


if __name__ == "__main__":
    run_script(main)
