import sys

from jit_accel.sample import main

sys.exit(main())
