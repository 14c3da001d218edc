"""`TrainOptions`: what a training run is started with. Light, so that scripts can parse their flags before torch is imported."""

from __future__ import annotations

from dataclasses import dataclass

from utils.errors import InputError


@dataclass(frozen=True)
class TrainOptions:
    """Everything a run is started with; it is saved with the checkpoint, so that `--resume` needs nothing else.

    `batch_size` is over all processes; -1: the largest that fits on CUDA.

    `strict`: a `cfg` must fit `weights` exactly (fine-tuning a pair); otherwise the tensors that fit are transferred.
    `sr`: sparsity strength, None where the run is not a sparsity training. `teacher`: a checkpoint to distil from.
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

    def __post_init__(self) -> None:
        if self.epochs < 1 or (self.batch_size < 1 and self.batch_size != -1):
            raise InputError(
                f"--epochs {self.epochs}, --batch-size {self.batch_size}: both must be at least 1; --batch-size -1 is the largest that fits"
            )
        if self.optimizer not in ("SGD", "Adam", "AdamW"):
            raise InputError(f"--optimizer {self.optimizer}: choose SGD, Adam or AdamW")
        if self.seed < 0:
            raise InputError(f"--seed {self.seed}: must not be negative")
        if (self.sr or 0) < 0 or self.beta_sr < 0:
            raise InputError(f"--sr {self.sr}, --beta-sr {self.beta_sr}: strengths must not be negative; 0 turns the penalty off")
