"""Let these tests import the packages of the repository and `multirank`, wherever pytest was started."""

import sys
from pathlib import Path

_TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [path for path in (str(_TESTS), str(_TESTS.parent)) if path not in sys.path]
