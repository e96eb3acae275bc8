"""The state that an optimizer keeps for a tensor, named so that checkpoints can be read under any sharding."""

import torch

from crossbatch.engine.optimizers.lars import LARS


def state_keys(optimizer: torch.optim.Optimizer) -> tuple[str, ...]:
    """Return the names of the state tensors that have a parameter's shape."""
    return ("mu",) if isinstance(optimizer, LARS) else ("exp_avg", "exp_avg_sq")


def ensured_state(optimizer: torch.optim.Optimizer, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the state of a tensor that the optimizer steps on; start it at zero, as the first step would, if there is none."""
    state = optimizer.state[tensor]
    for key in state_keys(optimizer):
        if key not in state:
            state[key] = torch.zeros_like(tensor)
    if not isinstance(optimizer, LARS) and "step" not in state:
        state["step"] = torch.zeros((), device=tensor.device)  # where fused AdamW wants it
    return state


def set_step_count(optimizer: torch.optim.Optimizer, step: int) -> None:
    """Set the number of steps that AdamW's bias correction counts, which is the same for all tensors."""
    for state in optimizer.state.values():
        if "step" in state:
            state["step"].fill_(step)
