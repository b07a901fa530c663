"""`python -m hippoformer.cli`."""

from hippoformer.cli import main

main()
