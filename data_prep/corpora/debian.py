"""Documentation packages of Debian without root: apt-get download, dpkg-deb -x."""

import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data_prep.errors import DataError
from data_prep.files import sha256_file

_PROGRAMS = ("apt-get", "apt-cache", "dpkg-deb")


@dataclass(frozen=True)
class Package:
    """A downloaded package file."""

    name: str
    path: Path
    sha256: str

    def record(self) -> dict:
        """What a manifest says of it."""
        size = self.path.stat().st_size
        return {"package": self.name, "file": self.path.name, "bytes": size, "sha256": self.sha256}


def check_tools() -> None:
    """Raise DataError where apt does not exist, with what works there."""
    missing = [name for name in _PROGRAMS if shutil.which(name) is None]
    if missing:
        raise DataError(
            f"{', '.join(missing)} not found: this corpus comes from Debian's packages and needs Debian or Ubuntu"
            " (no root). Here `python -m data_prep corpus --tier stdlib --out DIR` collects about 6 MB of English"
            " from Python's own library, and `python -m data_prep quickstart --out DIR` tokenizes it as well"
        )


def resolve(pattern: str, known: Sequence[str] | None = None) -> str:
    """The package that a name or a regular expression means; of several the one with the highest version.

    Raises:
        DataError: apt's lists have none.
    """
    if re.fullmatch(r"[a-z0-9.+-]+", pattern) and "\\" not in pattern:
        return pattern
    if known is None:
        # letters up to the first expression: apt-cache takes a prefix
        prefix = re.split(r"[\\\[(]", pattern)[0]
        known = _output(["apt-cache", "pkgnames", prefix]).split()
    found = [name for name in known if re.fullmatch(pattern, name)]
    if not found:
        raise DataError(f"no package {pattern} in apt's lists; run `apt-get update` or leave out this source")
    return max(found, key=lambda name: [int(number) for number in re.findall(r"\d+", name)])


def fetch(pattern: str, cache: Path) -> Package:
    """The package's file in `cache`, downloaded unless one is there. apt checks its signature and digest.

    Raises:
        DataError: apt cannot find or download it; the message has apt's own words.
    """
    name = resolve(pattern)
    cache.mkdir(parents=True, exist_ok=True)
    if not (held := sorted(cache.glob(f"{name}_*.deb"))):
        # apt names the file only when it is complete, but a private folder also survives two runs at a time
        private = cache / f".{name}.partial"
        private.mkdir(exist_ok=True)
        try:
            _output(["apt-get", "-q", "download", name], private)
            for path in private.glob("*.deb"):
                path.replace(cache / path.name)
        finally:
            shutil.rmtree(private, ignore_errors=True)
        held = sorted(cache.glob(f"{name}_*.deb"))
    if not held:
        raise DataError(f"{cache}: apt-get download {name} gave no file")
    return Package(name, held[-1], sha256_file(held[-1]))


def unpack(package: Package, root: Path) -> None:
    """Put the package's files below `root`; nothing is installed and none of its scripts run."""
    _output(["dpkg-deb", "-x", str(package.path), str(root)])


def _output(command: list[str], folder: Path | None = None) -> str:
    try:
        run = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    except FileNotFoundError:
        raise DataError(f"{command[0]}: no such program") from None
    except subprocess.CalledProcessError as error:
        words = " ".join(line for line in error.stderr.splitlines() if line.startswith("E:")) or error.stderr.strip()
        raise DataError(
            f"`{' '.join(command)}` failed with {error.returncode}: {words}; `apt-get update` refreshes the"
            " lists of packages, and --sources leaves a source out"
        ) from None
    return run.stdout
