"""Hierarchical diffusion models in JAX. The Python interface to trained runs:

    run = nested.open_run("runs/quickstart")
    images = run.sample(16)

Importing this package costs nothing: JAX and the rest come with the first name that is used. See nested/run.py.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nested.run import Run, open_run, open_weights

__version__ = "0.1.0"
__all__ = ["Run", "__version__", "open_run", "open_weights"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'nested' has no attribute {name!r}; it has {', '.join(sorted(__all__))}")
    from nested import run

    return getattr(run, name)


def __dir__() -> list[str]:
    return sorted(__all__)
