"""Raw files to records, through a cache of record files.

The cache is keyed by the content of the raw files: changed files are prepared anew, unchanged ones only read.
"""

import contextlib
import hashlib
import io
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator

import tensorflow_datasets as tfds
from absl import logging
from tensorflow_datasets.core.utils import gcs_utils

from mbrl_lm.data.builders import base
from mbrl_lm.data.records import Record

Path = str | pathlib.Path


def load(builder: type[base.DialogueBuilder], data_dir: Path, cache_dir: Path) -> dict[str, list[Record]]:
    """Prepares the raw files of `data_dir`, unless the cache has them already, and reads them.

    Several processes may do this at once. What an interrupted one leaves behind is never read.

    Returns:
      split -> its records, in the order of the raw files.

    Raises:
      DataError: if raw files are missing or malformed.
    """
    raw_dir = pathlib.Path(data_dir)
    key = fingerprint(builder.raw_files(raw_dir), raw_dir, str(builder.VERSION))
    cached = pathlib.Path(cache_dir).resolve() / builder.name / key
    with _quiet():
        if not cached.exists():
            _prepare(builder, raw_dir, cached)
        prepared = builder(raw_dir=raw_dir, data_dir=cached)
        return {split: [base.from_example(x) for x in prepared.as_data_source(split)] for split in prepared.info.splits}


def fingerprint(files: list[pathlib.Path], root: pathlib.Path, version: str) -> str:
    """16 hexadecimal digits of the version, and the names, sizes and content of the files."""
    total = hashlib.sha256(version.encode())
    for path in sorted(files):
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        total.update(f"\n{path.relative_to(root).as_posix()} {path.stat().st_size} {content}".encode())
    return total.hexdigest()[:16]


def _prepare(builder: type[base.DialogueBuilder], raw_dir: pathlib.Path, cached: pathlib.Path) -> None:
    cached.parent.mkdir(parents=True, exist_ok=True)
    unfinished = pathlib.Path(tempfile.mkdtemp(prefix=".unfinished-", dir=cached.parent))
    try:
        config = tfds.download.DownloadConfig(try_download_gcs=False)
        builder(raw_dir=raw_dir, data_dir=unfinished).download_and_prepare(download_config=config)
        try:
            os.rename(unfinished, cached)
        except OSError:
            if not cached.exists():  # else another process was faster, with the same records
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps TFDS from writing to the screen, and from asking a bucket on the network for data sets of the same name."""
    tfds.disable_progress_bar()
    verbosity, gcs_disabled = logging.get_verbosity(), gcs_utils._is_gcs_disabled
    logging.set_verbosity(logging.ERROR)
    gcs_utils._is_gcs_disabled = True
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        gcs_utils._is_gcs_disabled = gcs_disabled
        logging.set_verbosity(verbosity)
