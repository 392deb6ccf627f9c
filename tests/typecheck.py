"""How annotations are checked while the tests run: by beartype, an int passing for a float, as PEP 484 has it.

A jax array passes for a float as well: hyperparameters, seeds and initial values may be traced, so that `jax.vmap` can
train several runs at once.
"""

import jax
from beartype import BeartypeConf, FrozenDict, beartype

NUMBERS = FrozenDict({float: float | int | jax.Array})
typecheck = beartype(conf=BeartypeConf(hint_overrides=NUMBERS))
