"""`python -m hippoformer`: the command line."""

from hippoformer.cli import main

main()
