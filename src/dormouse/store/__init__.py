"""Bytes at rest: chunks, codecs, packs, manifests and the index over them (docs/formats.md)."""
