import numpy as np

from service.v2.signature import Signature, config, metadata
from service.v2.tensors import NAMES


def test_the_signature_is_what_the_runtime_takes_and_gives(model, uint8_model):
    """Asked of onnxruntime itself, not of the card."""
    for served in (model, uint8_model):
        session, signature = served._session, Signature.of(served.card)
        nodes = [*session.get_inputs(), *session.get_overridable_initializers()]
        kinds = {"tensor(float)": "FP32", "tensor(uint8)": "UINT8", "tensor(int64)": "INT64"}
        theirs = {node.name: (kinds[node.type], node.shape) for node in nodes}
        assert set(theirs) == {spec.name for spec in signature.inputs}
        for spec in signature.inputs:
            kind, shape = theirs[spec.name]
            assert kind == spec.datatype
            fixed = tuple(size if isinstance(size, int) else -1 for size in shape)
            assert fixed == spec.shape, spec.name
        assert [spec.optional for spec in signature.inputs] == [False, True, True]
        assert [node.name for node in session.get_outputs()] == [s.name for s in signature.outputs]


def test_outputs_are_as_the_signature_says(model):
    outputs = vars(model.run(np.zeros((3, 3, 64, 96), np.float32)))
    for spec in Signature.of(model.card).outputs:
        array = outputs[spec.name]
        assert NAMES[array.dtype] == spec.datatype
        assert array.shape == (3, *spec.shape[1:])


def test_metadata_names_the_versions_it_is_given(model):
    found = metadata(model, ["1", "2"])
    assert found["versions"] == ["1", "2"]
    assert found["name"] == "colours"
    assert found["inputs"][0] == {"name": "images", "datatype": "FP32", "shape": [-1, 3, 64, 96]}
    assert found["outputs"][3] == {"name": "num_detections", "datatype": "INT64", "shape": [-1]}


def test_configuration_has_the_batch_in_the_shapes(model, uint8_model):
    found = config(model, inferences=2, batch_size=1, batch_wait_ms=2.5)
    assert found["max_batch_size"] == 0
    assert found["input"][0] == {
        "name": "images",
        "data_type": "TYPE_FP32",
        "dims": [-1, 3, 64, 96],
        "format": "FORMAT_NCHW",
        "optional": False,
    }
    assert found["input"][1]["dims"] == [3]
    assert found["input"][1]["optional"] is True
    assert [output["dims"] for output in found["output"]] == [[-1, 20, 4], [-1, 20], [-1, 20], [-1]]
    assert found["instance_group"] == [{"name": "colours", "kind": "KIND_CPU", "count": 2}]
    images = config(uint8_model, inferences=1, batch_size=1, batch_wait_ms=0)["input"][0]
    assert images["dims"] == [-1, -1, -1, 3]
    assert (images["data_type"], images["format"]) == ("TYPE_UINT8", "FORMAT_NHWC")


def test_configuration_speaks_of_batching_where_there_is_some(model):
    alone = config(model, inferences=1, batch_size=1, batch_wait_ms=2.5)
    assert "dynamic_batching" not in alone
    shared = config(model, inferences=1, batch_size=8, batch_wait_ms=2.5)
    assert shared["dynamic_batching"] == {
        "preferred_batch_size": [8],
        "max_queue_delay_microseconds": 2500,
    }
