"""A worker with a signing key opens no release that a key it trusts has not signed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from byline.errors import ReleaseCorrupt
from byline.releases import loader, vouched
from byline.releases.loader import load_release
from byline.releases.manifest import CATALOGUE, HEAD, MANIFEST, ReleaseManifest
from byline.security.errors import SignatureInvalid
from byline.security.signing import SIGNATURE, Keyring

Build = Callable[..., Path]
OLD, NEW = Keyring.parse("o" * 40), Keyring.parse("n" * 40)


def test_a_signed_release_is_opened_by_those_who_trust_its_key_and_by_those_who_ask_for_none(build: Build) -> None:
    directory = build(keyring=OLD)
    for keyring in (OLD, Keyring((*NEW.keys, *OLD.keys)), Keyring()):
        assert load_release(directory, keyring=keyring).release_id == directory.name


def test_unsigned_foreign_and_altered_releases_are_refused_before_any_file_is_parsed(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    unsigned, foreign = build(release_id="unsigned"), build(release_id="foreign", keyring=NEW)
    altered, moved = build(release_id="altered", keyring=OLD), build(release_id="moved", keyring=OLD)
    manifest = json.loads((altered / MANIFEST).read_text())
    (altered / MANIFEST).chmod(0o644)
    (altered / MANIFEST).write_text(json.dumps({**manifest, "git_sha": "evil"}))
    (moved / SIGNATURE).unlink()
    (moved / SIGNATURE).write_text((altered / SIGNATURE).read_text())
    for name in ("load_index", "load_head", "read_catalogue"):
        monkeypatch.setattr(loader, name, lambda *_: pytest.fail("a file was opened"))
    monkeypatch.setattr(vouched, "verify_files", lambda *_: pytest.fail("a file was opened"))
    for directory in (unsigned, foreign, altered, moved):
        with pytest.raises(SignatureInvalid):
            load_release(directory, keyring=OLD)


def test_one_file_of_a_release_is_opened_on_the_same_terms_as_all_of_it(build: Build) -> None:
    directory = build(keyring=OLD)
    manifest = ReleaseManifest.read(directory)
    assert vouched.vouched(directory, OLD, manifest, (HEAD,)).digest == manifest.digest
    with pytest.raises(SignatureInvalid):
        vouched.vouched(directory, NEW, manifest, (HEAD,))
    with pytest.raises(ReleaseCorrupt, match="not the registered one"):
        vouched.vouched(directory, OLD, ReleaseManifest.read(build(release_id="other")), (HEAD,))
    (directory / HEAD).chmod(0o644)
    (directory / HEAD).write_bytes(b"evil")
    vouched.vouched(directory, OLD, manifest, (CATALOGUE,))
    with pytest.raises(ReleaseCorrupt, match="was altered"):
        vouched.vouched(directory, OLD, manifest, (HEAD,))
