"""Paths on disks and in buckets."""

import os

import fsspec
import pytest

from dqe_jax.utils import paths

pytestmark = pytest.mark.core


@pytest.mark.parametrize(
    ("path", "whole"),
    [
        ("gs://bucket/run", "gs://bucket/run"),
        ("/somewhere/run", "/somewhere/run"),
        ("runs/x", os.path.join(os.getcwd(), "runs/x")),
        ("~/x", os.path.expanduser("~/x")),
    ],
)
def test_whole_path(path, whole):
    found = paths.whole_path(path)
    assert os.fspath(found) == whole
    assert os.fspath(found / "checkpoints") == f"{whole}/checkpoints"
    assert paths.is_remote(found) == path.startswith("gs://")


def test_listings_of_buckets_are_not_kept(monkeypatch):
    monkeypatch.setattr(fsspec.config, "conf", {})
    paths.look_anew()
    assert fsspec.config.conf == {"gcs": {"use_listings_cache": False}}
