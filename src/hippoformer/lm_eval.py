"""`python -m hippoformer.lm_eval …`: the command `lm-eval`, which then knows `--model hippoformer`.

The harness finds models by a registry that other packages can only enter by being imported, so this imports the one and
then runs the other. All its options and subcommands are the harness's own.
"""

import sys

from hippoformer.errors import ConfigurationError, HippoFormerError


def main(argv: list[str] | None = None) -> int:
    """Runs the harness; 0 on success, 2 on an error that was explained."""
    try:
        from lm_eval.__main__ import cli_evaluate

        import hippoformer.evaluation.harness  # noqa: F401
    except ImportError as error:
        raise ConfigurationError(f"lm-eval is not installed ({error}): pip install 'hippoformer[harness]'") from error
    before, sys.argv = sys.argv, ["lm-eval", *(sys.argv[1:] if argv is None else argv)]
    try:
        cli_evaluate()
    finally:
        sys.argv = before
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except HippoFormerError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(2)
