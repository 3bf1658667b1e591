"""TFDS data sets decoded once, to uint8 rows with ids."""

from __future__ import annotations

import errno
import itertools
import json
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds

from job.data.access import Place
from job.data.dataset import Source
from job.data.decoding import Room, decode_rows
from job.data.rows import Placement, Rows
from job.data.splits import SPLIT_VARIABLES
from job.errors import ConfigError
from job.machine.limits import cpus
from job.machine.replicas import Replicas
from job.stopping import stop_if_asked

logger = logging.getLogger(__name__)

_DIGEST_BYTES = 16
_NAMED = 10  # of a long list, this many are named in a message
# TFDS reads so many files at once, and TensorFlow holds so many examples of each ready. Where that is more than so many
# bytes, one file is read at a time, and so many bytes ahead.
_FILES, _OF_FILE = 16, 32
_SEVERAL_FILES = 512 * 2**20
_ONE_FILE = 64 * 2**20
# Of a photo of 24 million pixels, and its bytes where they are not known.
_LARGE_PHOTO = 144 * 10**6
_PIXELS_OF_BYTE = 40


def read_splits(
    source: Source,
    image_size: int,
    folder: Path,
    max_bad_images: float,
    on_progress: Callable[[int, int], None] | None = None,
    replicas: Replicas | None = None,
    room: Room | None = None,
) -> dict[str, Rows]:
    """Read the three splits once, and decode every image to a row on disk.

    Args:
        source: from ``open_source``.
        image_size: height and width of the rows in pixels.
        folder: existing local folder for train.npy, validation.npy and test.npy (uint8 [n, size, size, 3]).
        max_bad_images: share of the examples that may be undecodable; those are logged and left out.
        on_progress: called after each example with how many are done and how many there are, over all three splits.
            What it raises ends the reading.
        replicas: whose workers each read a share of their own, at the same time.
        room: what decoding may take; the whole machine where it is not given.

    Returns:
        The rows of train, validation and test; the difference to ``Split.examples`` was skipped.

    Raises:
        ConfigError: too many undecodable images, a split or a class of the train split without an example, labels
            that are missing, a photo too large for the memory, or ``folder`` ran full.
        UnavailableError: the records could not be read to their end.
    """
    replicas = replicas or Replicas()
    shares = {part: _share(source, part, replicas) for part in source.splits}
    examples = {part: source.builder.info.splits[share].num_examples for part, share in shares.items()}
    total = sum(examples.values())
    done = 0
    bad: list[str] = []

    def count(example_id: str, decoded: bool) -> None:
        nonlocal done
        stop_if_asked()
        done += 1
        if not decoded:
            bad.append(example_id)
            if len(bad) <= _NAMED:
                logger.warning("skipped %s: it cannot be decoded", example_id)
            if len(bad) > max_bad_images * total:
                raise ConfigError.of(
                    "TRANSFER_MAX_BAD_IMAGES",
                    f"{len(bad)} of the first {done} images cannot be decoded, more than {max_bad_images:g} of all "
                    f"{total}: {', '.join(bad[:_NAMED])}. Mend the data set, or accept a larger share",
                )
        if on_progress is not None:
            on_progress(done, total)

    rows = {}
    for part, share in shares.items():
        start = time.monotonic()
        some = _examples(source, part, share)
        try:
            own = decode_rows(some, examples[part], image_size, folder / f"{part}.npy", count, room)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise ConfigError.of("TRANSFER_CACHE_DIR", f"{folder} ran full while images were decoded to it") from error
        if not len(own):
            expression = source.splits[part].expression
            raise ConfigError.of(SPLIT_VARIABLES[part], f"none of the images of {expression!r} can be decoded")
        logger.info("decoded %d images of the %s split in %.1f s", len(own), part, time.monotonic() - start)
        rows[part] = together(own, replicas)
    if bad:
        logger.warning("skipped %d of %d images that cannot be decoded", len(bad), total)
    present = np.bincount(rows["train"].labels, minlength=len(source.classes))
    missing = [name for name, held in zip(source.classes, present, strict=True) if not held]
    if missing:
        raise ConfigError.of(
            "TRANSFER_TRAIN_SPLIT",
            f"{source.splits['train'].expression!r} has no example of {len(missing)} of the {len(source.classes)} "
            f"classes: {', '.join(missing[:_NAMED])}; take a larger part",
        )
    return rows


def together(rows: Rows, replicas: Replicas) -> Rows:
    """Return the examples of all workers in the order of the data set's files, of which ``rows`` are this worker's.

    TFDS reads several files in turns, and others in each worker. By the order of the files, an example has the same
    place however many workers there are, so the same experiment draws the same batches.

    All workers call it. 76 bytes or so are exchanged for each example, its id among them.
    """
    ids: list[str] = []
    holders, positions = [], []
    for worker, told in enumerate(replicas.gather(json.dumps(rows.ids).encode())):
        theirs = json.loads(told)
        ids += theirs
        holders.append(np.full(len(theirs), worker, np.int32))
        positions.append(np.arange(len(theirs)))
    labels = np.frombuffer(b"".join(replicas.gather(rows.labels.tobytes())), np.int32)
    digests = b"".join(replicas.gather(b"".join(rows.digests)))
    keys = [_place(example) for example in ids]
    order = np.array(sorted(range(len(ids)), key=keys.__getitem__), np.int64)
    if replicas.workers == 1 and np.array_equal(order, positions[0]):
        return rows
    return replace(
        rows,
        ids=tuple(ids[i] for i in order),
        labels=labels[order],
        digests=tuple(digests[_DIGEST_BYTES * i : _DIGEST_BYTES * (i + 1)] for i in order),
        placement=Placement(np.concatenate(holders)[order], np.concatenate(positions)[order], replicas.worker),
    )


def _place(example: str) -> tuple[str, int]:
    """Return file and number of an id such as ``flowers-train.tfrecord-00003-of-00008__12``."""
    file, _, number = example.rpartition("__")
    return file, int(number)


def _share(source: Source, part: str, replicas: Replicas) -> Any:
    """Return the TFDS instruction for this worker's share of a split."""
    expression = source.splits[part].expression
    return expression if replicas.workers == 1 else tfds.even_splits(expression, replicas.workers)[replicas.worker]


def decoding_at_full_speed(source: Source, threads: int) -> int:
    """Return about how many bytes it takes to read and decode photos on so many threads, of any size.

    What a photo takes is known when it is read, so this is a guess: from the bytes of an example in the mean, at most
    that of a photo of 24 million pixels. ``decode_rows`` keeps to what it is given, whatever the photos.
    """
    example = _bytes_of_example(source)
    photo = min(_LARGE_PHOTO, _PIXELS_OF_BYTE * example or _LARGE_PHOTO)
    several, ahead = _read_ahead(example)
    return threads * photo + example * (_FILES * _OF_FILE if several else ahead)


def _bytes_of_example(source: Source) -> int:
    """Return what an example takes in the data set's files, in the mean; 0 where the data set does not tell."""
    splits = source.builder.info.splits.values()
    return int(sum(split.num_bytes or 0 for split in splits) // max(1, sum(split.num_examples for split in splits)))


def _read_ahead(example: int) -> tuple[bool, int]:
    """Return whether several files are read at once, and how many examples are read ahead of those that are decoded.

    example: bytes of one, in the mean.
    """
    several = example * _FILES * _OF_FILE <= _SEVERAL_FILES
    return several, 2 if several else max(2, _ONE_FILE // example)


def first_rows(
    source: Source, part: str, examples: int, image_size: int, folder: Path, room: Room | None = None
) -> tuple[Rows, float]:
    """Decode the first ``examples`` of a split, to ``sample.npy`` in ``folder``: perhaps none can be.

    Returns them, and how many examples a second were decoded after the first; of a single one, with the time until it
    was there. Raises like :func:`read_splits`.
    """
    times = [time.perf_counter()]

    def count(_example_id: str, _decoded: bool) -> None:
        stop_if_asked()
        times.append(time.perf_counter())

    some = itertools.islice(_examples(source, part, source.splits[part].expression), examples)
    rows = decode_rows(some, examples, image_size, folder / "sample.npy", count, room)
    since = times[1:] if len(times) > 2 else times
    return rows, (len(since) - 1) / max(since[-1] - since[0], 1e-6)


def _examples(source: Source, part: str, share: Any) -> Iterator[tuple[str, int, bytes]]:
    """Yield id, label and encoded image of each example of a ``share`` of a split, in TFDS's unshuffled order."""
    expression = source.splits[part].expression
    options = tf.data.Options()
    options.deterministic = True
    options.threading.private_threadpool_size = options.autotune.cpu_budget = cpus()
    several, ahead = _read_ahead(_bytes_of_example(source))
    folder = str(source.builder.data_dir)
    with Place(folder, "TRANSFER_DATASET", is_prepared=True).errors(f"{expression!r} of {folder}"):
        dataset = source.builder.as_dataset(
            split=share,
            shuffle_files=False,
            decoders=tfds.decode.PartialDecoding(
                {source.image_key: True, source.label_key: True},
                decoders={source.image_key: tfds.decode.SkipDecoding()},
            ),
            read_config=tfds.ReadConfig(
                options=options,
                add_tfds_id=True,
                try_autocache=False,
                num_parallel_calls_for_interleave_files=cpus() if several else None,
                num_parallel_calls_for_decode=None,
                skip_prefetch=True,
            ),
        )
        for example in dataset.prefetch(ahead).as_numpy_iterator():
            example_id, label = example["tfds_id"].decode(), int(example[source.label_key])
            if label < 0:
                raise ConfigError.of(
                    SPLIT_VARIABLES[part],
                    f"{expression!r} has examples without a label, such as {example_id}; take a split that is labelled",
                )
            yield example_id, label, example[source.image_key]
