"""Which encoders, in which order, with which preprocessing: the contract between query and corpus features.

Why it exists: features of two different specs have the same shape often enough, and comparing them gives
nonsense without an error. So a store, a head and a release carry the spec's name and hash, and refuse others.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TypeVar

from byline.errors import FeatureMismatch

SEPARATOR = "+"
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class FeatureSpec:
    """Encoder names in order. ``dims`` and ``hashes`` are known once the encoders are (``FeatureExtractor.spec``)."""

    encoders: tuple[str, ...]
    encoder_dims: tuple[int, ...] = ()
    encoder_hashes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse an empty spec and a repeated encoder."""
        if not self.encoders or not all(self.encoders):
            raise FeatureMismatch("a feature spec names at least one encoder, such as efficientnet_lite0+minilm")
        if len(set(self.encoders)) != len(self.encoders):
            raise FeatureMismatch(f"the feature spec {self.name} names an encoder twice", spec=self.name)

    @classmethod
    def parse(cls, text: str) -> FeatureSpec:
        """``dino+clip_text`` → the spec. FeatureMismatch for an unknown, repeated or missing name."""
        from byline.features.registry import ENCODERS

        names = tuple(part.strip() for part in text.split(SEPARATOR))
        unknown = [name for name in names if name not in ENCODERS]
        if unknown:
            raise FeatureMismatch(
                f"unknown encoder {', '.join(map(repr, unknown))} in {text!r}; known: {', '.join(sorted(ENCODERS))}",
                spec=text,
            )
        return cls(names)

    @property
    def name(self) -> str:
        """Text form; ``parse`` reads it back."""
        return SEPARATOR.join(self.encoders)

    @property
    def dims(self) -> tuple[int, ...]:
        """Width of each encoder's block, in order. FeatureMismatch before the encoders are loaded."""
        return self._resolved(self.encoder_dims)

    @property
    def dim(self) -> int:
        """Width of a whole feature row."""
        return sum(self.dims)

    @property
    def preprocessing_hash(self) -> str:
        """16 hex digits over names, widths, preprocessing and weights of all encoders, in order."""
        parts = zip(self.encoders, self.dims, self._resolved(self.encoder_hashes), strict=True)
        return hashlib.sha256(repr(tuple(parts)).encode()).hexdigest()[:16]

    def columns(self, encoder: str) -> slice | None:
        """Where an encoder's block stands in a feature row; None where it has none."""
        if encoder not in self.encoders:
            return None
        place = self.encoders.index(encoder)
        start = sum(self.dims[:place])
        return slice(start, start + self.dims[place])

    def _resolved(self, values: tuple[_T, ...]) -> tuple[_T, ...]:
        if len(values) != len(self.encoders):
            raise FeatureMismatch(
                f"the widths of {self.name} are known once its encoders are loaded; use FeatureExtractor.spec",
                spec=self.name,
            )
        return values
