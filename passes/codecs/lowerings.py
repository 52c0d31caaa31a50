"""Inductor lowerings of our ops that are plain casts: they fuse with what is around them. All others are called."""

import torch

from ..graph import _torch

for cast in (torch.ops.actcompile.narrow.default, torch.ops.actcompile.widen.default):
    _torch.register_lowering(cast, type_promotion_kind=None)(
        _torch.lowerings[torch.ops.prims.convert_element_type.default]
    )
