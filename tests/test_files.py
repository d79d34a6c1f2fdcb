"""Files: never half-written, never through a link, never a pipe, and locked by one process at a time."""

import os
import socket

import pytest

from nanogpt import files


@pytest.fixture
def victim(tmp_path):
    """A file that a link leads to, and that must stay as it is."""
    path = tmp_path / "victim"
    path.write_text("mine")
    return path


def test_a_file_is_replaced_whole_and_leaves_no_other(tmp_path):
    path = tmp_path / "x"
    for data in (b"one", b"other"):
        files.write(path, data)
        assert path.read_bytes() == data and os.listdir(tmp_path) == ["x"]
    with pytest.raises(TypeError):
        files.write(path, 5)
    assert path.read_bytes() == b"other" and os.listdir(tmp_path) == ["x"]


def test_neither_a_file_nor_its_temporary_name_is_followed_as_a_link(tmp_path, victim):
    path = tmp_path / "x"
    for link in (path, files.temporary(path)):
        link.symlink_to(victim)
    files.write(path, b"new")
    assert victim.read_text() == "mine" and path.read_bytes() == b"new" and not path.is_symlink()
    path.unlink()
    path.symlink_to(victim)
    with files.create(path) as f:
        f.write(b"new")
    assert victim.read_text() == "mine"
    path.unlink()
    path.symlink_to(victim)
    with pytest.raises(OSError):
        files.append_to(path)


def test_only_regular_files_are_opened(tmp_path, victim):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero"):
        for opened in (files.read, files.append_to, lambda path: files.Lock(path).take()):
            with pytest.raises(OSError):
                opened(path)
    with pytest.raises(IsADirectoryError):
        files.read(tmp_path)
    (tmp_path / "link").symlink_to(victim)  # data may lie on another disk
    assert files.read(tmp_path / "link") == b"mine"


def test_a_lock_is_one_holders_until_it_is_released(tmp_path):
    first, second = files.Lock(tmp_path / "lock"), files.Lock(tmp_path / "lock")
    first.take(create=False)  # there is none yet
    assert not os.listdir(tmp_path)
    with first:
        first.take()
        first.sign()
        with pytest.raises(BlockingIOError, match=f"process {os.getpid()} on {socket.gethostname()}"):
            second.take()
        with pytest.raises(BlockingIOError):
            second.take(create=False)
    with second:
        second.take()


def test_a_file_that_takes_anothers_place_is_another(tmp_path):
    path = tmp_path / "x"
    with open(path, "w") as f:
        assert files.identity(path) == files.identity(f.fileno())
        path.unlink()
        assert files.identity(path) is None
        path.write_text("")
        assert files.identity(path) != files.identity(f.fileno())


def make_file(path):
    path.write_text("whole")


def make_folder(path):
    path.mkdir()
    (path / "part").write_text("whole")


@pytest.mark.parametrize("make", [make_file, make_folder])
def test_what_is_made_appears_when_it_is_whole(tmp_path, make):
    path = tmp_path / "new" / "x"
    with pytest.raises(KeyboardInterrupt), files.whole(path) as new:
        make(new)
        assert not path.exists()
        raise KeyboardInterrupt
    assert not list(path.parent.iterdir())
    make_folder(path.with_name(".x.tmp"))  # what a killed process left
    with files.whole(path) as new:
        assert not new.exists()
        make(new)
    assert [p.name for p in path.parent.iterdir()] == ["x"] and path.is_dir() == (make is make_folder)
