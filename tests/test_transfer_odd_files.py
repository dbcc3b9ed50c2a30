"""Files from elsewhere where the commands of transfer expect a checkpoint, labels or names of classes."""

from __future__ import annotations

import os

import pytest
import torch

from scrl_fast.data.sources.layout import visible
from scrl_fast.data.sources.yolo_layout import _names_beside, _read
from scrl_fast.errors import UsageError
from scrl_fast.transfer.compare.rows import fingerprint_of
from scrl_fast.transfer.trained import sizes_of
from scrl_fast.weights.pickles import ForeignObjectError

HTML = "<!DOCTYPE html><html>\nsign in\n"
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="named pipes")
def test_a_start_that_is_a_pipe_or_a_device_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "start.pt")
    assert fingerprint_of(str(tmp_path / "start.pt")) == "no checkpoint"  # returns at all
    assert fingerprint_of("/dev/zero") == "no checkpoint"


@pytest.mark.parametrize("detector", ["faster_rcnn", "retinanet"])
def test_a_detectors_scores_without_rows_are_no_classes(detector):
    names = ("roi_heads.box_predictor.cls_score.weight", "head.classification_head.cls_logits.weight")
    assert sizes_of(detector, dict.fromkeys(names, torch.tensor(1.0)))[0] == 1
    assert sizes_of(detector, dict.fromkeys(names, 3))[0] == 1


@pytest.mark.parametrize(("content", "kind"), [(HTML, "HTML"), (LFS, "Git LFS")])
def test_a_page_in_place_of_class_names_is_named(tmp_path, content, kind):
    (tmp_path / "classes.txt").write_text(content)
    with pytest.raises(UsageError, match=rf"classes\.txt holds no names of classes: .*{kind}"):
        _names_beside([str(tmp_path)])


@pytest.mark.parametrize("content", ["", "[1, 2]", "plain words"])
def test_a_data_yaml_that_is_no_table_is_named(tmp_path, content):
    (tmp_path / "data.yaml").write_text(content)
    with pytest.raises(UsageError, match=r"data\.yaml is no table"):
        _read(str(tmp_path / "data.yaml"))
    (tmp_path / "other.yaml").write_text(content)
    assert _read(str(tmp_path / "other.yaml")) is None


def test_a_folder_that_cannot_be_listed_is_named(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "listdir", refuse)
    with pytest.raises(UsageError, match="cannot be listed: Permission denied"):
        visible(str(tmp_path))


def test_a_class_name_of_a_pickle_can_be_printed():
    str(ForeignObjectError("\ud800.x")).encode()
