"""How does the reference show `pyfused.layer_norm`? griffe takes `pyfused.ops.layer_norm` for the file of that name, which
Python hides behind the function that the file defines. This extension points the public names at the functions."""

from __future__ import annotations

from typing import Any

import griffe


class Operators(griffe.Extension):
    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        if pkg.name != "pyfused":
            return
        for name, module in pkg["ops"].members.items():
            if name in pkg.members and not module.is_alias and module.is_module and name in module.members:
                pkg.set_member(name, griffe.Alias(name, module[name], parent=pkg))
