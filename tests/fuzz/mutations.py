"""Seeded damage to files: bytes, JSON, headers of tensors, and what stands in a file's place."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

Mutation = Callable[[Path, random.Random], None]

LEAVES: tuple[Any, ...] = (
    None, True, False, 0, -1, -5, 1, 2**31, 2**63, -(2**63) - 1, 10**30, 0.5, 1e308, -0.0, "", "x", [], {}, [[]], "1",
    {"": 1},
    "../../etc/passwd", "/etc/passwd", "a" * 300, "\x1b[31m", "\u202e", "\x00", "<script>", "[/x]", "name\nname",
    "ü" * 200, [1] * 1000, {"a": {"b": {"c": []}}}, "true", "nan",
)  # fmt: skip
"""Values that take the place of others."""
RAW = (
    "NaN", "Infinity", "-Infinity", "1e999", "9" * 5000, "-" + "9" * 5000, '"\\ud800"', '"\\udfff x"', "[" * 5000,
    "[" * 5000 + "]" * 5000, '{"a":' * 3000 + "1" + "}" * 3000, "[" * 150 + "]" * 150, '"' + "x" * 100_000 + '"',
    "1.5.2", "'a'", "undefined", "0x10", '{"a":1,"a":2}', "\ufeff1", '"\\u0000"', "01", "[1,]",
)  # fmt: skip
"""Texts that JSON knows not, or knows too well."""
MARK = "@mark@"
DTYPES = (
    "F8_E4M3",
    "F8_E5M2",
    "C64",
    "F64",
    "F32",
    "F16",
    "BF16",
    "I64",
    "I8",
    "U8",
    "BOOL",
    "U16",
    "F4",
    "",
    "f32",
    5,
)


# Bytes ---------------------------------------------------------------------------------------------------------------


def flip(path: Path, rng: random.Random) -> None:
    """Change some bits."""
    content = bytearray(path.read_bytes())
    for _ in range(rng.choice((1, 1, 2, 8, 64))):
        if content:
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def flip_early(path: Path, rng: random.Random) -> None:
    """Change a byte of the first ones, where formats say what they are."""
    content = bytearray(path.read_bytes())
    if content:
        content[rng.randrange(min(len(content), 64))] = rng.randrange(256)
    path.write_bytes(content)


def truncate(path: Path, rng: random.Random) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: rng.randrange(len(content) + 1)])


def cut_out(path: Path, rng: random.Random) -> None:
    content = path.read_bytes()
    first, last = sorted(rng.randrange(len(content) + 1) for _ in range(2))
    path.write_bytes(content[:first] + content[last:])


def repeat(path: Path, rng: random.Random) -> None:
    content = path.read_bytes()
    first, last = sorted(rng.randrange(len(content) + 1) for _ in range(2))
    path.write_bytes(content[:last] + content[first:last] * rng.choice((1, 3)) + content[last:])


def noise(path: Path, rng: random.Random) -> None:
    path.write_bytes(rng.randbytes(rng.choice((0, 1, 7, 8, 9, 100, 10_000))))


def append(path: Path, rng: random.Random) -> None:
    with path.open("ab") as file:
        file.write(rng.choice((b"\0", b"x" * 1000, b"\n{}", b"\xff\xfe")))


# What stands in its place --------------------------------------------------------------------------------------------


def delete(path: Path, rng: random.Random) -> None:
    path.unlink()


def fifo(path: Path, rng: random.Random) -> None:
    path.unlink()
    os.mkfifo(path)


def folder(path: Path, rng: random.Random) -> None:
    path.unlink()
    path.mkdir()


def link(path: Path, rng: random.Random) -> None:
    """A link to nowhere, to itself, to a device, to a system's file or to a folder."""
    path.unlink()
    path.symlink_to(
        rng.choice(("gone", path.name, "/dev/zero", "/dev/null", "/etc/passwd", "/proc/self/mem", ".", ".."))
    )


def sparse(path: Path, rng: random.Random) -> None:
    """Very large, at no cost."""
    os.truncate(path, rng.choice((4 * 2**30, 200 * 2**30)))


# JSON ----------------------------------------------------------------------------------------------------------------


def places(data: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where every value stands, containers too."""
    below = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    return [path, *(place for key, value in below for place in places(value, (*path, key)))]


def parent(data: Any, place: tuple[Any, ...]) -> Any:
    for key in place[:-1]:
        data = data[key]
    return data


def mutate_json(text: str, rng: random.Random) -> str:
    """One value, key or text of a JSON document changed."""
    data = json.loads(text)
    place = rng.choice(places(data))
    action = rng.choice(("swap", "swap", "swap", "raw", "drop", "add", "rename", "twice"))
    value: Any = MARK if action == "raw" else rng.choice(LEAVES)
    if not place:
        data = value if action in ("swap", "raw") else data
    elif action in ("swap", "raw"):
        parent(data, place)[place[-1]] = value
    elif action == "drop":
        del parent(data, place)[place[-1]]
    elif isinstance(owner := parent(data, place), dict):
        if action == "add":
            owner[rng.choice(("surprise", "", "__class__", "../x", "a" * 400, "\x1b"))] = value
        elif action == "rename":
            owner[rng.choice(("other", "", "a/b", "x" * 600, "\u202e", str(place[-1]).upper()))] = owner.pop(place[-1])
        else:
            return json.dumps(data).replace("{", '{"twice": 1, "twice": 2, ', 1)
    return json.dumps(data).replace(json.dumps(MARK), rng.choice(RAW))


def json_file(path: Path, rng: random.Random) -> None:
    path.write_text(mutate_json(path.read_text(), rng))


def json_whole(path: Path, rng: random.Random) -> None:
    path.write_text(rng.choice(RAW))


def json_encoding(path: Path, rng: random.Random) -> None:
    path.write_bytes(path.read_text().encode(rng.choice(("utf-16", "utf-32", "utf-8-sig"))))


def json_line(path: Path, rng: random.Random) -> None:
    """One line of several."""
    lines = path.read_text().splitlines()
    place = rng.randrange(len(lines))
    lines[place] = mutate_json(lines[place], rng)
    path.write_text("\n".join(lines) + "\n")


def line_twice(path: Path, rng: random.Random) -> None:
    """One line again, as it is or changed."""
    lines = path.read_text().splitlines()
    line = rng.choice(lines)
    lines.insert(rng.randrange(len(lines) + 1), line if rng.random() < 0.3 else mutate_json(line, rng))
    path.write_text("\n".join(lines) + rng.choice(("\n", "")))


# Pictures ------------------------------------------------------------------------------------------------------------


def png_header(path: Path, rng: random.Random) -> None:
    """Another size, depth or kind of colour in the header of a PNG, whose checksum is right."""
    content = bytearray(path.read_bytes())
    what = rng.choice(("size", "size", "depth", "colour"))
    if what == "size":
        sides = (rng.choice((0, 1, 64, 7_000, 9_000, 60_000, 2**31 - 1, 2**32 - 1)) for _ in range(2))
        content[16:24] = b"".join(side.to_bytes(4, "big") for side in sides)
    elif what == "depth":
        content[24] = rng.choice((0, 1, 2, 4, 8, 16, 32))
    else:
        content[25] = rng.randrange(8)
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    path.write_bytes(content)


def png_chunk(path: Path, rng: random.Random) -> None:
    """A chunk behind the header: animation, transparency, a profile, or a text that is large once unpacked."""
    content = path.read_bytes()
    kind, data = rng.choice((
        (b"acTL", bytes(8)), (b"acTL", b"\xff" * 8), (b"tRNS", bytes(6)), (b"tRNS", b"x"), (b"PLTE", b"x" * 768),
        (b"zTXt", b"a\0\0" + zlib.compress(bytes(2**26))), (b"iCCP", b"a\0\0" + zlib.compress(bytes(2**26))),
        (b"tEXt", b"a\0" + b"x" * 1000), (b"IDAT", zlib.compress(bytes(2**20))), (b"IEND", b""),
    ))  # fmt: skip
    chunk = len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")
    path.write_bytes(content[:33] + chunk + content[33:])


# Tensors -------------------------------------------------------------------------------------------------------------


def mutate_header(path: Path, rng: random.Random, change: Callable[[dict[str, Any]], Any]) -> None:
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    change(header)
    new = json.dumps(header).encode()
    path.write_bytes(len(new).to_bytes(8, "little") + new + content[8 + length :])


def header_json(path: Path, rng: random.Random) -> None:
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    new = mutate_json(content[8 : 8 + length].decode(), rng).encode("utf-8", "replace")
    path.write_bytes(len(new).to_bytes(8, "little") + new + content[8 + length :])


def header_entry(path: Path, rng: random.Random) -> None:
    """Another type, shape, place or name of one tensor."""

    def change(header: dict[str, Any]) -> None:
        name = rng.choice(sorted(key for key in header if key != "__metadata__"))
        entry = header[name]
        what = rng.choice(("dtype", "shape", "data_offsets", "name", "transposed", "flat"))
        if what == "dtype":
            entry["dtype"] = rng.choice(DTYPES)
        elif what == "shape":
            entry["shape"] = rng.choice(
                ([40_000, 30_000], [2**40, 2**40], [-1], [0], [], [1] * 100, [2**62, 4], ["3"])
            )
        elif what == "data_offsets":
            entry["data_offsets"] = rng.choice(([0, 2**60], [5, 2], [0], [-4, 4], [2**70, 2**71], "x", [0, 0]))
        elif what == "transposed":
            entry["shape"] = entry["shape"][::-1]
        elif what == "flat":
            entry["shape"] = [*entry["shape"], 1]
        else:
            names = (
                "",
                "x",
                "safety_checker/vision.weight",
                "vae/a.b",
                "unet/../x",
                "unet/a\u202e",
                "n" * 5000,
                "a/b/c.d",
            )
            header[rng.choice(names)] = header.pop(name)

    mutate_header(path, rng, change)


def header_length(path: Path, rng: random.Random) -> None:
    content = path.read_bytes()
    length = rng.choice((0, 1, 2**20, 2**40, 2**63, 2**64 - 1, len(content), len(content) - 8))
    path.write_bytes(length.to_bytes(8, "little") + content[8:])


def many_tensors(path: Path, rng: random.Random) -> None:
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    mutate_header(path, rng, lambda header: header.update({f"unet/a{i}.weight": entry for i in range(60_000)}))


def values(path: Path, rng: random.Random) -> None:
    """All values of all tensors the same: zero, NaN, or huge."""
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    path.write_bytes(content[:start] + rng.choice((b"\0", b"\xff", b"\x7f")) * (len(content) - start))


# Archives ------------------------------------------------------------------------------------------------------------


def archive(path: Path, rng: random.Random) -> None:
    """One entry of a torch archive compressed, shortened, lost or damaged, the rest as it was."""
    old = io.BytesIO(path.read_bytes())
    with zipfile.ZipFile(old) as source, zipfile.ZipFile(path, "w") as target:
        chosen = rng.choice(source.namelist())
        action = rng.choice(("compress", "shorten", "lose", "flip", "flip"))
        for name in source.namelist():
            content, method = bytearray(source.read(name)), zipfile.ZIP_STORED
            if name == chosen and action == "lose":
                continue
            if name == chosen and action == "compress":
                method = zipfile.ZIP_DEFLATED
            elif name == chosen and action == "shorten":
                content = content[: len(content) // 2]
            elif name == chosen and content:
                content[rng.randrange(len(content))] = rng.randrange(256)
            with contextlib.suppress(ValueError):
                target.writestr(name, bytes(content), method)


def checkpoint(path: Path, rng: random.Random) -> None:
    """A training's state with one value of another kind."""
    import torch

    state = torch.load(path, weights_only=True)
    strange = (
        -5, 10**9, float("nan"), float("inf"), None, "x", [], {}, torch.ones(2, 2), torch.full((2,), torch.nan), True,
        torch.ones(3).to_sparse(), torch.zeros(1).expand(10**9), torch.ones(2, dtype=torch.complex64),
    )  # fmt: skip
    place = rng.choice([place for place in places(state) if place])
    owner = parent(state, place)
    if rng.random() < 0.2 and isinstance(owner, dict):
        del owner[place[-1]]
    else:
        owner[place[-1]] = rng.choice(strange)
    torch.save(state, path)


BYTES: tuple[Mutation, ...] = (flip, flip, flip_early, truncate, cut_out, repeat, noise, append)
PLACES: tuple[Mutation, ...] = (delete, fifo, folder, link, sparse)
BY_SUFFIX: dict[str, tuple[Mutation, ...]] = {
    ".json": (json_file,) * 12 + (json_whole, json_encoding),
    ".safetensors": (
        header_json,
        header_json,
        header_entry,
        header_entry,
        header_entry,
        header_length,
        many_tensors,
        values,
    ),
    ".jsonl": (json_line,) * 10 + (line_twice,) * 3 + (json_whole, json_encoding),
    ".png": (png_header, png_header, png_chunk),
    ".ckpt": (checkpoint,) * 8 + (archive,) * 4,
    ".pth": (checkpoint,) * 6 + (archive,) * 6,
}


def mutate(path: Path, rng: random.Random) -> str:
    """Damage a file in a way of its kind; gives the name of the way."""
    own = BY_SUFFIX.get(path.suffix, ())
    group = rng.choice((BYTES, PLACES, own, own, own)) if own else rng.choice((BYTES, BYTES, PLACES))
    chosen = rng.choice(group)
    chosen(path, rng)
    return chosen.__name__
