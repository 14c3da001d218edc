"""report.html says what report.json says, escapes what users name, needs no network, and reads in light, dark and print."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from engine.html_report import Command, HtmlReport, html, next_commands, write_html
from engine.reporting import per_class
from engine.samples import Sample, sample_pairs
from engine.verdict import change, decision, verdict
from models.blocks import heads
from models.checkpoint import Model, load_model, save_model
from models.network import init_detect_biases
from tests import browser
from tests.helpers import ROOT, alive, small, stock, write_dataset
from tests.test_scripts import call
from utils.html import STYLE, el, markup, page, picture, table
from utils.labels import scan_labels
from utils.metrics import ap_per_class

VOID = {"meta", "link", "img", "br", "hr"}
HOSTILE = ("<b>bold</b>", "a & b", "\"quoted\" 'name'", "</table><script>alert(1)</script>")


class Page(HTMLParser):
    """What a page holds; fails on tags that do not nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.tables: list[list[list[str]]] = []
        self.values: list[list[list[float | None]]] = []  # like `tables`: the exact value of each cell's figure
        self.words: list[str] = []
        self.data: list[float] = []  # every exact value on the page
        self.headings: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
            self.values.append([])
        elif tag == "tr":
            self.tables[-1].append([])
            self.values[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self.values[-1][-1].append(None)
        elif tag == "data":
            self.data.append(float(dict(attrs)["value"]))
            if "tr" in self.open:
                self.values[-1][-1][-1] = self.data[-1]
        elif re.fullmatch("h[1-6]", tag):
            self.headings.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)
        if "tr" in self.open:
            self.tables[-1][-1][-1] += data

    def of(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def text(self) -> str:
        return "".join(self.words)


def stage(map50: float, params: int, flops: int, ms: float, classes: tuple[float, ...]) -> dict:
    return {
        "images": 12, "instances": 34, "precision": map50 - 0.01, "recall": map50 - 0.02, "map50": map50, "map": map50 / 2,
        "params": params, "flops": flops, "size_mb": params / 4e5, "latency_ms": {"96": ms, "640": 9 * ms},
        "per_class": [
            {"name": name, "labels": 5 + i, "precision": 0.5, "recall": 0.4, "map50": ap, "map": ap / 2}
            for i, (name, ap) in enumerate(zip(HOSTILE, classes))
        ],
    }  # fmt: skip


def report(**changes: object) -> dict:
    """A report.json of all stages, with names that are markup."""
    layers = [{"name": f"model.{i}", "before": 16 * i + 16, "after": 8 * i + 8, "kept": "" if i else "head <output>"} for i in range(5)]
    return {
        "weights": "/data/<script>x</script>/last.pt", "data": "my & data.yaml", "pair": ["a.cfg", "a.pt"], "imgsz": 96, "criterion": "gamma",
        "normalize": "none", "exclude": ["model.9", "<i>"], "policy": {"percent": 0.5, "divisor": 8, "plan": None},
        "selection": {"threshold": 0.3125, "safe_percent": 0.6, "planned": 50, "pool": 100},
        "before": stage(0.918, 1_777_447, 4_200_000_000, 14.2, (0.9, 0.8, 0.95, 0.7)),
        "gamma_zero": stage(0.9, 1_777_447, 4_200_000_000, 14.2, (0.9, 0.8, 0.95, 0.7)),
        "pruned": stage(0.6, 800_123, 2_100_000_000, 10.0, (0.2, 0.7, 0.1, 0.72)),
        "recalibrated": stage(0.917, 800_123, 2_100_000_000, 10.0, (0.9, 0.4, 0.94, 0.75)),
        "oracle": {"difference": 3.5e-6, "bound": 1.25e-3, "changed": 5.5, "images": 8}, "layers": layers,
    } | changes  # fmt: skip


def content(**changes: object) -> HtmlReport:
    rng = np.random.default_rng(0)
    before = {f"model.{i}": rng.random(16 * i + 16) for i in range(5)}
    after = {name: np.sort(values)[len(values) // 2 :] for name, values in before.items()}
    image = rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)
    samples = [Sample(f"{i} <i>.jpg", image, image, "cat ×1", "nothing") for i in range(4)]
    return HtmlReport(
        "run <1>", report(**changes), (*HOSTILE, "unseen"), before, after, samples, [Command("python a.py '<x>' && b", "Do & go")]
    )


@pytest.fixture(scope="module")
def full() -> Page:
    return Page(html(content()))


def find(page: Page, corner: str) -> tuple[list[list[str]], list[list[float | None]]]:
    """The table whose header begins with `corner`."""
    return next((t, v) for t, v in zip(page.tables, page.values) if t[0][0] == corner)


def test_every_stage_and_figure_of_the_report_stands_in_the_table(full: Page) -> None:
    text, values = find(full, "")
    assert text[0] == ["", "before", "gamma zero", "pruned", "recalibrated"]
    stages = [report()[s] for s in ("before", "gamma_zero", "pruned", "recalibrated")]
    wanted = {
        "mAP@.5": "map50", "mAP@.5:.95": "map", "Precision": "precision", "Recall": "recall", "GFLOPs": "flops", "Parameters": "params",
        "File, MB": "size_mb", "ms at 96 px": "96", "ms at 640 px": "640",
    }  # fmt: skip
    assert [row[0] for row in text[1:]] == list(wanted)
    for row, exact in zip(text[1:], values[1:]):
        key = wanted[row[0]]
        assert exact[1:] == [s[key] if key in s else s["latency_ms"][key] for s in stages], row[0]
    by_name = {row[0]: row for row in text[1:]}
    assert by_name["Parameters"][3] == "800,123−55.0%" and by_name["GFLOPs"][4] == "2.1−50.0%"
    assert by_name["mAP@.5"][3] == "0.6000−0.3180" and by_name["ms at 96 px"][1] == "14.20"


def test_the_decision_names_the_stage_that_was_written(full: Page) -> None:
    assert (
        "Half of the FLOPs are gone (4.2 → 2.1 GFLOPs at 96 px); mAP@.5 is 0.917 of 0.918 after recalibration, before any fine-tuning; "
        "1.42 times as fast at 96 px, 1.42 times at 640 px."
    ) in full.text.replace("\u00a0", " ")


def said(map50: float, after: float = 0.5, ms: float = 10.0, **changes: object) -> tuple[str, str]:
    """The decision and the verdict's tone when pruning leaves this mAP@.5 of 0.8, this share of the FLOPs, and these ms of 20."""
    before, pruned = (stage(m, 1000, f, t, ()) for m, f, t in ((0.8, 10**9, 20), (map50, int(after * 10**9), ms)))
    r = {"imgsz": 96, "before": before, "pruned": pruned} | changes
    return decision(r).replace("\u00a0", " "), verdict(r)[0]


@pytest.mark.parametrize(("arguments", "words", "tone"), [
    ((0.795,), "mAP@.5 is 0.795 of 0.800 before any fine-tuning", "good"), ((0.7,), "0.700 of 0.800", "warn"), ((0.3,), "0.300", "bad"),
    ((0.001,), "0.001 of 0.800", "bad"), ((0.8, 0.66), "A third of the FLOPs is gone (1 → 0.66 GFLOPs at 96 px)", "good"),
    ((0.8, 0.53), "47% of the FLOPs are gone", "good"), ((0.8, 0.951), "4.9% of the FLOPs are gone", "good"),
    ((0.8, 1.0), "Nothing was removed", "good"), ((0.8, 0.5, 20.1), "no faster on this machine (1.00 times as fast at 96 px", "good"),
])  # fmt: skip
def test_the_decision_is_honest(arguments: tuple, words: str, tone: str) -> None:
    sentence, got = said(*arguments)
    assert words in sentence and got == tone


def test_a_network_that_found_nothing_before_proves_nothing() -> None:
    empty = stage(0.001, 1000, 10**9, 10, ())
    tone, advice = verdict({"before": empty, "pruned": empty})
    assert tone == "bad" and "Train it first" in advice


def test_changes() -> None:
    assert [change(0.5, 0.25), change(100, 100.01), change(0, 1), change(2, 3)] == ["−50.0%", "±0%", "–", "+50.0%"]
    assert [change(0.5, 0.25, True), change(0.5, 0.50001, True)] == ["−0.2500", "±0"]


def test_classes_come_with_the_largest_loss_first(full: Page) -> None:
    text, values = find(full, "Class")
    old, new = ({row["name"]: row for row in report()[s]["per_class"]} for s in ("before", "recalibrated"))
    assert [row[0] for row in text[1:]] == [HOSTILE[1], HOSTILE[2], HOSTILE[0], HOSTILE[3]]
    for (name, *_), exact in zip(text[1:], values[1:]):
        a, b = old[name], new[name]
        assert exact[1:4] + exact[5:7] == [a["labels"], a["map50"], b["map50"], a["map"], b["map"]]
    assert "2 of 4 classes lost, 1 gained. 1 more class has no object" in full.text


def test_widths_and_reasons(full: Page) -> None:
    text, values = find(full, "Layer")
    for layer, row, exact in zip(report()["layers"], text[1:], values[1:]):
        assert (row[0], exact[1], exact[2], row[-1]) == (layer["name"], layer["before"], layer["after"], layer["kept"])
    assert "120 of 240 filters of 5 convolutions are left" in full.text
    bars = [float(a["style"][6:-1]) for a in full.of("i") if a.get("style", "").startswith("width:")]
    widths = [w for layer in report()["layers"] for w in (layer["before"], layer["after"])]
    assert bars[-len(widths) :] == pytest.approx([100 * w / 80 for w in widths], abs=0.01)
    assert len(full.of("svg")) == 2 + 5 and all(a["aria-label"] and a["role"] == "img" for a in full.of("svg"))


def test_the_check_and_every_option(full: Page) -> None:
    oracle = report()["oracle"]
    assert all(value in full.data for value in oracle.values()) and "3.50e-06" in full.text
    text, _ = find(full, "Option")
    shown = {row[0]: row[1] for row in text[1:]}
    for key in ("weights", "data", "imgsz", "criterion", "normalize", "policy.percent", "policy.plan", "selection.pool", "exclude"):
        assert any(name.startswith(key) for name in shown), key
    assert next(v for k, v in shown.items() if k.startswith("weights")) == report()["weights"]
    assert next(v for k, v in shown.items() if k.startswith("exclude")) == "model.9<i>"


def test_a_failed_check_is_not_called_equal() -> None:
    text = Page(html(content(oracle={"difference": 1.0, "bound": 0.1, "images": 8}))).text
    assert "Not equal!" in text and " Equal." not in text


def test_what_users_name_is_text(full: Page) -> None:
    assert not full.of("script") and "Pruning report: run <1>" in full.text
    for name in (*HOSTILE, report()["weights"], "python a.py '<x>' && b", "Do & go", "head <output>", "0 <i>.jpg"):
        assert name in full.text, name
    assert [a["alt"] for a in full.of("img")][:2] == [
        "0 <i>.jpg, detections before pruning: cat ×1",
        "0 <i>.jpg, detections after pruning: nothing",
    ]


def test_a_page_needs_neither_network_nor_scripts() -> None:
    text = html(content())
    parsed = Page(text)
    for _, attributes in parsed.tags:
        for name in ("src", "href"):
            assert attributes.get(name, "data:").startswith(("data:", "#"))
        assert not any(name.startswith("on") for name in attributes)
    assert {tag for tag, _ in parsed.tags} & {"script", "iframe", "object", "embed", "form", "base"} == set()
    style = STYLE.read_text(encoding="utf-8")
    assert "http" not in style and "url(" not in style and "@import" not in style
    assert "http" not in text


def test_a_page_is_accessible(full: Page) -> None:
    assert full.headings[0] == "h1" and full.headings.count("h1") == 1
    assert all(int(b[1]) <= int(a[1]) + 1 for a, b in zip(full.headings, full.headings[1:]))
    assert (
        full.of("html")[0]["lang"] == "en"
        and "width=device-width" in {a["name"]: a["content"] for a in full.of("meta") if "name" in a}["viewport"]
    )
    assert all(a["alt"] and int(a["width"]) and int(a["height"]) for a in full.of("img"))
    assert {a["scope"] for a in full.of("th")} == {"col", "row"} and len(full.of("caption")) == len(full.of("table"))
    anchors = {a["href"][1:] for a in full.of("a")}
    assert anchors and anchors == {a["id"] for a in full.of("h2")}


def test_text_stands_out_from_its_ground_in_light_dark_and_print() -> None:
    """WCAG 2.1: a contrast of at least 4.5."""
    blocks = re.findall(r":root \{(.*?)\}", STYLE.read_text(encoding="utf-8"), re.DOTALL)
    schemes = [dict(re.findall(r"--([\w-]+): #(\w{6})", block)) for block in blocks]
    assert len(schemes) == 3 and schemes[0] == schemes[2] != schemes[1] and all(s.keys() == schemes[0].keys() for s in schemes)

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        return sum(w * (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4) for w, c in zip((0.2126, 0.7152, 0.0722), parts))

    for scheme in schemes:
        inks = [(ink, ground) for ink in ("ink", "soft", "after", "good", "bad", "warn", "mark") for ground in ("ground", "card")]
        for ink, ground in (*inks, *((tone, f"{tone}-card") for tone in ("good", "bad", "warn"))):
            low, high = sorted((luminance(scheme[ink]), luminance(scheme[ground])))
            assert (high + 0.05) / (low + 0.05) >= 4.5, (ink, ground)


@pytest.mark.parametrize("keys", [
    (), ("before",), ("before", "pruned"), ("weights", "pair", "before", "pruned", "layers"), ("oracle",), ("before", "pruned", "selection"),
])  # fmt: skip
def test_reports_without_optional_parts(keys: tuple[str, ...]) -> None:
    """Older reports, and those of scripts that prune something else than channels."""
    whole = report()
    for s in ("before", "pruned"):
        whole[s] = {k: v for k, v in whole[s].items() if k in ("map50", "map", "params", "flops")}
    parsed = Page(html(HtmlReport("some", {k: whole[k] for k in keys})))
    assert ("Channels by layer" in parsed.text) == ("layers" in keys) and "mAP by class" not in parsed.text
    assert ("How it was checked" in parsed.text) == ("oracle" in keys)
    assert ("are gone" in parsed.text) == ("pruned" in keys)


def test_layers_that_are_gone_and_criteria_that_are_not_gamma() -> None:
    layers = [{"name": "model.2.m.0.cv1", "before": 16, "after": 0, "kept": ""}]
    parsed = Page(html(content(layers=layers, criterion="l1")))
    text, _ = find(parsed, "Layer")
    assert text[1][:4] == ["model.2.m.0.cv1", "16", "0", "0%"] and "They were not what the channels were chosen by" in parsed.text
    assert "largest score that was marked:" not in parsed.text


def test_a_large_network_and_worst_pictures_stay_below_two_megabytes(tmp_path: Path) -> None:
    """YOLOv5l at 80 classes, and noise, which no JPEG makes small."""
    rng = np.random.default_rng(0)
    blocks = stock("l", 80)
    convs = [b for b in blocks if b.kind == "convolutional"]
    layers = [{"name": b.name, "before": b.channels, "after": b.channels // 2, "kept": ""} for b in convs]
    gammas = {b.name: rng.random(b.channels) for b in blocks if b.has_gamma}
    classes = [
        {"name": f"class {i}", "labels": i + 1, "precision": 0.1, "recall": 0.2, "map50": 1 / (i + 1), "map": 0.2} for i in range(80)
    ]
    stages = {s: stage(0.5, 10**7, 10**11, 100, ()) | {"per_class": classes} for s in ("before", "masked", "pruned", "recalibrated")}
    noise = [Sample(str(i), *rng.integers(0, 256, (2, 640, 640, 3), dtype=np.uint8)) for i in range(4)]
    path = tmp_path / "report.html"
    write_html(path, HtmlReport("large", report(layers=layers, **stages), tuple(c["name"] for c in classes), gammas, gammas, noise))
    assert path.stat().st_size < 2e6
    parsed = Page(path.read_text(encoding="utf-8"))
    assert len(find(parsed, "Layer")[0]) == len(convs) + 1 > 100
    assert len(find(parsed, "Class")[0]) == 81 and list(tmp_path.iterdir()) == [path]


def test_commands_survive_a_shell() -> None:
    import shlex

    commands = next_commands("my run/a'b.pt", "my run/a.cfg", "my data.yaml", 320, "teacher.pt")
    words = [shlex.split(c.text) for c in commands]
    assert [w[1] for w in words] == ["finetune_pruned.py", "val.py", "prune_detect.py", "export.py"]
    assert all(w[w.index("--weights") + 1] == "my run/a'b.pt" and w[w.index("--img") + 1] == "320" for w in words)
    assert words[0][words[0].index("--t_weight") + 1] == "teacher.pt" and words[1][words[1].index("--data") + 1] == "my data.yaml"


def test_elements() -> None:
    assert el("p", "a < b", el("b", "!"), class_="note", hidden=True, title=None) == '<p class="note" hidden>a &lt; b<b>!</b></p>'
    assert el("img", alt='"') == '<img alt="&quot;">' and markup("a", ["b", None, ("<",)]) == "ab&lt;"
    assert markup("caf\udce9").encode("utf-8") == b"caf\\udce9", "a path may hold bytes of another encoding"
    assert 'class="scroll tall"' in table(["a"], [["x"]] * 40, "c") and 'class="scroll"' in table(["a"], [["x"]], "c")
    assert page("T", "x").startswith('<!doctype html>\n<html lang="en">')
    assert re.match(
        r'<img src="data:image/jpeg;base64,[\w+/=]+" alt="x" width="7" height="5">', picture(np.zeros((5, 7, 3), np.uint8), "x")
    )


# Figures and samples of real networks


def test_per_class_is_the_evaluation() -> None:
    rng = np.random.default_rng(0)
    result = ap_per_class(rng.random((60, 10)) < 0.5, rng.random(60), rng.integers(0, 4, 60).astype(float), np.array([0, 0, 2, 3, 3, 3.0]))
    rows = per_class(SimpleNamespace(result=result), ("a", "b", "c", "d"))
    assert [(r["name"], r["labels"]) for r in rows] == [("a", 2), ("c", 1), ("d", 3)]
    assert np.mean([r["map50"] for r in rows]) == pytest.approx(result.map50)
    assert np.mean([r["map"] for r in rows]) == pytest.approx(result.map)
    assert np.mean([r["recall"] for r in rows]) == pytest.approx(result.mr) and json.dumps(rows)


def eager(seed: int):
    """A network of random channels whose heads are sure enough to detect something."""
    network = alive(small(), seed)
    init_detect_biases(network)
    for i in heads(network.blocks):
        conv = network.get_submodule(network.blocks[network.blocks[i].inputs[0]].conv_path)
        conv.bias.data += 6
    return network


def test_samples_are_those_that_differ_and_the_same_every_time(tmp_path: Path) -> None:
    labels = scan_labels((read_images(tmp_path),), 3)
    a, b = eager(0), eager(1)
    first, second = (sample_pairs(a, b, labels, ("x", "y", "z"), 64) for _ in range(2))
    assert [s.name for s in first] == [s.name for s in second] and len(first) == 4
    assert all(np.array_equal(s.before, t.before) and np.array_equal(s.after, t.after) for s, t in zip(first, second))
    assert all(s.before.shape == s.after.shape == (256, 256, 3) and s.before.dtype == np.uint8 for s in first)
    assert any(not np.array_equal(s.before, s.after) and s.before_text != s.after_text for s in first)
    same = sample_pairs(a, a, labels, ("x", "y", "z"), 64, count=3)
    assert [s.name for s in same] == [p.name for p in labels.images[:3]] and all(np.array_equal(s.before, s.after) for s in same)
    few = sample_pairs(a, b, labels, ("x", "y", "z"), 64, count=99)
    assert len(few) == 16, "no more than are looked at"


def read_images(root: Path) -> Path:
    write_dataset(root, images=20)
    return root / "images/val"


@pytest.fixture(scope="module")
def pruned_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a real pruning run, recalibrated, with class names that are markup."""
    root = tmp_path_factory.mktemp("run")
    data = write_dataset(root / "data")
    data.write_text(data.read_text().replace("shape0", "'<b>red</b> & co'"))
    save_model(root / "base.pt", Model(small(), eager(0).state_dict(), ("<b>red</b> & co", "shape1", "shape2"), 64))
    flags = [
        "--percent",
        0.4,
        "--img",
        64,
        "--recalibrate",
        2,
        "--batch",
        4,
        "--workers",
        0,
        "--device",
        "cpu",
        "--project",
        root,
        "--name",
        "cut",
    ]
    call("slim_prune_8x", "--weights", root / "base.pt", "--data", data, *flags)
    return root / "cut"


def test_the_page_of_a_run_is_its_report(pruned_run: Path) -> None:
    written, parsed = json.loads((pruned_run / "report.json").read_text()), Page((pruned_run / "report.html").read_text(encoding="utf-8"))
    text, values = find(parsed, "")
    assert text[0][1:] == ["before", "gamma zero", "masked", "pruned", "recalibrated"]
    stages = ("before", "gamma_zero", "masked", "pruned", "recalibrated")
    assert values[1][1:] == [written[s]["map50"] for s in stages] and values[6][1:] == [written[s]["params"] for s in stages]
    assert [row[0] for row in find(parsed, "Layer")[0][1:]] == [x["name"] for x in written["layers"]]
    assert {row[0] for row in find(parsed, "Class")[0][1:]} == {row["name"] for row in written["before"]["per_class"]}
    assert len(written["commands"]) == 4 and all(c["text"] in parsed.text for c in written["commands"])
    assert decision(written) in parsed.text and len(parsed.of("img")) == 8
    assert load_model(written["pair"][1]).imgsz == 64


@pytest.mark.slow
@pytest.mark.skipif(browser.BINARY is None, reason="Chromium is not installed")
def test_a_browser_shows_it_without_errors_or_overflow(pruned_run: Path, tmp_path: Path) -> None:
    """Light and dark, desktop and phone, and print, where what is folded away must show."""
    path = pruned_run / "report.html"
    with browser.Browser() as chromium:
        for width in (1280, 768, 360):
            for dark in (False, True):
                chromium.open(path, width, dark=dark)
                assert chromium.errors() == []
                assert [url for url in chromium.requests() if not url.startswith("data:")] == [path.resolve().as_uri()]
                pictures = chromium.value("[...document.images].map(i => i.complete && i.naturalWidth > 0 && i.clientWidth > 40)")
                assert pictures == [True] * 8
                assert chromium.value("document.documentElement.scrollWidth") == width, "no sideways scrolling"
                charts = chromium.value("[...document.querySelectorAll('svg.chart')].map(s => s.getBoundingClientRect().width)")
                assert len(charts) == 2 and min(charts) > 250
                ground = chromium.value("getComputedStyle(document.body).backgroundColor")
                assert ground == ("rgb(20, 23, 29)" if dark else "rgb(255, 255, 255)")
        closed = chromium.value("document.querySelector('details table').checkVisibility({contentVisibilityAuto: true})")
        chromium.open(path, 1280, media="print", dark=True)
        assert closed is not True or not chromium.value("document.querySelector('details').open")
        assert chromium.value("document.querySelector('details table').getBoundingClientRect().height") > 100, (
            "print shows what is folded away"
        )
        assert chromium.value("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        assert chromium.value("[...document.querySelectorAll('.scroll')].every(s => s.scrollHeight <= s.clientHeight + 1)")
        chromium.send("Emulation.clearDeviceMetricsOverride")
        assert chromium.pdf().startswith(b"%PDF")


@pytest.mark.slow
@pytest.mark.skipif(browser.BINARY is None, reason="Chromium is not installed")
def test_the_browser_would_notice(tmp_path: Path) -> None:
    """The checks above fail where they should: a missing picture, a script that throws, a line that is too wide."""
    bad = tmp_path / "bad.html"
    wide = '<div style="width:2000px">x</div>'
    bad.write_text(
        f'<!doctype html><meta name=viewport content="width=device-width"><img src="gone.png"><script>throw Error("x")</script>{wide}'
    )
    with browser.Browser() as chromium:
        chromium.open(bad, 360)
        assert len(chromium.errors()) >= 2 and len(chromium.requests()) == 2
        assert chromium.value("[...document.images].map(i => i.naturalWidth > 0)") == [False]
        assert chromium.value("document.documentElement.scrollWidth") == 2008


def test_the_sheet_ships() -> None:
    assert STYLE == ROOT / "utils/page.css" and STYLE.is_file()
