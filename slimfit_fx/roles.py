"""What a saved tensor can be to the backward."""

from __future__ import annotations

import torch

# Whatever else they are to the backward, these stay as they are, unless an override names the role.
EXACT = "sensitive operand"
MASK = "float mask"

# Roles that a codec can be chosen for.
ROLES = {
    "linear input": "of a linear layer; read by its weight gradient only",
    "feed-forward input": "the same, where an activation function made it: the second layer of a feed-forward block",
    "activation input": "of GELU, SiLU, …",
    "activation output": "of tanh, sigmoid, …, whose derivative is a function of it",
    "softmax output": "attention probabilities",
    "attention operand": "query, key, value or result of attention, as two products or as one fused kernel",
    "norm input": "of a layer, RMS, group or batch norm, normalised or not",
    "convolution input": "of a convolution",
    "dropout mask": "and other booleans, such as ReLU's sign",
    "logits": "what the loss reads",
    "loss gradient": "of each token's loss by the input of a head that is computed in parts with its loss",
    "indices": "of an embedding, and other integers",
    "statistics": "one number a row or a channel: reciprocal standard deviations, log-sum-exps",
    EXACT: "read where small errors do not stay small: a denominator, an argument of a logarithm, a root, a comparison",
    MASK: "added to scores before a softmax, may be infinite",
    "other": "anything else: hidden states at a checkpoint, operands of products",
}

# Of the roles that are no floats.
ROLE_DTYPES = {"dropout mask": torch.bool, "indices": torch.int64}

# Not a choice: the caller holds it anyway, or it is the passes' own.
BORROWED = "input or parameter"
GATES = "gates"
