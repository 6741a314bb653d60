"""The definition of every operation: the equation in plain PyTorch, one step after another, differentiable."""
