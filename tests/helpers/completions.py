"""Draw sequences of which some begin alike: two prompts with two completions each."""

import torch
from torch import Tensor

_generator = torch.Generator().manual_seed(0)


def _draw(count: int) -> Tensor:
    return torch.randint(3, 151, (count,), generator=_generator)


_FIRST, _SECOND = _draw(20), _draw(14)
SEQUENCES = [torch.cat([p, _draw(n)]) for p, n in ((_FIRST, 9), (_FIRST, 5), (_SECOND, 7), (_SECOND, 12))]
