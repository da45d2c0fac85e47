"""Operations on arrays that several networks share, each with one signature whatever computes it.

attention and neighborhood_attention are softmax attention over all keys and over windows of a grid; mixed_rows selects
the rows of a batch that hold a finer resolution. Imports nothing of ours.
"""

from nested.ops import attention, mixed_rows, neighborhood_attention

__all__ = ["attention", "mixed_rows", "neighborhood_attention"]
