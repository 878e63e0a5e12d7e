"""`python -m pipestill`."""

import sys

from pipestill.cli import main

if __name__ == "__main__":
    sys.exit(main())
