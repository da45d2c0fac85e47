"""A second implementation of U-ViT with conditions, from its equations, in numpy: what the goldens do not hold."""

import math

import jax
import numpy as np


def deconvolve(params, z, grid):
    """Transposed convolution [h, w, c] -> [H, W, D]: every input adds its kernel to the outputs from where it begins.

    flax slides the kernel over the spread input, so that its taps run backwards."""
    kernel = params["kernel"][::-1, ::-1]
    out = np.zeros((*grid, kernel.shape[-1])) + params["bias"]
    rows, columns = (wanted // size for wanted, size in zip(grid, z.shape, strict=False))
    for i, j in np.ndindex(z.shape[:2]):
        place = np.s_[rows * i : rows * i + kernel.shape[0], columns * j : columns * j + kernel.shape[1]]
        out[place] += np.einsum("c,ijcd->ijd", z[i, j], kernel)
    return out


def numpy_uvit(model, params, x, t, cond):
    """The model's equations one sample at a time, float64."""
    params, x, t, cond = jax.tree.map(np.asarray, (params, x, t, cond))

    def linear(p, x):
        return x @ p["kernel"] + p.get("bias", 0)

    def gelu(x):
        return x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2

    def norm(p, x):
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * p["scale"] + p["bias"]

    def embed(p, z, size):
        h, w, _ = z.shape
        patches = [z[i : i + size, j : j + size].ravel() for i in range(0, h, size) for j in range(0, w, size)]
        kernel = p["proj"]["kernel"]
        return np.stack(patches) @ kernel.reshape(-1, kernel.shape[-1]) + p["proj"]["bias"]

    def block(p, x, skip=None):
        if skip is not None:
            x = linear(p["skip_linear"], np.concatenate([x, skip], -1))
        q, k, v = np.split(linear(p["attn"]["qkv"], norm(p["norm1"], x)), 3, -1)
        heads = []
        for q_h, k_h, v_h in zip(*(np.split(a, model.num_heads, -1) for a in (q, k, v)), strict=True):
            weight = np.exp(q_h @ k_h.T / math.sqrt(q_h.shape[-1]))
            heads.append(weight / weight.sum(-1, keepdims=True) @ v_h)
        x = x + linear(p["attn"]["proj"], np.concatenate(heads, -1))
        return x + linear(p["mlp"]["fc2"], gelu(linear(p["mlp"]["fc1"], norm(p["norm2"], x))))

    def one(i):
        frequencies = 10000.0 ** (-np.arange(model.width // 2) / (model.width // 2))
        tokens = [np.concatenate([np.cos(t[i] * frequencies), np.sin(t[i] * frequencies)])[None]]
        if model.num_classes:
            tokens.insert(0, params["label_emb"]["embedding"][cond["label"][i]][None])
        if model.text_tokens:
            tokens.append(linear(params["context_embed"], cond["text"][i]))
        start = sum(map(len, tokens))
        tokens.append(embed(params["patch_embed"], x[i], model.patch_size))
        end = start + len(tokens[-1])
        joined, appended = [], model.injection == "append_tokens"
        for name, size in model.conditions:
            z, empty = cond[name][i], params[f"empty_{name}"][0]
            keep = cond.get(f"keep_{name}", np.ones(len(x), bool))[i]
            if not keep and model.empty == "variable":
                z = np.zeros(z.shape) + empty
            if appended:
                z = embed(params[f"cond_embed_{name}"], z, size)
            else:
                grid = (x.shape[1] // model.patch_size, x.shape[2] // model.patch_size)
                z = deconvolve(params[f"cond_deconv_{name}"]["proj"], z, grid).reshape(-1, model.width)
            if not keep and model.empty == "token":
                z = np.repeat(empty, len(z), 0)
            (tokens if appended else joined).append(z)

        def injected(stream, blocks_done):
            if joined and blocks_done % model.inject_every == 0:
                p = params[f"inject_{blocks_done // model.inject_every - 1}"]
                y = linear(p["fc1"], np.concatenate([stream[start:end], *joined], -1))
                for k in range(2, model.inject_layers + 1):
                    y = linear(p[f"fc{k}"], gelu(y))
                stream = np.concatenate([stream[:start], stream[start:end] + y])
            return stream

        stream, skips, n = np.concatenate(tokens) + params["pos_embed"][0], [], model.depth // 2
        for j in range(n):
            stream = injected(block(params[f"in_blocks_{j}"], stream), j + 1)
            skips.append(stream)
        stream = injected(block(params["mid_block"], stream), n + 1)
        for j in range(n):
            stream = injected(block(params[f"out_blocks_{j}"], stream, skips.pop()), n + 2 + j)
        pixels = linear(params["decoder_pred"], norm(params["norm"], stream)[start:end])
        out, size, columns = np.zeros(x[i].shape), model.patch_size, x[i].shape[1] // model.patch_size
        for j, patch in enumerate(pixels):
            row, column = size * (j // columns), size * (j % columns)
            out[row : row + size, column : column + size] = patch.reshape(size, size, -1)
        return out

    return np.stack([one(i) for i in range(len(x))])
