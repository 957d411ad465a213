import sys

from jit_accel.prepare import main

sys.exit(main())
