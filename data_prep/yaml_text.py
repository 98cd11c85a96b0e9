"""YAML from a file or a command line that anyone may have written: nested no deeper than can be read."""

import yaml

DEEPEST = 32
"""Levels of lists and mappings in each other. OmegaConf gives up between 60 and 80; a configuration has about six."""


def shallow(text: str) -> str:
    """The text as it is. Raises yaml.YAMLError, with line and column, if it is nested deeper, or is no YAML."""
    level = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        level += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if level > DEEPEST:
            what = f"nested more than {DEEPEST} levels deep, which is the most that is read"
            raise yaml.MarkedYAMLError(problem=what, problem_mark=event.start_mark)
    return text
