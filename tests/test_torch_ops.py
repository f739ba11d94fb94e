"""torch.ops.loratrf: values, registration, fake kernels, torch.compile and torch.export."""

from __future__ import annotations

import pytest

from loratrf_deploy.ops import schemas
from loratrf_deploy.ops.dtypes import DTYPES
from operators import FUNCTIONS, built_kernels, reference_of, values_of
from tolerances import assert_close

torch = pytest.importorskip("torch")
built_kernels()
from loratrf_deploy.ops import torch_ops  # noqa: E402


def inputs_of(op, dtype="float32"):
    values = values_of(op).values()
    return [torch.from_numpy(v.copy()).to(torch.int64 if v.dtype == "int64" else getattr(torch, dtype)) for v in values]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", FUNCTIONS)
def test_matches_reference(op, dtype):
    tensors = inputs_of(op, dtype)
    actual = getattr(torch.ops.loratrf, FUNCTIONS[op])(*tensors)
    assert actual.dtype == tensors[0].dtype
    assert_close(actual.double(), reference_of(op, tensors), dtype, op)


def test_filter_input():
    tensors = inputs_of("LoraTrf")
    expected = reference_of("LoraTrf", tensors, "base")
    assert_close(torch.ops.loratrf.lora_trf(*tensors, "base"), expected, "float32", "base")
    assert_close(torch.ops.loratrf.lora_trf(*tensors, filter_input="base"), expected, "float32", "base")
    with pytest.raises(ValueError, match="filter_input"):
        torch.ops.loratrf.lora_trf(*tensors, "neither")


@pytest.mark.parametrize("op", FUNCTIONS)
def test_strided_inputs(op):
    tensors = inputs_of(op)
    strided = [tensor.mT.contiguous().mT if tensor.dim() > 1 else tensor.repeat(2)[: len(tensor)] for tensor in tensors]
    function = getattr(torch_ops, FUNCTIONS[op])
    actual = function(*strided)
    assert actual.is_contiguous()
    torch.testing.assert_close(actual, function(*tensors), rtol=0, atol=0)


@pytest.mark.parametrize("op", FUNCTIONS)
def test_registration(op):
    # Schema, fake kernel and dispatch agree, dynamic shapes included.
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(getattr(torch.ops.loratrf, FUNCTIONS[op]).default, tuple(inputs_of(op)), test_utils=tests)


@pytest.mark.parametrize("op", FUNCTIONS)
def test_names_are_the_tables(op):
    arguments = getattr(torch.ops.loratrf, FUNCTIONS[op]).default._schema.arguments
    attributes = schemas.OPS[op].attributes
    assert tuple(argument.name for argument in arguments) == (*schemas.OPS[op].inputs, *attributes)
    defaults = {argument.name: argument.default_value for argument in arguments}
    assert {name: defaults[name] for name in attributes} == attributes
    assert getattr(torch_ops, FUNCTIONS[op])._init_fn.__doc__.startswith("y = ")


def test_export_keeps_the_operator():
    class Layer(torch.nn.Module):
        def forward(self, *tensors):
            return torch.ops.loratrf.lora_trf(*tensors, "adapted") * 2

    tensors = inputs_of("LoraTrf")
    batch = torch.export.Dim("batch", min=1, max=8)
    dynamic = ({0: batch}, {0: batch}, *({} for _ in tensors[2:]))
    program = torch.export.export(Layer(), tuple(tensors), dynamic_shapes=(dynamic,))
    assert any("loratrf.lora_trf" in str(node.target) for node in program.graph.nodes)
    more = [torch.cat([tensor, tensor, tensor]) for tensor in tensors[:2]] + tensors[2:]
    torch.testing.assert_close(program.module()(*more), Layer()(*more), rtol=0, atol=0)


def test_compile_passes_through():
    tensors = inputs_of("LowRank")
    compiled = torch.compile(lambda *t: torch.ops.loratrf.low_rank(*t).relu(), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*tensors), torch.ops.loratrf.low_rank(*tensors).relu(), rtol=0, atol=0)


def test_no_gradient_is_an_error():
    tensors = [tensor.requires_grad_() for tensor in inputs_of("LowRank")]
    with pytest.raises(RuntimeError, match=r"register_autograd|not.*(differentiable|require grad)|backward"):
        torch.ops.loratrf.low_rank(*tensors).sum().backward()


def test_shapes_that_do_not_fit():
    base, x, A, B = inputs_of("LowRank")
    with pytest.raises(ValueError, match=r"LowRank: A is \(4, 18\), expected \(R, K = 19\)"):
        torch.ops.loratrf.low_rank(base, x, A[:, :18], B)
    with pytest.raises(TypeError, match="x is of another dtype than base"):
        torch.ops.loratrf.low_rank(base, x.half(), A, B)
