"""Compares the installed package versions with those that hpcft was tested with."""

from __future__ import annotations

import re
import sys
import zlib
from pathlib import Path
from typing import NamedTuple

from hpcft import __version__
from hpcft.core.paths import cache_folder, tested_versions_file

_PACKAGE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class UntestedVersion(NamedTuple):
    """A package whose installed version differs from the tested one."""

    package: str
    """Name of the package."""
    installed: str
    """Version that is installed."""
    tested: str
    """Version that hpcft was tested with."""


def untested_versions(constraints: Path, distribution: str = "hpcft") -> list[UntestedVersion]:
    """Lists the direct dependencies of a distribution whose versions were not tested.

    Local parts of versions (`+cpu`, `+cu128`) do not count. Packages that are not installed, or
    have no tested version, are left out.

    Args:
        constraints: file with lines such as `torch==2.8.0`.
        distribution: name of an installed distribution.

    Raises:
        OSError: the constraints cannot be read.
        PackageNotFoundError: the distribution is not installed.
    """
    # Only the first command after an installation needs it, and it takes 30 ms to import.
    from importlib import metadata

    lines = (line.partition("==") for line in constraints.read_text(encoding="utf-8").splitlines())
    tested = {_normalised(name): version.strip() for name, is_pin, version in lines if is_pin}
    untested = []
    for requirement in metadata.requires(distribution) or ():
        name = _PACKAGE.match(requirement)
        if name is None or "extra ==" in requirement:
            continue
        package, expected = name[0], tested.get(_normalised(name[0]))
        try:
            installed = metadata.version(package).partition("+")[0]
        except metadata.PackageNotFoundError:
            continue
        if expected and installed != expected:
            untested.append(UntestedVersion(package, installed, expected))
    return untested


def untested_versions_note(site_packages: Path) -> str:
    """Returns a note on untested versions, once per environment and set of installed versions.

    A marker file in the cache folder remembers that the versions were compared. Its name depends on
    the environment, on hpcft's version and on the time of the last installation, so that most
    commands only look whether it exists. Without a cache folder to write to, there is no note,
    because it would come with every command.

    Args:
        site_packages: folder that the dependencies are installed in.

    Returns:
        The note; empty if there is nothing to say.
    """
    try:
        installed_at = site_packages.stat().st_mtime_ns
        environment = zlib.crc32(sys.prefix.encode())
        marker = cache_folder() / "versions" / f"{environment:08x}-{__version__}-{installed_at}"
        if marker.exists():
            return ""
        marker.parent.mkdir(parents=True, exist_ok=True)
        marker.touch()
        constraints = tested_versions_file()
        untested = untested_versions(constraints)
    except (OSError, ImportError):  # PackageNotFoundError is an ImportError.
        return ""
    if not untested:
        return ""
    versions = ", ".join(f"{v.package} {v.installed} (tested: {v.tested})" for v in untested)
    return (
        f"note: hpcft {__version__} was not tested with these installed versions: {versions}. "
        f"To install the tested versions: pip install -c {constraints} hpcft "
        "(this note appears once)"
    )


def _normalised(package: str) -> str:
    return re.sub(r"[-_.]+", "-", package).lower()
