"""Checkpoints of a run, and stopping when the machine is taken away. No other file knows orbax.

    workdir/config.json              the resolved config of the run
    workdir/checkpoints/<step>/state   every array of the train state, each process writing its own shards
    workdir/checkpoints/<step>/meta    the config again, and a fingerprint of every array

Writing is asynchronous: save() returns when the arrays are copied to host memory, and a step's folder appears by an
atomic rename when all of it is on disk, so that a run killed at any moment leaves complete checkpoints only.

Reading does not trust the disk. The newest complete checkpoint is used: a damaged one (interrupted copy, truncated
file, flipped bits) is reported and the next older one is taken. Orbax notices missing and truncated files but not
flipped bits, hence the fingerprint, over the 32-bit words u_i of an array in row-major order:
    sum_i u_i ((2654435761 i) | 1)  mod 2^32

Because the weights are odd, every single flipped bit shows; because integer sums are exact in any order, the number
does not depend on how the array is split over devices. A checkpoint of another config or model is not damaged: it is
refused.

Reading uses orbax's array handler directly. It has no barrier inside, so that a file that only one process finds
damaged cannot leave the others waiting; the processes agree afterwards.
"""

import contextlib
import json
import logging as python_logging
import os
import pathlib
import signal
import sys
import traceback
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from jax.experimental import multihost_utils

from nested.runtime.files import atomic_write, check_writable

Tree = Any
CheckConfig = Callable[[int, dict[str, Any]], None]  # (step, saved config); raises ValueError
_LISTED = 64  # a run keeps a few checkpoints; no more than this many are considered
_SHOWN = 12  # differing config keys that an error names


class _Damaged(Exception):
    """A checkpoint that cannot be read, or whose content is not what was written."""


class _Manager(ocp.CheckpointManager):
    """Orbax's manager, which does not ask JAX's preemption service itself.

    The service keeps only the last step that it was asked about. Orbax would ask about older steps from a background
    thread, and the processes could miss the step to stop at.
    """

    def reached_preemption(self, step: int) -> bool:
        return False


class Checkpoints:
    """The checkpoints of the run in `workdir`. All processes make one and call its methods in the same order.

    Args:
      workdir: the run's folder.
      config: the resolved config, a dict of plain values (JSON).
      compare: the top-level keys of `config` that define the run's state. A checkpoint that differs there is refused;
        other keys (logging, number of steps) may change.
      keep: how many of the newest checkpoints stay.
      save_every: steps between checkpoints.
      upgrade: brings the config of a checkpoint that an earlier version made up to date, before the two are compared
        (nested/build/saved.py).
    Raises: ValueError for a number below 1 or a key that config does not have; OSError if `workdir` is not writable.
    """

    def __init__(
        self,
        workdir: str | os.PathLike,
        config: Mapping[str, Any],
        compare: Iterable[str],
        keep: int,
        save_every: int,
        upgrade: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
    ) -> None:
        self._workdir = check_writable(workdir)
        self._config = json.loads(json.dumps(config))
        self._compare = tuple(compare)
        self._save_every = save_every
        self._upgrade = upgrade or (lambda saved: saved)
        self._writing: int | None = None
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

    def restore(self, abstract: Tree) -> Tree | None:
        """Reads the newest complete checkpoint. Damaged newer ones are renamed to N.corrupt.

        Call it first, in a new run too: it writes workdir/config.json when the config is accepted.

        Args:
          abstract: the state as jax.ShapeDtypeStruct leaves, with the shardings to restore to; the checkpoint may have
            been saved from another mesh.
        Returns: a tree like `abstract`, or None if there is no checkpoint.
        Raises: ValueError if the checkpoint is of another config or model, or if none of several is complete.
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

    def save(self, step: int, state: Tree, force: bool = False) -> bool:
        """Starts writing `state` if `step` is a multiple of save_every, or with `force`; returns whether it did.

        A step that is there already is left as it is. The state may be donated to the next step at once.
        Raises OSError, in one line, if this or the previous checkpoint could not be written.
        """
        if (step % self._save_every and not force) or step in self._manager.all_steps():
            return False
        self.wait()
        meta = {"config": self._config, "fingerprints": fingerprints(state)}
        items = ocp.args.Composite(state=ocp.args.PyTreeSave(state), meta=ocp.args.JsonSave(meta))
        self._writing = step
        with self._one_line_errors():
            return self._manager.save(step, args=items, force=True)

    def wait(self) -> None:
        """Waits until the checkpoint being written is on disk. Raises OSError, in one line, if it cannot be written."""
        with self._one_line_errors():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for the last checkpoint and ends orbax's threads. Raises OSError as wait() does."""
        try:
            self.wait()
        finally:
            self._manager.close()

    def _check_config(self, step: int, saved: dict[str, Any]) -> None:
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
    def _one_line_errors(self) -> Iterator[None]:
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
    """The resolved config of the run in `workdir`. Raises FileNotFoundError if there is no run."""
    path = _config_path(pathlib.Path(workdir))
    if not path.exists():
        raise FileNotFoundError(f"{path}: not found; give the --workdir of a run (main.py --mode=train writes it)")
    return json.loads(path.read_text())


def restore_part(workdir: str | os.PathLike, abstract: Tree) -> tuple[Tree, int]:
    """Reads a part of the newest complete checkpoint of the run in `workdir`; nothing is changed on disk.

    Args:
      workdir: the run's folder.
      abstract: the part to read, nested dicts from the top of the train state with jax.ShapeDtypeStruct leaves that
        have shardings. {'ema': {'z3': tree}} reads the EMA of level z3.
    Returns: (a tree like `abstract`, the checkpoint's step).
    Raises: FileNotFoundError if there is no checkpoint, ValueError if a leaf is absent or of another shape.
    """
    if not (steps := _agreed_steps(workdir)):
        raise FileNotFoundError(f"{_folder(workdir)}: no checkpoint found; give the --workdir of a run that has saved")
    state, damaged = _newest_whole(workdir, steps, abstract, check_config=None)
    return state, steps[len(damaged)]


def restore_subtree(workdir: str | os.PathLike, abstract: Tree) -> Tree:
    """The tree of restore_part, without the step."""
    return restore_part(workdir, abstract)[0]


def saved_shapes(workdir: str | os.PathLike) -> dict[str, tuple[int, ...]]:
    """{leaf name: shape} of the newest checkpoint in `workdir` whose index can be read.

    Raises FileNotFoundError if there is none."""
    for step in _agreed_steps(workdir):
        try:
            saved = _by_name(ocp.PyTreeCheckpointHandler().metadata(_folder(workdir) / str(step) / "state").tree)
            return {name: tuple(leaf.shape) for name, leaf in saved.items()}
        except Exception as error:  # orbax raises what it likes
            logging.warning("checkpoint %d in %s cannot be read (%s)", step, workdir, _first_line(error))
    raise FileNotFoundError(f"{_folder(workdir)}: no checkpoint found; give the --workdir of a run that has saved")


def fingerprints(state: Tree) -> dict[str, int]:
    """{leaf name: fingerprint} for every array of a tree, as defined above; it is equal for every sharding.

    The arrays are read one after the other: on a CPU, many small collectives at once can wait for each other's threads.
    """
    return {name: int(_fingerprint(leaf)) for name, leaf in _by_name(state).items()}


def config_differences(saved: Any, config: Any, key: str) -> list[str]:
    """The differences between two trees of dicts, lists and values: ['levels[0].width: checkpoint 384, config 512'].

    key: the name of the trees themselves in the lines."""
    if isinstance(saved, dict) and isinstance(config, dict):
        pairs = [(f"{key}.{k}", saved.get(k), config.get(k)) for k in sorted({*saved, *config})]
    elif isinstance(saved, list) and isinstance(config, list) and len(saved) == len(config):
        pairs = [(f"{key}[{i}]", *pair) for i, pair in enumerate(zip(saved, config, strict=True))]
    else:
        return [] if saved == config else [f"{key}: checkpoint {_shown(saved)}, config {_shown(config)}"]
    return [line for name, a, b in pairs for line in config_differences(a, b, name)]


class Preemption:
    """Whether the run was told to stop by SIGTERM, which a cluster sends before it takes a machine away.

    with Preemption() as preemption: ... if preemption.should_stop(step): save and leave

    In a single process, a handler notes the signal. With several, JAX's preemption service learns of a signal to any
    process and names a step, not yet reached by any of them, at which all stop.
    """

    def __init__(self) -> None:
        self._told = False

    def __enter__(self) -> "Preemption":
        if jax.process_count() == 1:
            self._previous = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        if jax.process_count() == 1:
            signal.signal(signal.SIGTERM, self._previous)

    def _note(self, number: int, frame: types.FrameType | None) -> None:
        self._told = True

    def should_stop(self, step: int) -> bool:
        """Whether `step` is the one to save and leave at, the same in every process. Call it after every step."""
        if jax.process_count() == 1:
            return self._told
        return multihost_utils.reached_preemption_sync_point(step)


@jax.jit
def _fingerprint(x: jax.Array) -> jax.Array:
    if x.dtype == bool:
        x = x.astype(jnp.uint8)
    words = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{min(32, 8 * x.dtype.itemsize)}")).astype(jnp.uint32)
    index = jnp.zeros(words.shape, jnp.uint32)
    for d, n in enumerate(words.shape):  # the row-major index, without a reshape that would gather a sharded array
        index = index * jnp.uint32(n) + jax.lax.broadcasted_iota(jnp.uint32, words.shape, d)
    return jnp.sum(words * (index * jnp.uint32(2654435761) | jnp.uint32(1)), dtype=jnp.uint32)


def _newest_whole(
    workdir: str | os.PathLike, steps: Sequence[int], abstract: Tree, check_config: CheckConfig | None
) -> tuple[Tree, list[int]]:
    """(state, damaged steps newer than it). Tries `steps`, newest first, and logs why one is passed over."""
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


def _read(folder: pathlib.Path, step: int, abstract: Tree, check_config: CheckConfig | None) -> Tree:
    """One checkpoint as a tree like `abstract`. Raises _Damaged, in all processes, or ValueError."""
    handler, abstract = ocp.PyTreeCheckpointHandler(), jax.tree.map(_with_sharding, abstract)
    state, failure, saved_config, expected, saved = None, None, {}, {}, {}
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
def _hushed_abandoned_reads(folder: pathlib.Path) -> Iterator[None]:
    """Keeps reports about reads that orbax abandoned after a failure off the terminal.

    Python or asyncio report them in up to 60 lines when they die. What is kept off comes from orbax's code, or names a
    file in `folder` (tensorstore's)."""
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


def _check_leaves(folder: pathlib.Path, saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raises ValueError, naming the first leaf that the checkpoint lacks, or holds in another shape or dtype."""
    for name, leaf in wanted.items():
        if name not in saved:
            raise ValueError(f"{folder}: has no {name}, which the model of this config needs; use a new --workdir, or "
                             "take only levels that both have")  # fmt: skip
        found, expected = (f"{np.dtype(x.dtype)}{list(x.shape)}" for x in (saved[name], leaf))
        if found != expected:
            raise ValueError(f"{folder}: {name} is {found}, the model of this config needs {expected}; use a new "
                             "--workdir, or the config the checkpoint was made with")  # fmt: skip


def _with_sharding(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _by_name(tree: Tree) -> dict[str, Any]:
    return ocp.tree.to_flat_dict(tree, sep="/")


def _set_aside(folder: pathlib.Path) -> None:
    """Renames a damaged N to N.corrupt or, if that name is taken, N.corrupt2, ...: nothing is deleted."""
    taken, count = folder.with_name(f"{folder.name}.corrupt"), 1
    while taken.exists():
        count += 1
        taken = folder.with_name(f"{folder.name}.corrupt{count}")
    folder.rename(taken)
    logging.warning("%s renamed to %s", folder, taken.name)


def _folder(workdir: str | os.PathLike) -> pathlib.Path:
    return pathlib.Path(workdir).expanduser().absolute() / "checkpoints"


def _config_path(workdir: str | os.PathLike) -> pathlib.Path:
    return pathlib.Path(workdir).expanduser().absolute() / "config.json"


def _steps(workdir: str | os.PathLike) -> list[int]:
    folder = _folder(workdir)
    return [int(path.name) for path in folder.iterdir() if path.name.isdigit()] if folder.is_dir() else []


def _agreed_steps(workdir: str | os.PathLike) -> list[int]:
    """The steps that process 0 finds, newest first, because a shared disk may show other processes an older listing."""
    steps = sorted(_steps(workdir), reverse=True)[:_LISTED]
    if jax.process_count() == 1:
        return steps
    padded = np.array(steps + [-1] * (_LISTED - len(steps)), np.int32)
    return [int(step) for step in multihost_utils.broadcast_one_to_all(padded) if step >= 0]


def _all_processes(ok: bool) -> bool:
    return ok if jax.process_count() == 1 else bool(np.all(multihost_utils.process_allgather(np.array(ok))))


def _wait_for_all(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def _shown(value: Any) -> str:
    return f"{len(value)} entries" if isinstance(value, dict | list) and len(str(value)) > 40 else str(value)


def _first_line(error: BaseException) -> str:
    while error.__cause__ is not None:  # orbax wraps; what happened is innermost
        error = error.__cause__
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return line if len(line) <= 200 else line[:197] + "..."
