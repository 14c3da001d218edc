"""The fields of a QuantizationModifier, of SparseML's legacy and of its newer class, onto the one policy that this project has.

The policy: weights int8, symmetric, per output channel; activations 8 bits per tensor; batch norms folded; what decodes boxes in float. A field that asks
for another way to the same bits is accepted and told in a note; one that asks for something else is refused.
"""

from __future__ import annotations

from typing import Any

from engine.recipe import fields as f
from engine.recipe.fields import Entry, Field, Wrong
from utils.errors import did_you_mean

_POLICY = "which activations are 8-bit is decided by the network and the runtime, not by this"
_WEIGHTS = "weights are int8, symmetric, with a scale for each output channel"
_EVERYTHING = ("", "model")
# Kinds of modules that hold no weights of a convolution, so that naming them leaves no convolution in float.
WITHOUT_WEIGHTS = (
    *("SiLU", "Hardswish", "Hardsigmoid", "LeakyReLU", "ReLU", "ReLU6", "Mish", "Sigmoid", "Softmax", "Identity", "Dropout", "Flatten"),
    *("BatchNorm2d", "MaxPool2d", "AvgPool2d", "AdaptiveAvgPool2d", "Upsample", "Concat", "FloatFunctional", "Add", "AddInput"),
    *("Embedding", "Linear"),
)
_WITH_WEIGHTS = (
    "Conv",
    "Conv2d",
    "DWConv",
    "C3",
    "C3TR",
    "Bottleneck",
    "BottleneckCSP",
    "SPP",
    "SPPF",
    "Focus",
    "Detect",
    "ConvTranspose2d",
)
_SCHEME_PARTS = ("input_activations", "weights", "output_activations")
_PART_KEYS = ("num_bits", "symmetric", "strategy", "kwargs")


def _bits(value: Any) -> int:
    if value != 8 or isinstance(value, bool):
        raise Wrong("8, the only number of bits here")
    return 8


def _steps(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise Wrong("a number of batches")
    return value


def _scheme(value: Any) -> dict[str, Any]:
    """A scheme as a mapping; `tensorrt` is symmetric inputs, the other names are SparseML's defaults."""
    if value in (None, "default", "deepsparse"):
        return {}
    if value == "tensorrt":
        return {"input_activations": {"num_bits": 8, "symmetric": True}}
    if not isinstance(value, dict):
        raise Wrong(f"default, deepsparse, tensorrt, or a mapping of {', '.join(_SCHEME_PARTS)}")
    for name, part in value.items():
        if name not in _SCHEME_PARTS:
            raise Wrong(f"a mapping of {', '.join(_SCHEME_PARTS)}: {f.shown(name)}{did_you_mean(str(name), _SCHEME_PARTS)}")
        if part is None and name != "output_activations":
            raise Wrong(f"possible here: {name} is null, and inputs and weights are quantised together")
        _check_part(name, part)
    return value


def _check_part(name: str, part: Any) -> None:
    if part is None:
        return
    if not isinstance(part, dict):
        raise Wrong(f"a scheme: {name} is null or a mapping of {', '.join(_PART_KEYS)}")
    for key, value in part.items():
        if key not in _PART_KEYS:
            raise Wrong(f"a scheme: {name} takes {', '.join(_PART_KEYS)}, not {f.shown(key)}")
        right = {"num_bits": "8", "symmetric": "true or false", "strategy": "tensor or channel"}.get(key, "a mapping")
        good = {
            "num_bits": value == 8 and not isinstance(value, bool),
            "symmetric": isinstance(value, bool),
            "strategy": value in ("tensor", "channel"),
            "kwargs": value is None or isinstance(value, dict),
        }
        if not good[key]:
            raise Wrong(f"a scheme of this project: {key} of {name} is {f.shown(value)}, and must be {right}")


def _overrides(value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    if not isinstance(value, dict):
        raise Wrong("a mapping of module paths or kinds to schemes")
    for name, scheme in value.items():
        if scheme is None:
            raise Wrong(f"possible here: {name} is null; list it under ignore to leave it in float")
        _scheme(scheme)
    return tuple(map(str, value))


# Fields of the legacy class, of the newer one, and those that both have.
QUANTIZATION: dict[str, Field] = {
    "start_epoch": Field(f.start_epoch),
    "end_epoch": Field(f.never),
    "disable_quantization_observer_epoch": Field(f.optional(f.an_epoch), name="observer_stop"),
    "freeze_bn_stats_epoch": Field(f.optional(f.an_epoch), name="norm_freeze"),
    "num_calibration_steps": Field(f.optional(_steps), name="calibration_steps"),
    "model_fuse_fn_name": f.passed_over(note="batch norms are always folded into their convolutions"),
    "model_fuse_fn_kwargs": f.passed_over(note="batch norms are always folded into their convolutions"),
    "submodules": Field(f.names, name="modules"),
    "exclude_module_types": Field(f.names),
    "custom_quantizable_module_types": f.passed_over(f.names, _POLICY),
    "tensorrt": Field(f.boolean, name="symmetric"),
    "reduce_range": Field(f.boolean),
    "activation_bits": f.passed_over(_bits),
    "weight_bits": f.passed_over(_bits),
    "quantize_embeddings": f.passed_over(f.boolean),
    "quantize_embedding_activations": f.passed_over(f.boolean),
    "quantize_linear_activations": f.passed_over(f.boolean),
    "quantize_conv_activations": f.passed_over(f.boolean, _POLICY, usual=(True,)),
    "exclude_batchnorm": f.passed_over(f.boolean, "batch norms are always folded into their convolutions", usual=(True,)),
    "activation_qconfig_kwargs": f.passed_over(note="the observers of activations are this project's own"),
    "weight_qconfig_kwargs": f.passed_over(note=_WEIGHTS),
    "scheme": Field(_scheme),
    "scheme_overrides": Field(_overrides),
    "ignore": Field(f.names),
    "strict": f.passed_over(f.boolean, "paths under ignore and submodules must exist all the same", usual=(True,)),
}


def quantization(entry: Entry) -> None:
    """What the fields of a QuantizationModifier mean together, put into the names of the dataclass."""
    values = entry.values
    start = max(values.get("start_epoch", -1.0), 0.0)
    for name in ("disable_quantization_observer_epoch", "freeze_bn_stats_epoch"):
        epoch = values.get(QUANTIZATION[name].name)
        if epoch is not None and epoch < start:
            raise entry.error(name, f"{epoch:g} is before start_epoch {start:g}")
    modules = values.pop("modules", ())
    values["modules"] = () if any(m in _EVERYTHING for m in modules) else modules
    values["ignore"] = (*_float_paths(entry, "ignore"), *_float_paths(entry, "exclude_module_types"))
    if values.get("reduce_range"):
        entry.note("reduce_range", "weights get 7 bits and activations keep 8, which saturates as little")
    if values.get("calibration_steps"):
        entry.note(
            "num_calibration_steps",
            "training finds the ranges from its own batches; export.py's --calibration-images is for calibration alone",
        )
    _apply_scheme(entry, values.pop("scheme", {}))
    if values.pop("scheme_overrides", ()):
        entry.note("scheme_overrides", f"{_WEIGHTS}; {_POLICY}")


def _float_paths(entry: Entry, name: str) -> tuple[str, ...]:
    """The module paths of a list of paths and kinds. Kinds without weights are noted; those with weights are refused, as only paths choose here."""
    paths, kinds = [], []
    for item in entry.values.pop(name, ()):
        if not item:
            raise entry.error(name, "'' would be the whole network; name the paths of those that stay in float, as in model.24")
        if item in WITHOUT_WEIGHTS:
            kinds.append(item)
        elif "." in item or item in _EVERYTHING:
            paths.append(item)
        elif item in _WITH_WEIGHTS:
            raise entry.error(name, f"{item} is a kind of module; name the paths of those that stay in float, as in model.24")
        else:
            near = did_you_mean(item, (*WITHOUT_WEIGHTS, *_WITH_WEIGHTS))
            raise entry.error(name, f"{item!r:.60} is neither a module's path, as in model.24, nor a kind of module{near}")
    if kinds:
        entry.note(name, f"{', '.join(kinds)}: {_POLICY}")
    return tuple(paths)


def _apply_scheme(entry: Entry, scheme: dict[str, Any]) -> None:
    inputs, weights = scheme.get("input_activations") or {}, scheme.get("weights")
    if inputs.get("symmetric"):
        entry.values["symmetric"] = True
    if inputs.get("strategy") == "channel":
        entry.note("scheme", "activations have one scale per tensor")
    if weights is not None and not (weights.get("symmetric") and weights.get("strategy") == "channel"):
        entry.note("scheme", _WEIGHTS)
    if scheme.get("output_activations"):
        entry.note("scheme", _POLICY)
