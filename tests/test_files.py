"""A file is either whole or absent."""

import errno
import json
import os
import stat

import pytest

from byol_timm.errors import ByolTimmError
from byol_timm.files import write_json, write_whole


def test_a_file_is_replaced_whole_and_nothing_else_is_left(tmp_path):
    path = tmp_path / "values.json"
    write_whole(path, b"old")
    write_json(path, {"name": "naïve ☃", "values": [1, 0.5]})
    assert json.loads(path.read_text("utf-8")) == {"name": "naïve ☃", "values": [1, 0.5]}
    assert "☃" in path.read_text("utf-8")
    assert os.listdir(tmp_path) == ["values.json"]


def test_others_may_read_a_file_as_the_umask_says(tmp_path):
    before = os.umask(0o027)
    try:
        write_whole(tmp_path / "file", b"")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640


@pytest.mark.parametrize(
    "code, reason", [(errno.ENOSPC, "disk full while writing"), (errno.EIO, "cannot write .*Input/output error")]
)
def test_a_disk_that_fails_leaves_the_old_content_and_is_one_line(tmp_path, monkeypatch, code, reason):
    write_whole(tmp_path / "file", b"old")

    def fail(descriptor):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(ByolTimmError, match=reason) as caught:
        write_whole(tmp_path / "file", b"new")
    assert "\n" not in str(caught.value)
    assert (tmp_path / "file").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_numbers_that_json_lacks_are_refused_and_write_nothing(tmp_path):
    with pytest.raises(ValueError):
        write_json(tmp_path / "file", float("nan"))
    assert not list(tmp_path.iterdir())
