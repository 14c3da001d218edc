"""Command: write the cfg of a yaml, a cfg (of any dialect) or a checkpoint, alone or as a cfg + weights pair.

python -m models.convert models/yolov5s.yaml --out cfg/yolov5s.cfg
python -m models.convert yolov5n.pt --out pairs/yolov5n.cfg      # pairs/yolov5n.cfg and pairs/yolov5n.pt
python -m models.convert yolov4-tiny.weights --cfg yolov4-tiny.cfg --out pairs/tiny.cfg      # Darknet's, or a pruning repository's pair
python -m models.convert --stock                                 # the files of cfg/, from the yamls of the same names
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from models.cfg import write_cfg
from models.checkpoint import load_model, read_structure, save_model
from models.foreign import DIALECTS
from models.network import summary
from utils.errors import InputError, run_script
from utils.files import make_folder, write_text
from utils.log import LOGGER

ROOT = Path(__file__).resolve().parent.parent
SHIPPED_HUB = ("yolov5s6", "yolov5s-ghost", "yolov3-tiny")  # one each with four levels, depthwise convolutions and a zero-padded pool


def stock_cfgs() -> dict[Path, str]:
    """Path -> text of every cfg file that ships, generated from the yaml of the same name: P5, and a few of the others."""
    paths = sorted((ROOT / "models").glob("yolov5?.yaml")) + [ROOT / "models" / "hub" / f"{name}.yaml" for name in SHIPPED_HUB]
    return {ROOT / "cfg" / f"{path.stem}.cfg": write_cfg(read_structure(path)) for path in paths}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", nargs="?", help="a .yaml, .cfg, .pt or .weights file")
    parser.add_argument("--cfg", default="", help="structure (.yaml or .cfg) of the weights if not their own")
    parser.add_argument(
        "--dialect", default="auto", metavar="NAME", help=f"whose .cfg is read: {', '.join(DIALECTS)}, or auto: told by its keys"
    )
    parser.add_argument("--out", help="the .cfg to write; a checkpoint's weights go beside it")
    parser.add_argument("--classes", type=int, help="number of classes (yaml and cfg only)")
    parser.add_argument("--stock", action="store_true", help="write every cfg that ships")
    args = parser.parse_args(argv)
    if args.stock:
        for path, text in stock_cfgs().items():
            write_text(path, text)
            LOGGER.info(f"wrote {path.relative_to(ROOT)}")
        return
    if not args.source:
        raise InputError("name a .yaml, .cfg, .pt or .weights file, or give --stock")
    _convert(Path(args.source), Path(args.out) if args.out else None, args.classes, args.cfg, args.dialect)


def _convert(source: Path, out: Path | None, classes: int | None, cfg: str, dialect: str) -> None:
    model = load_model(source, cfg or None, dialect) if source.suffix in (".pt", ".weights") else None
    if model and classes:
        raise InputError("--classes: the tensors of a checkpoint fix its classes; fine-tune it on other data instead")
    blocks = model.blocks if model else read_structure(source, classes, dialect)
    LOGGER.info(summary(blocks))
    if out is None:
        return
    if out.suffix != ".cfg":
        raise InputError(f"--out: {out} must end in .cfg")
    beside = Path(cfg) if cfg else source.with_suffix(".cfg")
    if model and source.suffix == ".weights" and out.resolve() == beside.resolve():
        raise InputError(f"--out: {out} would replace the cfg of {source}; choose another folder or name")
    if model and out.with_suffix(".pt").resolve() == source.resolve():
        raise InputError(f"--out: {out} would put its weights over {source}; choose another folder or name")
    make_folder(out.parent)
    write_text(out, write_cfg(blocks))
    LOGGER.info(f"wrote {out}")
    if model:
        save_model(out.with_suffix(".pt"), replace(model, training=None, epoch=-1))
        LOGGER.info(f"wrote {out.with_suffix('.pt')}")


if __name__ == "__main__":
    run_script(main)
