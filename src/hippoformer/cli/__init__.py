from hippoformer.cli import chat, evaluate, harness, memory, original, report, run, suite, trace
from hippoformer.cli.app import app

__all__ = ["app", "chat", "evaluate", "harness", "main", "memory", "original", "report", "run", "suite", "trace"]


def main() -> None:
    """Entry point of the `hippoformer` command."""
    app(prog_name="hippoformer")
