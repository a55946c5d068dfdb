"""Files that are written at once, directories that are moved: on a disk."""

from etils import epath

from dqe_jax.utils import files


def test_a_file_is_written_at_once_over_an_old_one(tmp_path):
    path = epath.Path(tmp_path) / "file"
    for content in ("text é", b"\x00bytes"):
        files.write_at_once(path, content)
        assert path.read_bytes() == (content.encode() if isinstance(content, str) else content)
    assert [found.name for found in path.parent.iterdir()] == ["file"]


def test_a_directory_is_moved(tmp_path):
    source = epath.Path(tmp_path) / "6"
    (source / "params").mkdir(parents=True)
    (source / "params" / "a").write_text("a")
    files.move_directory(source, source.with_name("6.damaged"))
    assert not source.exists()
    assert (tmp_path / "6.damaged" / "params" / "a").read_text() == "a"
