"""The table of probes: facts about other packages that flexpatch relies on, each with a function that checks it.

When a new release breaks other tests, start with test_upgrades.py, which runs this table: a probe that fails says which
fact is gone, and which function of flexpatch relies on it, for what.

- ``architectures``: of transformers' modeling code, checked for every architecture;
- ``loading_and_training``: of the rest of transformers;
- ``adapters_and_trainers``: of peft, bitsandbytes, TRL and accelerate;
- ``pytorch``: of torch.
"""

from helpers.probes import adapters_and_trainers, architectures, loading_and_training, pytorch
from helpers.probes.table import PROBES, Probe

__all__ = ["PROBES", "Probe", "adapters_and_trainers", "architectures", "loading_and_training", "pytorch"]
