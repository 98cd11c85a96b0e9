"""The one error a bad configuration raises, with every problem in it."""

import re
from collections.abc import Sequence

from hope.sections import Problem

LINE_WIDTH = 110
LEAD = re.compile(r"[A-Za-z ]+: ")


class ConfigError(Exception):
    """A configuration that cannot run.

    `source` is the file (or a word for it), `problems` every problem found, in the order found.
    `str()` is the message for the user, one or two lines per problem. The program exits with code 2.
    """

    def __init__(self, source: str, problems: Sequence[Problem]):
        if not problems:
            raise ValueError("a ConfigError needs at least one problem")
        self.source = str(source)
        self.problems = list(problems)
        super().__init__(self.source, self.problems)

    def __str__(self) -> str:
        return format_problems(self.source, self.problems)


def format_problems(source: str, problems: Sequence[Problem]) -> str:
    """A header with the file and the count, then the problems with their paths in one column.

    A fix stands behind its problem where both fit in 110 columns, else on the next line. One that does not
    begin with words and a colon ("nearest: 992") gets "try: " in front.
    """
    count = f"{len(problems)} problem" + ("s" if len(problems) != 1 else "")
    lines = [f"config error  {source}   {count}"]
    column = max(len(path) for path, _, _ in problems) + 3
    for path, what, fix in problems:
        indent = " " * (2 + column)
        head = f"  {path:<{column}}{what}".replace("\n", "\n" + indent)
        hint = fix if not fix or LEAD.match(fix) else f"try: {fix}"
        hint = hint.replace("\n", "\n" + indent)
        if not hint:
            lines.append(head)
        elif len(head) + len(hint) + 3 <= LINE_WIDTH and "\n" not in head + hint:
            lines.append(f"{head};  {hint}")
        else:
            lines += [head, indent + hint]
    return "\n".join(lines)
