"""Signatures with a secret that only this system's own processes hold.

Why it exists: FAISS and safetensors are parsed by native code, so a worker opens only files whose digests stand in a
manifest that a trainer signed; and a hash chain that anybody with the database could compute again proves little.
HMAC-SHA256: trainer, workers and gateway are one trust domain. Keys are rotated by putting the new one first: it
signs, and what the old ones signed is still accepted until they are taken out.
"""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass, field
from pathlib import Path

from byline.security.errors import SignatureInvalid

#: Beside the manifest it signs.
SIGNATURE = "manifest.sig"
_MANIFEST = "release-manifest"


@dataclass(frozen=True)
class Keyring:
    """Signing keys, the one that signs first. Empty: nothing is signed and nothing is asked to be."""

    keys: tuple[str, ...] = field(default=(), repr=False)

    @classmethod
    def parse(cls, setting: str) -> Keyring:
        """From ``signing_key``: keys separated by commas."""
        return cls(tuple(key.strip() for key in setting.split(",") if key.strip()))

    def __bool__(self) -> bool:
        return bool(self.keys)

    @property
    def key_ids(self) -> tuple[str, ...]:
        """Names of the keys, which may be shown."""
        return tuple(map(_key_id, self.keys))

    def mac(self, purpose: str, message: bytes, key_id: str | None = None) -> tuple[str, bytes]:
        """Key id and MAC of a message by the first key, or by the one named. SignatureInvalid if it is not known."""
        for key in self.keys:
            if key_id is None or hmac.compare_digest(_key_id(key), key_id):
                own = hmac.digest(key.encode(), f"byline {purpose}".encode(), "sha256")
                return _key_id(key), hmac.digest(own, message, "sha256")
        raise SignatureInvalid(f"signed by key {key_id}, which this process does not have", key=key_id)

    def sign(self, purpose: str, message: bytes) -> str:
        """A signature as text, ``hmac-sha256:KEY:HEX``."""
        key_id, mac = self.mac(purpose, message)
        return f"hmac-sha256:{key_id}:{mac.hex()}"

    def check(self, purpose: str, message: bytes, signature: str) -> None:
        """SignatureInvalid unless one of the keys made this signature of this message for this purpose."""
        kind, _, rest = signature.strip().partition(":")
        key_id, _, found = rest.partition(":")
        if kind != "hmac-sha256":
            raise SignatureInvalid("the signature is of a kind this version does not know")
        _, expected = self.mac(purpose, message, key_id)
        if not hmac.compare_digest(expected.hex(), found):
            raise SignatureInvalid("the signature does not fit: what it signs was altered", key=key_id)


#: For those who have no key: nothing is signed, nothing is asked for.
NOT_SIGNED = Keyring()


def sign_manifest(directory: Path, digest: str, keyring: Keyring) -> tuple[str, ...]:
    """Write the signature of a manifest's digest beside it, nothing without a key; the names of the files written."""
    if not keyring:
        return ()
    (directory / SIGNATURE).write_text(keyring.sign(_MANIFEST, digest.encode()) + "\n")
    return (SIGNATURE,)


def check_manifest(directory: Path, digest: str, keyring: Keyring) -> None:
    """SignatureInvalid if keys are configured and none of them signed this manifest; nothing is opened before."""
    if not keyring:
        return
    try:
        signature = (directory / SIGNATURE).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise SignatureInvalid(
            f"release {directory.name} is not signed: have the trainer build it again, or sign it with "
            "`byline keys sign-release` if you know where it is from",
            release_id=directory.name,
        ) from error
    keyring.check(_MANIFEST, digest.encode(), signature)


def _key_id(key: str) -> str:
    return hashlib.sha256(b"byline key id\0" + key.encode()).hexdigest()[:8]
