"""asv benchmarks of cupyattn on the CPU.

What is measured is the checkout around them, installed or not; where asv has made an environment of its own, the commit
that it installed there.
"""

import os
import sys
from pathlib import Path

SUITE = Path(__file__).resolve().parents[1]
CHECKOUT = SUITE.parent

if os.environ.get("ASV_ENV_TYPE", "existing") == "existing":
    sys.path.insert(0, str(CHECKOUT))
