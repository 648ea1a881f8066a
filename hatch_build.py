"""What hatchling runs when Baton is installed or made into a wheel: it compiles what is written in C. Part of no package."""

from __future__ import annotations

import sys
import sysconfig
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

_BUILDS = tuple(map(Path, ("baton/engine/devices/native/build.py", "kv_transfer/native/build.py")))


class Libraries(BuildHookInterface[Any]):
    """Puts the libraries beside their sources, where an editable install finds them, and into the wheel.

    What cannot be compiled is told, and left out: everything written in C is there in Python too, only slower.
    """

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called before a wheel is made. An editable one has version "editable"; nothing differs but what ends up in it."""
        root = Path(self.root)
        libraries = [path.relative_to(root).as_posix() for build in _BUILDS for path in self._built(_loaded(root / build))]
        build_data["artifacts"] += libraries
        if libraries:
            build_data["pure_python"] = False
            build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"

    def _built(self, build: ModuleType) -> list[Path]:
        try:
            libraries: list[Path] = build.build(self.app.display_warning)
        except build.CompileError as error:
            self.app.display_warning(f"this does not compile, and Baton will be slower without it: {error}")
            return []
        return libraries


def _loaded(path: Path) -> ModuleType:
    """The module in this file, without the packages around it: they need torch, which a build does not have."""
    spec = spec_from_file_location(path.parent.as_posix(), path)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for their module
    spec.loader.exec_module(module)
    return module
