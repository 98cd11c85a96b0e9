"""`python -m parallel.parity CONFIG ...`: any layout against one device; see `parallel.referee.parity`."""

import sys

from parallel.referee.parity import main

if __name__ == "__main__":
    sys.exit(main())
