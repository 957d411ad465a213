import sys

from jit_accel.plan import main

sys.exit(main())
