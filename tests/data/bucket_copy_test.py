"""The copy of prepared data on this machine, between directories of a disk."""

import os
from pathlib import Path

import pytest
from etils import epath

from dqe_jax.data import bucket
from dqe_jax.utils.errors import UserError


@pytest.fixture
def sides(tmp_path, monkeypatch):
    """A directory that stands for a bucket's, and that of its copy."""
    remote, local = epath.Path(tmp_path / "remote"), epath.Path(tmp_path / "local")
    monkeypatch.setattr(bucket, "is_remote", lambda path: str(path).startswith(str(remote)))
    monkeypatch.setattr(bucket, "local_of", lambda path: local)
    return remote, local


def fill(root, text="1"):
    folder = root / "shapes" / "plain" / "1.0.0"
    (folder / "index").mkdir(parents=True)
    (folder / "dataset_info.json").write_text(text)
    (folder / "train.array_record").write_text(text * 10)
    (folder / "index" / "gallery.json").write_text("{}")
    left = root / "shapes" / "plain" / "incomplete.X_1.0.0"
    left.mkdir()
    (left / "train.array_record").write_text("half")
    return folder


def files(root):
    return sorted(str(p.relative_to(root)) for p in Path(root).rglob("*") if p.is_file())


EXPECTED = [
    f"shapes/plain/1.0.0/{name}"
    for name in ("dataset_info.json", "index/gallery.json", "train.array_record")
]


def test_a_data_set_is_copied_once_both_ways(sides, monkeypatch):
    remote, local = sides
    fill(local)
    bucket.send(remote, "shapes")
    assert files(remote) == EXPECTED
    (local / "shapes").rmtree()
    bucket.fetch(remote, "shapes")
    assert files(local) == EXPECTED

    def refuse(*_, **__):
        raise AssertionError("copied again")

    monkeypatch.setattr(type(remote), "copy", refuse)
    bucket.fetch(remote, "shapes")
    bucket.fetch(remote, "fashioniq")  # which is not there


def test_other_data_and_half_a_copy_are_copied_again(sides):
    remote, local = sides
    folder, copy = fill(remote), local / "shapes" / "plain" / "1.0.0"
    bucket.fetch(remote, "shapes")
    (copy / "train.array_record").write_text("half")
    (copy / "dataset_info.json").unlink()
    bucket.fetch(remote, "shapes")
    assert (copy / "train.array_record").read_text() == "1" * 10
    (folder / "dataset_info.json").write_text("2")
    (folder / "train.array_record").write_text("2" * 10)
    bucket.fetch(remote, "shapes")
    assert (copy / "train.array_record").read_text() == "2" * 10
    assert (copy / "dataset_info.json").read_text() == "2"


def test_a_copy_that_fails_is_told_and_does_not_count(sides, monkeypatch):
    remote, local = sides
    fill(remote)
    copy = type(remote).copy

    def fail(self, to, **kwargs):
        if self.name == "train.array_record":
            raise OSError("the cable is out")
        return copy(self, to, **kwargs)

    monkeypatch.setattr(type(remote), "copy", fail)
    with pytest.raises(UserError, match=r"remote.*cannot be copied to .*\(the cable is out\): see"):
        bucket.fetch(remote, "shapes")
    assert not (local / "shapes" / "plain" / "1.0.0" / "dataset_info.json").exists()


def test_two_processes_of_a_machine_copy_the_same_at_once(sides, monkeypatch):
    """An evaluator beside a trainer: whoever ends last finds nothing that it lacks."""
    remote, local = sides
    fill(remote)
    copy = type(remote).copy

    def copy_while_another_one_does(self, to, **kwargs):
        made = copy(self, to, **kwargs)
        monkeypatch.setattr(type(remote), "copy", copy)
        with monkeypatch.context() as patch:
            patch.setattr(os, "getpid", lambda: 4711)
            bucket.fetch(remote, "shapes")
        return made

    monkeypatch.setattr(type(remote), "copy", copy_while_another_one_does)
    bucket.fetch(remote, "shapes")
    assert files(local) == EXPECTED


def test_directories_of_a_disk_are_taken_as_they_are(tmp_path):
    assert bucket.local_of(tmp_path) == epath.Path(tmp_path)
    bucket.fetch(tmp_path, "shapes")
    bucket.send(tmp_path, "shapes")
    assert not list(tmp_path.iterdir())
    place = bucket.local_of("gs://bucket/data")
    assert str(place).endswith(".cache/dqe_jax/buckets/gs/bucket/data")
