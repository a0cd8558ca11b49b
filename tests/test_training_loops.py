"""prepare in other people's loops: the real libraries."""

from __future__ import annotations

import copy
import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from pycompress import Distillation, Int4, Int8, LowRank, Ramp, Sparse, compress, load, prepare, save, validate
from pycompress.nn.trained import canonical

PLAN = {"*.intermediate.*": Sparse(0.25), "*": Int8()}


class Items(Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return 24

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(i)
        ids = torch.randint(5, 40, (7,), generator=generator)
        return {"input_ids": ids, "attention_mask": torch.ones(7, dtype=torch.long), "labels": (ids.sum() % 2)}


def classifier() -> Any:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, num_labels=2,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return BertForSequenceClassification(config)


def trainer(folder: Path, model: Any, training: Any, **options: Any) -> Any:
    from transformers import Trainer, TrainingArguments

    from pycompress.integrations.transformers import TrainingCallback

    arguments = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=4, gradient_accumulation_steps=2, max_steps=9, save_steps=3,
        learning_rate=1e-2, disable_tqdm=True, use_cpu=True, seed=0, logging_steps=100, report_to=[],
    )  # fmt: skip
    return Trainer(model, arguments, train_dataset=Items(), callbacks=[TrainingCallback(training)], **options)


def test_transformers_trainer_steps_saves_and_resumes(tmp_path: Path) -> None:
    whole = classifier()
    training = prepare(whole, PLAN, steps=9, ramp=Ramp(0, 6, every=2))
    trainer(tmp_path / "whole", whole, training).train()
    assert training.done == 9
    again = classifier()
    training = prepare(again, PLAN, steps=9, ramp=Ramp(0, 6, every=2))
    trainer(tmp_path / "whole", again, training).train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    batch = {name: value[None] for name, value in Items()[0].items() if name != "labels"}
    assert training.done == 9
    assert torch.equal(again.eval()(**batch).logits, whole.eval()(**batch).logits)
    frozen = compress(whole)
    assert torch.allclose(frozen(**batch).logits, whole(**batch).logits, atol=1e-4)
    dense = classifier()
    dense.load_state_dict(whole.state_dict())  # as a plain model's
    with pytest.raises(ValueError, match="the Trainer makes 9 steps, the training was prepared for 8"):
        trainer(tmp_path / "other", (other := classifier()), prepare(other, PLAN, steps=8)).train()


def test_transformers_trainer_distils(tmp_path: Path) -> None:
    teacher, student = classifier(), classifier()
    training = prepare(student, PLAN, steps=9)
    distill = Distillation(teacher, student, logits=0.5, temperature=2.0, hidden="bert.encoder.layer.*")
    trainer(tmp_path, student, training, compute_loss_func=distill.trainer_loss).train()
    assert training.done == 9
    distill.close()
    compress(student.eval())


def test_lightning_steps_saves_and_resumes(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning.pytorch")
    from pycompress.integrations.lightning import TrainingCallback

    class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))

        def training_step(self, x: Tensor, _: int) -> Tensor:
            return (self.model(x) - x[:, :4]).square().mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), 1e-2)

        def train_dataloader(self) -> Any:
            x = torch.randn(24, 8, generator=torch.Generator().manual_seed(1))
            return torch.utils.data.DataLoader(x, batch_size=4)  # type: ignore[arg-type]

    def fit(epochs: int, checkpoint: str | None = None) -> tuple[Any, Any, Any]:
        module = Module()
        training = prepare(module.model, {"0": Sparse(0.3), "2": Int8()}, steps=12, ramp=Ramp(0, 8, every=3))
        own = lightning.Trainer(
            max_epochs=epochs, accelerator="cpu", accumulate_grad_batches=2, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, callbacks=[TrainingCallback(training)],
        )  # fmt: skip
        own.fit(module, ckpt_path=checkpoint)
        return module, training, own

    whole, training, _ = fit(4)
    assert training.done == 12
    _, training, own = fit(2)
    assert training.done == 6
    own.save_checkpoint(tmp_path / "half.ckpt", weights_only=False)
    resumed, training, _ = fit(4, str(tmp_path / "half.ckpt"))
    x = torch.randn(3, 8)
    assert training.done == 12
    assert torch.equal(resumed.model.eval()(x), whole.model.eval()(x))


def worker(rank: int, folder: str, selection: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": (Path(folder) / "port").read_text()}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
    ramp = Ramp(0, 15 if selection == "l0" else 8, every=4)
    training = prepare(
        model, {"0": Sparse(0.3), "2": Int4()}, steps=20, ramp=ramp, selection=selection, learn_scales=True
    )
    parallel = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    generator = torch.Generator().manual_seed(rank)
    for _ in range(20):
        x = torch.randn(8, 16, generator=generator)
        optimizer.zero_grad()
        ((parallel(x) - x[:, :4]).square().mean() + training.penalty()).backward()
        optimizer.step()
        training.step()
    torch.save([canonical(model[i]).decompress() for i in (0, 2)], f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def sharded_worker(rank: int, folder: str, selection: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": Path(folder, "port").read_text()}
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
    training = prepare(model, {"0": Sparse(0.3), "2": Int8()}, steps=20, ramp=Ramp(0, 15, every=4), selection=selection)
    mesh = init_device_mesh("cpu", (2,))
    for part in (model[0], model[2], model):
        fully_shard(part, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    generator = torch.Generator().manual_seed(rank)
    for _ in range(20):
        x = torch.randn(8, 16, generator=generator)
        optimizer.zero_grad()
        (model(x) - x[:, :4]).square().mean().backward()
        optimizer.step()
        training.step()
    whole = {name: parameter.full_tensor().detach() for name, parameter in model.named_parameters()}
    x = torch.randn(8, 16, generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        y = model.eval()(x)
    torch.save((whole, training.state_dict(), x, y), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("selection", ["magnitude", "movement"])
def test_shards_of_two_processes_train_one_model(selection: str, tmp_path: Path) -> None:
    """FSDP: what both have together, loaded into a model of one process, computes what each of them did."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        (tmp_path / "port").write_text(str(free.getsockname()[1]))
    torch.multiprocessing.spawn(sharded_worker, (str(tmp_path), selection), nprocs=2)
    (whole, state, x, y), (other, _, _, z) = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert torch.equal(y, z) and all(torch.equal(whole[name], other[name]) for name in whole)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
    training = prepare(model, {"0": Sparse(0.3), "2": Int8()}, steps=20, ramp=Ramp(0, 15, every=4), selection=selection)
    model.load_state_dict(whole)
    training.load_state_dict(state)
    assert torch.equal(compress(model.eval())(x), y)
    assert int((canonical(model[0]).decompress() != 0).sum()) == round(0.3 * 16 * 32)


@pytest.mark.parametrize("selection", ["magnitude", "movement", "l0"])
def test_two_processes_have_equal_masks_and_weights(selection: str, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        (tmp_path / "port").write_text(str(free.getsockname()[1]))
    torch.multiprocessing.spawn(worker, (str(tmp_path), selection), nprocs=2)
    one, two = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert all(map(torch.equal, one, two)) and int((one[0] != 0).sum()) == round(0.3 * 512)


@pytest.mark.parametrize("plan", [Sparse(0.3), Int8(), Sparse(pattern="2:4", bits=8)], ids=repr)
def test_gradient_checkpointing_accumulation_and_mixed_precision(plan: Any) -> None:
    from torch.utils.checkpoint import checkpoint

    torch.manual_seed(0)
    dense, batches = (
        nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 4)),
        [torch.randn(8, 16) for _ in range(8)],
    )

    def trained(forward: Any, accumulate: int = 1, dtype: torch.dtype | None = None) -> nn.Module:
        own = copy.deepcopy(dense)
        training = prepare(own, plan, steps=8)
        optimizer = torch.optim.SGD(own.parameters(), 0.1)
        for batch in batches:
            for x in batch.chunk(accumulate):
                with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
                    y = forward(own, x)
                ((y.float() - x[:, :4]).square().mean() / accumulate).backward()
            optimizer.step()
            optimizer.zero_grad()
            training.step()
        return own.eval()

    x = torch.randn(5, 16)
    plain = trained(lambda own, x: own(x))
    again = trained(lambda own, x: checkpoint(own, x, use_reentrant=False))
    assert torch.equal(again(x), plain(x)), "checkpointed"
    assert torch.allclose(trained(lambda own, x: own(x), accumulate=2)(x), plain(x), atol=2e-2), "accumulated"
    mixed = trained(lambda own, x: own(x), dtype=torch.bfloat16)
    assert torch.allclose(mixed(x), plain(x), atol=5e-2), "in bfloat16"
    assert torch.equal(compress(mixed)(x), mixed(x))


@pytest.mark.parametrize("plan", [Sparse(0.3), Int8(), Int4(), LowRank(4, bits=8, rank_guard=False)], ids=repr)
def test_a_compiled_training_step_is_the_same(plan: Any) -> None:
    torch.manual_seed(0)
    dense, batches = (
        nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 4)),
        [torch.randn(8, 16) for _ in range(6)],
    )

    def trained(compiled: bool) -> nn.Module:
        own = copy.deepcopy(dense)
        training = prepare(own, plan, steps=6, ramp=Ramp(0, 4, every=1), learn_scales=True)
        forward = torch.compile(own, backend="eager") if compiled else own
        optimizer = torch.optim.SGD(own.parameters(), 0.1)
        for x in batches:
            optimizer.zero_grad()
            (forward(x) - x[:, :4]).square().mean().backward()
            optimizer.step()
            training.step()
        return own.eval()

    one, two, x = trained(False), trained(True), torch.randn(5, 16)
    assert torch.allclose(one(x), two(x), atol=1e-5)


def test_pruned_quantized_and_distilled_in_one_run(tmp_path: Path) -> None:
    """Prepared, saved half-way, resumed, frozen, saved and held against ONNX Runtime."""
    teacher, plan = classifier().eval(), Sparse(pattern="2:4", bits=8)
    batches = [{"input_ids": torch.randint(5, 40, (4, 7))} for _ in range(8)]

    def begun() -> tuple[Any, Any, Any, Any]:
        model = classifier()
        training = prepare(model, {"bert.encoder.*": plan, "*": None}, steps=8, ramp=Ramp(0, 6, every=2))
        distill = Distillation(teacher, model, logits=0.5, hidden="bert.encoder.layer.*")
        return model, training, distill, torch.optim.AdamW(model.parameters(), 1e-3)

    def train(model: Any, training: Any, distill: Any, optimizer: Any, own: list[Any]) -> None:
        for batch in own:
            optimizer.zero_grad()
            distill(model.train()(**batch)).backward()
            optimizer.step()
            training.step()

    whole = begun()
    train(*whole, batches)
    half = begun()
    train(*half, batches[:3])
    torch.save([half[0].state_dict(), half[1].state_dict(), half[3].state_dict()], tmp_path / "half.pt")
    again = begun()
    for own, state in zip((again[0], again[1], again[3]), torch.load(tmp_path / "half.pt"), strict=True):
        own.load_state_dict(state)
    train(*again, batches[3:])
    for distill in (whole[2], half[2], again[2]):
        distill.close()
    frozen = compress(again[0].eval(), blocks=False)
    assert torch.equal(frozen(**batches[0]).logits, whole[0].eval()(**batches[0]).logits)
    save(frozen, tmp_path / "frozen.safetensors")
    loaded = load(classifier(), tmp_path / "frozen.safetensors", blocks=False)
    assert torch.equal(loaded(**batches[0]).logits, frozen(**batches[0]).logits)
    assert validate(frozen, batches[0]).ok
