"""Converters: the boxes of fabricated data sets by value, what is left out and named, and the files that are written."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml

from data.convert import main
from data.layout import normalised
from data.oxfordhand import read_corners
from data.voc import read_annotation
from tests.helpers import ROOT
from utils.data_config import read_data
from utils.errors import InputError
from utils.labels import label_path, scan_labels

WIDTH, HEIGHT = 100, 50


def picture(path: Path, width: int = WIDTH, height: int = HEIGHT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), np.full((height, width, 3), len(path.stem) * 9 % 256, np.uint8))
    return path


def files_below(folder: Path) -> dict[str, tuple]:
    """Every file with its content and time: what a second run must not change."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): (path.read_bytes(), path.lstat().st_mtime_ns, path.is_symlink()) for path in paths}


def labels_of(path: Path) -> list[list[float]]:
    return [[float(value) for value in line.split()] for line in path.read_text().splitlines()]


def test_a_box_is_clipped_and_normalised() -> None:
    assert normalised(3, (10, 10, 30, 40), (100, 50)) == (3, 0.2, 0.5, 0.2, 0.6)
    assert normalised(0, (-10, -10, 200, 25), (100, 50)) == (0, 0.5, 0.25, 1.0, 0.5)
    for empty in [(10, 10, 10, 20), (30, 10, 10, 20), (120, 0, 130, 10), (0, 0, float("nan"), 10)]:
        assert normalised(0, empty, (100, 50)) is None


# ---- Pascal VOC ----------------------------------------------------------------------------------------------------------------


def voc_object(name: str, box: tuple, difficult: str = "<difficult>0</difficult>") -> str:
    corners = "".join(f"<{key}>{value}</{key}>" for key, value in zip(("xmin", "ymin", "xmax", "ymax"), box))
    return f"<object><name>{name}</name>{difficult}<bndbox>{corners}</bndbox></object>"


SIZE = f"<size><width>{WIDTH}</width><height>{HEIGHT}</height><depth>3</depth></size>"
DIFFICULT = "<difficult>1</difficult>"
OBJECTS = {
    "000001": SIZE + voc_object("dog", (11, 11, 31, 41)) + voc_object("person", (1, 1, 51, 26), DIFFICULT),
    "000002": voc_object("aeroplane", ("1.0", "1", "50.5", "25.5"), ""),  # no size; an image of another one
    "000003": SIZE + voc_object("unicorn", (1, 1, 20, 20)),
    "000004": SIZE + voc_object("cat", (5, 5, 5, 20)) + voc_object("cat", (91, 41, 400, 400)) + voc_object("cat", ("x", 1, 2, 3)),
}


@pytest.fixture
def devkit(tmp_path: Path) -> Path:
    """VOCdevkit with VOC2007 (train 1, 2 and a missing image; val 3; test 4 and a broken XML) and VOC2012 (train 1)."""
    for year, stems in {"2007": OBJECTS, "2012": ["000001"]}.items():
        folder = tmp_path / "VOCdevkit" / f"VOC{year}"
        (folder / "Annotations").mkdir(parents=True)
        (folder / "ImageSets" / "Main").mkdir(parents=True)
        for stem in stems:
            picture(folder / "JPEGImages" / f"{stem}.jpg", *((200, 100) if stem == "000002" else ()))
            xml = f"<annotation><filename>{stem}.jpg</filename>{OBJECTS[stem]}</annotation>"
            (folder / "Annotations" / f"{stem}.xml").write_text(xml)
    first, second = (tmp_path / "VOCdevkit" / f"VOC{year}" for year in ("2007", "2012"))
    (first / "Annotations" / "000005.xml").write_text("<annotation/>")
    (first / "Annotations" / "000006.xml").write_text("<annotation><object>")
    picture(first / "JPEGImages" / "000006.jpg")
    sets = {
        "train": "000001\n000002\n000005\n",
        "val": "000003  1\n",
        "test": "000004\n000006\n000007\n",
        "trainval": "000001\n",
        "dog_train": "000001 1\n",
    }
    for name, text in sets.items():
        (first / "ImageSets" / "Main" / f"{name}.txt").write_text(text)
    (second / "ImageSets" / "Main" / "train.txt").write_text("000001\n")
    return tmp_path / "VOCdevkit"


def test_voc(devkit: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "VOC"
    main(["voc", str(devkit), "--out", str(out)])
    assert sorted(path.name for path in (out / "images").iterdir()) == ["test2007", "train2007", "train2012", "val2007"]
    # xmin..xmax from 1, so 10..30 of 100 pixels across and 10..40 of 50 down; dog is class 11.
    assert labels_of(out / "labels" / "train2007" / "000001.txt") == [[11, 0.2, 0.5, 0.2, 0.6]]
    assert labels_of(out / "labels" / "train2007" / "000002.txt") == [[0, 0.12375, 0.1225, 0.2475, 0.245]]
    assert labels_of(out / "labels" / "val2007" / "000003.txt") == []
    assert labels_of(out / "labels" / "test2007" / "000004.txt") == [[7, 0.95, 0.9, 0.1, 0.2]]
    assert (out / "train2007.txt").read_text() == "./images/train2007/000001.jpg\n./images/train2007/000002.jpg\n"
    assert (out / "skipped.txt").read_text().splitlines() == [
        "box without area in the image: 000004.xml cat",
        "box without area in the image: 000004.xml cat",
        "broken XML: VOC2007/test/000006",
        "class not among the names: 000003.xml unicorn",
        "marked difficult (--difficult keeps them): 000001.xml person",
        "marked difficult (--difficult keeps them): 000001.xml person",
        "no annotation: VOC2007/test/000007",
        "no image: VOC2007/train/000005",
    ]
    log = capsys.readouterr().out
    assert "train2007: 2 images, 2 boxes, 0 backgrounds" in log and "val2007: 1 images, 0 boxes, 1 backgrounds" in log
    assert "skipped, broken XML: 1 (VOC2007/test/000006)" in log and "20 classes: aeroplane" in log

    text = (ROOT / "data" / "VOC.yaml").read_text().replace("../datasets/VOC", str(out)).replace("  - images/val2012\n", "")
    (tmp_path / "VOC.yaml").write_text(text)
    assert scan_labels(read_data(tmp_path / "VOC.yaml").train, 20).instances == 3
    assert [
        len(scan_labels(part, 20)) for part in (read_data(out / "dataset.yaml").train, read_data(out / "dataset.yaml", ["test"]).test)
    ] == [3, 1]


def test_voc_with_trainval_alone(devkit: Path, tmp_path: Path) -> None:
    for name in ("train", "val"):
        (devkit / "VOC2007" / "ImageSets" / "Main" / f"{name}.txt").unlink()
    main(["voc", str(devkit / "VOC2007"), "--out", str(tmp_path / "VOC")])
    assert sorted(path.name for path in (tmp_path / "VOC" / "labels").iterdir()) == ["test2007", "trainval2007"]


def test_voc_again_changes_nothing(devkit: Path, tmp_path: Path) -> None:
    out = tmp_path / "VOC"
    main(["voc", str(devkit), "--out", str(out)])
    before = files_below(out)
    main(["voc", str(devkit), "--out", str(out)])
    assert files_below(out) == before
    (out / "labels" / "train2007" / "000001.txt").unlink()
    (out / "images" / "train2007" / "000002.jpg").unlink()
    main(["voc", str(devkit), "--out", str(out), "--difficult"])
    assert labels_of(out / "labels" / "train2007" / "000001.txt") == [[11, 0.2, 0.5, 0.2, 0.6], [14, 0.25, 0.25, 0.5, 0.5]]
    after = files_below(out)
    assert after.keys() == before.keys() and "difficult" not in (out / "skipped.txt").read_text()
    assert not list(out.rglob(".*"))


def test_images_are_linked_or_copied_but_never_overwritten(devkit: Path, tmp_path: Path) -> None:
    original = devkit / "VOC2007" / "JPEGImages" / "000001.jpg"
    for flags, out in (([], tmp_path / "links"), (["--copy"], tmp_path / "copies")):
        main(["voc", str(devkit), "--out", str(out), *flags])
        image = out / "images" / "train2007" / "000001.jpg"
        assert image.is_symlink() == (not flags) and image.read_bytes() == original.read_bytes()
    assert os.readlink(tmp_path / "links" / "images" / "train2007" / "000001.jpg") == "../../../VOCdevkit/VOC2007/JPEGImages/000001.jpg"

    main(["voc", str(devkit), "--out", str(tmp_path / "links"), "--copy"])  # copies take the place of links
    assert not (tmp_path / "links" / "images" / "train2007" / "000001.jpg").is_symlink() and original.is_file()
    (tmp_path / "links" / "images" / "train2007" / "000001.jpg").write_bytes(b"mine")
    before = files_below(tmp_path / "links")
    with pytest.raises(InputError, match="000001.jpg: is another file than .*remove it, or choose another --out"):
        main(["voc", str(devkit), "--out", str(tmp_path / "links"), "--difficult"])
    assert files_below(tmp_path / "links") == before


def test_an_interruption_leaves_no_folder_of_some_images(devkit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, calls = Path.symlink_to, []

    def interrupted(self: Path, target: str) -> None:
        calls.append(target)
        if len(calls) == 2:
            raise KeyboardInterrupt
        original(self, target)

    monkeypatch.setattr(Path, "symlink_to", interrupted)
    with pytest.raises(KeyboardInterrupt):
        main(["voc", str(devkit), "--out", str(tmp_path / "VOC")])
    assert list((tmp_path / "VOC" / "images").iterdir()) == [] and not (tmp_path / "VOC" / "train2007.txt").exists()
    monkeypatch.undo()
    main(["voc", str(devkit), "--out", str(tmp_path / "VOC")])
    assert len(scan_labels(read_data(tmp_path / "VOC" / "dataset.yaml").train, 20)) == 3


def test_voc_of_ones_own(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """XML beside its images, own classes, in place: named classes are asked for, and given by list or file."""
    for k, name in enumerate(["crab", "eel", "crab"]):
        picture(tmp_path / "sea" / "images" / f"{k}.png")
        (tmp_path / "sea" / "annotations").mkdir(exist_ok=True)
        (tmp_path / "sea" / "annotations" / f"{k}.xml").write_text(f"<annotation>{SIZE}{voc_object(name, (11, 11, 31, 41))}</annotation>")
    with pytest.raises(InputError, match="found: crab 2, eel 1. Name yours, in the order of their numbers: --names crab,eel") as error:
        main(["voc", str(tmp_path / "sea")])
    assert "\n" not in str(error.value) and not (tmp_path / "sea" / "labels").exists()

    main(["voc", str(tmp_path / "sea"), "--names", "eel,crab"])
    assert "are one split, `train`" in capsys.readouterr().out
    assert [labels_of(tmp_path / "sea" / "labels" / f"{k}.txt")[0][0] for k in range(3)] == [1, 0, 1]
    assert (tmp_path / "sea" / "train.txt").read_text() == "./images/0.png\n./images/1.png\n./images/2.png\n"
    described = yaml.safe_load((tmp_path / "sea" / "dataset.yaml").read_text())
    assert described["names"] == {0: "eel", 1: "crab"} and described["val"] == []
    with pytest.raises(InputError, match="`val` is missing"):
        read_data(tmp_path / "sea" / "dataset.yaml")

    (tmp_path / "sea.names").write_text("crab\neel\n")
    main(["voc", str(tmp_path / "sea"), "--names", str(tmp_path / "sea.names")])
    assert labels_of(tmp_path / "sea" / "labels" / "0.txt")[0][0] == 0
    main(["voc", str(tmp_path / "sea"), "--names", str(tmp_path / "sea" / "dataset.yaml")])
    with pytest.raises(InputError, match="--names: expected class names, each once"):
        main(["voc", str(tmp_path / "sea"), "--names", "eel,eel"])


BOMB = '<?xml version="1.0"?><!DOCTYPE a [<!ENTITY x "' + "ha" * 50 + '"><!ENTITY y "&x;&x;&x;">]>'


@pytest.mark.parametrize("coding", ["utf-8", "utf-16"])
@pytest.mark.parametrize(
    "prolog", [BOMB, '<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/hostname">]>', '<!DOCTYPE a SYSTEM "http://localhost/a.dtd">']
)
def test_xml_with_a_doctype_is_refused(tmp_path: Path, prolog: str, coding: str) -> None:
    prolog = prolog.replace("?>", f' encoding="{coding}"?>', 1)
    (tmp_path / "a.xml").write_text(f"{prolog}<annotation><filename>&x;</filename></annotation>", encoding=coding)
    with pytest.raises(ValueError, match="DOCTYPE"):
        read_annotation(tmp_path / "a.xml")


@pytest.mark.parametrize(
    "content", [b"", b"\x00\x01", b"<a>", b'<?xml version="1.0" encoding="nonsense"?><a/>', b"<a>\xff</a>", b"<a>&x;</a>"]
)
def test_broken_xml(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.xml").write_bytes(content)
    with pytest.raises(ValueError, match="broken XML"):
        read_annotation(tmp_path / "a.xml")


# ---- COCO ----------------------------------------------------------------------------------------------------------------------


def coco_json(path: Path, images: list, annotations: list, categories: list | None = None) -> Path:
    categories = (
        [{"id": 90, "name": "toothbrush"}, {"id": 1, "name": "person"}, {"id": 18, "name": "dog"}] if categories is None else categories
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return path


def entry(number: int, name: str, **more: object) -> dict:
    return {"id": number, "file_name": name, "width": WIDTH, "height": HEIGHT} | more


def box(image: int, category: int, values: object, **more: object) -> dict:
    return {"id": 7, "image_id": image, "category_id": category, "bbox": values, "iscrowd": 0} | more


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    root = tmp_path / "coco"
    for split, names in {"train2017": ["1.jpg", "2.jpg", "3.jpg"], "val2017": ["9.jpg"]}.items():
        for name in names:
            picture(root / "images" / split / name)
    boxes = [
        box(1, 18, [10, 10, 20, 30]), box(1, 90, [90, 40, 500, 500]), box(1, 18, [10, 10, 20, 30]), box(1, 1, [0, 0, 50, 25], iscrowd=1),
        box(2, 1, [10, 10, 0, 5]), box(2, 2, [10, 10, 5, 5]), box(2, 1, [10, 10, 5]), box(2, 1, [10, 10, 5, float("nan")]),
        box(44, 1, [1, 1, 5, 5]), box(3, 1, [0, 0, 50, 25]), "nonsense",
    ]  # fmt: skip
    images = [
        entry(1, "1.jpg"), entry(2, "2.jpg"), entry(3, "3.jpg", width=None), entry(4, "4.jpg"), entry(5, "../../x.jpg"), entry(6, "/etc/hostname"),
        entry(1, "again.jpg"), {"id": 8},
    ]  # fmt: skip
    coco_json(root / "annotations" / "instances_train2017.json", images, boxes)
    coco_json(root / "annotations" / "instances_val2017.json", [entry(9, "9.jpg")], [box(9, 90, [0, 0, 100, 50])])
    return root


def test_coco_in_place(coco: Path, capsys: pytest.CaptureFixture) -> None:
    main(["coco", str(coco)])
    labels = coco / "labels" / "train2017"
    assert labels_of(labels / "1.txt") == [[1, 0.2, 0.5, 0.2, 0.6], [2, 0.95, 0.9, 0.1, 0.2]]
    assert labels_of(labels / "2.txt") == [] and labels_of(labels / "3.txt") == [[0, 0.25, 0.25, 0.5, 0.5]]
    assert labels_of(coco / "labels" / "val2017" / "9.txt") == [[2, 0.5, 0.5, 1, 1]]
    assert (coco / "train2017.txt").read_text() == "".join(f"./images/train2017/{k}.jpg\n" for k in (1, 2, 3))
    assert not [path for path in coco.rglob("*") if path.is_symlink()]
    assert (coco / "skipped.txt").read_text().splitlines() == [
        "a crowd: train2017 1.jpg annotation 7",
        "annotation of an unknown image: train2017 annotation 7",
        "annotation of an unknown image: train2017 nonsense",
        "box without area in the image: train2017 2.jpg annotation 7",
        "file_name that leads out of the folder of images: train2017 ../../x.jpg",
        "file_name that leads out of the folder of images: train2017 /etc/hostname",
        "image whose id another one has: train2017 again.jpg",
        "image without id or file_name: train2017 None",
        "missing image: train2017 4.jpg",
        "no bbox of four numbers: train2017 2.jpg annotation 7",
        "no bbox of four numbers: train2017 2.jpg annotation 7",
        "the same box twice: train2017/1.jpg",
        "unknown category: train2017 2.jpg annotation 7",
    ]
    assert "train2017: 3 images, 3 boxes, 1 backgrounds" in capsys.readouterr().out
    data = read_data(coco / "dataset.yaml")
    assert data.names == ("person", "dog", "toothbrush") and data.val == (coco / "val2017.txt",)
    before = files_below(coco)
    main(["coco", str(coco)])
    assert files_below(coco) == before


def test_coco_as_the_archives_unpack(coco: Path) -> None:
    for split in ("train2017", "val2017"):
        (coco / "images" / split).rename(coco / split)
    (coco / "images").rmdir()
    main(["coco", str(coco)])
    assert os.readlink(coco / "images" / "val2017" / "9.jpg") == "../../val2017/9.jpg"
    assert scan_labels(read_data(coco / "dataset.yaml").train).instances == 3


def test_the_shipped_coco_yaml_fits_what_is_written(coco: Path, tmp_path: Path) -> None:
    main(["coco", str(coco)])
    (tmp_path / "coco.yaml").write_text((ROOT / "data" / "coco.yaml").read_text().replace("../datasets/coco", str(coco)))
    data = read_data(tmp_path / "coco.yaml")
    assert data.nc == 80 and scan_labels(data.train, 80).instances == 3 and len(scan_labels(data.val, 80)) == 1


def test_coco_format_of_ones_own(tmp_path: Path) -> None:
    """One JSON, images in folders that `file_name` names, categories from 0."""
    for name in ("a/1.png", "b/images/2.png"):
        picture(tmp_path / "pics" / name)
    file = coco_json(
        tmp_path / "mine.json", [entry(1, "a/1.png"), entry("2", "b/images/2.png")], [box(1, 5, [0, 0, 50, 25]), box("2", 0, [0, 0, 100, 50])],
        [{"id": 5, "name": "nut"}, {"id": 0, "name": "bolt"}],
    )  # fmt: skip
    with pytest.raises(InputError, match="its images are missing: a/1.png, .*--images names their folder"):
        main(["coco", str(file), "--out", str(tmp_path / "out")])
    with pytest.raises(InputError, match="--out: name the folder"):
        main(["coco", str(file), "--images", str(tmp_path / "pics")])
    main(["coco", str(file), "--images", str(tmp_path / "pics"), "--out", str(tmp_path / "out")])
    assert labels_of(tmp_path / "out" / "labels" / "mine" / "a" / "1.txt") == [[1, 0.25, 0.25, 0.5, 0.5]]
    assert (tmp_path / "out" / "mine.txt").read_text() == "./images/mine/a/1.png\n./images/mine/b/2.png\n"
    assert yaml.safe_load((tmp_path / "out" / "dataset.yaml").read_text())["train"] == ["mine.txt"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not a readable JSON"),
        ("[" * 100_000, "not a readable JSON"),
        ("[]", "needs the lists images, annotations and categories"),
        ('{"images": [], "annotations": [], "categories": []}', "has no categories"),
        ('{"images": [], "annotations": [], "categories": [{"id": "1", "name": "a"}]}', "a category needs a whole number `id`"),
        ('{"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]}', "of its own"),
        ('{"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}]}', "nothing to write"),
    ],
)
def test_bad_coco_files(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(InputError, match=message) as error:
        main(["coco", str(tmp_path / "x.json"), "--out", str(tmp_path / "out")])
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_categories_must_agree_between_files(coco: Path) -> None:
    coco_json(coco / "annotations" / "instances_val2017.json", [entry(9, "9.jpg")], [], [{"id": 18, "name": "wolf"}])
    with pytest.raises(InputError, match="category 18 is 'wolf' here and 'dog' in another file"):
        main(["coco", str(coco)])
    assert not (coco / "labels").exists()


def test_one_image_in_two_splits_must_have_one_label(coco: Path) -> None:
    (coco / "images" / "train2017").rename(coco / "images" / "all")
    for split, size in (("train2017", 10), ("val2017", 20)):
        coco_json(coco / "annotations" / f"instances_{split}.json", [entry(1, "1.jpg")], [box(1, 1, [0, 0, size, size])])
    with pytest.raises(InputError, match="1.jpg: is in two splits with different boxes"):
        main(["coco", str(coco), "--images", str(coco / "images" / "all")])
    assert not (coco / "labels").exists()


# ---- Oxford hands --------------------------------------------------------------------------------------------------------------


def hands_mat(path: Path, hands: list[list[tuple[float, float]]]) -> None:
    """Write a `.mat` like the data set's: a 1 x N cell of 1 x 1 structs whose fields a..d are (1, 2) points (y, x)."""
    from scipy.io import savemat

    cell = np.empty((1, len(hands)), object)
    for k, corners in enumerate(hands):
        cell[0, k] = {name: np.array([point], float) for name, point in zip("abcd", corners)} | {"wrist": "ab"}
    path.parent.mkdir(parents=True, exist_ok=True)
    savemat(path, {"boxes": cell})


@pytest.fixture
def hand_dataset(tmp_path: Path) -> Path:
    root = tmp_path / "hand_dataset"
    diamond = [(10, 40), (20, 60), (30, 40), (20, 20)]  # (y, x): x 20..60, y 10..30
    outside = [(-5, 90), (-5, 120), (25, 120), (25, 90)]
    splits = {"training": [[diamond, outside], [diamond]], "validation": [[]], "test": [[[(60, 10), (60, 20), (70, 20), (70, 10)]]]}
    for split, images in splits.items():
        folder = root / f"{split}_dataset" / f"{split}_data"
        for k, hands in enumerate(images):
            picture(folder / "images" / f"{split}_{k}.jpg")
            hands_mat(folder / "annotations" / f"{split}_{k}.mat", hands)
    broken = root / "training_dataset" / "training_data" / "annotations"
    for name, content in {"broken": b"MATLAB 5.0 nonsense", "gone": b""}.items():
        (broken / f"training_{name}.mat").write_bytes(content)
    picture(broken.parent / "images" / "training_broken.jpg")
    return root


def test_a_rotated_rectangle_becomes_the_upright_box_around_it(hand_dataset: Path) -> None:
    folder = hand_dataset / "training_dataset" / "training_data" / "annotations"
    assert read_corners(folder / "training_0.mat") == [(20, 10, 60, 30), (90, -5, 120, 25)]
    assert read_corners(folder / "training_1.mat") == [(20, 10, 60, 30)]  # scipy drops the axis of a single hand


def test_oxfordhand(hand_dataset: Path, tmp_path: Path) -> None:
    out = tmp_path / "oxfordhand"
    main(["oxfordhand", str(hand_dataset), "--out", str(out)])
    assert labels_of(out / "labels" / "train" / "training_0.txt") == [[0, 0.4, 0.4, 0.4, 0.4], [0, 0.95, 0.25, 0.1, 0.5]]
    assert labels_of(out / "labels" / "val" / "validation_0.txt") == [] == labels_of(out / "labels" / "test" / "test_0.txt")
    assert (out / "skipped.txt").read_text().splitlines() == [
        "box without area in the image: test_0.mat hand 1",
        "broken .mat: train/training_broken.mat",
        "no image: train/training_gone.mat",
    ]
    for name in ("oxfordhand.yaml", "oxfordhand.data"):
        (tmp_path / name).write_text((ROOT / "data" / name).read_text().replace("../datasets/oxfordhand", str(out)))
        data = read_data(tmp_path / name, ("train", "val", "test"))
        assert data.names == ("hand",) and scan_labels(data.train, 1).instances == 3, name


def test_oxfordhand_in_place(hand_dataset: Path) -> None:
    main(["oxfordhand", str(hand_dataset.parent), "--out", str(hand_dataset)])
    image = hand_dataset / "training_dataset" / "training_data" / "images" / "training_1.jpg"
    assert len(labels_of(label_path(image))) == 1 and not [path for path in hand_dataset.rglob("*") if path.is_symlink()]
    assert (hand_dataset / "train.txt").read_text().splitlines()[1] == f"./{image.relative_to(hand_dataset)}"


@pytest.mark.parametrize("content", [{"other": 1}, {"boxes": np.arange(6.0)}, {"boxes": {"a": [1, 2], "b": [1, 2], "c": [1, 2]}}])
def test_a_mat_without_corners(tmp_path: Path, content: dict) -> None:
    from scipy.io import savemat

    savemat(tmp_path / "x.mat", content)
    with pytest.raises(ValueError, match=r"\.mat (without|whose) `boxes`"):
        read_corners(tmp_path / "x.mat")


def test_the_command_ends_on_a_wrong_input_with_one_line_and_without_torch() -> None:
    code = "import sys; from data.convert import main; from utils.errors import run_script; run_script(lambda: main(['voc', 'nowhere']))"
    done = subprocess.run([sys.executable, "-X", "importtime", "-c", code], cwd=ROOT, capture_output=True, text=True)
    lines = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert done.returncode == 2 and len(lines) == 1 and lines[0].startswith("error: ") and "no such folder" in lines[0]
    assert not re.search(r"\| +(torch|scipy)\b", done.stderr)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["voc", "nowhere"], "no such folder"),
        (["voc", "."], "no VOC data set"),
        (["coco", "nowhere"], "no annotations/instances_"),
        (["coco", "."], "no annotations/instances_"),
        (["oxfordhand", "."], "no Oxford hand dataset: expected training_dataset"),
    ],
)
def test_a_source_that_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, argv: list[str], message: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message) as error:
        main(argv)
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())
