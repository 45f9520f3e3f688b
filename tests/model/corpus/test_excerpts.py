import json
from pathlib import Path

import pytest

import model.evaluation
from model.corpus.errors import BuildError
from model.corpus.excerpts import LONGEST_LICENCE, excerpts
from model.corpus.recipe import load_recipe
from model.corpus.write import CorpusWriter
from model.training.data import read_documents
from tests.model.corpus.test_build import WHEELS, made


@pytest.fixture
def built(tmp_path):
    made(tmp_path)
    return tmp_path / "out"


SIZE = len(WHEELS["attrs", "1"]["attrs/module_0.py"])


def test_excerpts_are_of_what_no_model_was_trained_on(built, tmp_path):
    figures = excerpts(built, tmp_path / "excerpts", 9 * SIZE)
    documents = read_documents(tmp_path / "excerpts" / "code.txt.xz")
    assert documents == [WHEELS["attrs", "1"][f"attrs/module_{number}.py"] for number in range(3)]
    assert figures["code"] == {"documents": 3, "bytes": sum(map(len, documents)) + 3}


def test_long_documents_are_cut_and_the_whole_keeps_to_its_size(built, tmp_path):
    figures = excerpts(built, tmp_path / "excerpts", 4 * SIZE)
    documents = read_documents(tmp_path / "excerpts" / "code.txt.xz")
    assert len(documents) == 3
    for number, document in enumerate(documents):
        assert SIZE // 4 <= len(document) < SIZE // 2
        assert WHEELS["attrs", "1"][f"attrs/module_{number}.py"].startswith(document)
    assert all(figure["bytes"] <= 4 * SIZE for figure in figures.values())


def corpus_by_hand(folder, licences):
    """Twenty documents of 100 bytes of ``group/many``, two of each other source, and their licence files."""
    folder.mkdir()
    with CorpusWriter(folder) as writer:
        for name in licences:
            for number in range(20 if name == "many" else 2):
                path = f"group/{name}/document-{number}"
                writer.add("prose", "test", path, f"{path:<98}.\n".encode())
    sources = [{"path": f"group/{name}", "name": name, "version": "1", "licence": "MIT"} for name in licences]
    (folder / "manifest.json").write_text(json.dumps({"domains": {"prose": {}}, "sources": sources}))
    (folder / "licences").mkdir()
    for name, size in licences.items():
        if size is not None:
            (folder / "licences" / f"{name}.txt").write_text("x" * size)
    return folder


def test_sources_take_turns(tmp_path):
    built = corpus_by_hand(tmp_path / "built", {"few": 10, "many": 10})
    assert excerpts(built, tmp_path / "excerpts", 808)["prose"] == {"documents": 8, "bytes": 808}
    names = [text.split(b"/")[1] for text in read_documents(tmp_path / "excerpts" / "prose.txt.xz")]
    assert names == [b"few"] * 2 + [b"many"] * 6


def test_sources_whose_licence_is_missing_or_too_long_to_ship_are_passed_over(tmp_path):
    built = corpus_by_hand(tmp_path / "built", {"long": LONGEST_LICENCE + 1, "missing": None, "short": LONGEST_LICENCE})
    assert excerpts(built, tmp_path / "excerpts", 10_000)["prose"]["documents"] == 2
    assert [path.name for path in (tmp_path / "excerpts" / "licences").iterdir()] == ["short.txt"]


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


SHIPPED = Path(model.evaluation.__file__).with_name("excerpts")


@pytest.mark.parametrize("domain", list(load_recipe().domain))
def test_an_excerpt_of_each_domain_is_shipped(domain):
    documents = read_documents(SHIPPED / f"{domain}.txt.xz")
    assert len(documents) >= 8
    assert 30_000 <= sum(map(len, documents)) <= 40_000
    limits = load_recipe().domain[domain]
    assert all(max(map(len, document.split(b"\n"))) <= limits.max_line for document in documents)


def test_the_shipped_notice_names_only_packages_of_the_recipe_and_their_licences_are_shipped():
    rows = [line.split(" | ") for line in (SHIPPED / "NOTICE.md").read_text().splitlines() if line.endswith("` |")]
    named = {row[0].removeprefix("| ") for row in rows}
    assert len(rows) == sum(len(read_documents(path)) for path in SHIPPED.glob("*.txt.xz"))
    sources = {source.name: source for source in load_recipe().sources()}
    assert named <= set(sources)
    shipped = {path.stem for path in (SHIPPED / "licences").iterdir()}
    assert shipped == {Path(sources[name].path).name for name in named}
