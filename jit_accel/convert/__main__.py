import sys

from jit_accel.convert import main

sys.exit(main())
