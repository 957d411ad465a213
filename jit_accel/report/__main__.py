import sys

from jit_accel.report import main

sys.exit(main())
