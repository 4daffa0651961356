"""Whatever the user passes becomes rows; what the values may be is tested with the losses."""

import torch

from ghm_triton.losses.inputs import classification_inputs, regression_inputs


def test_views_not_copies():
    logits, target = torch.zeros(2, 5, 3), torch.zeros(2, 5, 3)
    weight = torch.ones(3)
    inputs = classification_inputs(logits, target, weight, None)
    assert inputs.logits.data_ptr() == logits.data_ptr()
    assert inputs.target.data_ptr() == target.data_ptr()
    assert inputs.weight.data_ptr() == weight.data_ptr()
    assert inputs.weight.stride() == (0, 1)  # broadcast without being written out
    assert [t.shape for t in (inputs.logits, inputs.target, inputs.weight)] == [(10, 3)] * 3
    assert inputs.index is None
    assert inputs.shape == (2, 5, 3)


def test_class_indices_are_not_expanded():
    inputs = classification_inputs(torch.zeros(2, 5, 3), torch.zeros(2, 5).int(), None, None)
    assert (inputs.index.shape, inputs.index.dtype) == ((10,), torch.int64)
    assert inputs.target is None
    assert inputs.weight is None


def test_a_vector_is_a_column_or_with_one_index_a_row():
    assert classification_inputs(torch.zeros(4), torch.zeros(4), None, None).logits.shape == (4, 1)
    inputs = classification_inputs(torch.zeros(4), torch.tensor(2), torch.ones(4), None)
    assert inputs.logits.shape == (1, 4)
    assert inputs.index.tolist() == [2]
    assert inputs.weight.shape == (1, 4)
    assert regression_inputs(torch.zeros(4), torch.zeros(4), None, None).pred.shape == (4, 1)


def test_without_classes_there_are_no_rows():
    inputs = classification_inputs(torch.zeros(5, 0), torch.zeros(5, dtype=int), None, None)
    assert (inputs.logits.shape, inputs.index.shape) == ((0, 1), (0,))
