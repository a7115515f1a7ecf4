"""Hostile files: links, pipes and sizes, graphs that are damaged or read what is not theirs, and odd networks."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from tests.hostile import Damage
from tests.hostile.manifests import ESCAPE, FORGED, setting
from tests.tamper import edit, seal

GRAPH = "denoiser.onnx"
WEIGHTS = f"{GRAPH}.data"
Apply = Callable[[Path], object]


def sealed(change: Apply) -> Apply:
    """The damage, with every size and sum made right again."""

    def apply(folder: Path) -> None:
        change(folder)
        seal(folder)

    return apply


def linked(name: str, target: str) -> Apply:
    def apply(folder: Path) -> None:
        moved = (folder / name).rename(folder.parent / "moved")
        (folder / name).symlink_to({"outside": moved, "itself": folder / name}.get(target, Path(target)))

    return apply


def pipe(name: str) -> Apply:
    def apply(folder: Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return apply


def folder_at(name: str) -> Apply:
    def apply(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()

    return apply


def linked_folder(folder: Path) -> None:
    shutil.copytree(folder, folder.parent / "elsewhere")
    (folder / "sub").symlink_to(folder.parent / "elsewhere")

    def change(table: dict) -> None:
        table["stages"][1]["onnx"] = f"sub/{GRAPH}"
        table["files"] |= {f"sub/{name}": table["files"][name] for name in (GRAPH, WEIGHTS)}

    edit(folder, change)


def sparse(name: str, size: int) -> Apply:
    def apply(folder: Path) -> None:
        os.truncate(folder / name, size)
        edit(folder, lambda table: table["files"][name].update(size=size))

    return apply


def files() -> Iterator[Damage]:
    names = (GRAPH, WEIGHTS, "conditioner.onnx", "decoder.onnx", "reference.npz")
    for name in (*names, "manifest.json"):
        yield Damage(f"files: {name} is a link", linked(name, "outside"))
        yield Damage(f"files: {name} is a link to itself", linked(name, "itself"))
        yield Damage(f"files: {name} is a link to /dev/zero", linked(name, "/dev/zero"))
        yield Damage(f"files: {name} is a pipe", pipe(name))
        yield Damage(f"files: {name} is a folder", folder_at(name))
        yield Damage(f"files: {name} is missing", lambda folder, name=name: (folder / name).unlink())
    for name in names:
        yield Damage(f"files: {name} is empty", lambda folder, name=name: (folder / name).write_bytes(b""))
        yield Damage(f"files: {name} is longer", lambda folder, name=name: (folder / name).open("ab").write(b"\0"))
        yield Damage(f"files: {name} of 1 TB", sparse(name, 1 << 40))
        verdict = {"reference.npz": "verify", "decoder.onnx": "decoder"}.get(name, "open")
        yield Damage(f"files: a byte of {name}", flipped(name), verdict)
    yield Damage("files: a folder is a link", linked_folder)
    yield Damage("files: the bundle is a file", lambda folder: (shutil.rmtree(folder), folder.write_text("hello")))
    yield Damage("files: the bundle is not there", shutil.rmtree)
    yield Damage("files: a reference of 600 MB", sparse("reference.npz", 600_000_000), "verify")


def flipped(name: str) -> Apply:
    def apply(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        content[len(content) // 2] ^= 1
        (folder / name).write_bytes(content)

    return apply


def redrawn(change: Callable[[onnx.ModelProto], object], name: str = GRAPH) -> Apply:
    """The graph after a change, with the right sums."""

    def apply(folder: Path) -> None:
        model = onnx.load(folder / name, load_external_data=False)
        change(model)
        (folder / name).write_bytes(model.SerializeToString())

    return sealed(apply)


def entry(key: str, value: str) -> Callable[[onnx.ModelProto], None]:
    """An entry of the weights' external data."""

    def change(model: onnx.ModelProto) -> None:
        for weight in model.graph.initializer:
            for pair in weight.external_data:
                if pair.key == key:
                    pair.value = value

    return change


def hidden_location(where: str) -> Callable[[onnx.ModelProto], None]:
    """Weights outside in a place where few readers look."""

    def change(model: onnx.ModelProto) -> None:
        tensor = TensorProto(name="x", data_type=TensorProto.FLOAT, dims=[1], data_location=TensorProto.EXTERNAL)
        tensor.external_data.add(key="location", value="../outside.data")
        if where == "constant":
            model.graph.node.insert(0, helper.make_node("Constant", [], ["hidden"], value=tensor))
        elif where == "subgraph":
            inner = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", [], [], [tensor])
            model.graph.node.insert(0, helper.make_node("If", ["c"], ["hidden"], then_branch=inner, else_branch=inner))
        elif where == "function":
            node = helper.make_node("Constant", [], ["y"], value=tensor)
            model.functions.append(helper.make_function("d", "f", [], ["y"], [node], [helper.make_opsetid("", 21)]))
        else:
            model.graph.sparse_initializer.add(values=tensor, indices=tensor, dims=[1])

    return change


def addressed(folder: Path) -> None:
    """Weights at a number in the engine's memory, which is how engines read this location; a file of it is listed."""
    place = "*/_ORT_MEM_ADDR_/*"
    (folder / place).parent.mkdir(parents=True)
    shutil.copy(folder / WEIGHTS, folder / place)

    def change(table: dict) -> None:
        table["files"][place] = table["files"][WEIGHTS]
        table["stages"][1]["shared"] = [place]

    edit(folder, change)
    redrawn(entry("location", place))(folder)


def external() -> Iterator[Damage]:
    locations = (
        "../outside.data",
        "/etc/passwd",
        "ABSOLUTE",
        "/dev/zero",
        "/proc/self/environ",
        "other.data",
        "",
        ".",
        "..",
    )
    for location in (
        *locations,
        "manifest.json",
        "reference.npz",
        "conditioner.onnx.data",
        f"./{WEIGHTS}x",
        ESCAPE,
        FORGED,
    ):

        def apply(folder: Path, location: str = location) -> None:
            shutil.copy(folder / WEIGHTS, folder.parent / "outside.data")
            shutil.copy(folder / WEIGHTS, folder / "other.data")
            place = str(folder.parent / "outside.data") if location == "ABSOLUTE" else location
            redrawn(entry("location", place))(folder)

        yield Damage(f"external: weights at {location!r}", apply, "open")
    yield Damage("external: weights at an address", addressed, "open")
    for where in ("constant", "subgraph", "function", "sparse"):
        yield Damage(f"external: a {where} of weights outside", redrawn(hidden_location(where)), "open")
    for key, values in {
        "offset": ("-1", "4096", str(1 << 62), str(1 << 64), "x", "1e3", "9" * 400),
        "length": ("0", "-1", "4", str(1 << 40), str(1 << 63), "x", "9" * 400),
    }.items():
        for value in values:
            yield Damage(f"external: {key} {value[:20]}", redrawn(entry(key, value)), "survives")


def mutated(seed: int, name: str = GRAPH) -> Apply:
    """Some bytes of a graph are others, and the sums right."""

    def apply(folder: Path) -> None:
        source = random.Random(seed)
        content = bytearray((folder / name).read_bytes())
        for _ in range(source.choice((1, 2, 8, 64))):
            content[source.randrange(len(content))] = source.randrange(256)
        (folder / name).write_bytes(content)

    return sealed(apply)


def written(content: bytes, name: str = GRAPH) -> Apply:
    return sealed(lambda folder: (folder / name).write_bytes(content))


def cut(share: float, name: str) -> Apply:
    def apply(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(share * len(content))])

    return sealed(apply)


def with_node(*words: object, name: str = GRAPH, before: str = "prediction", **attributes: object) -> Apply:
    """A node of this type and these further inputs works on the output before it leaves."""
    kind, *constants = words

    def change(model: onnx.ModelProto) -> None:
        for node in model.graph.node:
            node.output[:] = ["inner" if output == before else output for output in node.output]
        inputs = ["inner"]
        for number, constant in enumerate(constants):
            model.graph.initializer.append(numpy_helper.from_array(np.array(constant), f"extra{number}"))
            inputs.append(f"extra{number}")
        domain = attributes.pop("domain", "")
        model.graph.node.append(helper.make_node(str(kind), inputs, [before], domain=domain, **attributes))

    return redrawn(change, name)


def renamed(model: onnx.ModelProto, name: str = ESCAPE) -> None:
    for node in model.graph.node:
        node.name = name
    model.graph.node[0].op_type = name


def graphs() -> Iterator[Damage]:
    contents = {
        "nothing": b"",
        "text": b"not a graph\nat all",
        "escapes": ESCAPE.encode() + b"\n" + FORGED.encode(),
        "zeros": bytes(4096),
        "ones": b"\xff" * 4096,
        "an endless number": b"\x80" * 4096,
        "a long message": b"\x3a\xff\xff\xff\xff\x0f",
        "messages in each other": _nested(2000),
        "a model without a graph": onnx.ModelProto(ir_version=10).SerializeToString(),
        "a pickle": b"\x80\x04\x95\x00\x00\x00\x00",
        "a zip": b"PK\x03\x04" + bytes(100),
    }
    for name, content in contents.items():
        yield Damage(f"graphs: {name}", written(content), "open")
    for share in (0.1, 0.5, 0.9, 0.99):
        yield Damage(f"graphs: {share} of it", cut(share, GRAPH), "open")
        yield Damage(f"graphs: {share} of its weights", cut(share, WEIGHTS), "open")
    for seed in range(60):
        yield Damage(f"graphs: random bytes {seed}", mutated(seed), "survives")
    for seed in range(20):
        yield Damage(f"graphs: random bytes of the decoder {seed}", mutated(seed, "decoder.onnx"), "survives")
    yield Damage("graphs: names that a terminal obeys", redrawn(renamed), "open")
    yield Damage("graphs: names of 1 MB", redrawn(lambda model: renamed(model, "a" * 1_000_000)), "open")
    yield Damage("graphs: an op that is not known", with_node("NoSuchOp"), "open")
    yield Damage("graphs: an op of another domain", with_node("NoSuchOp", domain="com.evil"), "open")
    yield Damage("graphs: another output shape", with_node("Unsqueeze", [0]), "survives")
    yield Damage("graphs: a reshape that fails", with_node("Reshape", [7, 11, 13]), "open")
    yield Damage("graphs: a gather out of bounds", with_node("GatherND", [[1 << 40]]), "open")
    yield Damage("graphs: an output of 16 TB", with_node("Expand", [1 << 21, 1 << 21, 1, 1]), "open")
    yield Damage("graphs: a division by nothing", with_node("Div", np.float32(0)), "survives")
    yield Damage(
        "graphs: pictures that are no numbers",
        with_node("Div", np.float32(0), name="decoder.onnx", before="images"),
        "survives",
    )
    yield Damage("graphs: a loop without an end", redrawn(_endless), "survives")
    yield Damage("graphs: a circle", redrawn(_circle), "open")
    yield Damage("graphs: an input of another type", redrawn(_typed), "open")
    yield Damage("graphs: an input too many", redrawn(lambda model: model.graph.input.append(_value("more"))), "open")
    yield Damage("graphs: an output of another name", redrawn(_other_output), "open")
    yield Damage(
        "graphs: an opset of the future", redrawn(lambda model: setattr(model.opset_import[0], "version", 9999)), "open"
    )
    yield Damage("graphs: another stage's graph", setting("stages", 0, "onnx", value="decoder.onnx"), "open")
    yield Damage("graphs: a decoder as the loop", setting("stages", 1, "onnx", value="decoder.onnx"), "open")


def _nested(depth: int) -> bytes:
    content = b""
    for _ in range(depth):  # a graph in an attribute of a node of a graph
        for tag in (b"\x32", b"\x2a", b"\x0a"):
            size, length = len(content), bytearray()
            while True:
                length.append(size & 0x7F | (0x80 if size > 0x7F else 0))
                size >>= 7
                if not size:
                    break
            content = tag + bytes(length) + content
    return b"\x3a" + bytes([0xFF, 0xFF, 0x03]) + content


def _value(name: str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, [1])


def _circle(model: onnx.ModelProto) -> None:
    model.graph.node[0].input[0] = model.graph.node[-1].output[0]


def _typed(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.STRING


def _other_output(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("Identity", [model.graph.output[0].name], ["another"]))
    model.graph.output[0].name = "another"


def _endless(model: onnx.ModelProto) -> None:
    """A loop of 2^62 rounds on the way to the prediction."""
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["on"])],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
        ],
        [helper.make_tensor_value_info("on", TensorProto.BOOL, [])],
    )
    model.graph.initializer.append(numpy_helper.from_array(np.array(0, np.int64), "rounds"))
    model.graph.initializer.append(numpy_helper.from_array(np.array(True), "begin"))
    model.graph.node.insert(0, helper.make_node("Loop", ["rounds", "begin"], [], body=body))


FILES = (*files(), *external(), *graphs())
