"""`TrainOptions`: what a training run is started with. Light, so that scripts can parse their flags before torch is imported."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, fields
from math import inf
from typing import Any

from utils.errors import InputError

SPARSITY_METHODS = ("subgradient", "proximal")


@dataclass(frozen=True)
class TrainOptions:
    """Everything a run is started with; it is saved with the checkpoint, so that `--resume` needs nothing else.

    `batch_size` is over all processes; -1: the largest that fits on CUDA.

    `strict`: a `cfg` must fit `weights` exactly (fine-tuning a pair); otherwise the tensors that fit are transferred.
    `sr`: sparsity strength, None where the run is not a sparsity training; `sparsity_method`: how it acts. `teacher`: a checkpoint to distil from.
    `recipe`: a file whose modifiers drive the run, `recipe_text` its content as it was at the start; `recipe_teacher`: what they distil from.
    """

    data: str
    weights: str = ""
    cfg: str = ""
    hyp: str = "hyp.scratch-low.yaml"
    epochs: int = 100
    batch_size: int = 16
    imgsz: int = 640
    rect: bool = False
    quad: bool = False
    multi_scale: bool = False
    image_weights: bool = False
    sync_bn: bool = False
    nosave: bool = False
    noval: bool = False
    noautoanchor: bool = False
    cache: str | None = None
    device: str = ""
    workers: int = 8
    single_cls: bool = False
    optimizer: str = "SGD"
    cos_lr: bool = False
    label_smoothing: float = 0.0
    patience: int = 100
    freeze: tuple[int, ...] = (0,)
    save_period: int = -1
    seed: int = 0
    amp: bool = True
    project: str = "runs/train"
    name: str = "exp"
    exist_ok: bool = False
    strict: bool = False
    sr: float | None = None
    sr_decay: bool = False
    beta_sr: float = 0.0
    prune: int = 1
    teacher: str = ""
    teacher_cfg: str = ""
    distill_weight: float = 1.0
    sparsity_method: str = "subgradient"
    dialect: str = "auto"
    recipe: str = ""
    recipe_args: str = ""
    recipe_teacher: str = ""
    recipe_text: str = ""

    def __post_init__(self) -> None:
        if self.epochs < 1 or (self.batch_size < 1 and self.batch_size != -1):
            raise InputError(
                f"--epochs {self.epochs}, --batch-size {self.batch_size}: both must be at least 1; --batch-size -1 is the largest that fits"
            )
        if self.optimizer not in ("SGD", "Adam", "AdamW"):
            raise InputError(f"--optimizer {self.optimizer}: choose SGD, Adam or AdamW")
        if self.seed < 0:
            raise InputError(f"--seed {self.seed}: must not be negative")
        if not all(0 <= strength < inf for strength in (self.sr or 0, self.beta_sr)):
            raise InputError(
                f"--sr {self.sr}, --beta-sr {self.beta_sr}: strengths must not be negative, nor infinite; 0 turns the penalty off"
            )
        if self.sparsity_method not in SPARSITY_METHODS:
            raise InputError(f"--sparsity-method {self.sparsity_method}: choose {' or '.join(SPARSITY_METHODS)}")
        if self.recipe_teacher and not self.recipe:
            raise InputError(
                "--t_weight: nothing distils from it; give --distill (finetune_pruned.py), or a --recipe with a DistillationModifier"
            )
        if self.recipe_args and not self.recipe:
            raise InputError("--recipe-args: these are values for the variables of a --recipe, and none is given")

    @classmethod
    def from_saved(cls, saved: Mapping[str, Any]) -> TrainOptions:
        """The options of a checkpoint or an `opt.yaml`; what this version does not know is passed over."""
        known = {field.name for field in fields(cls)}
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in saved.items() if k in known})

    @property
    def script(self) -> str:
        """The script that such a run is started and resumed with."""
        if self.sr is not None:
            return "train_sparsity.py"
        return "finetune_pruned.py" if self.strict else "train.py"

    def command(self) -> str:
        """The command line that starts this run: every option that is not at its default, as the script's flags."""
        words = ["python", self.script]
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name not in ("strict", "recipe_text") and value != field.default:
                words += _flag(field.name, value)
        return shlex.join(words)


def _flag(name: str, value: Any) -> list[str]:
    flag = {"amp": "--no-amp", "teacher": "--t_weight", "teacher_cfg": "--t_cfg", "recipe_teacher": "--t_weight"}.get(
        name, "--" + name.replace("_", "-")
    )
    values = [] if isinstance(value, bool) else [str(v) for v in (value if isinstance(value, tuple) else (value,))]
    return [*(["--distill"] if name == "teacher" else []), flag, *values]
