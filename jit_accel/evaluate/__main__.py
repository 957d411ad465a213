import sys

from jit_accel.evaluate import main

sys.exit(main())
