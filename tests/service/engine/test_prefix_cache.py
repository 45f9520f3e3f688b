from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from service.engine.prefix_cache import PrefixCache, Snapshot, extend_key, first_key


def test_keys_differ_by_everything_that_a_state_depends_on() -> None:
    keys = [
        extend_key(extend_key(first_key(salt), [*one], rate, depth), [*other], last, depth)
        for salt, one, other, rate, last, depth in itertools.product(
            ["", "a"], [b"ab", b"aa"], [b"c", b"d"], [1.0, 0.5], [1.0, 0.5], [None, 1, 2]
        )
    ]
    assert len(set(keys)) == len(keys)


def extend(text: str) -> bytes:
    return extend_key(first_key(""), [ord(character) for character in text], 1.0, None)


def test_the_least_recently_used_snapshot_goes_first() -> None:
    cache: PrefixCache[str] = PrefixCache(20)
    for text in "abc":
        cache.store(extend(text), Snapshot(text, 1, 0, 8))
        cache.find(extend("a"))
    assert [cache.find(extend(text)) is not None for text in "abc"] == [True, False, True]
    cache.check_integrity()


def test_a_snapshot_that_is_too_large_is_not_kept() -> None:
    cache: PrefixCache[str] = PrefixCache(5)
    cache.store(extend("a"), Snapshot("a", 1, 0, 6))
    assert cache.find(extend("a")) is None
    assert cache.nbytes == 0


@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(1, 9))), st.integers(0, 20))
def test_bytes_stay_within_bounds(stores: list[tuple[str, int]], limit: int) -> None:
    cache: PrefixCache[str] = PrefixCache(limit)
    for text, size in stores:
        cache.store(extend(text), Snapshot(text, 1, 0, size))
        cache.check_integrity()
