"""`python -m parallel.parity CONFIG ...`: any layout against one device; see `parallel.referee.parity`."""

import sys

from hope.pipe import piped
from parallel.referee.parity import main

if __name__ == "__main__":
    sys.exit(piped(main))
