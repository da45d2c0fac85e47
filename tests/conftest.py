"""Shared by all tests: one CPU device, a persistent compilation cache, absl flags parsed (grain reads them).

Most programs here run once or twice, so optimising their machine code would cost more than it saves: they are compiled
in the fastest way that XLA has. JAX_DISABLE_MOST_OPTIMIZATIONS=0 python -m pytest optimises all, and takes longer.
"""

import contextlib
import gc
import io
import os
import pathlib
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # two threads on busy cores wait for each other in a loop

import jax  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
from absl import flags  # noqa: E402
from helpers.processes import COMPILE_FAST  # noqa: E402

ROOT = pathlib.Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden"
CACHE = os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", os.path.join(tempfile.gettempdir(), f"nested-test-cache-{jax.__version__}")
)
os.environ.setdefault("XLA_FLAGS", COMPILE_FAST)  # read when the first program is compiled
jax.config.update("jax_compilation_cache_dir", CACHE)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
jax.config.update("jax_numpy_rank_promotion", "raise")

gc.set_threshold(100_000, 50, 50)  # tracing makes many small objects and few cycles

if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()


@pytest.fixture(scope="session")
def golden():
    """golden("uvit_cond.npz") -> dict of arrays recorded from the authors' public code (tests/golden/README.md)."""

    def load(name):
        with np.load(GOLDEN / name, allow_pickle=False) as archive:
            return {key: archive[key] for key in archive.files}

    return load


@pytest.fixture
def x64():
    """float64 arithmetic within one test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="session")
def searched(tmp_path_factory):
    """(workdir, what was printed) of a search over tests/helpers/small_runs.py with two levels: the runs L1,
    L2-sigma0 and L2-sigma0.5, one step each, scored with stand-in features."""
    from helpers import small_runs
    from helpers.scoring import Pooler

    from nested.modes import evaluate, search

    workdir, pooler, printed = tmp_path_factory.mktemp("searched"), Pooler(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(evaluate, "load_score_encoder", lambda config: pooler)
        search.run(small_runs.config_of(2, search__sigmas=(0.0, 0.5)), str(workdir))
    return workdir, printed.getvalue()


@pytest.fixture
def pooler(monkeypatch):
    """The stand-in that scores samples in place of EfficientNet, for this test."""
    from helpers.scoring import Pooler

    from nested.modes import evaluate

    pooler = Pooler()
    monkeypatch.setattr(evaluate, "load_score_encoder", lambda config: pooler)
    return pooler
