"""`random_mask`: each boolean is true with the same probability, as a pure function of a seed and its position.

An element's 32 random bits are the hash of `random_bits`, compared with a threshold: three dozen instructions for 16
elements, where drawing floats takes much longer. Nothing is drawn here, so backward can make the same mask again.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..blocks.random_bits import MIX_2, hash_words, signed32
from ..op import op

WORDS = 1 << 32  # random words that differ
RUN = 1 << 18  # elements whose temporaries stay in a CPU's cache


def threshold_of(probability: float) -> int:
    """The least word that is not below a share `probability` of all, strictly between 0 and 1, to 2**-32."""
    return min(max(round(probability * WORDS), 1), WORDS - 1) - WORDS // 2


def random_mask_at(index: Tensor, seed: Tensor, salt: int, threshold: int, below: bool) -> Tensor:
    """The specification of `random_mask`, at the int64 positions `index` in row-major order.

    The position's low 32 bits are what is hashed; its high bits go into the seed.
    """
    low, high = index.to(torch.int32), (index >> 32).to(torch.int32)
    words = hash_words(low, seed[salt, 0], seed[salt, 1] ^ (high * signed32(MIX_2)))
    return words < threshold if below else words >= threshold


@op("random_mask")
def random_mask(seed: Tensor, salt: int, size: Sequence[int], threshold: int, below: bool) -> Tensor:
    """A bool tensor of shape `size`, true where an element's random word is below `threshold`, or where it is not.

    Args:
        seed: int32 of shape (masks, 2), drawn by `draw_seed` once per forward call.
        salt: the mask's row in `seed`. Masks of one row are of the same random words.
        threshold: int32; `threshold_of(p)` for the probability `p` of a word below it.
    """
    mask = torch.empty(list(size), dtype=torch.bool, device=seed.device)
    flat = mask.view(-1)
    for first in range(0, flat.numel(), RUN):
        part = flat[first : first + RUN]
        index = torch.arange(first, first + part.numel(), device=seed.device)
        part.copy_(random_mask_at(index, seed, salt, threshold, below))
    return mask


@random_mask.register_fake
def _(seed, salt, size, threshold, below):
    return seed.new_empty(size, dtype=torch.bool)
