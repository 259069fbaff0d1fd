"""``python -m ipt_fast.cli`` is ``ipt-fast``."""

import sys

from . import main

sys.exit(main())
