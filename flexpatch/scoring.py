"""Run rows and score their hidden states within the model's forward."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from flexpatch.errors import FlexpatchError
from flexpatch.forward import Exits, with_exits


def run_rows(model: nn.Module, inputs: dict[str, Any], score: Callable[[Tensor], Tensor]) -> Tensor:
    """Run rows and return ``score(hidden states)`` instead of logits.

    ``score`` is called within the model's forward, where parameters that an engine shards or offloads are at hand.

    Args:
        model: A model after :func:`flexpatch.apply`.
        inputs: From :func:`flexpatch.model_inputs`.
        score: Takes the last hidden states (B, L, D). Called once.

    Returns:
        The tensor that ``score`` returned.

    Raises:
        FlexpatchError: If the model's hooks are gone.
    """
    scores: list[Tensor] = []

    def leave(output: Any) -> None:
        scores.append(score(output.last_hidden_state))
        output.hidden_states = (scores[0],)

    ids = with_exits(inputs["input_ids"], Exits(callers=[leave]))
    # No position keeps its logits, so the head itself sees an empty tensor.
    output = model(**(inputs | {"input_ids": ids}), logits_to_keep=ids.new_empty(0))
    if not scores:
        raise FlexpatchError("flexpatch's hooks on this model did not run: call flexpatch.apply(model)")
    # Engines hook into what a forward returns, and may round it (accelerate's FSDP2, in bfloat16): gradients take the
    # way through it, values do not.
    scored, returned = scores.pop(), output.hidden_states[0]
    if returned.dtype == scored.dtype:
        return returned
    returned = returned.to(scored.dtype)
    return returned + (scored - returned).detach()
