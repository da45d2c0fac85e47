"""One training step over all levels of a hierarchy: the state, the losses and gradients, the update.

Everything random in step s is a function of (seed, s, row), so a resumed run repeats the uninterrupted one bit for bit:
the state carries no key. A step whose loss or gradient is not finite changes nothing but the step counter.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import flax.struct
import jax
import jax.numpy as jnp

from nested.diffusion import hierarchy
from nested.diffusion.denoiser import Cond
from nested.diffusion.level import Level, buffer_predicate, row_keys, select_context
from nested.training import optimizer as opt

Tree = Any


class VariableReader(Protocol):
    """What a step asks of the latents of a run: the clean variables of every level from a batch of records."""

    def variables(self, raw: Mapping[str, jax.Array], key: jax.Array | None) -> dict[str, Tree]:
        """{level: variable [B, ...]} of raw records; what is random in row i is drawn from (key, i)."""
        ...


class TrainState(flax.struct.PyTreeNode):
    """What a checkpoint holds.

    Attributes:
      step: int32 [], the number of steps taken.
      params: {level: parameters}.
      ema: {level: exponential moving average of the parameters}.
      opt_state: the optimizer's state, of the trained levels only.
    """

    step: jax.Array
    params: Tree
    ema: Tree
    opt_state: Tree


@dataclasses.dataclass(frozen=True)
class Step:
    """What a training step is made of.

    Attributes:
      levels: the hierarchy, coarse to fine.
      latents: turns raw records into the levels' variables; None if only the state's shapes are needed.
      optimizer: rates, decay, clipping and averaging.
      trained: names of the levels that are trained; the others keep their parameters.
      accumulate: number of groups that a batch is split into, one after the other, to save memory.
    """

    levels: tuple[Level, ...]
    latents: VariableReader | None
    optimizer: opt.OptimizerConfig
    trained: tuple[str, ...]
    accumulate: int = 1

    def variables(self, raw: Mapping[str, jax.Array], key: jax.Array) -> dict[str, Tree]:
        """The clean variables of every level, {level: [B, ...]}. Raises ValueError if the step has no latents."""
        if self.latents is None:
            raise ValueError("this step was built for the shapes of its state alone and reads no records")
        return self.latents.variables(raw, key)


def init_state(step: Step, key: jax.Array) -> TrainState:
    """A fresh state; the EMA starts as a copy of the parameters."""
    params = hierarchy.init(step.levels, key)
    trained = {name: params[name] for name in step.trained}
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        ema=jax.tree.map(jnp.copy, params),
        opt_state=make_level_optimizer(step).init(trained),
    )


def make_level_optimizer(step: Step) -> opt.GradientTransformation:
    """The optimizer of the trained levels; constants of the networks are left alone."""
    return opt.make_optimizer(step.optimizer, buffer_predicate(step.levels))


def mean_losses(
    step: Step,
    params: Tree,
    variables: Mapping[str, Tree],
    context: Cond,
    times: Mapping[str, jax.Array],
    keys: jax.Array,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """(the sum over levels of the mean loss of the batch, {level: its mean loss})."""
    per_row = hierarchy.losses(step.levels, params, variables, context, times, keys, only=step.trained)
    means = {name: jnp.mean(loss) for name, loss in per_row.items()}
    total, *rest = means.values()
    return sum(rest, start=total), means


def gradients(
    step: Step, params: Tree, raw: Mapping[str, jax.Array], key: jax.Array
) -> tuple[Tree, dict[str, jax.Array]]:
    """(gradients, {level: loss}) of one batch, computed in `step.accumulate` groups of rows, one after the other.

    Group a holds rows a, a + accumulate, ...: the batch axis stays where it is sharded, nothing moves.
    """
    batch = jax.tree.leaves(raw)[0].shape[0]
    keys = row_keys(key, batch)
    variables = step.variables(raw, jax.random.fold_in(key, batch))
    times = hierarchy.sample_times(step.levels, keys)
    data = (variables, select_context(step.levels, raw), times, keys)
    grad = jax.grad(lambda p, *rows: mean_losses(step, p, *rows), has_aux=True)
    if step.accumulate == 1:
        return grad(params, *data)
    groups = jax.tree.map(
        lambda x: jnp.moveaxis(x.reshape(batch // step.accumulate, step.accumulate, *x.shape[1:]), 1, 0), data
    )

    def add(total, group):
        return jax.tree.map(lambda s, x: s + x / step.accumulate, total, grad(params, *group)), None

    zeros = jax.tree.map(
        lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(grad, params, *jax.tree.map(lambda x: x[0], groups))
    )
    return jax.lax.scan(add, zeros, groups)[0]


def train_step(
    step: Step, state: TrainState, raw: Mapping[str, jax.Array], key: jax.Array
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update.

    Args:
      step: what the step is made of; static.
      state: the state before the update.
      raw: records {field: [B, ...]}.
      key: the run's key; the step number is folded in here.

    Returns:
      The new state, and metrics: loss, loss/LEVEL, gradient_norm/LEVEL, learning_rate, and finite, which says whether
      the update was made.
    """
    trained = {name: state.params[name] for name in step.trained}
    frozen = {name: tree for name, tree in state.params.items() if name not in trained}
    grads, losses = gradients(step, trained, raw, jax.random.fold_in(key, state.step))
    norms = opt.gradient_norms(grads)
    total = sum(losses.values())
    finite = jnp.isfinite(total) & jnp.all(jnp.isfinite(jnp.stack(list(norms.values()))))
    updates, opt_state = make_level_optimizer(step).update(grads, state.opt_state, trained)
    params = jax.tree.map(lambda p, u: p + u.astype(p.dtype), trained, updates)
    decay, is_buffer = opt.ema_decay(step.optimizer, state.step), buffer_predicate(step.levels)
    ema = opt.ema_update({name: state.ema[name] for name in step.trained}, params, decay, is_buffer)
    new = state.replace(params=frozen | params, ema={**state.ema, **ema}, opt_state=opt_state)
    new = jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, state).replace(step=state.step + 1)
    metrics = {
        "loss": total,
        **{f"loss/{name}": value for name, value in losses.items()},
        **{f"gradient_norm/{name}": value for name, value in norms.items()},
        "learning_rate": opt.learning_rate(step.optimizer, state.step),
        "finite": finite,
    }
    return new, metrics


def validation_losses(
    step: Step, ema: Tree, raw: Mapping[str, jax.Array], times: Sequence[float]
) -> dict[str, jax.Array]:
    """{"validation/LEVEL/t0.5": mean loss of the EMA weights} at the given times, always with the same noise."""
    batch = jax.tree.leaves(raw)[0].shape[0]
    keys = row_keys(jax.random.key(0), batch)
    variables, context = step.variables(raw, jax.random.key(1)), select_context(step.levels, raw)
    metrics = {}
    for t in times:
        fixed = {level.name: jnp.full((batch,), t) for level in step.levels}
        losses = hierarchy.losses(step.levels, ema, variables, context, fixed, keys, train=False)
        metrics |= {f"validation/{name}/t{t:g}": jnp.mean(loss) for name, loss in losses.items()}
    return metrics
