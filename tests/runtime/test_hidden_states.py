"""Hidden states stay on the device that keeps them; the meta device of torch stands for one."""

from __future__ import annotations

import torch

from gptq_cli.runtime.memory import Memory
from gptq_cli.runtime.open_model import HiddenStates

CPU = torch.device("cpu")


def test_states_are_tensors_or_tuples_and_counted_whole() -> None:
    hidden, extra = torch.randn(2, 3), torch.arange(4)
    states = HiddenStates([hidden, (hidden, extra, None)], Memory(CPU))
    assert states.nbytes == 2 * 24 + 32
    other = states.copy()
    other[1] = (extra, hidden)
    assert torch.equal(states[0], hidden)
    assert list(map(type, states[1])) == [torch.Tensor, torch.Tensor, type(None)]
    assert torch.equal(states[1][1], extra)
    assert torch.equal(other[1][1], hidden)


def test_a_state_stays_on_the_device_of_its_hidden_states() -> None:
    away = torch.zeros(2, 3, device="meta")
    states = HiddenStates([away, (away,)], Memory(CPU))
    states[0] = torch.ones(2, 3)
    states[1] = (torch.ones(2, 3), torch.ones(4), None)
    assert states.stored[0] is away
    assert states.stored[1][0] is away
    assert (states.stored[1][1].device.type, states.stored[1][2]) == ("meta", None)
    states.restore([torch.ones(2, 3), (torch.ones(2, 3), torch.ones(5))])
    assert states.stored[0].is_meta
    assert [tensor.shape for tensor in states.stored[1] if tensor.is_meta] == [(2, 3), (5,)]
