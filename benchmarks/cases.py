"""Cases of a check on a GPU in processes of their own: a wrong kernel may hang or crash, and takes nothing with it.

A program is started with `one MODE CASE`, CASE as JSON, and says its numbers and its verdict with `report`.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from typing import Any

Case = dict[str, Any]


def report(found: Case) -> None:
    """Print what `child` reads; `bad` of it lists what is wrong."""
    print("JSON", json.dumps(found))
    print("RESULT", f"BAD {', '.join(found['bad'])}" if found["bad"] else "ok", flush=True)


def child(program: str, mode: str, limit: int, case: Case) -> Case:
    """One case of a program, within `limit` seconds; what it printed goes out in one piece."""
    command, began = [sys.executable, program, "one", mode, json.dumps(case)], time.time()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit)
        out, ending = done.stdout, f"exit {done.returncode}"
        if done.returncode:
            out += "".join(f"  {line}\n" for line in done.stderr.strip().splitlines()[-8:])
    except subprocess.TimeoutExpired as error:
        said = error.stdout or b""
        out, ending = said.decode() if isinstance(said, bytes) else said, f"stopped after {limit} s"
    lines = out.splitlines()
    verdict = next((line for line in lines if line.startswith("RESULT")), f"RESULT BAD no result, {ending}")
    numbers = next((json.loads(line[5:]) for line in lines if line.startswith("JSON")), {})
    shown = "\n".join(line for line in lines if not line.startswith(("JSON", "RESULT")))
    print(f"{mode} {json.dumps(case)}\n{shown}\n{verdict}  ({ending}, {time.time() - began:.0f} s)", flush=True)
    return {"mode": mode, "case": case, "verdict": verdict.removeprefix("RESULT "), **numbers}
