import sys

from jit_accel.compare import main

sys.exit(main())
