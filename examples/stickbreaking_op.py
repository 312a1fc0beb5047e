"""Stick-breaking attention as a plain torch function: packed documents, then one more token against a cache.

python examples/stickbreaking_op.py
"""

import torch

from modmoe.ops import stickbreaking_attention

torch.manual_seed(0)
heads, kv_heads, dim = 4, 2, 16  # query head h reads key/value head h // 2


def random(num_heads: int, length: int) -> torch.Tensor:
    return torch.randn(1, num_heads, length, dim, requires_grad=True)


# Two documents of 5 and 7 tokens in one row. No position embedding: the nearest key has the first claim on the stick.
q, k, v = random(heads, 12), random(kv_heads, 12), random(kv_heads, 12)
out, remainder = stickbreaking_attention(q, k, v, cu_seqlens=torch.tensor([0, 5, 12]))
out.square().mean().backward()
print(f"packed: out {tuple(out.shape)}, left of the stick {remainder.mean():.3f} on average, |dq| {q.grad.norm():.3f}")

# The second document again, alone: the same numbers.
alone, _ = stickbreaking_attention(q[:, :, 5:], k[:, :, 5:], v[:, :, 5:])
torch.testing.assert_close(out[:, :, 5:], alone)

# With a cache: queries are the last positions of the keys, so one query reads all seven.
with torch.no_grad():
    step, _ = stickbreaking_attention(q[:, :, -1:], k[:, :, 5:], v[:, :, 5:])
torch.testing.assert_close(step, alone[:, :, -1:])
print("a document alone, and its last token against a cache, give the numbers of the packed row")
