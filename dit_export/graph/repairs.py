"""Repairs between PyTorch and ONNX, for what the exporter or a runtime gets wrong in any network.

Each repair but the last rewrites a traced module in place and returns how often it did; `trace.export` runs them all.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from hashlib import sha256
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import GraphModule, Node

from dit_runtime.errors import UsageError

aten = torch.ops.aten
TINY = 1e-7  # additions below this are taken for additions of 0
MASKED = -1e4  # added to the score of a masked token; finite in every precision, and softmax makes it an exact 0


def fold(module: GraphModule) -> int:
    """Compute what depends on no input and no parameter: frequencies, position tables, rotary tables.

    The exporter's own exp and pow differ from PyTorch's by an ulp, and a timestep of 1000 makes 1e-4 of an angle of it.
    Equal constants are one buffer: each block of FLUX.1 makes its own form of the rotary tables.
    """
    parameters = {name for name, _ in module.named_parameters()}
    values: dict[Node, Any] = {}
    for node in module.graph.nodes:
        if node.op == "get_attr" and node.target not in parameters:
            value = operator.attrgetter(node.target)(module)
        elif _is_pure(node) and all(source in values for source in node.all_input_nodes):
            args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
            value = node.target(*args, **kwargs)
        else:
            continue
        if isinstance(value, Tensor | tuple | list):
            values[node] = value
    folded, names = 0, dict[object, str]()  # of buffers, by content
    for node, value in values.items():
        needed = any(user not in values for user in node.users)
        if node.op == "call_function" and isinstance(value, Tensor) and needed:
            value = value.contiguous()
            name = names.setdefault(_content(value), f"folded_{folded}")
            if not hasattr(module, name):
                module.register_buffer(name, value.clone())
            node.replace_all_uses_with(_read(module, node, name), delete_user_cb=lambda user: user not in values)
            folded += 1
    module.graph.eliminate_dead_code()
    return folded


def drop_idle_squeezes(module: GraphModule) -> int:
    """Drop a squeeze of dimensions that are longer than 1, which PyTorch ignores.

    The exporter writes them as a Squeeze, which the ONNX checker and all runtimes refuse.
    """
    squeezes = [node for node in module.graph.nodes if node.target in (aten.squeeze.dim, aten.squeeze.dims)]
    idle = []
    for node in squeezes:
        source, dims = node.args
        sizes = [source.meta["val"].shape[dim] for dim in (dims if isinstance(dims, list | tuple) else [dims])]
        if all(isinstance(size, int) and size != 1 for size in sizes):
            node.replace_all_uses_with(source)
            module.graph.erase_node(node)
            idle.append(node)
    return len(idle)


def keep_tiny_terms(module: GraphModule) -> int:
    """Add tiny numbers as vectors of one element.

    onnxscript's optimizer compares scalars with an absolute tolerance and removes `x + 1e-15`, so that what it keeps
    away from 0 becomes NaN (rewriter/_matcher.py).
    """
    count = 0
    for node in [node for node in module.graph.nodes if node.target == aten.add.Tensor]:
        x, tiny = node.args
        if isinstance(tiny, float) and 0 < abs(tiny) < TINY and x.meta["val"].ndim:
            value = torch.full((1,), tiny, dtype=x.meta["val"].dtype)
            node.args = (x, _constant(module, node, f"tiny_{count}", value))
            count += 1
    return count


def add_masks(module: GraphModule) -> int:
    """Turn boolean attention masks into ones that are added to the scores.

    ONNX Runtime refuses a boolean mask with one row for all queries, and no pass would see what it does.
    """
    changed = 0
    for node in module.graph.nodes:
        if node.target == aten.scaled_dot_product_attention.default and len(node.args) > 3:
            mask = node.args[3]
            if mask is not None and mask.meta["val"].dtype == torch.bool:
                with module.graph.inserting_before(node):
                    added = module.graph.call_function(aten.where.Scalar, (mask, 0.0, MASKED))
                node.args = (*node.args[:3], added, *node.args[4:])
                changed += 1
    return changed


def pair_complex(module: GraphModule) -> int:
    """Write complex tensors, which rotary embeddings multiply, as pairs of reals along a last axis of 2.

    ONNX has no complex numbers. The exporter refuses to index or unsqueeze them, and what it makes of their products
    has no name in PyTorch (onnxscript/function_libs/torch_lib/ops/core.py).
    """
    pairs: dict[Node, Node] = {}
    for node in list(module.graph.nodes):
        if node.target == aten.view_as_real.default:
            node.replace_all_uses_with(pairs[node.args[0]])
        elif isinstance(value := node.meta.get("val"), Tensor) and value.is_complex():
            with module.graph.inserting_before(node):
                pairs[node] = _pair(module, node, pairs)
    module.graph.eliminate_dead_code()
    return len(pairs)


def _pair(module: GraphModule, node: Node, pairs: Mapping[Node, Node]) -> Node:
    """Return the pairs of reals that stand for a complex tensor, made of those of its terms."""
    call, rank = module.graph.call_function, node.meta["val"].ndim
    if node.op == "get_attr":
        value = operator.attrgetter(str(node.target))(module)
        return _constant(module, node, f"pair_{len(pairs)}", torch.view_as_real(value).contiguous())
    if node.target == aten.view_as_complex.default:
        (pair,) = node.all_input_nodes
        return pair
    args = torch.fx.node.map_arg(node.args, lambda term: pairs.get(term, term))
    if node.target == aten.index.Tensor:
        return call(node.target, args)
    if node.target in (aten.unsqueeze.default, aten.slice.Tensor, aten.cat.default):
        axis = args[1] if len(args) > 1 else 0
        return call(node.target, (args[0], axis % rank, *args[2:]))  # from the front: the pairs' axis is the last
    if node.target == aten.mul.Tensor and pairs.keys() >= set(node.args):
        (a, b), (c, d) = ([call(aten.select.int, (pair, -1, part)) for part in (0, 1)] for pair in args)
        ac, bd, ad, bc = (call(aten.mul.Tensor, terms) for terms in ((a, c), (b, d), (a, d), (b, c)))
        return call(aten.stack.default, ([call(aten.sub.Tensor, (ac, bd)), call(aten.add.Tensor, (ad, bc))], -1))
    raise UsageError(f"{node.name}: {node.target} of complex numbers, which has no form in pairs of reals here")


REPAIRS: tuple[Callable[[GraphModule], int], ...] = (
    fold,
    drop_idle_squeezes,
    keep_tiny_terms,
    add_masks,
    pair_complex,
)


def split_boolean_wheres(graph: ir.Graph) -> int:
    """Write Where(c, x, y) of booleans as (c and x) or (not c and y): ONNX Runtime has no Where of booleans."""
    wheres = [node for node in graph if node.op_type == "Where" and node.outputs[0].dtype == ir.DataType.BOOL]
    for where in wheres:
        condition, x, y = where.inputs
        (out,) = where.outputs
        no = ir.node("Not", [condition])
        first, second = ir.node("And", [condition, x]), ir.node("And", [no.outputs[0], y])
        either = ir.node("Or", [first.outputs[0], second.outputs[0]])
        either.outputs[0].type, either.outputs[0].shape = out.type, out.shape
        graph.insert_before(where, [no, first, second, either])
        ir.convenience.replace_all_uses_with(out, either.outputs[0], replace_graph_outputs=True)
        graph.remove(where, safe=True)
        either.outputs[0].name = out.name
    return len(wheres)


def _is_pure(node: Node) -> bool:
    """Return whether the node's value is the same each time, and computing it changes nothing else."""
    if node.op != "call_function":
        return False
    if isinstance(node.target, torch._ops.OpOverload):
        random = torch.Tag.nondeterministic_seeded in node.target.tags
        return not random and not node.target._schema.is_mutable and "empty" not in str(node.target)
    return node.target is operator.getitem


def _content(value: Tensor) -> object:
    """Return what only equal tensors share; a fake one is equal to itself alone."""
    if isinstance(value, FakeTensor) or value.device.type != "cpu":
        return id(value)
    numbers = value.view(torch.uint8) if value.ndim else value[None].view(torch.uint8)
    return value.dtype, tuple(value.shape), sha256(numbers.numpy().data).digest()


def _constant(module: GraphModule, node: Node, name: str, value: Tensor) -> Node:
    """Register the value as a buffer and read it before the node."""
    module.register_buffer(name, value)
    return _read(module, node, name)


def _read(module: GraphModule, node: Node, name: str) -> Node:
    """Read a buffer before the node."""
    with module.graph.inserting_before(node):
        constant = module.graph.get_attr(name)
    constant.meta["val"] = module.get_buffer(name)
    return constant
