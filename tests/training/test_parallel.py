"""What is said of a precision that a machine cannot compute well."""

import pytest
import torch

from training.parallel import slow_precision

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("able", "is_slow"),
    [
        ({"architecture": "x86_64", "avx512_bf16": False, "amx_bf16": False}, True),
        ({"architecture": "x86_64", "avx512_bf16": True, "amx_bf16": False}, False),
        ({"architecture": "x86_64", "avx512_bf16": False, "amx_bf16": True}, False),
        ({"architecture": "aarch64"}, False),
    ],
)
def test_bf16_is_warned_of_where_the_cpu_has_no_instructions_for_it(monkeypatch, able, is_slow):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able)
    assert (slow_precision("bf16", CPU) is not None) == is_slow
    assert slow_precision("fp32", CPU) is None
    assert slow_precision("bf16", torch.device("cuda")) is None
