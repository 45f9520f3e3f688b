import pytest

from model.corpus.errors import BuildError
from model.corpus.recipe import DEFAULT_RECIPE, load_recipe

MINIMAL = """
[domain.code]
[group.wheels]
domain = "code"
kind = "pypi"
include = ["*.py"]
exclude = ["*/tests/*"]
[group.wheels.sources]
one = { version = "1.0", licence = "MIT" }
two = { version = "2.0", licence = "MIT", include = ["*/data.txt"] }
"""


@pytest.fixture
def load(tmp_path):
    def written(text):
        path = tmp_path / "recipe.toml"
        path.write_text(text)
        return load_recipe(path)

    return written


def test_a_source_reads_what_it_or_its_group_includes(load):
    one, two = load(MINIMAL).sources()
    assert one.path == "wheels/one"
    assert one.wants("one/a.py")
    assert one.wants("a.py")
    assert not one.wants("one/a.pyi")
    assert one.excludes("tests/a.py")
    assert one.excludes("one/tests/deep/a.py")
    assert not one.excludes("one/a.py")
    assert two.wants("two/deep/data.txt")
    assert not two.wants("two/a.py")


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("[domain.code]", "[domain.prose]", "domain 'code'"),
        ('"pypi"', '"npm"', "kind"),
        ('licence = "MIT" }', 'licence = "" }', "licence"),
        ('version = "1.0"', 'version = "--help"', "version"),
        ('version = "1.0", licence = "MIT"', 'version = "1.0", licence = "MIT", sha256 = "0"', "sha256"),
        ("[domain.code]", "[domain.code]\nmax_bites = 3", "max_bites"),
        ("[domain.code]", '[domain."../code"]', "domain"),
        ("[domain.code]", "[domain.code", "line"),
    ],
)
def test_a_bad_recipe_is_refused_by_the_name_of_its_fault(load, old, new, said):
    with pytest.raises(BuildError, match=said):
        load(MINIMAL.replace(old, new))


def test_the_path_of_a_source_is_spelled_as_its_archive(load):
    paths = {
        kind: load(MINIMAL.replace("one =", "one-two =").replace("pypi", kind)).sources()[0].path
        for kind in ("pypi", "debian")
    }
    assert paths == {"pypi": "wheels/one_two", "debian": "wheels/one-two"}


def test_an_unknown_domain_is_refused(load):
    with pytest.raises(BuildError, match="no domain music, it has code"):
        load(MINIMAL).sources(["code", "music"])


def test_the_recipe_of_the_project_pins_every_archive():
    recipe = load_recipe()
    sources = recipe.sources()
    assert all(source.pin.sha256 for source in sources)
    assert {source.group.domain for source in sources} == set(recipe.domain)
    assert {name for name, domain in recipe.domain.items() if domain.splits} == {"code", "prose"}
    assert "://" not in DEFAULT_RECIPE.read_text()


def test_the_projects_that_are_set_apart():
    from model.corpus.split import is_unseen

    unseen = [
        source.name for source in load_recipe().sources() if source.group.unseen_projects and is_unseen(source.name)
    ]
    assert unseen == ["attrs", "ipython", "mypy", "scikit-learn", "sphinx"]
