"""How annotations are checked while the tests run: beartype, with an int where a float is asked for, as PEP 484 says."""

from beartype import BeartypeConf, beartype

typecheck = beartype(conf=BeartypeConf(is_pep484_tower=True))
