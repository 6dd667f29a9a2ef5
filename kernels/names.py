"""Names of options that configuration, losses and kernels share. Importing them needs no torch."""

BACKENDS = ("cuda", "triton", "cpp", "reference")
# of `linear_kd_loss`: when its gradients are made
GRADIENTS = ("forward", "recompute")
# of `TeacherTopK`: what becomes of classes that are not listed
TAILS = ("bucket", "renormalise", "none")
# of `projection_loss`; row kernels know ROW_LOSSES, "relative" is "mse" over an energy of the batch
ROW_LOSSES = ("mse", "normalized_mse", "cosine", "smooth_l1")
LOSSES = (*ROW_LOSSES, "relative")
NORMS = ("none", "rms", "layer")
# of `modxfer_fast.losses`
PROJECTIONS = ("none", "full", "low_rank")
INITS = ("orthogonal", "identity", "xavier")
IMPLS = ("fused", "eager")
PAIR_REDUCTIONS = ("mean", "sum")
RELATIONS = ("minilmv2", "minilm")
