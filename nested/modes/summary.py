"""The mode `summary`: what a config costs, from shapes alone (tokens, parameters, multiply-accumulates, memory).

"GFlops" in the three papers are multiply-accumulates (MACs). They are counted on the traced forward pass of one
sample: every matrix product and convolution, and 5 per element of a LayerNorm. That is fvcore's rule, and with it the
counts of Nested Diffusion's Table 6 come out to .01 %. Neighborhood attention counts the keys of its kernel, whatever
else its implementation computes, so that HDiT's counts equal k-diffusion's to the unit (tests/test_summary.py).
"""

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from nested.build.levels import build_levels
from nested.build.options import Config
from nested.build.training import abstract_state
from nested.diffusion import conditioning, hierarchy
from nested.diffusion.level import Level, buffer_predicate, is_shape, map_shape
from nested.diffusion.process import Tree
from nested.runtime.files import atomic_write
from nested.training.optimizer import path_name

LAYER_NORM_MACS = 5


@dataclasses.dataclass(frozen=True)
class LevelSummary:
    """The cost of one level.

    Attributes:
      name, shape: of the level.
      tokens: of its own variable, without those of the time, the label and the conditions.
      parameters: without constants.
      macs: multiply-accumulates of one forward pass.
    """

    name: str
    shape: Tree
    tokens: int
    parameters: int
    macs: int


def count_macs(function: Callable, *args) -> int:
    """Multiply-accumulates of function(*args). Nothing is computed, and `args` may be jax.ShapeDtypeStruct.

    Counted are the matrix products and convolutions of its jaxpr, LayerNorms by fvcore's rule, and the body of a scan
    times its length. If a linen module has METHOD_macs beside a METHOD, whose result must have the shape of its first
    argument, METHOD_macs says what METHOD costs."""
    by_rule = 0

    def count(next_function, module_args, module_kwargs, context):
        nonlocal by_rule
        module, method = context.module, context.method_name
        if isinstance(module, nn.LayerNorm) and method == "__call__":
            by_rule += LAYER_NORM_MACS * module_args[0].size
        rule = getattr(module, f"{method}_macs", None)
        if rule is not None:
            by_rule += rule(*module_args)
            return jnp.zeros_like(module_args[0])
        return next_function(*module_args, **module_kwargs)

    with nn.intercept_methods(count):
        jaxpr = jax.make_jaxpr(function)(*args)
    return by_rule + jaxpr_macs(jaxpr.jaxpr)


def jaxpr_macs(jaxpr: Any) -> int:
    """Multiply-accumulates of dot_general and conv_general_dilated in a jaxpr and its sub-jaxprs."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            lhs = equation.invars[0].aval
            total += equation.outvars[0].aval.size * math.prod(lhs.shape[axis] for axis in contracted)
        elif equation.primitive.name == "conv_general_dilated":
            total += convolution_macs(equation)
        else:
            repeats = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
            total += repeats * sum(jaxpr_macs(sub) for sub in sub_jaxprs(equation.params))
    return total


def convolution_macs(equation: Any) -> int:
    """Multiply-accumulates of a convolution: its kernel once for every position of the output.

    For a transposed convolution, which jax expresses as one that is padded by the kernel's size less one, it is once
    for every position of the input."""
    (image, kernel), numbers = (variable.aval for variable in equation.invars), equation.params["dimension_numbers"]
    reach = [kernel.shape[axis] - 1 for axis in numbers.rhs_spec[2:]]
    transposed = any(reach) and list(equation.params["padding"]) == [(size, size) for size in reach]
    side, spec = (image, numbers.lhs_spec) if transposed else (equation.outvars[0].aval, numbers.out_spec)
    return side.size // side.shape[spec[1]] * kernel.size


def sub_jaxprs(params: dict) -> list:
    """The jaxprs among an equation's parameters."""
    found = []
    for value in params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            item = getattr(item, "jaxpr", item)
            if hasattr(item, "eqns"):
                found.append(item)
    return found


def summarize_levels(levels: Sequence[Level]) -> list[LevelSummary]:
    """The cost of every level, coarse to fine. Nothing is computed."""
    params = jax.eval_shape(lambda: hierarchy.init(levels, jax.random.key(0)))
    variables = {
        level.name: map_shape(lambda s: jax.ShapeDtypeStruct((1, *s), jnp.float32), level.shape) for level in levels
    }
    result, is_buffer = [], buffer_predicate(levels)
    for level in levels:
        cond = jax.eval_shape(lambda v, level=level: conditioning.blank_conditions(level, v), variables)
        macs = count_macs(
            lambda p, x, c, level=level: hierarchy.apply_network(level, p, train=False)(x, jnp.zeros(1), c),
            params[level.name],
            variables[level.name],
            cond,
        )
        leaves = jax.tree_util.tree_flatten_with_path({level.name: params[level.name]})[0]
        parameters = sum(math.prod(leaf.shape) for path, leaf in leaves if not is_buffer(path_name(path)))
        result.append(LevelSummary(level.name, level.shape, level.backbone.num_tokens(level.shape), parameters, macs))
    return result


def state_bytes(state: Any) -> int:
    """Bytes of the whole train state: parameters, EMA, optimizer moments."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


def format_shape(shape: Tree) -> str:
    """'(32, 32, 4)', and of several resolutions '7x7x1 + 14x14x1'."""
    return str(shape) if is_shape(shape) else " + ".join("x".join(map(str, leaf)) for leaf in shape)


def run(config: Config, out: str = "") -> None:
    """Prints the table of the config's levels; with `out`, also writes it to that file as JSON."""
    print(write_summary(build_levels(config), abstract_state(config), out))


def write_summary(levels: Sequence[Level], state: Any, out: str = "") -> str:
    """The table as text; with `out`, the same as JSON in that file."""
    rows = summarize_levels(levels)
    total = {"parameters": sum(row.parameters for row in rows), "macs": sum(row.macs for row in rows)}
    memory = state_bytes(state)
    shapes = [format_shape(row.shape) for row in rows]
    width = max(18, *(len(shape) + 2 for shape in shapes))
    lines = [f"{'level':<10}{'shape':<{width}}{'tokens':>9}{'parameters':>15}{'GMACs':>11}"]
    lines += [
        f"{row.name:<10}{shape:<{width}}{row.tokens:>9}{row.parameters:>15,}{row.macs / 1e9:>11.4f}"
        for row, shape in zip(rows, shapes, strict=True)
    ]
    lines += [
        f"{'total':<{width + 19}}{total['parameters']:>15,}{total['macs'] / 1e9:>11.4f}",
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
