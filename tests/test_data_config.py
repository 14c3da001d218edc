"""Dataset files from end to end: folders, lists and both together; YOLOv5's own yaml files; what is said when images are missing."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from tests.helpers import ROOT, write_dataset
from utils.data_config import read_data
from utils.dataset import DatasetOptions, DetectionDataset
from utils.errors import InputError
from utils.labels import scan_labels

SHIPPED = ("VOC.yaml", "coco.yaml", "coco128.yaml", "oxfordhand.yaml", "oxfordhand.data")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Eight images and labels in each of `images/train` and `images/val`, and lists in every spelling of them."""
    write_dataset(tmp_path)
    train = sorted((tmp_path / "images" / "train").iterdir())
    (tmp_path / "dotted.txt").write_text("".join(f"./images/train/{path.name}\n" for path in train[:2]))
    (tmp_path / "absolute.txt").write_text("".join(f"{path}\n" for path in train[2:4]))
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "up.txt").write_text(f"\ufeff../images/train/{train[4].name}\r\n\r\n../images/train/{train[5].name}")
    (tmp_path / "a.names").write_text("x\ny\nz\n")
    return tmp_path


MIXTURES = [
    ("images/train", 8),
    ("dotted.txt", 2),
    ("lists/up.txt", 2),
    (["dotted.txt", "absolute.txt", "lists/up.txt"], 6),
    (["images/val", "absolute.txt"], 10),
    (["images/val", "images/train"], 16),
]


@pytest.mark.parametrize("kind", ["yaml", "data"])
@pytest.mark.parametrize(("train", "count"), MIXTURES)
def test_folders_lists_and_both_become_samples(root: Path, kind: str, train: str | list[str], count: int) -> None:
    entries = [train] if isinstance(train, str) else train
    if kind == "yaml":
        text = f"path: {root}\ntrain: {train}\nval: images/val\nnames: [x, y, z]\n"
    else:
        text = f"classes=3\ntrain={', '.join(entries)}\nvalid={root}/images/val\nnames={root}/a.names\n"
    (root / f"set.{kind}").write_text(text)
    data = read_data(root / f"set.{kind}")
    assert data.train == tuple(root / entry for entry in entries) and data.names == ("x", "y", "z")
    labels = scan_labels(data.train, data.nc, quiet=True)
    dataset = DetectionDataset(labels, DatasetOptions(imgsz=64))
    assert len(dataset) == count == labels.found and labels.corrupt == 0
    samples = [dataset[0, k] for k in range(count)]
    assert sum(len(sample.labels) for sample in samples) == labels.instances >= count
    first = samples[0]
    np.testing.assert_allclose(first.labels[:, 1:], labels.labels[first.index], atol=1e-6)


def test_a_comma_may_belong_to_a_file_name(root: Path) -> None:
    (root / "dotted.txt").rename(root / "one, two.txt")
    (root / "set.data").write_text("classes=3\ntrain=one, two.txt\nvalid=images/val\n")
    data = read_data(root / "set.data")
    assert data.train == (root / "one, two.txt",) and data.names == ("class0", "class1", "class2")


UPSTREAM_SCRIPT = """\
# A yaml as YOLOv5 ships them
path: ../datasets/Elsewhere  # dataset root dir
train:  # train images (relative to 'path')  16551 images
  - images/train2012
  - images/train2007
val:  # val images
  - images/test2007
test:  # test images (optional)

# Classes
names:
  0: person
  1: "traffic light"

# Download script/URL (optional) ---------------------------------------------------------------------------------------
download: |
  import os
  open("ran", "w").write("it ran")
  os.system("touch ran")
"""
UPSTREAM_BASH = (
    "path: ../datasets/x\ntrain: images/train2017\nval: images/train2017\nnc: 1\nnames: ['a']\ndownload: bash data/scripts/get_x.sh\n"
)
UPSTREAM_URL = "path: ../datasets/x\ntrain: a\nval: b\ntest:\nnc: 2\nnames: ['a', 'b']\ndownload: https://localhost/x.zip\n"


@pytest.mark.parametrize(
    ("text", "shown", "names"),
    [
        (
            UPSTREAM_SCRIPT,
            'not run):\n    import os\n    open("ran", "w").write("it ran")\n',
            ("person", "traffic light"),
        ),
        (UPSTREAM_BASH, "not run): bash data/scripts/get_x.sh\n", ("a",)),
        (UPSTREAM_URL, "not run): https://localhost/x.zip\n", ("a", "b")),
    ],
)
def test_yolov5s_own_files_are_read_and_their_download_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, shown: str, names: tuple[str, ...]
) -> None:
    for module, name in ((os, "system"), (subprocess, "Popen")):
        monkeypatch.setattr(module, name, lambda *args, **kwargs: pytest.fail("ran a command"))
    monkeypatch.chdir(tmp_path)
    source = tmp_path / "set.yaml"
    source.write_text(text)
    assert read_data(source, splits=()).names == names
    with pytest.raises(InputError) as error:
        read_data(source)
    message = str(error.value)
    assert str(source) in message and shown in message and "images are missing: looked for" in message
    assert message.endswith("Nothing is downloaded, and nothing that the file says is run.")
    assert list(tmp_path.iterdir()) == [source]


def test_a_long_script_is_cut_and_escape_codes_are_left_out(tmp_path: Path) -> None:
    script = "".join(f"  line {k}\n" for k in range(60))
    (tmp_path / "set.yaml").write_text(f'path: x\ntrain: a\nval: b\nnames: [c]\nsource: "\\e[31mred\\a"\ndownload: |\n{script}')
    with pytest.raises(InputError) as error:
        read_data(tmp_path / "set.yaml")
    message = str(error.value)
    assert "get it from: [31mred\n" in message and message.replace("\n", "").isprintable()
    assert "    line 39\n    ... and 20 more lines\n" in message and "line 40" not in message


@pytest.mark.parametrize("name", SHIPPED)
def test_each_shipped_file_says_where_its_images_are_from(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text((ROOT / "data" / name).read_text().replace("../datasets/", "../no datasets/"))
    with pytest.raises(InputError) as error:
        read_data(tmp_path / name)
    lines = str(error.value).splitlines()
    assert lines[0].startswith(f"{tmp_path / name}: images are missing: looked for") and lines[1].startswith("  get it from: http")
    assert (name == "coco128.yaml") != lines[2].startswith("  then convert it: python -m data.convert ")


@pytest.mark.parametrize("name", SHIPPED)
def test_each_shipped_command_is_one_that_the_converter_takes(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It gets as far as missing its source: the flags are right."""
    from data.convert import main

    command = [line for line in (ROOT / "data" / name).read_text().splitlines() if "data.convert" in line]
    monkeypatch.chdir(tmp_path)
    for line in command:
        with pytest.raises(InputError, match="no such folder|no annotations|no Oxford hand dataset"):
            main(line.partition("data.convert ")[2].split())
    assert bool(command) == (name != "coco128.yaml")


def test_shipped_names() -> None:
    coco, voc = read_data("coco.yaml", ()), read_data("VOC.yaml", ())
    assert coco.names == read_data("coco128.yaml", ()).names and coco.nc == 80
    assert voc.nc == 20 and list(voc.names) == sorted(voc.names) and voc.names[::19] == ("aeroplane", "tvmonitor")
    assert [path.parts[-3:] for path in voc.val] == [("VOC", "images", "test2007")] and len(voc.train) == 4
    assert coco.train[0].parts[-3:] == ("datasets", "coco", "train2017.txt")
    assert read_data("oxfordhand.yaml", ()).names == read_data("oxfordhand.data", ()).names == ("hand",)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 2_000, "not a valid yaml"),
        (f"train: {'a' * 5000}\nval: b\nnames: [c]\n", "images are missing"),
        ('train: "a\\0b"\nval: b\nnames: [c]\n', "images are missing"),
        ("train: [[a]]\nval: b\nnames: [c]\n", "`train` must be a path or a list of paths"),
        ("train: a\nval: b\nnames: [c]\ndownload: [d]\n", "`download` must be one value"),
    ],
)
def test_hostile_yaml(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "set.yaml").write_text(text)
    with pytest.raises(InputError, match=message):
        read_data(tmp_path / "set.yaml")
