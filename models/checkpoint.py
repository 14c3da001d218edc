"""Checkpoints: writing ours, and loading any (ours, a cfg + weights pair, an official YOLOv5 `.pt`) into a `Model`.

A checkpoint of ours is a dict of tensors and plain values that `torch.load(weights_only=True)` reads::

    format      "yolo-prune 1"
    cfg         the structure, as cfg text (anchors included)
    state       tensors under YOLOv5's keys (the EMA's where one was kept)
    names       class names
    imgsz       the size it was trained at
    epoch       last finished epoch, -1 once training is over
    best_fitness, hyp, options
    training    None once stripped; until then raw weights, optimizer and the state of the loop's seams
    extensions  `quantization`: scheme and ranges of a quantised network; unknown entries are refused

Stripped files hold convolution weights in half precision, like YOLOv5's; batch norms and biases stay float32 (they are few, and a
running variance can leave half's range). So do the weights of a quantised network: half precision would move some of them to the next step of their grid.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from models import official
from models.align import aligned, named_like
from models.blocks import OUTPUTS, Block, Blocks, heads, is_classifier, strides
from models.cfg import read_cfg_text, write_cfg
from models.cfg_text import read_text
from models.darknet_weights import read_weights
from models.foreign import DIALECTS, OURS, YOLOV5_PRUNE, ForeignCfg, dialect_of, read_foreign
from models.foreign_weights import cfg_beside, module_list, named_tensors, names_beside
from models.metadata import exported_kind
from models.network import Network, replace_anchors
from models.quantization import Quantization, Ranges, quantize
from models.yaml_reader import from_spec, read_yaml
from utils.errors import InputError
from utils.files import atomic, existing
from utils.log import LOGGER

FORMAT = "yolo-prune 1"
EXTENSIONS = frozenset({"quantization"})
_ENTRIES = frozenset({"cfg", "state", "names", "imgsz", "epoch", "best_fitness", "hyp", "options", "training", "extensions"})
ROOT = Path(__file__).resolve().parent.parent
SHIPPED = (ROOT / "models", ROOT / "models" / "hub", ROOT / "cfg")
State = dict[str, Tensor]


@dataclass(frozen=True)
class Model:
    """What a checkpoint says: structure, tensors (float32), class names, the quantisation of a quantised one, and the state of training where it is
    not over."""

    blocks: Blocks
    state: State
    names: tuple[str, ...]
    imgsz: int = 640
    epoch: int = -1
    best_fitness: float = 0.0
    hyp: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] | None = None
    quantization: Ranges | None = None

    def network(self) -> Network:
        """Build the network and load the tensors, strictly; a quantised one rounds as it was trained or calibrated to."""
        network = Network(self.blocks)
        network.load_state_dict(self.state)
        if self.quantization is not None:
            quantize(network, self.quantization.scheme, self.quantization.ranges)
        return network.eval()


def save_model(path: Path, model: Model) -> None:
    """Write `model` atomically; stripped (half-precision convolutions) where `model.training` is None."""
    half = model.training is None and model.quantization is None
    content = {
        "format": FORMAT,
        "cfg": write_cfg(model.blocks),
        "state": {k: _stored(v, half) for k, v in model.state.items()},
        "names": list(model.names),
        "imgsz": model.imgsz,
        "epoch": model.epoch,
        "best_fitness": model.best_fitness,
        "hyp": model.hyp,
        "options": model.options,
        "training": model.training,
        "extensions": {} if model.quantization is None else {"quantization": model.quantization.to_plain()},
    }
    with atomic(path) as temporary, open(temporary, "wb") as file:
        _save(content, file)


def _save(content: dict[str, Any], file: BinaryIO) -> None:
    """`torch.save`, whose archive writer turns a full disk (and Ctrl-C) into a `RuntimeError` about positions: raise what happened."""
    try:
        torch.save(content, file)
    except RuntimeError as error:
        cause: BaseException = error
        while cause.__context__ is not None:
            cause = cause.__context__
        raise cause from None


def stripped(model: Model) -> Model:
    """`model` without its state of training, with the values that its stripped file would give back."""
    state = {k: _stored(v, half=model.quantization is None) for k, v in model.state.items()}
    return replace(model, state={k: v.float() if v.is_floating_point() else v for k, v in state.items()}, epoch=-1, training=None)


def _stored(tensor: Tensor, half: bool) -> Tensor:
    tensor = tensor.detach().cpu()
    return tensor.half() if half and tensor.dim() == 4 and tensor.is_floating_point() else tensor.clone()


def load_model(weights: str | Path, cfg: str | Path | None = None, dialect: str = "auto") -> Model:
    """Load any checkpoint. `cfg` (a cfg or a model yaml) overrides the structure and must fit the tensors; anchors stay the checkpoint's.

    Weights without a structure (Darknet's `.weights`, the pruning repositories' pairs) need the cfg, which may stand beside them under the
    same name. `dialect`: of a cfg, see `read_structure`. Raises `InputError` naming the file and each block that differs.
    """
    kind = exported_kind(weights)
    if kind:
        raise InputError(
            f"{weights}: an exported {kind} model, which detect.py, val.py and prune_detect.py can run, and nothing can train, prune or export; "
            "give the checkpoint that it was made from"
        )
    path = existing(weights, "--weights")
    if path.suffix == ".weights":
        return _from_darknet(path, cfg, dialect)
    try:
        # What torch should not even open goes to the stricter reader too, which says what it is instead.
        if official.looks_official(path) or not official.is_plain_zip(path):
            model = _from_official(path)
        else:
            content = _content(path)
            tensors = module_list(content)
            if tensors is not None:
                return _from_module_list(path, tensors, cfg, dialect)
            model = _from_ours(path, content)
    except (OSError, zipfile.BadZipFile, EOFError) as error:
        raise InputError(f"{path}: cannot be read ({error}); the file is truncated or not a checkpoint") from None
    if cfg:
        blocks = _structure_for(model, cfg, dialect, f"{cfg} does not fit {path}")
        model = replace(model, blocks=with_anchors_of(model.blocks, blocks, cfg))
        check_fit(model.blocks, model.state, f"{cfg} does not fit {path}")
    return model


def _structure_for(model: Model, cfg: str | Path, dialect: str, what: str) -> Blocks:
    """The blocks of `cfg` for the tensors of `model`; those of another program's cfg get the names that the tensors have."""
    structure = _read(cfg, model.blocks[heads(model.blocks)[0]].classes, dialect)
    if not isinstance(structure, ForeignCfg):
        return structure
    if shapes_of(structure.blocks).keys() == model.state.keys():
        return structure.blocks
    return aligned(structure, model.blocks, what)


def read_structure(path: str | Path, classes: int | None = None, dialect: str = "auto") -> Blocks:
    """Read a model yaml or a cfg file; `classes` replaces its number of classes. A bare name may be one of those that ship.

    `dialect`: whose cfg it is (`models.foreign.DIALECTS`), or `auto`: told by its keys. A cfg of the pruning repositories that is wired like a
    model that ships gets that model's names.
    """
    structure = _read(path, classes, dialect)
    return _named(structure) if isinstance(structure, ForeignCfg) else structure


def _named(cfg: ForeignCfg) -> Blocks:
    if cfg.dialect != YOLOV5_PRUNE:
        return cfg.blocks
    yamls = [path for folder in SHIPPED for path in sorted(folder.glob("*.yaml"))]
    return named_like(cfg, (read_yaml(path) for path in yamls)) or cfg.blocks


def _read(path: str | Path, classes: int | None, dialect: str) -> Blocks | ForeignCfg:
    path = Path(path)
    if path.name == str(path) and not path.is_file():
        path = next((shipped for folder in SHIPPED if (shipped := folder / path).is_file()), path)
    path = existing(path, "--cfg")
    if path.suffix in (".yaml", ".yml"):
        return read_yaml(path, classes)
    if path.suffix == ".cfg":
        return _read_cfg(path, classes, dialect)
    raise InputError(f"--cfg: {path} is neither a .yaml nor a .cfg file")


def _read_cfg(path: Path, classes: int | None, dialect: str) -> Blocks | ForeignCfg:
    if dialect != "auto" and dialect not in DIALECTS:
        raise InputError(f"--dialect {dialect}: known are auto, {', '.join(DIALECTS)}")
    text = read_text(path)
    chosen = dialect_of(text, str(path)) if dialect == "auto" else dialect
    if chosen == OURS:
        return read_cfg_text(text, str(path), classes)
    LOGGER.info(f"{path}: read as a cfg of the dialect {chosen}{', which its keys tell; --dialect overrides' if dialect == 'auto' else ''}")
    return read_foreign(text, str(path), chosen, classes)


def _from_darknet(path: Path, cfg: str | Path | None, dialect: str) -> Model:
    cfg = cfg_beside(path, cfg)
    structure = _read(cfg, None, dialect)
    blocks = _named(structure) if isinstance(structure, ForeignCfg) else structure
    names = names_beside((path, cfg), blocks[heads(blocks)[0]].classes)
    return Model(blocks, read_weights(path, blocks), names, structure.imgsz if isinstance(structure, ForeignCfg) else 640)


def _from_module_list(path: Path, tensors: Mapping[str, Tensor], cfg: str | Path | None, dialect: str) -> Model:
    cfg = cfg_beside(path, cfg)
    structure = _read(cfg, None, YOLOV5_PRUNE if dialect == "auto" else dialect)
    if not isinstance(structure, ForeignCfg):
        raise InputError(f"{cfg}: not the cfg of {path}, whose tensors are numbered by the sections of a cfg of the dialect {YOLOV5_PRUNE}")
    blocks, what = _named(structure), f"{cfg} does not fit {path}"
    state = named_tensors(tensors, structure, blocks, what)
    check_fit(blocks, state, what)
    return Model(blocks, state, names_beside((path, cfg), blocks[heads(blocks)[0]].classes), structure.imgsz)


def with_anchors_of(source: Blocks, blocks: Blocks, cfg: str | Path) -> Blocks:
    """Give `blocks` the anchors that `source` was trained with."""
    trained, written = _anchors(source), _anchors(blocks)
    if trained == written or len(trained) != len(written):
        return blocks
    LOGGER.info(f"{cfg}: its anchors differ from those of the weights; the weights' anchors are used")
    return replace_anchors(blocks, trained)


def _anchors(blocks: Blocks) -> list[list[tuple[float, float]]]:
    heads = sorted((b for b in blocks if b.kind == "yolo"), key=lambda b: b.level)
    return [list(b.anchors) for b in heads]


def shapes_of(blocks: Blocks) -> dict[str, tuple[int, ...]]:
    """Key -> shape of every tensor a network of `blocks` has, without allocating it."""
    with torch.device("meta"):
        network = Network(blocks)
    return {k: tuple(v.shape) for k, v in network.state_dict().items()}


def check_fit(blocks: Blocks, state: State, what: str) -> None:
    """Raise `InputError` naming each block of `blocks` whose tensors differ from `state`'s in presence or shape."""
    wanted, got = shapes_of(blocks), {k: tuple(v.shape) for k, v in state.items()}
    differ: dict[str, str] = {}
    for key in sorted(wanted.keys() | got.keys(), key=_natural):
        if wanted.get(key) != got.get(key):
            differ.setdefault(
                key.rsplit(".", 2)[0], f"{key} is {_shape(wanted.get(key))} in the structure and {_shape(got.get(key))} in the weights"
            )
    if differ:
        shown = list(differ.values())
        more = f"; and {len(shown) - 8} more blocks" if len(shown) > 8 else ""
        raise InputError(f"{what}: {'; '.join(shown[:8])}{more}. Use the cfg that was written with these weights, or leave --cfg out")


def _natural(key: str) -> list:
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in key.split(".")]


def _shape(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else "x".join(map(str, shape)) or "a number"


def _content(path: Path) -> object:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, KeyError, ValueError) as error:
        official.read_official(path)  # names what the pickle asked for
        raise InputError(f"{path}: not a readable checkpoint ({str(error).splitlines()[0][:160]}); the file may be truncated") from None


def _from_ours(path: Path, content: object) -> Model:
    if not isinstance(content, dict) or "format" not in content:
        official.read_official(path)  # says what it is instead
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        got = content.get("format") if isinstance(content, dict) else None
        raise InputError(f"{path}: not a checkpoint of this project (format {got!r}, wanted {FORMAT!r}) nor one of YOLOv5")
    missing = _ENTRIES - content.keys()
    if missing:
        raise InputError(f"{path}: a checkpoint of this project without {', '.join(sorted(missing))}; it is incomplete")
    unknown = content["extensions"].keys() - EXTENSIONS
    if unknown:
        raise InputError(f"{path}: holds {', '.join(sorted(unknown))}, which this version does not know; use a newer one")
    blocks = read_cfg_text(content["cfg"], f"{path} (its cfg)")
    state = {k: v.float() if v.is_floating_point() else v for k, v in content["state"].items()}
    check_fit(blocks, state, f"{path}: its structure and tensors disagree")
    fields = {k: content[k] for k in ("imgsz", "epoch", "best_fitness", "hyp", "options", "training")}
    return Model(blocks, state, tuple(content["names"]), **fields, quantization=_quantization(content["extensions"], blocks, path))


def _quantization(extensions: Mapping[str, Any], blocks: Blocks, path: Path) -> Ranges | None:
    if "quantization" not in extensions:
        return None
    try:
        saved = Ranges.from_plain(extensions["quantization"])
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise InputError(f"{path}: its quantisation cannot be understood ({type(error).__name__}: {error})") from None
    quantization = Quantization(blocks, saved.scheme)
    if saved.ranges:
        quantization.set_ranges(saved.ranges)
    return saved


# What of a pickled yaml shapes the network. Like YOLOv5 we pass over other keys; `check_fit` would tell if they mattered.
_STRUCTURAL = ("nc", "depth_multiple", "width_multiple", "channel_multiple", "anchors", "backbone", "head", "ch", "activation")


def _from_official(path: Path) -> Model:
    file = official.read_official(path)
    try:
        blocks = from_spec({k: v for k, v in file.yaml.items() if k in _STRUCTURAL}, f"{path} (its yaml)", file.nc)
        blocks = replace_anchors(blocks, _anchors_pixels(file, blocks, path))
        blocks = tuple(_as_pickled(block, file, path) for block in blocks)
        check_fit(blocks, file.state, f"{path}: its yaml and tensors disagree")
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = (str(error).splitlines() or [""])[0][:160]
        raise InputError(f"{path}: its yaml describes no network ({type(error).__name__}: {reason})") from error
    return Model(blocks, dict(file.state), file.names, best_fitness=file.best_fitness or 0.0)


def _anchors_pixels(file: official.OfficialCheckpoint, blocks: Blocks, path: Path) -> list[list[tuple[float, float]]]:
    """The anchors in pixels: the buffer is the truth, since autoanchor leaves the yaml as it was."""
    cells = strides(blocks)
    if len(cells) != len(file.anchors) or file.stride not in (None, tuple(map(float, cells))):
        raise InputError(f"{path}: its Detect layer has {len(file.anchors)} levels with the strides {file.stride}; its yaml gives {cells}")
    return [[(w, h) for w, h in level] for level in (file.anchors * torch.tensor(cells).view(-1, 1, 1)).tolist()]


def with_structure(model: Model, blocks: Blocks, weights: str | Path, cfg: str | Path) -> Model:
    """`model` with the structure of `cfg`, which its tensors need not all fit. Raises `InputError` for a quantised one unless only classes and anchors
    differ: ranges of other layers say nothing of these."""
    if model.quantization is not None and _without_data(blocks) != _without_data(model.blocks):
        raise InputError(
            f"--cfg {cfg}: is another structure than that of {weights}, which is quantised, with ranges for its own layers alone; leave --cfg out, or start "
            "from the checkpoint before quantisation"
        )
    return replace(model, blocks=blocks)


def _without_data(blocks: Blocks) -> list[Block]:
    """`blocks` without what is set by the data that they are trained on."""
    last = {j for i in heads(blocks) for j in blocks[i].inputs}
    return [replace(b, classes=0, anchors=(), channels=0) if b.kind in OUTPUTS or i in last else b for i, b in enumerate(blocks)]


def with_batch_norms(model: Model, weights: str | Path) -> Model:
    """Return `model` if it has the batch norms that training and pruning need; raise `InputError` if they are fused away."""
    if not any(b.kind == "convolutional" and b.batch_norm for b in model.blocks):
        raise InputError(
            f"{weights}: its batch norms are fused away, so it cannot be trained or pruned (val.py, detect.py and --t_weight take it); "
            "use the unfused checkpoint"
        )
    return model


def require_float(model: Model, weights: str | Path) -> Model:
    """Return `model` if it is not quantised; raise `InputError`, for what changes structures, if it is."""
    if model.quantization is not None:
        raise InputError(f"{weights}: is quantised; prune the checkpoint before quantisation, fine-tune it and quantise then")
    return model


def require_detector(model: Model, weights: str | Path) -> Model:
    """Return `model` if it detects; raise `InputError` if it is a classifier."""
    if is_classifier(model.blocks):
        raise InputError(
            f"{weights}: is a classifier, and this takes detectors; val.py measures classifiers, train.py trains them and backbone_prune.py prunes them"
        )
    return model


_PICKLED_ACTIVATIONS = {
    "SiLU": "silu",
    "LeakyReLU(0.1)": "leaky",
    "Hardswish": "hardswish",
    "ReLU": "relu",
    "Mish": "mish",
    "Identity": "linear",
}


def _as_pickled(block: Block, file: official.OfficialCheckpoint, path: Path) -> Block:
    """Carry what the file's own modules say into the block: batch norm constants, the activation (it differs between eras), a folded norm."""
    if not block.has_gamma:
        return block
    owner = block.name if block.kind == "convolutional" else block.name.rpartition(".")[0]
    pickled = file.activations.get(owner, "")
    act = _PICKLED_ACTIVATIONS.get(pickled, block.activation if not pickled else None)
    if act is None:
        raise InputError(
            f"{path}: {owner} has the activation {pickled}, which this project does not have; known: {', '.join(_PICKLED_ACTIVATIONS)}"
        )
    if f"{owner}.conv.bias" in file.state and f"{block.bn_path}.weight" not in file.state:
        return replace(block, name=f"{owner}.conv", activation=act, batch_norm=False, bias=True)
    eps, momentum = file.bn_eps.get(block.bn_path, block.bn_eps), file.bn_momentum.get(block.bn_path, block.bn_momentum)
    return replace(block, activation=act, bn_eps=eps, bn_momentum=momentum)


def transfer(state: State, network: Network) -> str:
    """Load the tensors of `state` that `network` has in equal shape; return `transferred N/M tensors`.

    The network's anchors stay, since its structure says them; they count where they are the same.
    """
    own = network.state_dict()
    fits = {k: v for k, v in state.items() if k in own and own[k].shape == v.shape}
    fits = {k: v for k, v in fits.items() if not k.endswith(".anchors") or torch.allclose(own[k], v)}
    network.load_state_dict(fits, strict=False)
    return f"transferred {len(fits)}/{len(own)} tensors"
