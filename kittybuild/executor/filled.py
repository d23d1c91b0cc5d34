"""Tensors and models of torch from bytes in memory. No code but that of the installed transformers is run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kittybuild.errors import UsageError, VerifyError
from kittybuild.executor.meta_model import judge
from kittybuild.tensors import TensorSpec

if TYPE_CHECKING:
    import torch


def as_torch(data: bytearray, spec: TensorSpec) -> torch.Tensor:
    """A tensor over these bytes, which are its own from now on."""
    import torch

    dtype = getattr(torch, spec.dtype.torch_name)
    return torch.frombuffer(data, dtype=dtype).reshape(spec.shape) if data else torch.empty(spec.shape, dtype=dtype)


def filled_model(
    tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any], generation: Mapping[str, Any] | None, where: str
) -> Any:
    """The transformers model that a config.json describes, filled with these tensors, in evaluation mode.

    Raises UsageError KB019 where transformers is not installed or has no such class, VerifyError KB601 where tensors
    are missing, too many or of another shape.
    """
    try:
        import transformers
    except ImportError as error:
        hint = "install transformers and torch"
        raise UsageError("KB019", f"loading a model needs transformers: {error}", hint=hint) from error
    name = (config.get("architectures") or ["none"])[0]
    kind = getattr(transformers, name, None)
    if not hasattr(kind, "from_pretrained"):
        message = f"transformers {transformers.__version__} has no class {name}"
        raise UsageError("KB019", message, at=where, hint="open its tensors with `open_checkpoint`")
    try:
        made, told = kind.from_pretrained(  # type: ignore[union-attr]
            None,
            config=kind.config_class.from_dict(dict(config)),  # type: ignore[union-attr]
            state_dict=dict(tensors),
            dtype=config.get("dtype") or config.get("torch_dtype") or "auto",
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    except Exception as error:  # whatever a class does not like in its config
        hint = "transformers says so when it builds the model of this config.json"
        message = f"the config.json makes no {name}: {type(error).__name__}: {error}"
        raise VerifyError("KB601", message, at=where, hint=hint) from error
    judge(where, name, told)
    if generation:
        made.generation_config = transformers.GenerationConfig.from_dict(dict(generation))
    return made.eval()
