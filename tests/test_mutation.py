from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.mutation import MUTATIONS, ROOT, Mutation, MutationError


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_every_fault_still_fits_the_source(mutation: Mutation, tmp_path: Path) -> None:
    copy = tmp_path / mutation.file
    copy.parent.mkdir(parents=True)
    shutil.copy(ROOT / mutation.file, copy)
    mutation.apply(tmp_path)
    compile(copy.read_text(encoding="utf-8"), mutation.file, "exec")
    assert copy.read_bytes() != (ROOT / mutation.file).read_bytes()
    assert all((ROOT / test).exists() for test in mutation.tests)


def test_a_fault_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    (tmp_path / "code.py").write_text("same = same\n")
    for old, count in (("same", 2), ("gone", 0)):
        with pytest.raises(MutationError, match=f"occurs {count} times"):
            Mutation("none", "code.py", old, "other", ()).apply(tmp_path)
    assert (tmp_path / "code.py").read_text() == "same = same\n"
