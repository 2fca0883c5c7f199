"""`python -m pyfused.cli` is the command `pyfused`."""

import sys

from . import main

if __name__ == "__main__":
    sys.exit(main())
