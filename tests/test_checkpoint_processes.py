"""nested/runtime/checkpoint.py in real processes: other meshes, a truncated file, a full disk, SIGTERM to one and to
two."""

import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
from helpers.processes import finish, free_port, run_python, start_python, wait_for

from nested.runtime import checkpoint


def steps_in(workdir):
    return sorted(path.name for path in (workdir / "checkpoints").iterdir())


def truncate_largest(folder):
    largest = max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)


FOUR_DEVICES = """
import sys, jax, jax.numpy as jnp, numpy as np
from nested.runtime import checkpoint, partition

tree = {"params": {"z1": {"w": jnp.arange(96.0).reshape(8, 12), "b": jnp.arange(5.0)}}}
def place(*shape):
    mesh = partition.make_mesh(*shape)
    return partition.abstract(tree, partition.shardings(tree, mesh, min_bytes=64))
two = place(2, 2)
state = jax.tree.map(lambda x, a: jax.device_put(x, a.sharding), tree, two)
assert len({str(s.index) for s in state["params"]["z1"]["w"].addressable_shards}) == 2
assert checkpoint.fingerprints(state) == checkpoint.fingerprints(tree)
run = checkpoint.Checkpoints(sys.argv[1], {"model": 1}, ("model",), 1, 1)
run.restore(two)
run.save(1, state)
run.close()
for shape in ((2, 2), (1, 4), (4, 1)):
    for found in (
        checkpoint.Checkpoints(sys.argv[1], {"model": 1}, ("model",), 1, 1).restore(place(*shape)),
        checkpoint.restore_subtree(sys.argv[1], place(*shape)),
    ):
        w, wanted = found["params"]["z1"]["w"], place(*shape)["params"]["z1"]["w"]
        assert w.sharding == wanted.sharding, (w.sharding, wanted.sharding)
        np.testing.assert_array_equal(w, tree["params"]["z1"]["w"])
"""


def test_four_devices_to_any_mesh_and_to_one(tmp_path):
    run_python(FOUR_DEVICES, [tmp_path], devices=4)
    wanted = {"params": {"z1": {"w": jax.ShapeDtypeStruct((8, 12), jnp.float32)}}}
    part = checkpoint.restore_subtree(tmp_path, wanted)
    np.testing.assert_array_equal(part["params"]["z1"]["w"], np.arange(96.0).reshape(8, 12))


TRUNCATED = """
import asyncio, os, pathlib, sys, jax.numpy as jnp, numpy as np
from nested.runtime import checkpoint

state = {f"w{i}": jnp.asarray(np.random.default_rng(i).normal(size=(32, 16)), jnp.float32) for i in range(40)}
def run():
    return checkpoint.Checkpoints(sys.argv[1], {"model": 1}, ("model",), 2, 1)
first = run()
for step in (1, 2):
    first.save(step, state)
first.close()
files = [path for path in pathlib.Path(sys.argv[1], "checkpoints", "2").rglob("*") if path.is_file()]
largest = max(files, key=lambda path: path.stat().st_size)
os.truncate(largest, largest.stat().st_size // 2)
run().restore(state)

def abandon(error):                                # a future that nobody asks for its error
    asyncio.Future(loop=loop).set_exception(error)
loop = asyncio.new_event_loop()
abandon(ValueError(f'DATA_LOSS: Error reading "w7" at local file "{sys.argv[1]}/checkpoints/2/state/"'))
abandon(OSError("the user's file"))
loop.close()

class Careless:
    def __del__(self):
        raise KeyError("of the user")
Careless()
"""


def test_damage_is_two_lines_and_hides_nothing_else(tmp_path):
    _, err = finish(start_python(TRUNCATED, [tmp_path]))
    damaged, renamed, *rest = err.splitlines()
    assert damaged.startswith(f"WARNING:absl:checkpoint 2 in {tmp_path} is damaged (OUT_OF_RANGE: ")
    assert renamed == f"WARNING:absl:{tmp_path}/checkpoints/2 renamed to 2.corrupt"
    assert "DATA_LOSS" not in err and "OSError: the user's file" in rest
    assert any(line.startswith("Exception ignored in: <function Careless") for line in rest)
    assert rest[-1] == "KeyError: 'of the user'" and len(rest) < 12


DISK_FULL = """
import resource, sys, jax, jax.numpy as jnp, numpy as np
from nested.runtime import checkpoint

state = {"w": jnp.asarray(np.random.default_rng(0).normal(size=200_000), jnp.float32)}
run = checkpoint.Checkpoints(sys.argv[1], {"model": 1}, ("model",), 2, 1)
run.restore(state)
run.save(1, state)
run.wait()
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))   # no file may grow beyond 100 kB
try:
    run.save(2, state)                             # returns before anything is on disk
    run.save(3, state)
except OSError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
assert checkpoint.latest_step(sys.argv[1]) == 1
assert run.save(4, state)                          # room again: the run may go on
run.close()
assert checkpoint.latest_step(sys.argv[1]) == 4
"""


def test_a_full_disk_is_one_line(tmp_path):
    out = run_python(DISK_FULL, [tmp_path], devices=1)
    assert out.count("\n") == 1
    assert out.startswith("checkpoint step 2 not written: ") and out.endswith(f"({tmp_path}); last good step 1\n")


# A training loop in miniature: arguments are workdir, number of steps, and for several processes port, count, index.
TRAINING = """
import os, pathlib, sys, time
import jax
workdir, steps = sys.argv[1], int(sys.argv[2])
if len(sys.argv) > 3:
    jax.distributed.initialize(f"127.0.0.1:{sys.argv[3]}", int(sys.argv[4]), int(sys.argv[5]),
        initialization_timeout=60, heartbeat_timeout_seconds=10, shutdown_timeout_seconds=30)
import jax.numpy as jnp, numpy as np
from nested.runtime import checkpoint, partition

mesh = partition.make_mesh(1, -1)
def init():
    return {"step": jnp.int32(0), "params": {"z1": jnp.linspace(-1, 1, 64 * 32).reshape(64, 32)}}
shapes = jax.eval_shape(init)
placed = partition.shardings(shapes, mesh, min_bytes=1024)

def update(state, noise):
    w = state["params"]["z1"]
    w = w - 0.1 * jnp.tanh(jnp.matmul(w, w.T) @ w / 64) + 0.01 * jnp.mean(noise, axis=0)[None, :]
    return {"step": state["step"] + 1, "params": {"z1": w}}
update = jax.jit(update, donate_argnums=0, out_shardings=placed)

checkpoints = checkpoint.Checkpoints(workdir, {"model": 1}, ("model",), keep=2, save_every=5)
with checkpoint.Preemption() as preemption:
    state = checkpoints.restore(partition.abstract(shapes, placed))
    if state is None:
        state = jax.jit(init, out_shardings=placed)()
    start = step = int(state["step"])
    rows, processes = 8, jax.process_count()
    while step < steps:
        batch = np.random.default_rng(step).normal(size=(rows, 32)).astype(np.float32)
        local = batch.reshape(processes, -1, 32)[jax.process_index()]
        state = update(state, partition.to_global(local, mesh))
        step += 1
        if preemption.should_stop(step):
            checkpoints.save(step, state, force=True)
            break
        checkpoints.save(step, state)
        pathlib.Path(workdir, f"reached.{jax.process_index()}").write_text(str(step))
        time.sleep(float(os.environ.get("PAUSE", "0")))
    checkpoints.save(step, state, force=True)
checkpoints.close()
fingerprint = checkpoint.fingerprints(state)["params/z1"]
print(f"from {start} to {step}: {fingerprint}", flush=True)
"""


def reached(workdir, index):
    path = workdir / f"reached.{index}"
    return int(path.read_text() or 0) if path.exists() else 0


def result(out):
    """'from 0 to 12: 345' -> (0, 12, 345)"""
    words = out.split()
    return int(words[1]), int(words[3].rstrip(":")), int(words[4])


def test_sigterm_saves_and_ends_well(tmp_path):
    process = start_python(TRAINING, [tmp_path / "run", 100_000], env={"PAUSE": "0.02"})
    wait_for(lambda: reached(tmp_path / "run", 0) >= 7, process)
    process.send_signal(signal.SIGTERM)
    start, stopped, _ = result(finish(process)[0])
    assert start == 0 and 7 <= stopped < 100_000
    assert checkpoint.latest_step(tmp_path / "run") == stopped
    resumed = result(run_python(TRAINING, [tmp_path / "run", stopped + 8], devices=1))
    straight = result(run_python(TRAINING, [tmp_path / "straight", stopped + 8], devices=1))
    assert resumed[:2] == (stopped, stopped + 8) and straight[:2] == (0, stopped + 8)
    assert resumed[2] == straight[2]  # bit for bit


def start_two(workdir, steps, pause=0.0):
    port = free_port()
    return [start_python(TRAINING, [workdir, steps, port, 2, i], 1, {"PAUSE": str(pause)}) for i in range(2)]


def test_sigterm_to_one_of_two_processes_stops_both_at_one_step(tmp_path):
    run = tmp_path / "run"
    processes = start_two(run, 100_000, pause=0.02)
    wait_for(lambda: reached(run, 1) >= 7, processes[1])
    processes[1].send_signal(signal.SIGTERM)
    first, second = (result(finish(process)[0]) for process in processes)
    stopped = first[1]
    assert first == second and 7 <= stopped < 100_000
    assert checkpoint.latest_step(run) == stopped

    resumed = [result(finish(process)[0]) for process in start_two(run, stopped + 8)]
    straight = result(run_python(TRAINING, [tmp_path / "straight", stopped + 8], devices=2))  # two devices, one process
    assert resumed[0] == resumed[1] == (stopped, stopped + 8, straight[2])  # bit for bit

    truncate_largest(run / "checkpoints" / str(stopped + 8))  # a file of one process's shards: both must pass it over
    older = max(int(name) for name in steps_in(run) if name.isdigit() and int(name) < stopped + 8)
    again = [result(finish(process)[0]) for process in start_two(run, stopped + 8)]
    assert again[0] == again[1] == (older, stopped + 8, straight[2])
    assert f"{stopped + 8}.corrupt" in steps_in(run)
