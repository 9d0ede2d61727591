"""Devices and their memory, on machines that have none: what torch would say of a GPU is made up."""

import pytest
import torch

from billm_convert import resources
from billm_convert.resources import check_memory, choose_device, device_model, hidden_place
from billm_format.errors import DoesNotFitError

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def two_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let torch see a large and a small card, the large one first."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: ("large", "small")[device.index])


@pytest.mark.usefixtures("two_cards")
def test_a_card_is_the_same_by_every_name() -> None:
    assert choose_device("cuda") == choose_device("cuda:0") == choose_device("auto") == GPU
    assert device_model(choose_device("cuda")) == device_model(choose_device("cuda:0")) == "large"
    assert device_model(choose_device("cuda:1")) == "small"
    assert device_model(choose_device("cpu")) == "cpu"


def test_free_memory_counts_what_torch_holds_in_reserve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 4000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 700)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 200)
    assert resources.free_memory(GPU) == 1500
    assert resources.free_memory(CPU) > 0


@pytest.mark.parametrize(
    ("on_gpu", "on_host", "place", "refusal"),
    [
        (1000, 0, GPU, None),  # half of what the rest leaves, 300 of 600
        (999, 300, CPU, None),
        (999, 299, CPU, r"GB of memory \(hidden states"),
        (399, 300, CPU, r"GB of memory on the device \(block weights"),
    ],
)
def test_hidden_states_are_where_there_is_room(
    on_gpu: int, on_host: int, place: torch.device, refusal: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resources, "free_memory", lambda device: {"cuda": on_gpu, "cpu": on_host}[device.type])
    plan = {"hidden_states": 300, "block_weights": 100, "solver": 300}
    assert hidden_place(plan, CPU) == CPU
    assert hidden_place(plan, GPU) == place
    if refusal is None:
        check_memory(plan, GPU, place, "give less")
    else:
        with pytest.raises(DoesNotFitError, match=refusal):
            check_memory(plan, GPU, place, "give less")
