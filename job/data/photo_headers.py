"""How much memory it takes to decode a photo, from the header of its file: known before anything is decoded."""

from __future__ import annotations

import struct
from dataclasses import dataclass

# TensorFlow's decoders refuse what has more bytes of pixels, before they take any memory for it.
_LARGEST = 2**29
_CHANNELS = 3
# Copies of the encoded bytes: as read, as a tensor, and within decoders; four were seen.
_COPIES_OF_FILE = 4
# A photo that is decoded in several passes is kept as coefficients of 16 bits meanwhile.
_COEFFICIENTS = 2 * _CHANNELS
# Colours of a BMP that has a palette are looked up by indices of 32 bits.
_PALETTE_LOOK_UP = 4 + _CHANNELS

# JPEG's markers: frames but for arithmetic conditioning, Huffman tables and extensions; those of several passes; the
# start of the pixels; and markers without a length.
_FRAMES = set(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_PROGRESSIVE = {0xC2, 0xC6, 0xCA, 0xCE}
_START_OF_SCAN = 0xDA
_ALONE = {0x01, *range(0xD0, 0xDA)}


@dataclass(frozen=True)
class Header:
    """What the header of an encoded photo says: its size in pixels, and the bytes a pixel that decoding takes."""

    height: int
    width: int
    pixel_bytes: int = _CHANNELS


def read_header(encoded: bytes) -> Header | None:
    """Return what the header of a JPEG, PNG, GIF or BMP says; None of anything else."""
    try:
        if encoded.startswith(b"\xff\xd8"):
            return _jpeg(encoded)
        if encoded.startswith(b"\x89PNG\r\n\x1a\n"):
            width, height = struct.unpack_from(">II", encoded, 16)
            return Header(height, width)
        if encoded.startswith(b"GIF8"):
            width, height = struct.unpack_from("<HH", encoded, 6)
            return Header(height, width, _CHANNELS + 1)
        if encoded.startswith(b"BM"):
            width, height, _, bits = struct.unpack_from("<iiHH", encoded, 18)
            return Header(abs(height), abs(width), _CHANNELS + (_PALETTE_LOOK_UP if bits <= 8 else 0))
    except (struct.error, IndexError):
        pass
    return None


def decoding_bytes(encoded: bytes, size: int) -> int:
    """Return about how many bytes it takes at its peak to decode a photo and to resize it to ``size`` pixels square."""
    needed = _COPIES_OF_FILE * len(encoded)
    header = read_header(encoded)
    if header is None or _CHANNELS * header.height * header.width >= _LARGEST:
        return needed
    # float32: resized along one side, then along the other
    resized = 4 * _CHANNELS * size * (header.width + size)
    return needed + header.pixel_bytes * header.height * header.width + resized


def _jpeg(encoded: bytes) -> Header | None:
    """Find the frame's header as libjpeg does: what lies between two segments is passed over."""
    at = 2
    while (at := encoded.find(b"\xff", at)) >= 0:
        marker = encoded[at + 1]
        if marker == 0xFF:
            at += 1
        elif marker == 0 or marker in _ALONE:
            at += 2
        elif marker in _FRAMES:
            height, width = struct.unpack_from(">HH", encoded, at + 5)
            return Header(height, width, _CHANNELS + (_COEFFICIENTS if marker in _PROGRESSIVE else 0))
        elif marker == _START_OF_SCAN:
            return None
        else:
            at += 2 + struct.unpack_from(">H", encoded, at + 2)[0]
    return None
