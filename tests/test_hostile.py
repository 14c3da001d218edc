"""Bad data: every file of `tests.hostile_files` is read as users of YOLOv5 expect, or skipped, counted and named."""

from __future__ import annotations

import io
import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import yaml

from tests.helpers import ROOT, SMALL_YAML
from tests.hostile_files import BOX, NC, Case, coded, label_of, picture, write_hostile
from utils.anchors import autoanchor, best_anchors, label_sizes
from utils.augment import AugmentOptions, letterbox
from utils.dataset import DatasetOptions, DetectionDataset, make_loader
from utils.errors import InputError
from utils.label_rows import parse_labels
from utils.labels import LabelSet, label_path, list_images, load_image, scan_labels
from utils.log import LOGGER

PNG = coded(picture())


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[Path, Case]]:
    """The folder of hostile images, read but not written to, and what each file in it has to become."""
    source, expected = write_hostile(tmp_path_factory.mktemp("hostile"))
    return source.parent / "images" / "hostile", expected


@pytest.fixture(scope="module")
def scanned(written: tuple[Path, dict[Path, Case]]) -> LabelSet:
    return scan_labels(written[0], NC)


def one_split(root: Path, labels: dict[str, str | bytes], image: bytes = PNG) -> Path:
    """A folder of equal images with these labels, by stem."""
    folder = root / "images" / "x"
    folder.mkdir(parents=True)
    (root / "labels" / "x").mkdir(parents=True)
    for stem, label in labels.items():
        (folder / f"{stem}.png").write_bytes(image)
        label_of(folder / f"{stem}.png").write_bytes(label if isinstance(label, bytes) else label.encode())
    return folder


def visible(path: Path) -> str:
    """A path as messages show it: what cannot be printed on one line is escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(path))


# The whole folder -----------------------------------------------------------------------------------------------------


def test_what_is_kept_has_its_size_and_rows(written, scanned) -> None:
    _, expected = written
    assert set(scanned.images) == {path for path, case in expected.items() if case.kept}
    for path, rows, size in zip(scanned.images, scanned.labels, scanned.sizes, strict=True):
        case = expected[path]
        assert tuple(size) == case.size, case.name
        wanted = np.array(sorted(case.rows), np.float32).reshape(-1, 5)
        found = rows[np.lexsort(rows.T[::-1])] if len(rows) else rows
        np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-7, err_msg=case.name)
        assert rows.dtype == np.float32 and not np.signbit(rows).any()


def test_what_is_dropped_or_mended_is_counted_and_named(written, scanned) -> None:
    _, expected = written
    dropped = sum(not case.kept for case in expected.values())
    backgrounds = [case for case in expected.values() if case.kept and not case.rows]
    assert scanned.corrupt == dropped > 50
    assert scanned.missing == 2 and scanned.empty == len(backgrounds) - 2 == 2
    assert scanned.found == len(scanned) - 2

    messages = list(scanned.messages)
    for path, case in expected.items():
        if case.message:
            start = f"{visible(label_of(path) if case.in_label else path)}: " + ("" if case.kept else "image ignored: ")
            about = [line for line in messages if line.startswith(start)]
            assert len(about) == 1 and case.message in about[0], (case.name, about)
            messages.remove(about[0])
    assert not messages
    assert all(line.isprintable() for line in scanned.messages)


def test_the_cache_says_the_same(written, scanned, capsys, monkeypatch) -> None:
    folder, _ = written
    monkeypatch.setattr("utils.labels._scan", lambda *_: pytest.fail("scanned although nothing changed"))
    again = scan_labels(folder, NC)
    assert (again.images, again.messages, again.corrupt) == (scanned.images, scanned.messages, scanned.corrupt)
    assert all(np.array_equal(one, two) for one, two in zip(again.labels, scanned.labels, strict=True))
    output = capsys.readouterr().out.splitlines()
    assert set(scanned.messages) < set(output)
    assert f"{folder}: {len(again)} images, 4 backgrounds, {again.corrupt} corrupt (from hostile.cache.npz)" in output


def test_the_cache_knows_nothing_of_nc(written, scanned) -> None:
    folder, _ = written
    everything = scan_labels(folder)
    assert len(everything) == len(scanned) + 5 and not any("data set has nc" in line for line in everything.messages)
    assert len(scan_labels(folder, 4)) == len(scanned) + 2  # classes 7, 80 and 1e30 stay out
    assert len(scan_labels(folder, NC)) == len(scanned)


def test_all_that_is_kept_can_be_loaded_in_its_size(written, scanned) -> None:
    for path, (width, height) in zip(scanned.images, scanned.sizes, strict=True):
        image = load_image(path)
        assert image.shape == (height, width, 3) and image.dtype == np.uint8, path


def test_every_kind_shows_the_picture_upright(written) -> None:
    """The red box is where the label says, in every format with colours and in every EXIF orientation."""
    folder, expected = written
    reference = np.asarray(picture())[..., ::-1].astype(int)
    colourless = ("gray", "one bit", "fax", "float", "cmyk plain")  # and a CMYK without Adobe's marker may be inverted
    for path, case in expected.items():
        if case.kept and case.size == (60, 40) and case.image and not any(word in case.name for word in colourless):
            difference = np.abs(load_image(path).astype(int) - reference).mean()
            assert difference < 20, (case.name, difference)
    assert sum(case.name.startswith("turned") for case in expected.values()) == 8


def test_mended_and_spoilt_files_are_noticed(tmp_path) -> None:
    source, expected = write_hostile(tmp_path)
    folder = source.parent / "images" / "hostile"
    before = scan_labels(folder, NC, quiet=True)
    (folder / "zero bytes.jpg").write_bytes(coded(picture(), "JPEG"))
    (folder / "plain.jpg").write_bytes(b"")
    label_of(folder / "labels nan.png").write_text("0 0.5 0.5 0.25 0.5")
    label_of(folder / "labels bom.png").write_text("nan")
    (folder / "dangling link.jpg").unlink()
    after = scan_labels(folder, NC, quiet=True)
    gone, new = set(before.images) - set(after.images), set(after.images) - set(before.images)
    assert gone == {folder / "plain.jpg", folder / "labels bom.png"}
    assert new == {folder / "zero bytes.jpg", folder / "labels nan.png"}
    assert after.labels[after.images.index(folder / "labels nan.png")].tolist() == [[0, 0.5, 0.5, 0.25, 0.5]]
    assert after.corrupt == before.corrupt - 1


# Scripts --------------------------------------------------------------------------------------------------------------


def counts(expected: dict[Path, Case]) -> str:
    kept = sum(case.kept for case in expected.values())
    return f"{kept} images, 4 backgrounds, {len(expected) - kept} corrupt"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(SMALL_YAML))
    return tmp_path / "small.yaml"


def check_detections(output: str, run: Path, expected: dict[Path, Case]) -> None:
    unreadable = [path for path, case in expected.items() if "cannot be read" in case.message or "UTF-8; rename" in case.message]
    assert len(unreadable) > 15
    for path in unreadable:
        assert f"skipped: image {visible(path)}: " in output
    assert len([path for path in run.iterdir() if path.is_file()]) >= sum(case.kept for case in expected.values())


def test_trains_evaluates_and_detects(tmp_path, model, capfd) -> None:
    source, expected = write_hostile(tmp_path / "data")
    common = ["--data", source, "--img", 64, "--project", tmp_path, "--device", "cpu", "--workers", 2]

    def call(script: str, *args: object) -> str:
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)  # a NaN or a division by zero on the way
            import_module(script).main([str(arg) for arg in args])
        output = capfd.readouterr()
        assert "Traceback" not in output.err and "Logging error" not in output.err
        return output.out

    trained = call("train", "--cfg", model, "--epochs", 1, "--batch", 8, "--name", "base", *common)
    assert trained.count(counts(expected)) == 2  # for training and for validation
    assert np.isfinite(np.loadtxt(tmp_path / "base/results.csv", delimiter=",", skiprows=1)).all()
    weights = tmp_path / "base/weights/last.pt"
    evaluated = call("val", "--weights", weights, "--batch-size", 4, "--name", "val", "--save-json", *common)
    boxes = sum(len(case.rows) for case in expected.values() if case.kept)
    assert f"{counts(expected)} (from hostile.cache.npz)" in evaluated
    assert ["all", str(sum(case.kept for case in expected.values())), str(boxes)] in [line.split()[:3] for line in evaluated.splitlines()]

    folder = source.parent / "images" / "hostile"
    detected = call("detect", "--weights", weights, "--source", folder, *common[2:-2], "--conf", 0.001, "--name", "detect", "--save-txt")
    check_detections(detected, tmp_path / "detect", expected)


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--rect"], ["--cache", "ram", "--workers", 2], ["--cache", "disk"], ["--single-cls"]])
def test_trains_as_a_script_in_every_way_of_loading(tmp_path, model, options) -> None:
    source, expected = write_hostile(tmp_path / "data")
    common = ["--data", source, "--img", 64, "--project", tmp_path, "--device", "cpu"]
    runs = [["train.py", "--cfg", model, "--epochs", 2, "--batch", 8, "--workers", 0, "--name", "base", *common, *options]]
    if not options:
        weights, folder = tmp_path / "base/weights/last.pt", source.parent / "images" / "hostile"
        runs.append(["val.py", "--weights", weights, "--workers", 0, "--save-txt", "--save-json", *common])
        runs.append(["detect.py", "--weights", weights, "--source", folder, "--name", "detect", "--save-crop", *common[2:]])
    for command in runs:
        result = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True, timeout=600)
        assert result.returncode == 0, result.stderr
        assert "Traceback" not in result.stderr and "RuntimeWarning" not in result.stderr
        assert counts(expected) in result.stdout or command[0] == "detect.py"


# Extreme sizes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("imgsz", [64, 640])
@pytest.mark.parametrize("rect", [False, True])
@pytest.mark.parametrize("augment", [None, AugmentOptions(), AugmentOptions(mosaic=0, degrees=30, perspective=0.001)])
def test_extreme_aspects_become_inputs_of_full_size(written, scanned, imgsz, rect, augment) -> None:
    """300:1 shrinks to less than a pixel at 64; each input still is whole strides, and boxes lie where the image does."""
    names = ("12000x40.png", "40x12000.png", "12000x10.png", "10x12000.png", "10x10.png", "gray.png")
    chosen = [i for i, path in enumerate(scanned.images) if path.name in names]
    few = LabelSet(
        tuple(scanned.images[i] for i in chosen), tuple(scanned.labels[i] for i in chosen), scanned.sizes[chosen], len(names), 0, 0, 0, ()
    )
    assert len(few) == len(names)
    for batch_size in (1, 4):
        options = DatasetOptions(imgsz, augment, rect=rect, pad=0.0 if augment else 0.5, batch_size=batch_size)
        for batch in make_loader(DetectionDataset(few, options)).epoch(0):
            height, width = batch.images.shape[2:]
            assert min(height, width) >= 32 and height % 32 == width % 32 == 0
            assert bool(batch.targets.isfinite().all())
            if augment is None:
                assert len(batch.targets) == len(batch)
                # Within a pixel of the input: half of it for rounding up the short side, half for an odd padding.
                centres = batch.targets[:, 2:4].numpy() * (width, height) - [shape[1][1:] for shape in batch.shapes]
                sides = [(w0 * imgsz / max(h0, w0), h0 * imgsz / max(h0, w0)) for (h0, w0), _ in batch.shapes]
                assert (np.abs(centres - np.array(sides) / 2) <= 1).all()
                assert all(size == tuple(few.sizes[i][::-1]) for i, (size, _) in zip(batch.indices, batch.shapes, strict=True))


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 12000), (12000, 1), (40, 12000), (2, 3)])
@pytest.mark.parametrize("auto_stride", [None, 32])
def test_letterbox_keeps_a_pixel_of_everything(height, width, auto_stride) -> None:
    image = np.zeros((height, width, 3), np.uint8)
    boxed, gain, (pad_x, pad_y) = letterbox(image, (64, 64), auto_stride=auto_stride)
    assert max(boxed.shape[:2]) == 64 and all(side % 32 == 0 and side for side in boxed.shape[:2])
    assert gain == min(64 / height, 64 / width) and (boxed == 0).all(axis=2).any()
    assert pad_x >= 0 and pad_y >= 0


def test_anchors_of_boxes_without_area() -> None:
    """Boxes of no height fit no anchor and spoil none."""
    sizes = np.concatenate([np.tile([[30.0, 0.0]], (40, 1)), np.random.default_rng(0).uniform(5, 60, (40, 2))])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = best_anchors(sizes, 6, 4.0, generations=50)
        flat = autoanchor(np.full((2, 3, 2), 500.0), np.tile([[0.0, 30.0]], (50, 1)), 4.0)
        none = label_sizes([np.zeros((1, 5), np.float32)], np.array([[60, 40]]), 64)
    assert np.isfinite(found).all() and (found > 0).all() and np.isfinite(flat).all()
    assert none.tolist() == [[0, 0]]


# Classes --------------------------------------------------------------------------------------------------------------


def labels_with(wrong: int, right: int) -> dict[str, str]:
    rows = [f"{i % 3} 0.5 0.5 0.2 0.2" for i in range(right)] + [f"{3 + i % 2} 0.5 0.5 0.2 0.2" for i in range(wrong)]
    return {f"{i:03}": row for i, row in enumerate(rows)}


@pytest.mark.parametrize(("wrong", "right"), [(1, 1), (10, 10), (12, 110)])
def test_few_wrong_classes_are_slips(tmp_path, wrong, right) -> None:
    folder = one_split(tmp_path, labels_with(wrong, right) | {"empty": ""})
    labels = scan_labels(folder, 3, quiet=True)
    assert (len(labels), labels.corrupt, labels.found, labels.empty) == (right + 1, wrong, right + 1, 1)
    assert len(labels.messages) == wrong
    assert labels.messages[0] == f"{label_path(folder / f'{right:03}.png')}: image ignored: class 3, but the data set has nc = 3"


@pytest.mark.parametrize(("wrong", "right"), [(1, 0), (2, 1), (11, 10), (14, 110)])
def test_many_wrong_classes_are_wrong_names(tmp_path, wrong, right) -> None:
    folder = one_split(tmp_path, labels_with(wrong, right) | {"empty": ""})
    with pytest.raises(InputError) as error:
        scan_labels(folder, 3, quiet=True)
    first, highest = label_path(folder / f"{right:03}.png"), 3 if wrong == 1 else 4
    assert str(error.value) == (
        f"{first}: class 3, but the data set has nc = 3, so classes 0 to 2; {wrong} of {wrong + right} labelled images have "
        f"such classes, up to {highest}: correct the labels, or the names"
    )
    assert scan_labels(folder, 5, quiet=True).corrupt == 0


# Links and lists ------------------------------------------------------------------------------------------------------


def test_a_link_does_not_take_a_folder_out_of_its_split(tmp_path) -> None:
    """`train` is read under its own name, with its labels, though links to it come first; nothing above the source is read."""
    for split in ("train", "val"):
        (tmp_path / "images" / split).mkdir(parents=True)
        (tmp_path / "images" / split / "1.png").write_bytes(PNG)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "2.png").write_bytes(PNG)
    os.symlink(tmp_path / "images" / "train", tmp_path / "images" / "all")
    os.symlink(tmp_path / "images" / "train", tmp_path / "images" / "val" / "deep")
    os.symlink(tmp_path / "elsewhere", tmp_path / "images" / "linked")
    os.symlink(tmp_path, tmp_path / "images" / "train" / "up")
    os.symlink("..", tmp_path / "images" / "train" / "up too")
    names = [str(path.relative_to(tmp_path)) for path in list_images([tmp_path / "images"])]
    assert names == ["images/linked/2.png", "images/train/1.png", "images/val/1.png"]
    assert [path.name for path in list_images([tmp_path / "images" / "train"])] == ["1.png"]
    through = list_images([tmp_path / "images" / "all"])
    assert through == [tmp_path / "images" / "all" / "1.png"]  # a link as the source is what the user asked for


def test_lists_of_odd_lines(tmp_path) -> None:
    folder = one_split(tmp_path, {"猫 #1": BOX, "b": BOX})
    (folder / "pipe.png").mkdir()
    names = [
        "./images/x/猫 #1.png\r",
        "",
        "  ./images/x/b.png  ",
        "./images/x/gone.png",
        "./images/x/a\0b.png",
        "./images/x",
        "./images/x/pipe.png",
    ]
    (tmp_path / "list.txt").write_bytes(b"\xef\xbb\xbf" + "\n".join(names).encode() + b"\n./images/x/caf\xe9.png")
    labels = scan_labels(tmp_path / "list.txt", NC, quiet=True)
    assert [path.name for path in labels.images] == ["b.png", "猫 #1.png"] and labels.corrupt == 4
    reasons = {line.rpartition(": ")[2] for line in labels.messages}
    assert reasons == {"No such file or directory", "embedded null byte", "is not a file", "the path is not text in UTF-8; rename it"}
    assert len(scan_labels(tmp_path / "list.txt", NC, quiet=True)) == 2

    (tmp_path / "wide.txt").write_text("./images/x/b.png\n", encoding="utf-16")
    with pytest.raises(InputError, match="no images in .*wide.txt"):
        scan_labels(tmp_path / "wide.txt")


def test_names_are_logged_on_any_terminal(monkeypatch, capfd) -> None:
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr(sys, "stdout", terminal)
    # Straight to the handler: pytest keeps what the logger says, and cannot send such a name from one of its processes to the other.
    LOGGER.handlers[0].handle(logging.LogRecord(LOGGER.name, logging.INFO, __file__, 1, "Größe 猫 \udce9", (), None))
    terminal.flush()
    assert terminal.buffer.getvalue().decode("cp1252").strip() == "Größe \\u732b \\udce9"
    assert capfd.readouterr().err == ""


# JPEGs ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"optimize": True}, {"quality": 30}, {"restart_marker_blocks": 4}])
def test_a_jpeg_may_lack_its_marker_but_not_its_pixels(tmp_path, options) -> None:
    content = coded(picture(160, 120), "JPEG", **options)
    (tmp_path / "whole.jpg").write_bytes(content)
    for lost in (1, 2):
        (tmp_path / f"minus {lost}.jpg").write_bytes(content[:-lost])
    for share in (95, 80, 70, 60):
        (tmp_path / f"cut {share}.jpg").write_bytes(content[: len(content) * share // 100])
    labels = scan_labels(tmp_path, quiet=True)
    assert [path.name for path in labels.images] == ["minus 1.jpg", "minus 2.jpg", "whole.jpg"] and labels.corrupt == 4
    for path in labels.images[:2]:
        np.testing.assert_array_equal(load_image(path), load_image(tmp_path / "whole.jpg"))


# Fuzz -----------------------------------------------------------------------------------------------------------------


def spoilt(rng: np.random.Generator, content: bytes) -> bytes:
    """Replace, delete, double or cut off some bytes."""
    data = bytearray(content)
    for _ in range(int(rng.integers(1, 6))):
        at = int(rng.integers(len(data))) if data else 0
        how = rng.integers(5)
        if how == 0:
            data[at : at + 1] = bytes([rng.integers(256)])
        elif how == 1:
            del data[at : at + int(rng.integers(1, 20))]
        elif how == 2:
            data[at:at] = data[at : at + int(rng.integers(1, 40))]
        elif how == 3:
            data[at:at] = rng.choice([b"nan", b"-", b" ", b"\n", b"1e99", b"\r", b"\xff", b"inf ", b"0x", b"\0", b".", b"9999", b"\t"])
        elif rng.random() < 0.3:
            del data[at:]
    return bytes(data)


def fuzzed_labels() -> Iterator[bytes]:
    rng = np.random.default_rng(1)
    for number in range(1500):
        columns = 5 if number % 3 else int(rng.choice([7, 9, 11]))
        rows = [" ".join([str(rng.integers(3)), *(f"{v:.6g}" for v in rng.random(columns - 1))]) for _ in range(int(rng.integers(1, 5)))]
        yield spoilt(rng, "\n".join(rows).encode()) if number % 10 else bytes(rng.integers(0, 256, 40, dtype=np.uint8))


def test_fuzzed_labels_are_parsed_or_refused_with_a_reason() -> None:
    kept = refused = 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for content in fuzzed_labels():
            try:
                rows, _ = parse_labels(content.decode("utf-8-sig", errors="replace"))
                assert rows.dtype == np.float32 and rows.shape[1:] == (5,) and np.isfinite(rows).all()
                assert (rows >= 0).all() and (rows[:, 1:] <= 1).all() and (rows[:, 0] % 1 == 0).all()
                kept += 1
            except ValueError as error:
                assert str(error)
                refused += 1
    assert kept > 100 and refused > 100


def test_fuzzed_label_files_are_kept_or_named(tmp_path) -> None:
    content = coded(picture(12, 12))
    folder = one_split(tmp_path, {f"{i:04}": label for i, label in enumerate(fuzzed_labels()) if i % 5 == 0}, content)
    labels = scan_labels(folder, quiet=True)
    ignored = [line for line in labels.messages if ": image ignored: " in line]
    assert len(labels) + labels.corrupt == 300 and len(ignored) == labels.corrupt > 50
    assert all(line.isprintable() and line.startswith(str(tmp_path)) for line in labels.messages)


def test_fuzzed_images_are_kept_or_named(tmp_path) -> None:
    rng = np.random.default_rng(2)
    whole = {
        ".jpg": coded(picture(), "JPEG"), ".jpeg": coded(picture(), "JPEG", progressive=True), ".png": PNG, ".webp": coded(picture(), "WEBP"),
        ".bmp": coded(picture(), "BMP"), ".tif": coded(picture(), "TIFF", compression="tiff_lzw"),
    }  # fmt: skip
    for suffix, content in whole.items():
        for number in range(30):
            cut = content[: int(rng.integers(len(content)))]
            (tmp_path / f"{number:02}{suffix}").write_bytes(cut if number % 2 else spoilt(rng, content))
    labels = scan_labels(tmp_path, quiet=True)
    assert len(labels) + labels.corrupt == 180 and labels.corrupt > 90 and len(labels) > 10
    for path, (width, height) in zip(labels.images, labels.sizes, strict=True):
        assert load_image(path).shape == (height, width, 3)


def test_a_fuzzed_cache_is_rebuilt_or_right(tmp_path) -> None:
    folder = one_split(tmp_path, {f"{i}": f"{i % 3} 0.5 0.5 0.{i + 1} 0.5" for i in range(5)} | {"bad": "nan"})
    truth = scan_labels(folder, quiet=True)
    cache, rng = tmp_path / "labels" / "x.cache.npz", np.random.default_rng(3)
    content = cache.read_bytes()
    for _ in range(60):
        cache.write_bytes(spoilt(rng, content))
        again = scan_labels(folder, quiet=True)
        assert (again.images, again.corrupt, again.messages) == (truth.images, truth.corrupt, truth.messages)
        assert all(np.array_equal(one, two) for one, two in zip(again.labels, truth.labels, strict=True))


def test_pillow_is_needed_by_tests_only() -> None:
    for path in (ROOT / "utils").glob("*.py"):
        assert "PIL" not in path.read_text(encoding="utf-8"), path.name
