"""Reads the files of a wheel or of a Debian package, without unpacking it to disk."""

from __future__ import annotations

import subprocess
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

from model.corpus.errors import BuildError


def read_files(path: Path, wants: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    """Path and content of each regular file that ``wants`` accepts, in the archive's order.

    Raises:
        BuildError: the archive is damaged, or dpkg-deb cannot read it.
    """
    return _read_deb(path, wants) if path.suffix == ".deb" else _read_wheel(path, wants)


def _read_wheel(path: Path, wants: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    try:
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                if not info.is_dir() and wants(info.filename):
                    yield info.filename, archive.read(info)
    except (zipfile.BadZipFile, OSError) as error:
        raise BuildError(f"cannot read {path}: {error}") from error


def _read_deb(path: Path, wants: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    command = ["dpkg-deb", "--fsys-tarfile", str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as unpack:  # noqa: S603
        assert unpack.stdout is not None
        assert unpack.stderr is not None
        try:
            with tarfile.open(fileobj=unpack.stdout, mode="r|") as archive:
                for member in archive:
                    name = member.name.removeprefix("./")
                    if member.isfile() and wants(name):
                        file = archive.extractfile(member)
                        assert file is not None
                        yield name, file.read()
            unpack.stdout.read()
            damage = "" if unpack.wait() == 0 else f"dpkg-deb ended with {unpack.returncode}"
        except tarfile.TarError as error:
            damage = str(error)
        if damage:
            raise BuildError(f"cannot read {path}: {unpack.stderr.read().decode(errors='replace').strip() or damage}")
