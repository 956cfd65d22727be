"""Random numbers that follow from seeds."""

from __future__ import annotations

import traceback

import pytest
import torch
from toy import quiet_events, synthesize_here, toy_recipe, training_of

from raydfkd.job import open_job
from raydfkd.seeds import seed_globally, seeded


def test_global_numbers_are_those_of_torchs_own_seed():
    torch.manual_seed(2**63 - 1)
    expected = torch.randn(5)
    seed_globally(2**63 - 1)
    assert torch.equal(torch.randn(5), expected)


def test_outside_of_a_seed_numbers_go_on_as_if_it_had_not_been():
    torch.manual_seed(3)
    first, then = torch.rand(2), torch.rand(2)
    torch.manual_seed(3)
    assert torch.equal(torch.rand(2), first)
    with seeded(5):
        torch.rand(7)
    assert torch.equal(torch.rand(2), then)


@pytest.mark.parametrize("synthesizer", ["pixels", "generator"])
def test_no_step_notes_the_stack_for_devices_that_are_not_there(tmp_path, monkeypatch, synthesizer):
    """As ``torch.manual_seed`` does, in a millisecond."""
    job = open_job(toy_recipe(tmp_path, ["distill.steps=2"], synthesizer=synthesizer))
    noted = []
    monkeypatch.setattr(traceback, "format_stack", lambda *_: noted.append(1) or [])
    torch.manual_seed(0)
    assert noted or torch.cuda.is_available(), "or this test could not fail"
    noted.clear()
    synthesize_here(job, quiet_events(tmp_path))
    training_of(job).run()
    assert not noted
