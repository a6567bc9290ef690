"""`python -m erasure`: the command line, also for `accelerate launch -m erasure ...`."""

from __future__ import annotations

import sys

from erasure.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
