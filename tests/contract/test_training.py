"""What is trained is what is deployed: a prepared layer in evaluation is the compressed one, to the bit."""

from __future__ import annotations

import torch
from torch import nn

from contract.cases import EVERY, Case
from pycompress import Ramp, compress, prepare
from pycompress.model import compressed_layers
from pycompress.nn.trained import is_trained


@EVERY
def test_in_evaluation_it_is_the_compressed_layer_before_during_and_after_training(case: Case) -> None:
    model, x = nn.Sequential(case.dense()), case.x()
    keys = list(model.state_dict())
    training = prepare(model, case.method, steps=4, ramp=Ramp(0, 2, every=1), learn_scales=True)
    if not is_trained(model[0]):
        assert case.layer_type.weight_type.name == "low_rank" and case.kind.name != "linear"
        assert "cannot be trained" in training.left["0"]
        return
    optimizer = torch.optim.SGD(model.parameters(), 1e-2, momentum=0.9)
    for step in range(5):
        frozen = compress(model.eval())
        assert isinstance(frozen[0], case.layer_type) or step < 2, "the milder method may be another"
        assert torch.equal(model(x), frozen(x)), step
        if step == 4:
            break
        optimizer.zero_grad()
        model.train()(x).square().mean().backward()
        optimizer.step()
        training.step()
    assert [key for key in model.state_dict() if "low_rank" not in key] == keys
    assert list(compressed_layers(frozen)) == ["0"]
