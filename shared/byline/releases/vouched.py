"""Whether files of a release may be opened at all.

Why it exists: FAISS, safetensors and Parquet are parsed by native code, so whoever wants one file of a release asks
the same three questions as whoever opens it whole: is it the registered one, did a trusted key sign it, are these the
bytes.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from byline.errors import ReleaseCorrupt
from byline.releases.manifest import ReleaseManifest, verify_files
from byline.security.signing import Keyring, check_manifest


def vouched(
    directory: Path, keyring: Keyring, expected: ReleaseManifest | None = None, files: Collection[str] | None = None
) -> ReleaseManifest:
    """The manifest of a release whose ``files`` (all by default) may be opened.

    ``expected`` is the registry's copy of it. SignatureInvalid if ``keyring`` has keys and none of them signed it;
    ReleaseCorrupt for another manifest than the registered one, and for a file that is missing or altered.
    """
    manifest = ReleaseManifest.read(directory)
    if expected is not None and manifest.digest != expected.digest:
        raise ReleaseCorrupt(
            f"the manifest in {directory.name} is not the registered one", release_id=expected.release_id
        )
    check_manifest(directory, manifest.digest, keyring)
    verify_files(directory, manifest, files)
    return manifest
