"""HF Trainer events -> the console."""

from transformers import TrainerCallback

from modxfer_fast.report.console import JobConsole

_SHOWN = {
    "loss": "loss",
    "kd_loss": "kd",
    "ce_loss": "ce",
    "hidden_loss": "hidden",
    "relation_loss": "relation",
    "eval_perplexity": "held-out perplexity",
    "eval_kd": "held-out KL",
    "eval_hidden_loss": "held-out hidden",
    "eval_hidden_cosine": "held-out cosine",
    "eval_relation_loss": "held-out relation",
    "eval_f1": "validation F1",
    "eval_accuracy": "validation accuracy",
    "skipped_steps": "skipped steps",
    "tokens_per_s": "tokens/s",
    "peak_mem_mib": "peak MiB",
}


class ConsoleCallback(TrainerCallback):
    """Draws the progress of a training run on a `JobConsole`."""

    def __init__(self, console: JobConsole) -> None:
        self._console = console
        self._display = None

    def on_train_begin(self, args, state, control, **kwargs):
        self._display = self._console.training(state.max_steps)
        self._display.step(state.global_step)

    def on_step_end(self, args, state, control, **kwargs):
        self._display.step(state.global_step)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self._display is None:
            return
        numbers = {_SHOWN[key]: logs[key] for key in _SHOWN if key in logs}
        if numbers:
            self._display.numbers(
                state.global_step, numbers, keep=any(k.startswith("eval_") for k in logs)
            )

    def on_train_end(self, args, state, control, **kwargs):
        self._display.close()
        self._display = None
