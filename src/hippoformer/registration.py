"""Makes `AutoConfig` and `AutoModelForCausalLM` of transformers know `hippoformer`, without importing them.

transformers has no entry points for models, and importing its Auto classes takes seconds. So the configuration is
registered right after transformers' own module of configurations is executed: at once where that has happened, else
through an import hook for this one module. The model class is registered when its module is imported, which creating a
configuration does (`HippoFormerConfig.__init__`): nobody asks for the model without one.
"""

import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import PathFinder
from types import ModuleType
from typing import Any

_AUTO_CONFIG = "transformers.models.auto.configuration_auto"


def register_with_transformers() -> None:
    """Registers the configuration now if transformers' Auto classes are loaded, otherwise when they are."""
    if _AUTO_CONFIG in sys.modules:
        _register_configuration()
    else:
        sys.meta_path.insert(0, _AfterAutoConfig())


def _register_configuration() -> None:
    from transformers import AutoConfig

    from hippoformer.configuration import HippoFormerConfig

    AutoConfig.register(HippoFormerConfig.model_type, HippoFormerConfig, exist_ok=True)


class _AfterAutoConfig(MetaPathFinder):
    """Finds transformers' module of configurations as Python would, and registers ours once it is executed."""

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> Any:
        if fullname != _AUTO_CONFIG:
            return None
        sys.meta_path.remove(self)
        spec: Any = PathFinder.find_spec(fullname, path, target)
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            _register_configuration()

        spec.loader.exec_module = execute_and_register
        return spec
