"""`python -m pyfused` is the same as `pyfused`."""

import sys

from .cli import main

sys.exit(main())
