"""No allocation of the package follows torch's default dtype or default device: it reads from source that each says both."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "pycompress"
BOTH, DEVICE = {"dtype", "device"}, {"device"}
NEEDED: dict[str, set[str]] = {
    **dict.fromkeys(
        (
            "empty", "empty_strided", "empty_permuted", "zeros", "ones", "full", "arange", "range", "eye", "linspace", "logspace",
            "rand", "randn", "randint", "randperm", "normal", "tensor", "as_tensor", "asarray", "scalar_tensor", "tril_indices",
            "triu_indices", "hann_window", "hamming_window", "blackman_window", "bartlett_window", "kaiser_window", "vander",
            "sparse_coo_tensor", "sparse_csr_tensor", "nested_tensor", "fftfreq", "rfftfreq",
            "Linear", "Conv1d", "Conv2d", "Conv3d", "Embedding", "LayerNorm", "RMSNorm", "BatchNorm2d",
        ),
        BOTH,
    ),
    "Generator": DEVICE,
}  # fmt: skip
NEVER = {
    "Tensor", "FloatTensor", "DoubleTensor", "HalfTensor", "IntTensor", "LongTensor", "set_default_dtype", "set_default_device",
    "set_default_tensor_type",
}  # fmt: skip
OF_TORCH = {"torch", "torch.nn", "nn", "torch.fft", "torch.nested"}


def called(call: ast.Call) -> str | None:
    """The name of the function of torch that is called; None for any other's."""
    module, _, name = ast.unparse(call.func).rpartition(".")
    return name if module in OF_TORCH else None


def faults(source: str) -> Iterator[tuple[int, str]]:
    """(line, what is said of a call that follows a default)."""
    for call in ast.walk(ast.parse(source)):
        if not isinstance(call, ast.Call) or (name := called(call)) is None:
            continue
        if name in NEVER:
            yield call.lineno, f"{name} follows a default, or changes it"
        given = {keyword.arg for keyword in call.keywords}
        missing = NEEDED.get(name, set()) - given
        if missing and None not in given:  # None: **keywords, of which nothing can be read
            yield call.lineno, f"{name} without {' and '.join(f'{one}=' for one in sorted(missing))}"


def test_every_allocation_says_its_dtype_and_device() -> None:
    found = [
        f"{path.relative_to(PACKAGE.parent)}:{line}: {what}"
        for path in sorted(PACKAGE.rglob("*.py"))
        for line, what in faults(path.read_text())
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("source", "what"),
    [
        ("torch.empty(3)", "empty without device= and dtype="),
        ("torch.zeros(3, dtype=torch.float32)", "zeros without device="),
        ("torch.rand(3, generator=torch.Generator())", "Generator without device="),
        ("nn.Linear(3, 4)", "Linear without device= and dtype="),
        ("torch.Tensor([1])", "Tensor follows a default, or changes it"),
        ("torch.empty(3, dtype=torch.uint8, device='cpu')", ""),
        ("x.new_empty(3); torch.empty_like(x); np.empty(3); torch.empty(3, **like)", ""),
    ],
)
def test_the_reader_sees_them(source: str, what: str) -> None:
    assert what in [said for _, said in faults(source)] or (not what and not list(faults(source)))
