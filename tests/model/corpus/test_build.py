import json
import lzma

import pytest

from model.corpus import build as module
from model.corpus.build import Build, build
from model.corpus.errors import BuildError
from model.corpus.fetch import Fetcher
from model.corpus.recipe import Recipe
from model.corpus.split import split_of
from model.training.data import Corpus, read_documents
from tests.model.corpus.packages import Registry, needs_dpkg


def module_text(seed, count=12):
    return "".join(
        f"def function_{seed}_{number}(argument):\n    return argument + value_{seed}_{number} + something\n"
        for number in range(count)
    ).encode()


def project(name, count):
    files = {f"{name}/module_{number}.py": module_text(f"{name}_{number}") for number in range(count)}
    return {f"{name}-1.dist-info/licenses/LICENSE": f"Licence of {name}".encode(), **files}


WHEELS = {
    ("beta", "1"): project("beta", 120),
    ("attrs", "1"): {**project("attrs", 3), "attrs/copied.py": project("beta", 1)["beta/module_0.py"] + b"# end\n"},
    ("zeta", "1"): {
        **project("zeta", 4),
        "zeta/tests/module.py": module_text("test"),
        "zeta/short.py": b"x = 1\n",
        "zeta/latin.py": b"# \xe4\n" * 100,
        "zeta/copy.py": project("zeta", 1)["zeta/module_0.py"],
        "zeta/nearly.py": project("zeta", 1)["zeta/module_0.py"] + b"# end\n",
        "zeta/data.csv": b"a,b\n" * 5000,
    },
}
GROUP = {"kind": "pypi", "include": ("*.py",), "exclude": ("*/tests/*",)}


def pins(*names):
    return {name: {"version": "1", "licence": "MIT"} for name in names}


RECIPE = Recipe.model_validate(
    {
        "domain": {"code": {"repeats": "lines"}, "tables": {"splits": False, "part_bytes": 4096}},
        "group": {
            "wheels": {"domain": "code", **GROUP, "unseen_projects": True, "sources": pins("attrs", "beta", "zeta")},
            "csv": {"domain": "tables", **GROUP, "include": ("*.csv",), "sources": pins("zeta")},
        },
    }
)


def made(folder, recipe=RECIPE, registry=None, **settings):
    cache = folder / "cache"
    fetcher = Fetcher(cache, registry or Registry(WHEELS))
    return build(Build(folder / "out", cache, **settings), recipe, fetcher)


def index(folder, name):
    rows = lzma.decompress((folder / "out" / f"{name}.index.tsv.xz").read_bytes()).decode().splitlines()
    return [(path, int(start), int(size)) for path, start, size in (row.split("\t") for row in rows)]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    return folder, made(folder)


def test_each_document_is_in_the_split_of_its_path_whole_and_followed_by_a_nul(built):
    folder, manifest = built
    seen = set()
    for split in ("train", "valid", "test"):
        text = lzma.decompress((folder / "out" / f"code.{split}.txt.xz").read_bytes())
        rows = index(folder, f"code.{split}")
        assert rows
        for path, start, size in rows:
            assert split_of(path) == split
            group, package, name = path.split("/", 2)
            assert group == "wheels"
            assert text[start : start + size] == WHEELS[package, "1"][name]
            assert text[start + size] == 0
        assert sum(size + 1 for _, _, size in rows) == len(text) == manifest["files"][f"code.{split}"]["bytes"]
        seen |= {path for path, _, _ in rows}
    assert seen == {f"wheels/beta/beta/module_{number}.py" for number in range(120)} | {
        f"wheels/zeta/zeta/module_{number}.py" for number in range(1, 4)
    } | {"wheels/zeta/zeta/copy.py"}


def test_a_project_that_is_set_apart_is_whole_and_only_there_and_without_what_others_have(built):
    folder, _ = built
    paths = [path for path, _, _ in index(folder, "code.unseen_projects")]
    assert paths == [f"wheels/attrs/attrs/module_{number}.py" for number in range(3)]


def test_training_reads_the_result(built):
    folder, _ = built
    assert [domain.name for domain in Corpus.open(folder / "out", "train").domains] == ["code"]
    assert len(read_documents(folder / "out" / "code.unseen_projects.txt.xz")) == 3
    assert Corpus.open(folder / "out", "test").batch(0, 0, 2, 64).shape == (2, 65)


def test_a_domain_for_evaluation_has_only_a_test_split_and_long_documents_in_parts(built):
    folder, manifest = built
    assert [name for name in manifest["files"] if name.startswith("tables")] == ["tables.test"]
    documents = read_documents(folder / "out" / "tables.test.txt.xz")
    assert all(len(document) <= 8192 for document in documents)
    # The parts are equal but for the last one.
    assert len(documents) == 2
    assert manifest["domains"]["tables"]["documents"]["dropped"] == {"equal_document": 3}


def test_the_manifest_adds_up(built):
    _, manifest = built
    for kind in ("documents", "bytes"):
        for figures in [*manifest["domains"].values(), *manifest["sources"]]:
            assert figures[kind]["found"] == figures[kind]["kept"] + sum(figures[kind]["dropped"].values())
        for domain, figures in manifest["domains"].items():
            files = [each for name, each in manifest["files"].items() if name.startswith(f"{domain}.")]
            ends = sum(each["documents"] for each in files) if kind == "bytes" else 0
            assert figures[kind]["kept"] == sum(each[kind] for each in files) - ends
            own = [source for source in manifest["sources"] if source["domain"] == domain]
            assert figures[kind]["kept"] == sum(source[kind]["kept"] for source in own)
            assert figures[kind]["kept"] == sum(split[kind] for source in own for split in source["splits"].values())


def test_the_manifest_says_why_documents_are_missing(built):
    _, manifest = built
    zeta = next(source for source in manifest["sources"] if source["name"] == "zeta" and source["domain"] == "code")
    assert zeta["documents"] == {
        "found": 9,
        "kept": 4,
        "dropped": {"equal_document": 1, "excluded_path": 1, "mostly_seen": 1, "not_utf8": 1, "too_short": 1},
    }
    assert zeta["licence"] == "MIT"
    assert len(zeta["sha256"]) == 64
    found = sum(len(text) for name, text in WHEELS["zeta", "1"].items() if name.endswith(".py"))
    assert zeta["bytes"]["found"] == found


def test_bytes_taken_out_of_kept_documents_are_counted(tmp_path):
    repeated = b"A paragraph that two documents have, and that only the first one keeps.\n"
    words = [b" ".join(b"word%d" % number for number in range(start, start + 40)) + b"\n" for start in (100, 200)]
    files = {
        "gamma/a.txt": (repeated + b"\n" + words[0]).replace(b"\n", b"\r\n"),
        "gamma/b.txt": repeated + b"\n" + words[1],
    }
    domain = {"repeats": "paragraphs", "max_digits": 1.0}
    group = {"domain": "prose", "kind": "pypi", "include": ("*.txt",), "sources": pins("gamma")}
    recipe = Recipe.model_validate({"domain": {"prose": domain}, "group": {"texts": group}})
    figures = made(tmp_path, recipe, Registry({("gamma", "1"): files}))["domains"]["prose"]
    assert figures["documents"] == {"found": 2, "kept": 2, "dropped": {}}
    assert figures["bytes"] == {
        "found": sum(map(len, files.values())),
        "kept": len(repeated) + 1 + len(words[0]) + len(words[1]),
        "dropped": {"line_ends": 3, "trimmed_repeats": len(repeated) + 1},
    }


def test_the_licences_of_the_packages_come_along(built):
    folder, _ = built
    assert "Licence of attrs" in (folder / "out" / "licences" / "attrs.txt").read_text()


def test_the_same_archives_give_the_same_bytes(built, tmp_path):
    folder, _ = built
    made(tmp_path, jobs=2)
    names = sorted(path.relative_to(folder / "out") for path in (folder / "out").rglob("*") if path.is_file())
    assert names == sorted(
        path.relative_to(tmp_path / "out") for path in (tmp_path / "out").rglob("*") if path.is_file()
    )
    assert len(names) > 10
    for name in names:
        assert (folder / "out" / name).read_bytes() == (tmp_path / "out" / name).read_bytes(), name


def test_a_source_gives_no_more_than_its_limit_and_which_documents_is_not_by_name(tmp_path):
    size = len(module_text("beta_100"))
    domain = {"repeats": "lines", "max_source_bytes": 30 * size}
    recipe = RECIPE.model_copy(
        update={"domain": {"code": RECIPE.domain["code"].model_validate(domain), "tables": RECIPE.domain["tables"]}}
    )
    manifest = made(tmp_path, recipe)
    beta = next(source for source in manifest["sources"] if source["name"] == "beta")
    assert 30 * size <= beta["bytes"]["kept"] < 31 * size
    assert beta["documents"]["kept"] + beta["documents"]["dropped"]["over_source_limit"] == 120
    kept = [path for path, _, _ in index(tmp_path, "code.train") if "/beta/" in path]
    assert kept == sorted(kept)
    assert 0 < sum(path < "wheels/beta/beta/module_5" for path in kept) < len(kept)


def test_some_domains_only(tmp_path):
    registry = Registry(WHEELS)
    manifest = made(tmp_path, registry=registry, domains=["tables"])
    assert list(manifest["files"]) == ["tables.test"]
    assert len(registry.commands) == 1


def test_an_output_that_exists_is_left_alone(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(BuildError, match="exists"):
        made(tmp_path)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_failure_while_reading_leaves_only_the_cache(tmp_path, jobs):
    made(tmp_path)
    broken = next((tmp_path / "cache").rglob("zeta*.whl"))
    broken.write_bytes(broken.read_bytes()[:-30])
    (tmp_path / "out").rename(tmp_path / "earlier")
    with pytest.raises(BuildError, match="zeta"):
        made(tmp_path, jobs=jobs)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "earlier"]


def debian_recipe(**group):
    merged = {"domain": "code", "kind": "debian", "include": ("*.py",), "sources": pins("omega"), **group}
    return Recipe.model_validate({"domain": dict(RECIPE.domain), "group": {**RECIPE.group, "debs": merged}})


def test_without_the_debian_tools_their_packages_are_left_out_by_name(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(module, "missing_debian_tools", lambda: ["apt-get"])
    manifest = made(tmp_path, debian_recipe())
    assert manifest["left_out"] == ["debs/omega"]
    assert "apt-get not found: 1 Debian packages are left out: omega" in capsys.readouterr().err
    assert "code.train" in manifest["files"]


def test_a_domain_of_debian_packages_only_needs_the_tools(tmp_path, monkeypatch):
    recipe = debian_recipe()
    recipe = Recipe.model_validate(
        {
            "domain": {**recipe.domain, "prose": {}},
            "group": {**recipe.group, "debs": recipe.group["debs"].model_copy(update={"domain": "prose"})},
        }
    )
    monkeypatch.setattr(module, "missing_debian_tools", lambda: ["apt-get", "dpkg-deb"])
    with pytest.raises(BuildError, match=r"apt-get and dpkg-deb not found, and every source of prose .* --only code"):
        made(tmp_path, recipe)
    assert made(tmp_path, recipe, domains=["code"])["left_out"] == []


@needs_dpkg
def test_a_drifted_debian_package_is_used_and_recorded(tmp_path):
    recipe = debian_recipe(sources={"omega": {"version": "1", "licence": "MIT", "sha256": "0" * 64}})
    manifest = made(tmp_path, recipe, Registry(WHEELS, {("omega", "2"): {"usr/omega.py": module_text("omega")}}))
    omega = manifest["sources"][-2]
    assert (omega["name"], omega["pinned"], omega["version"], omega["drifted"]) == ("omega", "1", "2", True)
    assert omega["documents"]["kept"] == 1
    assert not any(source["drifted"] for source in manifest["sources"] if source["name"] != "omega")
    assert json.loads((tmp_path / "out" / "manifest.json").read_text()) == manifest
