"""Distillation: the loss of a student beside its teacher."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, log_softmax, softmax

from pycompress import Distillation, Int8, compress, prepare
from pycompress.model import compressed_layers


class Output(NamedTuple):
    logits: Tensor
    loss: Tensor | None = None


class Model(nn.Module):
    """Blocks over [batch, length, width], and logits of the mean."""

    def __init__(self, blocks: int, width: int) -> None:
        super().__init__()
        self.into = nn.Linear(8, width)
        self.blocks = nn.ModuleList([nn.Linear(width, width) for _ in range(blocks)])
        self.head = nn.Linear(width, 5)
        self.calls = 0

    def forward(self, x: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None) -> Output:
        self.calls += 1
        x = self.into(x)
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        logits = self.head(x.mean(1))
        return Output(logits, None if labels is None else cross_entropy(logits, labels))


class Encoder(Model):
    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:  # type: ignore[override]
        x = self.into(x)
        for block in self.blocks:
            x = block(x)
        return x


def test_logits_are_the_formula() -> None:
    teacher, student, x = Model(2, 6), Model(2, 6), torch.randn(4, 3, 8)
    distill = Distillation(teacher, student, logits=0.3, temperature=2.0)
    labels = torch.randint(5, (4,))
    result = student(x, labels=labels)
    loss = distill(result, result.loss)
    own, other = (softmax(model(x).logits.double() / 2, -1) for model in (student, teacher))
    divergence = (other * (other.log() - own.log())).sum(-1).mean()
    assert result.loss is not None
    assert float(loss) == pytest.approx(0.3 * float(result.loss) + 0.7 * 4 * float(divergence), rel=1e-5)
    assert float(distill(student(x))) == pytest.approx(4 * float(divergence), rel=1e-5), "without a loss"


def test_hidden_states_are_paired_evenly_and_projected() -> None:
    teacher, student, x = Model(4, 12), Model(2, 6), torch.randn(4, 3, 8)
    distill = Distillation(teacher, student, hidden="blocks.*")
    with pytest.raises(ValueError, match=r"blocks\.0 gives 6 features, blocks\.1 12: expected example_inputs"):
        distill(student(x))
    distill = Distillation(teacher, student, hidden="blocks.*", weights={"hidden": 0.5}, example_inputs=x)
    assert [(pair.student, pair.teacher) for pair in distill.hidden] == [
        ("blocks.0", "blocks.1"),
        ("blocks.1", "blocks.3"),
    ]
    assert {tuple(p.shape) for p in distill.parameters()} == {(12, 6)}
    loss = distill(student(x))
    loss.backward()
    grads = [student.blocks[1].weight.grad, *(p.grad for p in distill.parameters())]
    assert all(grad is not None and bool(grad.any()) for grad in grads)
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    kept: dict[str, Tensor] = {}
    for name, model in (("ours", student), ("theirs", teacher)):
        y = model.into(x)
        for i, block in enumerate(model.blocks):
            kept[f"{name}{i}"] = block(y)
            y = y + torch.tanh(block(y))
    errors = []
    for i, j in ((0, 1), (1, 3)):
        projected = distill.projections[f"blocks/{i}"](kept[f"ours{i}"])
        errors.append((projected - kept[f"theirs{j}"]).square().sum() / kept[f"theirs{j}"].square().sum())
    assert float(loss) == pytest.approx(0.25 * float(sum(errors)), rel=1e-5)


def test_relations_leave_padding_out() -> None:
    teacher, student, x = Model(2, 12), Model(2, 6), torch.randn(2, 4, 8)
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    distill = Distillation(teacher, student, relations={"blocks.1": "blocks.0"}, relation_heads=3)
    student(x, attention_mask=mask)
    loss = distill(student(x, attention_mask=mask))
    other = x.clone()
    other[0, 3], other[1, 2:] = 9.0, -9.0
    assert float(distill(student(other, attention_mask=mask))) == pytest.approx(float(loss), rel=1e-5)
    total = 0.0
    for item, length in ((0, 3), (1, 2)):
        y = student.into(x[item : item + 1, :length])
        ours = student.blocks[1](y + torch.tanh(student.blocks[0](y)))[0]
        theirs = teacher.blocks[0](teacher.into(x[item : item + 1, :length]))[0]
        for head in range(3):
            a, b = ours[:, 2 * head : 2 * head + 2], theirs[:, 4 * head : 4 * head + 4]
            p, q = log_softmax(b @ b.T / 2, -1), log_softmax(a @ a.T / 2**0.5, -1)
            total += float((p.exp() * (p - q)).sum())
    assert float(loss) == pytest.approx(total / (5 * 3), rel=1e-4)


@pytest.mark.parametrize("kind", ["cosine", "mse"])
def test_embeddings_are_means_over_the_tokens_that_count(kind: str) -> None:
    teacher, student, x = Encoder(2, 6), Encoder(1, 6), torch.randn(2, 4, 8)
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    loss = Distillation(teacher, student, embedding=kind)(student(x, attention_mask=mask))
    ours, theirs = (
        torch.stack([model(x)[0, :3].mean(0), model(x)[1, :2].mean(0)]) for model in (student, teacher)
    )  # fmt: skip
    cosine = 1 - torch.cosine_similarity(ours, theirs, dim=-1).mean()
    expected = cosine if kind == "cosine" else (ours - theirs).square().mean()
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)


def test_the_teacher_computes_a_batch_once_where_it_is_cached(tmp_path: Any) -> None:
    teacher, student = Model(2, 6), Model(2, 6)
    distill = Distillation(teacher, student, logits=0.5, hidden="blocks.*", cache=tmp_path / "taught")
    batches = [torch.randn(4, 3, 8) for _ in range(2)]
    first = [float(distill(student(x))) for x in batches]
    assert [float(distill(student(x))) for x in batches] == first and teacher.calls == 2
    assert len(list((tmp_path / "taught").iterdir())) == 2


def test_it_is_no_part_of_the_student_and_can_be_closed() -> None:
    teacher, student, x = Model(2, 6), Model(2, 6), torch.randn(4, 3, 8)
    keys = list(student.state_dict())
    distill = Distillation(teacher.train(), student, logits=0.5, relations="blocks.1", relation_heads=2)
    assert teacher not in list(distill.modules()) and student not in list(distill.modules())
    student(x)
    assert list(student.state_dict()) == keys and not student.blocks[1]._forward_hooks and not teacher.training
    distill.close()
    assert not student._forward_hooks and not student._forward_pre_hooks
    with pytest.raises(RuntimeError, match="was not called"):
        [distill(student(x)) for _ in range(2)]


def test_a_prepared_student_learns() -> None:
    torch.manual_seed(0)
    teacher, student = Model(2, 12), Model(2, 12)
    training = prepare(student, {"blocks.*": Int8()}, steps=60)
    distill = Distillation(teacher, student, logits=0.5, hidden="blocks.*")
    optimizer = torch.optim.AdamW([*student.parameters(), *distill.parameters()], 1e-2)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = distill(student(torch.randn(16, 3, 8)))
        loss.backward()
        losses.append(float(loss))
        optimizer.step()
        training.step()
    assert losses[-1] < 0.3 * losses[0]
    distill.close()
    assert len(compressed_layers(compress(student.eval()))) == 2


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({}, "nothing is asked for"),
        ({"logits": 2}, "logits is 2"),
        ({"logits": 0.5, "temperature": 0}, "temperature is 0"),
        ({"embedding": "dot"}, "embedding is 'dot'"),
        ({"hidden": "nowhere.*"}, r"'nowhere\.\*' matches no module"),
        ({"logits": 0.5, "weights": {"luck": 1}}, "weights has 'luck'"),
        ({"relations": "blocks.*", "relation_heads": 0}, "relation_heads is 0"),
        ({"hidden": {"blocks.*": "blocks.0"}}, r"matches 2 modules of the student and 'blocks\.0' 1"),
    ],
)
def test_bad_arguments_are_named(options: Any, text: str) -> None:
    with pytest.raises((TypeError, ValueError), match=text):
        Distillation(Model(2, 6), Model(2, 6), **options)


def test_models_without_logits_are_named() -> None:
    student = Model(1, 6)
    student.forward = lambda x: (x,)  # type: ignore[assignment, method-assign]
    distill, result = Distillation(Model(1, 6), student, logits=0.5), student(torch.randn(2, 3, 8))
    with pytest.raises(ValueError, match="expected one with logits"):
        distill(result)
