"""Extractors on small fabricated trees, and apt's absence and failures; nothing here uses the network."""

import gzip
import hashlib
import os
import string
import subprocess

import pytest

from data_prep.corpora import debian
from data_prep.corpora.build import build
from data_prep.corpora.cli import source_table
from data_prep.corpora.debian import check_tools, fetch, resolve
from data_prep.corpora.debian_corpus import documents_of, package_sources
from data_prep.corpora.debian_extract import dictd, jargon, joined, kjv, kjv_chapters, pages, plain, pod, wordnet
from data_prep.corpora.debian_sources import SOURCES, Source
from data_prep.corpora.debian_text import clean, html_text, pod_text
from data_prep.corpora.tiers import TIERS, chosen_sources
from data_prep.errors import DataError


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(data) if path.suffix in (".gz", ".dz") else data)


def test_html_gives_the_readable_text_only():
    page = """<html><head><title>t</title></head><body><nav>Contents <a>x</a></nav>
    <div class="sphinxsidebar"><p>side <br> bar</p></div><h1>Head&amp;ing</h1><p>One
      two<b> three</b>.</p><pre>a  b
  c</pre><ul><li>item<script>var x;</script></ul><p>caf\u00e9&nbsp;end</p></body></html>"""
    assert html_text(page).split("\n") == [
        "Head&ing",
        "",
        "One two three.",
        "",
        "a  b",
        "  c",
        "",
        "item",
        "",
        "caf\u00e9 end",
    ]


def test_text_is_made_uniform():
    assert clean("a\r\nb  \n\n\n\nc\xa0d\u00b6\n\n") == "a\nb\n\nc d"
    assert pod_text("=head1 NAME\n\nI<perl> - C<< x >> B<bold>\n\n=cut\n") == "NAME\n\nperl - x bold"


def test_files_by_pattern_links_and_encodings(tmp_path):
    write(tmp_path / "usr/share/doc/p/b.txt.gz", "second")
    write(tmp_path / "usr/share/doc/p/a.txt", "caf\xe9".encode("latin-1"))
    write(tmp_path / "usr/share/doc/p/translations/c.txt", "left out")
    os.symlink(tmp_path / "usr/share/doc/p/a.txt", tmp_path / "usr/share/doc/p/link.txt")
    extract = plain("usr/share/doc/p/**/*.txt", "usr/share/doc/p/**/*.txt.gz", without="/translations/")
    assert list(extract(tmp_path)) == [("p/a.txt", "caf\u00e9"), ("p/b.txt.gz", "second")]
    write(tmp_path / "x/y.html", "<p>page")
    write(tmp_path / "x/y.pod", "=head1 Pod")
    assert list(pages("x/*.html")(tmp_path)) == [("x/y.html", "page")]
    assert list(pod("x/*.pod")(tmp_path)) == [("x/y.pod", "Pod")]


def test_dictionary_entries_are_read_once_and_joined(tmp_path):
    entries = [b"zero header\n", b"Alpha\n  the first\n     [1913 Webster]\n", b"Beta " + b"long " * 500, b"Gamma\n"]
    spans, start = [], 0
    for entry in entries:
        spans.append((start, len(entry)))
        start += len(entry)

    def number(value):
        alphabet = string.ascii_uppercase + string.ascii_lowercase + string.digits + "+/"
        return alphabet[value // 64] + alphabet[value % 64]

    words = ["00-database-info", "alpha", "beta", "gamma", "gamma-again"]
    of = [0, 1, 2, 3, 3]
    index = "".join(
        f"{word}\t{number(spans[i][0])}\t{number(spans[i][1])}\n" for word, i in zip(words, of, strict=True)
    )
    write(tmp_path / "usr/share/dictd/d.index", index)
    write(tmp_path / "usr/share/dictd/d.dict.dz", b"".join(entries))
    assert list(dictd("d")(tmp_path)) == [
        ("d/0", "Alpha\n  the first\n\nBeta " + ("long " * 500).strip()),
        ("d/1", "Gamma"),
    ]


def test_short_entries_are_joined_to_documents():
    documents = list(joined("n", ["x" * 900] * 5))
    assert [name for name, _ in documents] == ["n/0", "n/1"]
    assert [len(text) for _, text in documents] == [3 * 900 + 4, 2 * 900 + 2]


def test_wordnet_lines(tmp_path):
    for part in ("noun", "verb", "adj", "adv"):
        write(tmp_path / f"usr/share/wordnet/data.{part}", "  1 licence text\n")
    line = '00001740 03 n 02 entity 0 living_thing(p) 0 003 ~ 1 n 0000 | that which exists; "it is"  \n'
    write(tmp_path / "usr/share/wordnet/data.noun", "  1 licence\n" + line * 41)
    documents = list(wordnet(tmp_path))
    assert [name for name, _ in documents] == ["noun/0", "noun/1"]
    assert documents[1][1] == 'entity, living thing: that which exists; "it is"'


def test_jargon_is_split_by_entry(tmp_path):
    text = "Introduction.\n" + "".join(f"\n:word{i}: n. {'meaning ' * 150}\n" for i in range(4))
    write(tmp_path / "usr/share/doc/jargon-text/jargon.txt.gz", text)
    documents = list(jargon(tmp_path))
    assert len(documents) == 2
    assert documents[1][1].startswith(":word2:")


def test_bible_by_chapter(tmp_path):
    verses = "Gen1:1 In the beginning\nGen1:2 And the earth\nGen2:1 Thus\nnoise\n1 Sam 3:1 And\n"
    assert list(kjv_chapters(verses))[:2] == [("Gen1", "In the beginning\nAnd the earth"), ("Gen2", "Thus")]
    with pytest.raises(DataError, match="leave out the source kjv"):
        list(kjv(tmp_path))


def test_no_apt_offers_the_library(monkeypatch):
    monkeypatch.setattr(debian.shutil, "which", lambda name: None)
    with pytest.raises(DataError, match=r"apt-get.*not found.*--tier stdlib --out DIR.*quickstart"):
        check_tools()
    with pytest.raises(DataError, match="--tier stdlib"):
        next(package_sources(["jargon"], None))


def test_versions_are_resolved_to_the_highest():
    known = ["python3.9-doc", "python3.11-doc", "python3.11-docs-theme", "python3-doc"]
    assert resolve(r"python3\.\d+-doc", known) == "python3.11-doc"
    assert resolve("perl-doc", []) == "perl-doc"
    with pytest.raises(DataError, match=r"no package linux-doc.*apt-get update"):
        resolve(r"linux-doc-\d+\.\d+", known)


def test_a_failed_download_gives_apts_words_and_leaves_nothing(tmp_path, monkeypatch):
    def fail(command, **_):
        raise subprocess.CalledProcessError(100, command, "", "W: noise\nE: Unable to locate package gone\n")

    monkeypatch.setattr(debian.subprocess, "run", fail)
    with pytest.raises(DataError, match=r"apt-get -q download gone.*100: E: Unable to locate package gone;.*--sources"):
        fetch("gone", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_sources_are_chosen_by_name():
    assert chosen_sources("quick", "", "") == sorted(TIERS["quick"], key=list(SOURCES).index)
    assert chosen_sources("stdlib", "kjv, gcide", "") == ["gcide", "kjv"]
    assert "anarchism" not in chosen_sources("main", "", "")
    assert "anarchism" in chosen_sources("main", "", "anarchism")
    with pytest.raises(DataError, match="unknown source kvj; known: gcide, "):
        chosen_sources("quick", "kvj", "")
    for name, source in SOURCES.items():
        assert source.licence in source_table()
        assert name in source_table()


def test_a_source_goes_from_package_file_to_corpus(tmp_path, monkeypatch):
    """A package made on the spot would need dpkg-deb; what is replaced here is the download and the unpacking."""
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "fake-doc_1.0_all.deb").write_bytes(b"package")

    def unpack(package, root):
        assert package.sha256 == hashlib.sha256(b"package").hexdigest()
        for i in range(30):
            write(root / f"doc/{i}.txt", f"Text number {i % 20} of the fabricated package.")

    monkeypatch.setattr("data_prep.corpora.debian_corpus.unpack", unpack)
    monkeypatch.setattr("data_prep.corpora.debian_corpus.check_tools", lambda: None)
    source = Source(("fake-doc",), "MIT", 0.1, plain("doc/*.txt"), "fabricated")
    monkeypatch.setitem(SOURCES, "fake", source)
    lines = []
    manifest = build(tmp_path / "out", package_sources(["fake"], tmp_path / "cache"), report=lines.append)
    record = manifest["sources"]["fake"]
    assert record["licence"] == "MIT"
    assert record["recipe"]["packages"][0] == {
        "package": "fake-doc",
        "file": "fake-doc_1.0_all.deb",
        "bytes": 7,
        "sha256": hashlib.sha256(b"package").hexdigest(),
    }
    assert (manifest["documents"], record["repeated"]) == (20, 10)
    monkeypatch.setattr("data_prep.corpora.debian_corpus.unpack", lambda *_: pytest.fail("extracted again"))
    again = build(tmp_path / "out", package_sources(["fake"], tmp_path / "cache"), report=lines.append)
    assert again == manifest
    assert "kept" in lines[2]


def test_unpacked_files_do_not_stay(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("data_prep.corpora.debian_corpus.unpack", lambda package, root: write(root / "a.txt", "text"))
    source = Source(("p",), "MIT", 0.1, plain("*.txt"), "fabricated")
    assert [document.id for document in documents_of("s", source, [None])] == ["s/a.txt"]
    assert list(tmp_path.iterdir()) == []
