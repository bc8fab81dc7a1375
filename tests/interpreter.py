"""Makes Triton's interpreter faster, without a change to what it computes."""

from __future__ import annotations

from typing import Any


def patch_once_a_launch() -> None:
    """Lets a launch look through Triton's language once for each module of kernels, not at every call of a function.

    That look, which replaces the language's functions by the interpreter's own, takes more than half of its time, and
    finds all in place after the first. Where a Triton calls these by other names, it is as slow as it was.
    """
    from triton.runtime import interpreter

    run, patch = interpreter.GridExecutor.__call__, getattr(interpreter, "_patch_lang", None)
    if patch is None:
        return
    patched: set[str] = set()

    def launch(executor: Any, *args: Any, **kwargs: Any) -> Any:
        patched.clear()  # the last launch has put the language back
        return run(executor, *args, **kwargs)

    def patch_lang(function: Any) -> Any:
        if function.__module__ in patched:
            return None
        patched.add(function.__module__)
        return patch(function)

    interpreter.GridExecutor.__call__ = launch
    interpreter._patch_lang = patch_lang
