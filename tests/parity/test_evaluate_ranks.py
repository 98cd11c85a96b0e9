"""Two processes share the rows of an evaluation and come to what one finds."""

import contextlib
import io
import json

from evaluated import TEXT, stored_model
from multirank import run_ranks

from hope.evaluate import __main__ as program


def evaluated(words):
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
        code = program.main(words)
    return code, out.getvalue()


def test_two_processes_find_what_one_finds(tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    items = [{"query": "the", "choices": [" cat" * n, " mat"], "gold": 1} for n in range(1, 9)]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    words = [str(stored_model(tmp_path)), "--text", str(tmp_path / "a.txt"), "--task", str(tmp_path / "t.jsonl")]
    words += ["--batch-tokens", "64", "--json"]
    assert evaluated([*words, str(tmp_path / "one.json")])[0] == 0
    (first, table), (second, nothing) = run_ranks(evaluated, 2, [*words, str(tmp_path / "two.json")])
    assert (first, second, nothing) == (0, 0, "")
    assert "accuracy_per_byte" in table
    one, two = (json.loads((tmp_path / name).read_text()) for name in ("one.json", "two.json"))
    assert one == two
