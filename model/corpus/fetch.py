"""Fetches pinned archives with pip and apt-get into a cache, and checks their hashes."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from tqdm import tqdm

from model.corpus.errors import BuildError
from model.corpus.recipe import Source

# One platform and version of Python for everybody, so that everybody gets the same wheels.
PIP_TARGET = (
    *("--only-binary", ":all:", "--implementation", "cp", "--python-version", "3.11"),
    *("--abi", "cp311", "--abi", "abi3", "--abi", "none"),
    *(
        argument
        for platform in ("manylinux_2_28", "manylinux_2_27", "manylinux_2_17", "manylinux2014")
        for argument in ("--platform", f"{platform}_x86_64")
    ),
    *("--platform", "any"),
)
DEBIAN_TOOLS = ("apt-get", "dpkg-deb")

Run = Callable[[list[str], Path], "subprocess.CompletedProcess[str]"]


@dataclass(frozen=True, slots=True)
class Archive:
    """A fetched package."""

    path: Path
    version: str
    sha256: str


def run_command(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a command in a folder, its output captured."""
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)  # noqa: S603


def missing_debian_tools() -> list[str]:
    """Which of the programs that Debian packages need are not installed."""
    return [tool for tool in DEBIAN_TOOLS if shutil.which(tool) is None]


class Fetcher:
    """Keeps one folder per pinned package under ``cache``; a package that is there is not fetched again.

    pip and apt-get find their package indexes by their own configuration. An archive arrives whole or not at all.
    """

    def __init__(self, cache: Path, run: Run = run_command) -> None:
        self.cache = cache
        self.run = run

    def fetch_all(self, sources: list[Source], jobs: int) -> dict[str, Archive]:
        """Fetch every source, several at a time; returns archives by :attr:`Source.path`.

        Raises:
            BuildError: one cannot be had, or a wheel is not the one that the recipe names.
        """
        folders: dict[Path, list[Source]] = {}
        for source in sources:
            folders.setdefault(self._folder(source), []).append(source)
        archives: dict[str, Archive] = {}
        with ThreadPoolExecutor(jobs) as pool, tqdm(total=len(folders), desc="fetch", unit="package") as bar:
            waiting = {pool.submit(self.fetch, same[0]): same for same in folders.values()}
            try:
                for done in as_completed(waiting):
                    for source in waiting[done]:
                        archives[source.path] = done.result()
                    bar.update()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        return archives

    def fetch(self, source: Source) -> Archive:
        """Fetch one source, or find it in the cache.

        A Debian package whose version has left the archive is replaced by the newest: compare ``version`` and
        ``sha256`` with the pin.

        Raises:
            BuildError: it cannot be had, or a wheel's hash is not the recipe's.
        """
        folder = self._folder(source)
        if not folder.is_dir():
            folder.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".part-") as part:
                whole = Path(part) / "whole"
                whole.mkdir()
                self._download(source, whole)
                whole.rename(folder)
        path = _only_file(folder)
        archive = Archive(path, _version(source, path), _sha256(path))
        expected = source.pin.sha256
        if source.group.kind == "pypi" and expected is not None and archive.sha256 != expected:
            raise BuildError(
                f"{path} has sha256 {archive.sha256}, the recipe expects {expected}: "
                "remove it to fetch it again, or correct the recipe"
            )
        return archive

    def _folder(self, source: Source) -> Path:
        version = source.pin.version.replace(":", "%3a")
        return self.cache / source.group.kind / f"{source.name}_{version}"

    def _download(self, source: Source, folder: Path) -> None:
        if source.group.kind == "pypi":
            pinned = f"{source.name}=={source.pin.version}"
            options = ["--quiet", "--disable-pip-version-check", "--no-deps", *PIP_TARGET, "--dest", "."]
            commands = [[sys.executable, "-m", "pip", "download", *options, pinned]]
        else:
            fetch = ["apt-get", "download", "--quiet"]
            commands = [[*fetch, f"{source.name}={source.pin.version}"], [*fetch, source.name]]
        for command in commands:
            result = self.run(command, folder)
            if result.returncode == 0:
                return
        said = [line for line in result.stderr.splitlines() if line.strip()]
        raise BuildError(
            f"cannot fetch {source.name} {source.pin.version}: {said[-1] if said else 'no reason given'} "
            "(is the package index reachable, and does it hold this version? what was fetched so far is kept)"
        )


def _only_file(folder: Path) -> Path:
    files = sorted(folder.iterdir())
    if len(files) != 1:
        raise BuildError(f"{folder} must hold one archive, it holds {len(files)} files: remove it to fetch it again")
    return files[0]


def _version(source: Source, path: Path) -> str:
    if source.group.kind == "pypi":
        return source.pin.version
    return unquote(path.name).split("_")[1]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
