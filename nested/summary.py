"""What a config costs, from shapes alone: variables, tokens, parameters, multiply-accumulates, memory.

"GFlops" in the three papers are multiply-accumulates (MACs). They are counted on the traced forward pass of one
sample: every matrix product and convolution, and 5 per element of a LayerNorm. That is fvcore's rule, and with it the
counts of Nested Diffusion's Table 6 come out to .01 % (tests/test_summary.py).
"""

import dataclasses
import json
import math
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from nested import hierarchy
from nested.files import atomic_write

LAYER_NORM_MACS = 5


@dataclasses.dataclass(frozen=True)
class LevelSummary:
    """tokens: of the level's own variable, without time, label and condition tokens. macs: of one forward pass."""

    name: str
    shape: hierarchy.Tree
    tokens: int
    parameters: int
    macs: int


def count_macs(function: Callable, *args) -> int:
    """Multiply-accumulates of function(*args): matrix products and convolutions of its jaxpr, LayerNorms by fvcore's
    rule. `args` may be jax.ShapeDtypeStruct; nothing is computed. A scan counts its body times its length."""
    norms = 0

    def count_norm(next_function, norm_args, norm_kwargs, context):
        nonlocal norms
        if isinstance(context.module, nn.LayerNorm) and context.method_name == "__call__":
            norms += LAYER_NORM_MACS * norm_args[0].size
        return next_function(*norm_args, **norm_kwargs)

    with nn.intercept_methods(count_norm):
        jaxpr = jax.make_jaxpr(function)(*args)
    return norms + jaxpr_macs(jaxpr.jaxpr)


def jaxpr_macs(jaxpr) -> int:
    """Multiply-accumulates of dot_general and conv_general_dilated in a jaxpr and its sub-jaxprs."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            lhs = equation.invars[0].aval
            total += equation.outvars[0].aval.size * math.prod(lhs.shape[axis] for axis in contracted)
        elif equation.primitive.name == "conv_general_dilated":
            kernel, numbers = equation.invars[1].aval, equation.params["dimension_numbers"]
            total += equation.outvars[0].aval.size * kernel.size // kernel.shape[numbers.rhs_spec[0]]
        else:
            repeats = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
            total += repeats * sum(jaxpr_macs(sub) for sub in sub_jaxprs(equation.params))
    return total


def sub_jaxprs(params: dict) -> list:
    """The jaxprs among an equation's parameters."""
    found = []
    for value in params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            item = getattr(item, "jaxpr", item)
            if hasattr(item, "eqns"):
                found.append(item)
    return found


def levels(levels_: Sequence[hierarchy.Level]) -> list[LevelSummary]:
    """One LevelSummary per level, coarse to fine."""
    params = jax.eval_shape(lambda: hierarchy.init(levels_, jax.random.key(0)))
    variables = {
        level.name: hierarchy.map_shape(lambda s: jax.ShapeDtypeStruct((1, *s), jnp.float32), level.shape)
        for level in levels_
    }
    result = []
    for level in levels_:
        cond = jax.eval_shape(
            lambda v, level=level: hierarchy.conditions(level, v, jnp.zeros(1, jnp.int32)), variables
        )
        macs = count_macs(
            lambda p, x, c, level=level: hierarchy.apply(level, p, train=False)(x, jnp.zeros(1), c),
            params[level.name],
            variables[level.name],
            cond,
        )
        parameters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params[level.name]))
        result.append(LevelSummary(level.name, level.shape, level.backbone.num_tokens(level.shape), parameters, macs))
    return result


def state_bytes(abstract_state) -> int:
    """Bytes of the whole train state: parameters, EMA, optimizer moments."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract_state))


def summary(levels_: Sequence[hierarchy.Level], abstract_state, out: str = "") -> str:
    """The table as text; with `out`, the same as JSON in that file."""
    rows = levels(levels_)
    total = {"parameters": sum(row.parameters for row in rows), "macs": sum(row.macs for row in rows)}
    memory = state_bytes(abstract_state)
    lines = [f"{'level':<10}{'shape':<18}{'tokens':>7}{'parameters':>15}{'GMACs':>11}"]
    lines += [
        f"{row.name:<10}{str(row.shape):<18}{row.tokens:>7}{row.parameters:>15,}{row.macs / 1e9:>11.4f}" for row in rows
    ]
    lines += [
        f"{'total':<35}{total['parameters']:>15,}{total['macs'] / 1e9:>11.4f}",
        f"train state (parameters, EMA, optimizer moments): {memory / 2**20:,.1f} MiB",
    ]
    if out:
        content = {
            "levels": [dataclasses.asdict(row) for row in rows],
            "total": total,
            "state_bytes": memory,
        }
        atomic_write(out, json.dumps(content, indent=2) + "\n")
    return "\n".join(lines)
