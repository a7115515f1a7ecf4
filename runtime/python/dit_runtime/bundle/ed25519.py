"""Ed25519 of RFC 8032 in plain integers. It is not in constant time, so only signatures of public data are its work.

`verify` has the strict rule of libsodium: S is below L, the key and R are the one encoding of points whose order is not
small, and [S]B = R + [k]A holds without a factor of 8. So nobody can change a signature into another one that is valid.
"""

from __future__ import annotations

Point = tuple[int, int, int, int]  # X, Y, Z, T with x = X / Z, y = Y / Z and x y = T / Z

P = 2**255 - 19  # of the field
L = 2**252 + 27742317777372353535851937790883648493  # the order of BASE
D = -121665 * pow(121666, -1, P) % P  # of the curve -x² + y² = 1 + D x² y²
ROOT = pow(2, (P - 1) // 4, P)  # of -1
ZERO: Point = (0, 1, 1, 0)
KEY, SIGNATURE = 32, 64  # bytes


def verify(key: bytes, message: bytes, signature: bytes) -> bool:
    """Return whether this is a signature of the message by the owner of the public key."""
    if len(key) != KEY or len(signature) != SIGNATURE:
        return False
    r, s = signature[:KEY], int.from_bytes(signature[KEY:], "little")
    point = decode(key)
    if point is None or is_small(point) or s >= L:
        return False
    x, y, z, t = multiply(hash_number(r, key, message), point)
    end = add(multiply(s, BASE), (-x % P, y, z, -t % P))
    return encode(end) == r and not is_small(end)


def hash_number(*parts: bytes) -> int:
    """Return SHA-512 of the parts, modulo L."""
    from hashlib import sha512  # here, so that importing the runtime stays quick

    return int.from_bytes(sha512(b"".join(parts)).digest(), "little") % L


def add(first: Point, second: Point) -> Point:
    """Return the sum; the formula holds for any two points of the curve, equal ones among them."""
    (x1, y1, z1, t1), (x2, y2, z2, t2) = first, second
    a, b = (y1 - x1) * (y2 - x2) % P, (y1 + x1) * (y2 + x2) % P
    c, d = 2 * D * t1 * t2 % P, 2 * z1 * z2 % P
    e, f, g, h = b - a, d - c, d + c, b + a
    return e * f % P, g * h % P, f * g % P, e * h % P


def multiply(scalar: int, point: Point) -> Point:
    total = ZERO
    for bit in f"{scalar:b}":
        total = add(total, total)
        if bit == "1":
            total = add(total, point)
    return total


def is_small(point: Point) -> bool:
    """Return whether the point's order divides 8: a key or R of such an order signs what nobody signed."""
    x, y, z, _ = multiply(8, point)
    return x == 0 and y == z


def encode(point: Point) -> bytes:
    x, y, z, _ = point
    inverse = pow(z, -1, P)
    return (y * inverse % P | (x * inverse % P & 1) << 255).to_bytes(KEY, "little")


def decode(data: bytes) -> Point | None:
    """Return the point of an encoding; None where there is none, or where the point has another encoding."""
    number = int.from_bytes(data, "little")
    y, sign = number % 2**255, number >> 255
    square = (y * y - 1) * pow(D * y * y + 1, -1, P) % P  # x²; -1 / D is no square, so the divisor is not 0
    x = pow(square, (P + 3) // 8, P)
    if x * x % P != square:
        x = x * ROOT % P
    if x * x % P != square or y >= P or (x == 0 and sign):
        return None
    x = x if x % 2 == sign else P - x
    return x, y, 1, x * y % P


_Y = 4 * pow(5, -1, P) % P
BASE = decode(_Y.to_bytes(KEY, "little")) or ZERO
