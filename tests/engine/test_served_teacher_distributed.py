"""Two ranks ask a server for their own rows, and train the student of one process."""

import torch

from modxfer_fast.data.collator import CausalCollator
from modxfer_fast.engine import DistillConfig, DistillTrainer, ServedTeacher
from modxfer_fast.serving import FORMATS, ListedAnswers, Server
from tests.support.model_server import ModelServer, serving
from tests.support.models import VOCAB_SIZE, TokenDataset, tiny_llama

TEXTS = [row.tolist() for row in TokenDataset(12).rows]
ROWS = [
    {"input_ids": [*a, *b], "is_target": [True] * len([*a, *b]), "lengths": [len(a), len(b)]}
    for a, b in zip(TEXTS[::2], TEXTS[1::2], strict=True)
]


def student(folder: str, url: str, stage: int | None, rows: int) -> dict[str, torch.Tensor]:
    """Weights behind three steps of two packed rows."""
    args = DistillConfig(
        output_dir=folder,
        zero_stage=stage,
        max_steps=3,
        per_device_train_batch_size=rows,
        train_sampling_strategy="sequential",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    source = ListedAnswers(Server(url), FORMATS["vllm"], "tiny", classes=VOCAB_SIZE, top_k=5)
    model = tiny_llama()
    trainer = DistillTrainer(
        model, args, ServedTeacher(source), ROWS, data_collator=CausalCollator(0)
    )
    trainer.train()
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def test_ranks_ask_for_their_own_rows(ranks, tmp_path):
    own = ModelServer(tiny_llama(48, 3, seed=1))
    with serving(own) as url:
        expected = student(str(tmp_path / "one"), url, None, 2)
        alone = sorted(map(tuple, (text for body in own.requests for text in body["prompt"])))
        own.requests.clear()
        for found in ranks.run(student, str(tmp_path / "two"), url, 2, 1):
            for name, value in expected.items():
                torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)
    together = sorted(map(tuple, (text for body in own.requests for text in body["prompt"])))
    assert together == alone
    assert len(own.requests) == 6  # of either rank one a step
