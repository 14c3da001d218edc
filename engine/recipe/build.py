"""From a tag and its fields to a modifier: which fields each has, which values they take, and which modifiers are refused, by name.

The ranges are SparseML's, tightened where its own could not be carried out (a ramp that ends where it starts, a bare learning rate of 0).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from engine.recipe import fields as f
from engine.recipe.build_quantization import QUANTIZATION, quantization
from engine.recipe.fields import Entry, Field, Wrong
from engine.recipe.modifiers import (
    ALL,
    ALL_PRUNABLE,
    FROM_PARAM,
    ConstantPruningModifier,
    DistillationModifier,
    EpochRangeModifier,
    GlobalMagnitudePruningModifier,
    GMPruningModifier,
    LearningRateFunctionModifier,
    LearningRateModifier,
    MagnitudePruningModifier,
    Modifier,
    QuantizationModifier,
    SetLearningRateModifier,
    SetWeightDecayModifier,
    TrainableParamsModifier,
    first_epoch,
)
from engine.recipe.tree import Tagged
from utils.errors import InputError, did_you_mean

_MAGNITUDE = "GMPruningModifier and GlobalMagnitudePruningModifier rank weights by magnitude"
_CHANNELS = "prune.py and slim_prune.py remove whole channels, before a recipe's training"
_NO_SECOND = "nothing here takes its place"
_LANGUAGE = "it is for language models"
# Parts of names, in lower case, that SparseML knows and this project does not -> what there is instead.
_REFUSED = {
    "acdc": _MAGNITUDE,
    "mfac": _MAGNITUDE,
    "obs": _MAGNITUDE,
    "movement": _MAGNITUDE,
    "rigl": _MAGNITUDE,
    "topkast": _MAGNITUDE,
    "structured": _CHANNELS,
    "layerthinning": _CHANNELS,
    "layerpruning": "layer_prune.py removes whole layers, before a recipe's training",
    "powerpropagation": _NO_SECOND,
    "setparam": _NO_SECOND,
    "gradualparam": _NO_SECOND,
    "perlayerdistillation": "DistillationModifier distils from the outputs of --t_weight",
    "sparsegpt": _LANGUAGE,
    "wanda": _LANGUAGE,
    "smoothquant": _LANGUAGE,
    "gptq": _LANGUAGE,
}
_IGNORED = {"sparsificationlogging": "sparsity is logged anyway"}


@dataclass(frozen=True)
class Kind:
    """How one modifier is read. `span`: it must end, and after its start. `finish`: what is checked and derived once its fields are read."""

    make: type[Modifier]
    fields: Mapping[str, Field]
    span: bool = False
    finish: Callable[[Entry], None] = lambda entry: None


def modifier(tagged: Tagged) -> tuple[Modifier | None, list[str]]:
    """The modifier that `tagged` says, or None for one that has nothing to do here; and notes for the log. Raises `InputError`."""
    low = tagged.name.lower()
    for begin, why in _IGNORED.items():
        if low.startswith(begin):
            return None, [f"{tagged.where}: {tagged.name} has no effect: {why}"]
    told = low.replace("unstructured", "").replace("observer", "")  # which hold parts of other names
    for part, instead in _REFUSED.items():
        if part in told and tagged.name not in KINDS:
            raise InputError(f"{tagged.where}: {tagged.name} is not supported; {instead}")
    if tagged.name not in KINDS:
        near = did_you_mean(tagged.name, KINDS) or f"; known are {', '.join(KINDS)}"
        raise InputError(f"{tagged.where}: there is no modifier {tagged.name!r:.80}{near}")
    kind, entry = KINDS[tagged.name], Entry(tagged)
    entry.read(kind.fields)
    _check_epochs(entry, kind.span)
    kind.finish(entry)
    return kind.make(**entry.values, where=tagged.where), entry.notes


def _check_epochs(entry: Entry, span: bool) -> None:
    start, end = max(entry.values.get("start_epoch", -1.0), 0.0), entry.values.get("end_epoch", -1.0)
    if span and end <= start:
        raise entry.error("end_epoch", f"{end:g} is not after start_epoch {start:g}")
    if 0 <= end < start:
        raise entry.error("end_epoch", f"{end:g} is before start_epoch {start:g}")


def _span(entry: Entry) -> tuple[float, float]:
    """Start and end on the recipe's clock; an end of -1: never."""
    return max(entry.values.get("start_epoch", -1.0), 0.0), entry.values.get("end_epoch", -1.0)


def _lasting(entry: Entry) -> None:
    """Refuse what would end as it starts, and so never act."""
    start, end = _span(entry)
    if end >= 0 and end <= start:
        raise entry.error("end_epoch", f"{end:g} is not after start_epoch {start:g}: it would never act")


def _trainable(entry: Entry) -> None:
    _lasting(entry)
    start, end = _span(entry)
    if end >= 0 and first_epoch(end) <= first_epoch(start):
        raise entry.error(
            "end_epoch",
            f"{end:g} and start_epoch {start:g} both round up to epoch {first_epoch(end)}, as it acts between epochs: it would never act",
        )


def _scheduler(entry: Entry) -> None:
    """Check `lr_kwargs` of a LearningRateModifier against its class, and complete them."""
    values = entry.values
    known = _SCHEDULERS[values["lr_class"]]
    made: dict[str, Any] = {}
    for name, value in values["lr_kwargs"].items():
        if name not in known:
            raise entry.error("lr_kwargs", f"{values['lr_class']} takes {' and '.join(known)}, not {f.shown(name)}")
        try:
            made[name] = known[name][0](value)
        except Wrong as wrong:
            raise entry.error("lr_kwargs", f"{name}: {f.shown(value)} is not {wrong}") from None
    for name, (_, default) in known.items():
        if name not in made:
            if default is None:
                raise entry.error("lr_kwargs", f"{values['lr_class']} needs {name}")
            made[name] = default
    if "milestones" in made:
        start, end = _span(entry)
        if not all(start < m and (end < 0 or m < end) for m in made["milestones"]):
            span = f"after start_epoch {start:g}" if end < 0 else f"between start_epoch {start:g} and end_epoch {end:g}"
            raise entry.error(
                "lr_kwargs", f"milestones {f.shown(values['lr_kwargs']['milestones'])} are epochs of the run, and not all {span}"
            )
    values["lr_kwargs"] = made


def _milestones(value: Any) -> tuple[float, ...]:
    if not isinstance(value, list) or not value:
        raise Wrong("a list of epochs")
    found = tuple(f.an_epoch(v) for v in value)
    if list(found) != sorted(set(found)):
        raise Wrong("a list of growing epochs")
    return found


_GAMMA = (f.factor, 0.1)
# class -> {argument: (check, default; None where it must be given)}
_SCHEDULERS: dict[str, dict[str, tuple[f.Check, Any]]] = {
    "StepLR": {"step_size": (f.positive, None), "gamma": _GAMMA},
    "MultiStepLR": {"milestones": (_milestones, None), "gamma": _GAMMA},
    "ExponentialLR": {"gamma": (f.factor, None)},
    "CosineAnnealingWarmRestarts": {"cycle_epochs": (f.positive, None), "lr_min": (f.rate_or_zero, 0.0)},
}


def _mapping(value: Any) -> dict[Any, Any]:
    if not isinstance(value, dict):
        raise Wrong("a mapping, as in {gamma: 0.9}")
    return value


def _init_sparsity(value: Any) -> float | None:
    if value == FROM_PARAM:
        return None
    try:
        return f.share(value)
    except Wrong as wrong:
        raise Wrong(f"{wrong}, or {FROM_PARAM}") from None


def _final_sparsity(value: Any) -> float | tuple[tuple[float, tuple[str, ...]], ...]:
    """A number, or the targets of a map from sparsity to parameters."""
    if not isinstance(value, dict):
        return f.inner_share(value)
    if not value:
        raise Wrong("a sparsity, or a map of sparsities to lists of parameters")
    made: dict[float, tuple[str, ...]] = {}
    for sparsity, params in value.items():
        try:
            key = f.inner_share(sparsity)
        except Wrong as wrong:
            raise Wrong(f"a map of sparsities: {f.shown(sparsity)} is not {wrong}") from None
        made[key] = made.get(key, ()) + f.some_selectors(params)
    return tuple(made.items())


def _score(value: Any) -> str:
    if value not in (None, "magnitude"):
        raise Wrong("magnitude, the only score of pruning here")
    return "magnitude"


def _phased(value: Any) -> bool:
    if value not in (None, False):
        raise Wrong("false; phases in which pruned weights return are not supported")
    return False


def _pruning(entry: Entry) -> None:
    """What a pruning modifier's fields mean together."""
    values, tag = entry.values, entry.tagged.name
    final = values["final_sparsity"]
    if isinstance(final, tuple):
        if values["params"] and ALL_PRUNABLE not in values["params"]:
            raise entry.error("params", "where final_sparsity is a map, the map names the parameters and params is []")
        values["targets"], values["final_sparsity"] = final, None
        if values.get("global_sparsity", tag == "GlobalMagnitudePruningModifier") and len(final) > 1:
            raise entry.error("final_sparsity", "one ranking over all tensors has one sparsity; GMPruningModifier takes several")
    values["params"] = values["params"] or (ALL_PRUNABLE,)
    for sparsity, params in values.get("targets", ((final, values["params"]),)):
        if values["init_sparsity"] is not None and values["init_sparsity"] > sparsity:
            raise entry.error("init_sparsity", f"{values['init_sparsity']:g} is above final_sparsity {sparsity:g}")
        _check_mask(entry, sparsity)
        if ALL in params:
            entry.note(
                "final_sparsity" if "targets" in values else "params",
                f"{ALL} also prunes biases and batch norms; {ALL_PRUNABLE} takes convolution weights",
            )
    if tag == "GMPruningModifier" and values.get("global_sparsity"):
        entry.note("global_sparsity", "GlobalMagnitudePruningModifier is the name of this today")


def _constant(entry: Entry) -> None:
    _lasting(entry)
    if ALL in entry.values["params"]:
        entry.note("params", f"{ALL} also holds biases and batch norms that are zero; {ALL_PRUNABLE} takes convolution weights")


def _check_mask(entry: Entry, final: float) -> None:
    """N of each M weights stay at the end, which is one sparsity; a ramp may lead to it."""
    mask = entry.values.get("mask_type", "unstructured")
    if ":" not in mask:
        return
    keep, out_of = map(int, mask.split(":"))
    if wrong := f.off_pattern(mask, 1 - keep / out_of, final):
        raise entry.error("mask_type", wrong)


def _flag(fixed: bool, why: str) -> Field:
    def check(value: Any) -> bool:
        if value is not None and f.boolean(value) != fixed:
            raise Wrong(f"{f.shown(fixed)}, {why}")
        return fixed

    return Field(check)


_START, _END = Field(f.start_epoch), Field(f.end_epoch)
_RANGE = {"start_epoch": Field(f.start_epoch, True), "end_epoch": Field(f.end_epoch, True)}
_FOREVER = {"start_epoch": _START, "end_epoch": Field(f.never)}
_GROUPS = {"param_groups": Field(f.groups), "constant_logging": f.passed_over(f.boolean)}
_PRUNING = {
    "init_sparsity": Field(_init_sparsity, True),
    "final_sparsity": Field(_final_sparsity, True),
    **_RANGE,
    "update_frequency": Field(f.frequency, True),
    "params": Field(f.selectors, True),
    "leave_enabled": Field(f.boolean),
    "inter_func": Field(f.choice(("linear", "cubic", "inverse_cubic"))),
    "mask_type": Field(f.mask_type),
    "score_type": f.passed_over(_score),
    "phased": f.passed_over(_phased),
}
KINDS: dict[str, Kind] = {
    "EpochRangeModifier": Kind(EpochRangeModifier, _RANGE),
    "SetLearningRateModifier": Kind(SetLearningRateModifier, {"learning_rate": Field(f.rate, True), **_FOREVER, **_GROUPS}),
    "LearningRateFunctionModifier": Kind(
        LearningRateFunctionModifier,
        {
            "lr_func": Field(f.choice(("linear", "cosine", "cyclic_linear")), True),
            "init_lr": Field(f.rate_or_zero, True),
            "final_lr": Field(f.rate_or_zero, True),
            **_RANGE,
            "cycle_epochs": Field(f.positive),
            **_GROUPS,
        },
        span=True,
    ),
    "LearningRateModifier": Kind(
        LearningRateModifier,
        {
            "lr_class": Field(f.choice(_SCHEDULERS), True),
            "lr_kwargs": Field(_mapping, True),
            "init_lr": Field(f.rate, True),
            "start_epoch": Field(f.start_epoch, True),
            "end_epoch": _END,
            "constant_logging": _GROUPS["constant_logging"],
        },
        finish=_scheduler,
    ),
    "SetWeightDecayModifier": Kind(SetWeightDecayModifier, {"weight_decay": Field(f.not_negative, True), **_FOREVER, **_GROUPS}),
    "TrainableParamsModifier": Kind(
        TrainableParamsModifier,
        {
            "params": Field(f.some_selectors, True),
            "trainable": Field(f.boolean, True),
            "params_strict": Field(f.boolean),
            "start_epoch": _START,
            "end_epoch": _END,
        },
        finish=_trainable,
    ),
    "ConstantPruningModifier": Kind(
        ConstantPruningModifier,
        {"params": Field(f.some_selectors, True), "start_epoch": _START, "end_epoch": _END, "update_frequency": f.passed_over()},
        finish=_constant,
    ),
    "GMPruningModifier": Kind(GMPruningModifier, {**_PRUNING, "global_sparsity": Field(f.boolean)}, True, _pruning),
    "MagnitudePruningModifier": Kind(
        MagnitudePruningModifier,
        {**_PRUNING, "global_sparsity": _flag(False, "as it prunes layer by layer; GlobalMagnitudePruningModifier ranks all")},
        True,
        _pruning,
    ),
    "GlobalMagnitudePruningModifier": Kind(
        GlobalMagnitudePruningModifier,
        {**_PRUNING, "global_sparsity": _flag(True, "as it ranks all layers; MagnitudePruningModifier goes layer by layer")},
        True,
        _pruning,
    ),
    "QuantizationModifier": Kind(QuantizationModifier, QUANTIZATION, finish=quantization),
    "DistillationModifier": Kind(
        DistillationModifier,
        {
            "hardness": Field(f.share),
            "temperature": Field(f.positive),
            "start_epoch": _START,
            "end_epoch": _END,
            "distill_output_keys": f.passed_over(note="all outputs of the head are distilled, whatever is listed"),
            "teacher_input_keys": f.passed_over(note="the teacher sees the student's images, whatever is listed"),
        },
        finish=_lasting,
    ),
}
