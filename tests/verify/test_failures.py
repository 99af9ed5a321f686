"""A temporary failure of a check is not a verdict on the model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from conftest import tiny_model
from programmable_kv.engine import Engine
from programmable_kv.errors import UnverifiedError
from programmable_kv.verify.failures import is_out_of_memory, may_pass


class Failing:
    """Makes a model's forwards raise an error, as a full device would, after the first `after` of them."""

    def __init__(self, error: BaseException, after: int = 0) -> None:
        self.error, self.after = error, after

    def __call__(self, module: Any, arguments: Any) -> None:
        if self.after <= 0:
            raise self.error
        self.after -= 1


ERRORS = [
    torch.OutOfMemoryError("out of memory"),
    MemoryError(),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    KeyboardInterrupt(),
]
CHECKS: list[Callable[[Engine], object]] = [lambda engine: engine.rows, lambda engine: engine.relocation, Engine.verify]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("check", CHECKS, ids=["rows", "relocation", "verify"])
@pytest.mark.parametrize("after", [0, 1, 3])
def test_out_of_memory_is_raised_and_not_remembered(
    error: BaseException, check: Callable[[Engine], object], after: int
) -> None:
    model = copy.deepcopy(tiny_model("llama"))
    engine = Engine(model)
    hook = model.register_forward_pre_hook(Failing(error, after))
    if after < 3 or check is not CHECKS[0]:  # the check of rows runs three forwards
        with pytest.raises(type(error)):
            check(engine)
    hook.remove()
    engine.require_rows()
    engine.require_relocation()


def test_another_runtime_error_refuses_and_is_not_remembered() -> None:
    model = copy.deepcopy(tiny_model("llama"))
    engine = Engine(model)
    hook = model.register_forward_pre_hook(Failing(RuntimeError("the device is gone\nfor now"), after=1))
    with pytest.raises(UnverifiedError, match="the device is gone"):
        engine.require_relocation()
    with pytest.raises(UnverifiedError, match="the device is gone"):
        engine.require_rows()
    hook.remove()
    engine.require_rows()
    engine.require_relocation()


def test_a_verdict_is_remembered() -> None:
    model = copy.deepcopy(tiny_model("llama"))
    engine = Engine(model)
    hook = model.register_forward_pre_hook(Failing(TypeError("not an argument"), after=2))
    with pytest.raises(UnverifiedError, match=r"does not accept a custom mask \(not an argument\)"):
        engine.require_rows()
    with pytest.raises(UnverifiedError, match=r"could not be run \(not an argument\)"):
        engine.require_relocation()
    hook.remove()
    assert not engine.rows.exact
    assert not engine.relocation.exact


def test_kinds_of_failures() -> None:
    assert all(is_out_of_memory(error) for error in ERRORS[:3])
    assert not is_out_of_memory(RuntimeError("shapes do not match"))
    assert may_pass(RuntimeError("shapes do not match"))
    assert not may_pass(NotImplementedError())
    assert not may_pass(ValueError())
