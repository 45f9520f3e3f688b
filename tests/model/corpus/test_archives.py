import pytest

from model.corpus.archives import read_files
from model.corpus.errors import BuildError
from tests.model.corpus.packages import needs_dpkg, write_deb, write_wheel

FILES = {"a/b.py": b"b", "a/c.txt": b"c" * 70_000, "d.py": b"d"}


def is_python(path):
    return path.endswith(".py")


def test_files_of_a_wheel(tmp_path):
    wheel = write_wheel(tmp_path / "x.whl", FILES)
    assert dict(read_files(wheel, lambda path: True)) == FILES
    assert list(read_files(wheel, is_python)) == [("a/b.py", b"b"), ("d.py", b"d")]


@needs_dpkg
def test_files_of_a_debian_package(tmp_path):
    deb = write_deb(tmp_path / "x.deb", FILES)
    assert dict(read_files(deb, lambda path: True)) == FILES
    assert list(read_files(deb, is_python)) == [("a/b.py", b"b"), ("d.py", b"d")]


def test_a_damaged_wheel(tmp_path):
    path = write_wheel(tmp_path / "x.whl", FILES)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(BuildError, match=r"cannot read .*x\.whl"):
        list(read_files(path, is_python))


@needs_dpkg
@pytest.mark.parametrize("size", [0, 50, 500, -6])
def test_a_damaged_debian_package(tmp_path, size):
    path = write_deb(tmp_path / "x.deb", FILES)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(BuildError, match=r"cannot read .*x\.deb"):
        list(read_files(path, is_python))
