"""A pruning run in words: the decision in one sentence, what to make of it, and the names of the stages; from `report.json` alone."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

Report = Mapping[str, Any]

STAGES = {
    "before": ("before", "the network as it was."),
    "gamma_zero": ("gamma zero", "the scales of the removed channels set to 0, nothing else changed."),
    "masked": ("masked", "full width, what removed channels still carried folded into their readers, their activations silenced."),
    "pruned": ("pruned", "the small network as it was written, without any training."),
    "recalibrated": ("recalibrated", "the small network with the statistics of its batch norms estimated anew on training images."),
}
_SHARES = {1 / 4: "a quarter", 1 / 3: "a third", 1 / 2: "half", 2 / 3: "two thirds", 3 / 4: "three quarters"}
_BLIND = 0.01  # a network below this mAP@.5 finds next to nothing


def final_stage(report: Report) -> str | None:
    """The stage that was written: `recalibrated` where there is one, else `pruned`; None where either it or `before` is missing."""
    stage = next((s for s in ("recalibrated", "pruned") if s in report), None)
    return stage if "before" in report else None


def latency_size(report: Report) -> str | None:
    """The key of `latency_ms` to speak of: the measured size, else any that both ends have."""
    stage = final_stage(report)
    ends = [report.get(s, {}).get("latency_ms") or {} for s in ("before", stage or "pruned")]
    shared = [size for size in ends[0] if size in ends[1]]
    return next((s for s in (str(report.get("imgsz")), *shared) if s in shared), None)


def change(old: float, new: float, absolute: bool = False) -> str:
    """How `new` differs from `old`: `−49.8%`, or with `absolute` `−0.0123`."""
    if absolute:
        text = f"{new - old:+.4f}"
        return "±0" if float(text) == 0 else text.replace("-", "−")
    if not old:
        return "–"
    text = f"{new / old - 1:+.1%}"
    return "±0%" if float(text[:-1]) == 0 else text.replace("-", "−")


def tone(old: float, new: float, higher: bool) -> str | None:
    """`good` or `bad` where the figure moved by more than a thousandth; `higher`: more is better."""
    if abs(new - old) <= 1e-3 * abs(old):
        return None
    return "good" if (new > old) == higher else "bad"


def decision(report: Report) -> str:
    """What was cut, what is left of the accuracy, and how much faster it is."""
    stage = final_stage(report)
    if stage is None:
        return "This report holds no figures of before and after."
    before, after = report["before"], report[stage]
    parts = [*_bottlenecks(report.get("removed") or ()), _cut(report, before, after)]
    if "map50" in before and "map50" in after:
        when = "after recalibration, before any fine-tuning" if stage == "recalibrated" else "before any fine-tuning"
        parts.append(f"mAP@.5 is {after['map50']:.3f} of {before['map50']:.3f} {when}")
    if latency_size(report):
        parts.append(_speed(report, before["latency_ms"], after["latency_ms"]))
    text = "; ".join(parts) + "."
    return _whole(text[0].upper() + text[1:])


def _bottlenecks(names: Sequence[str]) -> list[str]:
    """What a layer pruning removed."""
    if not names:
        return []
    count = "one bottleneck is" if len(names) == 1 else f"{len(names)} bottlenecks are"
    return [f"{count} gone ({', '.join(names)})"]


def _whole(text: str) -> str:
    """`text` in which no line ends between a number and its unit."""
    return re.sub(r"(?<=\d) (?=px|GFLOPs|M parameters|times)", "\u00a0", text)


def _cut(report: Report, before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    for key, unit, scale, form in (("flops", "FLOPs", 1e9, "GFLOPs"), ("params", "parameters", 1e6, "M parameters")):
        if before.get(key) and after.get(key):
            share = 1 - after[key] / before[key]
            at = f" at {report['imgsz']} px" if key == "flops" and "imgsz" in report else ""
            figures = f"({_short(before[key] / scale)} → {_short(after[key] / scale)} {form}{at})"
            if share < 5e-4:
                return f"{'less than 0.1% of the ' + unit + ' are gone' if report.get('removed') else 'nothing was removed'} {figures}"
            return (
                f"{_share_words(share)} of the {unit} {'is' if _share_words(share) in ('a quarter', 'a third') else 'are'} gone {figures}"
            )
    return "the network was pruned"


def _share_words(share: float) -> str:
    return next(
        (words for value, words in _SHARES.items() if abs(share - value) <= 0.012), f"{share:.0%}" if share >= 0.095 else f"{share:.1%}"
    )


def _short(value: float) -> str:
    """Three significant digits, without an exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _speed(report: Report, before: Mapping[str, float], after: Mapping[str, float]) -> str:
    """`1.42 times as fast at 320 px, 1.61 times at 640 px`; says so where it is no faster."""
    first = latency_size(report)
    sizes = [first, *(s for s in before if s in after and s != first)]
    times = [before[size] / after[size] for size in sizes]
    if max(times) < 1.02:
        return "no faster on this machine (" + ", ".join(f"{t:.2f} times as fast at {s} px" for t, s in zip(times, sizes)) + ")"
    return f"{times[0]:.2f} times as fast at {first} px" + "".join(f", {t:.2f} times at {s} px" for t, s in zip(times[1:], sizes[1:]))


def verdict(report: Report) -> tuple[str, str]:
    """(`good`, `warn` or `bad`; what to do about it), the second empty where there is nothing to judge by."""
    stage = final_stage(report)
    if stage is None or "map50" not in report["before"] or "map50" not in report[stage]:
        return "warn", ""
    old, new = report["before"]["map50"], report[stage]["map50"]
    kept = f"{new / old:.0%}" if old else "0%"
    if old < _BLIND:
        return (
            "bad",
            "The network found next to nothing before the cut either, so these figures say nothing about its accuracy. Train it first.",
        )
    if new >= old - 0.01:
        return "good", "Accuracy survived the cut: it can be used as it is. Fine-tuning may still improve it."
    if new >= 0.8 * old:
        return "warn", f"{kept} of the mAP@.5 is left. Fine-tune before you use it."
    if new >= 0.2 * old:
        return "bad", f"Much was lost: {kept} of the mAP@.5 is left. It needs fine-tuning before it is of use."
    return "bad", (
        f"Accuracy collapsed: {kept} of the mAP@.5 is left. As it is, it is of no use; fine-tuning has to bring it back. "
        "Sparser training before the cut, or a smaller share, loses less."
    )
