"""Training that ends when its held-out figure no longer improves."""

from transformers import EarlyStoppingCallback


class EarlyStopping(EarlyStoppingCallback):
    """The callback of transformers, which a resumed run takes up where it was.

    A run that it has ended stays ended.
    """

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        kept = state.stateful_callbacks.get(type(self).__name__)
        if isinstance(kept, dict):  # of the checkpoint; otherwise a new run begins
            counter = kept["attributes"]["early_stopping_patience_counter"]
            self.early_stopping_patience_counter = counter
        if self.early_stopping_patience_counter >= self.early_stopping_patience:
            control.should_training_stop = True
