"""Module paths of traced tensors, from what torch.export notes at each node of the program."""

from __future__ import annotations

from collections.abc import Mapping

from torch.fx import Node


def path(node: Node) -> str:
    """Return the path of the module whose forward made the node, "" for the network's own."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return str(stack[-1][0]) if stack else ""


def maker(node: Node) -> str:
    """Return the path of the module that made a tensor: where its own forward only reshapes or sums, the nearest child.

    A gain 1 + chunk(linear(c)) of `blocks.0` is made by `blocks.0.modulation`.
    """
    return _child(node, [node]) or path(node)


def branch(total: Node, x: Node, state: Node) -> str:
    """Return the child module behind the residual sum x + branch(x), or the module that sums where there is none."""
    changing = descendants(state)
    terms = [term for term in total.all_input_nodes if term is not x and term in changing]
    return _child(total, terms, changing) or path(total)


def descendants(node: Node) -> dict[Node, None]:
    """Return all nodes that depend on this one, itself included."""
    reached, stack = {node: None}, [node]
    while stack:
        for user in stack.pop().users:
            if user not in reached:
                reached[user] = None
                stack.append(user)
    return reached


def _child(outer: Node, start: list[Node], among: Mapping[Node, None] | None = None) -> str:
    """Search backwards, the nearest nodes first, for one that a child of the outer node's module made."""
    own = path(outer)
    prefix = f"{own}." if own else ""
    level, visited = start, set(start)
    while level:
        for node in level:
            place = path(node)
            if place != own and place.startswith(prefix):
                return prefix + place[len(prefix) :].partition(".")[0]
        level = [term for node in level if path(node) == own for term in node.all_input_nodes]
        level = [term for term in dict.fromkeys(level) if term not in visited and (among is None or term in among)]
        visited.update(level)
    return ""
