"""Manifests: reading, checking and writing them."""

from blspkd.data.manifest import ManifestError, Record, read_manifest, write_manifest

__all__ = ["ManifestError", "Record", "read_manifest", "write_manifest"]
