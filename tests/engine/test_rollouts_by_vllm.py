"""A real vLLM on a CPU writes what a student with LoRA writes here, as its adapter changes.

MODXFER_VLLM names a Python that has vLLM (docs/cluster.md says how one is made).
"""

from dataclasses import replace

import pytest

from modxfer_fast.config import VLLMSection
from modxfer_fast.engine.on_policy.generation import StudentRollouts
from modxfer_fast.engine.on_policy.rollouts import Sampling
from modxfer_fast.engine.on_policy.vllm import VLLMRollouts
from modxfer_fast.serving import ServerError
from tests.support.real_vllm import marks, real_vllm
from tests.support.servable import MAX_LENGTH, move, save_servable, servable_lora

PROMPTS = [[5, 17, 40, 99], [7], list(range(20, 80)), [5, 17, 40], [7]]
GREEDY = Sampling(max_new_tokens=24, max_length=MAX_LENGTH, temperature=0.0, stop=(0,))
pytestmark = marks


@pytest.fixture(scope="module")
def vllm(tmp_path_factory):
    """Address of a server, and the base that it serves."""
    folder = tmp_path_factory.mktemp("vllm")
    base = save_servable(folder / "tiny")
    more = ("--enable-lora", "--max-lora-rank", "8", "--max-loras", "1")
    with real_vllm(folder, *more, VLLM_ALLOW_RUNTIME_LORA_UPDATING="True") as url:
        yield url, base


def test_it_writes_with_the_adapter_of_each_step(vllm, tmp_path):
    url, base = vllm
    student = servable_lora(base)
    rollouts = VLLMRollouts(student, VLLMSection(url=url, model="tiny", retries=0), tmp_path)
    rollouts.served.check(MAX_LENGTH)
    seen = []
    for step in range(3):
        move(student, step)
        written = rollouts.generate(PROMPTS, GREEDY, seed=step, step=step)
        assert written == StudentRollouts(student).generate(PROMPTS, GREEDY, seed=0, step=0)
        assert written not in seen
        seen.append(written)
    few = replace(GREEDY, num_classes=150, stop=(0, seen[-1][0][3]))
    written = rollouts.generate(PROMPTS, few, seed=0, step=2)
    assert written == StudentRollouts(student).generate(PROMPTS, few, seed=0, step=0)
    drawn = replace(GREEDY, temperature=1.0)
    first, again, other = (
        rollouts.generate(PROMPTS, drawn, seed=seed, step=2) for seed in (1, 1, 2)
    )
    assert first == again != other
    assert first[1] != first[4]
    (name,) = rollouts.served.loaded()
    rollouts.end()
    assert not rollouts.served.loaded()
    with pytest.raises(ServerError, match=f"The model `{name}` does not exist"):
        rollouts.served.write(name, [5], 1, seed=0).result()
    wide = VLLMRollouts(servable_lora(base.__class__(base.config), 16), rollouts.section, tmp_path)
    with pytest.raises(ServerError, match="LoRA rank 16 is greater than max_lora_rank 8"):
        wide.generate(PROMPTS, GREEDY, seed=0, step=0)
