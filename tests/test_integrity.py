"""A saved state that does not hold what its config says is refused, whichever adapter and classifier it is of."""

from collections.abc import Callable, Iterator
from itertools import islice

import pytest
import torch
from torch import Tensor

from inflora.config import METHODS, RunConfig, override
from inflora.continual import run
from inflora.integrity import check_state, layouts_of
from inflora.layout import misfit
from inflora.state import RunState, StateError, save_state
from tests.conftest import pair_of, tiny_method

KINDS = {name: tiny_method(name) for name in METHODS} | {
    "frozen, aligned": pair_of("none", "aligned"),
    "frozen, qda": pair_of("none", "qda"),
    "sdlora in its first task": pair_of("sdlora") | {"adapter.adapt_tasks": 1},
    "inflora beside the frozen model": pair_of("inflora", "lda") | {"adapter.features": "both"},
}
GROUPS = ("model", "adapter", "classifier", "probes")
UNKNOWN = torch.zeros(1)


@pytest.fixture(scope="module")
def states(tiny, digits) -> dict[str, list[tuple[RunConfig, RunState]]]:
    """The states of every kind after one task and after two."""
    changes = {"optim.batch_size": 256, "data.tasks": [3, 2, 5]}
    configs = {kind: override(tiny, settings | changes) for kind, settings in KINDS.items()}
    return {kind: [(config, result.state) for result in islice(run(config), 2)] for kind, config in configs.items()}


def edits(tensors: dict[str, Tensor]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """A state's tensors, each of them changed in every way, one at a time."""
    for name, tensor in tensors.items():
        yield f"{name} is missing", {key: value for key, value in tensors.items() if key != name}
        for what, other in changed(tensor):
            yield f"{name} {what}", tensors | {name: other}
    yield "unknown", tensors | {"heads.0.scale": UNKNOWN}


def changed(tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    yield "flat", tensor.flatten() if tensor.dim() != 1 else tensor[None]
    if tensor.dim():
        yield "a number", tensor.new_zeros(())
    for side in range(tensor.dim()):
        longer = [length + 65 * (side == place) for place, length in enumerate(tensor.shape)]
        yield f"longer in {side}", tensor.new_zeros(longer)
        yield f"of no length in {side}", tensor.narrow(side, 0, 0)
    for dtype in {torch.float32, torch.float16, torch.float64, torch.int64} - {tensor.dtype}:
        yield f"of {dtype}", tensor.to(dtype)
    for value in (torch.nan, torch.inf, -torch.inf):
        one = tensor.clone()
        one.view(-1)[-1] = value
        yield f"with {value}", one


def is_an_allowed_memory(kind: str, what: str) -> bool:
    """How many directions a memory holds is the learner's own affair: as few as none."""
    return kind.startswith("inflora") and what.endswith((".remove of no length in 1", ".retain of no length in 1"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_states_tensors_are_exactly_those_its_adapter_and_classifier_make(kind, states):
    """Untouched it passes; with any tensor gone, of another shape or type, not finite, or one more, it does not."""
    for config, state in states[kind]:
        check_state(config, state)
        layouts = layouts_of(config, (10,) if kind == "joint" else (3, 2)[: state.tasks_done], state.adapter.keys())
        for group in GROUPS:
            tensors = getattr(state, group)
            assert misfit(tensors, layouts[group]) == ""
            for what, edited in edits(tensors):
                assert misfit(edited, layouts[group]) or is_an_allowed_memory(kind, what), what


@pytest.mark.parametrize("group", GROUPS)
def test_what_is_wrong_is_said_in_one_line_that_names_the_tensor(group, states):
    config, state = states["inflora"][1]
    tensors = getattr(state, group)
    name = min(tensors)
    for edited in ({}, tensors | {name: UNKNOWN}, tensors | {name: tensors[name] * torch.nan}):
        with pytest.raises(StateError, match=f"the state is damaged: {group}/{name}") as error:
            check_state(config, state._replace(**{group: edited}))
        assert len(str(error.value).splitlines()) == 1


def test_a_state_of_other_settings_is_none_of_this_config(states):
    config, state = states["inflora"][0]
    for change in ({"data.mean": 0.1}, {"adapter": "lora"}, {"classifier": "ncm"}, {"data.tasks": [3, 3, 4]}):
        with pytest.raises(StateError, match="edited, a file that it names has changed, or of another version"):
            check_state(override(config, change), state)


def with_data(**changes) -> Callable[[RunState], RunState]:
    return lambda state: state._replace(data=state.data.model_copy(update=changes))


FACTS = {
    "class_of too short": with_data(class_of=tuple(range(9))),
    "class_of too long": with_data(class_of=tuple(range(11))),
    "class_of out of range": with_data(class_of=(*range(9), 10)),
    "class_of negative": with_data(class_of=(*range(9), -1)),
    "class_of in another order": with_data(class_of=tuple(reversed(range(10)))),
    "fewer classes": with_data(classes=tuple("012345678"), class_of=tuple(range(9))),
    "more classes": with_data(classes=tuple("0123456789a"), class_of=tuple(range(11))),
    "no classes": with_data(classes=(), class_of=()),
    "seven channels": with_data(channels=7),
    "channels that the backbone does not read": with_data(channels=3),
    "more tasks": lambda state: state._replace(tasks=4),
    "no data": lambda state: state._replace(data=None),
}


@pytest.mark.parametrize("edit", FACTS.values(), ids=FACTS)
def test_what_a_state_says_of_its_data_is_what_its_config_says(edit, states):
    config, state = states["inflora"][1]
    with pytest.raises(StateError) as error:
        check_state(config, edit(state))
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("group", GROUPS)
def test_a_run_that_has_gone_astray_is_not_kept(group, states, tmp_path):
    """The next task, or a user, would work with it."""
    _, state = states["inflora"][1]
    tensors = {name: tensor * torch.nan for name, tensor in getattr(state, group).items()}
    with pytest.raises(FloatingPointError, match=f"{group}/.* is not finite after task 1, .*optim.lr"):
        save_state(state._replace(**{group: tensors}), tmp_path / "state")
    assert not (tmp_path / "state").exists()
