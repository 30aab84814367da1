"""The CPU runtime: only who asks for it gets it."""

from __future__ import annotations

import json

import pytest
from nemo_forks import Forked, environment, wait_for_all

pytestmark = pytest.mark.nemo

SCRIPT = """
import json, sys
from config_cases import DATA, compose
from vlmsft.recipe import finetune_recipe

found = {}
finetune_recipe(compose("experiment=lora", *DATA))
found["imported by a GPU recipe"] = "vlmsft.runtime.cpu" in sys.modules

import torch
from megatron.core.optimizer import clip_grads, optimizer

from vlmsft.runtime import cpu

def kernel(*args):
    raise RuntimeError("illegal memory access")

# as TransformerEngine's, where it is installed
clip_grads.l2_norm_impl = clip_grads.multi_tensor_scale_impl = optimizer.multi_tensor_scale_impl = kernel

found["active by import"] = torch.cuda.current_device is not cpu.CPU and "lambda" in repr(torch.cuda.current_device)
cpu.activate()
cpu.activate()
ones = torch.ones(2, device="cuda", pin_memory=True)
moved = [ones.cuda(), ones.to("cuda", non_blocking=True), ones.to(device="cuda:1")]
moved.append(torch.zeros_like(ones, device="cuda"))
found["devices"] = sorted({str(tensor.device) for tensor in [ones, *moved]})
found["type"] = ones.type()
torch.cuda.manual_seed(7)
state = torch.cuda.get_rng_state()
first = torch.rand(3)
torch.cuda.set_rng_state(state)
found["generator restored"] = torch.equal(first, torch.rand(3))
gradients, overflow = [torch.tensor([3.0, 4.0])], torch.zeros(1)
norm, _ = clip_grads.multi_tensor_applier(clip_grads.l2_norm_impl, overflow, [gradients], False)
found["norm"] = norm.item()
for module in (clip_grads, optimizer):
    halved = [torch.zeros(2)]
    module.multi_tensor_applier(module.multi_tensor_scale_impl, overflow, [gradients, halved], 0.5)
    found[f"halved in {module.__name__}"] = halved[0].tolist()
print("RESULT", json.dumps(found))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict:
    """Of a process that no other test has touched."""
    fork = Forked(exec, SCRIPT, {}, folder=tmp_path_factory.mktemp("cpu"), environment=environment())
    wait_for_all([fork], seconds=300)
    (line,) = (line for line in fork.output().splitlines() if line.startswith("RESULT"))
    return json.loads(line.split(" ", 1)[1])


def test_a_gpu_recipe_does_not_import_it(found):
    assert not found["imported by a GPU recipe"]


def test_importing_it_changes_nothing(found):
    assert not found["active by import"]


def test_cuda_means_cpu_once_active(found):
    assert found["devices"] == ["cpu"]


def test_gradients_go_to_no_kernel_of_a_gpu(found):
    """On a machine with a GPU, a training on its CPU ended with an illegal memory access."""
    assert found["norm"] == 5
    assert [found[name] for name in found if name.startswith("halved in")] == [[1.5, 2.0]] * 2


def test_megatron_sees_the_type_it_asks_for(found):
    assert found["type"] == "torch.cuda.FloatTensor"


def test_one_generator_serves_both(found):
    assert found["generator restored"]
