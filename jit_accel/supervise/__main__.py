import sys

from jit_accel.supervise import main

sys.exit(main())
