"""Small wheels and Debian packages, made on the spot, and a stand-in for pip and apt-get that hands them out."""

import io
import shutil
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest

needs_dpkg = pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="dpkg-deb is not installed")


def write_wheel(path, files):
    with zipfile.ZipFile(path, "w") as wheel:
        for name, content in files.items():
            wheel.writestr(zipfile.ZipInfo(name), content)
    return path


def write_deb(path, files):
    """An ar archive of three members, the last a tar of the files (deb(5))."""
    members = {
        "debian-binary": b"2.0\n",
        "control.tar.gz": _tar(
            {"./control": b"Package: x\nVersion: 1\nArchitecture: all\nMaintainer: x\nDescription: x\n"}
        ),
        "data.tar.gz": _tar({f"./{name}": content for name, content in files.items()}),
    }
    with path.open("wb") as deb:
        deb.write(b"!<arch>\n")
        for name, content in members.items():
            deb.write(f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n".encode())
            deb.write(content + b"\n" * (len(content) % 2))
    return path


def _tar(files):
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return packed.getvalue()


class Registry:
    """Answers pip download and apt-get download from packages held in memory, and counts the calls."""

    def __init__(self, wheels=(), debs=()):
        self.wheels = dict(wheels)
        """Files by (name, version)."""
        self.debs = dict(debs)
        self.commands = []

    def __call__(self, command, folder):
        self.commands.append(command)
        if "pip" in command:
            name, _, version = command[-1].partition("==")
            files = self.wheels.get((name, version))
            if files is not None:
                write_wheel(Path(folder) / f"{name}-{version}-py3-none-any.whl", files)
        else:
            name, _, version = command[-1].partition("=")
            version = version or max((v for n, v in self.debs if n == name), default=None)
            files = self.debs.get((name, version))
            if files is not None:
                write_deb(Path(folder) / f"{name}_{version.replace(':', '%3a')}_all.deb", files)
        if files is None:
            return subprocess.CompletedProcess(command, 1, "", f"Looking\nERROR: no such package: {name}\n")
        return subprocess.CompletedProcess(command, 0, "", "")
