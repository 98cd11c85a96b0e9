"""What the Dockerfile names is there. It is read: no container engine is needed, and none has built it."""

import json
import re
import tomllib

from house import PACKAGES, ROOT

TEXT = re.sub(r"\\\n", " ", (ROOT / "Dockerfile").read_text())
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def commands(word: str) -> list[str]:
    return [line.partition(" ")[2].strip() for line in TEXT.splitlines() if line.startswith(f"{word} ")]


def test_it_copies_the_whole_program_and_nothing_that_is_ignored():
    sources = [word for line in commands("COPY") for word in line.split()[:-1]]
    assert set(PACKAGES) | {"pretrain_hope.py", "pyproject.toml", PROJECT["readme"]} <= set(sources)
    ignored = [line.strip("/") for line in (ROOT / ".dockerignore").read_text().split()]
    for source in sources:
        assert (ROOT / source).exists(), source
        assert source not in ignored, source


def test_what_it_installs_is_what_the_project_asks_for():
    installed = " ".join(commands("RUN"))
    extras = re.search(r'-e "\.\[([\w,]+)\]"', installed)[1].split(",")
    assert set(extras) <= set(PROJECT["optional-dependencies"])
    assert re.search(r'"(torch[^"]*)"', installed)[1] in PROJECT["dependencies"]


def test_it_starts_a_program_that_exists():
    program, script, config, *_ = json.loads(commands("CMD")[0])
    assert program == "python"
    assert (ROOT / script).is_file()
    assert (ROOT / config).is_file()
