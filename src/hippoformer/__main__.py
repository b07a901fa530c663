"""`python -m hippoformer`: the command line."""

import sys

from hippoformer.cli import main

sys.exit(main())
