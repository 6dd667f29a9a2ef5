"""Names of the choices of module transfer, as YAML and `modxfer_fast.transfer` take them."""

LAYER_MAPS = (
    "skip",
    "skip_last",
    "uniform",
    "explicit",
    "mean",
    "mean_product",
    "reference_avg",
    "cka",
)
MAP_METHODS = (
    "lsa",
    "lsa_abs",
    "procrustes",
    "ridge",
    "reduced_rank",
    "kd_projection",
    "identity",
    "truncate",
    "stride",
    "shuffled",
    "random_matched",
)
WRITES = ("rotation", "regression")
SCALES = ("none", "global", "feature")
SCOPES = ("layer", "global")
PAIRINGS = ("words", "spans", "positions")
POOLINGS = ("mean", "first")
HEADS = ("fresh", "transport")
TEXTS = ("train", "unlabelled")
# attention_out and ffn_out are sublayer outputs before the residual is added.
SPACES = (
    "attention_in",
    "query",
    "key",
    "value",
    "context",
    "attention_out",
    "ffn_in",
    "ffn_gate",
    "ffn_up",
    "ffn_inner",
    "ffn_out",
    "layer_out",
)
