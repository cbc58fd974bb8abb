"""Families without attention: Mamba, Mamba 2, Falcon Mamba, RWKV 4 and xLSTM. All their mixers carry a state."""

from typing import Any

from flexpatch.registry import CONVOLUTION, STATE_SPACE, Adapter, LogitTransform, no_mask, register

register(
    Adapter(
        name="Mamba, Falcon Mamba",
        masks="none",
        unshared=dict.fromkeys(("MambaMixer", "FalconMambaMixer"), no_mask),
        implementations=("eager",),
        restarts=False,
        since="5.16",
        tiny={name: [dict(state_size=8, time_step_rank=8)] for name in ("mamba", "falcon_mamba")},
    )
)

register(
    Adapter(
        name="Mamba 2",
        masks="none",
        unshared={"Mamba2Mixer": no_mask},
        branched={"Mamba2Mixer": (CONVOLUTION, STATE_SPACE)},
        implementations=("eager",),
        restarts=False,
        since="5.16",
        tiny={"mamba2": [dict(state_size=8, num_heads=8, n_groups=2, chunk_size=16)]},
    )
)

register(
    Adapter(
        name="RWKV 4",
        masks="none",
        # Both look at the token before.
        unshared=dict.fromkeys(("RwkvSelfAttention", "RwkvFeedForward"), no_mask),
        implementations=("eager",),
        restarts=False,
        since="5.16",
        tiny={"rwkv": [dict(attention_hidden_size=64, rescale_every=2)]},
        limits="batches padded on the left run as they are given",
    )
)


def any_length(config: Any) -> str | None:
    """Refuse the modes in which the unpatched model itself does not take sequences of any length."""
    if config.mode == "inference":
        return None
    return (
        f"mode='{config.mode}' does not take sequences of any length, unpatched either: 'train' wants multiples of "
        "chunk_size, and 'train_with_padding' fails. Set config.mode = 'inference' before the model is built: it "
        "trains too"
    )


register(
    Adapter(
        name="xLSTM",
        masks="none",
        unshared={"xLSTMLayer": no_mask},
        implementations=("eager",),
        restarts=False,
        reject=any_length,
        logit_transform=lambda config: LogitTransform(softcap=config.output_logit_soft_cap),
        since="5.16",
        tiny={"xlstm": [dict(num_heads=4, num_hidden_layers=3, chunk_size=16)]},
        limits="mode='inference', the default; in eval mode, rows of at most max_inference_chunksize tokens; batches "
        "padded on the left run as they are given",
    )
)
