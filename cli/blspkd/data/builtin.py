"""Data that comes inside this package, unpacked where a run can read it."""

from __future__ import annotations

import tarfile
from importlib.resources import files
from pathlib import Path

PREFIX = "blspkd:"


def resolve_manifest(reference: str, folder: Path) -> Path:
    """The manifest that a configuration names.

    Args:
        reference: a path, or ``blspkd:DIR/ARCHIVE.tar/MANIFEST`` for one inside this package.
        folder: where archives of this package are unpacked, once.

    Raises:
        ValueError: if this package has no such archive or manifest.
    """
    if not reference.startswith(PREFIX):
        return Path(reference).expanduser()
    inside, _, member = reference[len(PREFIX) :].partition(".tar/")
    archive = Path(str(files("blspkd"))) / f"{inside}.tar"
    if not archive.is_file():
        raise ValueError(f"{reference!r} names no archive of this installation ({archive})")
    target = folder / archive.stem
    manifest = target / member
    if not manifest.is_file():
        with tarfile.open(archive) as tar:
            tar.extractall(target, filter="data")
    if not manifest.is_file():
        raise ValueError(f"{archive} holds no {member!r}")
    return manifest
