"""Packages that only some parts of the evaluation need."""

import importlib
from types import ModuleType

from hippoformer.errors import MissingPackageError

# Name to import -> name to install, where they differ.
_INSTALLED_AS = {"rouge_score": "rouge-score"}


def needed(module: str) -> ModuleType:
    """Imports an optional package.

    Raises:
        MissingPackageError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = _INSTALLED_AS.get(module.partition(".")[0], module.partition(".")[0])
        raise MissingPackageError(
            f"this part of the evaluation needs the package {package} ({error}); install hippoformer[evaluate], or "
            f"{package} alone."
        ) from error
