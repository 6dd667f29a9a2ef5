"""Completions by a vLLM that serves the student's base, and whose LoRA follows the student's."""

import contextlib
import os
import random
import shutil
import weakref
from collections.abc import Callable
from concurrent.futures import as_completed
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel

from modxfer_fast.config import VLLMSection
from modxfer_fast.engine import deepspeed
from modxfer_fast.engine.on_policy.generation import in_eval_mode
from modxfer_fast.engine.on_policy.rollouts import Sampling, Tokens
from modxfer_fast.engine.progress import here
from modxfer_fast.errors import ModelError
from modxfer_fast.files import new_folder, scratch_folder
from modxfer_fast.serving import ServedLoRA, ServerError, Written, open_server

# of the server's log-probabilities from the student's own, nats a token: rounding is far below
_MOST_APART = 0.5
_COMPARED = 32  # tokens
_KEPT = "rollouts_adapter_"  # in a checkpoint, with the window behind it
# fields of a LoraConfig that vLLM's LoRA has no place for, off in these values
_NO_PLACE = {
    "use_dora": (False,),
    "bias": ("none",),
    "lora_bias": (False,),
    "modules_to_save": (None, []),
    "trainable_token_indices": (None,),
    "layer_replication": (None,),
    "alora_invocation_tokens": (None,),
    # the others change the base too
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),
}


def check_servable(config: PeftConfig | None, where: str) -> None:
    """Raises ModelError of a student whose weights cannot follow by a LoRA of vLLM.

    Args:
        config: of its adapter; None of one that trains whole.
        where: what the message names.
    """
    if not isinstance(config, LoraConfig):
        got = "a student that trains whole" if config is None else config.peft_type.value
        raise ModelError(
            f"{where}: expected LoRA with on_policy.vllm, whose weights follow a LoRA alone, "
            f"got {got}"
        )
    for name, off in _NO_PLACE.items():
        if (value := getattr(config, name)) not in off:
            raise ModelError(
                f"{where}.{name}: expected {off[0]} with on_policy.vllm, whose LoRA has no place "
                f"for it, got {value!r}"
            )


def served_lora(section: VLLMSection) -> ServedLoRA:
    """The server of a section, not asked yet; a ConfigError where it has no key for it."""
    return ServedLoRA(open_server(section, "on_policy.vllm"), section.model)


class VLLMRollouts:
    """Completions by vLLM, with the adapter of the student as it is every `sync_frequency` steps.

    The main rank leaves the adapter's files for the server, under a new name each time, and has it
    load them and forget those before; each rank then asks for its own prompts.

    Args:
        student: PeftModel with one adapter, a LoRA.
        folder: of adapters, where the section names none.
        is_main: whether this is the main rank.
        on_main: what a function returns on the main rank, on every rank; its errors too.
        autocast: opens the context that the student computes in.
        whole: opens the one in which it is whole; None does under ZeRO.

    Raises:
        ModelError: another student.
    """

    def __init__(
        self,
        student: Any,
        section: VLLMSection,
        folder: str | Path,
        *,
        is_main: bool = True,
        on_main: Callable[[Callable[[], Any]], Any] = lambda act: act(),
        autocast: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
        whole: Callable[[], contextlib.AbstractContextManager] | None = None,
    ):
        adapters = student.active_adapters if isinstance(student, PeftModel) else []
        check_servable(student.peft_config[adapters[0]] if adapters else None, "model")
        if len(adapters) != 1:
            raise ModelError(f"model: expected one active adapter, got {', '.join(adapters)}")
        self.student, self.section, self.served = student, section, served_lora(section)
        self._adapter = adapters[0]
        self._root = Path(section.adapter_dir or folder).expanduser().absolute()
        self._is_main, self._on_main, self._autocast = is_main, on_main, autocast
        self._whole = whole or partial(deepspeed.whole, student)
        self._is_compared = False
        self._window: int | None = None  # of steps for which the adapter at hand writes
        self._name = ""
        self._files: Path | None = None  # of the adapters; of the main rank
        self._open = contextlib.ExitStack()
        weakref.finalize(self, self._open.close)

    def generate(
        self, prompts: list[Tokens], sampling: Sampling, *, seed: int, step: int
    ) -> list[Tokens]:
        """As of `Rollouts`.

        Raises:
            ServerError: it cannot be reached, refuses, or serves another base.
        """
        window = step // self.section.sync_frequency
        if window != self._window:
            self._follow(window, self._writer())
            if not self._is_compared:  # now that the server has the weights of here
                self._compare(prompts[0], sampling)
                self._is_compared = True
        draws, options = random.Random(seed), self._options(sampling)
        written = [
            self.served.write(
                self._name, prompt, sampling.room(prompt), seed=draws.getrandbits(63), **options
            )
            for prompt in prompts
        ]
        try:
            for completion in as_completed(written):
                completion.result()
                here.move()
        except ServerError:
            for completion in written:
                completion.cancel()
            raise
        pairs = zip(prompts, written, strict=True)
        return [sampling.cut(prompt, each.result().tokens) for prompt, each in pairs]

    def _options(self, sampling: Sampling) -> dict[str, Any]:
        options: dict[str, Any] = {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "stop_token_ids": list(sampling.stop),
        }
        classes = self.student.config.get_text_config().vocab_size
        if sampling.num_classes is not None and sampling.num_classes < classes:
            suppressed = range(sampling.num_classes, classes)
            least = -100.0  # that vLLM takes
            options["logit_bias"] = dict.fromkeys(map(str, suppressed), least)
        return options

    # ---- the adapter ----

    def _writer(self) -> Callable[[Path], None]:
        """What writes the adapter of now into a folder, on the main rank. Collective."""
        state = deepspeed.whole_state_dict(self.student, self._is_main, only_trainable=True)
        # asked whether embeddings were resized, PEFT would look on the hub
        return lambda folder: self.student.save_pretrained(
            folder,
            selected_adapters=[self._adapter],
            state_dict=state,
            save_embedding_layers=False,
        )

    def _follow(self, window: int, write: Callable[[Path], None]) -> None:
        """The server takes what `write` leaves in a folder for the adapter of a window."""

        def swap() -> str:
            if self._files is None:
                self._files = self._opened()
            folder = self._files / str(window)
            name = f"{self._files.stem.strip('.')}-{window}"
            with new_folder(folder) as scratch:
                write(scratch)
            # which is where PEFT puts an adapter of another name
            inside = folder / ("" if self._adapter == "default" else self._adapter)
            self.served.load(name, str(inside))
            self._forget()
            return name

        self._name, self._window = self._on_main(swap), window

    def _opened(self) -> Path:
        """The folder of this run's adapters; what killed runs left beside it is gone."""
        folder = self._open.enter_context(scratch_folder(self._root / "adapter"))
        os.chmod(folder, 0o755)  # the server may be another user's
        for name, path in self.served.loaded().items():
            if self._root in Path(path).parents and not Path(path).exists():
                self.served.unload(name)
        return folder

    def _forget(self) -> None:
        if self._files is not None and self._window is not None:
            self.served.unload(self._name)
            shutil.rmtree(self._files / str(self._window))

    def _compare(self, prompt: Tokens, sampling: Sampling) -> None:
        """Raises a ServerError where the server's base is not the student's. Collective."""

        def ask() -> tuple[Tokens, Written]:
            options = {**self._options(sampling), "temperature": 0.0}
            room = min(sampling.room(prompt), _COMPARED)
            return prompt, self.served.write(self._name, prompt, room, seed=0, **options).result()

        asked, (tokens, told) = self._on_main(ask)
        device = next(self.student.parameters()).device
        ids = torch.tensor([asked + tokens], device=device)
        with (
            in_eval_mode(self.student),
            self._whole(),
            torch.no_grad(),
            self._autocast(),
        ):
            logits = self.student(input_ids=ids).logits[0, len(asked) - 1 : -1]
        own = logits.float().log_softmax(-1).gather(-1, ids[0, len(asked) :, None])[:, 0]
        apart = (own.cpu() - torch.tensor(told)).abs().mean().item()
        if not apart <= _MOST_APART:
            raise ServerError(
                f"{self.served.server.url}: expected the base of the student behind "
                f"{self.served.model}; its log-probabilities are {apart:.2f} nats a token from "
                "the student's own"
            )

    # ---- checkpoints ----

    def save(self, folder: str | Path) -> None:
        """Keeps the adapter, where steps to come use it that cannot make it again."""
        if self.section.sync_frequency > 1 and self._files is not None:
            kept = self._files / str(self._window)
            shutil.copytree(kept, Path(folder) / f"{_KEPT}{self._window}")

    def load(self, folder: str | Path) -> None:
        """The server takes what `save` kept. Collective."""
        kept = self._on_main(lambda: next(Path(folder).glob(f"{_KEPT}*"), None))
        if kept is not None:

            def write(folder: Path) -> None:
                shutil.copytree(kept, folder, dirs_exist_ok=True)

            self._follow(int(kept.name.removeprefix(_KEPT)), write)

    def end(self) -> None:
        """Nothing of the run stays with the server, or in the folder of adapters. Collective."""

        def leave() -> None:
            self._forget()
            self._files = None
            self._open.close()

        self._on_main(leave)
        self._window = None
