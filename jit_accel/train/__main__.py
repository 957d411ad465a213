import sys

from jit_accel.train import main

sys.exit(main())
