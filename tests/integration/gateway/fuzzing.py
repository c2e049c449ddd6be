"""What the fuzzing sends: damaged images, messages drawn from the descriptors, and bytes that are hardly messages."""

from __future__ import annotations

import io
import random
import struct
from typing import Any

import numpy as np
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message_factory import GetMessageClass
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

_EXTREMES = tuple(struct.pack(">I", value) for value in (0, 2**32 - 1, 2**31 - 1, 2**31, 1, 65_536))


def image_seeds() -> list[bytes]:
    """Good images of every kind that is accepted, and some that are not."""
    rng = np.random.default_rng(0)
    base = Image.fromarray(rng.integers(0, 255, (23, 37, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    notes = PngImagePlugin.PngInfo()
    notes.add_itxt("XML:com.adobe.xmp", "<x/>" * 20, zip=True)
    notes.add_text("k", "v" * 200, zip=True)
    frames = [base, base.transpose(Image.Transpose.ROTATE_180)]
    wanted: list[tuple[Image.Image, str, dict[str, Any]]] = [
        (base, "PNG", {}), (base.convert("P"), "PNG", {"transparency": 0}), (base.convert("RGBA"), "PNG", {}),
        (base.convert("1"), "PNG", {}), (base.convert("LA"), "PNG", {"pnginfo": notes}), (base.convert("L"), "PNG", {}),
        (Image.fromarray(np.full((9, 9), 40_000, dtype=np.uint16)), "PNG", {}), (base, "PNG", {"exif": exif}),
        (base, "JPEG", {}), (base, "JPEG", {"progressive": True, "exif": exif}), (base.convert("L"), "JPEG", {}),
        (base.convert("CMYK"), "JPEG", {}), (base, "JPEG", {"quality": 5, "subsampling": 2, "comment": b"x" * 100}),
        (base, "WEBP", {}), (base, "WEBP", {"lossless": True}), (base.convert("RGBA"), "WEBP", {"exif": exif}),
        (base, "PNG", {"save_all": True, "append_images": frames}),
        (base, "WEBP", {"save_all": True, "append_images": frames}),
        (base, "GIF", {}), (base, "BMP", {}), (base, "TIFF", {}),
    ]  # fmt: skip
    seeds = []
    for image, kind, options in wanted:
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        seeds.append(buffer.getvalue())
    return seeds


def mutate(rng: random.Random, data: bytes, others: list[bytes]) -> bytes:
    """One to eight of: flipped bits, set bytes, extreme numbers, cuts, repeats, swaps, a piece of another seed."""
    found = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 3, 8))):
        if not found:
            found = bytearray(rng.randbytes(rng.randrange(64)))
            continue
        at = rng.randrange(len(found)) if rng.random() < 0.6 else rng.randrange(min(len(found), 64))
        kind = rng.randrange(9)
        if kind == 0:
            found[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            found[at] = rng.randrange(256)
        elif kind == 2:
            found[at : at + 4] = rng.choice(_EXTREMES)
        elif kind == 3:
            del found[at:]
        elif kind == 4:
            del found[at : at + rng.randrange(1, 32)]
        elif kind == 5:
            piece = found[at : at + rng.randrange(1, 64)]
            found[at:at] = piece * rng.randrange(1, 20)
        elif kind == 6:
            other = rng.choice(others)
            start = rng.randrange(len(other))
            found[at:at] = other[start : start + rng.randrange(1, 200)]
        elif kind == 7:
            found[at:at] = rng.randbytes(rng.randrange(1, 16))
        else:
            found[at : at + 4] = struct.pack(">I", rng.choice((len(found), 2**31, 25_000_000, 65_535)))
    return bytes(found)


def spoil(rng: random.Random, keys: list[str]) -> list[str]:
    """Values of the header ``authorization``: a good one now and then, and everything that is nearly one."""
    key, other = rng.choice(keys), rng.choice(keys)
    at = rng.randrange(len(key))
    letter = rng.choice("AaZz09-_ %=.\"'")
    value = rng.choice((
        f"Bearer {key}", f"bearer {key}", f"Bearer {key[:at]}{letter}{key[at + 1:]}", f"Bearer {key[:at]}",
        f"Bearer {key}{letter}", f"Bearer {key[:21]}{other[21:]}", f"Bearer {key.upper()}", f"Basic {key}", key,
        f"Bearer{key}", f"Bearer  {key}", "Bearer", "", f"Bearer {key} {other}", f"Bearer {key}" * 40, letter * 3_000,
        f"Bearer byl_{rng.randbytes(8).hex()}_{'x' * 43}", f"Bearer {key[:20]}_{'A' * 43}", "Bearer ' OR 1=1 --",
    ))  # fmt: skip
    return [value, *(spoil(rng, keys) if rng.random() < 0.1 else [])]


_ID = "6f1c6ab0-4df6-4a7e-9d33-0d3f6a0d7c11"
_TEXTS = st.one_of(
    st.sampled_from([
        "", "projects/acme", "projects/other", "projects/-", "projects/../x", f"projects/acme/attributionJobs/{_ID}",
        f"projects/acme/images/{'0' * 64}", "models/openclipart", "models/none", "models/openclipart/releases/r1",
        "models/openclipart/releases/r9", "corpora/openclipart", "corpora/none", "corpora/openclipart/items/101",
        "corpora/openclipart/items/9999999999999999999", _ID, "lookup", "rank", "nothing", "a cat", "\x00", "\x00a",
        "x" * 2_001, "é" * 700, "\u202e\ud7ff\uffff", "%s%n%x", "' OR 1=1 --", "../../../etc/passwd", "A" * 9_000,
    ]),
    st.text(max_size=40),
)  # fmt: skip
_WHOLE = st.sampled_from([0, 1, -1, 2, 5, 1_000, 1_001, 2**31 - 1, -(2**31), 50, 101])
_LARGE = st.one_of(_WHOLE, st.sampled_from([101, 102, 130, 2**63 - 1, -(2**63), 2**53 + 1]))
_EDGES = st.sampled_from([0.0, -0.0, 1.0, float("nan"), float("inf"), float("-inf"), 1e308, 5e-324])
_REAL = st.one_of(_EDGES, st.floats())


def messages(descriptor: Descriptor, images: list[bytes], depth: int = 0) -> st.SearchStrategy[Any]:
    """Messages of a type: any of its fields set, to values that are valid, at an edge or absurd."""

    @st.composite
    def build(draw: Any) -> Any:
        message = GetMessageClass(descriptor)()
        for field in draw(st.lists(st.sampled_from(list(descriptor.fields)), max_size=6, unique_by=lambda f: f.name)):
            _set(draw, message, field, images, depth)
        return message

    return build() if descriptor.fields else st.just(GetMessageClass(descriptor)())


def nearly(base: Any, images: list[bytes]) -> st.SearchStrategy[Any]:
    """A good message with none, one or two of its fields, at any depth, drawn anew: this gets past the first check."""

    @st.composite
    def build(draw: Any) -> Any:
        message = type(base)()
        message.CopyFrom(base)
        for _ in range(draw(st.integers(0, 2))):
            inner = message
            while inner.DESCRIPTOR.fields:
                field = draw(st.sampled_from(list(inner.DESCRIPTOR.fields)))
                deeper = field.cpp_type == FieldDescriptor.CPPTYPE_MESSAGE and not field.is_repeated
                if not (deeper and draw(st.booleans())):
                    if field.is_repeated and draw(st.booleans()):
                        inner.ClearField(field.name)
                    _set(draw, inner, field, images, 0)
                    break
                inner = getattr(inner, field.name)
        return message

    return build()


def _set(draw: Any, message: Any, field: FieldDescriptor, images: list[bytes], depth: int) -> None:
    if field.cpp_type == FieldDescriptor.CPPTYPE_MESSAGE:
        if depth > 3 or field.message_type.GetOptions().map_entry:
            return
        inner = messages(field.message_type, images, depth + 1)
        if field.is_repeated:
            getattr(message, field.name).extend(draw(st.lists(inner, max_size=3)))
        else:
            getattr(message, field.name).CopyFrom(draw(inner))
        return
    values = _values(field, images)
    if field.is_repeated:
        listed = draw(st.lists(values, max_size=4))
        getattr(message, field.name).extend(listed * draw(st.sampled_from([1, 1, 1, 600])))
    else:
        setattr(message, field.name, draw(values))


def _values(field: FieldDescriptor, images: list[bytes]) -> st.SearchStrategy[Any]:
    if field.type == FieldDescriptor.TYPE_BYTES:
        return st.one_of(st.sampled_from(images), st.binary(max_size=64))
    return {
        FieldDescriptor.CPPTYPE_STRING: _TEXTS, FieldDescriptor.CPPTYPE_BOOL: st.booleans(),
        FieldDescriptor.CPPTYPE_INT32: _WHOLE, FieldDescriptor.CPPTYPE_ENUM: _WHOLE,
        FieldDescriptor.CPPTYPE_INT64: _LARGE, FieldDescriptor.CPPTYPE_DOUBLE: _REAL,
        FieldDescriptor.CPPTYPE_FLOAT: st.floats(width=32),
    }.get(field.cpp_type, st.integers(0, 2**31 - 1))  # fmt: skip
