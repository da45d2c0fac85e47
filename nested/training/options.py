"""The options of a training run, apart from the loop: reading a config needs none of the libraries that run it."""

import dataclasses
from typing import Annotated, Literal, NamedTuple


@dataclasses.dataclass(frozen=True)
class TrainOptions:
    """config.train."""

    batch_size: Annotated[int, "rows of a step, over all devices and hosts"] = 128
    accumulate: Annotated[int, "groups that a batch is computed in, one after the other, to save memory"] = 1
    steps: Annotated[int, "length of the run"] = 1000
    batch_growth: Annotated[tuple[tuple[int, int], ...], "(step, batch size) pairs: that size from that step on"] = ()
    log_every: Annotated[int, "steps between reports"] = 50
    eval_every: Annotated[int, "steps between validation losses on the held-out records; 0: never"] = 0
    eval_times: Annotated[tuple[float, ...], "times of the validation losses"] = (0.1, 0.3, 0.5, 0.7, 0.9)
    sample_every: Annotated[int, "steps between grids of EMA samples; 0: only at the end"] = 0
    save_every: Annotated[int, "steps between checkpoints"] = 1000
    keep: Annotated[int, "checkpoints that are kept"] = 2
    max_bad_steps: Annotated[int, "consecutive non-finite steps before the run stops"] = 10
    mesh_data: Annotated[int, "devices along the data axis of the mesh; -1: all that are left"] = -1
    mesh_fsdp: Annotated[int, "devices along the axis that parameters are sharded over"] = 1
    fsdp_min_bytes: Annotated[int, "smaller parameters are replicated"] = 2**22
    dtype: Annotated[Literal["float32", "bfloat16"], "dtype of matrix products"] = "float32"
    remat: Annotated[bool, "recompute each block in the backward pass, to save memory"] = False
    threads: Annotated[int, "reading threads of the loader"] = 2
    workers: Annotated[int, "reading processes of the loader"] = 0


class BatchSpan(NamedTuple):
    """Steps start ... end - 1 with one batch size, after `rows` rows of earlier spans."""

    start: int
    end: int
    batch_size: int
    rows: int
