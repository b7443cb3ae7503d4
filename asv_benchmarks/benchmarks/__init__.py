"""asv benchmarks of cupyattn on the CPU; what is measured is the checkout around them, installed or not."""

import sys
from pathlib import Path

SUITE = Path(__file__).resolve().parents[1]
CHECKOUT = SUITE.parent

sys.path.insert(0, str(CHECKOUT))
