import hashlib
from collections import Counter

import pytest

from model.corpus.split import is_unseen, rank, split_of


@pytest.mark.parametrize(
    ("path", "split"),
    [
        ("py_pkgs/aiohttp/aiohttp/cookiejar.py", "train"),
        ("py_pkgs/aiohttp/aiohttp/base_protocol.py", "valid"),
        ("py_docs/python3.11-doc/usr/share/doc/python3.11/html/_sources/license.rst.txt", "test"),
    ],
)
def test_the_split_of_a_path_never_changes(path, split):
    assert split_of(path) == split


def test_the_shares_of_the_splits():
    counts = Counter(split_of(f"group/package/{number}") for number in range(50_000))
    assert counts["test"] / 50_000 == pytest.approx(0.02, abs=0.003)
    assert counts["valid"] / 50_000 == pytest.approx(0.02, abs=0.003)
    assert set(counts) == {"train", "valid", "test"}


def test_about_a_tenth_of_the_projects_is_unseen():
    names = [f"project-{number}" for number in range(2000)]
    assert sum(map(is_unseen, names)) / 2000 == pytest.approx(26 / 256, abs=0.02)
    assert all(is_unseen(name) == (hashlib.sha256(name.encode()).digest()[0] < 26) for name in names)


def test_the_order_of_ranks_is_not_the_order_of_splits():
    names = sorted((f"group/package/{number}" for number in range(20_000)), key=rank)
    first = sum(split_of(name) == "test" for name in names[:10_000])
    assert first / 10_000 == pytest.approx(0.02, abs=0.006)
