"""A folder compared with what its config.json describes: the model is built without memory, and no weight is computed.

No code but that of the installed transformers is run.
"""

from __future__ import annotations

import json
import logging
import os

from kittybuild.errors import UsageError, VerifyError

SHOWN = 6


def check_model(folder: str) -> str | None:
    """Raise VerifyError KB601 if transformers would miss a weight, or find one too many or of another shape.

    Why that cannot be asked, if so: the folder has no config.json, or transformers has no such class. Raises
    UsageError KB011 where transformers is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        hint = "install transformers and torch, or leave the option out"
        raise UsageError("KB011", f"--check-model needs transformers: {error}", hint=hint) from error
    try:
        with open(os.path.join(folder, "config.json"), encoding="utf-8") as text:
            names = json.load(text).get("architectures") or ["none"]
    except FileNotFoundError:
        return "there is no config.json"
    kind = getattr(transformers, names[0], None)
    if not hasattr(kind, "from_pretrained"):
        return f"transformers {transformers.__version__} has no class {names[0]}"
    shown = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity(logging.ERROR)
    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        told = kind.from_pretrained(  # type: ignore[union-attr]
            folder,
            device_map="meta",
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            local_files_only=True,
            trust_remote_code=False,
        )[1]
    except Exception as error:  # whatever a class does not like in its config
        hint = "transformers says so when it builds the model of this config.json"
        message = f"the config.json makes no {names[0]}: {type(error).__name__}: {error}"
        raise VerifyError("KB601", message, at=folder, hint=hint) from error
    finally:
        transformers.logging.set_verbosity(shown[0])
        if shown[1]:
            transformers.logging.enable_progress_bar()  # type: ignore[no-untyped-call]
    judge(folder, names[0], told)
    return None


def judge(folder: str, kind: str, told: dict[str, set[object]]) -> None:
    """Raise VerifyError KB601 if transformers `told` of weights that are missing, too many or of another shape."""
    words = {"missing_keys": "is missing", "unexpected_keys": "has no place", "mismatched_keys": "has another shape"}
    rows = []
    for key, what in words.items():
        names = sorted(str(name[0]) if isinstance(name, tuple) else str(name) for name in told.get(key, ()))
        rows += [f"\n  {name} {what}" for name in names[:SHOWN]]
        if len(names) > SHOWN:
            rows.append(f"\n  and {len(names) - SHOWN} more of which each {what}")
    if rows:
        hint = "the tensors and the config.json do not fit each other"
        raise VerifyError("KB601", f"{kind} does not fit its config.json:{''.join(rows)}", at=folder, hint=hint)
