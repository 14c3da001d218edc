"""What exported files say about themselves, and the line about a missing package."""

from __future__ import annotations

import pytest

from models.metadata import Metadata
from utils.errors import InputError
from utils.extras import require


@pytest.mark.parametrize(
    "metadata",
    [
        Metadata(("a",), 32, (640, 640)),
        Metadata(("héron", 'quoted "name"', "1"), 64, (320, 448), 1, 8, True, True, 0.001, 0.6, 300),
        Metadata(("x", "y"), 32, (224, 224), task="classify"),
    ],
)
def test_metadata_survives_as_strings(metadata: Metadata) -> None:
    props = metadata.to_props()
    assert all(isinstance(value, str) for value in props.values())
    assert Metadata.from_props(props, (1, 1), "m.onnx") == metadata


def test_the_metadata_of_yolov5_is_read() -> None:
    props = {"stride": "32", "names": "{0: 'person', 1: \"traffic's light\", 10: 'c'}", "author": "someone"}
    assert Metadata.from_props(props, (320, 640), "m.onnx") == Metadata(("person", "traffic's light", "c"), 32, (320, 640))
    assert Metadata.from_props({"stride": "32", "names": "['a', 'b']", "imgsz": "640"}, (1, 1), "m").imgsz == (640, 640)


@pytest.mark.parametrize(
    ("props", "line"),
    [
        ({}, "m.onnx: has no names in its metadata"),
        ({"names": "['a']"}, "m.onnx: has no stride in its metadata"),
        ({"names": "__import__('os').getcwd()", "stride": "32"}, "m.onnx: its metadata names=.* cannot be read"),
        ({"names": "['a']", "stride": "[1]"}, "m.onnx: its metadata cannot be understood"),
        ({"names": "3", "stride": "32"}, "m.onnx: its metadata cannot be understood"),
    ],
)
def test_wrong_metadata_is_one_line(props: dict[str, str], line: str) -> None:
    with pytest.raises(InputError, match=line):
        Metadata.from_props(props, (64, 64), "m.onnx")


def test_a_missing_package_is_one_line() -> None:
    assert require("json", "reading") is __import__("json")
    with pytest.raises(InputError, match="export to ONNX needs the package no_such_package: pip install -r requirements-export.txt"):
        require("no_such_package", "export to ONNX")
