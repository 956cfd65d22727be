from __future__ import annotations

import pytest
import torch

from raydfkd import devices
from raydfkd.devices import dtype_of

CPU = torch.device("cpu")


@pytest.fixture
def cpuinfo(monkeypatch, tmp_path):
    """Makes this machine one whose processor has the given flags."""

    def write(flags):
        about = tmp_path / "cpuinfo"
        about.write_text(f"processor\t: 0\nflags\t\t: fpu sse {flags}\n\n")
        monkeypatch.setattr(devices, "_CPUINFO", about)

    for cached in (devices.has_bfloat16, devices._say_no_bfloat16):
        cached.cache_clear()
    yield write
    for cached in (devices.has_bfloat16, devices._say_no_bfloat16):
        cached.cache_clear()


def test_processor_that_only_emulates_bfloat16_computes_in_float32_and_says_so_once(cpuinfo, caplog):
    caplog.set_level("INFO", "raydfkd")
    cpuinfo("avx2 avx512f")
    assert [dtype_of("bfloat16", CPU) for _ in range(2)] == [torch.float32] * 2
    assert [record.getMessage() for record in caplog.records] == ["cpu has no bfloat16; computing in float32"]


@pytest.mark.parametrize("flag", ["avx512_bf16", "amx_bf16", "bf16"])
def test_processor_with_instructions_for_bfloat16_uses_them(cpuinfo, caplog, flag):
    cpuinfo(flag)
    assert dtype_of("bfloat16", CPU) == torch.bfloat16
    assert not caplog.records


def test_float32_is_nobodys_choice_but_the_recipes(cpuinfo, caplog):
    cpuinfo("avx2")
    assert dtype_of("float32", CPU) == torch.float32
    assert not caplog.records


def test_system_that_says_nothing_of_its_processor_computes_in_float32(monkeypatch, cpuinfo, tmp_path):
    monkeypatch.setattr(devices, "_CPUINFO", tmp_path / "missing")
    assert dtype_of("bfloat16", CPU) == torch.float32
