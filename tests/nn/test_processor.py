"""What a processor has, from what Linux and macOS say of it."""

import pytest

from slmjax.nn.compute import cpu_dtype
from slmjax.nn.processor import Processor, allowed, from_cpuinfo, from_sysctl, processor, relevant

pytestmark = pytest.mark.fast

X86 = """processor\t: 0
model name\t: AMD EPYC
flags\t\t: fpu sse2 avx fma avx2 avx512f avx512_bf16 avx512_vnni rdpid

processor\t: 1
model name\t: another
flags\t\t: fpu
"""
ARM = "processor\t: 0\nBogoMIPS\t: 243.75\nFeatures\t: fp asimd sve i8mm bf16\n"
INTEL_MAC = """machdep.cpu.brand_string: Intel(R) Core(TM) i5
machdep.cpu.features: FPU SSE4.2 AVX1.0 FMA
machdep.cpu.leaf7_features: BMI1 AVX2
"""
M2 = "machdep.cpu.brand_string: Apple M2\nhw.optional.neon: 1\nhw.optional.arm.FEAT_BF16: 1\n"
M1 = M2.replace("M2", "M1").replace("BF16: 1", "BF16: 0")


@pytest.mark.parametrize(
    ("parse", "text", "name", "features", "bfloat16"),
    [
        (from_cpuinfo, X86, "AMD EPYC", ("avx", "avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16"), True),
        (
            from_cpuinfo,
            X86.replace("avx512_bf16", ""),
            "AMD EPYC",
            ("avx", "avx2", "fma", "avx512f", "avx512_vnni"),
            False,
        ),
        (from_cpuinfo, ARM, "", ("asimd", "sve", "bf16"), True),
        (from_cpuinfo, "", "", (), False),
        (from_sysctl, INTEL_MAC, "Intel(R) Core(TM) i5", ("avx", "avx2", "fma"), False),
        (from_sysctl, M2, "Apple M2", ("asimd", "bf16"), True),
        (from_sysctl, M1, "Apple M1", ("asimd",), False),
    ],
)
def test_name_and_features(parse, text, name, features, bfloat16):
    found, flags = parse(text)
    assert (found, relevant(flags)) == (name, features)
    assert Processor(name=found, features=relevant(flags), cores=2).bfloat16 is bfloat16


@pytest.mark.parametrize(
    ("flags", "last"),
    [
        ("", "amx_bf16"),
        ("--xla_cpu_max_isa=AMX", "amx_bf16"),
        ("--other --xla_cpu_max_isa=AVX512", "avx512f"),
        ("--xla_cpu_max_isa=avx2", "fma"),
        ("--xla_cpu_max_isa=AVX2 --xla_cpu_max_isa=AVX", "avx"),
        ("--xla_cpu_max_isa=UNHEARD_OF", "amx_bf16"),
    ],
)
def test_xlas_flag_forbids_features(flags, last):
    have = ("avx", "avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16")
    assert allowed(have, flags) == have[: have.index(last) + 1]


def test_this_machine():
    here = processor()
    assert here.cores >= 1
    assert here.name
    assert here.name in str(here)
    assert not processor("--xla_cpu_max_isa=SSE4_2").features or "asimd" in here.features


def test_what_is_not_measured_follows_from_features_and_jaxlib():
    answers = {(True, (0, 12)): "bfloat16", (True, (1, 0)): "bfloat16", (True, (0, 11)): "float32"}
    answers |= {(False, (0, 12)): "float32", (False, (0, 10)): "float32"}
    assert {key: cpu_dtype(*key) for key in answers} == answers
