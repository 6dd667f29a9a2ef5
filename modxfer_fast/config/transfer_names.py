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
