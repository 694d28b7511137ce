"""`python -m sparse_signals`: the command line."""

import sys

from sparse_signals.app.cli import main

if __name__ == "__main__":
    sys.exit(main())
