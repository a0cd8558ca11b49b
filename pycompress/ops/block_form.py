"""``BlockForm``: all that is known of a transformer block before it runs, as a static string and back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from pycompress.ops.checks import ACTIVATIONS
from pycompress.ops.form import Form, parse

PRODUCTS = ("query", "key", "value", "output", "up", "gate", "down")
NORMS = ("attention_norm", "mlp_norm")
BEHIND = " | "  # stands before each product's form


@dataclass(frozen=True)
class BlockForm:
    """What a block is besides its tensors.

    Attributes:
        heads, head_size, scale: of attention; scores are ``scale q k^T``.
        pre_norm: whether norms stand in front of attention and MLP, or behind their sums.
        norm: ``layer_norm`` or ``rms_norm``.
        eps: of the norm at the attention, and of the one at the MLP.
        activation: one of ``ops.ACTIVATIONS``, behind ``up`` or, where there is one, ``gate``.
        causal: whether a query sees no key behind it.
        skip_padding: whether rows that the mask hides as keys are left out: the result is 0 there.
        products: of each of :data:`PRODUCTS` the form of its packed weight behind its weight's name (``int8 dot4 n=8 k=8 ...``),
            ``dense n=... k=...``, or '' where there is none.
    """

    heads: int
    head_size: int
    scale: float
    pre_norm: bool
    norm: str
    eps: tuple[float, float]
    activation: str
    causal: bool
    products: tuple[str, ...] = ("",) * len(PRODUCTS)
    skip_padding: bool = False

    @property
    def head(self) -> str:
        """The string without the products."""
        sizes = f"heads={self.heads} head_size={self.head_size} scale={self.scale!r} pre_norm={int(self.pre_norm)}"
        eps = ",".join(map(repr, self.eps))
        skip = " skip_padding=1" if self.skip_padding else ""
        return f"{sizes} norm={self.norm} eps={eps} activation={self.activation} causal={int(self.causal)}{skip}"

    def __str__(self) -> str:
        return BEHIND.join((self.head, *self.products))

    def parsed(self) -> Iterator[tuple[str, str, Form]]:
        """(product, its weight's name, the form of that) for each product that there is."""
        for product, form in zip(PRODUCTS, self.products, strict=True):
            if form:
                name, _, own = form.partition(" ")
                yield product, name, parse(form if name == "dense" else own)

    def misfit(self) -> str:
        """What does not fit together, or ''."""
        forms = {product: form for product, _, form in self.parsed()}
        if missing := [product for product in PRODUCTS if product not in forms and product != "gate"]:
            return f"there is no {missing[0]}, expected all of {', '.join(PRODUCTS)} but gate"
        if self.norm not in ("layer_norm", "rms_norm"):
            return f"norm is {self.norm!r}, expected layer_norm or rms_norm"
        if self.activation not in ACTIVATIONS:
            return f"activation is {self.activation!r}, expected one of {', '.join(ACTIVATIONS)}"
        d, inner, wide = forms["query"].k, self.heads * self.head_size, forms["up"].n
        expected = {"query": (inner, d), "key": (inner, d), "value": (inner, d), "output": (d, inner)}
        expected |= {"up": (wide, d), "gate": (wide, d), "down": (d, wide)}
        for product, form in forms.items():
            if (form.n, form.k) != expected[product]:
                return f"{product} is {[form.n, form.k]}, expected {list(expected[product])}"
        return ""


@lru_cache(maxsize=1 << 12)
def parse_block(form: str) -> BlockForm:
    """The inverse of ``str``. Raises ValueError where the string is no form of a block, or parts of it do not fit together."""
    head, *products = form.split(BEHIND)
    try:
        keys = dict(pair.split("=") for pair in head.split(" "))
        first, second = keys["eps"].split(",")
        parsed = BlockForm(
            int(keys["heads"]), int(keys["head_size"]), float(keys["scale"]), bool(int(keys["pre_norm"])), keys["norm"],
            (float(first), float(second)), keys["activation"], bool(int(keys["causal"])), tuple(products),
            bool(int(keys.get("skip_padding", "0"))),
        )  # fmt: skip
    except (KeyError, ValueError):
        parsed = None
    if parsed is None or len(products) != len(PRODUCTS) or str(parsed) != form:
        raise ValueError(f"block: the form is {form!r}, expected str of a BlockForm")
    if reason := parsed.misfit():
        raise ValueError(f"block: {reason}, in the form {form!r}")
    return parsed
