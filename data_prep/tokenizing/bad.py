"""What is said of bad records: their counts, the report beside the output, and what would work if all are bad."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_prep.files import atomic_write
from data_prep.tokenizing.outlook import what_would_work
from data_prep.tokenizing.records import BAD_KINDS, Rules
from data_prep.tokenizing.units import InputUnit


def bad_counts(records: list[dict[str, Any]]) -> dict[str, int]:
    """Bad records by kind, kinds that did not occur left out."""
    totals = {kind: sum(record["bad"].get(kind, 0) for record in records) for kind in BAD_KINDS}
    return {kind: count for kind, count in totals.items() if count}


def report_bad(records: list[dict[str, Any]], prefix: str | Path) -> None:
    """Write PREFIX.bad.jsonl, or remove an old one if there is nothing to report."""
    path = Path(f"{prefix}.bad.jsonl")
    if not any(record["bad_records"] for record in records):
        path.unlink(missing_ok=True)
        return
    with atomic_write(path) as stream:
        for record in records:
            for entry in record["bad_records"]:  # sorted keys: a record made now and one read from a part are equal
                stream.write((json.dumps(entry, sort_keys=True) + "\n").encode())


def nothing_left(units: Sequence[InputUnit], rules: Rules, records: list[dict[str, Any]]) -> str:
    """The message where no document came out of `units`; `records` has a dict of Tally's fields per unit."""
    names = ", ".join(dict.fromkeys(unit.path for unit in units)) or "the input"
    first = next((entry for record in records for entry in record["bad_records"]), None)
    if first is None:
        return f"{names}: no documents; give at least one with a text"
    counts = ", ".join(f"{kind} {count}" for kind, count in bad_counts(records).items())
    advice = "" if rules.hook else what_would_work(units[0], rules.text_key)
    return (
        f"{names}: no documents are left of {sum(record['records'] for record in records)} records ({counts});"
        f" the first, at byte offset {first['offset']}: {first['message']}{advice and '; '}{advice}"
    )
