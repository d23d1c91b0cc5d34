"""kittybuild: reproducible builds of merged checkpoints.

`build`, `plan`, `open_checkpoint` and `load_model` are here; `import kittybuild` alone loads none of what they need.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kittybuild.calls import build, plan
    from kittybuild.opened import load_model, open_checkpoint

__version__ = "0.1.0"
__all__ = ["__version__", "build", "load_model", "open_checkpoint", "plan"]


def __getattr__(name: str) -> Any:
    if name in ("build", "plan"):
        from kittybuild import calls

        return getattr(calls, name)
    if name in ("load_model", "open_checkpoint"):
        from kittybuild import opened

        return getattr(opened, name)
    raise AttributeError(f"module 'kittybuild' has no attribute {name!r}")
