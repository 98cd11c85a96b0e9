"""`python -m parallel.plan CONFIG [a.b=c ...]`: how every parameter is divided, summed and updated."""

import argparse
import sys

from configs.errors import ConfigError
from configs.schema import load
from hope.pipe import piped
from parallel.layout.plan import plan_table


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", help="YAML file, see configs/")
    parser.add_argument("overrides", nargs="*", help="section.key=value, or YAML files")
    args = parser.parse_intermixed_args(argv)
    try:
        config = load(args.config, args.overrides, check=False)
        problems = list(config.model.problems())
        if problems:
            raise ConfigError(args.config, problems)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    print(plan_table(config.model))
    return 0


if __name__ == "__main__":
    sys.exit(piped(main))
