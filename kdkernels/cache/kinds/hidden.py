"""The last hidden states of the teacher, for its head."""

import json
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ...files import Array
from ...sources import LinearHead, Tail
from ..errors import Malformed
from ..identity import pieces
from ..sections import Column
from . import checks, floats

FP8 = torch.float8_e4m3fn
FP8_LARGEST = 448.0
DTYPES = {  # of a head, as safetensors calls them
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}


class HiddenKind:
    """The teacher's last hidden states, for its head, which lies beside the shards.

    head: SHA-256, hex, of its file: other weights would make other predictions of them.
    """

    name = "hidden"

    def __init__(
        self,
        vocab_size: int,
        dtype: str,
        size: int,
        head: str,
        logit_scale: float = 1.0,
        softcap: float | None = None,
    ) -> None:
        self.vocab_size, self.dtype, self.size, self.head = vocab_size, dtype, size, head
        self.logit_scale, self.softcap = logit_scale, softcap
        self.spec = f"hidden:{dtype}"
        self.columns = floats.columns("hidden", dtype, size)
        if dtype == "fp8":
            self.columns += (Column("scale", "<f4", 4),)

    def describe(self) -> dict[str, Any]:
        return {
            "name": "hidden",
            "dtype": self.dtype,
            "size": self.size,
            "head": self.head,
            "logit_scale": self.logit_scale,
            "softcap": self.softcap,
            "bound": floats.bound("hidden", self.dtype),
        }

    def encode(self, prediction: Tensor | LinearHead, seed: int) -> dict[str, Array]:
        """A `LinearHead` of n rows, or their hidden states (n, H)."""
        checks.one_of(prediction, LinearHead, torch.Tensor)
        hidden = prediction.hidden if isinstance(prediction, LinearHead) else prediction
        floats.check("hidden", hidden, self.size, infinite=False)
        if self.dtype != "fp8":
            return {"hidden": floats.rounded("hidden", hidden, self.dtype)}
        hidden = floats.cast("hidden", hidden, "fp32")
        largest = hidden.abs().amax(-1, keepdim=True)
        # A power of 2, so that it rounds nothing.
        scale = torch.exp2(torch.ceil(torch.log2(largest / FP8_LARGEST)).clamp(-126, 127))
        return {
            "hidden": (hidden / scale).to(FP8).view(torch.uint8).numpy(),
            "scale": scale.numpy(),
        }

    def decode(self, columns: dict[str, Array]) -> dict[str, Tensor]:
        """{column: numbers of n rows} -> {"hidden": (n, H)}, a float tensor"""
        bits = columns["hidden"].reshape(-1, self.size)
        if self.dtype != "fp8":
            return {"hidden": floats.tensor(bits, self.dtype)}
        hidden = torch.from_numpy(_FP8_VALUES[bits])
        return {"hidden": hidden.mul_(torch.from_numpy(columns["scale"].copy())[:, None])}

    def check(self, columns: dict[str, Array], decoded: dict[str, Tensor]) -> None:
        if not decoded["hidden"].isfinite().all():
            raise Malformed("hidden states that are not finite")

    def source(
        self, decoded: dict[str, Tensor], tail: Tail | None = None, head: Any = None
    ) -> LinearHead:
        """head: of the cache, a `LinearHead` whose hidden states these take the place of."""
        return LinearHead(
            decoded["hidden"].to(head.weight.dtype),
            head.weight,
            head.bias,
            self.logit_scale,
            self.softcap,
        )

    padding = {"hidden": 0}


def check_head(size: int, scale: float, softcap: float | None) -> None:
    numbers = {"hidden size": size, "logit_scale": abs(scale)}
    if softcap is not None:
        numbers["softcap"] = softcap
    for name, number in numbers.items():
        if isinstance(number, bool) or not 0 < number < 2**31:
            raise ValueError(f"the head's {name} must be in (0, 2³¹), got {number}")


def head_file(head: LinearHead) -> Iterator[Any]:
    """A `LinearHead` -> the bytes of head.safetensors in pieces: the bias (V,), the weight (V, H).

    The file that safetensors itself writes, which would make another copy of the weight for it.

    Raises:
        TypeError: the weight is not floating point, of 16 bits or more.
    """
    if head.weight.dtype not in DTYPES:
        wanted = ", ".join(str(dtype) for dtype in DTYPES)
        raise TypeError(f"the head's weight must be one of {wanted}, got {head.weight.dtype}")
    tensors = {} if head.bias is None else {"bias": head.bias}
    tensors["weight"] = head.weight
    header, end = {}, 0
    for name, x in tensors.items():
        begin, end = end, end + x.nbytes
        dtype = DTYPES[x.dtype]
        header[name] = {"dtype": dtype, "shape": list(x.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for x in tensors.values():
        yield from pieces(x)


_FP8_VALUES = torch.arange(256).to(torch.uint8).view(FP8).float().numpy()
