import pytest

from model.corpus import build as module
from model.corpus.fetch import Fetcher
from service.cli import main
from tests.model.corpus.packages import Registry
from tests.model.corpus.test_build import WHEELS
from tests.model.corpus.test_recipe import MINIMAL


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "Fetcher", lambda cache: Fetcher(cache, Registry(WHEELS)))
    path = tmp_path / "recipe.toml"
    path.write_text(
        MINIMAL.replace("one", "beta")
        .replace("two", "attrs")
        .replace("1.0", "1")
        .replace("2.0", "1")
        .replace("data.txt", "*.py")
    )
    return path


def test_build_and_excerpts(recipe, tmp_path, capsys):
    out, cache = tmp_path / "out", tmp_path / "cache"
    command = [
        "data",
        "build",
        str(out),
        "--cache",
        str(cache),
        "--recipe",
        str(recipe),
        "--jobs",
        "1",
        "--only",
        "code",
    ]
    assert main(command) == 0
    assert "code.train" in capsys.readouterr().out
    assert main(["data", "excerpts", str(out), str(tmp_path / "excerpts"), "--bytes", "9000"]) == 0
    assert (tmp_path / "excerpts" / "code.txt.xz").exists()


@pytest.mark.parametrize(
    ("output", "options", "said"),
    [
        ("out", ["--only", "music"], "no domain music"),
        ("out", ["--recipe", "nowhere.toml"], "nowhere.toml"),
        ("recipe.toml/out", ["--jobs", "1"], "cannot build"),
    ],
)
def test_bad_input_is_one_line_and_status_two(recipe, tmp_path, capsys, output, options, said):
    base = ["data", "build", str(tmp_path / output), "--cache", str(tmp_path / "cache"), "--recipe", str(recipe)]
    assert main([*base, *options]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("rheostat: ")
    assert said in error


def test_a_bad_number_of_jobs_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["data", "build", "out", "--jobs", "0"])
    assert "--jobs" in capsys.readouterr().err
