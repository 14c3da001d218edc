"""Which parameters of a network the selectors of a recipe's `params` name."""

from __future__ import annotations

import re
from collections.abc import Container, Sequence
from typing import TYPE_CHECKING

from engine.recipe.modifiers import ALL, ALL_PRUNABLE
from utils.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from models.network import Network

PATTERN = "re:"
_LAYER = re.compile(r"model\.\d+\.")
_SHOWN = 3  # misses that a message spells out


def prunable(network: Network) -> list[str]:
    """Names of every convolution weight in the network's order, the stem and the outputs of the head included."""
    return [name for name, p in network.named_parameters() if name.endswith(".weight") and p.dim() == 4]


def select(selectors: Sequence[str], network: Network, where: str, strict: bool = True, field: str = "params") -> list[str]:
    """Names of the parameters that any of `selectors` matches, in the network's order.

    A selector is `__ALL_PRUNABLE__`, `__ALL__` (in any case), a parameter's exact name, or `re:PATTERN`, which must match from the start of the
    name on (`re.match`). With `strict` each must match a parameter: `InputError` names `where`, the `field` and the misses alone, with near names.
    """
    names = [name for name, _ in network.named_parameters()]
    chosen: set[str] = set()
    misses = []
    for selector in selectors:
        found = _matches(selector, names, network, f"{where}: {field}")
        chosen.update(found)
        if not found:
            misses.append(selector)
    if strict and misses:
        told = " and ".join(f"{_quoted(miss)}{_near(miss, names)}" for miss in misses[:_SHOWN])
        more = f" (and {len(misses) - _SHOWN} more like this)" if len(misses) > _SHOWN else ""
        raise InputError(f"{where}: {field}: no parameter of this model is matched by {told}{more}")
    return [name for name in names if name in chosen]


def counted(names: Sequence[str]) -> str:
    """Parameters for a message: the one, or how many and the first of them."""
    return names[0] if len(names) == 1 else f"{len(names)} parameters ({names[0]} first)"


def strays(selectors: Sequence[str], network: Network, claimed: Container[str], where: str) -> str:
    """What patterns of a pruning modifier chose besides weights, for a warning: biases, and what batch norms scale by. Empty: nothing of `claimed`.

    Who names such a parameter in full, or takes `__ALL__`, means it.
    """
    vectors = {name for name, p in network.named_parameters() if p.dim() < 2 and name in claimed} - set(selectors)
    patterns = [selector for selector in selectors if selector.startswith(PATTERN)]
    if not vectors or any(selector.upper() == ALL for selector in selectors):
        return ""
    caught = {pattern: set(select([pattern], network, where, strict=False)) for pattern in patterns}
    loose = [pattern for pattern in patterns if caught[pattern] & vectors]
    first = next(name for name in select(loose, network, where) if name in vectors)
    others = f" and {len(loose) - 1} more" if len(loose) > 1 else ""
    better = f"{loose[0].removesuffix('$')}.*conv\\.weight"
    hint = f", as in {better}" if select([better], network, where, strict=False) else ""
    return (
        f"{_quoted(loose[0])}{others} also chose {counted([first, *(vectors - {first})])}, of batch norms or biases, which are better left alone; let "
        f"patterns end with conv\\.weight{hint}"
    )


def _matches(selector: str, names: list[str], network: Network, where: str) -> list[str]:
    if selector.upper() == ALL:
        return names
    if selector.upper() == ALL_PRUNABLE:
        return prunable(network)
    if selector.startswith(PATTERN):
        try:
            pattern = re.compile(selector[len(PATTERN) :])
        except (re.error, OverflowError, RecursionError) as error:
            raise InputError(f"{where}: {_quoted(selector)} is no regular expression ({error})") from None
        return [name for name in names if pattern.match(name)]
    return [selector] if selector in names else []


def _quoted(selector: str) -> str:
    return repr(selector).replace("\\\\", "\\")  # a pattern as it was written


def _near(selector: str, names: list[str]) -> str:
    """What was probably meant: parameters below a module of that name first, then names that look alike."""
    if selector.startswith(PATTERN):
        pattern = re.compile(selector[len(PATTERN) :])
        within = [name for name in names if pattern.search(name)]
        if within:
            return f" (a pattern must match from the start of a name; re:.*{pattern.pattern} would match {len(within)}, as {within[0]})"
        return _alike(re.sub(r"\\(.)|[\^$*+?()\[\]{}|]", r"\1", pattern.pattern), names)
    below = [name for name in names if name.startswith(selector.rstrip(".") + ".")]
    below.sort(key=lambda name: not name.endswith("conv.weight"))
    return f"; did you mean {', '.join(below[:3])}?" if below else _alike(selector, names)


def _alike(name: str, names: list[str]) -> str:
    """Names that look like `name`: those of the same layer, `model.N.`, where it has any."""
    layer = _LAYER.match(name)
    near = did_you_mean(name, [n for n in names if n.startswith(layer[0])]) if layer else ""
    return near or did_you_mean(name, names)
