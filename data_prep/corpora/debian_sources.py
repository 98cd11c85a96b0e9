"""The table of documentation sources: packages, licence, extractor; every source is chosen by its name."""

from dataclasses import dataclass

from data_prep.corpora.debian_extract import Extractor, dictd, jargon, kjv, pages, plain, pod, wordnet


@dataclass(frozen=True)
class Source:
    """Where one source's text comes from.

    Attributes:
        packages: names, or regular expressions for packages that carry a version in their name.
        licence: as the packages' copyright files state it.
        megabytes: text after extraction, about (Debian 12).
        extract: (name, text) pairs of an unpacked tree.
        about: one line for `corpus --list`.
    """

    packages: tuple[str, ...]
    licence: str
    megabytes: float
    extract: Extractor
    about: str


_DOC = "usr/share/doc"
_DEBIAN_MANUALS = (
    f"{_DOC}/debian-policy/policy.html/*.html",
    "usr/share/developers-reference/*.html",
    f"{_DOC}/developers-reference/**/*.html",
    f"{_DOC}/debian/FAQ/*.html",
)
_REFERENCE = ("usr/share/debian-reference/*.en.html", f"{_DOC}/debian-reference-en/**/*.en.html")
_KERNEL = f"{_DOC}/linux-doc-*/Documentation/**/*"

SOURCES: dict[str, Source] = {
    "gcide": Source(("dict-gcide",), "GPL-2+", 35.9, dictd("gcide"), "dictionary with literary quotations"),
    "linuxdoc": Source(
        (r"linux-doc-\d+\.\d+",),
        "GPL-2",
        25.4,
        # the translations (3 MB) are Chinese, Japanese, Korean, Italian, Spanish
        plain(f"{_KERNEL}.rst.gz", f"{_KERNEL}.txt.gz", f"{_KERNEL}.rst", without="/translations/"),
        "documentation of the Linux kernel",
    ),
    "wordnet": Source(("wordnet-base",), "WordNet-3.0", 11.5, wordnet, "word senses and glosses"),
    "pydoc": Source(
        (r"python3\.\d+-doc",),
        "PSF-2.0",
        11.0,
        plain(f"{_DOC}/python3.*/html/_sources/**/*.txt"),
        "Python's manual",
    ),
    "perldoc": Source(("perl-doc",), "Artistic OR GPL-1+", 8.2, pod("**/*.pod"), "Perl's manual"),
    "pgdoc": Source(
        (r"postgresql-doc-\d+",),
        "PostgreSQL",
        6.8,
        pages(f"{_DOC}/postgresql-doc-*/html/*.html"),
        "PostgreSQL's manual",
    ),
    "foldoc": Source(("dict-foldoc",), "GFDL-1.1+", 5.6, dictd("foldoc"), "dictionary of computing"),
    "lohelp": Source(
        ("libreoffice-help-en-us",),
        "MPL-2.0",
        4.6,
        pages("usr/share/libreoffice/help/en-US/text/**/*.html"),
        "help pages of an office suite",
    ),
    "kjv": Source(
        ("bible-kjv-text", "bible-kjv"),
        "public domain (program GPL)",
        4.1,
        kjv,
        "King James Bible, by chapter",
    ),
    "gitdoc": Source(("git-doc",), "GPL-2", 2.9, plain(f"{_DOC}/git*/**/*.txt"), "Git's manual"),
    "jargon": Source(("jargon-text",), "public domain", 1.7, jargon, "the Jargon File"),
    "handbook": Source(
        ("debian-handbook",),
        "GPL-2+ OR CC-BY-SA-3.0",
        1.2,
        pages(f"{_DOC}/debian-handbook/html/en-US/*.html"),
        "the Debian administrator's handbook",
    ),
    "debref": Source(("debian-reference-en",), "GPL-2+", 0.7, pages(*_REFERENCE), "Debian reference"),
    "debpolicy": Source(
        ("debian-policy", "developers-reference", "debian-faq"),
        "GPL-2+",
        1.0,
        pages(*_DEBIAN_MANUALS),
        "Debian policy, developers' reference, FAQ",
    ),
    "gnomehelp": Source(
        ("gnome-user-docs",), "CC-BY-SA-3.0", 0.7, pages("usr/share/help/C/**/*.page"), "help pages of a desktop"
    ),
    "anarchism": Source(
        ("anarchism",),
        "GFDL OR GPL",
        11.7,
        plain(f"{_DOC}/anarchism/markdown/*.md*"),
        "a political tract, the only long modern prose (80 kB per document); in no tier",
    ),
}
