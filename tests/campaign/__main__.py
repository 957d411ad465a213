"""The campaign: random faults at real trainings, and proof that nothing was lost.

python tests/campaign --faults 1000 --seed 0 --jobs 2
"""

import importlib
import sys
from pathlib import Path

TESTS = str(Path(__file__).parents[1])
if TESTS not in sys.path:  # as pytest does
    sys.path.insert(0, TESTS)

if __name__ == "__main__":
    sys.exit(importlib.import_module("campaign.program").main())
