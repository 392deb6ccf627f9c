"""Which numbers may differ between runs that train as one program: what the dataclasses declare, and no list."""

from dataclasses import dataclass, field, replace

from slmjax.models.families.gpt_neox import pythia_14m
from slmjax.nn.initial import Normal
from slmjax.optim.hyperball import AdamH
from slmjax.optim.recipes import Adafactor, AdamW, Lion, Muon
from slmjax.optim.schedules import WSD, Constant, Cosine, InverseSqrt, Linear
from slmjax.serialise import to_json
from slmjax.traced import TRACED, declared, numbers

SHARED = {"weight_decay", "clip_norm"}
MOMENTS = SHARED | {"b1", "b2", "eps"}


def test_what_the_parts_of_an_experiment_declare():
    expected = {
        Constant(peak_lr=1.0): {"peak_lr"},
        InverseSqrt(peak_lr=1.0): {"peak_lr"},
        Linear(peak_lr=1.0): {"peak_lr", "final_fraction"},
        Cosine(peak_lr=1.0): {"peak_lr", "final_fraction"},
        WSD(peak_lr=1.0): {"peak_lr", "final_fraction", "power"},
        AdamW(): MOMENTS,
        AdamW(clip_norm=None): MOMENTS - {"clip_norm"},  # with and without are two programs
        Lion(): MOMENTS - {"eps"},
        AdamH(): MOMENTS,
        Adafactor(): SHARED | {"decay_power", "update_clip"},
        Muon(): SHARED | {"momentum", "rms", "adam_b1", "adam_b2", "adam_eps"},
        Normal(): {"std", "residual"},
    }
    for value, names in expected.items():
        assert set(numbers(to_json(value))) == names, value


def test_a_part_is_looked_into_only_where_its_field_says_so():
    decoder = replace(pythia_14m(), initial=Normal(std=0.1))
    assert list(numbers(to_json(decoder))) == ["initial.std", "initial.residual"]


@dataclass(frozen=True)
class Base:
    rate: float = field(default=1.0, metadata=TRACED)
    count: int = 3


@dataclass(frozen=True)
class Other(Base):
    rate: float = 2.0


@dataclass(frozen=True)
class Fixed(Base):
    rate: float = field(default=2.0, metadata={"traced": False})


def test_a_subclass_with_another_default_declares_the_same_and_one_may_take_it_back():
    assert [declared(cls, "rate") for cls in (Base, Other, Fixed)] == [True, True, False]
    assert not declared(Base, "count")
    assert not declared(Base, "absent")
