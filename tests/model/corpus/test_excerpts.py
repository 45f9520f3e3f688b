import pytest

from model.corpus.errors import BuildError
from model.corpus.excerpts import excerpts
from model.training.data import read_documents
from tests.model.corpus.test_build import WHEELS, made


@pytest.fixture
def built(tmp_path):
    made(tmp_path)
    return tmp_path / "out"


def test_excerpts_are_whole_documents_that_no_model_was_trained_on(built, tmp_path):
    size = len(WHEELS["attrs", "1"]["attrs/module_0.py"])
    figures = excerpts(built, tmp_path / "excerpts", 4 * size + 2)
    documents = read_documents(tmp_path / "excerpts" / "code.txt.xz")
    assert documents == [WHEELS["attrs", "1"][f"attrs/module_{number}.py"] for number in range(3)]
    assert figures["code"] == {"documents": 3, "bytes": sum(map(len, documents)) + 3}
    assert read_documents(tmp_path / "excerpts" / "code.txt.xz")


def test_excerpts_keep_to_their_size(built, tmp_path):
    size = len(WHEELS["attrs", "1"]["attrs/module_0.py"])
    figures = excerpts(built, tmp_path / "excerpts", 4 * size)
    assert figures["code"]["documents"] == 3
    assert excerpts(built, tmp_path / "smaller", 3 * size)["code"]["documents"] == 0


def test_the_notice_names_every_document_and_the_licences_are_there(built, tmp_path):
    excerpts(built, tmp_path / "excerpts", 40_000)
    notice = (tmp_path / "excerpts" / "NOTICE.md").read_text()
    for number in range(3):
        assert f"| attrs | 1 | MIT | `attrs/module_{number}.py` |" in notice
    assert "## tables" in notice
    assert "Licence of attrs" in (tmp_path / "excerpts" / "licences" / "attrs.txt").read_text()
    assert not (tmp_path / "excerpts" / "licences" / "beta.txt").exists()


def test_what_is_not_a_corpus_is_refused_and_nothing_is_overwritten(built, tmp_path):
    with pytest.raises(BuildError, match="not a built corpus"):
        excerpts(tmp_path, tmp_path / "excerpts", 1000)
    with pytest.raises(BuildError, match="exists"):
        excerpts(built, built, 1000)
