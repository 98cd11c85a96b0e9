"""Which sources a corpus takes: a tier, or names."""

from data_prep.corpora.debian_sources import SOURCES
from data_prep.corpora.library_corpus import LIBRARY
from data_prep.errors import DataError

TIERS: dict[str, tuple[str, ...]] = {
    "stdlib": tuple(LIBRARY),
    "quick": ("jargon", "foldoc", "kjv"),
    "main": tuple(name for name in SOURCES if name != "anarchism"),
}


def chosen_sources(tier: str, names: str, added: str) -> list[str]:
    """Names of a tier, or of a comma-separated list, plus `added` ones; each once, in the order of `corpus --list`.

    Raises:
        DataError: an unknown name; the message lists the known ones.
    """
    known = [*SOURCES, *LIBRARY]
    wanted = {name.strip() for part in (names, added) for name in part.split(",") if name.strip()}
    unknown = sorted(wanted - set(known))
    if unknown:
        raise DataError(f"unknown source {', '.join(unknown)}; known: {', '.join(known)}")
    if not names:
        wanted |= set(TIERS[tier])
    return [name for name in known if name in wanted]
