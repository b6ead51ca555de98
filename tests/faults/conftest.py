"""Lets the fault tests, and the processes that they start, import the two modules beside them."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
