"""The research evaluations, run from a checkout: `python -m evaluation NAME --model ... --text ...`."""
