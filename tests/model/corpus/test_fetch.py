import pytest

from model.corpus.errors import BuildError
from model.corpus.fetch import Fetcher
from model.corpus.recipe import Group, Pin, Source
from tests.model.corpus.packages import Registry

FILES = {"one/a.py": b"x = 1\n"}


def source(kind="pypi", version="1.0", sha256=None, name="one", group_name="wheels"):
    pin = Pin(version=version, licence="MIT", sha256=sha256)
    return Source(name, group_name, Group(domain="code", kind=kind, include=("*.py",), sources={name: pin}), pin)


def test_a_wheel_is_fetched_once_at_its_version_and_for_one_platform(tmp_path):
    registry = Registry(wheels={("one", "1.0"): FILES})
    fetched = [Fetcher(tmp_path, registry).fetch(source()) for _ in range(2)]
    assert fetched[0] == fetched[1]
    assert fetched[0].version == "1.0"
    assert len(registry.commands) == 1
    command = registry.commands[0]
    assert command[-1] == "one==1.0"
    assert {"--no-deps", "--only-binary", "--python-version"} <= set(command)


def test_a_wheel_that_is_not_the_expected_one_is_an_error(tmp_path):
    fetcher = Fetcher(tmp_path, Registry(wheels={("one", "1.0"): FILES}))
    right = fetcher.fetch(source()).sha256
    assert fetcher.fetch(source(sha256=right)).sha256 == right
    with pytest.raises(BuildError, match="expects 0000"):
        fetcher.fetch(source(sha256="0" * 64))


def test_a_debian_package_that_is_not_the_expected_one_is_taken(tmp_path):
    fetcher = Fetcher(tmp_path, Registry(debs={("one", "1:1.0-1"): FILES}))
    archive = fetcher.fetch(source("debian", "1:1.0-1", sha256="0" * 64))
    assert archive.version == "1:1.0-1"
    assert archive.sha256 != "0" * 64


def test_a_debian_version_that_has_vanished_is_replaced_by_the_newest(tmp_path):
    registry = Registry(debs={("one", "1:1.0-2"): FILES, ("one", "1:1.0-3"): FILES})
    assert Fetcher(tmp_path, registry).fetch(source("debian", "1:1.0-1")).version == "1:1.0-3"
    assert [command[-1] for command in registry.commands] == ["one=1:1.0-1", "one"]
    again = Registry()
    assert Fetcher(tmp_path, again).fetch(source("debian", "1:1.0-1")).version == "1:1.0-3"
    assert again.commands == []


@pytest.mark.parametrize("kind", ["pypi", "debian"])
def test_a_failure_says_what_the_tool_said_and_leaves_nothing(tmp_path, kind):
    with pytest.raises(BuildError, match=r"cannot fetch one 1\.0: ERROR: no such package: one .*reachable"):
        Fetcher(tmp_path, Registry()).fetch(source(kind))
    assert [path for path in tmp_path.rglob("*") if path.name != kind] == []


def test_what_was_fetched_before_a_failure_stays(tmp_path):
    registry = Registry(wheels={("one", "1.0"): FILES})
    with pytest.raises(BuildError, match="two"):
        Fetcher(tmp_path, registry).fetch_all([source(), source(name="two")], jobs=1)
    registry.commands.clear()
    assert list(Fetcher(tmp_path, registry).fetch_all([source()], jobs=1)) == ["wheels/one"]
    assert registry.commands == []


def test_an_archive_that_two_groups_read_is_fetched_once(tmp_path):
    registry = Registry(wheels={("one", "1.0"): FILES})
    archives = Fetcher(tmp_path, registry).fetch_all([source(), source(group_name="tables")], jobs=4)
    assert archives["wheels/one"] == archives["tables/one"]
    assert len(registry.commands) == 1


def test_a_cache_that_was_tampered_with_is_an_error(tmp_path):
    fetcher = Fetcher(tmp_path, Registry(wheels={("one", "1.0"): FILES}))
    (fetcher.fetch(source()).path.parent / "another").touch()
    with pytest.raises(BuildError, match="holds 2 files"):
        fetcher.fetch(source())
