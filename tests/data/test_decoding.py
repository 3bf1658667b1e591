"""How many photos are decoded at once, by the memory that they take."""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from job.data.decoding import Room, decode_rows
from job.data.photo_headers import Header, decoding_bytes, read_header
from tests.support.photos import encode_bmp, encode_gif, write_examples
from tests.support.refusals import refused
from tests.support.running import python

HEIGHT, WIDTH = 30, 50
PIXELS = np.random.default_rng(0).integers(0, 128, (HEIGHT, WIDTH, 3), dtype=np.uint8)
GB = 10**9


def pillow(form: str, mode: str = "RGB", **options: object) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(PIXELS).convert(mode).save(stream, form, **options)
    return stream.getvalue()


def jpeg(**options: object) -> bytes:
    return bytes(tf.io.encode_jpeg(PIXELS, **options).numpy())


EXIF = Image.Exif()
EXIF[0x010E] = "a description that holds \xff\xc2, the marker of another frame"
# what decoding takes of a pixel: its three bytes; coefficients of 16 bits; indices of a palette
ENCODED = {
    "JPEG": (jpeg(), 3),
    "JPEG progressive": (jpeg(progressive=True), 9),
    "JPEG grey": (pillow("JPEG", "L"), 3),
    "JPEG CMYK": (pillow("JPEG", "CMYK"), 3),
    "JPEG with EXIF and a profile": (pillow("JPEG", exif=EXIF, icc_profile=b"\xff\xc2\x00\x11" * 20_000), 3),
    "JPEG with bytes between its segments": (jpeg()[:20] + b"\x00\x01\xff\xff" + jpeg()[20:], 3),
    "PNG": (pillow("PNG", "RGBA"), 3),
    "GIF": (encode_gif([PIXELS[..., 0]]), 4),
    "BMP": (encode_bmp(PIXELS), 3),
    "BMP from the top": (encode_bmp(PIXELS)[:22] + struct.pack("<i", -HEIGHT) + encode_bmp(PIXELS)[26:], 3),
    "BMP with a palette": (encode_bmp(PIXELS[..., 0]), 10),
}  # fmt: skip


@pytest.mark.parametrize("name", ENCODED)
def test_a_header_tells_the_size_that_the_decoder_finds(name: str) -> None:
    encoded, pixel_bytes = ENCODED[name]
    assert read_header(encoded) == Header(HEIGHT, WIDTH, pixel_bytes)
    assert tf.io.decode_image(encoded, expand_animations=False).shape[:2] == (HEIGHT, WIDTH)


@pytest.mark.parametrize("encoded", [b"", b"\xff\xd8", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF8", b"BM", b"text"])
def test_what_is_no_photo_has_no_header_and_takes_next_to_no_memory(encoded: bytes) -> None:
    assert read_header(encoded) is None
    assert decoding_bytes(encoded, 8) <= 4 * len(encoded)


def test_wherever_the_decoder_takes_a_spoiled_jpeg_the_header_agrees_with_it() -> None:
    generator = np.random.default_rng(1)
    originals = [ENCODED[name][0] for name in ENCODED if name.startswith("JPEG") and "profile" not in name]
    decoded = 0
    for number in range(600):
        spoiled = bytearray(originals[number % len(originals)])
        for place in generator.integers(2, min(len(spoiled), 700), 3):
            spoiled[place] = generator.integers(256)
        header = read_header(bytes(spoiled))
        try:
            shape = tf.io.extract_jpeg_shape(bytes(spoiled)).numpy()
        except tf.errors.InvalidArgumentError:
            continue
        assert header is not None
        assert (header.height, header.width) == tuple(shape[:2])
        decoded += 1
    assert decoded > 100


def test_a_photo_that_no_decoder_takes_is_not_counted_as_large() -> None:
    huge = bytearray(jpeg())
    at = huge.index(b"\xff\xc0") + 5
    huge[at : at + 4] = (30_000).to_bytes(2) + (30_000).to_bytes(2)
    assert read_header(bytes(huge)) == Header(30_000, 30_000)
    with pytest.raises(tf.errors.InvalidArgumentError):
        tf.io.decode_image(bytes(huge))
    assert decoding_bytes(bytes(huge), 8) == 4 * len(huge)


def most_at_once(room: Room, folder: Path, photos: int = 40) -> int:
    """Return how many photos were under way at most while ``photos`` were decoded, and check what came out."""
    given = done = most = 0
    encoded = jpeg()

    def examples() -> Iterator[tuple[str, int, bytes]]:
        nonlocal given, most
        for number in range(photos):
            # the one that is asked for is begun when there is room for it
            most = max(most, given - done)
            given += 1
            yield f"photo {number}", number, encoded

    def count(_example: str, decoded: bool) -> None:
        nonlocal done
        assert decoded
        done += 1

    rows = decode_rows(examples(), photos, 8, folder / "rows.npy", count, room)
    assert list(rows.labels) == list(range(photos))
    assert len(np.unique(rows.values[:], axis=0)) == 1
    return most


def test_no_more_photos_are_decoded_at_once_than_there_is_memory_for(tmp_path: Path) -> None:
    one = decoding_bytes(jpeg(), 8)
    assert most_at_once(Room(48, 3 * one + 1, GB), tmp_path) == 3
    # one that is larger than all may take together is decoded alone
    assert most_at_once(Room(48, one // 2, GB), tmp_path) == 1
    # with memory enough the threads decide, each of which has some more waiting
    assert most_at_once(Room(2, GB, GB), tmp_path) == 8


def test_a_photo_that_does_not_fit_alone_is_refused_with_its_id_and_what_it_takes(tmp_path: Path) -> None:
    with refused("TRANSFER_DATASET", "photo 0", "of memory, and 0 MB may be used"):
        most_at_once(Room(2, GB, 100), tmp_path)


PEAK = """
import json, sys, tempfile
from pathlib import Path
import tensorflow as tf
from job.data.dataset import open_source
from job.data.decoding import Room
from job.data.reading import decoding_at_full_speed, read_splits
from job.settings.environment import load

def kilobytes(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))

def decode(dataset):
    splits = {f"TRANSFER_{name.upper()}_SPLIT": name for name in ("train", "validation", "test")}
    source = open_source(load(splits | {"TRANSFER_DATASET": dataset}).data)
    with tempfile.TemporaryDirectory() as folder:
        read_splits(source, 16, Path(folder), 0.0, room=Room(48, int(sys.argv[3]), 2**40))
    return source

decode(sys.argv[1])
before = kilobytes("VmRSS")
source = decode(sys.argv[2])
told = {"peak": 1024 * (kilobytes("VmHWM") - before), "48 threads": decoding_at_full_speed(source, 48)}
print(json.dumps(told))
"""


@pytest.mark.slow
def test_forty_eight_threads_decode_photos_of_24_megapixels_in_the_memory_that_they_are_given(tmp_path: Path) -> None:
    # what follows a JPEG's end is read but not decoded: a photo of 24 megapixels that fills 4 MB
    flat = bytes(tf.io.encode_jpeg(tf.zeros([4000, 6000, 3], tf.uint8)).numpy())
    large = flat + bytes(4 * 10**6 - len(flat))
    splits = ("train", "validation", "test")
    folders = [
        write_examples(tmp_path, name, {split: [(photo, i % 2) for i in range(48)] for split in splits}, shards=16)
        for name, photo in (("little", jpeg()), ("large", large))
    ]
    given = 500 * 10**6
    told = json.loads(python(PEAK, *folders, given).stdout)
    assert given // 4 < told["peak"] < given + 150 * 10**6, told
    assert told["48 threads"] > 48 * 72 * 10**6
