"""The library's binary interface as text: `python -m tests.cpp.abi > runtime/cpp/abi.txt`.

Each line is an exported function, a field of a struct with its place, or a value of an enum.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path

CPP = Path(__file__).parents[2] / "runtime/cpp"
LIBRARY = CPP.parents[1] / "build/cpp/libdit.so"
FIELD = re.compile(r"(?:\(\*)?\b(\w+)\)?(?:\[\w+\])?\s*;")


def exported(library: Path) -> list[str]:
    """Return the names that the library exports."""
    table = subprocess.run(["nm", "-D", "--defined-only", library], check=True, capture_output=True, text=True).stdout
    return [f"function {line.split()[-1]}" for line in table.splitlines()]


def declared(headers: Path) -> dict[str, list[str]]:
    """Return the fields of each struct, and the values of each enum, that the C headers define."""
    source = "\n".join(path.read_text() for path in sorted(headers.glob("*.h")))
    source = re.sub(r"/\*.*?\*/", "", source, flags=re.DOTALL)
    definitions = {}
    for kind, body, name in re.findall(r"typedef (struct|enum) \w+ \{(.*?)\} (\w+);", source, re.DOTALL):
        names = FIELD.findall(body) if kind == "struct" else re.findall(r"(\w+) = ", body)
        definitions[f"{kind} {name}"] = names
    return definitions


def layout(headers: Path) -> list[str]:
    """Return the sizes of structs, the places and sizes of fields, and the values of enums, as a compiler has them."""
    lines = []
    for entry, names in declared(headers).items():
        kind, name = entry.split()
        if kind == "enum":
            lines += [f'printf("{name} {value} = %d\\n", (int){value});' for value in names]
            continue
        lines.append(f'printf("{name} has %zu bytes\\n", sizeof({name}));')
        for field in names:
            place, size = f"offsetof({name}, {field})", f"sizeof((({name}*)0)->{field})"
            lines.append(f'printf("{name} .{field} at %zu, %zu bytes\\n", {place}, {size});')
    included = ["dit.h", *sorted(path.name for path in headers.glob("*.h"))]
    includes = "".join(f"#include <dit/{name}>\n" for name in included)
    program = includes + "#include <stdio.h>\nint main(void) {\n" + "\n".join(lines) + "\n}\n"
    with tempfile.TemporaryDirectory() as folder:
        source, binary = Path(folder, "layout.c"), Path(folder, "layout")
        source.write_text(program)
        subprocess.run(["cc", "-std=c11", f"-I{headers.parent}", source, "-o", binary], check=True)
        return subprocess.run([binary], check=True, capture_output=True, text=True).stdout.splitlines()


def describe(library: Path = LIBRARY, headers: Path = CPP / "include/dit") -> list[str]:
    """Return the interface, a line for each part, in order."""
    return sorted(exported(library)) + layout(headers)


if __name__ == "__main__":
    print("\n".join(describe()))
