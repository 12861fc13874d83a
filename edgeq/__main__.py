"""``python -m edgeq`` is ``edgeq`` (L11)."""

import sys

from edgeq.cli import main

sys.exit(main())
