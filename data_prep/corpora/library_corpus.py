"""The running Python's own library as sources of a corpus: no network, no packages."""

import platform
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from data_prep.corpora.build import CorpusSource
from data_prep.corpora.corpus import LICENCE, Document, stdlib_documents, topic_documents


@dataclass(frozen=True)
class LibrarySource:
    """What a source of the library holds; `megabytes` of text, about."""

    megabytes: float
    documents: Callable[[], Iterable[Document]]
    about: str


LIBRARY: dict[str, LibrarySource] = {
    "stdlib": LibrarySource(3.3, stdlib_documents, "docstrings and comments of Python's own library"),
    "topics": LibrarySource(0.5, topic_documents, "Python's language reference, as help() shows it"),
}


def library_sources(names: Iterable[str]) -> Iterator[CorpusSource]:
    """The named entries of LIBRARY, to be read when they are needed."""
    for name in names:
        recipe = {"python": platform.python_version()}
        yield CorpusSource(name, LICENCE, recipe, LIBRARY[name].documents)
