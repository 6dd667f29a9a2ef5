"""A real vLLM on a CPU answers as the model does here.

MODXFER_VLLM names a Python that has vLLM (docs/cluster.md says how one is made).
"""

import pytest
import torch

from modxfer_fast.serving import FORMATS, ListedAnswers, Server, ServerError
from modxfer_fast.teacher_cache import documents_of
from tests.support.real_vllm import marks, real_vllm
from tests.support.servable import MAX_LENGTH, save_servable, servable_tokenizer

TOP_K = 20
pytestmark = marks


@pytest.fixture(scope="module")
def vllm(tmp_path_factory):
    """Address of a server, and the model that it serves."""
    folder = tmp_path_factory.mktemp("vllm")
    model = save_servable(folder / "tiny")
    with real_vllm(folder) as url:
        yield url, model


def asking(url, top_k, classes=400):
    server = Server(url, retries=0)
    return ListedAnswers(
        server, FORMATS["vllm"], "tiny", classes=classes, top_k=top_k, request_tokens=200
    )


def test_served_classes_are_those_of_the_model_here(vllm):
    url, model = vllm
    tokenizer = servable_tokenizer()
    source, text = asking(url, TOP_K, len(tokenizer)), "def yield Größe"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    source.check(text, ids, len(tokenizer) - 1, MAX_LENGTH - 1)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(3, len(tokenizer), (6, 60), generator=generator)
    for document, listed in source.ask(documents_of(rows)):
        with torch.no_grad():
            logits = model(input_ids=document.ids[None].long()).logits[0, :-1]
        expected = logits.double().log_softmax(-1)
        told = expected.gather(-1, listed.ids[:-1].long())
        torch.testing.assert_close(listed.log_probs[:-1].double(), told, rtol=0, atol=1e-4)
        best = expected.topk(TOP_K).values
        torch.testing.assert_close(listed.log_probs[:-1].double(), best, rtol=0, atol=1e-4)


def test_more_classes_than_it_tells_are_told(vllm):
    tokenizer = servable_tokenizer()
    ids = tokenizer("def", add_special_tokens=False)["input_ids"]
    source = asking(vllm[0], 21, len(tokenizer))
    with pytest.raises(ServerError, match="start the server with --max-logprobs 21"):
        source.check("def", ids, len(tokenizer) - 1, 100)
