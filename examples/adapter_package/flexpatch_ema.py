"""A model of one's own with a mixer that no mask can cut: Llama, half of whose layers average over the past."""

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from flexpatch.registry import Adapter, no_mask, register


class EmaConfig(LlamaConfig):
    model_type = "ema_llama"


class EmaMixer(nn.Module):
    """Takes an exponential moving average over the tokens of each sequence, in place of attention."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.decay = nn.Parameter(torch.zeros(width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, hidden_states: Tensor, **kwargs: object) -> tuple[Tensor, None]:
        decay, mean, means = self.decay.sigmoid(), torch.zeros_like(hidden_states[:, 0]), []
        for token in hidden_states.unbind(1):
            mean = decay * mean + (1 - decay) * token
            means.append(mean)
        return self.out_proj(torch.stack(means, 1)), None


class EmaForCausalLM(LlamaForCausalLM):
    config_class = EmaConfig

    def __init__(self, config: EmaConfig) -> None:
        super().__init__(config)
        for layer in self.model.layers[::2]:
            layer.self_attn = EmaMixer(config.hidden_size)


AutoConfig.register("ema_llama", EmaConfig)
AutoModelForCausalLM.register(EmaConfig, EmaForCausalLM)
register(
    Adapter(
        name="Llama with moving averages",
        masks="single",
        unshared={"EmaMixer": no_mask},  # each runs on the separate sequences of a row, all else on the row
        restarts=False,
        tiny={"ema_llama": [{}]},
    )
)
