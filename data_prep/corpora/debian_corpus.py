"""Debian's documentation packages as sources of a corpus."""

import shutil
import tempfile
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

from data_prep.corpora.build import CorpusSource
from data_prep.corpora.corpus import Document
from data_prep.corpora.debian import Package, check_tools, fetch, unpack
from data_prep.corpora.debian_sources import SOURCES, Source

EXTRACTORS = 1  # raise when an extractor's output changes, so that finished parts are made again


def package_sources(names: Iterable[str], cache: Path) -> Iterator[CorpusSource]:
    """Download each source's packages into `cache` and describe it; text is extracted when asked for.

    Raises:
        DataError: apt does not exist here, or a package cannot be had.
    """
    check_tools()
    for name in names:
        source = SOURCES[name]
        packages = [fetch(pattern, cache) for pattern in source.packages]
        recipe = {"packages": [package.record() for package in packages], "extractors": EXTRACTORS}
        yield CorpusSource(name, source.licence, recipe, partial(documents_of, name, source, packages))


def documents_of(name: str, source: Source, packages: list[Package]) -> Iterator[Document]:
    """Unpack into a temporary folder, extract, remove."""
    folder = Path(tempfile.mkdtemp(prefix=f"{name}-"))
    try:
        for package in packages:
            unpack(package, folder)
        for identity, text in source.extract(folder):
            yield Document(f"{name}/{identity}", name, text)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
