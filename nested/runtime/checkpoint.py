"""Checkpoints of a run, and stopping when the machine is taken away. The only file that knows orbax.

    workdir/config.json              the resolved config of the run
    workdir/checkpoints/<step>/state   every array of the train state, each process writing its own shards
    workdir/checkpoints/<step>/meta    the config again, and a fingerprint of every array

Writing is asynchronous: save() returns when the arrays are copied to host memory, and a step's folder appears by an
atomic rename when all of it is on disk, so a run killed at any moment leaves whole checkpoints only.

Reading does not trust the disk. The newest checkpoint that is whole is used: a damaged one (interrupted copy, truncated
file, flipped bits) is reported and the next older one taken. Orbax notices missing and truncated files but not flipped
bits, hence the fingerprint: over the 32-bit words u_i of an array, in row-major order,
    sum_i u_i ((2654435761 i) | 1)  mod 2^32

Odd weights make every single flipped bit show; integer sums are exact in any order, so the number does not depend on
how the array is split over devices. A checkpoint of another config or model is not damage: it is refused.

Reading uses orbax's array handler directly: no barrier is inside, so a file that only one process finds damaged cannot
leave the others waiting; the processes agree afterwards.
"""

import contextlib
import json
import logging as python_logging
import os
import pathlib
import signal
import sys
import traceback
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from jax.experimental import multihost_utils

from nested.runtime.files import atomic_write, check_writable

Tree = Any
_LISTED = 64  # a run keeps a few checkpoints; at most this many are looked at
_SHOWN = 12  # differing config keys named in an error


class _Damaged(Exception):
    """A checkpoint that cannot be read, or whose content is not what was written."""


class _Manager(ocp.CheckpointManager):
    """Orbax's manager without its own questions to JAX's preemption service, which keeps only the last step asked
    about: orbax asks about older steps from a background thread, so that the processes could miss the step to stop at.
    """

    def reached_preemption(self, step):
        return False


class Checkpoints:
    """The checkpoints of the run in `workdir`. All processes make one and call its methods alike.

    config: the resolved config, a dict of plain values (JSON). compare: the top-level keys of it that define the run's
    state; a checkpoint that differs there is refused, other keys (logging, number of steps) may change.
    keep: how many of the newest checkpoints stay. save_every: steps between checkpoints. upgrade: brings the config of
    a checkpoint that an earlier version made up to date before the two are compared (nested/build/saved.py).
    """

    def __init__(self, workdir, config, compare, keep, save_every, upgrade=None):
        self._workdir = check_writable(workdir)
        self._config = json.loads(json.dumps(config))
        self._compare = tuple(compare)
        self._save_every = save_every
        self._upgrade = upgrade or (lambda saved: saved)
        self._writing = None
        missing = [key for key in self._compare if key not in self._config]
        if missing:
            raise ValueError(f"compare: config has no key {missing[0]!r}, only {sorted(self._config)}")
        for name, value in (("keep", keep), ("save_every", save_every)):
            if value < 1:
                raise ValueError(f"checkpoint.{name}: found {value}, expected at least 1")
        options = ocp.CheckpointManagerOptions(
            cleanup_tmp_directories=True,
            preservation_policy=ocp.checkpoint_managers.LatestN(keep),
            async_options=ocp.AsyncOptions(timeout_secs=1200),
        )
        self._manager = _Manager(_folder(self._workdir), options=options)

    def restore(self, abstract):
        """The newest whole checkpoint as a tree like `abstract` (jax.ShapeDtypeStruct leaves, with the shardings
        wanted, whatever mesh it was saved from), or None where there is none. Damaged newer ones become N.corrupt.

        Call it first, also in a new run: it writes workdir/config.json once the config is accepted.
        Raises ValueError where the checkpoint is of another config or model, or where none of several is whole.
        """
        state, damaged = None, []
        steps = _agreed_steps(self._workdir)
        if steps:
            state, damaged = _newest_whole(self._workdir, steps, abstract, self._check_config)
        if jax.process_index() == 0:
            for step in damaged:
                _set_aside(_folder(self._workdir) / str(step))
            atomic_write(_config_path(self._workdir), json.dumps(self._config, indent=2) + "\n")
        if damaged:
            _wait_for_all("damaged checkpoints set aside")
            self._manager.reload()
        return state

    def save(self, step, state, force=False):
        """Starts writing `state` if `step` is a multiple of save_every, or `force`; -> whether it did.

        A step that is there already is left as it is. The state may be donated to the next step at once.
        Raises OSError, in one line, where this or the previous checkpoint could not be written.
        """
        if (step % self._save_every and not force) or step in self._manager.all_steps():
            return False
        self.wait()
        meta = {"config": self._config, "fingerprints": fingerprints(state)}
        items = ocp.args.Composite(state=ocp.args.PyTreeSave(state), meta=ocp.args.JsonSave(meta))
        self._writing = step
        with self._one_line_errors():
            return self._manager.save(step, args=items, force=True)

    def wait(self):
        """Returns when the checkpoint being written is on disk. Raises OSError, in one line, where it could not be."""
        with self._one_line_errors():
            self._manager.wait_until_finished()

    def close(self):
        """Waits for the last checkpoint and ends orbax's threads. Raises as wait() does."""
        try:
            self.wait()
        finally:
            self._manager.close()

    def _check_config(self, step, saved):
        saved = self._upgrade(saved)
        differences = [
            line for key in self._compare for line in config_differences(saved.get(key), self._config[key], key)
        ]
        if differences:
            shown = differences[:_SHOWN]
            if len(differences) > _SHOWN:
                shown.append(f"and {len(differences) - _SHOWN} more")
            raise ValueError(f"{self._workdir}: checkpoint {step} was made with another config: {'; '.join(shown)}; "
                             "use a new --workdir, or config.init_from to take over weights")  # fmt: skip

    @contextlib.contextmanager
    def _one_line_errors(self):
        try:
            yield
        except Exception as error:  # orbax and tensorstore raise what they like
            last = latest_step(self._workdir)
            good = "no earlier step is saved" if last is None else f"last good step {last}"
            reason = f"{_first_line(error)} ({self._workdir})"
            raise OSError(f"checkpoint step {self._writing} not written: {reason}; {good}") from error


def latest_step(workdir: str | os.PathLike) -> int | None:
    """The newest step with a checkpoint folder in `workdir`, or None."""
    return max(_steps(workdir), default=None)


def read_config(workdir: str | os.PathLike) -> dict[str, Any]:
    """The resolved config of the run in `workdir`, a dict. Raises FileNotFoundError where there is no run."""
    path = _config_path(pathlib.Path(workdir))
    if not path.exists():
        raise FileNotFoundError(f"{path}: not found; give the --workdir of a run (main.py --mode=train writes it)")
    return json.loads(path.read_text())


def restore_part(workdir: str | os.PathLike, abstract: Tree) -> tuple[Tree, int]:
    """(part of the newest whole checkpoint of the run in `workdir`, its step); of {'ema': {'z3': tree}} level z3's EMA.

    abstract: the part wanted, nested dicts from the top of the train state, leaves jax.ShapeDtypeStruct with shardings.
    Nothing is changed on disk. The part is a tree like `abstract`, complete.
    Raises FileNotFoundError where there is no checkpoint, ValueError where a leaf is absent or of another shape.
    """
    if not (steps := _agreed_steps(workdir)):
        raise FileNotFoundError(f"{_folder(workdir)}: no checkpoint found; give the --workdir of a run that has saved")
    state, damaged = _newest_whole(workdir, steps, abstract, check_config=None)
    return state, steps[len(damaged)]


def restore_subtree(workdir: str | os.PathLike, abstract: Tree) -> Tree:
    """The tree of restore_part alone."""
    return restore_part(workdir, abstract)[0]


def saved_shapes(workdir: str | os.PathLike) -> dict[str, tuple[int, ...]]:
    """{leaf name: shape} of the newest checkpoint in `workdir` whose index can be read."""
    for step in _agreed_steps(workdir):
        try:
            saved = _by_name(ocp.PyTreeCheckpointHandler().metadata(_folder(workdir) / str(step) / "state").tree)
            return {name: tuple(leaf.shape) for name, leaf in saved.items()}
        except Exception as error:  # orbax raises what it likes
            logging.warning("checkpoint %d in %s cannot be read (%s)", step, workdir, _first_line(error))
    raise FileNotFoundError(f"{_folder(workdir)}: no checkpoint found; give the --workdir of a run that has saved")


def fingerprints(state: Tree) -> dict[str, int]:
    """{leaf name: fingerprint of the module docstring} for every array of a tree; equal for every sharding.

    One after the other: many small collectives under way at once can wait for each other's threads on a CPU."""
    return {name: int(_fingerprint(leaf)) for name, leaf in _by_name(state).items()}


def config_differences(saved: Any, config: Any, key: str) -> list[str]:
    """['levels[0].width: checkpoint 384, config 512', ...]: where two trees of dicts, lists and values differ."""
    if isinstance(saved, dict) and isinstance(config, dict):
        pairs = [(f"{key}.{k}", saved.get(k), config.get(k)) for k in sorted({*saved, *config})]
    elif isinstance(saved, list) and isinstance(config, list) and len(saved) == len(config):
        pairs = [(f"{key}[{i}]", *pair) for i, pair in enumerate(zip(saved, config, strict=True))]
    else:
        return [] if saved == config else [f"{key}: checkpoint {_shown(saved)}, config {_shown(config)}"]
    return [line for name, a, b in pairs for line in config_differences(a, b, name)]


class Preemption:
    """Whether the run was told to stop (SIGTERM: what a cluster sends before it takes a machine away).

    with Preemption() as preemption: ... if preemption.should_stop(step): save, leave

    One process: a handler notes the signal. Several: JAX's preemption service, which learns of a signal to any one and
    names a step, not yet reached by any, at which all stop.
    """

    def __init__(self):
        self._told = False

    def __enter__(self):
        if jax.process_count() == 1:
            self._previous = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, kind, error, trace):
        if jax.process_count() == 1:
            signal.signal(signal.SIGTERM, self._previous)

    def _note(self, number, frame):
        self._told = True

    def should_stop(self, step):
        """Call it after every step, in every process: True at the step to save and leave, the same one everywhere."""
        if jax.process_count() == 1:
            return self._told
        return multihost_utils.reached_preemption_sync_point(step)


@jax.jit
def _fingerprint(x):
    if x.dtype == bool:
        x = x.astype(jnp.uint8)
    words = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{min(32, 8 * x.dtype.itemsize)}")).astype(jnp.uint32)
    index = jnp.zeros(words.shape, jnp.uint32)
    for d, n in enumerate(words.shape):  # the row-major index, without a reshape that would gather a sharded array
        index = index * jnp.uint32(n) + jax.lax.broadcasted_iota(jnp.uint32, words.shape, d)
    return jnp.sum(words * (index * jnp.uint32(2654435761) | jnp.uint32(1)), dtype=jnp.uint32)


def _newest_whole(workdir, steps, abstract, check_config):
    """(state, damaged steps newer than it): tries `steps`, newest first, says in one line why one is passed over."""
    damaged, reasons = [], []
    for step in steps:
        try:
            state = _read(_folder(workdir) / str(step), step, abstract, check_config)
        except _Damaged as error:
            damaged.append(step)
            reasons.append(f"{step}: {error}")
            logging.warning("checkpoint %d in %s is damaged (%s); trying the next older one", step, workdir, error)
        else:
            logging.info("restored checkpoint %d from %s", step, workdir)
            return state, damaged
    raise ValueError(f"{_folder(workdir)}: no checkpoint is whole ({'; '.join(reasons)}); nothing was changed: "
                     "repair it, or use a new --workdir")  # fmt: skip


def _read(folder, step, abstract, check_config):
    """One checkpoint as a tree like `abstract`. Raises _Damaged, on all processes alike, or ValueError."""
    handler, abstract = ocp.PyTreeCheckpointHandler(), jax.tree.map(_with_sharding, abstract)
    state, failure = None, None
    try:
        with _hushed_abandoned_reads(folder):
            meta = ocp.JsonCheckpointHandler().restore(folder / "meta")
            saved_config, expected = meta["config"], meta["fingerprints"]
            saved = _by_name(handler.metadata(folder / "state").tree)
    except Exception as error:  # orbax, tensorstore and json raise what they like
        failure = _first_line(error)
    if failure is None:
        if check_config is not None:
            check_config(step, saved_config)
        _check_leaves(folder, saved, _by_name(abstract))
        restore_args = ocp.checkpoint_utils.construct_restore_args(abstract)
        arguments = ocp.args.PyTreeRestore(item=abstract, restore_args=restore_args, partial_restore=True)
        try:
            with _hushed_abandoned_reads(folder):
                state = handler.restore(folder / "state", args=arguments)
        except Exception as error:
            failure = _first_line(error)
    if not _all_processes(failure is None):
        raise _Damaged(failure or "another process cannot read it")
    for name, value in fingerprints(state).items():
        if value != expected.get(name):
            raise _Damaged(f"the values of {name} are not those that were saved")
    return state


@contextlib.contextmanager
def _hushed_abandoned_reads(folder):
    """After a failure the reads that orbax leaves unfinished, which python or asyncio report in up to 60 lines when
    they die, stay off the terminal: what comes from orbax's code, or names a file in `folder` (tensorstore's)."""
    report = sys.unraisablehook

    def hook(unraisable):
        code = getattr(unraisable.object, "cr_code", None)
        if not (code and "orbax" in code.co_filename) and str(unraisable.exc_value) != "Event loop is closed":
            report(unraisable)

    def keep(record):
        error = record.exc_info[1] if record.exc_info else None
        frames = traceback.extract_tb(error and error.__traceback__)
        ours = str(folder) in str(error) or any("orbax" in frame.filename for frame in frames)
        return not (ours and "never retrieved" in record.getMessage())

    sys.unraisablehook = hook
    python_logging.getLogger("asyncio").addFilter(keep)
    yield
    python_logging.getLogger("asyncio").removeFilter(keep)
    sys.unraisablehook = report


def _check_leaves(folder, saved, wanted):
    """ValueError naming the first leaf wanted that the checkpoint lacks, or holds in another shape or dtype."""
    for name, leaf in wanted.items():
        if name not in saved:
            raise ValueError(f"{folder}: has no {name}, which the model of this config needs; use a new --workdir, or "
                             "take only levels that both have")  # fmt: skip
        found, expected = (f"{np.dtype(x.dtype)}{list(x.shape)}" for x in (saved[name], leaf))
        if found != expected:
            raise ValueError(f"{folder}: {name} is {found}, the model of this config needs {expected}; use a new "
                             "--workdir, or the config the checkpoint was made with")  # fmt: skip


def _with_sharding(leaf):
    sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _by_name(tree):
    return ocp.tree.to_flat_dict(tree, sep="/")


def _set_aside(folder):
    """Renames a damaged N to N.corrupt, or N.corrupt2, ... where that is taken: nothing is deleted."""
    taken, count = folder.with_name(f"{folder.name}.corrupt"), 1
    while taken.exists():
        count += 1
        taken = folder.with_name(f"{folder.name}.corrupt{count}")
    folder.rename(taken)
    logging.warning("%s renamed to %s", folder, taken.name)


def _folder(workdir):
    return pathlib.Path(workdir).expanduser().absolute() / "checkpoints"


def _config_path(workdir):
    return pathlib.Path(workdir).expanduser().absolute() / "config.json"


def _steps(workdir):
    folder = _folder(workdir)
    return [int(path.name) for path in folder.iterdir() if path.name.isdigit()] if folder.is_dir() else []


def _agreed_steps(workdir):
    """The steps that process 0 finds, newest first: a shared disk may show other processes an older listing."""
    steps = sorted(_steps(workdir), reverse=True)[:_LISTED]
    if jax.process_count() == 1:
        return steps
    padded = np.array(steps + [-1] * (_LISTED - len(steps)), np.int32)
    return [int(step) for step in multihost_utils.broadcast_one_to_all(padded) if step >= 0]


def _all_processes(ok):
    return ok if jax.process_count() == 1 else bool(np.all(multihost_utils.process_allgather(np.array(ok))))


def _wait_for_all(name):
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def _shown(value):
    return f"{len(value)} entries" if isinstance(value, dict | list) and len(str(value)) > 40 else str(value)


def _first_line(error):
    while error.__cause__ is not None:  # orbax wraps; what happened is innermost
        error = error.__cause__
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return line if len(line) <= 200 else line[:197] + "..."
