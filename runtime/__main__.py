"""`python -m runtime` is `eft`."""

import sys

from runtime.cli import main

sys.exit(main())
