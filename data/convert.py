"""Command: annotations of other formats to YOLO labels, in YOLOv5's layout.

python -m data.convert voc VOCdevkit --out ../datasets/VOC
python -m data.convert coco ../datasets/coco
python -m data.convert oxfordhand hand_dataset --out ../datasets/oxfordhand
python -m data.convert voc my_annotations --out ../datasets/mine --names cat,dog
python -m data.convert coco mine.json --images my_images --out ../datasets/mine
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from data.coco import read_coco
from data.layout import DATASET, Skips, listed, write
from data.oxfordhand import NAMES, read_oxfordhand
from data.voc import VocOptions, read_voc
from utils.data_config import REPOSITORY, read_data
from utils.errors import InputError, run_script
from utils.flags import Argv, Parser, parser
from utils.log import LOGGER


def main(argv: Argv = None) -> None:
    p = parser(__doc__)
    p.prog = "python -m data.convert"
    formats = p.add_subparsers(dest="format", required=True, metavar="voc|coco|oxfordhand")
    voc = _format(formats, "voc", "Pascal VOC XML", "VOCdevkit, or a folder with Annotations and JPEGImages")
    voc.add_argument("--names", default="", help="your classes: a,b,c or a .names or dataset .yaml file (default: VOC's 20)")
    voc.add_argument("--difficult", action="store_true", help="keep the objects that are marked difficult")
    coco = _format(formats, "coco", "COCO JSON", "the folder with annotations/instances_*.json, or one COCO JSON file")
    coco.add_argument("--images", type=Path, help="the folder of the images, if it is not beside the annotations")
    _format(formats, "oxfordhand", "the Oxford hand dataset's .mat", "hand_dataset")
    args = p.parse_args(argv)
    _convert(args)


def _format(formats: argparse._SubParsersAction, name: str, what: str, source: str) -> Parser:
    p = formats.add_parser(name, help=what, description=f"{what} -> YOLO labels.", allow_abbrev=False)
    p.add_argument("source", type=Path, help=source)
    p.add_argument("--out", type=Path, help="the data set's folder to write (default: SOURCE)")
    p.add_argument("--copy", action="store_true", help="copy images that lie elsewhere instead of linking to them")
    return p


def _convert(args: argparse.Namespace) -> None:
    skips = Skips()
    if args.format == "voc":
        names = _class_names(args.names)
        splits = read_voc(args.source, VocOptions(names, args.difficult), skips)
    elif args.format == "coco":
        data = read_coco(args.source, args.images, skips)
        splits, names = data.splits, data.names
    else:
        splits, names = read_oxfordhand(args.source, skips), NAMES
    if args.out is None and not args.source.is_dir():
        raise InputError("--out: name the folder to write, since SOURCE is a file")
    out = args.out or args.source
    write(out, splits, names, skips, copy=args.copy)
    LOGGER.info(f"{len(names)} classes: {listed(names)}\nuse it: python train.py --data {out / DATASET}")


def _class_names(text: str) -> tuple[str, ...]:
    """Return the classes that `--names` lists or that the file it names has; VOC's own without it."""
    if not text:
        return read_data(REPOSITORY / "data" / "VOC.yaml", splits=()).names
    if Path(text).suffix in (".yaml", ".yml", ".data"):
        return read_data(text, splits=()).names
    found = Path(text).read_text(encoding="utf-8-sig").splitlines() if os.path.isfile(text) else text.split(",")
    names = tuple(name.strip() for name in found if name.strip())
    if not names or len(set(names)) < len(names):
        raise InputError(f"--names: expected class names, each once, found {listed(names) or 'none'}")
    return names


if __name__ == "__main__":
    run_script(main)
