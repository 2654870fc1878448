"""What is left out: a pair (name, reason) for people, with a kind that code decides by."""

import copy
import json
import pickle

import pytest

from rasa_theory.formats import Entry, Exclusion, LeftOut
from rasa_theory.sources import group


def test_left_out_is_a_pair_with_a_kind():
    one = LeftOut("h.0.w", "the only layer", Exclusion.ALONE)
    name, reason = one
    assert (name, reason) == ("h.0.w", "the only layer") == one
    assert dict([one]) == {"h.0.w": "the only layer"}
    assert json.loads(json.dumps(one)) == ["h.0.w", "the only layer"]
    assert (one.name, one.reason, one.kind) == ("h.0.w", "the only layer", Exclusion.ALONE)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_the_kind_survives_a_copy_and_the_way_to_another_process(copied):
    one = copied(LeftOut("h.0.w", "the only layer", Exclusion.ALONE))
    assert (one, one.kind) == (("h.0.w", "the only layer"), Exclusion.ALONE)


@pytest.mark.parametrize(
    ("entries", "kind"),
    [
        ([Entry("h.0.b", (3,), "float32")], Exclusion.AXES),
        ([Entry("none", (2, 0, 4), "float32")], Exclusion.EMPTY),
        ([Entry("ids", (2, 3, 4), "int64")], Exclusion.DTYPE),
        ([Entry("w8", (2, 3, 4), "float8_e4m3")], Exclusion.DTYPE),
        ([Entry("lm_head", (3, 4), "float32")], Exclusion.ALONE),
        ([Entry("layers.0.w", (3, 4), "float32")], Exclusion.ALONE),
        ([Entry(f"a{i}_b{i}", (3, 4), "float32") for i in "12"], Exclusion.NAME),
        ([Entry(f"w{i}", (3, 4), "float32") for i in ("1", "01")], Exclusion.NAME),
        ([Entry("h.0.lora_A.weight", (3, 4), "float32")], Exclusion.FACTOR),
    ],
)
def test_the_kind_of_what_forms_no_stack(entries, kind):
    groups, left_out = group(entries)
    assert groups == []
    assert [one.kind for one in left_out] == [kind] * len(entries)


def test_a_matrix_that_is_alone_is_a_stack_of_one_layer_where_that_is_asked_for():
    """Whatever its name: nothing is left out because its name does not say which layer it is."""
    entries = [Entry("lm_head", (3, 4), "float32"), *(Entry(f"a{i}_b{i}", (3, 4), "float32") for i in "12")]
    groups, left_out = group(entries, alone=True)
    assert [g.name for g in groups] == ["lm_head", "a1_b1", "a2_b2"]
    assert left_out == []
